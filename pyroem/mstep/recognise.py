"""Recognising what stands at a site from two runs of the program at random points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import Enumerated, unwrap
from pyroem.errors import ModelError
from pyroem.families import Family, families_of, family_of
from pyroem.families.generic import generic
from pyroem.mstep.selection import find
from pyroem.mstep.sites import Argument, Recorded, SiteModel, narrow, pad
from pyroem.structure import Params, Structure, base_mask


def _varying(a: Tensor, event_dim: int, rank: int) -> frozenset[int]:
    a = pad(a.detach(), rank, event_dim)
    found = set()
    for dim in range(rank):
        if a.shape[dim] > 1:
            first = a.narrow(dim, 0, 1)
            close = (a - first).abs() <= 1e-12 * (a.abs() + first.abs())
            if not (close | (a == first) | (a.isnan() & first.isnan())).all():
                found.add(dim)
    return frozenset(found)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaN to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@dataclass(frozen=True)
class Probes:
    """The program at two random points, and at the first with each parameter moved alone."""

    structure: Structure
    points: tuple[Params, Params]
    traces: tuple[Enumerated, Enumerated]
    moved: Mapping[str, Enumerated]


def read_site(probes: Probes, name: str) -> SiteModel | None:
    """The site in the first family that its distribution has and that fits."""
    nodes = [t.trace.nodes[name] for t in probes.traces]
    bases = tuple(unwrap(node["fn"])[0] for node in nodes)
    if name in probes.structure.parameters or not same(nodes[0]["value"], nodes[1]["value"]):
        return None
    for family in families_of(bases[0]):
        if not (family.by_row and name in probes.structure.assignments):
            found = _read_as(family, probes, name)
            if found is not None:
                return found
    return None


def read_prior(probes: Probes, name: str) -> SiteModel | None:
    """A prior as a site whose data is the parameter."""
    node = probes.traces[0].trace.nodes[name]
    base, _, masks = unwrap(node["fn"])
    family = family_of(base)
    if family is None or family.latent is not None or family.by_row:
        return None
    if masks or base_mask(node) is not None or float(node["scale"]) != 1.0:
        return None
    site = _read_as(family, probes, name)
    if site is None or not _is_rebuilt(site, base, node["value"]):
        return None
    centre = None if site.centre is None else torch.zeros(base.event_shape, dtype=site.dtype)
    return replace(site, centre=centre, is_prior=True)


def _read_as(family: Family, probes: Probes, name: str) -> SiteModel | None:
    nodes = [t.trace.nodes[name] for t in probes.traces]
    base, events, _ = unwrap(nodes[0]["fn"])
    bases = (base, unwrap(nodes[1]["fn"])[0])
    value = nodes[0]["value"]
    if family.transform is not None:
        seen = [family.transform(b, value) for b in bases]
        if not same(*seen):
            return None  # the transform depends on a parameter
        value = seen[0]
    fn = nodes[0]["fn"]
    batch = tuple(fn.batch_shape + fn.event_shape[:events])
    own = tuple(value.shape[: value.dim() - len(base.event_shape)])
    mask = base_mask(nodes[0]) if name not in probes.structure.assignments else None
    shape = tuple(torch.broadcast_shapes(batch, own, mask.shape if mask is not None else ()))
    rank = len(shape)
    try:
        canonical = [family.arguments(b) for b in bases]
    except AttributeError as error:
        raise ModelError(f"Site '{name}': the family of {type(base).__name__}: {error}") from error
    others = {
        p: family.arguments(unwrap(t.trace.nodes[name]["fn"])[0]) for p, t in probes.moved.items()
    }
    arguments = {}
    for key, first in canonical[0].items():
        event_dim = family.dims(key)
        second = canonical[1][key]
        varies = _varying(first, event_dim, rank) | _varying(second, event_dim, rank)
        cut = (narrow(first, event_dim, rank, varies), narrow(second, event_dim, rank, varies))
        hangs = frozenset(p for p, args in others.items() if not same(first, args[key]))
        selection = None
        for coordinate in family.coordinates:
            if coordinate.argument == key and selection is None:
                selection = find(coordinate, cut, probes.points, sorted(hangs))
        arguments[key] = Argument(key, event_dim, varies, hangs, selection)
    frames = {f.name: f.dim for f in nodes[0]["cond_indep_stack"] if f.vectorized}
    row_plates = probes.structure.row_plates
    unit_dims = frozenset(rank - events + dim for p, dim in frames.items() if p in row_plates)
    x = pad(value, rank, len(base.event_shape)).to(probes.structure.program.dtype)
    mask = None if mask is None else pad(mask.to(x.dtype), rank, 0)
    centre = None if family.location is None else torch.zeros((), dtype=x.dtype)  # see scaled
    data = Recorded(family, base, x, rank, unit_dims)
    again = replace(data, base=bases[1])
    if family.latent is None:
        fixed = zip(data.few, again.few, strict=True)
    else:
        given = family.given or (lambda d, x: ())
        fixed = zip(given(bases[0], x), given(bases[1], x), strict=True)
    if not all(same(a, b) for a, b in fixed):
        return None  # they depend on a parameter: a number of trials, say
    site = SiteModel(name, family, shape, events, arguments, data, mask, centre, None, unit_dims)
    return None if family is generic(base) and not _is_rebuilt(site, base, x) else site


def _is_rebuilt(site: SiteModel, base: Any, value: Tensor) -> bool:
    """Whether a distribution that was built again from its arguments is the same."""
    try:
        own = base.log_prob(value)
        again = type(base)(**site.arguments_in(base)).log_prob(value)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return False
    close = torch.isclose(again, own.expand(again.shape), rtol=1e-6, atol=1e-6, equal_nan=True)
    return bool(close.all())


def confirmed(site: SiteModel, point: Params, trace: Enumerated) -> SiteModel:
    """Drop the selections that do not hold at ``point``."""
    base, _, _ = unwrap(trace.trace.nodes[site.name]["fn"])
    arguments = {}
    for key, argument in site.arguments.items():
        own = argument.selection
        if own is not None and not own.holds(point, site.argument_in(base, key)):
            argument = replace(argument, selection=None)
        arguments[key] = argument
    return replace(site, arguments=arguments)


def scaled(sites: dict[str, SiteModel]) -> dict[str, SiteModel]:
    """Give sites with a location a common centre and scale, pooled over sites that share it.

    Statistics are then taken around the centre, so that data far from the origin loses no digits.
    """
    groups: dict[Any, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}
    for name, site in sites.items():
        if site.family.location is not None:
            moments = _moments(site)
            hangs = frozenset().union(*(a.parameters for a in site.arguments.values()))
            group = groups.setdefault((id(site.family), hangs, moments[0].shape), {})
            group[name] = moments
    result = dict(sites)
    for group in groups.values():
        count, mean, spread = (torch.stack(m) for m in zip(*group.values(), strict=True))
        total = count.sum(0).clamp(min=1)
        centre = (count * mean).sum(0) / total
        variance = (spread + count * (mean - centre) ** 2).sum(0) / total
        # A constant column has no scale of its own; its magnitude stands in.
        constant = variance <= (1e-13 * centre) ** 2
        magnitude = torch.where(centre == 0, 1.0, (1e-3 * centre) ** 2)
        scale = torch.where(constant, magnitude, variance)
        for name in group:
            site = sites[name]
            x = site.data.value
            at = centre.reshape((1,) * (x.dim() - centre.dim()) + centre.shape)
            data, scale_at = replace(site.data, centre=at), scale.reshape(at.shape)
            result[name] = replace(site, centre=at, scale=scale_at, data=data)
    return result


def _moments(site: SiteModel) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squares of each feature, over the rows and what they share."""
    x, base = site.data.value, site.data.base
    rank = len(site.shape)
    reduce = [
        d for d in range(rank) if d not in site.keep or d in site.unit_dims or x.shape[d] == 1
    ]
    mask = torch.ones_like(x)
    if site.mask is not None:
        mask = mask * site.mask.reshape(site.mask.shape + (1,) * len(base.event_shape))
    if site.family.partial is not None:
        mask = mask * site.family.partial.seen(base)
    count = mask.sum(reduce, keepdim=True)
    mean = (x * mask).sum(reduce, keepdim=True) / count.clamp(min=1)
    spread = ((x - mean) ** 2 * mask).sum(reduce, keepdim=True)
    lead = next((i for i, n in enumerate(mean.shape) if n > 1), mean.dim())
    shape = mean.shape[lead:]
    return count.reshape(shape), mean.reshape(shape), spread.reshape(shape)
