"""Exponential families: one short entry each, and the registry that users extend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro.distributions import ZeroInflatedDistribution
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyroem._pyro import Incomplete, unwrap
from pyroem.families import forms, further, generic, latent, standard
from pyroem.families.family import (
    Arguments,
    Coordinate,
    Family,
    Statistics,
    exponential_family,
    flat,
    natural_parameters,
    register_family,
    registered,
)
from pyroem.families.incomplete import incomplete


def family_of(distribution: Any) -> Family | None:
    """The family registered for the class of a bare distribution, or found for it.

    A distribution that transforms another one, element by element, is that one's family in the
    transformed data; one with extra zeros has that of the distribution inside.
    """
    if isinstance(distribution, Incomplete):
        inner_family = family_of(distribution.base_dist)
        return None if inner_family is None else incomplete(inner_family)
    found = registered(type(distribution))
    transforms = isinstance(distribution, TransformedDistribution)
    if found is not None or not (transforms or isinstance(distribution, ZeroInflatedDistribution)):
        return found
    inner, events, masks = unwrap(distribution.base_dist)
    base = family_of(inner)
    if not transforms:
        return None if base is None else latent.inflated(base)
    elementwise = all(
        t.bijective and t.domain.event_dim == t.codomain.event_dim == 0
        for t in distribution.transforms
    )
    if base is None or base.base_measure is None or base.transform is not None:
        return None
    return _transformed(base) if elementwise and not events and not masks else None


def _transformed(base: Family) -> Family:
    def inner(d: Any) -> Any:
        return unwrap(d.base_dist)[0]

    def back(d: Any, x: Tensor) -> Tensor:
        for t in reversed(d.transforms):
            x = t.inv(x)
        return x

    def measure(d: Any, y: Tensor) -> Tensor:
        assert base.base_measure is not None
        total = base.base_measure(inner(d), y)
        for t in d.transforms:
            x = t(y)
            total = total - t.log_abs_det_jacobian(y, x)
            y = x
        return total

    packed = base.packed
    return replace(
        base,
        arguments=lambda d: base.arguments(inner(d)),
        statistics=lambda d, y: base.statistics(inner(d), y),
        base_measure=measure,
        transform=back,
        packed=None if packed is None else lambda d, y, empty: packed(inner(d), y, empty),
    )


def families_of(distribution: Any) -> tuple[Family, ...]:
    """The families that may speak for a bare distribution, the best first."""
    found = (family_of(distribution), generic.generic(distribution))
    return tuple(f for f in found if f is not None)


__all__ = [
    "Arguments",
    "Coordinate",
    "Family",
    "Statistics",
    "exponential_family",
    "families_of",
    "family_of",
    "flat",
    "forms",
    "further",
    "generic",
    "latent",
    "natural_parameters",
    "register_family",
    "standard",
]
