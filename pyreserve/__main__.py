"""``python -m pyreserve`` runs the ``pyreserve`` command."""

from pyreserve.cli import main

main()
