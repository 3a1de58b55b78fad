"""The trace engine: one enumerated Pyro trace for each E-step.

With ``F_s`` the log-probability tensor of site ``s`` and ``log Z`` the contraction of all of them,
``d log Z / d F_s`` is the posterior probability of each element of ``F_s``: unary for an
observation, pairwise for a transition, whatever the structure. One backward pass gives all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import Enumerated, unwrap
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Expected, Run
from pyroem.structure import Params, Structure, base_mask, known_part, whole_of


def factor_weights(
    trace: Enumerated,
    tensors: Mapping[str, Tensor],
    *,
    backend: str = "logsum",
    row_weights: Tensor | None = None,
    unit: tuple[str, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-likelihood and its derivative by every factor (packed)."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    with torch.enable_grad():
        value = trace.log_likelihood(leaves, backend=backend, weights=row_weights, unit=unit)
        grads = torch.autograd.grad(value, list(leaves.values()))
    return value.detach(), dict(zip(leaves, grads, strict=True))


def expectation(
    structure: Structure, plan: Plan, params: Params, row_weights: Tensor | None = None
) -> tuple[Expected, Tensor]:
    """The E-step at ``params``: what the M-step needs, and the log prior."""
    with torch.no_grad():
        trace = structure.enumerate(params)
        log_prior = structure.log_prior(trace)
    value, weights = factor_weights(
        trace, trace.tensors(), row_weights=row_weights, unit=structure.unit
    )
    return collect(plan, trace, value, weights), log_prior


def collect(
    plan: Plan,
    trace: Enumerated,
    value: Tensor,
    weights: Mapping[str, Tensor],
    run: Run | None = None,
) -> Expected:
    """Posterior weights to expected sufficient statistics.

    Latent variables of the distributions themselves have their posterior in ``run``, if it is given
    and not that of ``trace``.
    """
    unpacked = {name: trace.unpack(name, w) for name, w in weights.items()}
    nodes = trace.trace.nodes if run is None else run.nodes
    statistics = {
        name: site.expected(unpacked[name], unwrap(nodes[name]["fn"])[0])
        for name, site in plan.reading.sites.items()
    }
    kept = {name: unpacked[name] for name in plan.weighted_sites}
    return Expected(value, statistics, kept)


@dataclass(frozen=True)
class Posterior:
    """The posterior of the assignments at given parameters.

    Attributes:
    ----------
    log_likelihood
        ``log p(observations | params)``, the assignments summed out.
    weights
        For each observation and assignment the posterior probability of every combination of the
        states that its log-probability depends on, for every row: unary for an observation,
        pairwise (with its parents) for an assignment. A tensor with dims named by ``axes``.
    axes
        For each site in ``weights`` the names of its dims: assignments and plates.
    marginals
        For each assignment its posterior probabilities: the plates' dims, then the states.
    """

    log_likelihood: Tensor
    weights: dict[str, Tensor]
    axes: dict[str, tuple[str, ...]]
    marginals: dict[str, Tensor]


def posterior(structure: Structure, params: Params, *, backend: str = "logsum") -> Posterior:
    """Weights and marginals at ``params``; ``"logmax"`` gives those of the best assignment."""
    with torch.no_grad():
        trace = structure.enumerate(params)
    value, weights = factor_weights(trace, trace.tensors(), backend=backend)
    scale = float(trace.scale)
    weights = {name: w / scale for name, w in weights.items()}
    marginals = {
        name: marginal(structure, trace, name, weights[name]) for name in structure.assignments
    }
    for name in structure.imputed:
        found = marginal(structure, trace, name, weights[name])
        marginals[whole_of(name)] = _labelled(trace, name, found)
    axes = {name: trace.names(factor.dims) for name, factor in trace.factors.items()}
    return Posterior(value, weights, axes, marginals)


def _labelled(trace: Enumerated, name: str, found: Tensor) -> Tensor:
    """The marginal of a partly known assignment: certain where it is known."""
    node = trace.trace.nodes[known_part(name)]
    if node["fn"].event_shape:
        return found
    known, value = _known(node, found), node["value"]
    value = value.expand(node["fn"].batch_shape).reshape(known.shape)
    states = torch.where(known, value, torch.zeros_like(value)).long()
    certain = torch.nn.functional.one_hot(states, found.shape[-1]).to(found)
    return torch.where(known.unsqueeze(-1), certain, found)


def _known(node: Any, found: Tensor) -> Tensor:
    """Where a partly known assignment is known, over the plates of its marginal."""
    mask = base_mask(node)
    mask = torch.ones((), dtype=torch.bool) if mask is None else mask
    return mask.expand(node["fn"].batch_shape).reshape(found.shape[:-1])


def entropy_of_known(
    structure: Structure, trace: Enumerated, weights: Mapping[str, Tensor]
) -> Tensor:
    """The entropy that the enumeration gives to assignments that are known.

    There the unknown part has its prior, which nothing else depends on.
    """
    total = torch.zeros((), dtype=structure.program.dtype)
    for name in structure.imputed:
        found = marginal(structure, trace, name, weights[name])
        node = trace.trace.nodes[known_part(name)]
        p = found / found.sum(-1, keepdim=True).clamp(min=1e-300)
        total = total - torch.xlogy(found, p)[_known(node, found)].sum()
    return total


def marginal(structure: Structure, trace: Enumerated, name: str, weights: Tensor) -> Tensor:
    """Sum an assignment's packed weights over its parents; plates' dims, then states."""
    dims = trace.factors[name].dims
    plates = "".join(trace.plates[p] for p in structure.plates[name])
    wanted = plates + trace.states[name]
    rest = [i for i, d in enumerate(dims) if d not in wanted]
    left = "".join(d for d in dims if d in wanted)
    total = weights.sum(rest) if rest else weights
    total = total.permute([left.index(d) for d in wanted if d in left])
    node = trace.trace.nodes[name]
    sizes = {trace.plates[f.name]: f.size for f in node["cond_indep_stack"] if f.vectorized}
    sizes[trace.states[name]] = {**structure.assignments, **structure.imputed}[name]
    return total.reshape([sizes[d] for d in wanted])
