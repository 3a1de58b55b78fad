"""Expected sufficient statistics: the only thing that crosses from the E-step to the M-step.

For each site, ``weight = sum_n w_n`` and ``sum_n w_n T(x_n)`` over its *cells*: the combinations of
states and covariate levels along which the site's arguments differ. They add over rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SiteStatistics:
    """Expected statistics of one site; every tensor has the site's cell dims, then event dims."""

    weight: Tensor
    values: tuple[Tensor, ...]

    def __add__(self, other: SiteStatistics) -> SiteStatistics:
        values = tuple(a + b for a, b in zip(self.values, other.values, strict=True))
        return SiteStatistics(self.weight + other.weight, values)

    def select(self, index: Tensor) -> SiteStatistics:
        """Those of some copies, where the first dim counts copies."""
        values = tuple(v.index_select(0, index) for v in self.values)
        return SiteStatistics(self.weight.index_select(0, index), values)

    def scaled(self, factor: float | Tensor) -> SiteStatistics:
        """All of them times ``factor``."""
        return SiteStatistics(self.weight * factor, tuple(v * factor for v in self.values))


Statistics = Mapping[str, SiteStatistics]


def add(a: Statistics, b: Statistics) -> dict[str, SiteStatistics]:
    """The statistics of two disjoint sets of rows together."""
    return {name: a[name] + b[name] for name in a}


def weighted_sum(
    weights: Tensor, statistic: Tensor, shape: tuple[int, ...], keep: frozenset[int]
) -> Tensor:
    """Sum ``weights * statistic`` over the batch dims of ``shape`` that are not in ``keep``.

    ``weights`` has the batch dims, ``statistic`` the batch dims and then event dims; either may
    have size one where it does not vary, and the product of the two is never formed.
    """
    rank = len(shape)
    events = statistic.shape[rank:]
    in_w = [i for i in range(rank) if weights.shape[i] > 1]
    in_t = [i for i in range(rank) if statistic.shape[i] > 1]
    out = [i for i in range(rank) if i in keep and (i in in_w or i in in_t)]
    event_axes = list(range(rank, rank + len(events)))
    repeats = 1
    for i, size in enumerate(shape):
        if i not in keep and i not in in_w and i not in in_t:
            repeats *= size
    total = torch.einsum(
        weights.reshape([weights.shape[i] for i in in_w]),
        in_w,
        statistic.reshape([statistic.shape[i] for i in in_t] + list(events)),
        in_t + event_axes,
        out + event_axes,
    )
    return (
        total.reshape([shape[i] if i in out else 1 for i in range(rank)] + list(events)) * repeats
    )
