"""Estimators in scikit-learn's convention, on pyroem's ready-made programs and solvers."""

from pathlib import Path
from typing import Any

from pyroem.estimators import storage
from pyroem.estimators.categories import BernoulliMixture, CategoricalMixture, LatentClass
from pyroem.estimators.counts import PoissonMixture
from pyroem.estimators.gaussian import GaussianMixture
from pyroem.estimators.mixed import MixedMixture
from pyroem.estimators.regression import MixtureOfRegressions
from pyroem.estimators.student_t import StudentTMixture

CLASSES = (
    BernoulliMixture,
    GaussianMixture,
    LatentClass,
    MixedMixture,
    MixtureOfRegressions,
    PoissonMixture,
    StudentTMixture,
)


def load(path: str | Path) -> Any:
    """The estimator in a file that its ``save`` wrote, of whatever class it is."""
    return storage.read(path, {kind.__name__: kind for kind in CLASSES})


__all__ = [
    "BernoulliMixture",
    "CategoricalMixture",
    "GaussianMixture",
    "LatentClass",
    "MixedMixture",
    "MixtureOfRegressions",
    "PoissonMixture",
    "StudentTMixture",
    "load",
]
