"""Which states can change their names: renamings that leave the objective as it is.

What has to move with the states comes from the factors of the sites (:mod:`~pyroem.axes`). It is
verified at two random points: the log-likelihood stays, and the posteriors of the group's
assignments, but of no others, change their places. Prior, constraints and elements that are held
then say which of the states can change places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice

import torch
from torch import Tensor

from pyroem._pyro import isolated, site_log_prob
from pyroem.axes import MOST, choices, generators, movable, moved_with, related, swap
from pyroem.estep.engine import MixtureEngine
from pyroem.estep.kernel import marginals
from pyroem.mstep.blocks import Rung
from pyroem.problem import Problem
from pyroem.structure import Params, quoted
from pyroem.symmetry import StateGroup, permute

LIKELIHOOD = 1e-9, 1e-5  # relative differences that are rounding, in double and single precision
PRIOR = 1e-6, 1e-5  # torch computes some densities of constants in single precision
POSTERIOR = 1e-6, 1e-2

NO_AXES = (
    "no axes of the parameters were found along which a renaming of the states leaves the"
    " log-likelihood as it is: the program tells the states apart by more than its parameters"
)
NOT_FINITE = "the objective is not finite near the parameters"
CONSTANTS = "the others have constants of their own"


@dataclass(frozen=True)
class Renaming:
    """How the states of a ``group`` can be renamed.

    ``group`` has all axes that move with the states. States of one of the ``classes`` can change
    places with one another: prior, held elements and constraints are then as before. Where not all
    can, ``why`` says so.
    """

    group: StateGroup
    classes: tuple[tuple[int, ...], ...]
    why: str = ""

    @property
    def possible(self) -> bool:
        """Whether any two states can change places."""
        return any(len(states) > 1 for states in self.classes)

    def axes_of(self, name: str) -> list[int]:
        """The axes of a parameter that the states index."""
        return sorted(axis for own, axis in self.group.axes if own == name)

    def sorted_by(self, key: Tensor) -> Tensor:
        """The order (for :func:`~pyroem.symmetry.permute`) in which ``key`` rises in each class."""
        order = torch.arange(self.group.num_states)
        for own in (torch.tensor(states) for states in self.classes if len(states) > 1):
            order[own] = own[key.cpu()[own].argsort(stable=True)]
        return order


def renamings(problem: Problem, params: Params) -> tuple[Renaming, ...]:
    """How the states of each assignment can be renamed, looked at near ``params``.

    Assignments that can be renamed only together are one group.
    """
    with isolated(problem.structure.program.dtype, 0), torch.no_grad():
        look = _Look(problem, params)
        found, rest = list[StateGroup](), list[StateGroup]()
        for group in problem.groups:
            whole = group if group.num_states < 2 else look.completed(group)
            (rest if whole is None else found).append(whole or group)
        for group in _joined(look, rest):
            whole = look.completed(group) if group not in rest else None
            parts = [g for g in rest if set(g.assignments) <= set(group.assignments)]
            found += [whole] if whole is not None else []
            rest = rest if whole is None else [g for g in rest if g not in parts]
        why = NO_AXES if look.points else NOT_FINITE
        return (*(look.renaming(group) for group in found), *(_none(g, why) for g in rest))


def posteriors(problem: Problem, params: Params) -> dict[str, Tensor]:
    """The probabilities of every assignment on the rows that starts are sought on."""
    small = problem.sample
    engine, dtype = small.engine, small.structure.program.dtype
    with isolated(dtype, 0), torch.no_grad():
        if isinstance(engine, MixtureEngine):
            return marginals(engine.mixture, engine.chunks, params)
        return small.marginals(params)


class _Look:
    """A problem at two random points, one of them near ``params``."""

    def __init__(self, problem: Problem, params: Params) -> None:
        self.problem, self.params = problem, params
        self.parameters = problem.structure.parameters
        far = {n: self.parameters[n].keep(v) for n, v in problem.plan.reading.points[0].items()}
        points = [_jittered(problem, params), far]
        parts = [self._parts(point) for point in points]
        both = [(x, y) for x, y in zip(points, parts, strict=True) if all(map(math.isfinite, y))]
        self.points = [point for point, _ in both]
        self.values = [value for _, value in both]
        fixed = {b.name for b in problem.plan.on(Rung.FIXED)}
        self.held = {
            n: torch.ones_like(params[n]) if n in fixed or p.held is None else p.held.to(params[n])
            for n, p in self.parameters.items()
            if n in fixed or p.held is not None
        }
        self.single = int(problem.structure.program.dtype is not torch.float64)

    @cached_property
    def before(self) -> dict[str, Tensor]:
        """The posteriors at the first of the points."""
        return posteriors(self.problem, self.points[0])

    def _parts(self, point: Params) -> tuple[float, float]:
        return self.problem.sample.parts(point)

    def completed(self, group: StateGroup) -> StateGroup | None:
        """The group with all axes that its states index; None where there is no such set."""
        if not self.points:
            return None
        first = None
        for choice in islice(choices(self.problem.plan, group), MOST):
            whole = moved_with(group, choice)
            orders = generators(movable(self.problem.plan, whole), group.num_states)
            if not orders or not all(self._stays(whole, order) for order in orders):
                continue
            if not any(self.obstacle(whole, order) for order in orders):
                return whole
            first = first or whole  # another may have the prior's own parameters, too
        return first

    def renaming(self, group: StateGroup) -> Renaming:
        """Which states of a group change places without an obstacle."""
        count, k = movable(self.problem.plan, group), group.num_states
        rest = tuple((i,) for i in range(count, k))
        if k < 2 or not any(self.obstacle(group, o) for o in generators(count, k)):
            return Renaming(group, (tuple(range(count)), *rest), CONSTANTS if rest else "")
        classes = [{i} for i in range(count)]
        for i, j in combinations(range(count), 2):
            a, b = (next(c for c in classes if state in c) for state in (i, j))
            if a is not b and not self.obstacle(group, swap(i, j, k)):
                a |= b
                classes.remove(b)
        why = next(filter(None, (self.obstacle(group, o) for o in generators(count, k))))
        return Renaming(group, (*(tuple(sorted(c)) for c in classes), *rest), why)

    def _stays(self, group: StateGroup, order: Tensor) -> bool:
        """Whether the likelihood is as before, and the posteriors have changed their places."""
        for point, (value, _) in zip(self.points, self.values, strict=True):
            found = self._parts(permute(point, group, order))[0]
            if not abs(found - value) <= LIKELIHOOD[self.single] * max(abs(value), 1.0):
                return False
        after = posteriors(self.problem, permute(self.points[0], group, order))
        return all(
            torch.allclose(
                p.index_select(-1, order.to(p.device)) if z in group.assignments else p,
                after[z],
                rtol=0,
                atol=POSTERIOR[self.single],
                equal_nan=True,
            )
            for z, p in self.before.items()
        )

    def obstacle(self, group: StateGroup, order: Tensor) -> str:
        """What but the likelihood forbids a renaming; empty where nothing does."""
        moved = permute(self.params, group, order)
        marks = permute(self.held, replace(group, complements=frozenset()), order)
        for name, held in self.held.items():
            gap = (moved[name] - self.params[name]) * held
            size = float(self.params[name].abs().max())
            if not torch.equal(marks[name], held) or float(gap.abs().max()) > 1e-6 * size:
                return f"elements of '{name}' are held, and differ by state"
        for point, (_, value) in zip(self.points, self.values, strict=True):
            moved = permute(point, group, order)
            for name, parameter in self.parameters.items():
                check = parameter.constraint.check
                if bool(check(point[name]).all()) and not bool(check(moved[name]).all()):
                    return f"the constraint of '{name}' has the states in an order"
            found = self._parts(moved)[1]
            if not abs(found - value) <= PRIOR[self.single] * max(abs(value), 1.0):
                return f"the prior of {self._told(point, moved)} differs by state"
        return ""

    def _told(self, point: Params, moved: Params) -> str:
        """The parameters whose prior density changed."""
        a, b = (self._priors(p) for p in (point, moved))
        return quoted(n for n in a if abs(a[n] - b[n]) > PRIOR[self.single] * max(abs(a[n]), 1.0))

    def _priors(self, point: Params) -> dict[str, float]:
        nodes = self.problem.sample.structure.program.run(point).nodes
        names = [n for n, p in self.parameters.items() if p.has_prior]
        return {n: float(site_log_prob(nodes[n]).sum()) for n in names}


def _jittered(problem: Problem, params: Params) -> Params:
    """A random point at about one step from ``params`` in each unconstrained coordinate."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, parameter in problem.structure.parameters.items():
        raw = parameter.unconstrain(params[name])
        noise = torch.rand(raw.shape, generator=generator, dtype=torch.float64) - 0.5
        found[name] = parameter.constrain(raw + noise.to(raw) * problem.plan.steps[name])
    return found


def _joined(look: _Look, groups: Sequence[StateGroup]) -> list[StateGroup]:
    """Groups of as many states whose sites share parameters, as one."""
    joined: list[tuple[StateGroup, set[str]]] = []
    for group in groups:
        names, own = related(look.problem.plan, group), group
        for other in [j for j in joined if j[0].num_states == own.num_states and j[1] & names]:
            joined.remove(other)
            names |= other[1]
            own = StateGroup(
                (*other[0].assignments, *own.assignments),
                own.num_states,
                own.axes | other[0].axes,
                own.complements | other[0].complements,
                min(own.movable, other[0].movable),
            )
        joined.append((own, names))
    return [group for group, _ in joined]


def _none(group: StateGroup, why: str) -> Renaming:
    return Renaming(group, tuple((i,) for i in range(group.num_states)), why)
