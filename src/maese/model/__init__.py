"""WEIGHTS: load, adapt, recognise and save. Every use of the insides of transformers and PEFT lives here."""
