"""The system as pyreserve sees it: /proc, limits, kernel features, forks, files."""
