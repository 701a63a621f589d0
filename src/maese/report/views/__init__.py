"""Drawings of one thing each, as pure functions: data in, HTML out."""
