"""Ready-made Pyro programs: plain functions that import Pyro and torch only."""

from pyroem.models.gaussian import gaussian_mixture

__all__ = ["gaussian_mixture"]
