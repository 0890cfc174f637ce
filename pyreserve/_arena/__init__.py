"""Arenas: layouts brought to life, with a heap in them."""
