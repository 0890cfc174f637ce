"""What a process has mapped, read from /proc or from saved files."""
