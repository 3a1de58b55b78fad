"""States and their labels: which axes of which parameters index them, and which states coincide."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroem._pyro import Enumerated
from pyroem.mstep.plan import Plan
from pyroem.structure import Params, Structure


@dataclass(frozen=True)
class StateGroup:
    """Assignments that share their labels (``z_0, z_1, ...`` of a chain), with ``num_states``.

    ``axes`` are the (parameter, axis) pairs that the states index; ``complements`` are success
    probabilities of a binary assignment, which swap as ``p -> 1 - p`` (or change sign as logits).
    Only the first ``movable`` states can be renamed: the others have constants of their own.

    This is what reading plain selections (``loc[z]``) tells. What else moves with the states is
    found in :mod:`~pyroem.axes`, whether the objective then stays in :mod:`~pyroem.renaming`.
    """

    assignments: tuple[str, ...]
    num_states: int
    axes: frozenset[tuple[str, int]]
    complements: frozenset[tuple[str, str]]
    movable: int


def state_groups(structure: Structure, plan: Plan) -> list[StateGroup]:
    """Find the axes of the parameters that each assignment's states index."""
    trace = plan.reading.traces[0]
    found: dict[str, set[tuple[str, int]]] = {z: set() for z in structure.assignments}
    swaps: dict[str, set[tuple[str, str]]] = {z: set() for z in structure.assignments}
    movable = dict(structure.assignments)
    symbols = {s: z for z, s in trace.states.items() if z in structure.assignments}
    for site in plan.reading.sites.values():
        dim_to_symbol = trace.trace.nodes[site.name]["infer"]["_dim_to_symbol"]
        rank = len(site.shape)
        for argument in site.arguments.values():
            if argument.selection is None:
                continue
            event_dim = argument.selection.coordinate.form.event_dim
            for name in argument.selection.offsets:
                shape = structure.parameters[name].shape
                batch = shape[: len(shape) - event_dim]
                cells = argument.selection.cells_of(name)
                coordinates = torch.unravel_index(cells.clamp(min=0), batch) if batch else ()
                for dim, symbol in dim_to_symbol.items():
                    at = rank - site.events + dim
                    z = symbols.get(symbol)
                    if z is None or z == site.name or at < 0 or cells.shape[at] == 1:
                        continue
                    steps = torch.arange(cells.shape[at]).reshape(
                        [-1 if i == at else 1 for i in range(cells.dim())]
                    )
                    axes = [
                        axis
                        for axis, coordinate in enumerate(coordinates)
                        if ((coordinate == steps) | (cells < 0)).all() and (cells >= 0).any()
                    ]
                    found[z] |= {(name, axis) for axis in axes}
                    # Where states share an element, or have it elsewhere, they keep their names.
                    sizes = [batch[axis] for axis in axes]
                    movable[z] = min(movable[z], *sizes) if sizes else 0
                if site.name in found:
                    if event_dim == 1:
                        found[site.name].add((name, len(shape) - 1))
                    elif structure.assignments[site.name] == 2:
                        swaps[site.name].add((name, argument.selection.coordinate.form.name))
    return _merge(structure, found, swaps, movable)


def _merge(
    structure: Structure,
    found: dict[str, set[tuple[str, int]]],
    swaps: dict[str, set[tuple[str, str]]],
    movable: dict[str, int],
) -> list[StateGroup]:
    groups: list[tuple[list[str], set[tuple[str, int]], set[tuple[str, str]]]] = []
    for z, axes in found.items():
        members, union, complements = [z], set(axes), set(swaps[z])
        for group in [g for g in groups if g[1] & union or g[2] & complements]:
            groups.remove(group)
            members = [*group[0], *members]
            union |= group[1]
            complements |= group[2]
        groups.append((members, union, complements))
    return [
        StateGroup(
            tuple(m),
            structure.assignments[m[0]],
            frozenset(a),
            frozenset(c),
            min(movable[z] for z in m),
        )
        for m, a, c in groups
    ]


def permute(params: Params, group: StateGroup, order: Tensor) -> Params:
    """Rename the states of a group: state ``order[k]`` becomes state ``k``.

    ``params`` may be some of the parameters.
    """
    result = dict(params)
    for name, axis in group.axes:
        if name in result:
            order = order.to(result[name].device)
            result[name] = result[name].index_select(axis, order[: result[name].shape[axis]])
    if group.num_states == 2 and int(order[0]) == 1:
        for name, kind in group.complements:
            if name in result:
                result[name] = 1 - result[name] if kind == "probability" else -result[name]
    return result


def coinciding(
    structure: Structure,
    plan: Plan,
    params: Params,
    nats: float = 0.0,
    without: Container[str] = (),
) -> dict[str, list[tuple[int, int]]]:
    """Pairs of states that the observations cannot tell apart at ``params``, though they could.

    A pair coincides where every factor downstream of the assignment is the same for both (to
    within ``nats``): EM keeps such states equal for ever. States that the program itself never
    tells apart do not count, nor do the sites ``without``.
    """
    with torch.no_grad():
        trace = structure.enumerate(params)
    here = _equal_states(structure, trace, nats, without)
    always = _equal_states(structure, plan.reading.traces[0], 0.0, without)
    return {z: pairs for z in here if (pairs := sorted(here[z] - always[z]))}


def _equal_states(
    structure: Structure, trace: Enumerated, nats: float, without: Container[str]
) -> dict[str, set[tuple[int, int]]]:
    result: dict[str, set[tuple[int, int]]] = {}
    # A step's state is also that before the next step's, which stands for it.
    next_step = {chain.step: chain for chain in structure.chains}
    summed = {**structure.assignments, **structure.imputed}
    every = {z: {(i, j) for j in range(k) for i in range(j)} for z, k in summed.items()}
    for z in reversed([z for z in trace.factors if z in summed]):  # children before their parents
        symbol = trace.states[z]
        pairs = None
        for name, factor in trace.factors.items():
            if name == z or name in without or symbol not in factor.dims:
                continue
            if name in result and result[name] == every[name]:
                continue  # a child that the data cannot inform tells nothing of its parent
            own = _pairs(factor.tensor, factor.dims.index(symbol), nats)
            pairs = own if pairs is None else pairs & own
        if z in next_step and pairs is not None and pairs != every[z]:
            factor, before = trace.factors[z], trace.states[next_step[z].first]
            if before in factor.dims:
                pairs = pairs & _pairs(factor.tensor, factor.dims.index(before), nats)
        result[z] = every[z] if pairs is None else pairs
    return result


def _pairs(tensor: Tensor, axis: int, nats: float) -> set[tuple[int, int]]:
    rows = tensor.movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
    rows = torch.nan_to_num(rows.double(), nan=0.0, posinf=1e30, neginf=-1e30)
    generator = torch.Generator().manual_seed(3)
    direction = torch.rand(rows.shape[1], generator=generator, dtype=torch.float64) + 0.5
    signature = rows @ direction
    scale = rows.abs() @ direction
    gap = (signature[:, None] - signature[None]).abs()
    close = gap <= 1e-12 * (scale[:, None] + scale[None]) + nats * direction.sum()
    pairs = {(int(i), int(j)) for i, j in close.triu(1).nonzero()}
    if nats:  # the sums may agree by chance
        pairs = {(i, j) for i, j in pairs if float((rows[i] - rows[j]).abs().max()) <= nats}
    return pairs
