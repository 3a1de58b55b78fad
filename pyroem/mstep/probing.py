"""Probing: the program is run at two random points of the parameter space, at a third far from
them, and once for each parameter moved alone; what its distributions are given is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions.constraints import is_dependent

from pyroem._pyro import Enumerated, isolated, site_log_prob, unwrap
from pyroem.errors import DataError, PyroemError
from pyroem.mstep.intervals import interval_of
from pyroem.mstep.landmarks import Landmark, find_landmark
from pyroem.mstep.recognise import Probes, confirmed, read_prior, read_site, same, scaled
from pyroem.mstep.sites import SiteModel
from pyroem.structure import Parameter, Params, Structure, base_mask

LEVELS = (1.0, 2.0**-7, 2.0**-14, 2.0**-21)  # of the size of probes, where larger ones overflow
HUGE = 1e60


def probe(structure: Structure, seed: int, level: float = 1.0) -> Params:
    """A random point of the parameter space, in the neighbourhood of the program's own values.

    Coordinates without bounds are multiplied by ``level``.
    """
    generator = torch.Generator().manual_seed(seed)
    point = {}
    for name, parameter in structure.parameters.items():
        parameter = replace(parameter, held=None)
        raw = parameter.unconstrain(parameter.value).clamp(-5, 5)
        noise = torch.rand(raw.shape, generator=generator, dtype=torch.float64) - 0.5
        point[name] = parameter.constrain((raw + noise.to(raw)) * _level_of(parameter, level))
    return point


def _level_of(parameter: Parameter, level: float) -> float:
    return level if interval_of(parameter.constraint) == (-torch.inf, torch.inf) else 1.0


def _tame(trace: Enumerated) -> bool:
    """Whether all distributions have arguments that numbers can tell: no exponential overflowed."""
    for name in trace.factors:
        node = trace.trace.nodes[name]
        base, _, _ = unwrap(node["fn"])
        mask = base_mask(node)
        supports = getattr(base, "arg_constraints", {})
        for key, support in supports.items() if isinstance(supports, Mapping) else ():
            value = getattr(base, key, None)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if bool(value.isnan().any()) and mask is None:
                return False
            if mask is not None and not is_dependent(support) and support.event_dim == 0:
                value, seen = torch.broadcast_tensors(value, mask)
                value = value[seen]
                if bool(value.isnan().any()):
                    return False
            huge = (value.abs() > HUGE) | value.isinf()
            if interval_of(support) == (0.0, torch.inf):
                huge = huge | (value < 1 / HUGE)
            if bool(huge.any()):
                return False
    return True


def _probes(structure: Structure) -> tuple[tuple[Params, Params], tuple[Enumerated, Enumerated]]:
    """Two random points and the program there: small ones where large ones overflow."""
    first = None
    for level in LEVELS:
        points = probe(structure, 1, level), probe(structure, 2, level)
        traces = structure.enumerate(points[0]), structure.enumerate(points[1])
        if all(map(_tame, traces)):
            return points, traces
        first = first or (points, traces)
    assert first is not None
    for name in first[1][0].factors:
        _check_missing(name, first[1])
    return first


def _check_missing(name: str, traces: tuple[Enumerated, Enumerated]) -> None:
    """Raise where what a distribution is given is no number, wherever the parameters are."""
    nodes = [trace.trace.nodes[name] for trace in traces]
    missing = [site_log_prob(node).isnan() for node in nodes]
    both = missing[0] & missing[1]
    if bool(both.any()):
        index = tuple(int(i) for i in both.nonzero()[0])
        raise DataError(
            f"Site '{name}': its log-probability is NaN at any parameters, at index {index} of"
            f" {tuple(both.shape)} ({int(both.sum())} such). Is a covariate missing there? Leave"
            " the row out, or mask it."
        )


def opposite(structure: Structure, point: Params) -> Params:
    """A point on the other side of zero, where ``abs``, ``clamp`` and ``relu`` show themselves."""
    opposite = {}
    for name, parameter in structure.parameters.items():
        parameter = replace(parameter, held=None)
        raw = parameter.unconstrain(point[name])
        away = min(0.5, float(raw.abs().max())) if raw.numel() else 0.5
        opposite[name] = parameter.constrain(-raw - away * raw.sign())
    return opposite


def _try_far(structure: Structure, far: Params) -> Enumerated | None:
    """The program there, if it can run there: it may have demands that no constraint states."""
    try:
        return structure.enumerate(far)
    except (PyroemError, ArithmeticError, ValueError, RuntimeError):
        return None


@dataclass(frozen=True)
class Reading:
    """All that probing found.

    ``sites`` are those with a family; ``dependence`` gives, for every factor site and every prior,
    the parameters it depends on (a prior's own value apart); ``location_changes`` how far a site's
    location moved when a parameter went from the first point to the second; ``landmarks`` where
    the data of the sites without a family lies; ``priors`` are those that depend on other
    parameters and have a family.
    """

    sites: dict[str, SiteModel]
    dependence: dict[str, frozenset[str]]
    prior_dependence: dict[str, frozenset[str]]
    traces: tuple[Enumerated, Enumerated]
    points: tuple[Params, Params]
    location_changes: dict[tuple[str, str], float]
    landmarks: dict[str, Landmark]
    priors: dict[str, SiteModel]

    @property
    def places(self) -> tuple[SiteModel, ...]:
        """All that is known of: sites, and priors that depend on other parameters."""
        return (*self.sites.values(), *self.priors.values())


def read_sites(structure: Structure) -> Reading:
    """Probe the program."""
    with isolated(structure.program.dtype, 0), torch.no_grad():
        points, traces = _probes(structure)
        moved = {
            name: structure.enumerate({**points[0], name: points[1][name]})
            for name in structure.parameters
        }
        far = opposite(structure, points[0])
        for name in structure.parameters:
            if not any(_moves(traces[0], moved[name], site) for site in traces[0].factors):
                other = _try_far(structure, {**points[0], name: far[name]})
                moved[name] = moved[name] if other is None else other
        distant = _try_far(structure, far)
        probes = Probes(structure, points, traces, moved)
        dependence = {
            site: frozenset(name for name in moved if _moves(traces[0], moved[name], site))
            for site in traces[0].factors
        }
        prior_dependence = _prior_dependence(structure, traces[0], moved)
        sites = {}
        for name in structure.factor_sites:
            site = read_site(probes, name)
            if site is not None and distant is not None:
                site = confirmed(site, far, distant)
            if site is not None:
                sites[name] = site
        sites = {n: sites[n] for n in traces[0].factors if n in sites}  # program order
        for name, site in sites.items():  # data far away can hide a dependence in the last digit
            hangs = (a.parameters for a in site.arguments.values())
            dependence[name] = dependence[name].union(*hangs)
        sites = scaled(sites)
        priors = {}
        for name, depends in prior_dependence.items():
            site = read_prior(probes, name) if depends else None
            if site is not None and distant is not None:
                site = confirmed(site, far, distant)
            if site is not None:
                priors[name] = replace(site, scale=_scale_of(name, sites, len(site.shape)))
        landmarks = {}
        for name in structure.observations:
            known = name in sites and not sites[name].current
            mark = None if known else find_landmark(structure, name, traces, points)
            if mark is not None:
                landmarks[name] = mark
        located = [s.name for s in sites.values() if s.family.location is not None]
        changes = {
            (site, name): _location_change(site, sites.get(site), trace, traces[0])
            for site in {*located, *landmarks}
            for name, trace in moved.items()
        }
    return Reading(sites, dependence, prior_dependence, traces, points, changes, landmarks, priors)


def _moves(a: Enumerated, b: Enumerated, site: str) -> bool:
    return not same(a.factors[site].tensor, b.factors[site].tensor)


def _location_change(name: str, site: SiteModel | None, a: Enumerated, b: Enumerated) -> float:
    first, second = (unwrap(t.trace.nodes[name]["fn"])[0] for t in (a, b))
    if site is None or site.family.location is None:
        return float((first.loc - second.loc).abs().max())
    key, arguments = site.family.location, site.family.arguments
    return float((arguments(first)[key] - arguments(second)[key]).abs().max())


def _scale_of(name: str, sites: Mapping[str, SiteModel], rank: int) -> Tensor | None:
    """The variance of the data whose location a parameter is: a yardstick for that of its prior."""
    found = [
        site.scale.min()
        for site in sites.values()
        if site.scale is not None and name in site.arguments[str(site.family.location)].parameters
    ]
    return torch.stack(found).min().reshape((1,) * rank) if found else None


def _prior_dependence(
    structure: Structure, reference: Enumerated, moved: Mapping[str, Enumerated]
) -> dict[str, frozenset[str]]:
    """The parameters that each prior's own arguments depend on."""
    result = {}
    for name, parameter in structure.parameters.items():
        if not parameter.has_prior or name in structure.factor_sites:
            continue
        site = reference.trace.nodes[name]
        here = site["fn"].log_prob(site["value"])
        result[name] = frozenset(
            other
            for other, trace in moved.items()
            if other != name
            and not same(here, trace.trace.nodes[name]["fn"].log_prob(site["value"]))
        )
    return result
