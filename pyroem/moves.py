"""Split-and-merge moves: starts beside an optimum that EM cannot leave by itself.

Where one component covers two groups while two others share one, EM stays. A move merges two
components and splits a third across its longest axis.

Source: Ueda, Nakano, Ghahramani and Hinton (2000).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyroem.batch import Batch, has_one_group, no_batch, stack, unstack
from pyroem.clustering import features
from pyroem.guesses import from_evidence
from pyroem.problem import Problem
from pyroem.structure import Params

MOST = 12  # moves from one point


def moves(problem: Problem, params: Params, pooled: Params) -> list[Params]:
    """Points that moves lead to, by one M-step of ``pooled``; none where they make no sense."""
    group = problem.groups[0] if len(problem.groups) == 1 else None
    if group is None or len(group.assignments) != 1 or not 2 < group.movable == group.num_states:
        return []
    (z,), k = group.assignments, group.num_states
    rows = features(problem, problem.plan.reading.traces[0], group)
    if rows is None:
        return []
    given = problem.marginals(params)[z]
    r = given.reshape(-1, k)
    if len(r) != len(rows):
        return []
    sides = [_side(rows, r[:, part]) for part in range(k)]
    found = []
    for i, j in _alike(r):
        for part in range(k):
            if part in (i, j):
                continue
            new = r.clone()
            new[:, i] = r[:, i] + r[:, j]
            new[:, part] = r[:, part] * sides[part]
            new[:, j] = r[:, part] * (1 - sides[part])
            found.append(new)
    found = found[:MOST]
    if no_batch(problem) or not has_one_group(problem):
        evidence = [{z: new.reshape(given.shape)} for new in found]
        return [problem.clip(from_evidence(problem, pooled, e, None)) for e in evidence]
    batch = Batch(problem, len(found))
    posterior = torch.stack([new.T for new in found])
    ahead = batch.m_step(stack([pooled] * len(found)), batch.expected_given(posterior))
    return unstack(problem.clip(ahead))


def _alike(r: Tensor) -> list[tuple[int, int]]:
    """Pairs of components, those first whose responsibilities overlap most."""
    norms = r.norm(dim=0).clamp(min=1e-300)
    overlap = (r.T @ r) / (norms[:, None] * norms)
    i, j = torch.triu_indices(r.shape[1], r.shape[1], 1)
    order = overlap[i, j].argsort(descending=True, stable=True)
    return [(int(i[n]), int(j[n])) for n in order]


def _side(rows: Tensor, weights: Tensor) -> Tensor:
    """Which rows lie on one side of a component's mean, along its longest axis."""
    total = weights.sum().clamp(min=1e-300)
    away = rows - weights @ rows / total
    axis = torch.linalg.eigh((away * weights.unsqueeze(1)).T @ away)[1][:, -1]
    return (away @ axis > 0).to(rows)
