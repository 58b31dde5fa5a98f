"""``python -m ftc``: the command line."""

from ftc.cli import main

main()
