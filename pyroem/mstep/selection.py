"""Recognising a selection: an argument whose blocks are blocks of parameters, unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyroem.families import Coordinate

TOLERANCE = 1e-8


@dataclass(frozen=True)
class Selection:
    """``argument = inverse(bank[index])``, where ``bank`` stacks parameters' blocks and constants.

    ``index`` has the cell dims of the argument; ``offsets`` gives each parameter's first row in
    the bank; rows after the last parameter are ``constants``. Matrices may be multiplied by a
    ``factor``, one for each cell.
    """

    coordinate: Coordinate
    index: Tensor
    offsets: dict[str, int]
    sizes: dict[str, int]
    constants: Tensor
    factor: Tensor | None = None

    @cached_property
    def whole(self) -> bool:
        """Whether it is one parameter as it stands: every block once, in order."""
        count = sum(self.sizes.values())
        index = self.index.reshape(-1)
        return len(self.offsets) == 1 and torch.equal(index, torch.arange(count).to(index))

    def argument(self, params: Mapping[str, Tensor]) -> Tensor:
        """The argument at ``params``."""
        if self.whole and self.factor is None:
            value = params[next(iter(self.offsets))]
            events = value.shape[value.dim() - self.constants.dim() + 1 :]
            value = self.coordinate.canonical(value.reshape((*self.index.shape, *events)))
            return self.coordinate.inverse(value)
        blocks = [
            self.coordinate.canonical(as_blocks(params[n], self.constants.dim() - 1))
            for n in self.offsets
        ]
        if self.factor is not None:
            bank = torch.cat([*blocks, self.constants])
            return self.coordinate.inverse(bank[self.index] * self.factor[..., None, None])
        bank = self.coordinate.inverse(torch.cat([*blocks, self.constants]))
        return bank[self.index]

    def holds(self, params: Mapping[str, Tensor], argument: Tensor) -> bool:
        """Whether it explains ``argument`` at ``params``, a point that it was not made from."""
        expected = self.argument(params)
        gap, size = (expected - argument).abs(), argument.abs().amax()
        return bool((gap <= _tolerance(argument) * size).all())

    def cells_of(self, name: str) -> Tensor:
        """For each cell the block of parameter ``name`` that stands there, or -1."""
        local = self.index - self.offsets[name]
        return torch.where((local >= 0) & (local < self.sizes[name]), local, -1)


def as_blocks(value: Tensor, event_dim: int) -> Tensor:
    """Flatten the batch dims of a parameter."""
    return value.reshape((-1, *value.shape[value.dim() - event_dim :]))


def find(
    coordinate: Coordinate,
    arguments: tuple[Tensor, Tensor],
    params: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    names: list[str],
) -> Selection | None:
    """The selection that explains an argument at both of two random probes, if there is one."""
    event_dim = coordinate.form.event_dim
    cells = tuple(coordinate.forward(a) for a in arguments)
    rank = cells[0].dim() - event_dim
    shape, event = cells[0].shape[:rank], cells[0].shape[rank:]
    flat = tuple(as_blocks(c, event_dim) for c in cells)
    index = torch.full((flat[0].shape[0],), -1)
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    total = 0
    factor: Tensor | None = None
    for name in names:
        if params[0][name].dim() < event_dim or (
            event_dim and params[0][name].shape[-event_dim:] != event
        ):
            return None
        blocks = tuple(coordinate.canonical(as_blocks(p[name], event_dim)) for p in params)
        found = _match(flat[0], blocks[0])
        found = torch.where(_equal(flat[0], blocks[0], found), found, -1)
        found = torch.where(_equal(flat[1], blocks[1], found), found, -1)
        if event_dim == 2 and coordinate.form.stretched is not None and bool((found < 0).all()):
            units = [tuple(x / x[:, :1, :1] for x in pair) for pair in (flat, blocks)]
            found = _match(units[0][0], units[1][0])
            ratios = [f[:, 0, 0] / b[found, 0, 0] for f, b in zip(flat, blocks, strict=True)]
            constant = (ratios[0] - ratios[1]).abs() <= _tolerance(flat[0]) * ratios[0].abs()
            for unit, block in zip(*units, strict=True):
                constant &= _equal(unit, block, found)
            found = torch.where(constant, found, -1)
            if len(names) == 1 and bool(constant.all()):
                factor = ratios[0].reshape(shape)
        index = torch.where((index < 0) & (found >= 0), found + total, index)
        offsets[name], sizes[name] = total, blocks[0].shape[0]
        total += blocks[0].shape[0]
    free = index < 0
    if free.any():
        gap = (
            (flat[0] - flat[1]).abs().flatten(1).amax(1) if event_dim else (flat[0] - flat[1]).abs()
        )
        if (gap[free] > 0).any():
            return None
    constants = flat[0][free]
    index[free] = total + torch.arange(int(free.sum()))
    return Selection(coordinate, index.reshape(shape), offsets, sizes, constants, factor)


def _signature(blocks: Tensor) -> Tensor:
    """A random linear function of each block, the same for equal blocks."""
    flat = blocks.reshape(blocks.shape[0], -1)
    generator = torch.Generator().manual_seed(7)
    direction = torch.rand(flat.shape[1], generator=generator, dtype=torch.float64) + 0.5
    return flat @ direction.to(flat)


def _match(cells: Tensor, blocks: Tensor) -> Tensor:
    """For each cell the index of the block with the nearest signature."""
    ordered, order = _signature(blocks).sort()
    wanted = _signature(cells)
    right = torch.searchsorted(ordered, wanted.contiguous()).clamp(max=len(ordered) - 1)
    left = (right - 1).clamp(min=0)
    nearer = (wanted - ordered[left]).abs() <= (wanted - ordered[right]).abs()
    return order[torch.where(nearer, left, right)]


def _equal(cells: Tensor, blocks: Tensor, index: Tensor) -> Tensor:
    candidate = blocks[index.clamp(min=0)]
    gap = (cells - candidate).abs().reshape(len(cells), -1).amax(1)
    size = candidate.abs().reshape(len(cells), -1).amax(1)
    return (index >= 0) & (gap <= _tolerance(cells) * size)


def _tolerance(x: Tensor) -> float:
    return TOLERANCE if x.dtype == torch.float64 else 1e-4
