"""Which states can change their names: renamings that leave the objective as it is.

What indexes the states is known of plain selections (``loc[z]``) from reading the program
(:mod:`~pyroem.symmetry`). Of all else (``b[z] * x``, ``softmax(x @ gate)``) the axes as long as
there are states are candidates. Site by site those are taken that rename the site's factor: with
them moved, its table has its states in the new order. The whole is then verified at two random
points: the log-likelihood stays, and the posteriors of the group's assignments, but of no others,
change their places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice, product

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroem._pyro import isolated, site_log_prob
from pyroem.errors import ModelError
from pyroem.estep.engine import MixtureEngine
from pyroem.estep.kernel import marginals
from pyroem.mstep.blocks import Rung
from pyroem.problem import Problem
from pyroem.structure import Params, quoted
from pyroem.symmetry import StateGroup, permute

MOST = 200  # sets of axes that are tried
LIKELIHOOD = 1e-9, 1e-5  # relative differences that are rounding, in double and single precision
PRIOR = 1e-6, 1e-5  # torch computes some densities of constants in single precision
POSTERIOR = 1e-6, 1e-2
FACTOR = 1e-9, 1e-4

NO_AXES = (
    "no axes of the parameters were found along which a renaming of the states leaves the"
    " log-likelihood as it is: the program tells the states apart by more than its parameters"
)
NOT_FINITE = "the objective is not finite near the parameters"
CONSTANTS = "the others have constants of their own"

Choice = tuple[frozenset[tuple[str, int]], frozenset[tuple[str, str]]]


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
        for choice in islice(self._choices(group), MOST):
            whole = _with(group, choice)
            orders = _generators(self.movable(whole), group.num_states)
            if not orders or not all(self._stays(whole, order) for order in orders):
                continue
            if not any(self.obstacle(whole, order) for order in orders):
                return whole
            first = first or whole  # another may have the prior's own parameters, too
        return first

    def renaming(self, group: StateGroup) -> Renaming:
        """Which states of a group change places without an obstacle."""
        count, k = self.movable(group), group.num_states
        rest = tuple((i,) for i in range(count, k))
        if k < 2 or not any(self.obstacle(group, o) for o in _generators(count, k)):
            return Renaming(group, (tuple(range(count)), *rest), CONSTANTS if rest else "")
        classes = [{i} for i in range(count)]
        for i, j in combinations(range(count), 2):
            a, b = (next(c for c in classes if state in c) for state in (i, j))
            if a is not b and not self.obstacle(group, _swap(i, j, k)):
                a |= b
                classes.remove(b)
        why = next(filter(None, (self.obstacle(group, o) for o in _generators(count, k))))
        return Renaming(group, (*(tuple(sorted(c)) for c in classes), *rest), why)

    def movable(self, group: StateGroup) -> int:
        """The number of first states that the axes have; where some are shared, none can move."""
        sizes = [self.params[name].shape[axis] for name, axis in group.axes]
        return min([group.num_states, *sizes])

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

    def _choices(self, group: StateGroup) -> Iterator[Choice]:
        """What may move beside the known axes: what the sites ask for, and priors' parameters."""
        sites = self._by_site(group)
        if sites is None:
            return
        moving, seen = sites
        options = [o for n in sorted(self.related(group) - seen) if (o := self._options(group, n))]
        for size in range(len(options) + 1):
            for chosen in combinations(options, size):
                for picks in product(*chosen):
                    yield _union([*moving, *picks])

    def _by_site(self, group: StateGroup) -> tuple[list[Choice], set[str]] | None:
        """What has to move for every factor to be renamed, and the parameters of all factors.

        Site by site, those with few parameters first; None where nothing renames a factor.
        """
        reading, decided = self.problem.plan.reading, dict[str, Choice]()
        symbols = {reading.traces[0].states[z] for z in group.assignments}
        by_names: dict[frozenset[str], list[str]] = {}
        for site, factor in reading.traces[0].factors.items():
            names = reading.dependence.get(site, frozenset())
            if symbols & set(factor.dims) or any(n in names for n, _ in group.axes):
                by_names.setdefault(names, []).append(site)
        for names, sites in sorted(by_names.items(), key=lambda item: (len(item[0]), item[1])):
            new = sorted(n for n in names if n not in decided)
            known = [decided[n] for n in names if n in decided]
            picks = (_union([*known, *own]) for own in self._few_first(group, new))
            found = next((p for p in islice(picks, MOST) if self._renames(group, p, sites)), None)
            if found is None:
                return None
            for n in new:
                decided[n] = _part(found, n)
        return list(decided.values()), set(decided)

    def _few_first(self, group: StateGroup, names: Sequence[str]) -> Iterator[tuple[Choice, ...]]:
        options = [o for name in names if (o := self._options(group, name))]
        for size in range(len(options) + 1):
            for chosen in combinations(options, size):
                yield from product(*chosen)

    def _renames(self, group: StateGroup, choice: Choice, sites: Sequence[str]) -> bool:
        """Whether the factors of ``sites`` have the states' new names when the axes move."""
        whole = _with(group, choice)
        reading, structure = self.problem.plan.reading, self.problem.plan.structure
        before, at = reading.traces[0], reading.points[0]
        for order in _generators(self.movable(whole), group.num_states):
            try:
                after = structure.enumerate(permute(at, whole, order))
            except (ModelError, torch.linalg.LinAlgError):
                return False
            for site in sites:
                factor, other = before.factors[site], after.factors[site]
                tensor = factor.tensor
                for dim, symbol in enumerate(factor.dims):
                    if symbol in {before.states[z] for z in group.assignments}:
                        tensor = tensor.index_select(dim, order)
                same = factor.dims == other.dims and tensor.shape == other.tensor.shape
                size = torch.where(tensor.isfinite(), tensor.abs(), 1.0).sum()
                limit = FACTOR[self.single] * max(float(size) / max(tensor.numel(), 1), 1.0)
                if not same or not torch.allclose(
                    tensor, other.tensor, rtol=0, atol=limit, equal_nan=True
                ):
                    return False
        return True

    def _options(self, group: StateGroup, name: str) -> list[Choice]:
        """The ways in which a parameter may move."""
        sizes = {group.num_states, group.movable} - {0, 1}
        axes = [
            (name, axis)
            for axis, size in enumerate(self.params[name].shape)
            if size in sizes and (name, axis) not in group.axes
        ]
        found = [frozenset({own}) for own in axes]
        found += [frozenset(pair) for pair in combinations(axes, 2)]
        choices: list[Choice] = [(own, frozenset()) for own in found]
        kind = self.parameters[name].kind
        if group.num_states == 2 and kind is constraints.unit_interval:
            choices.append((frozenset(), frozenset({(name, "probability")})))
        elif group.num_states == 2 and kind is constraints.real:
            choices.append((frozenset(), frozenset({(name, "logits")})))
        return choices

    def related(self, group: StateGroup) -> set[str]:
        """The parameters that sites with the group's states, and their priors, depend on."""
        reading = self.problem.plan.reading
        symbols = {reading.traces[0].states[z] for z in group.assignments}
        names: set[str] = set()
        for site, factor in reading.traces[0].factors.items():
            if symbols & set(factor.dims):
                names |= reading.dependence.get(site, frozenset())
        while True:
            priors = (reading.prior_dependence.get(n, frozenset()) for n in names)
            more = names.union(*priors) & set(self.params)
            if more == names:
                return names
            names = more


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
        names, own = look.related(group), group
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


def _with(group: StateGroup, choice: Choice) -> StateGroup:
    axes, complements = choice
    return replace(group, axes=group.axes | axes, complements=group.complements | complements)


def _part(choice: Choice, name: str) -> Choice:
    """What a choice says of one parameter."""
    axes, complements = choice
    return (
        frozenset((n, axis) for n, axis in axes if n == name),
        frozenset((n, kind) for n, kind in complements if n == name),
    )


def _union(choices: Sequence[Choice]) -> Choice:
    axes = frozenset[tuple[str, int]]().union(*(own for own, _ in choices))
    return axes, frozenset[tuple[str, str]]().union(*(own for _, own in choices))


def _generators(count: int, num_states: int) -> list[Tensor]:
    """A transposition and a cycle of the first states: they make every renaming of them."""
    if count < 2:
        return []
    cycle = torch.arange(num_states)
    cycle[:count] = cycle[:count].roll(1)
    return [_swap(0, 1, num_states), cycle][: min(count - 1, 2)]


def _swap(i: int, j: int, num_states: int) -> Tensor:
    order = torch.arange(num_states)
    order[i], order[j] = j, i
    return order
