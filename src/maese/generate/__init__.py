"""ANSWERS: from a prompt to text. Sampling is pure, the engine knows only ids, the faces are thin."""
