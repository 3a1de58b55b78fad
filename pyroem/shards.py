"""A problem whose rows are spread over processes, read by all of them on one common sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyroem._pyro import as_data, isolated
from pyroem.blocks import Blocks, blocks, is_source
from pyroem.distributed import DistributedEngine, Ranks, digest, flatten
from pyroem.errors import DataError, ModelError
from pyroem.estep.engine import ChainEngine, Engine, MixtureEngine
from pyroem.estep.kernel import Rows
from pyroem.problem import (
    LARGE,
    PER_STATE,
    SAMPLE,
    SOME_STEPS,
    Problem,
    check_weights,
    maker_of,
    numbers_of,
    pose_with_kernel,
    standing_for,
    with_chunks,
)
from pyroem.reading import on_other_sequences, read
from pyroem.sampling import leading_size, sample_rows
from pyroem.streaming import Streamed, sampled
from pyroem.structure import Fixed, Structure
from pyroem.whole import whole_data

COMPARED = 1_000_000  # elements; larger tensors are taken to differ between processes

Shape = tuple[int, ...] | None
Part = tuple[list[Tensor], Tensor | None] | None


@dataclass(frozen=True)
class Description:
    """What the other processes must know of one's data: the shape and digest of every leaf.

    ``leaves`` is None where there is nothing to tell them from (no block). ``rows`` counts those of
    data in blocks.
    """

    leaves: list[tuple[Shape, str | None]] | None
    rows: int | None
    weighted: bool


class Shard:
    """The data of one process: the program's arguments, or a source of blocks and ``rest``."""

    def __init__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], weights: Any, dtype: torch.dtype
    ) -> None:
        self.args, self.kwargs, self.given, self.dtype = args, dict(kwargs), weights, dtype
        self.source: Blocks | None = None
        self.rest: Any = None
        self.leaves: list[Any] = []
        self.spec: Any = None
        self.by_row: list[bool] = []
        self.rows = self.held = 0
        self.weights: Tensor | None = None
        self.index = torch.arange(0)

    def describe(self) -> Description:
        """Look at the data; of data in blocks, at as many rows as a sample can need."""
        weighted, rows = self.given is not None, None
        if self.args and is_source(self.args[0]):
            self.source = blocks(self.args[0])
            self.rest = as_data(self.args[1:], self.dtype), as_data(self.kwargs, self.dtype)
            if all(leading_size(as_data(tuple(b), self.dtype)) == 0 for b in self.source):
                return Description(None, 0, weighted)
            rows, data, _ = sampled(self.source, self.rest, LARGE, self.dtype)
            self.held = leading_size(data[0])
        else:
            data = as_data(self.args, self.dtype), as_data(self.kwargs, self.dtype)
        self.leaves, self.spec = tree_flatten(data)
        return Description([_seen(x) for x in self.leaves], rows, weighted)

    def count(self, found: Sequence[Description], rank: int) -> None:
        """Find the arguments that hold the rows: those that are not the same in all processes."""
        leaves = [d.leaves for d in found if d.leaves is not None]
        if not leaves:
            raise DataError("The blocks of all processes hold no rows.")
        if any(len(own) != len(leaves[0]) for own in leaves):
            raise DataError("The processes call the program with different arguments.")
        columns = list(zip(*leaves, strict=True))
        first = [
            None if any(not s for s, _ in c) else tuple(s[0] for s, _ in c if s) for c in columns
        ]
        apart = [len({d for _, d in c}) > 1 or None in {d for _, d in c} for c in columns]
        sizes = [f for f, own in zip(first, apart, strict=True) if f and own]
        sizes = sizes or [f for f in first if f]
        if not sizes:
            raise DataError("Over several processes a fit needs data with rows: no argument has.")
        rows = max(sizes, key=sum)
        self.by_row = [f == rows for f in first]
        for i, (column, by_row) in enumerate(zip(columns, self.by_row, strict=True)):
            kinds = {s[1:] if by_row and s else s for s, _ in column}
            if len(kinds) > 1:
                shapes = ", ".join(str(s) for s, _ in column)
                raise DataError(
                    f"Tensor {i} of the program's arguments has shapes {shapes} in the processes:"
                    " but for the number of rows they must be the same."
                )
            if (
                not by_row
                and column[0][0] is not None
                and apart[i]
                and None not in {d for _, d in column}
            ):
                raise DataError(
                    f"Tensor {i} of the program's arguments (shape {column[0][0]}) does not hold"
                    " rows, but differs between processes."
                )
        own = iter(rows)
        by_rank = [0 if d.leaves is None else next(own) for d in found]
        self.rows = by_rank[rank] if found[rank].rows is None else int(found[rank].rows or 0)
        if self.source is not None and not self.leaves:  # no block to see the arguments in
            behind = tree_leaves(self.rest)
            heads = [None] * (len(columns) - len(behind))
            self.leaves, self.spec = tree_flatten(((*heads, *self.rest[0]), self.rest[1]))

    def weigh(self, weighted: bool) -> tuple[int, int, float]:
        """The number of rows, of those that weigh something, and their weight."""
        if not weighted:
            return self.rows, self.rows, float(self.rows)
        weights = torch.ones(self.rows) if self.given is None else self.given
        weights = numbers_of(weights, self.dtype)
        if tuple(weights.shape) != (self.rows,):
            raise DataError(
                f"weights: expected shape ({self.rows},), one for each row of this process, got"
                f" {tuple(weights.shape)}."
            )
        self.weights = weights
        return self.rows, int((weights > 0).sum()), float(weights.sum())

    def part(self, count: int, everything: bool) -> Part:
        """The rows that go into the common sample, with their weights."""
        if not self.rows:
            return None
        if self.source is not None:
            return self._part_of_blocks(count, everything)
        index = torch.arange(self.rows)
        if not everything:
            index = sample_rows(self.rows, count, self.weights, self._row_leaves)
        self.index = index
        found = [x[self.index.to(x.device)].cpu() for x in self._row_leaves]
        return found, None if self.weights is None else self.weights[self.index]

    def _part_of_blocks(self, count: int, everything: bool) -> Part:
        assert self.source is not None
        leaves, own = self.leaves, self.weights
        if own is not None or count > self.held:
            size = max(count, LARGE)
            _, data, own = sampled(self.source, self.rest, size, self.dtype, self.weights)
            leaves = tree_leaves(data)
        held = leading_size([x for x, r in zip(leaves, self.by_row, strict=True) if r])
        index = torch.arange(held) if everything else sample_rows(held, count, own, leaves)
        found = [x[index] for x, r in zip(leaves, self.by_row, strict=True) if r]
        return found, None if own is None else own[index]

    @property
    def _row_leaves(self) -> list[Tensor]:
        return [x for x, by_row in zip(self.leaves, self.by_row, strict=True) if by_row]

    def joined(self, parts: Sequence[Part]) -> tuple[Any, Tensor | None]:
        """The program's arguments for the rows of all ``parts``, and their weights."""
        there = [p for p in parts if p is not None]
        columns = iter([torch.cat(c) for c in zip(*(p[0] for p in there), strict=True)])
        leaves = [
            next(columns) if by_row else x
            for x, by_row in zip(self.leaves, self.by_row, strict=True)
        ]
        weights = [p[1] for p in there if p[1] is not None]
        return tree_unflatten(leaves, self.spec), torch.cat(weights) if weights else None

    def engine(
        self, small: Problem, places: Tensor, device: torch.device | None
    ) -> tuple[Structure, MixtureEngine | ChainEngine]:
        """The kernel on one's own rows, and the structure with them (a sample, of blocks).

        ``places`` says where in the common sample one's own part of it stands.
        """
        structure, weights, kernel = small.structure, self.weights, small.engine
        if weights is not None and bool((weights != 0).any()):
            check_weights(weights, replace(structure, unit_shape=(self.rows,)))
        if not self.rows:
            return structure, with_chunks(kernel, [])
        make, dtype = maker_of(small, device), self.dtype
        if self.source is not None:
            chunks = Streamed(make, self.source, self.rest, dtype, self.rows, weights)
            return structure, with_chunks(kernel, chunks)
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        if isinstance(kernel, ChainEngine):
            chunk = make((args, kwargs), self.rows, weights, "The rows of this process", True)
            point = small.plan.reading.points[0]
            own, _ = on_other_sequences(structure, point, args, kwargs)
            return own, replace(kernel, structure=own, chunks=[chunk])
        assert isinstance(kernel, MixtureEngine)
        data = whole_data(structure, args, kwargs, self.rows, self.index)
        if data is None or not data.agrees(kernel.plan, places):
            raise ModelError(
                "The program makes something else of the rows of this process than of those of all."
                " Its parameters, priors and the distributions' arguments must not be computed"
                " from the data, and its plate of rows must have the size of the data."
            )
        rows = Rows(kernel.mixture, data.nodes, weights, device=device)
        return replace(structure, program=data.program), with_chunks(kernel, [rows])


def _seen(x: Any) -> tuple[Shape, str | None]:
    if not isinstance(x, Tensor):
        return None, ""
    return tuple(x.shape), digest(x) if x.numel() <= COMPARED else None


def shares(size: int, counts: Sequence[int]) -> list[int]:
    """``size`` in proportion to ``counts``, never more than there are."""
    total = sum(counts)
    if size >= total:
        return list(counts)
    found = [size * n // total for n in counts]
    by_rest = sorted(range(len(counts)), key=lambda i: -(size * counts[i] % total))
    for i in by_rest[: size - sum(found)]:
        found[i] += 1
    return found


def pose_shared(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    ranks: Ranks,
    *,
    dtype: torch.dtype = torch.float64,
    fixed: Fixed = (),
    floor: float = 0.0,
    weights: Any = None,
    device: torch.device | None = None,
) -> Problem:
    """The problem of the rows of all processes, each of which gives its own.

    It is read on a sample of all rows, gathered from the processes in proportion to what they
    have; on all of them where they are few. So structure, plan and starts are the same everywhere.

    Raises:
    ------
    PyroemError
        In all processes, where the program or the data does not work in one.
    """
    with torch.inference_mode(False):
        shard = Shard(args, kwargs, weights, dtype)
        found = ranks.agree(shard.describe)
        shard.count(found, ranks.rank)
        sizes = ranks.agree(partial(shard.weigh, any(d.weighted for d in found)))
        rows, weighing, weight = zip(*sizes, strict=True)
        total = sum(rows)
        if not sum(weighing):
            what = "rows" if not total else "row with a positive weight"
            raise DataError(f"The processes hold no {what}.")
        size = total if total < LARGE else SAMPLE
        while True:
            everything = size >= total
            counts = list(rows) if everything else shares(size, weighing)
            parts = ranks.agree(partial(shard.part, counts[ranks.rank], everything))
            data, own = shard.joined(parts)
            structures: list[Structure] = []
            ranks.agree(partial(_read_into, structures, model, data, dtype))
            (structure,) = structures
            states = sum(structure.assignments.values())
            if PER_STATE * states <= size or everything:
                break
            size = min(PER_STATE * states, total)
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + (len(part[0][0]) if part else 0))
        places = torch.arange(starts[ranks.rank], starts[ranks.rank + 1])
        problems: list[Problem] = []

        def made() -> tuple[str, float, float]:
            what = "A fit over several processes"
            standing = standing_for(own, starts[-1], sum(weight), dtype)
            small = pose_with_kernel(structure, fixed, floor, standing, what, device)
            with isolated(dtype, 0), torch.no_grad():
                share = 1 / sum(n > 0 for n in rows)
                shared = replace(small, engine=_shared(small.engine, share))
                own_structure, engine = shard.engine(shared, places, device)
                shape, log_prior = small.e_step(small.plan.reading.points[0])
            whole = replace(own_structure, unit_shape=(total,))
            spread = DistributedEngine(engine, ranks, rows, shape)
            problems.append(
                replace(
                    small,
                    structure=whole,
                    row_weights=shard.weights,
                    engine=spread,
                    smaller=small,
                    everywhere=max(sum(weight), 1e-300),
                )
            )
            work = engine.work if rows[ranks.rank] else 0.0
            return _signature(structure, small), work, float(shape.log_likelihood + log_prior)

        agreed = ranks.agree(made)
        values = [value for _, _, value in agreed]
        apart = any(abs(value - values[0]) > 1e-6 * (1 + abs(value)) for value in values)
        if apart or len({signature for signature, _, _ in agreed}) > 1:
            raise ModelError(
                "The processes run different programs: at one point and on the same rows their"
                f" log-joints are {', '.join(f'{value:.9g}' for value in values)}."
            )
        (problem,) = problems
        spread = problem.engine
        assert isinstance(spread, DistributedEngine)
        size = sum(p.value.numel() for p in structure.parameters.values())
        ranks.width = max(len(flatten(spread.shape)) + 1, size)
        # The same number of threads everywhere, so that rounding is the same.
        return replace(problem, engine=replace(spread, work=max(work for _, work, _ in agreed)))


def _read_into(
    found: list[Structure], model: Callable[..., Any], data: Any, dtype: torch.dtype
) -> None:
    found.append(read(model, *data, dtype=dtype, chains=True, some_steps=SOME_STEPS))


def _shared(engine: Engine, share: float) -> Engine:
    """What stands outside the rows is counted once: by each process that has rows in part."""
    if not isinstance(engine, MixtureEngine):
        return engine
    outside = tuple((s, x.scaled(share), m * share) for s, x, m in engine.mixture.outside)
    return replace(engine, mixture=replace(engine.mixture, outside=outside))


def _signature(structure: Structure, problem: Problem) -> str:
    """What must be the same in all processes, in short."""
    blocks = [(b.name, b.rung.name) for b in problem.plan.blocks.values()]
    shapes = [(name, p.shape) for name, p in structure.parameters.items()]
    return repr((blocks, shapes, structure.assignments, structure.observations))
