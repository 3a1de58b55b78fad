"""Profile likelihoods: the objective along one number, maximised over all the rest.

    pl(t) = max { log p(data | params) + log p(params) : which(params) = t }

With parameters that have a prior this is the profile of the posterior's mode. The interval is
``{t : 2 (maximum - pl(t)) <= q}`` with ``q`` the quantile of chi-squared with one degree of freedom
(Wilks, 1938; Venzon and Moolgavkar, 1988). Unlike ``estimate +- z standard_error`` it does not
depend on how the parameter is written, and need not be symmetric.

The constrained maximum (:mod:`pyroem.constrained`) is followed outwards from the fit, from each
point to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.special import ndtri
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.constrained import (
    Climb,
    Point,
    Which,
    climb_from,
    edge_of,
    far_elements,
    lifted,
    number_of,
    side_of,
    target_of,
)
from pyroem.derivatives import check_in_memory
from pyroem.diagnose import in_words, pulled_in
from pyroem.errors import SettingError
from pyroem.problem import Problem
from pyroem.structure import Params
from pyroem.text import plain
from pyroem.uncertainty import check_free, check_level

HIGHER = 1e-6  # nats above the fit that say that it is not the maximum
FAR = 1000.0  # standard errors up to which an end is sought
NEAR = 18.0  # the same in logarithms and logits: a factor of 1e8
NOTABLE = 1e-3  # nats, and standard errors, by which a profile is said to rise
BEYOND = 0.25  # of the way to an end: how far the values go beyond it


@dataclass(frozen=True, eq=False)
class Profile:
    """A profile likelihood and its interval.

    Attributes:
    ----------
    name
        The number: an element such as ``"loc[0, 1]"``, or the name given to a contrast.
    values
        Its values, ascending, the estimate among them.
    log_joint
        The profile at each: the highest ``log p(data | params) + log p(params)``; NaN where the
        search for it failed.
    params
        The parameters that reach it, one dict for each value.
    estimate, maximum
        The number and the objective at the fit.
    level, interval
        The interval ``(low, high)`` of that confidence. A bound of the support where the profile
        meets no threshold before it; infinite where it meets none at all.
    message
        What is not as it should be; empty where all is well.
    """

    name: str
    values: Tensor
    log_joint: Tensor
    params: list[Params]
    estimate: float
    maximum: float
    level: float
    interval: tuple[float, float]
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; those that are not finite become None."""
        return {key: plain(value) for key, value in vars(self).items()}

    def __str__(self) -> str:
        low, high = self.interval
        line = f"{self.name}: {self.estimate:.6g}, {100 * self.level:.6g}% profile interval"
        note = f"\n{self.message}" if self.message else ""
        return f"{line} ({low:.6g}, {high:.6g}){note}"

    def __repr__(self) -> str:
        return f"<Profile of {self.name} at {len(self.values)} values>"


@dataclass(frozen=True)
class End:
    """Where a walk ended: on the axis (NaN where it broke off), the interval's end, and a note."""

    at: float
    value: float
    note: str = ""


def profile(
    problem: Problem,
    params: Params,
    which: Which,
    level: float = 0.95,
    points: int = 21,
    name: str | None = None,
    note: str = "",
) -> Profile:
    """The profile of one number through a maximum at ``params``; see the module.

    Parameters
    ----------
    which
        An element, such as ``"loc[1]"`` (``"rate"`` where it is a single number), or a function of
        the dict of parameters that gives a scalar tensor, called ``name``.
    level
        The confidence of the interval.
    points
        The number of values, evenly spaced on either side of the estimate to a little beyond the
        interval's ends.
    The message begins with ``note``.

    It follows one maximum outwards: where components change their roles (one's mean runs into the
    other's) the profile may have others, and the message says where it rises again. Elements that
    stand at a bound at the fit, other than ``which`` itself, are held there.

    Raises:
    ------
    SettingError
        Where ``which`` is no number that depends on the free parameters, for a ``level`` that is
        not between 0 and 1, fewer than 3 ``points``, and a fit in single precision.
    ModelError
        For data in blocks or spread over processes.
    """
    check_level(level, "profile")
    if isinstance(points, bool) or not isinstance(points, int) or points < 3:
        raise SettingError(f"profile: points must be a whole number of at least 3, got {points!r}.")
    check_in_memory(problem, "profile")
    check_free(problem, "profile")
    dtype = problem.structure.program.dtype
    if dtype != torch.float64:
        raise SettingError(f"profile: the fit must be in double precision, it is in {dtype}.")
    target = target_of(problem, which, name)
    with isolated(dtype, 0):
        estimate = number_of(target, params)
        maximum = sum(problem.parts(params))
        if not math.isfinite(maximum):
            raise SettingError(f"profile: the log-joint at the parameters is {maximum}.")
        z = float(ndtri(0.5 + level / 2))
        edge = edge_of(problem, params, target)
        origin = lifted(problem, params, target, edge) if edge else params
        far = {} if edge else far_elements(problem, params)
        if far:
            origin = pulled_in(problem, params, far, min(z**2, 1.0) / 8)
            edge = side_of(far, target)
        climb, notes = climb_from(problem, origin, target, maximum, bool(edge or far))
        if far:
            notes.append(f"{in_words(problem, far)}.")
        here = climb.maximise(climb.start[0])
        if not here.found:
            notes.append(f"The search failed at {target.name} = {climb.number(here.at):.6g}.")
        ends = [_end(climb, here, side, z, edge) for side in (-1, 1)]
        found = _filled(climb, ends, params, estimate, edge, points, bool(far))
    notes = [note] * bool(note) + notes + [end.note for end in ends if end.note]
    notes += _noted(climb, ends, [height for _, height, _ in found], z)
    return Profile(
        target.name,
        torch.tensor([t for t, _, _ in found], dtype=dtype),
        torch.tensor([height for _, height, _ in found], dtype=dtype),
        [values for _, _, values in found],
        estimate,
        maximum,
        level,
        (ends[0].value, ends[1].value),
        " ".join(notes),
    )


def _end(climb: Climb, here: Point, side: int, z: float, edge: int) -> End:
    """The end of the interval on one side of the fit."""
    if side == edge:
        bound, name = _bound(climb, side), climb.target.name
        note = f"{name} is estimated at its bound {bound:g}." if math.isfinite(bound) else ""
        return End(here.at, bound, note)
    inside, outside, note = _walk(climb, here, side, z, edge)
    if outside is None:
        return End(inside.at, math.nan if "failed" in note else _bound(climb, side), note)
    try:
        at = brentq(
            lambda x: climb.depth(climb.maximise(x)) - z,
            *sorted((inside.at, outside.at)),
            xtol=1e-7 * abs(outside.at - inside.at),
            rtol=1e-12,
        )
    except ValueError:
        return End(inside.at, math.nan, f"The search for an end of {climb.target.name} failed.")
    return End(at, climb.number(at))


def _bound(climb: Climb, side: int) -> float:
    return climb.target.axis.low if side < 0 else climb.target.axis.high


def _walk(
    climb: Climb, here: Point, side: int, z: float, edge: int
) -> tuple[Point, Point | None, str]:
    """The last maximum above the threshold, the first below it (or None, and why)."""
    name, bounded = climb.target.name, climb.target.axis.bounded
    limit = NEAR if bounded else FAR * climb.spread
    if edge and climb.depth(here) > z:  # the end is nearer to the bound than where the walk begins
        near = climb.maximise(here.at - side * 2 * NEAR)
        return near, here, ""
    step = climb.spread * z / 4
    step = min(step, 1.0) if bounded else step
    last, failures = here, 0
    while abs(last.at - here.at) < limit:
        step = min(step, 1.001 * limit - abs(last.at - here.at))
        point = climb.maximise(last.at + side * step)
        if point.blurred:
            break
        if not point.found:
            failures, step = failures + 1, step / 4
            if failures > 4:
                if climb.depth_towards(last, side) < z:
                    break
                return last, None, f"The search failed beyond {name} = {climb.number(last.at):.6g}."
            continue
        if climb.depth(point) > z:
            point = climb.again(point, last)
        if climb.depth(point) > z:
            if climb.depth_towards(last, side) < z:  # it was the search that fell
                break
            return last, point, ""
        gained = climb.depth(point) - climb.depth(last)
        step *= min(max(z / 4 / max(gained, 1e-12), 0.5), 2.0)
        last = point
    bound, reached = _bound(climb, side), climb.number(last.at)
    if math.isfinite(bound):
        return last, None, f"The bound {bound:g} of {name} comes before the threshold."
    return (
        last,
        None,
        f"The log-joint does not fall below the threshold up to {name} = {reached:.4g}.",
    )


def _filled(
    climb: Climb,
    ends: list[End],
    params: Params,
    estimate: float,
    edge: int,
    points: int,
    far: bool,
) -> list[tuple[float, float, Params]]:
    """The profile at evenly spaced values on either side: number, height, parameters."""
    at_fit, fitted = climb.start[0], estimate
    if edge and far:
        estimate = climb.number(at_fit)  # values far out would all be one
    below = (points - 1) // 2 if not edge else 0 if edge < 0 else points - 1
    places = [] if edge else [(estimate, at_fit)]
    for side, end, count in zip((-1, 1), ends, (below, points - 1 - below), strict=True):
        last = _last(climb, end, side, estimate, at_fit)
        for i in range(count):
            t = estimate + (last - estimate) * (i + 1) / count
            at = float(climb.target.axis.forward(torch.tensor(t, dtype=torch.float64)))
            climb.maximise(at)
            places.append((t, at))
        climb.sweep(side)
    known = [(t, climb.known[at]) for t, at in places]
    found = [(t, point.log_joint, climb.values(point.w)) for t, point in known]
    if edge:
        found.append((fitted, climb.maximum, dict(params)))
    return sorted(found, key=lambda entry: entry[0])


def _last(climb: Climb, end: End, side: int, estimate: float, at_fit: float) -> float:
    """The outermost value on one side."""
    bound = _bound(climb, side)
    if math.isnan(end.value):
        return climb.number(end.at)
    if end.value == bound:
        if math.isfinite(bound):
            return bound + 1e-3 * (estimate - bound)
        return climb.number(at_fit + side * min(4 * climb.spread, abs(end.at - at_fit)))
    beyond = end.value + BEYOND * (end.value - estimate)
    return beyond if side * (bound - beyond) > 0 else 0.5 * (end.value + bound)


def _noted(climb: Climb, ends: list[End], heights: list[float], z: float) -> list[str]:
    """What is to be said of all maxima that were found."""
    notes, name, found = [], climb.target.name, climb.found
    best = max(found, key=lambda p: p.log_joint, default=None)
    higher = best is not None and best.log_joint > climb.maximum + HIGHER
    if best is not None and higher:
        notes.append(
            f"The fit is not the maximum: at {name} = {climb.number(best.at):.6g} the log-joint is"
            f" {best.log_joint - climb.maximum:.3g} higher."
        )
    lost = sum(map(math.isnan, heights))
    if lost:
        notes.append(
            f"No maximum was found at {lost} of {len(heights)} values (the search did not settle,"
            " or a component collapsed): NaN."
        )
    for side, end in zip((-1, 1), ends, strict=True):
        outwards = sorted(
            (p for p in found if side * (p.at - climb.start[0]) >= 0), key=lambda p: side * p.at
        )
        rising = [a for a, b in pairwise(outwards) if b.log_joint > a.log_joint + NOTABLE]
        if rising and not higher:
            notes.append(
                f"The profile rises again beyond {name} = {climb.number(rising[0].at):.6g}, towards"
                " another maximum."
            )
        outside = [p for p in outwards if side * (p.at - end.at) > 0]
        beyond = [p for p in outside if climb.depth(p) < z - NOTABLE]
        if beyond and math.isfinite(end.value):
            notes.append(
                f"It comes above the threshold again at {name} = {climb.number(beyond[0].at):.6g},"
                " outside the interval."
            )
    return notes
