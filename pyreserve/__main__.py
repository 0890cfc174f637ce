"""``python -m pyreserve``: the same as the command ``pyreserve``."""

from pyreserve.cli import main

main()
