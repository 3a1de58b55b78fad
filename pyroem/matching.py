"""Two fits of one program side by side: which state of the one is which of the other."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.fit import Fit
from pyroem.structure import Params
from pyroem.symmetry import permute


def parameter_difference(fit: Fit, reference: Fit) -> float:
    """The largest relative difference of any parameter, after the states are matched.

    ``max |a - b| / max |b|`` over the elements of a parameter, the largest over the parameters.
    """
    if fit is reference:
        return 0.0
    own = _canonical(reference, reference.params)
    other = _canonical(reference, match(fit, reference))
    return max((_relative(other[n], own[n]) for n in own if own[n].numel()), default=0.0)


def _relative(value: Tensor, reference: Tensor) -> float:
    gap, size = float((value - reference).abs().max()), float(reference.abs().max())
    return gap / size if size > 0 else gap


def match(fit: Fit, reference: Fit) -> Params:
    """The parameters of ``fit``, its states renamed as those of ``reference``.

    States are paired to agree on as many rows as possible (the Hungarian algorithm on the overlap
    of the posteriors).
    """
    structure = reference.problem.sample.structure
    params = {n: v.to(reference.params[n].dtype) for n, v in fit.params.items()}
    with isolated(structure.program.dtype, 0):
        a = reference.problem.sample.marginals(reference.params)
        b = reference.problem.sample.marginals(params)
    for group in reference.problem.groups:
        k = group.num_states
        if group.movable < 2 or not (group.axes or group.complements):
            continue
        overlap = torch.zeros((k, k), dtype=structure.program.dtype)
        for z in group.assignments:
            overlap += a[z].reshape(-1, k).T @ b[z].reshape(-1, k)
        if not overlap.isfinite().all():
            continue
        order = torch.arange(k)
        free = overlap[: group.movable, : group.movable]
        order[: group.movable] = torch.as_tensor(linear_sum_assignment(free, maximize=True)[1])
        params = permute(params, group, order)
    return params


def _canonical(fit: Fit, params: Params) -> Params:
    """Parameters of which only ratios or differences count, normalised."""
    result = dict(params)
    for name, block in fit.problem.plan.blocks.items():
        if block.uses:
            result[name] = block.uses[0].coordinate.canonical(params[name])
    return result
