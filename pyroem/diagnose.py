"""What is wrong with a point: variances at their floor, states that died."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import unwrap
from pyroem.mstep.intervals import interval_of
from pyroem.mstep.least_squares import flattest, slope_of
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Expected, Run
from pyroem.mstep.sites import SiteModel
from pyroem.problem import Problem
from pyroem.structure import Params, from_search, to_search
from pyroem.text import label

DEAD = 1e-3  # rows
HINT = (
    ": the density has no maximum there; give that scale a prior that keeps it off zero (LogNormal,"
    " InverseGamma)"
)
SPIKE = 9.0  # nats above a density as wide as the data
UNSEEN = 1e-3  # nats by which the log-joint may fall towards infinity and is flat none the less
RISES = 1.0  # nats by which it may rise
REACH = 40  # halvings and doublings of a step
SEPARATED = 1e-6  # curvature beside that of even odds
MARGIN = 1.01  # rounding moves an eigenvalue that was lifted to the floor
MISSING_FLOOR = 1e-14  # of the data's variance, where the floor is turned off


def collapsed(problem: Problem, params: Params, margin: float = MARGIN) -> list[str]:
    """The variances below ``margin`` times their floor, by parameter and component."""
    messages: list[str] = []
    covered: set[str] = set()
    for name, floor in problem.floors.items():
        block = problem.plan.blocks[name]
        clip = block.uses[0].coordinate.clip
        assert clip is not None and block.form is not None
        moved = clip(params[name], floor * margin) != params[name]
        if block.form.event_dim:
            moved = moved.flatten(-block.form.event_dim).any(-1)
        covered.update(use.site.name for use in block.uses)
        if moved.any():
            site = block.uses[0].site
            messages.append(
                f"{_where(name, moved)} (the spread of {site.title}) ran to its floor{_hint(site)}"
            )
    for site in problem.plan.reading.places:
        if site.family.variance is None or site.scale is None or site.name in covered:
            continue
        if any(a.selection is None for a in site.arguments.values()):
            continue
        variance = site.family.variance(site.evaluate(params, lambda: None))
        low = variance <= max(problem.floor, MISSING_FLOOR) * site.scale * margin
        if low.any():
            names = sorted({p for a in site.arguments.values() for p in a.parameters})
            messages.append(
                f"the variance of {site.title} ran to zero (it depends on {', '.join(names)})"
                f"{_hint(site)}"
            )
    return messages + _spikes(problem, params)


def _spikes(problem: Problem, params: Params) -> list[str]:
    """Priors whose density runs to infinity: learned spreads at zero, shapes below one at zero."""
    messages, plan = [], problem.plan
    run = Run(plan, params)
    for name in plan.reading.prior_dependence:
        if name not in problem.free or not params[name].numel():
            continue
        prior = run.prior(name)
        base, _, masks = unwrap(prior["fn"])
        if masks:
            continue
        learned = plan.reading.prior_dependence[name] & set(problem.free)
        events = len(base.event_shape)
        density = base.log_prob(params[name]) / max(1, base.event_shape.numel())
        unit = _log_unit(plan, name, params[name])
        unit = unit.flatten(unit.dim() - events).mean(-1) if events and unit.dim() else unit
        if learned and bool((density + unit > SPIKE).any()):
            messages.append(
                f"the prior of '{name}' shrank to a point (it depends on"
                f" {', '.join(sorted(learned))}){HINT}"
            )
        if events:
            continue
        small = (params[name] > 0) & (params[name] < 1e-90)
        inside = base.log_prob(params[name].clamp(min=1e-50))
        if bool((small & (density > inside + 1)).any()):
            messages.append(f"'{name}' ran to zero, where the density of its prior is infinite")
    return messages


def _log_unit(plan: Plan, name: str, value: Tensor) -> Tensor:
    """The logarithm of what is wide: the data's spread for a location, a rate's own size."""
    interval = interval_of(plan.structure.parameters[name].constraint)
    if interval == (0.0, math.inf):
        return value.log()
    step = plan.steps[name]
    return step.log() if interval == (-math.inf, math.inf) else step.new_zeros(())


def _hint(site: SiteModel) -> str:
    return HINT if site.is_prior else ""


def dead(problem: Problem, expected: Expected) -> list[str]:
    """The states of assignments that hold no data, by assignment and component."""
    messages = []
    sites = problem.plan.reading.sites
    for group in problem.groups:
        total = None
        for z in group.assignments:
            if z not in sites:
                continue
            counts = _counts(problem, z, expected, group.num_states)
            total = counts if total is None else total + counts
        if total is None or float(total.sum()) < group.num_states or group.num_states < 2:
            continue
        empty = total < DEAD
        if empty.any():
            name = group.assignments[0] + ("" if len(group.assignments) == 1 else ", ...")
            states = ", ".join(str(int(i)) for i in empty.nonzero())
            messages.append(f"state {states} of assignment '{name}' holds no data")
    return messages


def separated(problem: Problem, params: Params, expected: Expected) -> str:
    """A word on coefficients that run to infinity, if some do."""
    for regression in problem.plan.regressions:
        parameters = (problem.structure.parameters[n] for n in regression.offsets)
        if any(p.has_prior for p in parameters):
            continue
        if flattest(problem.plan, regression, params, expected) < SEPARATED:
            names = ", ".join(regression.offsets)
            return (
                f"the likelihood has no maximum in {names}: it rises without end along some"
                " direction (the data are separated); a Normal prior would give one"
            )
    return ""


def slope(problem: Problem, params: Params) -> float:
    """The largest element of the objective's gradient per row, in units of ``plan.steps``."""
    parameters, steps = problem.structure.parameters, problem.plan.steps
    raw = to_search(parameters, {n: params[n] for n in problem.free}, steps)
    with torch.enable_grad():
        values = from_search(parameters, raw, steps)
        log_likelihood, log_prior = problem.log_joint({**params, **values})
        total = (log_likelihood + log_prior) / problem.rows
        if not total.requires_grad:
            return 0.0  # nothing depends on the free parameters
        grads = torch.autograd.grad(total, list(raw.values()), allow_unused=True)
    found = dict(zip(raw, grads, strict=True))
    for regression in problem.plan.regressions:
        # Covariates of masked rows may be anything: they spoil the program's gradient, not this.
        own = [g for n in regression.offsets if (g := found.get(n)) is not None]
        if any(bool(g.isnan().any()) for g in own):
            expected, _ = problem.e_step(params)
            for n, g in slope_of(problem.plan, regression, params, expected).items():
                found[n] = g * steps[n] / problem.rows
    steep = [float(g.abs().max()) for g in found.values() if g is not None and g.numel()]
    return math.inf if any(s != s for s in steep) else max(steep, default=0.0)


def _counts(problem: Problem, z: str, expected: Expected, num_states: int) -> Tensor:
    """Expected number of rows in each state."""
    values = expected.statistics[z].values
    if (
        values[0].shape[-1:] == (num_states,)
        and problem.plan.reading.sites[z].family.event_dims[0] == 1
    ):
        return values[0].reshape(-1, num_states).sum(0)
    successes, all_rows = values[0].sum(), expected.statistics[z].weight.sum()
    return torch.stack([all_rows - successes, successes])


def _where(name: str, flags: Tensor) -> str:
    if flags.dim() == 0:
        return name
    places = [", ".join(str(int(i)) for i in row) for row in flags.nonzero()[:5]]
    more = int(flags.sum()) - len(places)
    return ", ".join(f"{name}[{p}]" for p in places) + (f" and {more} more" if more > 0 else "")


Sides = dict[str, Tensor]  # by parameter and element: -1, 0 or 1


def endless(problem: Problem, params: Params, suspects: Mapping[str, Tensor]) -> Sides:
    """Which of some elements the log-joint lets run off, and to which side, all others held.

    That is where it changes by next to nothing if the element moves far outwards: on the line by
    ten times its size, on a half-line (in the logarithm) by a factor of a thousand. Elements
    without any influence, which may move to either side, are none; nor are those that have a prior.
    What some of the rows say is asked of all of them; where these are not all here, nothing is
    found.
    """
    found = _endless(problem.sample, params, suspects)
    if not found or problem.smaller is None:
        return found
    if problem.streamed or problem.everywhere is not None:
        return {}
    return _endless(problem, params, {name: own != 0 for name, own in found.items()})


def _endless(problem: Problem, params: Params, suspects: Mapping[str, Tensor]) -> Sides:
    found: Sides = {}
    maximum = sum(problem.parts(params))
    for name, mask in suspects.items():
        parameter, step = problem.structure.parameters[name], problem.plan.steps[name]
        interval = interval_of(parameter.constraint)
        if interval is None or not any(map(math.isinf, interval)) or not bool(mask.any()):
            continue
        if parameter.has_prior:
            continue
        raw = parameter.unconstrain(params[name])
        line = all(map(math.isinf, interval))
        away = 10 * (step + raw.abs()) if line else torch.full_like(raw, math.log(1000))
        sides = torch.zeros_like(raw)
        for place in map(tuple, mask.nonzero().tolist()):
            free = []
            for side in (-1, 1):
                moved = raw.clone()
                moved[place] += side * away.expand_as(raw)[place]
                there = {**params, name: parameter.constrain(moved)}
                # A fit that has not settled may rise: that is no flatness.
                if -UNSEEN < sum(problem.parts(there)) - maximum < RISES:
                    free.append(side)
            if len(free) == 1:
                sides[place] = free[0]
        if bool(sides.any()):
            found[name] = sides
    return found


def pulled_in(problem: Problem, params: Params, sides: Sides, fall: float) -> Params:
    """The elements that run off brought back, one by one, to where the log-joint falls by ``fall``.

    There the data speak of them. An element stays where no such place is found.
    """
    result = dict(params)
    for name, own in sides.items():
        parameter = problem.structure.parameters[name]
        for place in map(tuple, own.nonzero().tolist()):
            maximum, raw = sum(problem.parts(result)), parameter.unconstrain(result[name])

            def at(away: float, place: Any = place, raw: Tensor = raw) -> Tensor:
                moved = raw.clone()
                moved[place] -= away * own[place]  # noqa: B023
                return parameter.constrain(moved)  # noqa: B023

            def left(away: float) -> float:
                return sum(problem.parts({**result, name: at(away)})) - maximum + fall  # noqa: B023

            near, far = 0.0, float(problem.plan.steps[name].expand_as(raw)[place])
            for _ in range(REACH):
                if not left(far) > 0:
                    break
                near, far = far, 2 * far
            else:
                continue
            for _ in range(REACH):
                middle = 0.5 * (near + far)
                near, far = (middle, far) if left(middle) > 0 else (near, middle)
            result[name] = at(near)
    return result


def labels_of(sides: Sides) -> list[str]:
    """The names of the elements that run off: ``logits[1, 0]``."""
    return [
        label(name, place)
        for name, own in sides.items()
        for place in map(tuple, own.nonzero().tolist())
    ]


def in_words(problem: Problem, sides: Sides) -> str:
    """Where the elements run."""
    ends = dict[str, list[str]]()
    for name, own in sides.items():
        interval = interval_of(problem.structure.parameters[name].constraint)
        assert interval is not None
        for side in (-1, 1):
            end = interval[(side + 1) // 2]
            there = f"{'minus ' * (end < 0)}infinity" if math.isinf(end) else f"its bound {end:g}"
            ends.setdefault(there, []).extend(labels_of({name: (own == side).int()}))
    return "; ".join(
        f"{listed(labels)} run{'s' * (len(labels) == 1)} to {end}"
        for end, labels in ends.items()
        if labels
    )


def listed(names: list[str], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
