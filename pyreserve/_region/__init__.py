"""One region: its verbs, its live views, and the base class of objects built on a region."""
