"""k-means on the observed rows below an assignment: the guess that most fits start from."""

from __future__ import annotations

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import Enumerated, unwrap
from pyroem.problem import Problem
from pyroem.symmetry import StateGroup


def rows_shape(problem: Problem, z: str) -> tuple[int, ...]:
    """The sizes of the plates of an assignment."""
    node = problem.plan.reading.traces[0].trace.nodes[z]
    sizes = {f.name: f.size for f in node["cond_indep_stack"] if f.vectorized}
    return tuple(sizes[p] for p in problem.structure.plates[z])


def features(problem: Problem, trace: Enumerated, group: StateGroup) -> Tensor | None:
    """The observed rows below a group's assignments, standardised; None where there are none."""
    parts = []
    for z in group.assignments:
        columns = []
        for name in problem.structure.observations:
            factor = trace.factors.get(name)
            if factor is None or trace.states[z] not in factor.dims:
                continue
            column = _columns(problem, trace, z, name)
            if column is not None:
                columns.append(column)
        if not columns:
            return None
        parts.append(torch.cat(columns, 1))
    if len({p.shape[1] for p in parts}) != 1:
        return None
    rows = torch.cat(parts)
    if rows.shape[0] < 2:
        return None
    spread = rows.std(0)
    return (rows - rows.mean(0)) / torch.where(spread > 0, spread, 1.0)


def _columns(problem: Problem, trace: Enumerated, z: str, name: str) -> Tensor | None:
    """The data of one observation as rows over the plates of ``z``."""
    node = trace.trace.nodes[name]
    frames = {f.name: f.dim for f in node["cond_indep_stack"] if f.vectorized}
    plates = problem.structure.plates[z]
    base, _, _ = unwrap(node["fn"])
    value, fn = node["value"], node["fn"]
    if not set(plates) <= set(frames) or not isinstance(value, Tensor):
        return None
    if isinstance(base, dist.Unit):
        return None
    event = len(fn.event_shape)
    if isinstance(base, dist.Categorical):
        k = base.logits.shape[-1]
        value = torch.nn.functional.one_hot(value.long(), k).to(problem.structure.program.dtype)
        event += 1
    value = value.to(problem.structure.program.dtype)
    rank = problem.structure.nesting + event
    value = value.reshape((1,) * (rank - value.dim()) + value.shape)
    at = [rank - event + frames[p] for p in plates]
    sizes = rows_shape(problem, z)
    moved = value.movedim(at, list(range(len(at))))
    moved = moved.expand((*sizes, *moved.shape[len(sizes) :]))
    return moved.reshape(int(torch.Size(sizes).numel()), -1)


def cluster_means(rows: Tensor, labels: Tensor) -> Tensor:
    """For each row the mean of its cluster."""
    k = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=k).clamp(min=1).to(rows)
    sums = torch.zeros((k, rows.shape[1]), dtype=rows.dtype).index_add_(0, labels, rows)
    return (sums / counts[:, None])[labels]


def kmeans(
    rows: Tensor, k: int, generator: torch.Generator, *, iterations: int = 20, sample: int = 20_000
) -> Tensor:
    """Labels by k-means++ seeding and Lloyd's iterations (on a sample where rows are many).

    Source: Arthur and Vassilvitskii (2007).
    """
    pool = rows
    if len(rows) > sample:
        pool = rows[torch.randperm(len(rows), generator=generator)[:sample]]
    first = int(torch.randint(len(pool), (1,), generator=generator))
    centres = pool[first : first + 1]
    for _ in range(1, k):
        distance = torch.cdist(pool, centres).amin(1) ** 2
        if float(distance.sum()) <= 0:
            distance = torch.ones_like(distance)
        chosen = torch.multinomial(distance, 1, generator=generator)
        centres = torch.cat([centres, pool[chosen]])
    for _ in range(iterations):
        labels = torch.cdist(pool, centres).argmin(1)
        counts = torch.bincount(labels, minlength=k).to(pool)
        sums = torch.zeros_like(centres).index_add_(0, labels, pool)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.cat([torch.cdist(part, centres).argmin(1) for part in rows.split(100_000)])
