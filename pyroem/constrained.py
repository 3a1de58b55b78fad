"""Maxima of the objective under a constraint: one number made of the parameters is given.

They are sought by sequential quadratic programming (Kraft, 1988) in unconstrained coordinates in
which the information matrix at the fit is the identity, so that few steps are needed whatever the
parameters' units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from pyro.distributions import constraints
from scipy.optimize import minimize
from torch import Tensor

from pyroem.curves import Index, element, moved, support
from pyroem.derivatives import Coordinates, coordinates
from pyroem.diagnose import Sides, collapsed
from pyroem.errors import ModelError, SettingError
from pyroem.problem import Problem
from pyroem.structure import Params
from pyroem.text import label
from pyroem.uncertainty import EDGE, SINGULAR, STEEP, at_bound, directions, far_off, objective

Which = str | Callable[[Params], Tensor]
RISE = 1e-5  # nats between two maxima
GAIN = 1e-6  # nats that a Newton step may still promise at a maximum
INSIDE = 1e-5  # how far inside its bound an estimate is lifted off
TINY = 1e-6  # standard errors: a step along which the objective is straight
BLUR = 1e-4  # nats by which rounding may move the objective
REFUSED = 1e20  # the height of what the program cannot do


@dataclass(frozen=True)
class Axis:
    """A number between bounds, on a scale without any: its logarithm or logit."""

    low: float = -math.inf
    high: float = math.inf

    @property
    def bounded(self) -> bool:
        """Whether the scale is not the number's own."""
        return math.isfinite(self.low) or math.isfinite(self.high)

    def forward(self, value: Tensor) -> Tensor:
        """From the number to the scale, ascending."""
        if not self.bounded:
            return value
        total = torch.zeros_like(value)
        if math.isfinite(self.low):
            total = total + (value - self.low).log()
        return total - (self.high - value).log() if math.isfinite(self.high) else total

    def back(self, at: float) -> float:
        """From the scale to the number."""
        if not self.bounded:
            return at
        if math.isinf(self.high):
            return self.low + math.exp(at)
        if math.isinf(self.low):
            return self.high - math.exp(-at)
        return self.low + (self.high - self.low) / (1 + math.exp(-at))


@dataclass(frozen=True)
class Target:
    """What is profiled: a number made of the parameters. ``place`` where it is an element."""

    name: str
    of: Callable[[Params], Tensor]
    axis: Axis = field(default_factory=Axis)
    place: tuple[str, Index] | None = None


@dataclass(frozen=True, eq=False)
class Point:
    """A constrained maximum: ``at`` on the axis, ``w`` in whitened coordinates."""

    at: float
    log_joint: float
    w: np.ndarray
    blurred: bool = False  # the log-joint is lost in rounding there

    @property
    def found(self) -> bool:
        """Whether the search ended well."""
        return math.isfinite(self.log_joint)


@dataclass(frozen=True, eq=False)
class Climb:
    """The constrained maxima of a problem.

    ``whiten`` maps coordinates ``w``, in which the information at the fit is the identity, to the
    unconstrained ones; ``known`` are the maxima found so far, by their place on the axis.
    """

    problem: Problem
    origin: Coordinates
    target: Target
    whiten: Tensor
    maximum: float
    known: dict[float, Point] = field(default_factory=dict)

    def params(self, w: Tensor) -> Params:
        """All parameters at ``w``."""
        return self.origin.params(self.origin.vector + self.whiten @ w)

    def number(self, at: float) -> float:
        """The value of the target at a place of its axis."""
        return self.target.axis.back(at)

    def depth(self, point: Point) -> float:
        """``sqrt(2 (maximum - pl))``: in standard errors, were the objective quadratic."""
        return math.sqrt(2 * max(self.maximum - point.log_joint, 0.0))

    def _loss(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.tensor(x, requires_grad=True)
        try:
            total = sum(self.problem.log_joint(self.params(w)), torch.zeros(()))
            (slope,) = torch.autograd.grad(total, w)
        except (ModelError, torch.linalg.LinAlgError):
            return REFUSED, np.zeros_like(x)
        if not bool(total.isfinite() & slope.isfinite().all()):
            return REFUSED, np.zeros_like(x)
        return self.maximum - float(total.detach()), -slope.numpy()

    def constraint(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """The target on its axis, and its slope."""
        w = torch.tensor(x, requires_grad=True)
        at = self.target.axis.forward(self.target.of(self.params(w)))
        (slope,) = torch.autograd.grad(at, w)
        return float(at.detach()), slope.numpy()

    @cached_property
    def start(self) -> tuple[float, np.ndarray]:
        """The target at the fit, and its slope."""
        return self.constraint(np.zeros(self.whiten.shape[1]))

    @property
    def spread(self) -> float:
        """The standard error of the target on its axis."""
        return float(np.linalg.norm(self.start[1]))

    @property
    def found(self) -> list[Point]:
        """The maxima found so far, in order."""
        return sorted((p for p in self.known.values() if p.found), key=lambda p: p.at)

    def maximise(self, at: float) -> Point:
        """The highest objective where the target stands at ``at``; NaN where none was found."""
        near = sorted(self.found, key=lambda p: abs(p.at - at))
        point = self._search(at, self._guess(at))
        for other in near[:2]:
            if point.found:
                break
            point = self._search(at, other.w)
        self._keep(point)
        return self.known[at]

    def again(self, point: Point, near: Point) -> Point:
        """The maximum at a point's place, sought from another one too."""
        self._keep(self._search(point.at, near.w))
        return self.known[point.at]

    def depth_towards(self, point: Point, side: int) -> float:
        """The depth next to the bound on one side, all else as at ``point``: at least that deep.

        Infinite where there is no bound, or where the target cannot be moved there.
        """
        axis, place = self.target.axis, self.target.place
        bound = axis.low if side < 0 else axis.high
        if place is None or not math.isfinite(bound):
            return math.inf
        (name, index), params = place, self.values(point.w)
        wanted = bound + 1e-9 * (float(params[name][index]) - bound)
        value = moved(self.problem.structure.parameters[name], params[name], {index: wanted})
        if value is None:
            return math.inf
        height = sum(self.problem.parts({**params, name: value}))
        deep = 2 * (self.maximum - height)
        return math.sqrt(max(deep, 0.0)) if math.isfinite(deep) else math.inf

    def sweep(self, side: int) -> None:
        """Come back from outside: where the profile rises outwards, its maxima may go on inwards.

        So that a point is not left on the lower of two maxima.
        """
        at_fit = self.start[0]
        outwards = sorted(
            (p for p in self.known.values() if side * (p.at - at_fit) > 0),
            key=lambda p: side * p.at,
        )
        better = False
        for a, b in reversed(list(pairwise(outwards))):
            outer, inner = self.known[b.at], self.known[a.at]
            if outer.found and (better or not inner.log_joint >= outer.log_joint - RISE):
                better = self._keep(self._search(inner.at, outer.w))
            else:
                better = False

    def _keep(self, point: Point) -> bool:
        """Whether a maximum is higher than the one known at its place; it is kept then."""
        own = self.known.get(point.at)
        better = own is None or not own.found or point.log_joint > own.log_joint + RISE
        if better:
            self.known[point.at] = point
        return better and point.found

    def _guess(self, at: float) -> np.ndarray:
        """Between, or beyond, the maxima on either side."""
        known = self.found
        if len(known) < 2:
            at_fit, slope = self.start
            return slope * ((at - at_fit) / (slope @ slope))
        above = next((i for i, p in enumerate(known) if p.at >= at), len(known) - 1)
        a, b = known[max(above, 1) - 1], known[max(above, 1)]
        share = (at - a.at) / (b.at - a.at)
        found: np.ndarray = a.w + min(max(share, -2.0), 3.0) * (b.w - a.w)
        return found

    def _search(self, at: float, w: np.ndarray) -> Point:
        with np.errstate(all="ignore"):  # far out squares of slopes may overflow
            return self._sought(at, w)

    def _sought(self, at: float, w: np.ndarray) -> Point:
        unit = self.spread
        constraint = {
            "type": "eq",
            "fun": lambda x: (self.constraint(x)[0] - at) / unit,
            "jac": lambda x: self.constraint(x)[1] / unit,
        }
        tolerance = max(1e-9, 1e-14 * abs(self.maximum))
        for _ in range(3):  # anew from where it ended, in case that it ran into a corner
            w = minimize(
                self._loss,
                w,
                jac=True,
                method="SLSQP",
                constraints=constraint,
                options={"ftol": tolerance, "maxiter": 100},
            ).x
            if not np.isfinite(w).all():
                break
            loss, slope = self._loss(w)
            here, normal = self.constraint(w)
            along = slope - normal * (normal @ slope) / max(normal @ normal, 1e-300)
            if loss < REFUSED and abs(here - at) < 1e-6 * unit and along @ along < 2 * GAIN:
                if self._blurred(w, loss, slope, normal):
                    return Point(at, math.nan, w, blurred=True)
                narrow = collapsed(self.problem, self.values(w))
                return Point(at, math.nan if narrow else self.maximum - loss, w)
        return Point(at, math.nan, w)

    def _blurred(self, w: np.ndarray, loss: float, slope: np.ndarray, normal: np.ndarray) -> bool:
        """Whether rounding moves the objective: a step along the axis too small to be seen does.

        As where the difference of two log-gamma functions of a huge number cancels.
        """
        step = TINY * self.spread * normal / max(normal @ normal, 1e-300)
        jumps = [self._loss(w + s * step)[0] - loss - s * (slope @ step) for s in (-2, -1, 1, 2)]
        return not max(map(abs, jumps)) < BLUR

    def values(self, w: np.ndarray) -> Params:
        """All parameters at ``w``, without derivatives."""
        with torch.no_grad():
            return {n: v.detach() for n, v in self.params(torch.tensor(w)).items()}


def target_of(problem: Problem, which: Which, name: str | None) -> Target:
    """What is profiled, from an element's label or from a function of the parameters."""
    if callable(which):
        own = getattr(which, "__name__", "")
        return Target(name or (own if own.isidentifier() else "contrast"), which)
    parameters = problem.structure.parameters
    own, index = element(parameters, which, "which")
    held = parameters[own].held
    if own not in problem.free or (held is not None and bool(held[index])):
        raise SettingError(
            f"which: '{label(own, index)}' is fixed, so that it has no profile; fit.curve shows the"
            " objective along it."
        )
    axis = Axis(*support(parameters[own], index))
    return Target(name or label(own, index), lambda p: p[own][index], axis, (own, index))


def number_of(target: Target, params: Params) -> float:
    """The target at some parameters, checked to be one finite number."""
    with torch.no_grad():
        found = target.of(dict(params))
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise SettingError(f"which: expected a function that gives one number, got {what}.")
    if not math.isfinite(float(found)):
        raise SettingError(f"which: expected a finite number at the fit, got {float(found)}.")
    return float(found)


def edge_of(problem: Problem, params: Params, target: Target) -> int:
    """-1 or 1 where the target stands at its lower or upper bound, else 0."""
    if target.place is None:
        return 0
    name, index = target.place
    value, axis = float(params[name][index]), target.axis
    # Of a simplex only the elements at zero are told.
    whole = problem.structure.parameters[name].kind is constraints.simplex and 1 - value < EDGE
    if not (whole or bool(at_bound(coordinates(problem, params), name)[index])):
        return 0
    return -1 if value - axis.low < axis.high - value else 1


def far_elements(problem: Problem, params: Params) -> Sides:
    """The elements that run to infinity, or to a bound, at the fit."""
    at = coordinates(problem, params)
    return far_off(problem, at, -objective(problem, at)[1].diagonal())


def side_of(far: Sides, target: Target) -> int:
    """-1 or 1 where the target itself runs down or up without end, else 0."""
    if target.place is None or target.place[0] not in far:
        return 0
    name, index = target.place
    return int(far[name][index])


def lifted(problem: Problem, params: Params, target: Target, edge: int) -> Params:
    """The parameters with the target a little inside the bound at which it stands."""
    assert target.place is not None
    (name, index), axis = target.place, target.axis
    width = axis.high - axis.low
    away = INSIDE * (width if math.isfinite(width) else 1.0)
    inside = axis.low + away if edge < 0 else axis.high - away
    value = moved(problem.structure.parameters[name], params[name], {index: inside})
    if value is None:
        raise SettingError(f"which: '{target.name}' cannot be moved off its bound.")
    return {**params, name: value}


def climb_from(
    problem: Problem, params: Params, target: Target, maximum: float, lifted: bool
) -> tuple[Climb, list[str]]:
    """The climb from ``params``, and what is to be said of the point.

    ``lifted`` says that these are no maximum: some were moved off a bound, or back from infinity.
    """
    at = coordinates(problem, params)
    slope, hessian = objective(problem, at)
    basis, bounds = directions(at)
    own = -(basis.T @ hessian @ basis)
    own = 0.5 * (own + own.T)
    notes = []
    if bounds:
        notes.append(f"{', '.join(bounds)} at a bound, and held there.")
    if not bool(own.isfinite().all()):
        raise SettingError("profile: the information matrix at the fit is not finite.")
    scale = own.diagonal().abs().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(own / scale / scale[:, None])
    large = values.abs().max() if len(values) else torch.ones(())
    flat = values.abs() < SINGULAR * large
    if bool((values < -SINGULAR * large).any()) and not lifted:
        notes.append("The fit is at no maximum: its information matrix has a negative eigenvalue.")
    size = torch.where(flat, 1.0, values.abs()).sqrt()
    whiten = basis @ (vectors / scale[:, None] / size)
    far = float((slope @ whiten)[~flat].norm())
    if far > STEEP and not lifted:
        notes.append(
            f"The fit has not settled: a Newton step would move it by {far:.2g} standard errors."
        )
    climb = Climb(problem, at, target, whiten, maximum)
    try:
        moves = climb.spread > 0
    except RuntimeError:  # no derivative
        moves = False
    if not moves:
        raise SettingError(f"which: '{target.name}' does not depend on the free parameters.")
    return climb, notes
