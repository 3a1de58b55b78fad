"""Numerical maximisation of the expected log-joint, where there is no closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyroem.errors import ModelError
from pyroem.structure import Parameter, Params, from_search, to_search

Objective = Callable[[Params], Tensor]
MakeOptimiser = Callable[[list[Tensor]], torch.optim.Optimizer]

HALVINGS = 10
SETTLED = 1e-18  # nats a row that a step promises: its square root is what is left of the slope
RIDGE = 1e-7  # relative to the largest curvature
LONGEST = 20.0  # units of a coordinate in one step
WORTH = 1e-4  # of the first step's gain: less can wait for the next M-step
STUCK = 1e-12  # nats a row: a step that gains no more may be lost in rounding


def maximise(
    objective: Objective,
    params: Params,
    parameters: Mapping[str, Parameter],
    steps: Mapping[str, Tensor],
    *,
    max_iter: int,
    rows: float,
    few: int = 0,
    newton: int | None = None,
    local: Callable[[Params], Objective] | None = None,
) -> Params:
    """Ascend ``objective`` over ``params`` in the unconstrained space.

    By Newton's method where the coordinates are ``few`` and the objective curved (after ``newton``
    steps only as long as a step gains a ten-thousandth of the first), else by L-BFGS. Never
    returns a point with a lower objective than it was given. Coordinates are measured in ``steps``
    and the objective per row, which brings the gradient to order one. ``local`` gives for a point a
    cheaper objective with the same first and second derivatives there.
    """
    raw = to_search(parameters, params, steps)

    def of(values: Params) -> Tensor:
        return objective(from_search(parameters, values, steps)) / rows

    def near(values: Params) -> Objective:
        assert local is not None
        model = local(back(values))
        return lambda ahead: model(from_search(parameters, ahead, steps)) / rows

    def back(values: Params) -> Params:
        with torch.no_grad():
            return {n: v.detach() for n, v in from_search(parameters, values, steps).items()}

    if sum(v.numel() for v in raw.values()) <= few:
        least = max_iter if newton is None else newton
        point, done = _newton(of, raw, max_iter, least, near if local is not None else None)
        params = back(point)
        if done:
            return params
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
        value = -of(raw)
        if value.requires_grad:
            value.backward()
        return value

    try:
        with torch.enable_grad():
            optimiser.step(loss)
        found = back(raw)
        with torch.no_grad():
            before, after = objective(params), objective(found)
    except (ModelError, torch.linalg.LinAlgError):
        return params  # the search strayed to where the program cannot run
    return found if after >= before else params


def ascend(
    objective: Objective,
    params: Params,
    parameters: Mapping[str, Parameter],
    steps: Mapping[str, Tensor],
    make: MakeOptimiser,
    count: int,
    rows: float,
) -> Params:
    """``count`` steps of a torch optimiser, and back along the way where they ended lower.

    Where no part of the way rises, L-BFGS takes over.
    """
    raw = to_search(parameters, params, steps)
    start = {n: v.detach().clone() for n, v in raw.items()}
    optimiser = make(list(raw.values()))

    def loss() -> float:
        optimiser.zero_grad()
        value = -objective(from_search(parameters, raw, steps)) / rows
        value.backward()
        return float(value.detach())

    try:
        with torch.enable_grad():
            for _ in range(count):
                optimiser.step(loss)
    except (ModelError, torch.linalg.LinAlgError):
        pass  # back from where the program cannot run
    with torch.no_grad():
        before = objective(params)
        for halving in range(HALVINGS):
            share = 0.5**halving
            ahead = {n: v + share * (raw[n] - v) for n, v in start.items()}
            found = from_search(parameters, ahead, steps)
            try:
                if objective(found) > before:
                    return found
            except (ModelError, torch.linalg.LinAlgError):
                continue
    return maximise(objective, params, parameters, steps, max_iter=count, rows=rows)


def _newton(
    objective: Objective,
    start: Params,
    max_iter: int,
    least: int,
    near: Callable[[Params], Objective] | None = None,
) -> tuple[Params, bool]:
    """Newton's method, never downwards: how far it came, and whether it did all that it could.

    Exact second derivatives cost one pass backwards for each coordinate, through the objective or
    through the one that ``near`` gives for a point.
    """
    sizes = [v.numel() for v in start.values()]
    point = torch.cat([v.detach().reshape(-1) for v in start.values()]).requires_grad_()

    def shaped(flat: Tensor) -> Params:
        parts = zip(start.items(), flat.split(sizes), strict=True)
        return {name: part.reshape(v.shape) for (name, v), part in parts}

    try:
        with torch.enable_grad():
            value = _valued(objective, shaped(point), near)
            first = None
            for i in range(max_iter):
                model = value if near is None else near(shaped(point.detach()))(shaped(point))
                (slope,) = torch.autograd.grad(model, point, create_graph=True)
                if not slope.requires_grad:
                    break
                curvature = torch.stack(
                    [
                        torch.autograd.grad(s, point, retain_graph=True, materialize_grads=True)[0]
                        for s in slope
                    ]
                )
                slope = slope.detach()
                if not bool(slope.isfinite().all()) or not bool(curvature.isfinite().all()):
                    break
                # Where it is curved upwards the step goes as far as if it were curved downwards;
                # along a ridge (of a sum, only the terms' differences count) hardly anywhere.
                values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
                values = values.abs()
                step = vectors @ (vectors.T @ slope / (values + RIDGE * values.max()))
                step = step * min(1.0, LONGEST / float(step.abs().max().clamp(min=1e-300)))
                gain = float(slope @ step)
                for _ in range(HALVINGS):
                    ahead = (point.detach() + step).requires_grad_()
                    reached = _valued(objective, shaped(ahead), near)
                    if reached >= value:
                        break
                    step = step / 2
                else:
                    return shaped(point.detach()), gain <= STUCK
                point, value, first = ahead, reached, first or gain
                if gain <= SETTLED or (i + 1 >= least and gain <= WORTH * first):
                    return shaped(point.detach()), True
            else:
                return shaped(point.detach()), True
    except (ModelError, torch.linalg.LinAlgError, RuntimeError):
        pass  # the program cannot run there, or cannot be differentiated twice
    return shaped(point.detach()), False


def _valued(objective: Objective, values: Params, near: object) -> Tensor:
    """The objective; without its graph where a local model is differentiated."""
    with torch.set_grad_enabled(near is None):
        return objective(values)
