"""NUMBERS: from documents and conversations to the ids and masks the model sees."""
