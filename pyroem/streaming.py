"""A program whose data comes in blocks: read on a sample of the rows, run on every block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyroem._pyro import as_data, isolated
from pyroem.blocks import Blocks
from pyroem.errors import DataError
from pyroem.estep.kernel import Rows
from pyroem.estep.mixture import Mixture
from pyroem.sampling import leading_size, leading_sizes, sample_rows, take
from pyroem.structure import Structure
from pyroem.whole import whole_data

SOME = 50  # rows of a block that the program is run on alone, to compare


class Streamed:
    """The rows of all blocks for the kernel, made anew in every pass.

    The program runs on each block; at the first pass everything is checked that was read on the
    sample. Where the number of ``rows`` is given, every pass must give as many.
    """

    def __init__(
        self,
        structure: Structure,
        mixture: Mixture,
        blocks: Blocks,
        rest: tuple[tuple[Any, ...], dict[str, Any]],
        rows: int | None,
        weights: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device
        self.structure, self.mixture, self.blocks = structure, mixture, blocks
        self.rest, self.rows, self.weights = rest, rows, weights
        self.checked = False

    def __iter__(self) -> Iterator[Rows]:
        start = 0
        for number, block in enumerate(self.blocks):
            args = block_data(block, number, self.structure.program.dtype)
            size = leading_size(args)
            if not size:
                continue
            if self.rows is not None and start + size > self.rows:
                raise self._changed(f"more than {self.rows}")
            weights = None if self.weights is None else self.weights[start : start + size]
            what, check = f"Block {number} (from row {start} on)", not self.checked
            data, device = ((*args, *self.rest[0]), self.rest[1]), self.device
            yield rows_of(self.structure, self.mixture, data, size, weights, what, check, device)
            start += size
        if self.rows is not None and start != self.rows:
            raise self._changed(str(start))
        self.checked = True

    def _changed(self, found: str) -> DataError:
        return DataError(
            f"The blocks hold {found} rows in this pass, but held {self.rows} before: every pass"
            " must read the same data."
        )


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
        try:
            whole = whole_data(structure, args, kwargs, size, none, check, part=True)
        except DataError as error:
            raise DataError(f"{what}: {error}") from error
        agrees = whole is not None and (not check or whole.agrees_at(plan, plan.reading.points[0]))
        if agrees and check and size > 1:  # of some rows alone the program must make the same
            index = sample_rows(size, min(SOME, size - 1))
            args, kwargs = take(data, index, size)
            few = whole_data(structure, args, kwargs, len(index), none, False, part=True)
            agrees = few is not None and whole is not None and whole.same_rows(few, index)
    if whole is None or not agrees:
        raise DataError(
            f"{what}: the program makes something else of it than of the other rows, or of some of"
            " its rows alone. Parameters, priors, scales, distributions' arguments and observations"
            " must not be computed from several rows, and the plate of rows must have the size of"
            " the block."
        )
    return Rows(mixture, whole.nodes, weights, cache=0, device=device)


def block_data(block: tuple[Any, ...], number: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of a block as tensors, all of as many rows."""
    args: tuple[Any, ...] = as_data(tuple(block), dtype)
    sizes = leading_sizes(args)
    if len(set(sizes)) > 1:
        raise DataError(
            f"Block {number}: its arguments have {', '.join(map(str, sizes))} rows; all must have"
            " the same number. What has no rows goes beside the blocks: fit(model, blocks, other)."
        )
    return args


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
        args = block_data(blocks.pick(index), 0, dtype)
        return blocks.length, ((*args, *rest[0]), rest[1]), own
    generator = torch.Generator().manual_seed(0)
    parts: list[tuple[Tensor, Any]] = []
    total, kept, shapes = 0, 0, None
    for number, block in enumerate(blocks):
        args = block_data(block, number, dtype)
        rows = leading_size(args)
        own_shapes = [tuple(x.shape[1:]) for x in tree_leaves(args) if isinstance(x, Tensor)]
        if shapes not in (None, own_shapes):
            raise DataError(
                f"Block {number} has rows of shapes {own_shapes}, those before have {shapes}; they"
                " must be the same in all blocks."
            )
        keys = torch.rand(rows, generator=generator, dtype=torch.float64)
        own = torch.ones(rows, dtype=dtype)
        if weights is not None:
            if total + rows > len(weights):
                raise _wrong_weights(len(weights), f"{total + rows} or more")
            own = weights[total : total + rows]
            keys[own == 0] = 2.0  # rows that weigh nothing come last
        parts.append((keys, (own, args)))
        total, kept, shapes = total + rows, kept + rows, own_shapes
        if kept > 4 * size:
            parts, kept = _smallest(parts, size), size
    if not total:
        raise DataError("The blocks hold no rows.")
    if weights is not None and len(weights) != total:
        raise _wrong_weights(len(weights), str(total))
    ((_, (own, args)),) = _smallest(parts, size)
    return total, ((*args, *rest[0]), rest[1]), None if weights is None else own


def _wrong_weights(count: int, rows: str) -> DataError:
    return DataError(f"weights: expected one for each row, {rows}; got {count}.")


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
