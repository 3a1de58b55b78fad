"""A program whose data comes in blocks: read on a sample of the rows, run on every block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyroem._pyro import as_data, isolated
from pyroem.blocks import Blocks
from pyroem.errors import DataError
from pyroem.estep.kernel import Rows
from pyroem.estep.mixture import Mixture
from pyroem.sampling import leading_size, sample_rows, take
from pyroem.structure import Structure
from pyroem.whole import whole_data

SOME = 50  # rows of a block that the program is run on alone, to compare


class Streamed:
    """The rows of all blocks for the kernel, made anew in every pass.

    The program runs on each block; at the first pass everything is checked that was read on the
    sample.
    """

    def __init__(
        self,
        structure: Structure,
        mixture: Mixture,
        blocks: Blocks,
        rest: tuple[tuple[Any, ...], dict[str, Any]],
        rows: int,
        weights: Tensor | None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device
        self.structure, self.mixture, self.blocks = structure, mixture, blocks
        self.rest, self.rows, self.weights = rest, rows, weights
        self.checked = False

    def __iter__(self) -> Iterator[Rows]:
        start = number = 0
        for block in self.blocks:
            data = block_data(block, self.rest, self.structure.program.dtype)
            size = leading_size(data[0][: len(block)])
            if not size:
                continue
            if start + size > self.rows:
                break
            weights = None if self.weights is None else self.weights[start : start + size]
            yield self._rows(data, size, number, weights)
            start, number = start + size, number + 1
        if start != self.rows:
            raise DataError(
                f"The blocks hold {start if start < self.rows else 'more than ' + str(start)} rows"
                f" in this pass, but held {self.rows} before: every pass must read the same data."
            )
        self.checked = True

    def _rows(self, data: Any, size: int, number: int, weights: Tensor | None) -> Rows:
        what, check = f"Block {number}", not self.checked
        return rows_of(self.structure, self.mixture, data, size, weights, what, check, self.device)


def rows_of(
    structure: Structure,
    mixture: Mixture,
    data: tuple[tuple[Any, ...], dict[str, Any]],
    size: int,
    weights: Tensor | None,
    what: str,
    check: bool,
    device: torch.device | None = None,
) -> Rows:
    """Some rows for the kernel, by running the program on them."""
    plan, (args, kwargs) = mixture.plan, data
    with isolated(structure.program.dtype, 0):
        none = torch.arange(0)
        whole = whole_data(structure, args, kwargs, size, none, check, part=True)
        agrees = whole is not None and (not check or whole.agrees_at(plan, plan.reading.points[0]))
        if agrees and check and size > 1:  # of some rows alone the program must make the same
            index = sample_rows(size, min(SOME, size - 1))
            args, kwargs = take(data, index, size)
            few = whole_data(structure, args, kwargs, len(index), none, False, part=True)
            agrees = few is not None and whole is not None and whole.same_rows(few, index)
    if whole is None or not agrees:
        raise DataError(
            f"{what}: the program makes something else of it than of the other rows, or of some of"
            " its rows alone. Parameters, priors, distributions' arguments and observations must"
            " not be computed from several rows, and the plate of rows must have the size of the"
            " block."
        )
    return Rows(mixture, whole.nodes, weights, cache=0, device=device)


def block_data(
    block: tuple[Any, ...], rest: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The program's arguments for a block."""
    return as_data((*block, *rest[0]), dtype), rest[1]


def sampled(
    blocks: Blocks,
    rest: tuple[tuple[Any, ...], dict[str, Any]],
    size: int,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> tuple[int, tuple[tuple[Any, ...], dict[str, Any]], Tensor | None]:
    """The number of rows, the program's arguments for a sample of them, and the sample's weights.

    One pass, or none where the blocks can be picked from. Every row is as likely as any other.
    """
    if blocks.pick is not None and blocks.length:
        index = sample_rows(blocks.length, size, weights)
        own = None if weights is None else weights[index]
        return blocks.length, block_data(blocks.pick(index), rest, dtype), own
    generator = torch.Generator().manual_seed(0)
    parts: list[tuple[Tensor, Any]] = []
    total, kept = 0, 0
    for block in blocks:
        args = as_data(tuple(block), dtype)
        rows = leading_size(args)
        keys = torch.rand(rows, generator=generator, dtype=torch.float64)
        own = torch.ones(rows, dtype=dtype)
        if weights is not None:
            own[: len(weights) - total] = weights[total : total + rows]
            keys[own == 0] = 2.0  # rows that weigh nothing come last
        parts.append((keys, (own, args)))
        total, kept = total + rows, kept + rows
        if kept > 4 * size:
            parts, kept = _smallest(parts, size), size
    if not total:
        raise DataError("The blocks hold no rows.")
    ((_, (own, args)),) = _smallest(parts, size)
    return total, ((*args, *rest[0]), rest[1]), None if weights is None else own


def _smallest(parts: list[tuple[Tensor, Any]], size: int) -> list[tuple[Tensor, Any]]:
    """The rows with the smallest keys, as one block."""
    keys = torch.cat([k for k, _ in parts])
    limit = keys.kthvalue(min(size, len(keys))).values
    chosen = []
    for own, args in parts:
        leaves, spec = tree_flatten(take(args, (own <= limit).nonzero().reshape(-1), len(own)))
        chosen.append(leaves)
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) and column[0].dim() else column[0]
        for column in zip(*chosen, strict=True)
    ]
    return [(keys[keys <= limit], tree_unflatten(joined, spec))]
