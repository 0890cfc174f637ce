"""One reservation: its verbs, its live views, and the base of what stands on it."""
