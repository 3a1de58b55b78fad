"""Which values a parameter may take, as far as a closed form has to know."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import distributions as dist
from torch.distributions import constraints

from pyroem.constraints import structure_of
from pyroem.families import forms
from pyroem.families.forms import Form
from pyroem.structure import Parameter, elementary


def bounds_of(parameter: Parameter, form: Form) -> tuple[float, float] | None:
    """The interval of a scalar kernel, or ``(-inf, inf)`` where a block's constraint suits it."""
    constraint = parameter.kind
    shared = structure_of(constraint)
    if shared is not None:
        wanted_form = forms.COVARIANCE if shared.event_dim == 3 else forms.INVERSE_RATE
        suits = form is wanted_form and len(parameter.shape) == shared.event_dim
        return (0.0, torch.inf) if suits else None
    if "scalar" in form.domain:
        free = (-torch.inf, torch.inf)
        return free if is_ordered(parameter) else interval_of(constraint)
    kinds: dict[str, Any] = {
        "simplex": constraints.simplex,
        "positive_definite": constraints.positive_definite,
        "lower_cholesky": (constraints.lower_cholesky, dist.constraints.softplus_lower_cholesky),
    }
    for domain in form.domain:
        if domain == "real_vector" and interval_of(constraint) == (-torch.inf, torch.inf):
            return -torch.inf, torch.inf
        if domain == "circle" and interval_of(constraint) in (
            (-torch.inf, torch.inf),
            (-math.pi, math.pi),
        ):
            return -torch.inf, torch.inf
        if domain == "positive_vector" and interval_of(constraint) == (0.0, torch.inf):
            return -torch.inf, torch.inf
        wanted = kinds.get(domain, ())
        if constraint in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return -torch.inf, torch.inf
    return None


def is_ordered(parameter: Parameter) -> bool:
    """Whether the elements increase along the last dim."""
    return isinstance(parameter.kind, type(dist.constraints.ordered_vector))


def interval_of(constraint: Any) -> tuple[float, float] | None:
    """The bounds of an elementwise constraint; None where it is none."""
    constraint = elementary(constraint)
    if constraint in (constraints.real, constraints.real_vector):
        return -torch.inf, torch.inf
    if constraint in (
        constraints.positive,
        constraints.nonnegative,
        dist.constraints.softplus_positive,
    ):
        return 0.0, torch.inf
    lower = getattr(constraint, "lower_bound", None)
    upper = getattr(constraint, "upper_bound", None)
    known = (
        constraints.greater_than,
        constraints.greater_than_eq,
        constraints.less_than,
        constraints.interval,
        constraints.half_open_interval,
    )
    if not isinstance(constraint, tuple(k for k in known if isinstance(k, type))):
        return None
    bounds = [torch.as_tensor(b) for b in (lower, upper) if b is not None]
    if any(b.numel() != 1 for b in bounds):
        return None
    return (
        -torch.inf if lower is None else float(lower),
        torch.inf if upper is None else float(upper),
    )
