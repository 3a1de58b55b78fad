"""What is missing of observations, given what is seen: conditional means, and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import Enumerated, Incomplete, align, unwrap
from pyroem.errors import ModelError
from pyroem.estep.chain import site_weights
from pyroem.estep.trace import factor_weights, marginal
from pyroem.families.incomplete import conditional, conditional_draw
from pyroem.sequences import all_steps, observed
from pyroem.structure import Params, Structure, seen_cells


def means(structure: Structure, params: Params) -> dict[str, Tensor]:
    """The data of each site with missing cells, completed by what is expected there.

    ``sum_k p(z = k | seen) E[x | z = k, seen of the row]``; in a ``Categorical`` site the most
    probable category.
    """
    run, names, result = structure.enumerate(params), _names(structure), {}
    _, weights = site_weights(structure, run)
    for chain in structure.chains:
        for name, *sites in observed(structure, chain):
            if set(sites) & set(names):
                parts = {s: _completed(structure, run, s, weights, _expected) for s in sites if s}
                result[name] = all_steps(structure, run.trace.nodes, chain, parts)
                names = [n for n in names if n not in sites]
    return result | {n: _completed(structure, run, n, weights, _expected) for n in names}


def draws(structure: Structure, params: Params, count: int) -> dict[str, Tensor]:
    """The data of each site with missing cells, completed at random ``count`` times (first dim).

    The assignments are drawn from their joint posterior, what is missing given them.

    Raises:
    ------
    ModelError
        Where the program is a chain.
    """
    if structure.chains:
        raise ModelError("impute: there are no draws for a chain of states, only means.")
    run = structure.enumerate(params)
    _, posterior = factor_weights(run, run.tensors())
    found: dict[str, list[Tensor]] = {name: [] for name in _names(structure)}
    for _ in range(count):
        weights = _drawn_states(structure, run, posterior)
        for name, parts in found.items():
            parts.append(_completed(structure, run, name, weights, _drawn))
    return {name: torch.stack(parts) for name, parts in found.items()}


def _names(structure: Structure) -> list[str]:
    return list(structure.program.missing or {})


def _drawn_states(
    structure: Structure, run: Enumerated, weights: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The weights of all sites once the assignments are drawn, each given those before it.

    ``weights`` are those before any is drawn.
    """
    tensors = run.tensors()
    for z in (*structure.assignments, *structure.imputed):
        p = marginal(structure, run, z, weights[z])
        p = p / p.sum(-1, keepdim=True)
        index = torch.multinomial(p.reshape(-1, p.shape[-1]), 1).reshape(p.shape[:-1])
        chosen = torch.nn.functional.one_hot(index, p.shape[-1]).to(p).log()
        own = "".join(run.plates[f] for f in structure.plates[z]) + run.states[z]
        dims = run.factors[z].dims
        whole = dims + "".join(d for d in own if d not in dims)
        told = align(tensors[z], dims, whole) + align(chosen, own, whole)
        tensors[z] = told
        factors = {**run.factors, z: replace(run.factors[z], tensor=told, dims=whole)}
        run = replace(run, factors=factors)
        _, weights = factor_weights(run, tensors)
    return weights


def _completed(
    structure: Structure,
    run: Enumerated,
    name: str,
    weights: Mapping[str, Tensor],
    fill: Callable[[Any, Tensor, Tensor], Tensor],
) -> Tensor:
    """The data of a site, with ``fill`` where nothing is seen, weighed by the states."""
    node = run.trace.nodes[name]
    base, events, _ = unwrap(node["fn"])
    inner = len(base.event_shape)
    w = run.unpack(name, weights[name] / float(run.scale))
    value = node["value"].to(structure.program.dtype)
    rank = structure.nesting + events + inner
    value = value.reshape((1,) * (rank - value.dim()) + value.shape)
    seen = seen_cells(node)
    seen = torch.ones((), dtype=torch.bool) if seen is None else seen
    try:
        own = fill(base, value, seen)
    except NotImplementedError as error:
        raise ModelError(
            f"impute: site '{name}': {type(base).__name__} has no mean; use draws=..."
        ) from error
    categorical = isinstance(base, dist.Categorical) and own.dim() > len(base.batch_shape)
    w = w.reshape(w.shape + (1,) * (events + inner + categorical))
    total = w * own
    away = list(range(total.dim() - rank - categorical))
    total = total.sum(away) if away else total
    if categorical:
        total = total.argmax(-1).to(value)
    while seen.dim() > rank:  # the same in all states
        seen = seen[0]
    return torch.where(seen, value, total)


def _expected(base: Any, value: Tensor, seen: Tensor) -> Tensor:
    if isinstance(base, Incomplete):
        return conditional(base.base_dist, seen, value)[0]
    if isinstance(base, dist.Categorical):
        shown = torch.nn.functional.one_hot(value.long(), base.probs.shape[-1]).to(value)
        return torch.where(seen.unsqueeze(-1), shown, base.probs)
    mean = base.mean
    if not bool(mean.isfinite().all()):  # a Cauchy, a Student's t of few degrees of freedom
        raise NotImplementedError
    return torch.where(seen, value, mean)


def _drawn(base: Any, value: Tensor, seen: Tensor) -> Tensor:
    if isinstance(base, Incomplete):
        return conditional_draw(base.base_dist, seen, value)
    return torch.where(seen, value, base.sample().to(value))
