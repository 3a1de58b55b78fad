"""Components that are known for some rows: what ``y`` may hold, and starts that agree with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

UNKNOWN = -1


def known_components(y: Any, rows: int, components: int) -> NDArray[np.int64] | None:
    """``y`` as integers, ``-1`` for unknown; None where it is none or leaves nothing unknown.

    Unknown are ``-1``, NaN and None.

    Raises:
    ------
    ValueError
        Where ``y`` holds such and something else than whole numbers up to ``components - 1``, or
        has another length than the data.
    """
    if y is None:
        return None
    given = np.asarray(y)
    if given.dtype.kind == "O":
        unknown = np.array([is_unknown(cell) for cell in given.ravel()]).reshape(given.shape)
        try:
            given = np.where(unknown, UNKNOWN, given).astype(np.float64)
        except (TypeError, ValueError):
            return None
    if given.dtype.kind == "f":
        given = np.where(np.isnan(given), UNKNOWN, given)
    if given.dtype.kind not in "iuf" or not np.any(given == UNKNOWN):
        return None
    if given.shape != (rows,):
        raise ValueError(
            f"y: expected one component for each row, shape ({rows},); got shape {given.shape}."
        )
    labels = given.astype(np.int64)
    if np.any(labels != given) or labels.min() < UNKNOWN or labels.max() >= components:
        raise ValueError(
            "y: it leaves some unknown and so says which component each row belongs to. Expected"
            f" whole numbers from -1 (unknown) to {components - 1}; got {given.min()} to"
            f" {given.max()}."
        )
    return labels


def is_unknown(cell: Any) -> bool:
    """Whether a cell of objects is missing: None, NaN, or pandas' NA and NaT, unlike themselves."""
    if cell is None:
        return True
    try:
        return not bool(cell == cell)
    except TypeError:
        return True


def agreeing(responsibilities: NDArray, labels: NDArray[np.int64]) -> NDArray:
    """Responsibilities with components named so that they fit the labels best, then clamped."""
    known = labels != UNKNOWN
    one = np.eye(responsibilities.shape[1])[labels[known]]
    own, name = linear_sum_assignment(one.T @ responsibilities[known], maximize=True)
    found = np.empty_like(responsibilities)
    found[:, own] = responsibilities[:, name]
    found[known] = one
    return found
