"""Which states of one fit are which of another's, and where that cannot be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.estep.engine import MixtureEngine
from pyroem.estep.kernel import marginals
from pyroem.problem import Problem
from pyroem.structure import Params
from pyroem.symmetry import StateGroup, permute

if TYPE_CHECKING:
    from pyroem.fit import Fit

CLEAR = 0.2  # the least cosine between the contrasts of states that are paired clearly


@dataclass(frozen=True)
class Matched:
    """Parameters whose states are named as a reference's.

    ``unclear`` says which states could as well be paired otherwise; empty where all are clear.
    """

    params: Params
    unclear: str = ""


class Matcher:
    """Names states as those of the parameters ``reference`` of a problem.

    States are paired so that they agree on as many rows as possible: with ``a`` and ``b`` the
    posteriors of both (rows by states, on the problem's data), the Hungarian algorithm maximises
    ``sum_k O[k, s(k)]`` of the overlap ``O = a'b``. For every state ``k`` the best pairing ``t``
    that gives it another partner is compared with the best of all, ``s``. The pairing is clear
    where

        <a, b_s> - <a, b_t>  >=  c |a - a_u| |b_s - b_t| / 2,

    with ``c = 0.2`` and ``u`` the renaming that leads from ``s`` to ``t``. For two states that
    change partners this bounds the cosine between ``a_i - a_j`` and ``b_i - b_j``: 1 where both
    fits tell the two apart alike, however much they overlap, 0 where the one fit's split has
    nothing to do with the other's.

    Source: Stephens (2000), Journal of the Royal Statistical Society B 62, 795-809, for renaming
    by the posteriors.
    """

    def __init__(self, problem: Problem, reference: Params) -> None:
        self.problem, self.reference = problem, reference
        self.posteriors = _posteriors(problem, reference)

    def __call__(self, params: Params) -> Matched:
        """``params`` with their states renamed."""
        params = {n: v.to(self.reference[n].dtype) for n, v in params.items()}
        found, unclear = None, []
        for group in self.problem.groups:
            if group.movable < 2 or not (group.axes or group.complements):
                continue
            found = found or _posteriors(self.problem, params)
            k = group.num_states
            both = [
                torch.cat([p[z].reshape(-1, k) for z in group.assignments])[:, : group.movable]
                for p in (self.posteriors, found)
            ]
            order, clear = paired(*both)
            params = permute(params, group, torch.cat([order, torch.arange(group.movable, k)]))
            if not clear.all():
                unclear.append(_told(group, clear))
        return Matched(params, "; ".join(unclear))


def paired(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """State ``order[k]`` of ``b`` is state ``k`` of ``a``, and for which states that is clear.

    Both are rows by states; see :class:`Matcher`.
    """
    k = a.shape[1]
    overlap, own, other = (x.double().cpu().numpy() for x in (a.T @ b, a.T @ a, b.T @ b))
    if not all(np.isfinite(x).all() for x in (overlap, own, other)):
        return torch.arange(k), torch.zeros(k, dtype=torch.bool)
    rows = np.arange(k)
    order = linear_sum_assignment(overlap, maximize=True)[1]
    overlap, other = overlap[:, order], other[order][:, order]
    clear = []
    for state in rows:
        barred = overlap.copy()
        barred[state, state] = -1e300
        rival = linear_sum_assignment(barred, maximize=True)[1]
        gap, *sizes = (np.trace(x) - x[rows, rival].sum() for x in (overlap, own, other))
        least = CLEAR * np.sqrt(max(sizes[0], 0.0) * max(sizes[1], 0.0))
        noise = 1e-12 * max(np.trace(own), np.trace(other))
        clear.append(bool(gap > max(least, noise)))
    return torch.as_tensor(order), torch.tensor(clear)


def parameter_difference(fit: Fit, reference: Fit) -> float:
    """The largest relative difference of any parameter, after the states are matched.

    ``max |a - b| / max |b|`` over the elements of a parameter, the largest over the parameters.
    NaN where it cannot be told which states are which (:class:`~pyroem.matching.Matcher`).
    """
    if fit is reference:
        return 0.0
    problem = reference.problem
    matched = Matcher(problem, reference.params)(fit.params)
    if matched.unclear:
        return math.nan
    own, other = canonical(problem, reference.params), canonical(problem, matched.params)
    return max((_relative(other[n], own[n]) for n in own if own[n].numel()), default=0.0)


def _relative(value: Tensor, reference: Tensor) -> float:
    gap, size = float((value - reference).abs().max()), float(reference.abs().max())
    return gap / size if size > 0 else gap


def match(fit: Fit, reference: Fit) -> Params:
    """The parameters of ``fit``, its states renamed as those of ``reference``.

    States are paired to agree on as many rows as possible (the Hungarian algorithm on the overlap
    of the posteriors).
    """
    return Matcher(reference.problem, reference.params)(fit.params).params


def canonical(problem: Problem, params: Params) -> Params:
    """Parameters of which only ratios or differences count, normalised."""
    result = dict(params)
    for name, block in problem.plan.blocks.items():
        if block.uses:
            result[name] = block.uses[0].coordinate.canonical(params[name])
    return result


def _posteriors(problem: Problem, params: Params) -> dict[str, Tensor]:
    """The probabilities of every assignment on the rows that starts are sought on."""
    small = problem.sample
    engine, dtype = small.engine, small.structure.program.dtype
    with isolated(dtype, 0), torch.no_grad():
        if isinstance(engine, MixtureEngine):
            return marginals(engine.mixture, engine.chunks, params)
        return small.marginals(params)


def _told(group: StateGroup, clear: Tensor) -> str:
    states = ", ".join(str(int(i)) for i in (~clear).nonzero())
    return f"states {states} of '{group.assignments[0]}'"
