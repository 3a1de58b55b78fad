"""Rows that show a part of their elements only, pattern by pattern: multivariate normals with NaN.

Rows that show the same elements share their natural parameters, and what is missing of them is
expected from sums over them. So the rows are sorted by pattern, and what costs more than a product
of matrices is done once for each pattern and state.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import unwrap
from pyroem.estep.columns import Columns, Scratch
from pyroem.estep.layout import Layout, lower_index
from pyroem.families import Arguments, Statistics
from pyroem.mstep.runs import Run
from pyroem.mstep.sites import pad
from pyroem.statistics import SiteStatistics


class Patterns:
    """Which elements every row shows, for several sites; rows are taken in the order ``order``.

    ``cuts`` are the bounds of runs of rows that show the same at all sites.
    """

    def __init__(self, layouts: list[Layout], nodes: Mapping[str, Any], rows: int) -> None:
        self.seen = {x.site.name: _seen(x, nodes, rows) for x in layouts}
        keys = torch.cat(list(self.seen.values()), 1)
        _, number = torch.unique(keys, dim=0, return_inverse=True)
        self.order = torch.argsort(number, stable=True)
        self.back = torch.argsort(self.order)
        changed = number[self.order].diff().nonzero().reshape(-1) + 1
        self.cuts = torch.cat([torch.zeros(1).long(), changed, torch.tensor([rows])])
        first = self.order[self.cuts[:-1]]
        self.shown = {name: seen[first] for name, seen in self.seen.items()}

    def runs(self, start: int, stop: int) -> tuple[slice, list[tuple[int, int]]]:
        """The runs that have rows from ``start`` to ``stop``, and these rows, from 0 on."""
        low = int(torch.searchsorted(self.cuts, start, right=True)) - 1
        high = int(torch.searchsorted(self.cuts, stop))
        bounds = self.cuts[low : high + 1].clamp(start, stop) - start
        ends = bounds.tolist()
        return slice(low, high), list(pairwise(ends))


def _seen(layout: Layout, nodes: Mapping[str, Any], rows: int) -> Tensor:
    base = unwrap(nodes[layout.site.name]["fn"])[0]
    assert layout.site.family.partial is not None
    seen = pad(layout.site.family.partial.seen(base), layout.rank, 1)
    size = seen.shape[-1]
    order = [*(d for d in range(layout.rank) if d not in layout.rows), *layout.rows, layout.rank]
    return seen.permute(order).reshape(-1, size).expand(rows, size)


class PartialSums:
    """The part of one site in an E-step: what it adds to log-probabilities, and its statistics."""

    def __init__(self, layout: Layout, columns: Columns, patterns: Patterns, run: Run) -> None:
        assert layout.site.family.partial is not None
        self.layout, self.columns, self.patterns = layout, columns, patterns
        self.family = layout.site.family.partial
        self.shown = patterns.shown[layout.site.name]
        centred = run.centred(layout.site)
        self.arguments: Arguments = {
            key: layout.by_state(centred[key], layout.site.family.dims(key))
            for key in layout.site.arguments
        }
        self.size = self.shown.shape[1]
        self.lower = lower_index(self.size * (self.size + 1) // 2, torch.device("cpu"))
        self.eta: tuple[slice, Statistics, Tensor] | None = None  # of the latest block
        self.weight: Tensor | None = None
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def block(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        """``x``, the lower triangle of ``x x'`` and a one, for each row of a block."""
        (x, products), _ = self.columns.block(start, stop, scratch)
        phi = scratch.empty((self, "phi"), (len(x) + len(products) + 1, stop - start), x)
        torch.cat([x, products], out=phi[:-1])
        phi[-1] = 1.0
        return phi

    def log_probabilities(self, phi: Tensor, start: int, stop: int) -> Tensor:
        """The states by the rows of a block."""
        which, runs = self.patterns.runs(start, stop)
        (first, second), normaliser = self._natural(which)
        i, j = torch.tril_indices(self.size, self.size)
        packed = second[..., i, j] * torch.where(i == j, 1.0, 2.0).to(second)
        eta = torch.cat([first, packed, -normaliser.unsqueeze(-1)], -1).movedim(1, 0)
        found = phi.new_empty((eta.shape[1], stop - start))
        for number, (a, b) in enumerate(runs):
            torch.mm(eta[number], phi[:, a:b], out=found[:, a:b])
        return found

    def _natural(self, which: slice) -> tuple[Statistics, Tensor]:
        if self.eta is None or self.eta[0] != which:
            self.eta = which, *self.family.natural(self.arguments, self.shown[which])
        return self.eta[1:]

    def add(self, posterior: Tensor, phi: Tensor, start: int, stop: int) -> None:
        """Add the statistics of a block, whose posterior is given: its states by its rows."""
        which, runs = self.patterns.runs(start, stop)
        sums = torch.stack([posterior[:, a:b] @ phi[:, a:b].T for a, b in runs], 1)
        first, packed, weight = sums.split([self.size, len(phi) - self.size - 1, 1], -1)
        shown, w = self.shown[which], weight.squeeze(-1)
        eta, _ = self._natural(which)
        statistics = first, packed[..., self.lower]
        filled = self.family.complete(self.arguments, shown, eta, statistics, w)
        total = (w.sum(-1), *filled)
        held = (self.weight, self.first, self.second)
        if self.weight is None:
            self.weight, self.first, self.second = (t.double() for t in total)
        else:
            pairs = zip(held, total, strict=True)
            self.weight, self.first, self.second = (
                h + t.double() for h, t in pairs if h is not None
            )

    def statistics(self, dtype: torch.dtype) -> SiteStatistics:
        """The expected statistics of all blocks, as of complete rows."""
        assert self.weight is not None and self.first is not None and self.second is not None
        i, j = torch.tril_indices(self.size, self.size)
        sums = [self.first.T.to(dtype), self.second[:, i, j].T.to(dtype)]
        return self.layout.statistics(self.weight.unsqueeze(0).to(dtype), sums)
