"""Choosing among programs: criteria over a grid of settings."""

from pyroem.selection.candidates import Candidate, Selection
from pyroem.selection.search import select

__all__ = ["Candidate", "Selection", "select"]
