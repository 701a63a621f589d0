"""WHAT HAPPENED: a pure function of a run folder; it reads facts, writes pages, and imports nothing that trains."""
