"""How the sites of a mixture lie in matrices: one row for each statistic, one column for a row.

A site's factor is ``<eta, T(x_n)> - A + h(x_n)``. With the statistics of all rows as a matrix
``Phi`` (features by rows) and the natural parameters as a matrix ``E`` (states by features), the
log-probabilities of all rows are ``E Phi`` and the expected statistics ``Phi R'``, with ``R`` the
posterior probabilities (states by rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyroem.families import Arguments, natural_parameters
from pyroem.mstep.sites import SiteModel, pad
from pyroem.statistics import SiteStatistics

SMALLEST_LOG = {torch.float64: -1e300, torch.float32: -1e30}


@dataclass(frozen=True)
class Layout:
    """Where the batch dims of a site go.

    ``states`` are its dims along which an argument varies with an assignment, in the order of
    ``axes``, their places among the assignments of the group; ``features`` the other dims along
    which an argument varies; ``pooled`` those along which none does (the rows apart); ``rows`` the
    dims of the rows' plates.
    """

    site: SiteModel
    axes: tuple[int, ...]
    states: tuple[int, ...]
    features: tuple[int, ...]
    pooled: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of the site's batch dims."""
        return len(self.site.shape)

    @cached_property
    def num_states(self) -> int:
        """The number of combinations of the states that the arguments vary with."""
        return _size(self.site.shape[d] for d in self.states)

    @cached_property
    def num_features(self) -> int:
        """The number of feature cells."""
        return _size(self.site.shape[d] for d in self.features)

    @cached_property
    def repeats(self) -> int:
        """How many elements of each row share a cell."""
        return _size(self.site.shape[d] for d in self.pooled)

    @cached_property
    def packed(self) -> tuple[bool, ...]:
        """Which statistics come as the lower triangle of a symmetric matrix."""
        dims = self.site.family.event_dims
        return tuple(self.site.family.packed is not None and e == 2 for e in dims)

    @cached_property
    def event_dims(self) -> tuple[int, ...]:
        """The number of event dims of each statistic, as it comes."""
        pairs = zip(self.site.family.event_dims, self.packed, strict=True)
        return tuple(1 if packed else e for e, packed in pairs)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """For each statistic the number of its features."""
        widths = []
        for t, packed in zip(self.site.data.few, self.packed, strict=True):
            event = t.shape[self.rank :]
            size = event[0] * (event[0] + 1) // 2 if packed else _size(event)
            widths.append(self.num_features * size)
        return tuple(widths)

    @cached_property
    def heights(self) -> tuple[int, ...]:
        """The rows of Phi: the widths, and the number of elements where masked."""
        return (*self.widths, *(() if self.site.mask is None else (self.num_features,)))

    def plain(self, base: Any, value: Tensor) -> bool:
        """Whether the statistics need nothing of the distribution that differs by row or state.

        Then those of one row of ``value`` (in the site's layout) have one row and one state.
        """
        if len(self.rows) != 1:
            return False
        one = value.narrow(self.rows[0], 0, 1).to(self.site.dtype)
        try:
            found = self.site.family.statistics(base, one)
        except RuntimeError:  # its constants have the rows of all data
            return False
        inner = (*self.features, *self.pooled)
        pairs = zip(found, self.site.family.event_dims, strict=True)
        padded = [pad(t, self.rank, e) for t, e in pairs]
        return all(t.shape[d] == 1 for t in padded for d in range(self.rank) if d not in inner)

    @cached_property
    def _cells(self) -> tuple[int, ...]:
        kept = {*self.states, *self.features}
        return tuple(n if d in kept else 1 for d, n in enumerate(self.site.shape))

    @cached_property
    def _state_cells(self) -> tuple[int, ...]:
        return tuple(n if d in self.states else 1 for d, n in enumerate(self.site.shape))

    @cached_property
    def _order(self) -> tuple[int, ...]:
        rest = [d for d in range(self.rank) if d not in self.states and d not in self.features]
        return (*self.states, *self.features, *rest)

    def natural(self, arguments: Arguments) -> tuple[list[Tensor], Tensor]:
        """``eta`` of each statistic (states by features) and ``A`` (states by feature cells)."""
        family = self.site.family
        if family.natural is None:  # the family's own function may want to see all of them
            arguments = {key: arguments[key] for key in self.site.arguments}
        found, normaliser = natural_parameters(family, arguments, self._example)
        etas = []
        for eta, events, packed in zip(found, family.event_dims, self.packed, strict=True):
            if packed:
                i, j = torch.tril_indices(eta.shape[-1], eta.shape[-1], device=eta.device)
                eta = eta[..., i, j] * torch.where(i == j, 1.0, 2.0).to(eta)
                events = 1
            etas.append(self._matrix(eta, events))
        return etas, self._matrix(normaliser, 0)

    @cached_property
    def _example(self) -> tuple[Tensor, ...]:
        """The statistics of the first row, over the cells."""
        example = []
        for t, events in zip(self.site.data.few, self.site.family.event_dims, strict=True):
            for d in range(self.rank):
                t = t.narrow(d, 0, 1) if self._cells[d] == 1 else t
            example.append(t.expand(self._cells + t.shape[t.dim() - events :]))
        return tuple(example)

    @cached_property
    def _ordered(self) -> bool:
        """Whether the dims stand in the order of the matrices already."""
        kept = [d for d in self._order if self._cells[d] > 1]
        return kept == sorted(kept)

    def _matrix(self, x: Tensor, events: int) -> Tensor:
        batch = x.shape[: x.dim() - events]
        if self._ordered and batch == self._cells:
            return x.reshape(self.num_states, -1)
        x = pad(x, self.rank, events)
        x = x.expand(self._cells + x.shape[x.dim() - events :])
        order = (*self._order, *range(self.rank, x.dim()))
        return x.permute(order).reshape(self.num_states, -1)

    def by_state(self, x: Tensor, events: int) -> Tensor:
        """An argument, one for each state; the site must have no feature cells."""
        return self._matrix(x, events).reshape((self.num_states, *x.shape[x.dim() - events :]))

    def statistics(self, weight: Tensor, sums: list[Tensor]) -> SiteStatistics:
        """From matrices (features by states) to the layout that the M-step knows.

        ``weight`` has one row, or one for each feature cell where a mask makes them differ.
        """
        values = []
        for total, dims, packed in zip(sums, self.site.family.event_dims, self.packed, strict=True):
            if packed:
                total = total.reshape(self.num_features, -1, self.num_states)
                total = total[:, lower_index(total.shape[1], total.device)]
            values.append(self._unfold(total, self._events(total, dims)))
        if weight.shape[0] == 1:
            return SiteStatistics(self._unfold(weight, (), features=False), tuple(values))
        return SiteStatistics(self._unfold(weight, ()), tuple(values))

    def _events(self, total: Tensor, dims: int) -> tuple[int, ...]:
        size = total.numel() // (self.num_features * self.num_states)
        if dims == 2:
            side = round(size**0.5)
            return side, side
        return (size,) * dims

    def _unfold(self, x: Tensor, event: tuple[int, ...], features: bool = True) -> Tensor:
        """Rows (feature cells, event) by states to the site's batch dims, then the event."""
        kept = self.features if features else ()
        sizes = [self.site.shape[d] for d in kept]
        if self._ordered:
            at = self._cells if features else self._state_cells
            return x.reshape(-1, self.num_states).T.reshape((*at, *event))
        x = x.reshape((*sizes, *event, *(self.site.shape[d] for d in self.states)))
        f, e = len(kept), len(event)
        present = sorted(
            [*zip(kept, range(f), strict=True)]
            + [(d, f + e + i) for i, d in enumerate(self.states)]
        )
        x = x.permute([*(at for _, at in present), *range(f, f + e)])
        shape = [1] * self.rank
        for d, _ in present:
            shape[d] = self.site.shape[d]
        return x.reshape((*shape, *event))


def finite(eta: Tensor) -> Tensor:
    """``eta`` with a finite number for the logarithm of zero: times a count of zero it is zero."""
    return eta.clamp(min=SMALLEST_LOG[eta.dtype])


def _size(sizes: Any) -> int:
    return int(torch.Size(sizes).numel())


def lower_index(count: int, device: torch.device) -> Tensor:
    """For each element of a symmetric matrix its place in the lower triangle, row by row."""
    side = round(((8 * count + 1) ** 0.5 - 1) / 2)
    row, column = torch.arange(side, device=device)[:, None], torch.arange(side, device=device)
    high, low = torch.maximum(row, column), torch.minimum(row, column)
    return high * (high + 1) // 2 + low
