"""Constraints of covariances, or variances, that components share in part."""

import pyroem.constraints.coordinates  # noqa: F401 - tells torch how to reach them from coordinates
from pyroem.constraints.shared import (
    DIAGONALS,
    MATRICES,
    SharedConstraint,
    covariances,
    structure_of,
    variances,
)

__all__ = [
    "DIAGONALS",
    "MATRICES",
    "SharedConstraint",
    "covariances",
    "structure_of",
    "variances",
]
