"""The rows of several data sets as one: in a batch every copy of the program has its own data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyroem.estep.kernel import BLOCK, Rows


def stackable(rows: Rows) -> bool:
    """Whether rows like these can be stacked: small enough for their statistics to be kept."""
    return rows.cached is not None and rows.patterns is None and rows.device.type == "cpu"


def stacked(parts: Sequence[Rows]) -> Rows:
    """The rows of as many data sets, all of one size and without weights, for E-steps.

    Their statistics (copies, features, rows) and the sums of their base measure have a leading dim
    of copies.
    """
    assert all(stackable(part) and part.weights is None for part in parts)
    together = _with(parts[0], lambda g, i: torch.stack([_kept(p, g, i) for p in parts]))
    together.measure = torch.stack([part.measure for part in parts])
    together.columns = {}  # those of one data set say nothing of the others
    return together


def selected(rows: Rows, index: Tensor) -> Rows:
    """Stacked rows of some copies."""
    fewer = _with(rows, lambda g, i: _kept(rows, g, i).index_select(0, index))
    fewer.measure = rows.measure.index_select(0, index)
    return fewer


def _kept(rows: Rows, group: int, part: int) -> Tensor:
    assert rows.cached is not None
    (whole,) = rows.cached[group][part]
    return whole


def _with(rows: Rows, statistics: Callable[[int, int], Tensor]) -> Rows:
    """The rows with other statistics, by group and part, which have copies."""
    own = copy.copy(rows)
    assert rows.cached is not None
    own.cached = [
        [[statistics(g, i)] for i in range(len(parts))] for g, parts in enumerate(rows.cached)
    ]
    copies = max(len(whole) for parts in own.cached for (whole,) in parts)
    own.size = max(64, BLOCK // (copies * (2 * rows.mixture.num_states + rows.features)))
    return own
