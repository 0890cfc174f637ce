"""Arenas: a heap of page-sized blocks in an address-space layout."""
