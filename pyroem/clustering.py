"""Clusters of the observed rows below an assignment: the guess that most fits start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro import distributions as dist
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from pyroem._pyro import Enumerated, unwrap
from pyroem.problem import Problem
from pyroem.structure import seen_cells
from pyroem.symmetry import StateGroup

MOST = 4_000_000  # numbers in one matrix of distances
CHUNK = 100_000
POWERS = 30  # iterations of the power method


def rows_shape(problem: Problem, z: str) -> tuple[int, ...]:
    """The sizes of the plates of an assignment."""
    node = problem.nodes[z]
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
            column = _columns(problem, z, name)
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


def sphered(rows: Tensor) -> Tensor:
    """Rows whose columns are uncorrelated, of variance one: directions of no spread are left out.

    Groups that differ across a narrow direction of elongated clouds stand apart here.
    """
    centred = rows - rows.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-8 * values.max().clamp(min=1e-300)
    # Of rows that are all alike one column is left, of zeros.
    return left[:, kept] * len(rows) ** 0.5 if kept.any() else torch.zeros_like(rows[:, :1])


def along_longest_axis(rows: Tensor, weights: Tensor) -> Tensor:
    """Where weighted rows lie along their first principal axis, from their mean on.

    By the power method: a direction is enough, no eigenvector.
    """
    gaps = rows - (weights @ rows) / weights.sum().clamp(min=1e-300)
    axis = torch.zeros(rows.shape[1], dtype=rows.dtype)
    axis[int((weights @ gaps**2).argmax())] = 1.0
    for _ in range(POWERS):
        turned = gaps.T @ (weights * (gaps @ axis))
        size = float(turned.norm())
        if not size > 0:
            break
        axis = turned / size
    return gaps @ axis


def _columns(problem: Problem, z: str, name: str) -> Tensor | None:
    """The data of one observation as rows over the plates of ``z``."""
    node = problem.nodes[name]
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

    def by_row(x: Tensor) -> Tensor:
        moved = x.movedim(at, list(range(len(at))))
        moved = moved.expand((*sizes, *moved.shape[len(sizes) :]))
        return moved.reshape(int(torch.Size(sizes).numel()), -1)

    rows, seen = by_row(value), seen_cells(node)
    if seen is not None and isinstance(base, dist.Categorical):
        seen = seen.unsqueeze(-1)
    if seen is None or seen.dim() > value.dim():  # one that differs by state
        return rows
    # Where nothing is seen the column's mean stands in.
    shown = by_row(seen.expand_as(value))
    mean = torch.where(shown, rows, 0.0).sum(0) / shown.sum(0).clamp(min=1)
    return torch.where(shown, rows, mean)


def cluster_means(rows: Tensor, labels: Tensor) -> Tensor:
    """For each row the mean of its cluster."""
    k = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=k).clamp(min=1).to(rows)
    sums = torch.zeros((k, rows.shape[1]), dtype=rows.dtype).index_add_(0, labels, rows)
    return (sums / counts[:, None])[labels]


def ward(rows: Tensor, k: int, seed: int, *, sample: int = 1000) -> Tensor:
    """Labels of the rows from Ward's tree, cut into ``k`` clusters.

    Where rows are many, the tree is that of a sample, and the others go to the nearest mean.

    Source: Ward (1963).
    """
    pool = rows
    if len(rows) > sample:
        generator = torch.Generator().manual_seed(seed)
        pool = rows[torch.randperm(len(rows), generator=generator)[:sample].to(rows.device)]
    tree = linkage(pool.double().cpu().numpy(), "ward")
    labels = torch.as_tensor(cut_tree(tree, min(k, len(pool)))[:, 0]).to(rows.device)
    if len(pool) == len(rows):
        return labels
    member = torch.nn.functional.one_hot(labels.long()).to(rows)
    centres = (member.T @ pool / member.sum(0)[:, None]).unsqueeze(0)
    return torch.cat([_gaps(part.T, centres)[0].argmin(0) for part in rows.split(CHUNK)])


def kmeans(
    rows: Tensor, k: int, seeds: Sequence[int], *, iterations: int = 20, sample: int = 20_000
) -> Tensor:
    """Labels (seeds by rows) by k-means++ seeding and Lloyd's iterations, for all seeds at once.

    Where rows are many, the centres are found on a sample.

    Source: Arthur and Vassilvitskii (2007).
    """
    pool = rows
    if len(rows) > sample:
        generator = torch.Generator().manual_seed(seeds[0])
        pool = rows[torch.randperm(len(rows), generator=generator)[:sample].to(rows.device)]
    together = max(1, MOST // (len(pool) * k))
    labels = [
        _kmeans(rows, pool, k, seeds[i : i + together], iterations)
        for i in range(0, len(seeds), together)
    ]
    return torch.cat(labels)


def _kmeans(rows: Tensor, pool: Tensor, k: int, seeds: Sequence[int], iterations: int) -> Tensor:
    draws = torch.stack(
        [
            torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    ).to(rows)
    first = (draws[:, 0] * len(pool)).long().clamp(max=len(pool) - 1)
    centres, columns = pool[first].unsqueeze(1), pool.T.contiguous()  # seeds, centres, columns
    squares = (columns**2).sum(0)
    nearest = (_gaps(columns, centres)[:, 0] + squares).clamp(min=0)
    for i in range(1, k):
        total = nearest.cumsum(1)
        wanted = draws[:, i : i + 1] * total[:, -1:]
        even = (draws[:, i : i + 1] * len(pool)).long()  # every row is a centre already
        chosen = torch.where(total[:, -1:] > 0, torch.searchsorted(total, wanted), even)
        new = pool[chosen.clamp(max=len(pool) - 1)]
        centres = torch.cat([centres, new], 1)
        nearest = torch.minimum(nearest, (_gaps(columns, new)[:, 0] + squares).clamp(min=0))
    for _ in range(iterations):
        gaps = _gaps(columns, centres)
        member = (gaps == gaps.amin(1, keepdim=True)).to(
            pool
        )  # faster than argmin; ties count twice
        counts = member.sum(-1, keepdim=True)
        sums = (member.reshape(-1, len(pool)) @ pool).reshape(centres.shape)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.cat([_gaps(part.T, centres).argmin(1) for part in rows.split(CHUNK)], 1)


def _gaps(columns: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (seeds, centres, rows), without the squares of the rows themselves."""
    cross = centres.reshape(-1, centres.shape[-1]) @ columns
    return cross.mul_(-2).reshape(*centres.shape[:2], -1) + (centres**2).sum(-1, keepdim=True)
