"""Draws from a program at given parameters: its assignments and observations."""

from __future__ import annotations

from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem import sequences
from pyroem._pyro import isolated
from pyroem.structure import Params, Structure, known_part, whole_of


def draw(structure: Structure, params: Params, n: int | None, seed: int) -> dict[str, Tensor]:
    """``n`` rows, by as many runs of the program as needed; without ``n`` one draw of everything.

    Rows come in the first dim, then the other plates. One draw of everything is in Pyro's layout.
    """
    rows = structure.num_rows if structure.unit else 1
    count = 1 if n is None else -(-n // rows)
    with isolated(structure.program.dtype, seed), torch.no_grad():
        if structure.chains:
            return _sequences(structure, params, n, count)
        return _rows(structure, params, n, count)


def _rows(structure: Structure, params: Params, n: int | None, count: int) -> dict[str, Tensor]:
    parts = {known_part(n): whole_of(n) for n in structure.imputed}
    names = [parts.get(n, n) for n in (*structure.assignments, *structure.observations)]
    draws: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(count):
        nodes = structure.program.run(params, observed=False).nodes
        for name in names:
            if not isinstance(nodes[name]["fn"], dist.Unit):
                own = nodes[name]
                draws[name].append(own["value"] if n is None else _rows_first(structure, own))
    drawn = {name: found for name, found in draws.items() if found}
    if n is None:
        return {name: found[0] for name, found in drawn.items()}
    return {name: torch.cat(found)[:n] for name, found in drawn.items()}


def _sequences(
    structure: Structure, params: Params, n: int | None, count: int
) -> dict[str, Tensor]:
    """Sequences as long as those of the data; ``n`` of them in the first dim."""
    drawn = [sequences.draw(structure, params) for _ in range(count)]
    if n is None:
        return drawn[0]
    if not structure.unit:
        return {name: torch.stack([d[name] for d in drawn]) for name in drawn[0]}
    rank = len(structure.unit)
    joined = {
        name: torch.cat([d[name].reshape((-1, *d[name].shape[rank:])) for d in drawn])
        for name in drawn[0]
    }
    return {name: x[:n] for name, x in joined.items()}


def _rows_first(structure: Structure, site: Any) -> Tensor:
    """A site's draw with the rows' plates in front, flattened into one dim."""
    frames = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
    value: Tensor = site["value"]
    event = len(site["fn"].event_shape)
    if not set(structure.unit) <= set(frames) or not structure.unit:
        return value.unsqueeze(0)
    full = site["fn"].batch_shape + site["fn"].event_shape
    rank = len(full) - event
    rows = [rank + frames[p] for p in structure.unit]
    others = sorted(rank + dim for name, dim in frames.items() if name not in structure.unit)
    idle = [i for i in range(rank) if i not in rows and i not in others]  # dims without a plate
    moved = value.expand(full).permute(*rows, *others, *idle, *range(rank, len(full)))
    kept = [full[i] for i in others] + list(full[rank:])
    return moved.reshape((structure.num_rows, *kept))
