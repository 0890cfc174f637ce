"""Containers and allocators, each over one region. Knows _region, not _arena."""
