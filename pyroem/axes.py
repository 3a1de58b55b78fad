"""Which axes of which parameters move with the states of an assignment, told by its factors.

Of plain selections (``loc[z]``) it is known from reading the program (:mod:`~pyroem.symmetry`). Of
all else (``b[z] * x``, ``softmax(x @ gate)``) the axes as long as there are states are candidates.
Site by site those are taken that rename the site's factor at a random point: with them moved, its
table has its states in the new order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice, product

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroem.errors import ModelError
from pyroem.mstep.plan import Plan
from pyroem.symmetry import StateGroup, permute

MOST = 200  # sets of axes that are tried
FACTOR = 1e-9, 1e-4  # relative differences that are rounding, in double and single precision

Choice = tuple[frozenset[tuple[str, int]], frozenset[tuple[str, str]]]  # axes, complements


def choices(plan: Plan, group: StateGroup) -> Iterator[Choice]:
    """What may move beside the known axes: what the sites ask for, and priors' parameters."""
    sites = _by_site(plan, group)
    if sites is None:
        return
    moving, seen = sites
    options = [o for n in sorted(related(plan, group) - seen) if (o := _options(plan, group, n))]
    for size in range(len(options) + 1):
        for chosen in combinations(options, size):
            for picks in product(*chosen):
                yield _union([*moving, *picks])


def _by_site(plan: Plan, group: StateGroup) -> tuple[list[Choice], set[str]] | None:
    """What has to move for every factor to be renamed, and the parameters of all factors.

    Site by site, those with few parameters first; None where nothing renames a factor.
    """
    reading, decided = plan.reading, dict[str, Choice]()
    symbols = {reading.traces[0].states[z] for z in group.assignments}
    by_names: dict[frozenset[str], list[str]] = {}
    for site, factor in reading.traces[0].factors.items():
        names = reading.dependence.get(site, frozenset())
        if symbols & set(factor.dims) or any(n in names for n, _ in group.axes):
            by_names.setdefault(names, []).append(site)
    for names, sites in sorted(by_names.items(), key=lambda item: (len(item[0]), item[1])):
        new = sorted(n for n in names if n not in decided)
        known = [decided[n] for n in names if n in decided]
        picks = (_union([*known, *own]) for own in _few_first(plan, group, new))
        found = next((p for p in islice(picks, MOST) if _renames(plan, group, p, sites)), None)
        if found is None:
            return None
        for n in new:
            decided[n] = _part(found, n)
    return list(decided.values()), set(decided)


def _few_first(plan: Plan, group: StateGroup, names: Sequence[str]) -> Iterator[tuple[Choice, ...]]:
    options = [o for name in names if (o := _options(plan, group, name))]
    for size in range(len(options) + 1):
        for chosen in combinations(options, size):
            yield from product(*chosen)


def _renames(plan: Plan, group: StateGroup, choice: Choice, sites: Sequence[str]) -> bool:
    """Whether the factors of ``sites`` have the states' new names when the axes move."""
    whole = moved_with(group, choice)
    reading, structure = plan.reading, plan.structure
    before, at = reading.traces[0], reading.points[0]
    precision = FACTOR[int(structure.program.dtype is not torch.float64)]
    for order in generators(movable(plan, whole), group.num_states):
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
            limit = precision * max(float(size) / max(tensor.numel(), 1), 1.0)
            if not same or not torch.allclose(
                tensor, other.tensor, rtol=precision, atol=limit, equal_nan=True
            ):
                return False
    return True


def _options(plan: Plan, group: StateGroup, name: str) -> list[Choice]:
    """The ways in which a parameter may move."""
    sizes = {group.num_states, group.movable} - {0, 1}
    axes = [
        (name, axis)
        for axis, size in enumerate(plan.structure.parameters[name].shape)
        if size in sizes and (name, axis) not in group.axes
    ]
    found = [frozenset({own}) for own in axes]
    found += [frozenset(pair) for pair in combinations(axes, 2)]
    choices: list[Choice] = [(own, frozenset()) for own in found]
    kind = plan.structure.parameters[name].kind
    if group.num_states == 2 and kind is constraints.unit_interval:
        choices.append((frozenset(), frozenset({(name, "probability")})))
    elif group.num_states == 2 and kind is constraints.real:
        choices.append((frozenset(), frozenset({(name, "logits")})))
    return choices


def related(plan: Plan, group: StateGroup) -> set[str]:
    """The parameters that sites with the group's states, and their priors, depend on."""
    reading = plan.reading
    symbols = {reading.traces[0].states[z] for z in group.assignments}
    names: set[str] = set()
    for site, factor in reading.traces[0].factors.items():
        if symbols & set(factor.dims):
            names |= reading.dependence.get(site, frozenset())
    while True:
        priors = (reading.prior_dependence.get(n, frozenset()) for n in names)
        more = names.union(*priors) & set(plan.structure.parameters)
        if more == names:
            return names
        names = more


def movable(plan: Plan, group: StateGroup) -> int:
    """The number of first states that every axis has."""
    sizes = [plan.structure.parameters[name].shape[axis] for name, axis in group.axes]
    return min([group.num_states, *sizes])


def moved_with(group: StateGroup, choice: Choice) -> StateGroup:
    """The group with what the choice says moves as well."""
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


def generators(count: int, num_states: int) -> list[Tensor]:
    """A transposition and a cycle of the first states: they make every renaming of them."""
    if count < 2:
        return []
    cycle = torch.arange(num_states)
    cycle[:count] = cycle[:count].roll(1)
    return [swap(0, 1, num_states), cycle][: min(count - 1, 2)]


def swap(i: int, j: int, num_states: int) -> Tensor:
    """The order in which two states change places."""
    order = torch.arange(num_states)
    order[i], order[j] = j, i
    return order
