"""Starts that fits of different programs give to one another, by their responsibilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyroem._pyro import isolated
from pyroem.clustering import along_longest_axis
from pyroem.em import EM
from pyroem.errors import PyroemError
from pyroem.fit import Fit
from pyroem.given import assignments
from pyroem.loop import rank
from pyroem.problem import Problem
from pyroem.race import Start
from pyroem.solver import Solver
from pyroem.starts import starts

Evidence = Mapping[str, Tensor]  # assignment -> probabilities: its plates, then its states

BRIEF = 10  # iterations after which the most promising of several starts is chosen
RIVALS = 4  # starts that get so far
FAINT = 0.1  # how far a hesitant split moves a component's responsibilities apart


def responsibilities(fit: Fit) -> Evidence:
    """Posterior probabilities by assignment, as ``init`` takes them."""
    names = list(assignments(fit.problem.structure))
    if not names:
        return {}
    found = fit.responsibilities()
    return found if isinstance(found, dict) else {names[0]: found}


def start_from(problem: Problem, evidence: Evidence, how: str) -> Start | None:
    """One M-step under given responsibilities; None where it cannot be made."""
    try:
        start = next(starts(problem, dict(evidence), 1, 0))
        finite = all(bool(v.isfinite().all()) for v in start.params.values())
    except (PyroemError, torch.linalg.LinAlgError):
        return None
    return replace(start, how=how) if finite else None


def value_at(problem: Problem, start: Start) -> float:
    """The objective at a start; minus infinity where it is not a number."""
    value = sum(problem.parts(start.params))
    return value if value == value else -torch.inf


def passed_on(problem: Problem, fits: Iterable[tuple[str, Fit]]) -> Iterator[Start]:
    """Starts of a program from the responsibilities of fits with as many states."""
    wanted = assignments(problem.structure)
    for label, fit in fits:
        evidence = responsibilities(fit)
        if {name: r.shape[-1] for name, r in evidence.items()} != wanted or not wanted:
            continue
        start = start_from(problem, evidence, f"the responsibilities of the fit with {label}")
        if start is not None:
            yield start


def split_starts(
    problem: Problem, fit: Fit, data: Any, seed: int, share: float = 1.0
) -> Iterator[Start]:
    """Starts of a program from a fit with fewer states: one of them split in two, each in turn.

    The rows of state ``k``, weighted by its responsibilities ``r_k``, are cut at their mean along
    their first principal axis, ``s = (x - mean) . axis``:

        r_k -> r_k (1 + share sign(s)) / 2,   r_k (1 - share sign(s)) / 2

    With ``share`` near 0 the objective at the start is close to that of ``fit``, whatever the cut;
    with 1 the two are apart. Where a program lacks more than one state, the largest are split
    before. None where the programs' assignments differ otherwise.
    """
    wanted, have = assignments(problem.structure), dict(responsibilities(fit))
    if set(wanted) != set(have) or any(have[z].shape[-1] > k for z, k in wanted.items()):
        return
    growing = [z for z, k in wanted.items() if have[z].shape[-1] < k]
    if not growing:
        return
    for z in growing:
        while have[z].shape[-1] < wanted[z] - (z == growing[0]):
            have[z] = split(have[z], _largest(have[z]), data, seed, share)
    base = have[growing[0]]
    for k in base.reshape(-1, base.shape[-1]).sum(0).argsort(descending=True).tolist():
        evidence = {**have, growing[0]: split(base, k, data, seed, share)}
        start = start_from(problem, evidence, f"state {k} of a smaller fit split in two")
        if start is not None:
            yield start


def _largest(r: Tensor) -> int:
    return int(r.reshape(-1, r.shape[-1]).sum(0).argmax())


def split(r: Tensor, k: int, data: Any, seed: int, share: float = 1.0) -> Tensor:
    """Responsibilities with state ``k`` cut in two; the second half is the last state.

    The cut is along the first principal axis of the data (every number that stands with an element
    of the assignment's plates); at random where the data has another layout.
    """
    shape, own = r.shape[:-1], r[..., k].reshape(-1)
    x = columns(data, tuple(shape))
    if x is None or not own.sum() > 0:
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(own.shape, generator=generator, dtype=own.dtype) - 0.5
    else:
        score = along_longest_axis(x.to(own), own)
    half = ((1 + share * torch.where(score > 0, 1.0, -1.0)) / 2).to(r).reshape(shape)
    cut = torch.cat([r, (r[..., k] * (1 - half)).unsqueeze(-1)], -1)
    cut[..., k] = r[..., k] * half
    return cut


def columns(data: Any, shape: tuple[int, ...]) -> Tensor | None:
    """All numbers of the data that stand with the elements of ``shape``, standardised by column.

    Missing ones are replaced by the mean of their column. None where there are none.
    """
    parts = [
        leaf.reshape(*shape, -1).flatten(0, len(shape) - 1).to(torch.float64)
        for leaf in tree_leaves(data)
        if isinstance(leaf, Tensor) and shape and leaf.shape[: len(shape)] == shape
    ]
    if not parts:
        return None
    x = torch.cat(parts, 1)
    x = torch.where(x.isfinite(), x, torch.nan)
    x = x - x.nanmean(0)
    x = torch.where(x.isnan(), 0.0, x)
    spread = x.std(0) if len(x) > 1 else torch.zeros(x.shape[1], dtype=x.dtype)
    return x / torch.where(spread > 0, spread, 1.0)


def promising(
    problem: Problem, solver: Solver, rivals: Iterable[Start], count: int, seed: int
) -> list[Start]:
    """The ``count`` best of several starts: by their objective, then after a short run of each.

    The short runs are those of the solver (of plain EM where it accelerates EM).
    """
    ranked = sorted(
        ((value_at(problem, start), start) for start in rivals), key=lambda pair: -pair[0]
    )
    chosen = list[Start]()
    values = list[float]()
    for value, start in ranked:
        if not any(abs(value - other) <= 1e-9 * problem.rows for other in values):
            chosen.append(start)
            values.append(value)
    chosen = chosen[: max(RIVALS, count)]
    if len(chosen) <= count:
        return chosen
    brief = replace(solver, max_iter=min(BRIEF, solver.max_iter))
    if isinstance(brief, EM):
        brief = replace(brief, accelerate=None)
    with isolated(solver.dtype, seed):
        if count == 1:  # as one batch, where that can be
            best = brief.solve(problem, chosen, len(chosen))
            return [Start(best.params, best.start, sought=chosen[0].sought)]
        fits = [brief.solve(problem, [start]) for start in chosen]
    fits.sort(key=lambda fit: rank(fit.status, fit.log_joint), reverse=True)
    return [Start(fit.params, fit.start, sought=chosen[0].sought) for fit in fits[:count]]


def run_from(
    problem: Problem, solver: Solver, chosen: Sequence[Start], count: int, seed: int
) -> Fit:
    """The best fit from the first ``count`` starts, and from the others while none is healthy."""
    with isolated(solver.dtype, seed):
        return solver.solve(problem, list(chosen), count)
