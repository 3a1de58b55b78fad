"""Newton's method for the coefficients of regressions, all of a predictor's at once.

With ``eta = c + X theta`` in a coordinate whose kernel is ``k(eta)``, the expected log-joint is
``sum_cells k(eta) + log p(theta)``. Each step solves

    (X' diag(-k'') X + A) step = X' k' + d log p(theta):

weighted least squares where the kernel is a parabola, which one step maximises; elsewhere
iteratively reweighted least squares (Nelder and Wedderburn, 1972), with ``-k''`` or its
expectation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyroem._pyro import unwrap
from pyroem.families import forms
from pyroem.mstep.affine import Affine
from pyroem.mstep.plan import Plan
from pyroem.mstep.regression import ROTATED, Regression, Term, accumulate, places, spectrum
from pyroem.mstep.runs import Expected, Run, coefficients_at, prior_coefficients
from pyroem.mstep.sites import seen
from pyroem.structure import Params

HALVINGS = 20
WELL = 1e-4  # the smallest eigenvalue of what is solved without a second look
NEAR = 1e-3
SETTLED = 1e-18  # nats a row that a step promises


def solve(
    plan: Plan, regression: Regression, params: Params, expected: Expected, iterations: int
) -> Params:
    """The coefficients at their maximum, the other parameters held fixed.

    Directions that nothing depends on (covariates that are sums of others) are left out: of all
    maximisers, the one nearest to zero. Coefficients whose cells have no weight keep their values.
    """
    problem = _Problem(plan, regression, params, expected)
    theta = problem.nearest(problem.theta(params))
    value, slope, curvature = problem.expand(theta)
    if not math.isfinite(value):  # coefficients whose predictors overflow
        theta = problem.origin(theta)
        value, slope, curvature = problem.expand(theta)
    rows = plan.structure.num_rows
    for _ in range(iterations):
        step, conditioned = _least_squares(curvature, slope)
        reach = problem.reach(step)
        step = step * min(1.0, 1 / max(reach, 1e-300))
        gain = float(slope @ step)
        if not gain > SETTLED * rows:  # the last digits; not where there is no end
            theta = theta + step if math.isfinite(gain) and reach < NEAR else theta
            break
        if regression.exact and conditioned:
            theta = theta + step
            break
        for _ in range(HALVINGS):
            ahead = theta + step
            reached = problem.expand(ahead)
            if reached[0] >= value:
                break
            step = step / 2
        else:
            break
        theta, (value, slope, curvature) = ahead, reached
    if not math.isfinite(value):
        return params
    return {**params, **{n: v.to(params[n].dtype) for n, v in problem.params(theta).items()}}


def slope_of(plan: Plan, regression: Regression, params: Params, expected: Expected) -> Params:
    """The gradient of the expected log-joint by the coefficients."""
    problem = _Problem(plan, replace(regression, basis=None), params, expected)
    return problem.named(problem.expand(problem.theta(params))[1])


def flattest(plan: Plan, regression: Regression, params: Params, expected: Expected) -> float:
    """The smallest curvature in any direction of the coefficients, beside that of even odds.

    It falls to zero where coefficients run to infinity: where the data are separated.
    """
    problem = _Problem(plan, regression, params, expected)
    even = torch.zeros_like(problem.prior[1])
    for affine, found in zip(problem.affine, problem.coefficients, strict=True):
        form = affine.coordinate.form
        if form is forms.LOGIT:
            second = (found[0] + found[1]) / 4
        elif form is forms.LOG_RATE:
            second = found[1] * (found[0].sum() / found[1].sum())
        elif form is forms.LOGITS:
            k = found[0].shape[-1]
            eye = torch.eye(k).to(found[0]) - 1 / k
            second = found[0].sum(-1)[..., None, None] * eye / k
        else:
            return 1.0
        where = problem.where(affine)
        accumulate(affine, where, torch.zeros_like(found[0]), second, None, even)
    if regression.basis is None:
        even = torch.where(problem.free & problem.free.unsqueeze(1), even, 0.0)
    values, vectors, scale = spectrum(even)
    kept = values > 1e-10 * values.max()
    if not bool(kept.any()):
        return 1.0
    basis = vectors[:, kept] / values[kept].sqrt() / scale.unsqueeze(1)
    own = problem.expand(problem.theta(params))[2]
    return float(torch.linalg.eigvalsh(basis.T @ own @ basis).min())


def _least_squares(curvature: Tensor, slope: Tensor) -> tuple[Tensor, bool]:
    """``curvature^-1 slope``, nothing along directions without curvature; scaled, so that units of
    covariates do not matter. Also whether it is exact, up to rounding.
    """
    values, vectors, scale = spectrum(curvature)
    eps = torch.finfo(curvature.dtype).eps
    kept = values > 10 * len(values) * eps * values.max().clamp(min=0)
    along = vectors.T @ (slope / scale)
    step = (vectors @ torch.where(kept, along / torch.where(kept, values, 1.0), 0.0)) / scale
    return step, bool((values[kept] > WELL * values.max()).all())


class _Problem:
    """The expected log-joint as a function of the coefficients as one vector."""

    def __init__(self, plan: Plan, regression: Regression, params: Params, expected: Expected):
        self.plan, self.regression, self.expected = plan, regression, expected
        self.current, self.run = params, Run(plan, params)
        self.prior = self._prior()
        # The kernels' coefficients depend on the other arguments only.
        self.coefficients = [self._coefficients(term) for term in regression.terms]
        self.constants = [
            loose_constant(plan, term, params) if term.affine.loose else None
            for term in regression.terms
        ]
        self.idle = [_idle(found) for found in self.coefficients]
        held = (plan.structure.parameters[n].held for n in regression.offsets)
        masks = zip(held, (params[n] for n in regression.offsets), strict=True)
        self.free = torch.cat(
            [(torch.zeros_like(v) if h is None else h.to(v)).reshape(-1) == 0 for h, v in masks]
        )
        self.start = torch.cat([params[n].reshape(-1) for n in regression.offsets]).double()
        self.affine = [term.affine for term in regression.terms]
        if regression.basis is not None:
            still = {**params, **self.named(torch.where(self.free, 0.0, self.start))}
            pairs = zip(self.affine, self.constants, strict=True)
            self.constants = [affine.value(still, constant) for affine, constant in pairs]
            self.affine = list(regression.rotated)
            linear, quadratic = self.prior
            inside = regression.basis
            linear = linear - quadratic @ torch.where(self.free, 0.0, self.start)
            self.prior = inside.T @ linear, inside.T @ quadratic @ inside

    def theta(self, params: Params) -> Tensor:
        """What is searched for: the coefficients, or their coordinates in the basis."""
        theta = torch.cat([params[n].reshape(-1) for n in self.regression.offsets]).double()
        basis = self.regression.basis
        if basis is None:
            return theta
        scale = 1 / basis.norm(dim=1).clamp(min=1e-300)
        return torch.linalg.lstsq(
            basis * scale.unsqueeze(1), (theta * scale * self.free).unsqueeze(1), driver="gelsd"
        ).solution.squeeze(1)

    def origin(self, theta: Tensor) -> Tensor:
        """Where all free coefficients are zero."""
        if self.regression.basis is not None:
            return torch.zeros_like(theta)
        return torch.where(self.free, 0.0, theta)

    def nearest(self, theta: Tensor) -> Tensor:
        """The coefficients without what changes nothing."""
        null = self.regression.null
        return theta if self.regression.basis is not None else theta - null @ (null.T @ theta)

    def params(self, theta: Tensor) -> Params:
        """The coefficients of a point of the search."""
        if self.regression.basis is not None:
            theta = self.regression.basis @ theta
        null = self.regression.null
        return self.named(torch.where(self.free, theta - null @ (null.T @ theta), self.start))

    def named(self, theta: Tensor) -> Params:
        """A vector of coefficients by their names."""
        result = {}
        for name in self.regression.offsets:
            old, at = self.current[name], self.regression.offsets[name]
            result[name] = theta[at : at + old.numel()].reshape(old.shape)
        return result

    def _coefficients(self, term: Term) -> tuple[Tensor, ...]:
        coordinate = term.affine.coordinate
        found = coefficients_at(term.site, coordinate, self.run, self.expected)
        dims = coordinate.form.coefficient_dims
        return tuple(term.affine.spread(c, d).double() for c, d in zip(found, dims, strict=True))

    def _prior(self) -> tuple[Tensor, Tensor]:
        """Normal priors: the linear and the quadratic coefficients."""
        linear = torch.zeros(self.regression.size, dtype=torch.float64)
        quadratic = torch.zeros((self.regression.size, self.regression.size)).to(linear)
        for name in self.regression.offsets:
            if not self.plan.structure.parameters[name].has_prior:
                continue
            prior, value = self.run.prior(name), self.current[name]
            base, _, _ = unwrap(prior["fn"])
            vector = bool(base.event_shape)
            form = forms.VECTOR_LOCATION if vector else forms.LOCATION
            b, a = prior_coefficients(form, prior, value)
            at = slice(self.regression.offsets[name], self.regression.offsets[name] + value.numel())
            linear[at] = b.expand(value.shape).reshape(-1)
            if vector:
                a = a.expand((*value.shape, value.shape[-1])).reshape((-1, *a.shape[-2:]))
                quadratic[at, at] = torch.block_diag(*a)
            else:
                quadratic[at, at] = torch.diag(a.expand(value.shape).reshape(-1))
        return linear, quadratic

    def reach(self, step: Tensor) -> float:
        """How far a step moves a predictor, at most, beside how far its kernel allows."""
        reach = 0.0
        for affine in self.affine:
            longest = affine.coordinate.form.longest
            if longest < math.inf:
                still = {n: torch.zeros_like(v) for n, v in self.current.items()}
                own = self._point(step) if self.regression.basis is not None else self.named(step)
                way = affine.value({**still, **own}, torch.zeros_like(affine.constant))
                reach = max(reach, float(way.abs().max()) / longest)
        return reach

    def _point(self, theta: Tensor) -> Params:
        """What the predictors are evaluated at."""
        if self.regression.basis is not None:
            return {ROTATED: theta}
        return {**self.current, **self.named(theta)}

    def where(self, affine: Affine) -> Tensor:
        """The place of each of a predictor's elements in what is searched for."""
        if self.regression.basis is not None:
            return torch.arange(self.regression.basis.shape[1])
        return places(affine, self.regression.offsets)

    def expand(self, theta: Tensor) -> tuple[float, Tensor, Tensor]:
        """The value, its slope, and the curvature downwards."""
        params = self._point(theta)
        b, a = self.prior
        value = theta @ b - 0.5 * theta @ a @ theta
        slope, curvature = b - a @ theta, a.clone()
        for affine, found, constant, idle in zip(
            self.affine, self.coefficients, self.constants, self.idle, strict=True
        ):
            expansion = affine.coordinate.form.expansion
            assert expansion is not None
            t = torch.where(idle, 1.0, affine.value(params, constant))
            kernel, first, second = expansion(t, *found)
            value = value + kernel.sum()
            accumulate(affine, self.where(affine), first, second, slope, curvature)
        if self.regression.basis is None:
            slope = torch.where(self.free, slope, 0.0)
            curvature = torch.where(self.free & self.free.unsqueeze(1), curvature, 0.0)
        number = float(value)
        return (number if number == number else -math.inf), slope, curvature


def _idle(coefficients: tuple[Tensor, ...]) -> Tensor:
    """The cells without weight, which may be anywhere (rows that are masked, say)."""
    first = coefficients[0]
    events = coefficients[-1].dim() - 2
    result = torch.ones(first.shape[:2], dtype=torch.bool)
    for c in coefficients:
        result = result & (c == 0).flatten(2).all(2) if c.dim() > 2 else result & (c == 0)
    return result.unsqueeze(-1) if events else result


def loose_constant(plan: Plan, term: Term, params: Params) -> Tensor:
    """What a predictor adds to its coefficients' part, at ``params``."""
    affine = term.affine
    at_base = Run(plan, {**params, **affine.base})
    t = affine.coordinate.forward(term.site.argument_in(at_base.base(term.site), term.key))
    t = seen(term.site, t, affine.events)
    whole = affine.value(affine.base, torch.zeros_like(affine.constant))
    return affine.spread(t, affine.events) - whole
