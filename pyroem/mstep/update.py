"""The M-step: maximise the expected log-joint, block by block, never lowering it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroem._pyro import site_log_prob
from pyroem.mstep.closed import clipped, closed_update
from pyroem.mstep.least_squares import solve
from pyroem.mstep.local import local_model
from pyroem.mstep.maximise import MakeOptimiser, Objective, ascend, maximise
from pyroem.mstep.plan import Plan, Rung
from pyroem.mstep.regression import Regression, regression
from pyroem.mstep.runs import Expected, Run
from pyroem.structure import Params

SWEEP_TOLERANCE = 1e-9
FEW = 32  # coordinates for which second derivatives are taken
VERY_FEW = 4  # where each of them takes a pass over the data


@dataclass(frozen=True)
class Effort:
    """How far an M-step goes.

    Attributes:
    ----------
    sweeps
        Over the blocks that interact.
    iterations
        Of each search on the statistics.
    newton
        Of each regression, and of Newton's method on the statistics while it gains much: what is
        left to gain, the next M-step gains.
    over_rows
        Of each search on the weighted rows.
    steps
        Over the data, for what has no statistics.
    optimiser
        A function from a list of tensors to the torch optimiser of those steps; L-BFGS if None.
    """

    sweeps: int
    iterations: int
    newton: int
    over_rows: int
    steps: int = 10
    optimiser: MakeOptimiser | None = None


THOROUGH = Effort(50, 200, 200, 200)
QUICK = Effort(3, 20, 5, 2)


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
                    current = solve(plan, together, current, expected, effort.newton)
                continue
            if block.partners and block.partners <= names:
                block = block.profiled
            value = closed_update(plan, block, current, expected, floor)
            current = {**current, block.name: value}
        if numeric:
            own = [b.name for b in numeric]
            over_rows = any(b.rung is Rung.ON_ROWS for b in numeric)
            iterations = effort.over_rows if over_rows else effort.iterations
            found = _on_statistics(plan, own, current, expected, iterations, effort.newton)
            for block in numeric:
                if floor is not None and block.name in floor:
                    found[block.name] = clipped(block, found[block.name], floor[block.name])
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


def _priors_touched(plan: Plan, names: list[str]) -> list[str]:
    """The priors of ``names``, and those whose arguments depend on them."""
    hangs = plan.reading.prior_dependence
    return [p for p, depends in hangs.items() if p in names or depends & set(names)]


def _on_statistics(
    plan: Plan,
    names: list[str],
    params: Params,
    expected: Expected,
    iterations: int,
    newton: int,
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
        newton=newton,
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
