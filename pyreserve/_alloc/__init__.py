"""Containers and allocators, each over one region. Knows _region and _native, not _arena."""
