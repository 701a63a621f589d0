"""JUDGEMENT: how likely a model finds a text, and whether two models really differ."""
