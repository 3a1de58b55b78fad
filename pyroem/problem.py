"""A problem: a program with its data, read and planned. What every solver is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import isgeneratorfunction
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyroem._pyro import as_data, isolated
from pyroem.blocks import blocks, is_source
from pyroem.distributed import DistributedEngine
from pyroem.errors import DataError, ModelError, PyroemError, SettingError
from pyroem.estep import decode
from pyroem.estep.agreement import check_kernel
from pyroem.estep.chain import lengths
from pyroem.estep.emissions import Sequences, chain_parts, sequences_of
from pyroem.estep.engine import (
    Chained,
    ChainEngine,
    ChainTraceEngine,
    Engine,
    MixtureEngine,
    TraceEngine,
    is_chained,
)
from pyroem.estep.kernel import Rows
from pyroem.estep.mixture import Mixture, mixture_of
from pyroem.estep.trace import posterior
from pyroem.mstep.closed import clipped
from pyroem.mstep.freedom import degrees_of_freedom
from pyroem.mstep.plan import Plan, Rung, make_plan
from pyroem.mstep.runs import Expected
from pyroem.mstep.scales import variance_floors
from pyroem.mstep.update import THOROUGH, Effort, m_step
from pyroem.reading import first_look, on_other_sequences, read, with_own_values
from pyroem.sampling import has_rows, leading_size, sample_rows, take
from pyroem.streaming import Maker, RowMaker, SequenceMaker, Streamed, sampled
from pyroem.structure import Fixed, Params, Structure
from pyroem.symmetry import StateGroup, state_groups
from pyroem.whole import same_arguments, whole_data

ENGINES = ("auto", "kernel", "trace")
SAMPLE, LARGE = 2003, 8192  # rows that a large problem is read on; what is large
SOME_STEPS = 1000  # of a long chain that it is read on
SOME_SEQUENCES = 100  # of many that they are read on
PER_STATE = 50  # rows of the sample for each joint state


@dataclass(frozen=True)
class Problem:
    """Everything that a solver needs: structure, plan, row weights, variance floors, states.

    ``smaller`` is the problem on some of the rows, with the same plan, where the data is large:
    starts are sought there. Where each of several processes has rows of its own, ``everywhere`` is
    the weighted number of all, and ``row_weights`` are those of this one.
    """

    structure: Structure
    plan: Plan
    row_weights: Tensor | None
    floors: dict[str, Tensor]
    floor: float
    groups: tuple[StateGroup, ...]
    engine: Engine
    smaller: Problem | None = None
    everywhere: float | None = None
    chain_nodes: Mapping[str, Any] | None = None

    @property
    def sample(self) -> Problem:
        """The problem on a sample of its rows; itself where it is small."""
        return self.smaller or self

    @cached_property
    def rows(self) -> float:
        """The number of rows, weighted; sequences of which nothing is seen do not count."""
        if self.everywhere is not None:
            return self.everywhere
        seen, weights = self._sequences_seen, self.row_weights
        if seen is not None:
            return max(float((seen if weights is None else seen * weights).sum()), 1e-300)
        if weights is None:
            return float(self.structure.num_rows)
        return max(float(weights.sum()), 1e-300)

    @property
    def _sequences_seen(self) -> Tensor | None:
        """Which elements of the rows' plates show anything, where these are sequences."""
        structure, total = self.structure, None
        if self.streamed or not structure.unit or structure.factor_sites - structure.chained:
            return None
        for chain in structure.chains:
            if tuple(chain.plates) != structure.unit:
                return None
            own = lengths(structure, self.nodes, chain).reshape(structure.unit_shape) >= 0
            total = own if total is None else total | own
        return total

    @cached_property
    def free(self) -> list[str]:
        """The parameters that are not fixed."""
        return [b.name for b in self.plan.blocks.values() if b.rung is not Rung.FIXED]

    @cached_property
    def df(self) -> int:
        """The number of free parameters: of directions that change the model."""
        return degrees_of_freedom(self.plan)

    @property
    def streamed(self) -> bool:
        """Whether the data is read in blocks: ``structure`` is then that of some rows."""
        return not isinstance(getattr(self.engine, "chunks", []), list)

    @property
    def kernel(self) -> MixtureEngine | None:
        """The kernel on the rows of this process, if the program has one."""
        engine = self.engine.own if isinstance(self.engine, DistributedEngine) else self.engine
        return engine if isinstance(engine, MixtureEngine) else None

    def weighted(self, row_weights: Tensor) -> Problem:
        """The same problem under other row weights (over the rows' plates), data in memory.

        ``smaller``, on which labels are looked at, keeps its own.
        """
        engine: Engine = self.engine
        if isinstance(engine, MixtureEngine):
            flat = row_weights.reshape(-1)
            engine = replace(engine, chunks=[rows.weighted(flat) for rows in engine.chunks])
        elif isinstance(engine, ChainEngine):
            chunks = [own.weighted(self.structure, row_weights) for own in engine.chunks]
            engine = replace(engine, chunks=chunks)
        else:
            assert isinstance(engine, TraceEngine | ChainTraceEngine)
            engine = replace(engine, row_weights=row_weights)
        return replace(self, row_weights=row_weights, engine=engine)

    def e_step(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        return self.engine.expect(params)

    def m_step(
        self,
        params: Params,
        expected: Expected,
        only: frozenset[str] | None = None,
        effort: Effort = THOROUGH,
    ) -> Params:
        """New parameters from expected statistics."""
        return m_step(self.plan, params, expected, self.floors, only, effort)

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable."""
        return self.engine.log_joint(params)

    @property
    def nodes(self) -> Mapping[str, Any]:
        """The sites of the program on all that starts are sought on."""
        nodes: Mapping[str, Any] = self.plan.reading.traces[0].trace.nodes
        return self.chain_nodes or nodes

    def marginals(self, params: Params) -> dict[str, Tensor]:
        """The posterior probabilities of every assignment: its plates, then its states."""
        engine, structure = self.sample.engine, self.sample.structure
        if not is_chained(engine):
            return posterior(structure, params).marginals
        with isolated(structure.program.dtype, 0):
            found = decode.marginals(engine.potentials(params))
        return decode.by_site(structure, found)

    def on_sequences(self, structure: Structure, params: Params) -> Chained:
        """The engine on other sequences, those that ``structure`` is of."""
        engine = self.engine.own if isinstance(self.engine, DistributedEngine) else self.engine
        assert is_chained(engine)
        if structure is self.structure:
            return engine
        with isolated(structure.program.dtype, 0), torch.no_grad():
            if isinstance(engine, ChainEngine):
                nodes = structure.program.run(params).nodes
                chunk = sequences_of(structure, engine.parts, nodes, packed=False)
                return replace(engine, structure=structure, chunks=[chunk])
            nodes = structure.enumerate(params).trace.nodes
        assert isinstance(engine, ChainTraceEngine)
        ends = {chain.name: lengths(structure, nodes, chain) for chain in structure.chains}
        return replace(engine, structure=structure, row_weights=None, ends=ends)

    def parts(self, params: Params) -> tuple[float, float]:
        """Log-likelihood and log prior as numbers; NaN where the program cannot run."""
        with torch.no_grad():
            try:
                log_likelihood, log_prior = self.log_joint(params)
            except (ModelError, torch.linalg.LinAlgError):
                return math.nan, math.nan
        return float(log_likelihood), float(log_prior)

    def chunks_of(
        self, params: Params, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterable[Rows] | None:
        """The rows of new data (or of the problem's own, if there are none) for the kernel.

        None where the trace engine has to be asked: it was not the kernel that fitted, the new
        data is small, or the program makes something else of it than rows.
        """
        dtype, structure = self.structure.program.dtype, self.sample.structure
        if args and is_source(args[0]):
            if self.kernel is None and self.structure.chains:
                return None
            if self.kernel is None:
                raise ModelError("Data in blocks needs a program with a kernel.")
            rest = as_data(args[1:], dtype), as_data(dict(kwargs), dtype)
            make = RowMaker(structure, self.kernel.mixture)
            return Streamed(make, blocks(args[0]), rest, dtype, None)
        if self.kernel is None:
            return None
        if not args and not kwargs:
            return self.kernel.chunks
        data = as_data(args, dtype), as_data(dict(kwargs), dtype)
        rows = leading_size(data)
        if rows < LARGE or len(structure.unit) != 1:
            return None
        try:
            whole = whole_data(structure, *data, rows, torch.arange(0), part=True)
            if whole is None or not whole.agrees_at(self.plan, params):
                return None
        except PyroemError:
            return None
        return [Rows(self.kernel.mixture, whole.nodes)]

    def clip(self, params: Params, factor: float = 1.0) -> Params:
        """``params`` with every variance above ``factor`` times its floor."""
        result = dict(params)
        for name, floor in self.floors.items():
            high = clipped(self.plan.blocks[name], params[name], floor * factor)
            result[name] = self.structure.parameters[name].keep(high)
        return result


def pose(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    fixed: Fixed = (),
    floor: float = 0.0,
    weights: Any = None,
    engine: str = "auto",
    device: torch.device | None = None,
) -> Problem:
    """Read a program with its data, plan its M-step and choose its engine.

    Large data is read on a sample of its rows, where the program runs on a sample of rows as on
    all of them (which is checked).
    """
    fixed = tuple(fixed)
    with torch.inference_mode(False):
        if args and is_source(args[0]):
            if engine == "trace":
                raise SettingError("engine='trace': data in blocks needs the kernel.")
            rest = as_data(args[1:], dtype), as_data(dict(kwargs), dtype)
            return _pose_blocks(model, args[0], rest, dtype, fixed, floor, weights, device)
        given = (*args, *kwargs.values())
        if any(isinstance(x, Iterator) or isgeneratorfunction(x) for x in given):
            raise DataError(
                "The data is an iterator, which can be read once only. Give the rows themselves, or"
                " a function that makes the iterator anew: pyroem.blocks(function)."
            )
        data = as_data(args, dtype), as_data(dict(kwargs), dtype)
        loops, sizes = ([], set[int]()) if engine == "trace" else first_look(model, *data, dtype)
        some = None
        if loops:
            if max(loops) * max(sizes, default=1) > SOME_STEPS:
                some = _pose_long(model, *data, dtype, fixed, floor, weights, sizes, device)
        elif engine != "trace" and leading_size(data) >= LARGE:
            some = _pose_large(model, *data, dtype, fixed, floor, weights, SAMPLE, device)
        if some is not None:
            return some
        structure = read(model, *data, dtype=dtype, chains=bool(loops))
        plan = make_plan(structure, fixed)
        structure = plan.structure
        row_weights = None if weights is None else check_weights(weights, structure)
        if structure.chains:
            return problem_of(structure, plan, row_weights, floor, "", device=device)
        mixture = mixture_of(structure, plan)
        if engine == "kernel" and isinstance(mixture, str):
            raise SettingError(f"engine='kernel': the program has no kernel: {mixture}.")
        if device is not None and (engine == "trace" or isinstance(mixture, str)):
            why = mixture if isinstance(mixture, str) else "engine='trace' was asked for"
            raise SettingError(f"device='{device}' needs a program with a kernel; here {why}.")
        if engine == "trace" or isinstance(mixture, str):
            why = "" if engine == "trace" else str(mixture)
            return problem_of(structure, plan, row_weights, floor, why)
        nodes = plan.reading.traces[0].trace.nodes
        return problem_of(structure, plan, row_weights, floor, mixture, nodes, device)


def problem_of(
    structure: Structure,
    plan: Plan,
    row_weights: Tensor | None,
    floor: float,
    mixture: Mixture | str,
    nodes: Any = None,
    device: torch.device | None = None,
) -> Problem:
    """The problem of what was read; the kernel's rows are those of ``nodes``."""
    floors = variance_floors(structure, plan.blocks, floor)
    groups = tuple(state_groups(structure, plan))
    if structure.chains:
        engine: Engine = chain_engine(structure, plan, row_weights, device)
    elif isinstance(mixture, str):
        engine = TraceEngine(structure, plan, row_weights, mixture)
    else:
        with isolated(structure.program.dtype, 0), torch.no_grad():
            check_kernel(Rows(mixture, nodes))
            rows = Rows(mixture, nodes, row_weights, device=device)
            engine = MixtureEngine(mixture, [rows])
    return Problem(structure, plan, row_weights, floors, floor, groups, engine)


def _pose_long(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    fixed: Fixed,
    floor: float,
    weights: Any,
    sizes: set[int],
    device: torch.device | None,
) -> Problem | None:
    """The problem of long chains, read on some of their steps; None where all have to be read.

    ``sizes`` are those of the program's plates.
    """
    try:
        rows = leading_size((args, kwargs))
        few = args, kwargs
        if rows > SOME_SEQUENCES and rows in sizes:
            few = take(few, sample_rows(rows, SOME_SEQUENCES, None, few), rows)
        structure = read(model, *few, dtype=dtype, chains=True, some_steps=SOME_STEPS)
        loops = structure.program.loops
        if loops is None or (few[0] is args and len(loops.steps) >= max(loops.lengths) - 1):
            return None
        if few[0] is not args:
            structure = with_own_values(structure, args, kwargs)
        plan = make_plan(structure, fixed)
        structure = plan.structure
        parts = chain_parts(structure, plan)
        if isinstance(parts, str):
            return None
        point = plan.reading.points[0]
        whole, nodes = on_other_sequences(structure, point, args, kwargs)
        with isolated(dtype, 0), torch.no_grad():
            if not same_arguments(whole.program.run(point, nesting=whole.nesting).nodes, plan):
                return None
            row_weights = None if weights is None else check_weights(weights, whole)
            chunk = sequences_of(whole, parts, nodes, row_weights, device=device)
            engine = ChainEngine(whole, plan, parts, [chunk])
            run = plan.reading.traces[0]
            lengths = {c.name: run.sizes(c.step)[c.steps] + 1 for c in structure.chains}
            read_chains = tuple(replace(c, length=lengths[c.name]) for c in structure.chains)
            small = replace(structure, chains=read_chains)
            _check_chains(sequences_of(small, parts, run.trace.nodes, packed=False))
    except PyroemError:
        return None  # what is wrong is found, and told, on all the data
    floors = variance_floors(structure, plan.blocks, floor)
    groups = tuple(state_groups(structure, plan))
    return Problem(whole, plan, row_weights, floors, floor, groups, engine, chain_nodes=nodes)


def chain_engine(
    structure: Structure,
    plan: Plan,
    row_weights: Tensor | None,
    device: torch.device | None = None,
) -> ChainEngine | ChainTraceEngine:
    """The engine of a program with chains."""
    nodes = plan.reading.traces[0].trace.nodes
    parts = chain_parts(structure, plan)
    if isinstance(parts, str):
        if device is not None:
            raise SettingError(
                f"device='{device}' needs a chain whose observations are products of matrices; here"
                f" {parts}."
            )
        ends = {chain.name: lengths(structure, nodes, chain) for chain in structure.chains}
        return ChainTraceEngine(structure, plan, row_weights, ends, parts)
    with isolated(structure.program.dtype, 0), torch.no_grad():
        _check_chains(sequences_of(structure, parts, nodes, packed=False))
        chunk = sequences_of(structure, parts, nodes, row_weights, device=device)
    return ChainEngine(structure, plan, parts, [chunk])


def _check_chains(chunk: Sequences) -> None:
    for rows in chunk.rows:
        for part in (rows.opening, rows.following):
            if part is not None:
                check_kernel(part)


def _pose_large(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    fixed: Fixed,
    floor: float,
    weights: Any,
    size: int,
    device: torch.device | None,
) -> Problem | None:
    """The problem, read on a sample of ``size`` rows; None where the whole has to be read."""
    rows = leading_size((args, kwargs))
    row_weights = None
    try:
        if weights is not None:
            row_weights = weights_of(weights, rows, dtype)
        index = sample_rows(rows, size, row_weights, (args, kwargs))
        few = take((args, kwargs), index, rows)
        structure = read(model, *few, dtype=dtype)
        if structure.unit_shape != (len(index),):
            return None
        states = sum(structure.assignments.values())
        if PER_STATE * states > size and size < rows // 2:
            more = min(PER_STATE * states, rows // 2)
            return _pose_large(model, args, kwargs, dtype, fixed, floor, weights, more, device)
        with isolated(dtype, 0), torch.no_grad():
            data = whole_data(structure, args, kwargs, rows, index)
            if data is None:
                return None
            structure = replace(structure, parameters=data.parameters)
            plan = make_plan(structure, fixed)
            structure = plan.structure
            mixture = mixture_of(structure, plan)
            whole = replace(structure, program=data.program, unit_shape=(rows,))
            if row_weights is not None:
                row_weights = check_weights(row_weights, whole)
            if isinstance(mixture, str) or not data.agrees(plan):
                return None
            total = float(rows if row_weights is None else row_weights.sum())
            own = None if row_weights is None else row_weights[index]
            own = standing_for(own, len(index), total, dtype)
            small = problem_of(
                structure, plan, own, floor, mixture, plan.reading.traces[0].trace.nodes
            )
            engine = MixtureEngine(mixture, [Rows(mixture, data.nodes, row_weights, device=device)])
    except PyroemError:
        return None  # what is wrong is found, and told, on all the data
    return replace(small, structure=whole, row_weights=row_weights, engine=engine, smaller=small)


def _pose_blocks(
    model: Callable[..., Any],
    source: Any,
    rest: tuple[tuple[Any, ...], dict[str, Any]],
    dtype: torch.dtype,
    fixed: Fixed,
    floor: float,
    weights: Any,
    device: torch.device | None,
) -> Problem:
    """The problem of data in blocks, read on a sample of the rows."""
    given = blocks(source)
    row_weights = None if weights is None else weights_of(weights, given.length, dtype)
    size, states = SAMPLE, 0
    while True:
        rows, data, own = sampled(given, rest, size, dtype, row_weights)
        if rows > size and any(has_rows(x, rows) for x in tree_leaves(rest)):
            raise DataError(
                f"Data in blocks: an argument beside the blocks has {rows} rows too. Put it into"
                " the blocks: pyroem.blocks((x, y))."
            )
        try:
            structure = read(model, *data, dtype=dtype, chains=True, some_steps=SOME_STEPS)
        except DataError as error:
            some = f"a sample of {leading_size(data[0])} of the {rows} rows"
            raise DataError(f"Data in blocks, in {some}: {error}") from error
        states = sum(structure.assignments.values())
        if PER_STATE * states <= size or size >= rows:
            break
        size = min(PER_STATE * states, rows)
    total = float(rows if row_weights is None else row_weights.sum())
    own = standing_for(own, leading_size(data[0]), total, dtype)
    small = pose_with_kernel(structure, fixed, floor, own, "Data in blocks", device)
    whole = replace(small.structure, unit_shape=(rows,))
    if row_weights is not None:
        row_weights = check_weights(row_weights, whole)
    make = maker_of(small, device)
    engine = with_chunks(small.engine, Streamed(make, given, rest, dtype, rows, row_weights))
    return replace(small, structure=whole, row_weights=row_weights, engine=engine, smaller=small)


def pose_with_kernel(
    structure: Structure,
    fixed: Fixed,
    floor: float,
    weights: Tensor,
    what: str,
    device: torch.device | None = None,
) -> Problem:
    """The problem on a sample of the rows, for what needs a kernel with one plate of rows."""
    rows = len(weights)
    if structure.chains:
        _check_rows(structure, rows, what)
        program, dtype = structure.program, structure.program.dtype
        options: dict[str, Any] = {"dtype": dtype, "weights": weights, "device": device}
        small = pose(
            program.model, program.args, program.kwargs, fixed=fixed, floor=floor, **options
        )
        if not isinstance(small.engine, ChainEngine):
            raise ModelError(
                f"{what}: expected a program with a kernel; here {small.engine.description}."
            )
        return small
    plan, mixture = plan_with_kernel(structure, fixed, rows, what)
    nodes = plan.reading.traces[0].trace.nodes
    return problem_of(plan.structure, plan, weights, floor, mixture, nodes)


def maker_of(problem: Problem, device: torch.device | None = None) -> Maker:
    """What makes rows for the problem's kernel, from more data."""
    engine, structure = problem.engine, problem.structure
    if isinstance(engine, ChainEngine):
        return SequenceMaker(structure, problem.plan, engine.parts, device)
    assert isinstance(engine, MixtureEngine)
    return RowMaker(structure, engine.mixture, device)


def with_chunks(engine: Engine, chunks: Iterable[Any]) -> MixtureEngine | ChainEngine:
    """The kernel on other data."""
    if isinstance(engine, ChainEngine):
        return replace(engine, chunks=chunks)
    assert isinstance(engine, MixtureEngine)
    return replace(engine, chunks=chunks)


def numbers_of(weights: Any, dtype: torch.dtype) -> Tensor:
    """Row weights as a tensor."""
    try:
        return torch.as_tensor(weights).to(dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"weights: expected numbers, one for each row, got {type(weights).__name__}"
            f" {weights!r:.80}."
        ) from error


def weights_of(weights: Any, rows: int | None, dtype: torch.dtype) -> Tensor:
    """Row weights as a vector, of as many elements as there are rows (where that is known)."""
    tensor = numbers_of(weights, dtype)
    if tensor.dim() != 1 or rows not in (None, len(tensor)):
        size = "" if rows is None else f" ({rows},)"
        raise DataError(
            f"weights: expected one for each row{size}, got shape {tuple(tensor.shape)}."
        )
    return tensor


def standing_for(weights: Tensor | None, rows: int, total: float, dtype: torch.dtype) -> Tensor:
    """Weights of the ``rows`` of a sample, which together weigh as much as all rows: ``total``.

    So a prior counts no more on the sample than on all data.
    """
    own = torch.ones(rows, dtype=dtype) if weights is None else weights
    return own * (total / own.sum())


def plan_with_kernel(
    structure: Structure, fixed: Fixed, rows: int, what: str
) -> tuple[Plan, Mixture]:
    """The plan and the kernel of a program that was read on ``rows`` rows; ``what`` needs it."""
    _check_rows(structure, rows, what)
    plan = make_plan(structure, fixed)
    mixture = mixture_of(structure, plan)
    if isinstance(mixture, str):
        raise ModelError(f"{what}: expected a program with a kernel; here {mixture}.")
    return plan, mixture


def _check_rows(structure: Structure, rows: int, what: str) -> None:
    if structure.unit_shape != (rows,):
        raise ModelError(
            f"{what}: expected a program with one plate of independent rows, of the size of the"
            f" data ({rows} rows in the sample that it was read on), got plates"
            f" {', '.join(structure.unit) or 'none'} of sizes {structure.unit_shape}."
        )


def check_weights(weights: Any, structure: Structure) -> Tensor:
    """Row weights as a tensor over the rows' plates."""
    if not structure.unit:
        raise SettingError("weights: the program has no plate of independent rows to weigh.")
    tensor = numbers_of(weights, structure.program.dtype)
    if tuple(tensor.shape) != structure.unit_shape:
        plates = ", ".join(f"'{p}'" for p in structure.unit)
        raise DataError(
            f"weights: expected shape {structure.unit_shape} (plate {plates}),"
            f" got {tuple(tensor.shape)}."
        )
    bad = ~(tensor.isfinite() & (tensor >= 0))
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"weights: expected finite numbers that are not negative, got {tensor[index].item()} at"
            f" index {index} ({int(bad.sum())} such)."
        )
    if not (tensor > 0).any():
        raise DataError("weights: expected at least one row with a positive weight.")
    return tensor
