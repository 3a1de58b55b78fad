"""What chains were doing: posteriors of their states, and their most probable states.

Everything here is over all steps, those at the end of which nothing was seen included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pyroem.errors import ModelError
from pyroem.estep.chain import Potentials
from pyroem.estep.scan import Smoothed, best_path, smooth
from pyroem.structure import Chain, Structure


def smoothed(found: Potentials) -> Smoothed:
    """The posteriors of a chain."""
    chains = found.chains()
    return smooth(chains, chains.start.new_ones(found.count))


def marginals(potentials: Iterable[Potentials]) -> dict[str, Tensor]:
    """For each assignment its posterior probabilities: steps, plates, states.

    They go by the name of the site that stands for all steps but the first (``z_1``).
    """
    result = {}
    for own in potentials:
        found, k = smoothed(own), own.chain.num_states
        states = found.states.reshape((-1, *own.shape, k))
        result[own.chain.step] = states
        parts = (states[:1], states[1:])
        for axis, name in enumerate(own.names[1]):
            pair = zip(own.inner, parts, strict=True)
            result[name] = torch.cat([_within(own, x, p, axis) for x, p in pair if x is not None])
    return result


def _within(own: Potentials, inner: Tensor, states: Tensor, axis: int) -> Tensor:
    """The posterior of an assignment inside a step, given that of the chain's state."""
    rank = 1 + len(own.shape)
    count = inner.dim() - rank - 2
    if inner.shape[rank] > 1:
        raise ModelError(
            f"'{own.names[1][axis]}' depends on the state before too: its marginals are not known."
        )
    dims = list(range(rank + 2, inner.dim()))
    given = torch.nan_to_num((inner - torch.logsumexp(inner, dims, keepdim=True)).exp(), nan=0.0)
    joint = states.unsqueeze(rank).reshape((*states.shape[:-1], 1, -1, *(1,) * count)) * given
    return joint.sum([i for i in range(rank, joint.dim()) if i != rank + 2 + axis])


def states(potentials: Iterable[Potentials]) -> dict[str, Tensor]:
    """For each assignment its states in the most probable joint assignment: steps, plates.

    The potentials must have the assignments inside the steps at their best.
    """
    result = {}
    for own in potentials:
        path = best_path(own.chains()).reshape((-1, *own.shape))
        result[own.chain.step] = path
        parts = (path[:1], path[1:])
        for axis, name in enumerate(own.names[1]):
            pair = zip(own.inner, parts, strict=True)
            found = [_best_within(x, p, path, axis) for x, p in pair if x is not None]
            result[name] = torch.cat(found)
    return result


def _best_within(inner: Tensor, own: Tensor, path: Tensor, axis: int) -> Tensor:
    """The best state of an assignment inside a step, at the best states of the chain."""
    rank = own.dim()
    sizes = inner.shape[rank + 2 :]
    at = inner.expand((*own.shape, *inner.shape[rank:]))
    if at.shape[rank] > 1:
        before = path[:-1].reshape((*own.shape, *(1,) * (at.dim() - rank)))
        at = at.gather(rank, before.expand((*own.shape, 1, *at.shape[rank + 1 :])))
    state = own.reshape((*own.shape, *(1,) * (at.dim() - rank)))
    at = at.gather(rank + 1, state.expand((*own.shape, 1, 1, *sizes)))
    best = at.reshape((*own.shape, -1)).argmax(-1)
    return torch.unravel_index(best, sizes)[axis]


def partners(structure: Structure, chain: Chain) -> Iterator[tuple[str, str]]:
    """The assignments of the first step beside those of the others, the chain's own first."""
    first = [n for n in chain.opening if n in structure.assignments]
    later = [n for n in chain.following if n in structure.assignments]
    first.sort(key=lambda n: n != chain.first)
    later.sort(key=lambda n: n != chain.step)
    yield from zip(first, later, strict=True)


def by_site(structure: Structure, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was found of all steps, for the sites of the first step and of the others."""
    result = dict(found)
    for chain in structure.chains:
        for a, b in partners(structure, chain):
            result[a], result[b] = found[b][0], found[b][1:]
    return result


def log_likelihoods(structure: Structure, potentials: Iterable[Potentials]) -> Tensor:
    """The log-likelihood of each element of the unit's plates."""
    total = torch.zeros((1,) * len(structure.unit), dtype=torch.float64)
    for own in potentials:
        value = smoothed(own).log_likelihood.reshape(own.shape)
        away = [i for i, p in enumerate(own.chain.plates) if p not in structure.unit]
        total = total + (value.sum(away) if away else value)
    return total
