"""The statistics of an observation's rows, block by block: columns of ``Phi``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroem.estep.layout import Layout
from pyroem.families import flat
from pyroem.mstep.sites import pad


class Scratch:
    """Memory that one block of a pass after another uses.

    To get it anew for each would cost as much as a matrix product: the system hands it out page by
    page, and clears every page.
    """

    def __init__(self) -> None:
        self._held: dict[Any, Tensor] = {}

    def empty(self, key: Any, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor that is not filled in; the one that was got under ``key`` before is lost."""
        size = torch.Size(shape).numel()
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(*shape)


class Columns:
    """``T(x_n)`` of one site as matrices (features by rows), made anew for each block of rows.

    Where the distribution holds constants that differ by row or by state (a number of trials), the
    statistics of all rows are kept instead: they are as large as the data.
    """

    def __init__(
        self,
        layout: Layout,
        base: Any,
        value: Tensor,
        mask: Tensor | None,
        device: torch.device | None = None,
    ) -> None:
        site, rank = layout.site, layout.rank
        self.layout, self.base, self.family = layout, base, site.family
        self.dtype = site.dtype
        events = len(base.event_shape)
        if self.family.transform is not None:
            value = self.family.transform(base, value.to(self.dtype))
        value = pad(value, rank, events)
        rows = [max(x.shape[d] for x in (value, mask) if x is not None) for d in layout.rows]
        self.rows = tuple(rows)
        self.num_rows = int(torch.Size(rows).numel())
        self.inner = tuple(site.shape[d] for d in (*layout.features, *layout.pooled))
        self.mask = None if mask is None else self._rows_last(mask, 0)
        self.source = self._rows_last(value, events)
        self.centre = None if site.centre is None else self._rows_last(site.centre, events)
        lazy = self.family.partial is not None or layout.plain(base, value)
        self.kept: list[Tensor] | None = None
        self.measured: Tensor | None = None
        if not lazy:
            x = value.to(self.dtype)
            x = x if site.centre is None else x - site.centre
            self.kept = [
                self._rows_last(pad(t, rank, e), e)
                for t, e in zip(self._statistics(x, Scratch()), layout.event_dims, strict=True)
            ]
        measure = self.family.base_measure
        # A transform may have constants that differ by column.
        early = not lazy or self.family.transform is not None
        if measure is None or (early and measure is not flat):
            h = self._compare(value) if measure is None else measure(base, value.to(self.dtype))
            self.measured = self._per_row(self._rows_last(pad(h, rank, 0), 0), 0, self.num_rows)

        if device is not None:
            self._move(device)

    def take(self, index: Tensor) -> None:
        """Keep some of the rows only, in the order of ``index``."""

        def cut(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[-1] == 1 else x[..., index].contiguous()

        self.source = cut(self.source)  # type: ignore[assignment]
        self.mask, self.centre = cut(self.mask), cut(self.centre)
        if self.kept is not None:
            self.kept = [t if t.shape[-1] == 1 else t[..., index].contiguous() for t in self.kept]
        if self.measured is not None:
            self.measured = self.measured[index]
        self.num_rows = len(index)
        self.rows = (len(index),)

    def _move(self, device: torch.device) -> None:
        for name in ("source", "centre", "mask", "measured"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device))
        if self.kept is not None:
            self.kept = [t.to(device) for t in self.kept]

    @property
    def has_measure(self) -> bool:
        """Whether the base measure is not zero throughout."""
        return self.family.base_measure is not flat

    def _statistics(self, x: Tensor, scratch: Scratch) -> tuple[Tensor, ...]:
        if self.family.packed is None:
            return self.family.statistics(self.base, x)
        return self.family.packed(self.base, x, lambda s: scratch.empty((self, "packed"), s, x))

    def _rows_last(self, x: Tensor, events: int) -> Tensor:
        """The site's layout to (features, pooled, event, rows), the rows as one dim.

        That dim has size one where ``x`` does not differ by row.
        """
        layout = self.layout
        order = [*layout.features, *layout.pooled, *range(layout.rank, x.dim()), *layout.rows]
        for d in range(layout.rank):
            x = x if d in order else x.narrow(d, 0, 1)
        others = [d for d in range(layout.rank) if d not in order]
        moved = x.permute([*others, *order])[(0,) * len(others)]
        at = len(self.inner)
        event, own = moved.shape[at : at + events], moved.shape[at + events :]
        rows = (1,) * len(own) if all(n == 1 for n in own) else self.rows
        moved = moved.expand((*self.inner, *event, *rows))
        return moved.reshape((*self.inner, *event, -1))

    def _cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop] if x.shape[-1] > 1 else x

    def _points(self, start: int, stop: int) -> Tensor:
        """A block of the data as (features, pooled, event, rows)."""
        return self._cut(self.source, start, stop).to(self.dtype)

    def block(
        self, start: int, stop: int, scratch: Scratch | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The statistics of rows ``start`` to ``stop`` and, where masked, the number of elements.

        Matrices of (feature cells, event) by rows, which last until ``scratch`` is used again.
        """
        at, rows = len(self.inner), stop - start
        if self.kept is not None:
            found = [self._cut(t, start, stop) for t in self.kept]
        else:
            x, scratch = self._points(start, stop), scratch or Scratch()
            if self.centre is not None:  # also makes the rows contiguous
                x = torch.sub(x, self.centre, out=scratch.empty((self, "points"), x.shape, x))
            found = [t.movedim(at, -1) for t in self._statistics(x.movedim(-1, at), scratch)]
        mask = None if self.mask is None else self._cut(self.mask, start, stop)
        pieces = []
        for t in found:
            if mask is not None:
                t = t * mask.reshape((*mask.shape[:-1], *(1,) * (t.dim() - at - 1), -1))
            t = t.expand((*self.inner, *t.shape[at:-1], rows))
            pieces.append(self._pooled(t).reshape(-1, rows))
        if mask is None:
            return pieces, None
        return pieces, self._pooled(mask).reshape(-1, mask.shape[-1]).expand(-1, rows)

    def _pooled(self, x: Tensor) -> Tensor:
        dims = list(range(len(self.layout.features), len(self.inner)))
        return x.sum(dims) if dims else x

    def measure(self, start: int, stop: int) -> Tensor:
        """The base measure ``h(x_n)`` of a block of rows, summed over the elements of each."""
        if self.measured is not None:
            return self.measured[start:stop]
        assert self.family.base_measure is not None
        h = self.family.base_measure(
            self.base, self._points(start, stop).movedim(-1, len(self.inner))
        )
        return self._per_row(h, start, stop)

    def _per_row(self, h: Tensor, start: int, stop: int) -> Tensor:
        h = h.expand((*self.inner, stop - start))
        if self.mask is not None:
            h = torch.where(self._cut(self.mask, start, stop) > 0, h, 0.0)
        return h.reshape(-1, stop - start).sum(0)

    def _compare(self, value: Tensor) -> Tensor:
        """``log_prob`` less the density of the family, in the first state."""
        site, rank, x = self.layout.site, self.layout.rank, value.to(self.dtype)
        arguments = {
            name: pad(given, rank, self.family.dims(name))
            for name, given in self.family.arguments(self.base).items()
        }
        one = torch.ones((1,) * rank, dtype=self.dtype, device=value.device)
        centred = x if site.centre is None else x - site.centre
        statistics = self.family.statistics(self.base, centred)
        density = self.family.log_density(site.centred(arguments), statistics, one)
        return pad(self.base.log_prob(x) - density, rank, 0)
