"""A program whose data comes in blocks: read on a sample of the rows, run on every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyroem._pyro import as_data, isolated
from pyroem.blocks import Blocks
from pyroem.errors import DataError
from pyroem.estep.emissions import ChainParts, Sequences, sequences_of
from pyroem.estep.kernel import Rows
from pyroem.estep.mixture import Mixture
from pyroem.mstep.plan import Plan
from pyroem.reading import on_other_sequences
from pyroem.sampling import leading_size, leading_sizes, sample_rows, take, telling_rows
from pyroem.structure import Structure
from pyroem.whole import constant_along_rows, whole_data

SOME = 50  # rows of a block that the program is run on alone, to compare


Data = tuple[tuple[Any, ...], dict[str, Any]]  # the program's arguments

# (data, number of rows, their weights, what they are, whether to check them) -> the kernel's rows,
# by running the program
Maker = Callable[[Data, int, Tensor | None, str, bool], Any]


class Streamed:
    """The rows of all blocks for a kernel, made anew in every pass.

    The program runs on each block; at the first pass everything is checked that was read on the
    sample. Where the number of ``rows`` is given, every pass must give as many.
    """

    def __init__(
        self,
        make: Maker,
        blocks: Blocks,
        rest: Data,
        dtype: torch.dtype,
        rows: int | None,
        weights: Tensor | None = None,
    ) -> None:
        self.make, self.blocks, self.dtype = make, blocks, dtype
        self.rest, self.rows, self.weights = rest, rows, weights
        self.checked = False

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for number, block in enumerate(self.blocks):
            args = block_data(block, number, self.dtype)
            size = leading_size(args)
            if not size:
                continue
            if self.rows is not None and start + size > self.rows:
                raise self._changed(f"more than {self.rows}")
            weights = None if self.weights is None else self.weights[start : start + size]
            what, check = f"Block {number} (from row {start} on)", not self.checked
            yield self.make(((*args, *self.rest[0]), self.rest[1]), size, weights, what, check)
            start += size
        if self.rows is not None and start != self.rows:
            raise self._changed(str(start))
        self.checked = True

    def _changed(self, found: str) -> DataError:
        return DataError(
            f"The blocks hold {found} rows in this pass, but held {self.rows} before: every pass"
            " must read the same data."
        )


@dataclass(frozen=True)
class SequenceMaker:
    """Sequences for the kernel of chains; those of each block have a length of their own."""

    structure: Structure
    plan: Plan
    parts: tuple[ChainParts, ...]
    device: torch.device | None = None

    def __call__(
        self, data: Data, size: int, weights: Tensor | None, what: str, check: bool
    ) -> Sequences:
        """``size`` sequences."""
        point = self.plan.reading.points[0]
        try:
            structure, nodes = on_other_sequences(self.structure, point, *data)
        except DataError as error:
            raise DataError(f"{what}: {error}") from error
        with isolated(structure.program.dtype, 0), torch.no_grad():
            if structure.unit_shape != (size,) or not constant_along_rows(nodes, self.plan):
                raise DataError(f"{what}: {_OTHER}")
            return sequences_of(structure, self.parts, nodes, weights, 0, device=self.device)


_OTHER = (
    "the program makes something else of it than of the other rows, or of some of its rows alone."
    " Parameters, priors, scales, distributions' arguments and observations must not be computed"
    " from several rows, and the plate of rows must have the size of the block."
)


@dataclass(frozen=True)
class RowMaker:
    """Rows for the kernel of mixtures."""

    structure: Structure
    mixture: Mixture
    device: torch.device | None = None

    def __call__(
        self, data: Data, size: int, weights: Tensor | None, what: str, check: bool
    ) -> Rows:
        """``size`` rows."""
        return _rows(self.structure, self.mixture, data, size, weights, what, check, self.device)


def _rows(
    structure: Structure,
    mixture: Mixture,
    data: Data,
    size: int,
    weights: Tensor | None,
    what: str,
    check: bool,
    device: torch.device | None,
) -> Rows:
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
        raise DataError(f"{what}: {_OTHER}")
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
        # What is rare is looked for among the first rows only.
        first = torch.arange(min(size, blocks.length))
        rare = telling_rows(blocks.pick(first), len(first))
        index = torch.cat([sample_rows(blocks.length, size, weights), rare]).unique()
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
