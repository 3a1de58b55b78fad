"""The M-step: maximise the expected log-joint, block by block, never lowering it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import site_log_prob, unwrap
from pyroem.families.forms import Form
from pyroem.mstep.least_squares import solve
from pyroem.mstep.local import local_model
from pyroem.mstep.maximise import MakeOptimiser, Objective, ascend, maximise
from pyroem.mstep.plan import Block, Plan, Rung
from pyroem.mstep.regression import Regression, regression
from pyroem.mstep.runs import Expected, Run, coefficients_of, prior_coefficients
from pyroem.mstep.selection import as_blocks
from pyroem.structure import Params

SWEEP_TOLERANCE = 1e-9
FEW = 32  # coordinates for which second derivatives are taken
APART = 1e-10  # relative distance of neighbours in order
VERY_FEW = 4  # where each of them takes a pass over the data
SMALLEST = {torch.float64: 1e-100, torch.float32: 1e-30}


@dataclass(frozen=True)
class Effort:
    """How far an M-step goes.

    Attributes:
    ----------
    sweeps
        Over the blocks that interact.
    iterations
        Of each search on the statistics.
    over_rows
        Of each search on the weighted rows.
    steps
        Over the data, for what has no statistics.
    optimiser
        A function from a list of tensors to the torch optimiser of those steps; L-BFGS if None.
    """

    sweeps: int
    iterations: int
    over_rows: int
    steps: int = 10
    optimiser: MakeOptimiser | None = None


THOROUGH = Effort(50, 200, 200)
QUICK = Effort(3, 20, 2)


def m_step(
    plan: Plan,
    params: Params,
    expected: Expected,
    floor: Mapping[str, Tensor] | None = None,
    only: frozenset[str] | None = None,
    effort: Effort = THOROUGH,
) -> Params:
    """New parameters with at least the expected log-joint of ``params``.

    Blocks that interact (a shared mean with several variances) are updated in turn until they
    settle, or as often as the ``effort`` allows; what is left to gain, the next M-step gains.
    ``only`` restricts the update to some parameters (for a partial start).
    """
    chosen = [
        b
        for b in plan.blocks.values()
        if b.rung is not Rung.FIXED and (only is None or b.name in only)
    ]
    names = {b.name for b in chosen}
    direct = [b for b in chosen if b.rung in (Rung.CLOSED_FORM, Rung.REGRESSION)]
    numeric = [b for b in chosen if b.rung in (Rung.ON_STATISTICS, Rung.ON_ROWS)]
    gradient = [b for b in chosen if b.rung is Rung.GRADIENT]
    current = dict(params)
    for sweep in range(effort.sweeps):
        before = current
        solved = set[str]()
        for block in direct:
            if block.rung is Rung.REGRESSION:
                if block.name not in solved:
                    together = _together(plan, block.name, names)
                    solved |= together.offsets.keys()
                    current = solve(plan, together, current, expected, effort.iterations)
                continue
            if block.partners and block.partners <= names:
                block = block.profiled
            value = closed_update(plan, block, current, expected, floor)
            current = {**current, block.name: value}
        if numeric:
            own = [b.name for b in numeric]
            over_rows = any(b.rung is Rung.ON_ROWS for b in numeric)
            iterations = effort.over_rows if over_rows else effort.iterations
            found = _on_statistics(plan, own, current, expected, iterations)
            for block in numeric:
                clip = block.uses[0].coordinate.clip if block.uses else None
                if floor is not None and block.name in floor and clip is not None:
                    found[block.name] = clip(found[block.name], floor[block.name])
            current = {**current, **found}
        if gradient and sweep == 0:
            own = [b.name for b in gradient]
            current = {**current, **_on_data(plan, own, current, expected, effort)}
        if not plan.interacting:
            break
        moved = max((_relative(current[b.name], before[b.name]) for b in chosen), default=0.0)
        if moved < SWEEP_TOLERANCE:
            break
    return current


def _together(plan: Plan, name: str, names: set[str]) -> Regression:
    """The regression of a coefficient, of those parameters that are updated."""
    (found,) = (r for r in plan.regressions if name in r.offsets)
    if found.offsets.keys() <= names:
        return found
    return regression(plan.structure, plan.reading.places, [n for n in found.offsets if n in names])


def _relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().max() / (old.abs().max() + 1e-300)) if new.numel() else 0.0


def closed_update(
    plan: Plan,
    block: Block,
    params: Params,
    expected: Expected,
    floor: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The maximiser of the expected log-joint in one parameter, the others held fixed.

    Blocks without any weight (a dead component) keep their value.
    """
    form, old = block.form, params[block.name]
    assert form is not None
    run = Run(plan, params)
    has_prior = plan.structure.parameters[block.name].has_prior
    prior = prior_coefficients(form, run.prior(block.name), old) if has_prior else None
    if form.mode_of_cells is not None:
        value = form.mode_of_cells(*_cells(block, run, expected, prior)).reshape(old.shape)
    else:
        totals = pooled(block, run, expected)
        if prior is not None:
            totals = tuple(t + p.reshape(t.shape) for t, p in zip(totals, prior, strict=True))
        held = plan.structure.parameters[block.name].held
        if held is not None and form.mode_beside is not None:
            dims = form.event_dim
            around = as_blocks(old, dims), as_blocks(held, dims)
            value = form.mode_beside(*around, *totals).reshape(old.shape)
        else:
            value = form.mode(*totals).reshape(old.shape)
        if block.ordered:
            value = in_order(form, value, totals)
    if not math.isfinite(value.sum()):
        value = torch.where(_finite_blocks(value, form.event_dim), value, old)
    coordinate = block.uses[0].coordinate
    if floor is not None and block.name in floor and coordinate.clip is not None:
        value = coordinate.clip(value, floor[block.name])
    if "scalar" in form.domain:
        value = _inside(value, block.lower, block.upper)
        if has_prior:
            value = _below(value, run.prior(block.name))
    held = plan.structure.parameters[block.name].held
    return value if held is None else torch.where(held, old, value)


def in_order(form: Form, value: Tensor, totals: tuple[Tensor, ...]) -> Tensor:
    """The maximiser with elements that increase along the last dim: pooled adjacent violators.

    A unimodal kernel that adds has its constrained maximum where neighbours out of order share the
    mode of their summed coefficients (Barlow et al., 1972). They are kept apart by a hair, since
    the constraint is strict.
    """
    length = value.shape[-1]
    rows = value.reshape((-1, length)).clone()
    shaped = [t.reshape((-1, length)) for t in totals]
    for r, row in enumerate(rows):
        pools: list[tuple[Tensor, int]] = []  # coefficients, number of elements
        for i in range(length):
            if not math.isfinite(row[i]):
                return value
            pools.append((torch.stack([t[r, i] for t in shaped]), 1))
            while len(pools) > 1 and form.mode(*pools[-2][0]) >= form.mode(*pools[-1][0]):
                (b, n), (a, m) = pools.pop(), pools.pop()
                pools.append((a + b, m + n))
        if len(pools) < length:
            row.copy_(torch.cat([form.mode(*c).expand(n) for c, n in pools]))
            apart = APART * (1 + row.abs().max()) * torch.arange(length)
            row.add_(apart.to(row))
    return rows.reshape(value.shape)


def _cells(
    block: Block, run: Run, expected: Expected, prior: tuple[Tensor, ...] | None
) -> tuple[Any, ...]:
    """The number of the block in every cell, the number of blocks, and the cells' coefficients."""
    value = run.params[block.name]
    count = value.numel()
    parts = []
    for use in block.uses:
        found = torch.broadcast_tensors(use.cells, *coefficients_of(use, value, run, expected))
        parts.append([c.reshape(-1)[found[0].reshape(-1) >= 0] for c in found])
    if prior is not None:
        parts.append([torch.arange(count), *(p.reshape(-1) for p in prior)])
    index, *coefficients = (torch.cat(list(p)) for p in zip(*parts, strict=True))
    return index, count, *coefficients


def _finite_blocks(x: Tensor, event_dim: int) -> Tensor:
    finite = x.isfinite()
    if event_dim:
        batch = finite.shape[: finite.dim() - event_dim]
        finite = finite.flatten(len(batch)).all(-1).reshape(batch + (1,) * event_dim)
    return finite


def _inside(x: Tensor, lower: float, upper: float) -> Tensor:
    """Clip to the open interval; a closed unit interval may be reached."""
    if (lower, upper) == (0.0, 1.0):
        return x.clamp(0.0, 1.0)
    if lower == 0.0:
        return x.clamp(SMALLEST[x.dtype], upper if upper < torch.inf else 1 / SMALLEST[x.dtype])
    width = 1e-12 if x.dtype == torch.float64 else 1e-6
    low = lower + width * max(1.0, abs(lower)) if lower > -torch.inf else None
    high = upper - width * max(1.0, abs(upper)) if upper < torch.inf else None
    return x if low is None and high is None else x.clamp(low, high)


def _below(x: Tensor, prior: Any) -> Tensor:
    """Off the upper bound of a Uniform prior, which gives it no density."""
    base, _, _ = unwrap(prior["fn"])
    if type(base) is not dist.Uniform:
        return x
    return torch.minimum(x, torch.nextafter(base.high.to(x), base.low.to(x)))


def pooled(block: Block, run: Run, expected: Expected) -> tuple[Tensor, ...]:
    """The coefficients of a parameter's kernel, summed over every cell where it stands."""
    form, value = block.form, run.params[block.name]
    assert form is not None
    blocks = as_blocks(value, form.event_dim)
    event = tuple(blocks.shape[1:])
    if block.alone:  # the usual case needs no sums
        found = coefficients_of(block.uses[0], value, run, expected)
        shapes = [(*event[:1] * dims,) if form.event_dim else () for dims in form.coefficient_dims]
        if all(
            c.shape[: c.dim() - len(s)] == block.uses[0].cells.shape
            for c, s in zip(found, shapes, strict=True)
        ):
            return tuple(c.reshape((len(blocks), *s)) for c, s in zip(found, shapes, strict=True))
    totals: list[Tensor] = []
    for dims in form.coefficient_dims:
        shape = (*event[:1] * dims,) if form.event_dim else ()
        totals.append(torch.zeros((len(blocks), *shape), dtype=value.dtype, device=value.device))
    for use in block.uses:
        coefficients = coefficients_of(use, value, run, expected)
        for i, (c, dims) in enumerate(zip(coefficients, form.coefficient_dims, strict=True)):
            c = _summed(c, use.cells, dims)
            batch = torch.broadcast_shapes(c.shape[: c.dim() - dims], use.cells.shape)
            index = use.cells.expand(batch).reshape(-1)
            c = c.expand(batch + c.shape[c.dim() - dims :]).reshape(
                (-1, *c.shape[c.dim() - dims :])
            )
            chosen = index >= 0
            totals[i] = totals[i].index_add(0, index[chosen], c[chosen])
    return tuple(totals)


def _priors_touched(plan: Plan, names: list[str]) -> list[str]:
    """The priors of ``names``, and those whose arguments depend on them."""
    hangs = plan.reading.prior_dependence
    return [p for p, depends in hangs.items() if p in names or depends & set(names)]


def _summed(c: Tensor, cells: Tensor, dims: int) -> Tensor:
    """Coefficients summed over the dims along which the same block stands everywhere."""
    rank = c.dim() - dims
    if rank != cells.dim():
        return c
    alike = [d for d in range(rank) if cells.shape[d] == 1 and c.shape[d] > 1]
    return c.sum(alike, keepdim=True) if alike else c


def _on_statistics(
    plan: Plan, names: list[str], params: Params, expected: Expected, iterations: int
) -> Params:
    """Maximise over ``names`` together, on the expected statistics alone."""
    sites = [plan.reading.sites[s] for s, d in plan.reading.dependence.items() if d & set(names)]
    priors = _priors_touched(plan, names)

    def objective(values: Params) -> Tensor:
        run = Run(plan, {**params, **values})
        total = torch.zeros((), dtype=plan.structure.program.dtype)
        for site in sites:
            total = total + site.expected_log_density(
                run.arguments(site), expected.statistics[site.name]
            )
        for prior in priors:
            total = total + run.log_prior(prior)
        return total

    def local(values: Params) -> Objective:
        run = Run(plan, {**params, **values})
        models = [(s, local_model(s, run.arguments(s), expected.statistics[s.name])) for s in sites]

        def model(ahead: Params) -> Tensor:
            run = Run(plan, {**params, **ahead})
            total = sum((m(run.arguments(s)) for s, m in models), torch.zeros(()))
            return total + sum((run.log_prior(p) for p in priors), torch.zeros(()))

        return model

    return maximise(
        objective,
        {n: params[n] for n in names},
        plan.structure.parameters,
        plan.steps,
        max_iter=iterations,
        rows=plan.structure.num_rows,
        few=FEW,
        local=local if any(s.along_rows for s in sites) else None,
    )


def _on_data(
    plan: Plan, names: list[str], params: Params, expected: Expected, effort: Effort
) -> Params:
    """A few ascent steps over ``names``, on the expected log-density of the data itself."""
    structure = plan.structure
    sites = [s for s, d in plan.reading.dependence.items() if d & set(names)]
    priors = _priors_touched(plan, names)

    def objective(values: Params) -> Tensor:
        run = Run(plan, {**params, **values})
        total = torch.zeros((), dtype=structure.program.dtype)
        for s in sites:
            node = run.nodes[s]
            log_prob = site_log_prob(node, masked=node["infer"].get("_enumerate_dim") is None)
            total = total + expected_sum(expected.weights[s], log_prob)
        for prior in priors:
            total = total + run.log_prior(prior)
        return total

    start = {n: params[n] for n in names}
    if effort.optimiser is not None:
        count, rows = effort.steps, structure.num_rows
        parameters, steps = structure.parameters, plan.steps
        return ascend(objective, start, parameters, steps, effort.optimiser, count, rows)
    return maximise(
        objective,
        start,
        structure.parameters,
        plan.steps,
        max_iter=effort.steps,
        rows=structure.num_rows,
        few=VERY_FEW,
    )


def expected_sum(weights: Tensor, log_prob: Tensor) -> Tensor:
    """``sum weights * log_prob``, with zero weights winning over ``-inf``."""
    impossible = (weights == 0) & ~log_prob.isfinite()
    return (weights * torch.where(impossible, torch.zeros_like(log_prob), log_prob)).sum()
