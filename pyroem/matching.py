"""Which states of one fit are which of another's, and where that cannot be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyroem.problem import Problem
from pyroem.renaming import Renaming, posteriors, renamings
from pyroem.structure import Params
from pyroem.symmetry import permute

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

    States that the program tells apart (by their prior, say) keep their names. ``known`` are the
    problem's renamings, where they have been found before.

    Source: Stephens (2000), Journal of the Royal Statistical Society B 62, 795-809, for renaming
    by the posteriors.
    """

    def __init__(
        self,
        problem: Problem,
        reference: Params,
        known: tuple[Renaming, ...] | None = None,
    ) -> None:
        self.problem, self.reference = problem, reference
        self.renamings = renamings(problem, reference) if known is None else known
        self.posteriors = posteriors(problem, reference)

    def __call__(self, params: Params) -> Matched:
        """``params`` with their states renamed."""
        params = {n: v.to(self.reference[n].dtype) for n, v in params.items()}
        found, unclear = None, []
        for renaming in self.renamings:
            group = renaming.group
            if not renaming.possible or not (group.axes or group.complements):
                continue
            found = found or posteriors(self.problem, params)
            both = [
                torch.cat([p[z].reshape(-1, group.num_states) for z in group.assignments])
                for p in (self.posteriors, found)
            ]
            order = torch.arange(group.num_states)
            for states in (torch.tensor(own) for own in renaming.classes if len(own) > 1):
                best, clear = paired(*(p[:, states.to(p.device)] for p in both))
                order[states] = states[best]
                if not clear.all():
                    unclear.append(_told(group.assignments[0], states[~clear]))
            params = permute(params, group, order)
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
    matched = Matcher(problem, reference.params, reference.renamings)(fit.params)
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
    of the posteriors); those that the program tells apart keep their names.
    """
    return Matcher(reference.problem, reference.params, reference.renamings)(fit.params).params


def canonical(problem: Problem, params: Params) -> Params:
    """Parameters of which only ratios or differences count, normalised."""
    result = dict(params)
    for name, block in problem.plan.blocks.items():
        if block.uses:
            result[name] = block.uses[0].coordinate.canonical(params[name])
    return result


def _told(name: str, states: Tensor) -> str:
    return f"states {', '.join(str(int(i)) for i in states)} of '{name}'"
