"""Choosing among programs: criteria over a grid of settings, and the likelihood-ratio test."""

from pyroem.selection.candidates import Candidate, Selection
from pyroem.selection.grid import select
from pyroem.selection.likelihood_ratio import LikelihoodRatioTest, likelihood_ratio_test

__all__ = ["Candidate", "LikelihoodRatioTest", "Selection", "likelihood_ratio_test", "select"]
