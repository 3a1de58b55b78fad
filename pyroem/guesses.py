"""Guessing the assignments, and one M-step from the guess."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyroem._pyro import Enumerated, align
from pyroem.batch import Batch, has_one_group, no_batch, stack, unstack
from pyroem.clustering import cluster_means, features, kmeans, rows_shape, sphered, ward
from pyroem.estep.engine import MixtureEngine, is_chained
from pyroem.estep.kernel import expect_given
from pyroem.estep.trace import collect, factor_weights
from pyroem.mstep.runs import Expected, Run
from pyroem.mstep.update import QUICK
from pyroem.problem import Problem
from pyroem.structure import Params
from pyroem.symmetry import StateGroup

HANDFUL = 10  # rows that seed a state of a random start
NEVER = -60.0  # nats by which a state that is excluded lies behind
POOLING, SETTLED = 100, 1e-3  # steps to a pooled point; a relative change that ends them
CERTAINTY = 0.95  # what a k-means label weighs against the other states

Evidence = dict[str, Tensor]  # assignment -> probabilities, plates then states


def guessed(
    problem: Problem,
    pooled: Params,
    method: str,
    seed: int,
    only: frozenset[str] | None = None,
) -> Params:
    """Guess the assignments and make one M-step from ``pooled``.

    ``"kmeans"`` and ``"ward"`` cluster standardised columns, ``"sphered"`` and ``"sphered ward"``
    uncorrelated ones. ``"random"`` seeds each state with a handful of rows drawn at random; the
    other rows are spread evenly and weigh less, so that the states do not all start at the pooled
    estimate.
    """
    generator = torch.Generator().manual_seed(seed)
    trace = problem.plan.reading.traces[0]
    evidence: Evidence = {}
    importance: Tensor | None = None
    taken: dict[int, list[Tensor]] = {}
    for group in problem.groups:
        rows = _rows(problem, trace, group, method)
        if rows is None:
            importance = _random(problem, group, evidence, generator, importance)
            continue
        for used in taken.get(len(rows), []):  # what another assignment explains already
            rows = rows - cluster_means(rows, used)
        labels = _clusters(rows, group.num_states, method, [seed])[0]
        taken.setdefault(len(rows), []).append(labels)
        other = (1 - CERTAINTY) / max(group.num_states - 1, 1)
        soft = torch.full((len(labels), group.num_states), other, dtype=rows.dtype)
        soft.scatter_(1, labels.unsqueeze(1), CERTAINTY if group.num_states > 1 else 1.0)
        at = 0
        for z in group.assignments:
            shape = rows_shape(problem, z)
            size = int(torch.Size(shape).numel())
            evidence[z] = soft[at : at + size].reshape((*shape, group.num_states))
            at += size
    for group in problem.groups:
        evidence.update(_agreeing(problem, group, evidence))
    return problem.clip(from_evidence(problem, pooled, evidence, importance, only))


def guessed_together(
    problem: Problem,
    pooled: Params,
    method: str,
    seeds: Sequence[int],
    only: frozenset[str] | None = None,
) -> list[Params]:
    """:func:`guessed` for many seeds, as one where the problem allows."""
    group = problem.groups[0] if len(problem.groups) == 1 else None
    alone = group is not None and len(group.assignments) == 1
    if len(seeds) < 2 or not alone or no_batch(problem) or not has_one_group(problem):
        return [guessed(problem, pooled, method, seed, only) for seed in seeds]
    assert group is not None
    z, k, told = group.assignments[0], group.num_states, _told(problem, group.assignments[0])
    rows = int(torch.Size(rows_shape(problem, z)).numel())
    trace = problem.plan.reading.traces[0]
    seen = _rows(problem, trace, group, method)
    if seen is not None:
        labels = _clusters(seen, k, method, seeds)
        other = (1 - CERTAINTY) / max(k - 1, 1)
        posterior = torch.full((len(seeds), k, rows), other, dtype=seen.dtype)
        posterior.scatter_(1, labels.unsqueeze(1), CERTAINTY if k > 1 else 1.0)
        if told is not None:
            posterior = torch.stack([_renamed(p.T, told).T for p in posterior])
    else:
        parts = []
        for seed in seeds:
            evidence: Evidence = {}
            generator = torch.Generator().manual_seed(seed)
            importance = _random(problem, group, evidence, generator, None)
            soft = evidence[z].reshape(rows, k)
            soft = (soft if told is None else _renamed(soft, told)).T
            parts.append(soft if importance is None else soft * importance.reshape(-1))
        posterior = torch.stack(parts)
    return from_posteriors(problem, pooled, posterior, only)


def from_posteriors(
    problem: Problem, pooled: Params, posterior: Tensor, only: frozenset[str] | None = None
) -> list[Params]:
    """One M-step from ``pooled`` under each of several posteriors (states by rows), as one."""
    count = len(posterior)
    batch = Batch(problem, count)
    found = batch.m_step(stack([pooled] * count), batch.expected_given(posterior), only)
    return unstack(problem.clip(found))


def _rows(problem: Problem, trace: Enumerated, group: StateGroup, method: str) -> Tensor | None:
    """What is clustered; None where the guess is to be random."""
    rows = None if method == "random" else features(problem, trace, group)
    return sphered(rows) if rows is not None and method.startswith("sphered") else rows


def _clusters(rows: Tensor, k: int, method: str, seeds: Sequence[int]) -> Tensor:
    """Labels, seeds by rows."""
    if method.endswith("ward"):
        return torch.stack([ward(rows, k, seed) for seed in seeds])
    return kmeans(rows, k, seeds)


def _agreeing(problem: Problem, group: StateGroup, evidence: Evidence) -> Evidence:
    """Guesses that agree with what the program says of the states without any parameter.

    Such are the labels of some rows. Where they tell states apart, the guess's states get the
    names that suit them best.
    """
    found = {}
    for z in group.assignments if len(group.assignments) == 1 else ():
        told = _told(problem, z)
        if told is not None and z in evidence:
            shape = evidence[z].shape
            found[z] = _renamed(evidence[z].reshape(-1, shape[-1]), told).reshape(shape)
    return found


def _told(problem: Problem, z: str) -> Tensor | None:
    """The log-probability of sites that hang on the assignment only: rows by states."""
    trace, depends = problem.plan.reading.traces[0], problem.plan.reading.dependence
    own = "".join(trace.plates[p] for p in problem.structure.plates[z]) + trace.states[z]
    total = None
    for name in problem.structure.observations:
        factor = trace.factors.get(name)
        if factor is None or depends.get(name) or trace.states[z] not in factor.dims:
            continue
        if set(factor.dims) <= set(own):
            part = align(factor.tensor, factor.dims, own)
            total = part if total is None else total + part
    if total is None:
        return None
    shape = (*rows_shape(problem, z), problem.structure.assignments[z])
    total = total.expand(shape).reshape(-1, shape[-1])
    return (total - total.amax(-1, keepdim=True)).clamp(min=NEVER)


def _renamed(soft: Tensor, told: Tensor) -> Tensor:
    order = linear_sum_assignment((told.T @ soft).numpy(), maximize=True)[1]
    joint = soft[:, torch.as_tensor(order)] * told.exp()
    total = joint.sum(-1, keepdim=True)
    return torch.where(total > 0, joint / total, told.softmax(-1))


def from_evidence(
    problem: Problem,
    params: Params,
    evidence: Evidence,
    importance: Tensor | None,
    only: frozenset[str] | None = None,
) -> Params:
    """One M-step with the assignments' probabilities given (uniform where absent)."""
    if isinstance(problem.engine, MixtureEngine) and isinstance(problem.engine.chunks, list):
        by_kernel = _by_kernel(problem, evidence, importance, params)
        if by_kernel is not None:
            return problem.m_step(params, by_kernel, only, effort=QUICK)
    engine = problem.engine
    if is_chained(engine):
        given = engine.expect_given(params, evidence, importance)
        return problem.m_step(params, given, only, effort=QUICK)
    structure, trace = problem.structure, problem.plan.reading.traces[0]
    tensors = {name: torch.zeros_like(f.tensor) for name, f in trace.factors.items()}
    for z, probabilities in evidence.items():
        dims = trace.factors[z].dims
        own = "".join(trace.plates[p] for p in structure.plates[z]) + trace.states[z]
        kept = "".join(d for d in own if d in dims)
        packed = probabilities.reshape(
            [n for n, d in zip(probabilities.shape, own, strict=True) if d in dims]
        )
        tensors[z] = tensors[z] + align(packed.log(), kept, dims)
    weights = problem.row_weights
    if importance is not None:
        weights = importance if weights is None else weights * importance
    value, found = factor_weights(trace, tensors, row_weights=weights, unit=structure.unit)
    with torch.no_grad():
        expected = collect(problem.plan, trace, value, found, Run(problem.plan, params))
    return problem.m_step(params, expected, only, effort=QUICK)


def _by_kernel(
    problem: Problem, evidence: Evidence, importance: Tensor | None, params: Params
) -> Expected | None:
    """The statistics under the evidence, if it says nothing or all about one assignment."""
    engine = problem.engine
    assert isinstance(engine, MixtureEngine)
    groups, (rows,) = engine.mixture.groups, engine.chunks
    posteriors = []
    for group in groups:
        if not evidence or not group.names:
            even = torch.full((group.num_states, 1), 1 / group.num_states, dtype=rows.dtype)
            posteriors.append(even)
        elif len(group.names) == 1 and group.names[0] in evidence:
            given = evidence[group.names[0]]
            posteriors.append(given.reshape(-1, given.shape[-1]).T)
        else:
            return None
    if importance is not None:
        posteriors = [p * importance.reshape(-1) for p in posteriors]
    with torch.no_grad():
        return expect_given(engine.mixture, rows, posteriors, params)


def pooled_point(problem: Problem, params: Params, only: frozenset[str] | None = None) -> Params:
    """The estimates where all states are alike, from ``params``.

    One M-step with the assignments evenly spread. What vectors miss is expected by the parameters
    there are: if these are far from the data, so is that, and further such steps are needed.
    """
    found = from_evidence(problem, params, {}, None, only)
    missing = (problem.structure.program.missing or {}).values()
    for _ in range(POOLING if any(m.filler.dim() for m in missing) else 0):
        before, found = found, from_evidence(problem, found, {}, None, only)
        sizes = ((v, SETTLED * v.abs().max(), before[n]) for n, v in found.items() if v.numel())
        if all(bool(((v - old).abs() <= size).all()) for v, size, old in sizes):
            break
    return found


def placed(problem: Problem, params: Params) -> Params:
    """``params`` with free locations and scales of sites without a family brought to the data."""
    free = {n: v for n, v in params.items() if n in problem.free}
    for landmark in problem.plan.reading.landmarks.values():
        free = landmark.place(free)
    parameters = problem.structure.parameters
    return {**params, **{n: parameters[n].keep(v) for n, v in free.items()}}


def escape(problem: Problem, params: Params, iterations: int = 30) -> float:
    """The objective after EM iterations from ``params`` with their responsibilities disturbed.

    Where it exceeds that of ``params``, they are no optimum.
    """
    marginals = problem.marginals(params)
    best = -math.inf
    for sign in (1.0, -1.0):  # where states have an order, one of the two is against it
        generator = torch.Generator().manual_seed(0)
        evidence = {}
        for z, p in marginals.items():
            if z not in problem.structure.assignments:
                continue
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            evidence[z] = torch.softmax(p.clamp(min=1e-6).log() + sign * noise, -1)
        moved = problem.clip(from_evidence(problem, params, evidence, None))
        for _ in range(iterations):
            expected, _ = problem.e_step(moved)
            moved = problem.m_step(moved, expected, effort=QUICK)
        best = max(best, float(sum(problem.log_joint(moved))))
    return best


def _random(
    problem: Problem,
    group: StateGroup,
    evidence: Evidence,
    generator: torch.Generator,
    importance: Tensor | None,
) -> Tensor | None:
    """Seed each state with a handful of rows; the rest is spread evenly and weighs less."""
    dtype, k = problem.structure.program.dtype, group.num_states
    for z in group.assignments:
        shape = rows_shape(problem, z)
        rows = int(torch.Size(shape).numel())
        per_state = min(HANDFUL, rows // k)
        if per_state < 2 or len(group.assignments) > 1:
            concentration = torch.full((rows, k), 0.5, dtype=torch.float64)
            draws = torch._standard_gamma(concentration, generator=generator)
            draws = draws.clamp(min=1e-6)
            evidence[z] = (draws / draws.sum(-1, keepdim=True)).to(dtype).reshape((*shape, k))
            continue
        chosen = torch.randperm(rows, generator=generator)[: per_state * k]
        soft = torch.full((rows, k), 1 / k, dtype=dtype)
        soft[chosen] = torch.eye(k, dtype=dtype).repeat(per_state, 1)
        evidence[z] = soft.reshape((*shape, k))
        if problem.structure.plates[z] == problem.structure.unit and importance is None:
            light = 0.3 * len(chosen) / max(rows - len(chosen), 1)
            importance = torch.full((rows,), min(light, 1.0), dtype=dtype)
            importance[chosen] = 1.0
            importance = importance.reshape(shape)
    return importance
