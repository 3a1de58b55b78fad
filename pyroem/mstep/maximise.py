"""Numerical maximisation of the expected log-joint, where there is no closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyroem.errors import ModelError
from pyroem.structure import Parameter, Params, from_search, to_search

Objective = Callable[[Params], Tensor]


def maximise(
    objective: Objective,
    params: Params,
    parameters: Mapping[str, Parameter],
    steps: Mapping[str, Tensor],
    *,
    max_iter: int,
    rows: float,
) -> Params:
    """Ascend ``objective`` over ``params`` in the unconstrained space, by L-BFGS.

    Never returns a point with a lower objective than it was given. Coordinates are measured in
    ``steps`` and the objective per row, which brings the gradient to order one.
    """
    raw = to_search(parameters, params, steps)
    optimiser = torch.optim.LBFGS(
        list(raw.values()),
        max_iter=max_iter,
        max_eval=3 * max_iter,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -objective(from_search(parameters, raw, steps)) / rows
        if value.requires_grad:
            value.backward()
        return value

    try:
        with torch.enable_grad():
            optimiser.step(loss)
        with torch.no_grad():
            found = {n: v.detach() for n, v in from_search(parameters, raw, steps).items()}
            before, after = objective(params), objective(found)
    except (ModelError, torch.linalg.LinAlgError):
        return params  # the search strayed to where the program cannot run
    return found if after >= before else params
