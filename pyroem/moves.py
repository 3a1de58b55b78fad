"""Split-and-merge moves: starts beside an optimum that EM cannot leave by itself.

Where one component covers two groups while two others share one, EM stays. A move merges two
components and splits a third across its longest axis.

Source: Ueda, Nakano, Ghahramani and Hinton (2000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroem.batch import has_one_group, no_batch
from pyroem.clustering import along_longest_axis, features
from pyroem.guesses import from_evidence, from_posteriors
from pyroem.problem import Problem
from pyroem.structure import Params

MOST = 12  # moves from one point
SHARE = 0.4  # of the rows that a shake reassigns


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
    scores = [along_longest_axis(rows, r[:, part]) for part in range(k)]
    sides = [(score > 0).to(rows) for score in scores]
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
    return from_posteriors(problem, pooled, torch.stack([new.T for new in found]))


def shakes(problem: Problem, params: Params, pooled: Params, seeds: Sequence[int]) -> list[Params]:
    """For each seed the M-step after a share of the rows was reassigned at random."""
    group = problem.groups[0] if len(problem.groups) == 1 else None
    if group is None or len(group.assignments) != 1 or no_batch(problem):
        return []
    if not has_one_group(problem) or group.num_states < 2:
        return []
    (z,), k = group.assignments, group.num_states
    r = problem.marginals(params)[z].reshape(-1, k)
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(len(r), generator=generator) < SHARE
        labels = torch.randint(k, (int(chosen.sum()),), generator=generator)
        new = r.clone()
        new[chosen] = torch.nn.functional.one_hot(labels, k).to(r)
        found.append(new.T)
    return from_posteriors(problem, pooled, torch.stack(found))


def _alike(r: Tensor) -> list[tuple[int, int]]:
    """Pairs of components, those first whose responsibilities overlap most."""
    norms = r.norm(dim=0).clamp(min=1e-300)
    overlap = (r.T @ r) / (norms[:, None] * norms)
    i, j = torch.triu_indices(r.shape[1], r.shape[1], 1)
    order = overlap[i, j].argsort(descending=True, stable=True)
    return [(int(i[n]), int(j[n])) for n in order]
