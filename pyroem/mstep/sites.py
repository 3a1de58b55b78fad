"""What the M-step knows of each site: its family, its arguments and how they hang on parameters.

All of it is read by probing: the program is run at two random points of the parameter space, at a
third far from them, and once for each parameter moved alone; the distributions' arguments are
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import Enumerated, isolated, unwrap
from pyroem.errors import ModelError, PyroemError
from pyroem.families import Arguments, Family, families_of, family_of
from pyroem.families.generic import generic
from pyroem.mstep.affine import Affine
from pyroem.mstep.landmarks import Landmark, find_landmark
from pyroem.mstep.selection import Selection, find
from pyroem.statistics import SiteStatistics, weighted_sum
from pyroem.structure import Params, Structure, base_mask

FEW = 32  # rows


@dataclass(frozen=True)
class Argument:
    """One canonical argument: the batch dims along which it differs, the parameters behind it.

    What is no selection may be an affine function of some of them.
    """

    name: str
    event_dim: int
    varies: frozenset[int]
    parameters: frozenset[str]
    selection: Selection | None
    affine: Affine | None = None


@dataclass(frozen=True)
class Recorded:
    """What was seen at a site; its statistics ``T(x - centre)`` are made when they are asked for.

    ``first`` keeps only the first row's, where all are alike; ``copied`` puts a dim of size one,
    for copies of the program, in front.
    """

    family: Family
    base: Any
    value: Tensor
    rank: int
    rows: frozenset[int]
    centre: Tensor | None = None
    first: bool = False
    copied: bool = False

    @cached_property
    def statistics(self) -> tuple[Tensor, ...]:
        """Of all rows, each padded to the site's rank."""
        return self._made(self.value)

    @cached_property
    def few(self) -> tuple[Tensor, ...]:
        """Of the first rows: their shapes tell those of all, the rows' dims apart."""
        value = self.value
        for d in self.rows:
            value = value.narrow(d, 0, min(FEW, value.shape[d]))
        try:
            made = self._made(value)
        except RuntimeError:  # constants of the distribution differ by row
            return self.statistics
        lead = int(self.copied)
        same = all(t.shape[d + lead] in (1, value.shape[d]) for t in made for d in self.rows)
        return made if same or self.first else self.statistics

    def _made(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x if self.centre is None else x - self.centre
        found = zip(self.family.statistics(self.base, x), self.family.event_dims, strict=True)
        made = tuple(pad(t, self.rank, e) for t, e in found)
        for d in self.rows if self.first else ():
            made = tuple(t.narrow(d, 0, 1) for t in made)
        return tuple(t.unsqueeze(0) for t in made) if self.copied else made


@dataclass(frozen=True)
class SiteModel:
    """A site with a family. Batch dims are counted from the left of ``shape``.

    ``data`` holds what depends on the data alone; ``scale`` is the data's variance, the yardstick
    of the variance floor.
    """

    name: str
    family: Family
    shape: tuple[int, ...]
    events: int
    arguments: dict[str, Argument]
    data: Recorded
    mask: Tensor | None
    centre: Tensor | None
    scale: Tensor | None
    unit_dims: frozenset[int]
    is_prior: bool = False

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"the prior of '{self.name}'" if self.is_prior else f"site '{self.name}'"

    @property
    def read(self) -> bool:
        """Whether all arguments can be had without a run of the program."""
        return all(
            a.selection is not None or (a.affine is not None and not a.affine.loose)
            for a in self.arguments.values()
        )

    def drawn(self, value: Tensor) -> SiteStatistics:
        """The statistics of a prior: its data is the parameter's current value."""
        value = pad(value, len(self.shape), len(self.data.base.event_shape))
        own = replace(self, data=replace(self.data, value=value))
        one = torch.ones((1,) * (len(self.shape) - self.events), dtype=value.dtype)
        return own.expected(one)

    @property
    def sufficient(self) -> tuple[Tensor, ...]:
        """The statistics of all rows."""
        return self.data.statistics

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the statistics."""
        return self.data.value.dtype

    @property
    def keep(self) -> frozenset[int]:
        """The batch dims along which any argument varies: the cells' dims."""
        if self.family.by_row:
            return frozenset(range(len(self.shape)))
        return frozenset().union(*(a.varies for a in self.arguments.values()))

    @property
    def along_rows(self) -> bool:
        """Whether an argument varies along the rows' plates."""
        return bool(self.keep & self.unit_dims)

    @property
    def current(self) -> bool:
        """Whether the statistics hang on the current arguments, or are the rows themselves."""
        return self.family.latent is not None or self.family.by_row

    def statistics_at(self, base: Any) -> tuple[Tensor, ...]:
        """The statistics of all rows, of which some are expected ones at the program's ``base``."""
        if self.family.latent is None:
            return self.sufficient
        arguments = {
            name: pad(value, len(self.shape), self.arguments[name].event_dim)
            for name, value in self.family.arguments(base).items()
        }
        x = self.data.value if self.centre is None else self.data.value - self.centre
        found = self.family.latent(base, self.centred(arguments), x)
        shapes = zip(found, self.family.event_dims, strict=True)
        return tuple(pad(t, len(self.shape), e) for t, e in shapes)

    def expected(self, weights: Tensor, base: Any = None) -> SiteStatistics:
        """Expected statistics under posterior ``weights`` (Pyro's layout).

        ``base`` is the program's own distribution at the site, for a family with latent variables.
        """
        w = weights.reshape(weights.shape + (1,) * self.events)
        w = w.reshape((1,) * (len(self.shape) - w.dim()) + w.shape)
        if self.mask is not None:
            w = w * self.mask
        one = torch.ones((1,) * len(self.shape), dtype=w.dtype, device=w.device)
        weight = weighted_sum(w, one, self.shape, self.keep)
        values = tuple(weighted_sum(w, t, self.shape, self.keep) for t in self.statistics_at(base))
        return SiteStatistics(weight, values)

    def evaluate(self, params: Mapping[str, Tensor], base: Callable[[], Any]) -> Arguments:
        """The arguments at ``params``; ``base`` gives the program's own distribution if needed."""
        return {name: self.evaluate_one(name, params, base) for name in self.arguments}

    def evaluate_one(
        self, name: str, params: Mapping[str, Tensor], base: Callable[[], Any]
    ) -> Tensor:
        """One argument at ``params``."""
        argument = self.arguments[name]
        if argument.selection is not None:
            return argument.selection.argument(params)
        if argument.affine is not None and not argument.affine.loose:
            return argument.affine.argument(params)
        return self.argument_in(base(), name)

    def argument_in(self, base: Any, name: str) -> Tensor:
        """One argument of the program's own distribution, over the dims along which it varies."""
        argument = self.arguments[name]
        value = self.family.arguments(base)[name]
        return narrow(value, argument.event_dim, len(self.shape), argument.varies)

    def centred(self, arguments: Arguments) -> Arguments:
        """The arguments, with the location counted from the centre of the data."""
        if self.family.location is None:
            return arguments
        assert self.centre is not None
        shifted = arguments[self.family.location] - self.centre
        return {**arguments, self.family.location: shifted}

    def expected_log_density(self, arguments: Arguments, statistics: SiteStatistics) -> Tensor:
        """``sum over cells of <eta, statistics> - weight A`` (without the base measure)."""
        density = self.family.log_density(
            self.centred(arguments), statistics.values, statistics.weight
        )
        return density.sum()


def pad(x: Tensor, rank: int, event_dim: int) -> Tensor:
    """Batch dims of size one on the left, up to ``rank``."""
    return x.reshape((1,) * (rank + event_dim - x.dim()) + x.shape)


def narrow(x: Tensor, event_dim: int, rank: int, varies: frozenset[int]) -> Tensor:
    """Cut the batch dims along which ``x`` does not vary down to size one."""
    x = pad(x, rank, event_dim)
    for dim in range(rank):
        if dim not in varies and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def probe(structure: Structure, seed: int) -> Params:
    """A random point of the parameter space, in the neighbourhood of the program's own values."""
    generator = torch.Generator().manual_seed(seed)
    point = {}
    for name, parameter in structure.parameters.items():
        parameter = replace(parameter, held=None)
        raw = parameter.unconstrain(parameter.value).clamp(-5, 5)
        noise = torch.rand(raw.shape, generator=generator, dtype=torch.float64) - 0.5
        point[name] = parameter.constrain(raw + noise.to(raw))
    return point


def opposite(structure: Structure, point: Params) -> Params:
    """A point on the other side of zero, where ``abs``, ``clamp`` and ``relu`` show themselves."""
    opposite = {}
    for name, parameter in structure.parameters.items():
        parameter = replace(parameter, held=None)
        raw = parameter.unconstrain(point[name])
        opposite[name] = parameter.constrain(-raw - 0.5 * raw.sign())
    return opposite


def _try_far(structure: Structure, far: Params) -> Enumerated | None:
    """The program there, if it can run there: it may have demands that no constraint states."""
    try:
        return structure.enumerate(far)
    except (PyroemError, ArithmeticError, ValueError, RuntimeError):
        return None


def _varying(a: Tensor, event_dim: int, rank: int) -> frozenset[int]:
    a = pad(a.detach(), rank, event_dim)
    found = set()
    for dim in range(rank):
        if a.shape[dim] > 1:
            first = a.narrow(dim, 0, 1)
            if ((a - first).abs() > 1e-12 * (a.abs() + first.abs())).any():
                found.add(dim)
    return frozenset(found)


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
        points = (probe(structure, 1), probe(structure, 2))
        traces = tuple(structure.enumerate(p) for p in points)
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
        dependence = {
            site: frozenset(name for name in moved if _moves(traces[0], moved[name], site))
            for site in traces[0].factors
        }
        prior_dependence = _prior_dependence(structure, traces[0], moved)
        sites = {}
        for name in structure.factor_sites:
            site = _read_site(structure, name, points, traces, moved)
            if site is not None and distant is not None:
                site = _confirmed(site, far, distant)
            if site is not None:
                sites[name] = site
        sites = {n: sites[n] for n in traces[0].factors if n in sites}  # program order
        for name, site in sites.items():  # data far away can hide a dependence in the last digit
            hangs = (a.parameters for a in site.arguments.values())
            dependence[name] = dependence[name].union(*hangs)
        sites = _scaled(sites)
        priors = {}
        for name, depends in prior_dependence.items():
            site = _read_prior(structure, name, points, traces, moved) if depends else None
            if site is not None and distant is not None:
                site = _confirmed(site, far, distant)
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
    pair = (traces[0], traces[1])
    return Reading(sites, dependence, prior_dependence, pair, points, changes, landmarks, priors)


def _moves(a: Enumerated, b: Enumerated, site: str) -> bool:
    return not _same(a.factors[site].tensor, b.factors[site].tensor)


def _location_change(name: str, site: SiteModel | None, a: Enumerated, b: Enumerated) -> float:
    first, second = (unwrap(t.trace.nodes[name]["fn"])[0] for t in (a, b))
    if site is None or site.family.location is None:
        return float((first.loc - second.loc).abs().max())
    key, arguments = site.family.location, site.family.arguments
    return float((arguments(first)[key] - arguments(second)[key]).abs().max())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


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
            and not _same(here, trace.trace.nodes[name]["fn"].log_prob(site["value"]))
        )
    return result


def _read_site(
    structure: Structure,
    name: str,
    points: tuple[Params, Params],
    traces: tuple[Enumerated, ...],
    moved: Mapping[str, Enumerated],
) -> SiteModel | None:
    """The site in the first family that its distribution has and that fits."""
    nodes = [t.trace.nodes[name] for t in traces]
    bases = tuple(unwrap(node["fn"])[0] for node in nodes)
    if name in structure.parameters or not _same(nodes[0]["value"], nodes[1]["value"]):
        return None
    for family in families_of(bases[0]):
        if not (family.by_row and name in structure.assignments):
            found = _read_as(family, structure, name, points, traces, moved)
            if found is not None:
                return found
    return None


def _read_prior(
    structure: Structure,
    name: str,
    points: tuple[Params, Params],
    traces: tuple[Enumerated, ...],
    moved: Mapping[str, Enumerated],
) -> SiteModel | None:
    """A prior as a site whose data is the parameter."""
    node = traces[0].trace.nodes[name]
    base, _, masks = unwrap(node["fn"])
    family = family_of(base)
    if family is None or family.latent is not None or family.by_row or family.transform is not None:
        return None
    if masks or base_mask(node) is not None or float(node["scale"]) != 1.0:
        return None
    site = _read_as(family, structure, name, points, traces, moved)
    if site is None or not _is_rebuilt(site, base):
        return None
    centre = None if site.centre is None else torch.zeros(base.event_shape, dtype=site.dtype)
    return replace(site, centre=centre, is_prior=True)


def _scale_of(name: str, sites: Mapping[str, SiteModel], rank: int) -> Tensor | None:
    """The variance of the data whose location a parameter is: a yardstick for that of its prior."""
    found = [
        site.scale.min()
        for site in sites.values()
        if site.scale is not None and name in site.arguments[str(site.family.location)].parameters
    ]
    return torch.stack(found).min().reshape((1,) * rank) if found else None


def _read_as(
    family: Family,
    structure: Structure,
    name: str,
    points: tuple[Params, Params],
    traces: tuple[Enumerated, ...],
    moved: Mapping[str, Enumerated],
) -> SiteModel | None:
    nodes = [t.trace.nodes[name] for t in traces]
    base, events, _ = unwrap(nodes[0]["fn"])
    bases = (base, unwrap(nodes[1]["fn"])[0])
    value = nodes[0]["value"]
    if family.transform is not None:
        seen = [family.transform(b, value) for b in bases]
        if not _same(*seen):
            return None  # the transform depends on a parameter
        value = seen[0]
    fn = nodes[0]["fn"]
    batch = tuple(fn.batch_shape + fn.event_shape[:events])
    own = tuple(value.shape[: value.dim() - len(base.event_shape)])
    mask = base_mask(nodes[0]) if name not in structure.assignments else None
    shape = tuple(torch.broadcast_shapes(batch, own, mask.shape if mask is not None else ()))
    rank = len(shape)
    try:
        canonical = [family.arguments(b) for b in bases]
    except AttributeError as error:
        raise ModelError(f"Site '{name}': the family of {type(base).__name__}: {error}") from error
    others = {p: family.arguments(unwrap(t.trace.nodes[name]["fn"])[0]) for p, t in moved.items()}
    arguments = {}
    for key, first in canonical[0].items():
        event_dim = family.dims(key)
        second = canonical[1][key]
        varies = _varying(first, event_dim, rank) | _varying(second, event_dim, rank)
        cut = (narrow(first, event_dim, rank, varies), narrow(second, event_dim, rank, varies))
        hangs = frozenset(p for p, args in others.items() if not _same(first, args[key]))
        selection = None
        for coordinate in family.coordinates:
            if coordinate.argument == key and selection is None:
                selection = find(coordinate, cut, points, sorted(hangs))
        arguments[key] = Argument(key, event_dim, varies, hangs, selection)
    frames = {f.name: f.dim for f in nodes[0]["cond_indep_stack"] if f.vectorized}
    unit_dims = frozenset(rank - events + frames[p] for p in structure.unit if p in frames)
    x = pad(value, rank, len(base.event_shape)).to(structure.program.dtype)
    mask = None if mask is None else pad(mask.to(x.dtype), rank, 0)
    centre = None if family.location is None else torch.zeros((), dtype=x.dtype)  # see _scaled
    data = Recorded(family, base, x, rank, unit_dims)
    again = replace(data, base=bases[1])
    if family.latent is None:
        fixed = zip(data.few, again.few, strict=True)
    else:
        given = family.given or (lambda d, x: ())
        fixed = zip(given(bases[0], x), given(bases[1], x), strict=True)
    if not all(_same(a, b) for a, b in fixed):
        return None  # they depend on a parameter: a number of trials, say
    site = SiteModel(name, family, shape, events, arguments, data, mask, centre, None, unit_dims)
    return None if family is generic(base) and not _is_rebuilt(site, base) else site


def _is_rebuilt(site: SiteModel, base: Any) -> bool:
    """Whether a distribution that was built again from its arguments is the same."""
    rank = len(site.shape)
    try:
        arguments = {
            name: pad(value, rank, site.arguments[name].event_dim)
            for name, value in site.family.arguments(base).items()
        }
        own = base.log_prob(site.data.value)
        again = type(base)(**arguments).log_prob(site.data.value)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return False
    close = torch.isclose(again, own.expand(again.shape), rtol=1e-6, atol=1e-6, equal_nan=True)
    return bool(close.all())


def _confirmed(site: SiteModel, point: Params, trace: Enumerated) -> SiteModel:
    """Drop the selections that do not hold at ``point``."""
    base, _, _ = unwrap(trace.trace.nodes[site.name]["fn"])
    values = site.family.arguments(base)
    arguments = {}
    for key, argument in site.arguments.items():
        actual = narrow(values[key], argument.event_dim, len(site.shape), argument.varies)
        if argument.selection is not None and not argument.selection.holds(point, actual):
            argument = replace(argument, selection=None)
        arguments[key] = argument
    return replace(site, arguments=arguments)


def _scaled(sites: dict[str, SiteModel]) -> dict[str, SiteModel]:
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
    count = mask.sum(reduce, keepdim=True)
    mean = (x * mask).sum(reduce, keepdim=True) / count.clamp(min=1)
    spread = ((x - mean) ** 2 * mask).sum(reduce, keepdim=True)
    lead = next((i for i, n in enumerate(mean.shape) if n > 1), mean.dim())
    shape = mean.shape[lead:]
    return count.reshape(shape), mean.reshape(shape), spread.reshape(shape)
