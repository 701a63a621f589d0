"""DOCUMENTS: from whatever file a person has to clean documents and conversations."""
