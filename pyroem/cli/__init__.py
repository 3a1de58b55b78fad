"""The command ``pyroem``: mixtures for tables, from the shell."""

from pyroem.cli.program import main

__all__ = ["main"]
