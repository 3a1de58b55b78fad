"""Numerical maximisation of the expected log-joint, where there is no closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyroem.structure import Parameter, Params

Objective = Callable[[Params], Tensor]


def maximise(
    objective: Objective,
    params: Params,
    parameters: Mapping[str, Parameter],
    *,
    max_iter: int,
    scale: float,
) -> Params:
    """Ascend ``objective`` over ``params`` in the unconstrained space, by L-BFGS.

    Never returns a point with a lower objective than it was given; ``scale`` (the number of rows)
    brings the gradient to order one.
    """
    raw = {n: parameters[n].unconstrain(v).clone().requires_grad_() for n, v in params.items()}
    optimiser = torch.optim.LBFGS(
        list(raw.values()),
        max_iter=max_iter,
        max_eval=3 * max_iter,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -objective({n: parameters[n].constrain(r) for n, r in raw.items()}) / scale
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    with torch.no_grad():
        found = {n: parameters[n].constrain(r).detach() for n, r in raw.items()}
        before, after = objective(params), objective(found)
    return found if after >= before else params
