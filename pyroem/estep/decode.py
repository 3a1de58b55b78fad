"""What chains were doing: posteriors of their states, and their most probable states.

The posteriors are over all steps, those at the end of which nothing was seen included.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyroem._pyro import Enumerated, align
from pyroem.errors import ModelError
from pyroem.estep.chain import Potentials
from pyroem.estep.scan import Chains, Smoothed, best_path, smooth
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
        for names in own.chain.inner:
            found_of = [
                _within(x, p, own.names[i].index(names[i]), names[i])
                for i, (x, p) in enumerate(zip(own.inner, parts, strict=True))
                if x is not None
            ]
            result[names[1]] = torch.cat(found_of)
    return result


def _within(inner: Tensor, states: Tensor, axis: int, name: str) -> Tensor:
    """The posterior of an assignment inside a step, given that of the chain's state."""
    rank = states.dim() - 1
    count = inner.dim() - rank - 2
    if inner.shape[rank] > 1:
        raise ModelError(f"'{name}' depends on the state before too: its marginals are not known.")
    dims = list(range(rank + 2, inner.dim()))
    given = torch.nan_to_num((inner - torch.logsumexp(inner, dims, keepdim=True)).exp(), nan=0.0)
    joint = states.unsqueeze(rank).reshape((*states.shape[:-1], 1, -1, *(1,) * count)) * given
    return joint.sum([i for i in range(rank, joint.dim()) if i != rank + 2 + axis])


def states(potentials: Iterable[Potentials]) -> dict[str, Tensor]:
    """For each assignment its states in the most probable joint assignment: steps, plates.

    That is up to the last step which shows anything; from there on the path goes to the most
    probable next state. The potentials must have the assignments inside the steps at their best.
    """
    result = {}
    for own in potentials:
        chains = own.chains(own.ends.clamp(min=0))
        path = _gone_on(best_path(chains), chains).reshape((-1, *own.shape))
        result[own.chain.step] = path
        parts = (path[:1], path[1:])
        for names in own.chain.inner:
            found = [
                _best_within(x, p, path, own.names[i].index(names[i]))
                for i, (x, p) in enumerate(zip(own.inner, parts, strict=True))
                if x is not None
            ]
            result[names[1]] = torch.cat(found)
    return result


def _gone_on(path: Tensor, chains: Chains) -> Tensor:
    """The path with the most probable next state at each step after the end."""
    sequences = torch.arange(path.shape[1])
    first = int(chains.ends.min()) if len(sequences) else len(path)
    for t in range(first, len(path) - 1):
        pair = chains.pair[t if chains.pair.shape[0] > 1 else 0]
        best = pair.expand(len(sequences), -1, -1)[sequences, path[t]].argmax(-1)
        path[t + 1] = torch.where(chains.ends <= t, best, path[t + 1])
    return path


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


def partners(chain: Chain) -> tuple[tuple[str, str], ...]:
    """The assignments of the first step beside those of the others, the chain's own first."""
    return (chain.first, chain.step), *chain.inner


def by_site(structure: Structure, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was found of all steps, for the sites of the first step and of the others."""
    result = dict(found)
    for chain in structure.chains:
        for a, b in partners(chain):
            result[a], result[b] = found[b][0], found[b][1:]
    return result


def log_likelihoods(structure: Structure, potentials: Iterable[Potentials]) -> Tensor:
    """The log-likelihood of each element of the unit's plates."""
    total = torch.zeros((1,) * len(structure.unit), dtype=torch.float64)
    for own in potentials:
        value = smoothed(own).log_likelihood.reshape(own.shape)
        total = total + by_unit(structure, own.chain, value)
    return total


def by_unit(structure: Structure, chain: Chain, value: Tensor) -> Tensor:
    """A number for each sequence of a chain, added up over all but the unit's plates."""
    away = [i for i, p in enumerate(chain.plates) if p not in structure.unit]
    return value.sum(away) if away else value


def log_likelihoods_outside(structure: Structure, run: Enumerated) -> Tensor:
    """Of each element of the unit's plates, what of it hangs on no chain."""
    unit = "".join(run.plates[p] for p in structure.unit)
    total = torch.zeros((1,) * len(unit), dtype=torch.float64)
    for name, factor in run.factors.items():
        if name in structure.chained or not set(unit) <= factor.ordinal:
            continue
        rest = [i for i, d in enumerate(factor.dims) if d not in unit]
        row = factor.tensor.sum(rest) if rest else factor.tensor
        for plate, size in run.sizes(name).items():
            if run.plates[plate] not in factor.dims and plate not in structure.unit:
                row = row * size
        total = total + align(row, "".join(d for d in factor.dims if d in unit), unit)
    return total
