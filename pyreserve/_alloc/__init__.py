"""Containers and allocators over one region."""
