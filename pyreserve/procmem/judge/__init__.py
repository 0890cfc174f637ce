"""Classify mappings, recognise their owners, and derive warnings."""
