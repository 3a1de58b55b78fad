"""Estimators in scikit-learn's convention, on pyroem's ready-made programs and solvers."""

from pyroem.estimators.gaussian import GaussianMixture

__all__ = ["GaussianMixture"]
