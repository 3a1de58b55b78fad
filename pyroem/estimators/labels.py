"""Components that are known for some rows: what ``y`` may hold, and starts that agree with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

UNKNOWN = -1


def known_components(y: Any, rows: int, components: int) -> NDArray[np.int64] | None:
    """``y`` as integers, ``-1`` for unknown; None where it is none or holds no ``-1`` at all.

    Raises:
    ------
    ValueError
        Where ``y`` holds ``-1`` and something else than whole numbers up to ``components - 1``, or
        has another length than the data.
    """
    if y is None:
        return None
    given = np.asarray(y)
    if given.dtype.kind not in "iuf" or not np.any(given == UNKNOWN):
        return None
    if given.shape != (rows,):
        raise ValueError(
            f"y: expected one component for each row, shape ({rows},); got shape {given.shape}."
        )
    labels = given.astype(np.int64)
    if np.any(labels != given) or labels.min() < UNKNOWN or labels.max() >= components:
        raise ValueError(
            f"y: it holds -1 and so says which component each row belongs to. Expected whole"
            f" numbers from -1 (unknown) to {components - 1}; got {given.min()} to {given.max()}."
        )
    return labels


def agreeing(responsibilities: NDArray, labels: NDArray[np.int64]) -> NDArray:
    """Responsibilities with components named so that they fit the labels best, then clamped."""
    known = labels != UNKNOWN
    one = np.eye(responsibilities.shape[1])[labels[known]]
    own, name = linear_sum_assignment(one.T @ responsibilities[known], maximize=True)
    found = np.empty_like(responsibilities)
    found[:, own] = responsibilities[:, name]
    found[known] = one
    return found
