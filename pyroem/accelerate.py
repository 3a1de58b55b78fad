"""Acceleration of EM: extrapolation from a few of its steps, with EM's own step to fall back on.

EM is a fixed-point iteration ``x <- G(x)`` that crawls where states overlap. The schemes here read
from a few pairs ``(x, G(x))`` where it is heading. The E-step at a proposed point gives its
objective, which decides whether the point is taken, and the statistics for the next M-step, so
that a jump that is taken costs no more than a step of EM.

``x`` holds the free parameters in the unconstrained space of ``transform_to``, every coordinate
in its unit ``plan.steps``, so that the norms below add like with like.

Sources: Varadhan and Roland (2008), Scand. J. Statist. 35, 335-353 (SQUAREM, scheme S3);
Walker and Ni (2011), SIAM J. Numer. Anal. 49, 1715-1735 (Anderson acceleration); Henderson and
Varadhan (2019), J. Comput. Graph. Statist. 28, 834-846 (its damping, restarts and control).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroem.errors import ModelError
from pyroem.loop import State, movement
from pyroem.mstep.intervals import interval_of
from pyroem.mstep.runs import Expected
from pyroem.problem import Problem
from pyroem.structure import Parameter, Params

Reached = tuple[Expected, float]  # statistics and objective
Expect = Callable[[Params], Reached]  # an E-step
Update = Callable[[Params, Expected], Params]  # an M-step

REPAIR = 1e-2  # nats a row that one step of EM may have to win back after a jump
GROWTH = 4.0  # of the bound on squared extrapolation


@dataclass(frozen=True)
class Trail:
    """What an accelerated step needs of the steps before it; ``State.memory``.

    ``points`` and ``images`` are ``x`` and ``G(x)`` of steps since the last restart, oldest first.
    ``reach`` bounds squared extrapolation; ``trust`` counts Anderson's successes against its
    ``failures``, after which it has to ``rest``; ``verify`` asks for a step of plain EM.
    """

    expected: Expected
    points: tuple[Tensor, ...] = ()
    images: tuple[Tensor, ...] = ()
    reach: float = 1.0
    trust: float = 0.0
    failures: int = 0
    rest: int = 0
    verify: bool = False

    def add(self, x: Tensor, image: Tensor) -> Trail:
        """One more step."""
        return replace(self, points=(*self.points, x), images=(*self.images, image))

    def restart(self) -> Trail:
        """Without any step."""
        return replace(self, points=(), images=())


@dataclass(frozen=True)
class Squarem:
    """Squared extrapolation: a step of EM, then a jump along it and the next one.

    With ``r = G(x) - x`` and ``v = G(G(x)) - 2 G(x) + x`` the jump goes from ``x`` to
    ``x + 2 s r + s^2 v`` with ``s = |r| / |v|`` (scheme S3); ``s = 1`` is EM's own second step.
    ``s`` is at most ``reach``, which grows where the bound was met and shrinks after a failure.
    """

    def propose(self, trail: Trail, x: Tensor, image: Tensor) -> Tensor | None:
        """A point to try instead of ``image = G(x)``: the jump, from every second point."""
        if not trail.points:
            return None
        r, v, length = _pair(trail, x, image)
        s = min(length, trail.reach)
        return trail.points[-1] + 2 * s * r + s * s * v if s > 1 else None

    def remember(self, trail: Trail, x: Tensor, image: Tensor, taken: bool | None) -> Trail:
        """The trail after a step from ``x`` (``taken`` is None where nothing was proposed)."""
        if not trail.points:
            return trail.add(x, image)
        reach = trail.reach
        if taken is False:
            reach = max(reach / GROWTH, 1.0)
        elif _pair(trail, x, image)[2] >= reach:
            reach *= GROWTH
        return replace(trail, reach=reach).restart()


def _pair(trail: Trail, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor, float]:
    r = x - trail.points[-1]
    v = (image - x) - r
    return r, v, float(r.norm()) / max(float(v.norm()), 1e-300)


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration, damped, restarted, and relieved by squared extrapolation.

    With ``f = G(x) - x`` and the differences ``DF``, ``DG`` of ``f`` and ``G(x)`` along the trail,
    the proposal is ``G(x) - DG c``, with ``c`` the ridge solution of ``min |f - DF c|``. The ridge
    is such that ``|c|^2`` is the fraction ``1 / (1 + base^(doubt - trust))`` of that of least
    squares. The memory is emptied when it holds ``order`` steps, and after a failure.

    Solving ``f = 0`` leads to any fixed point, saddles too, where each jump fails for lowering the
    objective. So the first jump after a restart is that of :class:`Squarem`, which goes forward
    only, and repeated failures give way to ever longer runs of it, up to ``longest`` jumps.
    """

    order: int = 10
    base: float = 1.2
    doubt: float = 10.0
    drop: float = 5.0
    longest: int = 16

    def propose(self, trail: Trail, x: Tensor, image: Tensor) -> Tensor | None:
        """The damped combination of the steps so far."""
        if len(trail.points) < 2:
            return Squarem().propose(trail, x, image)
        points, images = torch.stack([*trail.points, x]), torch.stack([*trail.images, image])
        DF, DG = (images - points).diff(dim=0).T, images.diff(dim=0).T
        fraction = 1 / (1 + self.base ** (self.doubt - trail.trust))
        return image - DG @ ridge(DF, image - x, fraction)

    def remember(self, trail: Trail, x: Tensor, image: Tensor, taken: bool | None) -> Trail:
        """Longer memory and more trust after a success; a restart and a rest after failures."""
        after = trail.add(x, image)
        if not trail.points:
            return after
        if len(trail.points) == 1:
            reach = Squarem().remember(trail, x, image, taken).reach
            after = replace(after, reach=reach, rest=max(trail.rest - 1, 0))
            return after.restart() if taken is False or trail.rest else after
        if taken is False:
            failures, trust = trail.failures + 1, max(trail.trust - self.drop, 0.0)
            rest = min(2**failures, self.longest) - 2
            return replace(after, trust=trust, failures=failures, rest=rest).restart()
        if taken:
            after = replace(after, trust=trail.trust + 1, failures=trail.failures // 2)
        return after.restart() if len(after.points) > self.order else after


def ridge(A: Tensor, b: Tensor, fraction: float) -> Tensor:
    """The ridge solution of ``A c = b`` with ``fraction`` of the squared norm of least squares."""
    U, sizes, Vh = torch.linalg.svd(A, full_matrices=False)
    kept = sizes > 1e3 * torch.finfo(A.dtype).eps * sizes.max()
    U, sizes, Vh = U[:, kept], sizes[kept], Vh[kept]
    if not len(sizes):
        return A.new_zeros(A.shape[1])
    along = U.T @ b
    wanted = fraction * float((along / sizes).square().sum())
    low, high = -70.0, 70.0  # of the logarithm of the penalty, relative to the largest size
    for _ in range(50):
        middle = (low + high) / 2
        c = along * sizes / (sizes.square() + math.exp(middle) * sizes[0].square())
        low, high = (middle, high) if float(c.square().sum()) > wanted else (low, middle)
    return Vh.T @ c


Scheme = Squarem | Anderson
SCHEMES: dict[str, Scheme] = {"squarem": Squarem(), "anderson": Anderson()}


def accelerated(
    problem: Problem, state: State, scheme: Scheme, expect: Expect, update: Update, param_tol: float
) -> State:
    """One step: to the point that ``scheme`` proposes if it is no worse than where we are.

    The yardstick is the objective here: that of EM's own next point would cost a pass to know. A
    jump that falls short by little is followed by a step of EM, from the statistics that are there
    already, and taken where this makes up for it: jumps along a curved ridge land beside it. Else
    EM's own next point is taken.

    A jump that hardly moves may have stopped short, so the next step is one of plain EM. With a
    patience of two a fit then ends only where both agree that nothing is left to gain.
    """
    trail: Trail = state.memory
    image = update(state.params, trail.expected)
    pair = _coordinates(problem, state.params, image)
    proposed = None if pair is None or trail.verify else scheme.propose(trail, *pair)
    taken, passes, repair = None, state.passes, None
    params, found = image, None
    if proposed is not None:
        tried, least = _params(problem, proposed, image), state.log_joint
        found, passes = _evaluate(tried, expect, passes)
        if found is not None and least - REPAIR * problem.rows <= found[1] < least:
            after = update(tried, found[0])
            repair, tried = _coordinates(problem, tried, after), after
            found, passes = _evaluate(tried, expect, passes)
        taken = found is not None and found[1] >= least
        params, found = (tried, found) if taken else (image, None)
    expected, value = found or expect(image)
    passes += found is None
    trail = trail.restart() if pair is None else scheme.remember(trail, *pair, taken)
    if repair is not None and taken and trail.points:
        trail = trail.add(*repair)
    verify = bool(taken) and movement(params, state.params) <= param_tol
    return State(params, value, passes, replace(trail, expected=expected, verify=verify))


def _evaluate(params: Params, expect: Expect, passes: int) -> tuple[Reached | None, int]:
    """The E-step where it is possible, and the passes so far."""
    if not all(bool(v.isfinite().all()) for v in params.values()):
        return None, passes
    try:
        expected, value = expect(params)
    except (ModelError, torch.linalg.LinAlgError):
        return None, passes + 1
    return (expected, value) if math.isfinite(value) else None, passes + 1


def _coordinates(problem: Problem, params: Params, image: Params) -> tuple[Tensor, Tensor] | None:
    """Both points as vectors, if they have coordinates; those at a bound stand still."""
    parameters, steps = problem.structure.parameters, problem.plan.steps
    limits = {n: _limit(parameters[n]) for n in problem.free}
    if not limits:
        return None

    def flat(values: Params) -> Tensor:
        raw = {n: parameters[n].unconstrain(values[n]).clamp(-t, t) for n, t in limits.items()}
        return torch.cat([(r / steps[n]).flatten() for n, r in raw.items()])

    try:
        pair = flat(params), flat(image)
    except torch.linalg.LinAlgError:
        return None
    return pair if all(bool(x.isfinite().all()) for x in pair) else None


def _params(problem: Problem, x: Tensor, image: Params) -> Params:
    """The parameters at ``x``; coordinates at a bound are those of EM's ``image``."""
    result, at = dict(image), 0
    for name in problem.free:
        parameter, step = problem.structure.parameters[name], problem.plan.steps[name]
        raw = x[at : at + step.numel()].reshape(step.shape) * step
        at += step.numel()
        em, limit = parameter.unconstrain(image[name]), _limit(parameter)
        held = (raw.abs() >= limit) | (em.abs() >= limit)
        value = parameter.constrain(torch.where(held, em, raw))
        if limit < math.inf and value.shape == held.shape:
            exact = held & ((image[name] == 0) | (image[name] == 1))  # not exp(-690)
            value = torch.where(exact, image[name], value)
        result[name] = value
    return problem.clip(result)


def _limit(parameter: Parameter) -> float:
    """The coordinate of a bounded parameter from which it counts as standing at the bound.

    Near 1 a logit of 20 is known to some 1e-8 in double precision; further out it is noise.
    """
    low, high = interval_of(parameter.constraint) or (-math.inf, math.inf)
    if parameter.kind is constraints.simplex or math.isfinite(high - low):
        return -0.55 * math.log(torch.finfo(parameter.value.dtype).eps)
    return math.inf
