"""How certain the estimates are: information matrices, standard errors, intervals, EM's rate.

With ``l(u) = log p(data | u) + log p(u)`` in unconstrained coordinates ``u`` at a maximum:

- observed information ``I = -l''(u)``, by double differentiation;
- Louis' formula ``I = I_c - I_m``: the complete-data information ``I_c = -Q''(u | u)`` less the
  missing information ``I_m = Var(complete-data score | data)``;
- the outer product ``sum_n w_n s_n s_n'`` of the rows' scores, less the curvature of the prior;
- the sandwich ``I^-1 (sum_n w_n s_n s_n') I^-1``, right where the model is not.

EM converges at the rate of the largest eigenvalue of ``I_c^-1 I_m``, where only assignments are
missing.

Source: Louis (1982); Oakes (1999); Dempster, Laird and Rubin (1977); White (1982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from pyro.distributions import constraints
from scipy.special import ndtri
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.derivatives import (
    Coordinates,
    by_rows,
    check_in_memory,
    coordinates,
    log_joint,
    log_likelihood,
)
from pyroem.derivatives import run as trace_of
from pyroem.diagnose import Sides, endless, in_words, labels_of, listed
from pyroem.errors import ModelError, SettingError
from pyroem.mstep.intervals import interval_of
from pyroem.mstep.update import expected_sum
from pyroem.problem import Problem
from pyroem.structure import Params
from pyroem.text import aligned

METHODS = ("observed", "louis", "outer", "sandwich")
STRIDE = 1e-4  # in unconstrained coordinates: of differences of an EM step
ROUNDING = 1e-12  # of a share: movement that is rounding
FLAT = 1e-9  # relative: singular values of what does not move a parameter
SINGULAR = 1e-10  # of the largest eigenvalue, after scaling to a unit diagonal
STEEP = 0.1  # length of a Newton step, in standard errors, that is still at the maximum
EDGE = 1e-6  # of an interval: what counts as its bound


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Standard errors of a fit's parameters, and what they came from.

    Attributes:
    ----------
    method
        Which information matrix: ``"observed"``, ``"louis"``, ``"outer"``, ``"sandwich"``.
    estimates, standard_errors
        By parameter, in the constrained space. NaN where there is no standard error.
    covariance
        Of all free elements (``labels``), by the delta method.
    information
        In unconstrained coordinates, of the directions that move a parameter.
    message
        Why there are no standard errors, or of which elements; empty where all is well.
    """

    method: str
    estimates: Params
    standard_errors: Params
    covariance: Tensor
    labels: tuple[str, ...]
    information: Tensor
    message: str
    supports: Mapping[str, tuple[float, float]]

    def intervals(
        self, level: float = 0.95, *, scale: str = "constrained"
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Confidence intervals ``(low, high)`` by parameter.

        ``estimate +- z standard_error`` (the delta method); with ``scale="unconstrained"`` a
        positive parameter's interval is symmetric in its logarithm and that of a number between
        bounds in its logit, so that it stays within its bounds.
        """
        check_level(level, "intervals")
        if scale not in ("constrained", "unconstrained"):
            raise SettingError(
                f"intervals: scale must be 'constrained' or 'unconstrained', got {scale!r}."
            )
        z = float(ndtri(0.5 + level / 2))
        found = {}
        for name, se in self.standard_errors.items():
            value = self.estimates[name]
            low, high = self.supports.get(name, (-math.inf, math.inf))
            if scale == "constrained" or (math.isinf(low) and math.isinf(high)):
                found[name] = (value - z * se, value + z * se)
            elif math.isinf(low) or math.isinf(high):
                bound, sign = (low, 1.0) if math.isinf(high) else (high, -1.0)
                away = sign * (value - bound)
                ends = [bound + sign * away * torch.exp(s * z * se / away) for s in (-sign, sign)]
                found[name] = (ends[0], ends[1])
            else:
                share = (value - low) / (high - low)
                own = se / ((high - low) * share * (1 - share))
                logit = torch.logit(share)
                ends = [low + (high - low) * torch.sigmoid(logit + s * z * own) for s in (-1, 1)]
                found[name] = (ends[0], ends[1])
        return found

    def to_dict(self, level: float = 0.95) -> dict[str, Any]:
        """Plain numbers: for each element its estimate, standard error and interval."""
        intervals = self.intervals(level)
        keys = ("estimate", "standard_error", "low", "high")
        numbers = [
            zip(*(part.reshape(-1).tolist() for part in parts), strict=True)
            for n in self.estimates
            for parts in ((self.estimates[n], self.standard_errors[n], *intervals[n]),)
        ]
        rows = {
            label: dict(zip(keys, own, strict=True))
            for label, own in zip(self.labels, chain(*numbers), strict=True)
        }
        return {"method": self.method, "level": level, "message": self.message, "elements": rows}

    def __str__(self) -> str:
        found = self.to_dict()["elements"]
        table = [["", "estimate", "std. error", "95% low", "95% high"]]
        table += [[label, *(f"{v:.6g}" for v in row.values())] for label, row in found.items()]
        head = f"Standard errors by the {_TITLES[self.method]}"
        return "\n".join([head, *aligned(table), *([self.message] if self.message else [])])

    def __repr__(self) -> str:
        return f"<Uncertainty by {self.method} of {len(self.labels)} elements>"


_TITLES = {
    "observed": "observed information",
    "louis": "observed information (Louis' formula)",
    "outer": "outer product of the scores",
    "sandwich": "sandwich",
}


@dataclass(frozen=True, eq=False)
class Curvature:
    """Information matrices in unconstrained coordinates: observed, complete, missing."""

    observed: Tensor
    complete: Tensor
    missing: Tensor


def check_level(level: float, what: str) -> None:
    """Raise where ``level`` is no confidence."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise SettingError(f"{what}: level must be between 0 and 1, got {level!r}.")


def check_free(problem: Problem, what: str) -> None:
    """Raise where there is no free parameter to speak of."""
    if not problem.free:
        raise ModelError(f"{what}: every parameter is fixed; none is left to speak of.")


def uncertainty(
    problem: Problem, params: Params, method: str = "observed", note: str = ""
) -> Uncertainty:
    """Standard errors at a maximum; see the module.

    Time and memory are those of one second derivative for each coordinate: P passes backwards over
    the enumerated trace of all rows. The message begins with ``note``.

    Raises:
    ------
    SettingError
        For an unknown method.
    ModelError
        For data in blocks or spread over processes, where every parameter is fixed, and where the
        rows' own scores are needed but the rows are not independent.
    """
    if method not in METHODS:
        raise SettingError(f"method: expected one of {', '.join(METHODS)}; got {method!r}.")
    check_in_memory(problem, "uncertainty")
    check_free(problem, "uncertainty")
    at = coordinates(problem, params)
    u, slope = _differentiable(problem, at)
    if method == "louis":
        information = curvature(problem, at).observed
    elif method == "outer":
        information = _outer(problem, at) - _prior_hessian(problem, at)
    else:
        information = -rows_of_derivatives(slope, u)
    slope = slope.detach()
    far = far_off(problem, at, information.diagonal())
    basis, bounds = directions(at, far)
    meat = basis.T @ _outer(problem, at) @ basis if method == "sandwich" else None
    notes = [note] if note else []
    if bounds:
        notes.append(
            f"{', '.join(bounds)} at a bound: no standard error there; others hold it fixed."
        )
    if far:
        notes.append(f"{in_words(problem, far)}: no standard error there; others hold it fixed.")
        bounds = [*bounds, *labels_of(far)]
    return _finish(at, method, basis, bounds, slope, information, meat, notes)


def _finish(
    at: Coordinates,
    method: str,
    basis: Tensor,
    bounds: list[str],
    slope: Tensor,
    information: Tensor,
    meat: Tensor | None,
    messages: list[str],
) -> Uncertainty:
    own = basis.T @ information @ basis
    own = 0.5 * (own + own.T)
    count = len(at.labels)
    covariance = torch.full((count, count), math.nan, dtype=own.dtype)
    scale = own.diagonal().abs().clamp(min=1e-300).sqrt()
    if not bool(own.isfinite().all()):
        messages.append("The information matrix is not finite: no standard errors.")
    elif len(own):
        values, vectors = torch.linalg.eigh(own / scale / scale[:, None])
        large = values.abs().max()
        if bool((values < -SINGULAR * large).any()):
            messages.append(
                "The information matrix has a negative eigenvalue: the fit is at no maximum. No"
                " standard errors."
            )
        else:
            null = values < SINGULAR * large
            kept = vectors[:, ~null] / scale[:, None]
            inverse = (kept / values[~null]) @ kept.T
            step = basis.T @ slope
            far = float((step @ inverse @ step).clamp(min=0).sqrt())
            if far > STEEP:
                messages.append(
                    f"The fit has not settled: a Newton step would move it by {far:.2g} standard"
                    " errors. Lower tol, or accelerate."
                )
            if meat is not None:
                inverse = inverse @ meat @ inverse
            spread = at.jacobian @ basis
            covariance = spread @ inverse @ spread.T
            if bool(null.any()):
                loose = spread @ (vectors[:, null] / scale[:, None])
                size = (spread**2 / scale**2).sum(1).sqrt().clamp(min=1e-300)
                lost = (loose.norm(dim=1) / size) > FLAT**0.5
                covariance[lost] = math.nan
                covariance[:, lost] = math.nan
                names = [
                    label for label, gone in zip(at.labels, lost.tolist(), strict=True) if gone
                ]
                messages.append(
                    f"The outer product of the scores is nearly singular: it does not determine"
                    f" {listed(names)}. Use method='observed'."
                    if method == "outer"
                    else "The information matrix is singular: the data do not determine"
                    f" {listed(names)}, of which only some combinations are known."
                )
    variances = covariance.diagonal().clone()
    for i, label in enumerate(at.labels):
        if label in bounds:
            variances[i] = math.nan
    errors, start = {}, 0
    for name in at.names:
        value = at.values[name]
        errors[name] = variances[start : start + value.numel()].sqrt().reshape(value.shape)
        start += value.numel()
    estimates = {n: at.values[n].detach() for n in at.names}
    supports = {n: s for n in at.names if (s := interval_of(at.parameters[n].constraint))}
    return Uncertainty(
        method, estimates, errors, covariance, at.labels, own, " ".join(messages), supports
    )


def far_off(problem: Problem, at: Coordinates, information: Tensor) -> Sides:
    """The elements that run to infinity or to a bound, with next to no information left."""
    suspects, start = {}, 0
    for name in at.names:
        width = at.widths[name]
        if width == at.values[name].numel():
            own = information[start : start + width].reshape(at.values[name].shape)
            suspects[name] = ~(own * problem.plan.steps[name] ** 2 > 1) & ~at_bound(at, name)
        start += width
    return endless(problem, at.values, suspects)


def directions(at: Coordinates, far: Sides | None = None) -> tuple[Tensor, list[str]]:
    """Orthonormal directions of ``u`` that move a parameter, and the elements at a bound.

    Those in ``far`` stay where they are.
    """
    size = len(at.vector)
    columns, bounds, row, column = [], list[str](), 0, 0
    for name in at.names:
        value, width = at.values[name], at.widths[name]
        part = at.jacobian[row : row + value.numel(), column : column + width]
        edge = at_bound(at, name)
        labels = at.labels[row : row + value.numel()]
        bounds += [
            label for label, low in zip(labels, edge.reshape(-1).tolist(), strict=True) if low
        ]
        if far and name in far:
            edge = edge | (far[name] != 0)
        part = torch.where(edge.reshape(-1, 1), 0.0, part)
        lengths = part.norm(dim=0)
        moving = lengths > 1e-5 * part.abs().max() if edge.any() else lengths > 0
        if at.parameters[name].kind is constraints.simplex:  # not by rounding alone
            moving = moving & (part.abs() > ROUNDING * value.detach().reshape(-1, 1)).any(0)
        unit = part[:, moving] / lengths[moving]
        right = torch.linalg.svd(unit, full_matrices=False)
        kept = right.Vh[right.S > FLAT].T / lengths[moving][:, None]
        kept = torch.linalg.qr(kept).Q if kept.numel() else kept
        own = torch.zeros((size, kept.shape[1]), dtype=part.dtype)
        index = column + moving.nonzero().reshape(-1)
        own[index] = kept
        columns.append(own)
        row, column = row + value.numel(), column + width
    return (torch.cat(columns, 1) if columns else torch.zeros((0, 0))), bounds


def at_bound(at: Coordinates, name: str) -> Tensor:
    """Which elements of a parameter stand at a bound of its support."""
    value, parameter = at.values[name].detach(), at.parameters[name]
    if parameter.kind is constraints.simplex:
        return value < EDGE
    low, high = interval_of(parameter.constraint) or (-math.inf, math.inf)
    if math.isinf(high):
        return value - low <= 1e-100  # where the closed forms stop
    return (value - low < EDGE * (high - low)) | (high - value < EDGE * (high - low))


def objective(problem: Problem, at: Coordinates) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the log-joint in unconstrained coordinates."""
    u, slope = _differentiable(problem, at)
    return slope.detach(), rows_of_derivatives(slope, u)


def _differentiable(problem: Problem, at: Coordinates) -> tuple[Tensor, Tensor]:
    """The coordinates, and the gradient of the log-joint there as a function of them."""
    u = at.vector.clone().requires_grad_()
    with torch.enable_grad():
        slope = _slope(log_joint(problem.structure, at.params(u), problem.row_weights), u)
    return u, slope


def curvature(problem: Problem, at: Coordinates) -> Curvature:
    """Complete-data and missing information, by the two derivatives of ``Q(u | v)`` at ``v = u``.

    With the posterior at ``v``, ``-d2Q / du du`` is the complete-data information and ``d2Q / du
    dv`` the variance of the complete-data score given the data (Oakes, 1999).
    """
    structure = problem.structure
    u, v = (at.vector.clone().requires_grad_() for _ in range(2))
    with torch.enable_grad():
        before = trace_of(structure, at.params(v))
        tensors = before.tensors()
        value = log_likelihood(structure, before, tensors, problem.row_weights)
        moving = {name: t for name, t in tensors.items() if t.requires_grad}
        weights = torch.autograd.grad(value, list(moving.values()), create_graph=True)
        after = trace_of(structure, at.params(u))
        q = structure.log_prior(after)
        for name, weight in zip(moving, weights, strict=True):
            q = q + expected_sum(weight, after.factors[name].tensor)
        slope = _slope(q, u)
    complete, missing = -rows_of_derivatives(slope, u), rows_of_derivatives(slope, v)
    return Curvature(complete - missing, complete, missing)


def _slope(total: Tensor, u: Tensor) -> Tensor:
    if not total.requires_grad:
        return torch.zeros_like(u)
    (found,) = torch.autograd.grad(total, u, create_graph=True, allow_unused=True)
    return torch.zeros_like(u) if found is None else found


def rows_of_derivatives(slope: Tensor, by: Tensor) -> Tensor:
    """The derivative of every element of ``slope``: rows."""
    rows = []
    for element in slope:
        found = None
        if element.requires_grad:
            (found,) = torch.autograd.grad(element, by, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(by) if found is None else found)
    return torch.stack(rows).detach() if rows else torch.zeros((0, len(by)), dtype=by.dtype)


def scores(problem: Problem, at: Coordinates) -> Tensor:
    """The gradient of every row's log-likelihood: rows by coordinates."""
    u = at.vector.clone().requires_grad_()
    with torch.enable_grad():
        rows = by_rows(problem, trace_of(problem.structure, at.params(u)))
        if rows is None:
            raise ModelError(
                "The rows are not independent given the parameters, so they have no scores of their"
                " own. Use method='observed'."
            )
        rows = rows.reshape(-1)
        weights = torch.zeros_like(rows).requires_grad_()
        slope = _slope((rows * weights).sum(), u)
    return rows_of_derivatives(slope, weights).T


def _outer(problem: Problem, at: Coordinates) -> Tensor:
    found, weights = scores(problem, at), problem.row_weights
    own = found if weights is None else found * weights.reshape(-1, 1)
    return own.T @ found


def _prior_hessian(problem: Problem, at: Coordinates) -> Tensor:
    u = at.vector.clone().requires_grad_()
    with torch.enable_grad():
        slope = _slope(problem.structure.log_prior(trace_of(problem.structure, at.params(u))), u)
    return rows_of_derivatives(slope, u)


def rate_matrix(problem: Problem, params: Params) -> Tensor:
    """EM's own derivative at a fixed point, in unconstrained coordinates: ``I_c^-1 I_m``.

    Its eigenvalues lie between 0 and 1; the largest is the rate at which EM converges: that part
    of the distance which an iteration leaves. Of directions that the complete data leave open
    nothing is said. Where a family has latent variables of its own (the scales of Student's t),
    which EM does not know either, it is found by central differences of an EM step.

    Raises:
    ------
    ModelError
        Where every parameter is fixed, or the fit is at no maximum of the complete data.
    """
    check_in_memory(problem, "rate_matrix")
    check_free(problem, "rate_matrix")
    at = coordinates(problem, params)
    basis, _ = directions(at)
    if any(site.family.latent is not None for site in problem.plan.reading.sites.values()):
        return _jacobian_of_a_step(problem, at, basis)
    found = curvature(problem, at)
    complete, missing = basis.T @ found.complete @ basis, basis.T @ found.missing @ basis
    complete = 0.5 * (complete + complete.T)
    scale = complete.diagonal().abs().clamp(min=1e-300).sqrt()
    values, vectors = torch.linalg.eigh(complete / scale / scale[:, None])
    kept = values > SINGULAR * values.abs().max()
    if bool((values < -SINGULAR * values.abs().max()).any()):
        raise ModelError(
            "rate_matrix: the complete-data information has a negative eigenvalue: the fit is at no"
            " maximum."
        )
    determined = vectors[:, kept] / scale[:, None]
    return (determined / values[kept]) @ determined.T @ missing


def _jacobian_of_a_step(problem: Problem, at: Coordinates, basis: Tensor) -> Tensor:
    """The derivative of an EM step along the columns of ``basis``, by central differences."""

    def step(u: Tensor) -> Tensor:
        params = {name: value.detach() for name, value in at.params(u).items()}
        with isolated(problem.structure.program.dtype, 0), torch.no_grad():
            new = problem.m_step(params, problem.e_step(params)[0])
        return Coordinates(at.parameters, at.names, {**at.values, **new}).vector

    columns = []
    for direction in basis.T:
        away = STRIDE * direction
        columns.append((step(at.vector + away) - step(at.vector - away)) / (2 * STRIDE))
    return basis.T @ torch.stack(columns, 1)
