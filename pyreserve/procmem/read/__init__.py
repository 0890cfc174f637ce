"""Read a process's mappings from /proc or from saved files."""
