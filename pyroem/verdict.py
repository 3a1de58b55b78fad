"""The verdict on a run: collapse, symmetry and a slope that is left overrule convergence."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from pyroem.diagnose import MARGIN, Sides, collapsed, dead, endless, in_words, separated, slope
from pyroem.families import forms
from pyroem.guesses import escape
from pyroem.loop import Outcome, Status, movement, steepest
from pyroem.mstep.plan import Rung
from pyroem.mstep.runs import Expected
from pyroem.problem import Problem
from pyroem.race import Start
from pyroem.structure import Params
from pyroem.symmetry import coinciding

SADDLE = 1e-5  # nats a row that moving states apart gains at a saddle
DISTANT, FEW = 4.0, 50  # steps from zero, and elements, that are looked at
# Forms whose maximiser is a mean of the data, or a spread around one, and so never far from them.
NEAR = (forms.LOCATION, forms.VECTOR_LOCATION, forms.SCALE, forms.COVARIANCE, forms.MEDIAN)
NO_MAXIMUM = "the log-joint has no maximum there; a prior would give one"
ALIKE = 1e-2  # nats; two states are alike where no log-probability differs by more


def _distant(problem: Problem, params: Params) -> dict[str, Tensor]:
    """The elements that stand far from zero, at most ``FEW``: those that may run to infinity."""
    found, left = {}, FEW
    for name in problem.free:
        if problem.plan.blocks[name].form in NEAR:
            continue
        parameter, step = problem.structure.parameters[name], problem.plan.steps[name]
        raw = parameter.unconstrain(params[name])
        if raw.shape != params[name].shape:
            continue
        mask = (raw.abs() > DISTANT * step) & raw.isfinite()
        mask = mask if parameter.held is None else mask & ~parameter.held
        left -= int(mask.sum())
        if bool(mask.any()) and left >= 0:
            found[name] = mask
    return found


def _settled(
    problem: Problem, solver: Judged, outcome: Outcome, far: Sides, expected: Expected
) -> bool:
    """Whether another EM step changes nothing but the elements that run off."""
    last = [record.log_joint for record in outcome.history[-2:]]
    if len(last) < 2 or abs(last[1] - last[0]) > solver.tol * problem.rows:
        return False
    params = outcome.state.params
    new = problem.m_step(params, expected)
    new.update({n: torch.where(own != 0, params[n], new[n]) for n, own in far.items()})
    return movement(new, params) <= solver.param_tol


class Judged(Protocol):
    """What the verdict needs of a solver."""

    @property
    def monotone(self) -> bool:
        """Whether a step that lowers the objective is an error."""
        ...

    @property
    def out_of_iterations(self) -> str:
        """What to say where the iterations ran out."""
        ...

    @property
    def param_tol(self) -> float:
        """The relative change of a parameter at which a run stops."""
        ...

    @property
    def tol(self) -> float:
        """The change of the objective, a row, at which a run stops."""
        ...


def judge(problem: Problem, solver: Judged, start: Start, outcome: Outcome) -> Outcome:
    """Look at where a run ended: collapse and symmetry overrule convergence."""
    params = outcome.state.params
    failed = outcome.status in (Status.NON_FINITE, Status.DECREASED, Status.DEGENERATE)
    # Close to the floor rounding may lower the objective: that is the collapse, not a defect.
    problems = collapsed(problem, params, 1e4 if failed else MARGIN)
    if not failed:
        expected, log_prior = problem.e_step(params)
        problems += dead(problem, expected)
        outcome = replace(outcome, parts=(float(expected.log_likelihood), float(log_prior)))
    if outcome.status is Status.INTERRUPTED:
        return replace(outcome, message="; ".join(problems))
    if problems:
        new = [problem for problem in problems if problem not in outcome.message]
        message = "; ".join([*new, *([outcome.message] if outcome.message else [])])
        return replace(outcome, status=Status.DEGENERATE, message=message)
    if failed:
        return outcome
    small = problem.sample
    structure, plan = small.plan.structure, small.plan
    alike = coinciding(structure, plan, params, ALIKE)
    for z, pairs in coinciding(structure, plan, start.params).items():
        stuck = [pair for pair in pairs if pair in alike.get(z, [])]
        if stuck:
            message = f"states {stuck[0][0]} and {stuck[0][1]} of '{z}' started alike and stayed so"
            return replace(outcome, status=Status.SYMMETRIC, message=message)
    searched = (Rung.ON_STATISTICS, Rung.ON_ROWS, Rung.GRADIENT)
    numeric = any(plan.on(rung) for rung in searched)
    numeric = numeric or not all(regression.exact for regression in plan.regressions)
    if outcome.status is Status.CONVERGED and numeric and solver.monotone:
        steep = slope(problem, params)
        if steep > steepest(problem, outcome.state, solver.tol):
            message = f"the gradient per row is still {steep:.2g}"
            return replace(outcome, status=Status.STALLED, message=message)
    if outcome.status is Status.CONVERGED and not outcome.message:
        message = separated(problem, params, expected)
        if message:
            return replace(outcome, message=message)
    if alike and not outcome.message:
        z, pairs = next(iter(alike.items()))
        message = f"states {pairs[0][0]} and {pairs[0][1]} of '{z}' ended alike"
        gain = escape(small, params) - float(sum(small.log_joint(params)))
        if gain > SADDLE * small.rows:
            message += f"; moving them apart raises the objective by about {gain:.3g}"
            return replace(outcome, status=Status.SYMMETRIC, message=message)
        return replace(outcome, message=f"{message}: fewer states may do")
    if outcome.status in (Status.CONVERGED, Status.MAX_ITER) and not outcome.message:
        far = endless(problem, params, _distant(problem, params))
        if far:
            outcome = replace(outcome, message=f"{in_words(problem, far)}: {NO_MAXIMUM}")
            if solver.monotone and _settled(problem, solver, outcome, far, expected):
                return replace(outcome, status=Status.CONVERGED)
    if outcome.status is Status.MAX_ITER and not outcome.message:
        return replace(outcome, message=solver.out_of_iterations)
    return outcome
