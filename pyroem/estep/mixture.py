"""The mixture kernel: independent rows with finite assignments, as blocked matrix products.

For every program whose rows are independent given the parameters, with a finite number of joint
states of each row's assignments and an exponential family at every site. Within a *group*
(assignments that share a site) the log-probabilities of all joint states are

    L = base + E Phi,    log p(x_n) = logsumexp(L[:, n]),    R = exp(L - log p),    S = Phi R',

in blocks of rows that stay in the processor's cache (:mod:`pyroem.estep.kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyroem._pyro import unwrap
from pyroem.estep.layout import Layout
from pyroem.families import Arguments
from pyroem.mstep.plan import Plan
from pyroem.mstep.sites import SiteModel, pad
from pyroem.statistics import SiteStatistics
from pyroem.structure import Structure

MOST_STATES = 4096  # joint states of a group


@dataclass(frozen=True)
class Assigned:
    """An assignment's own site, with its base measure (of a ``Binomial``, say).

    ``dims`` gives for each axis of the group the site's dim, or -1. ``copied`` says that the first
    axis counts copies.
    """

    site: SiteModel
    dims: tuple[int, ...]
    measure: Tensor
    copied: bool = False

    @cached_property
    def plain(self) -> bool:
        """Whether it is categorical and alone: the statistics are the counts themselves."""
        one_hot = torch.eye(self.site.sufficient[0].shape[-1]).to(self.site.sufficient[0])
        return (
            len(self.dims) - self.copied == 1
            and self.site.family.natural is not None
            and len(self.site.sufficient) == 1
            and self.site.family.event_dims == (1,)
            and self.site.sufficient[0].numel() == one_hot.numel()
            and torch.equal(self.site.sufficient[0].reshape(one_hot.shape), one_hot)
            and not bool(self.measure.any())
        )

    def log_prior(self, arguments: Arguments) -> Tensor:
        """``log p(z | parents)``, one dim for each axis of the group."""
        if self.plain:
            assert self.site.family.natural is not None
            (logits,), normaliser = self.site.family.natural(arguments)
            value = logits - normaliser.unsqueeze(-1)
            return value.reshape((-1, value.shape[-1])[1 - self.copied :])
        density = _density(self.site, arguments) + self.measure
        used = [d for d in self.dims if d >= 0]
        rest = [d for d in range(density.dim()) if d not in used]
        moved = density.permute([*rest, *used])[(0,) * len(rest)]
        sizes = iter(moved.shape)
        return moved.reshape([next(sizes) if d >= 0 else 1 for d in self.dims])

    def expected(self, counts: Tensor) -> SiteStatistics:
        """Expected statistics from the expected counts of the joint states."""
        if self.plain:
            batch = (-1,) * self.copied + (1,) * (len(self.site.shape) - self.copied)
            values = counts.reshape((*batch, counts.shape[-1]))
            return SiteStatistics(values.sum(-1), (values,))
        away = [i for i, d in enumerate(self.dims) if d < 0]
        counts = counts.sum(away) if away else counts
        used = [d for d in self.dims if d >= 0]
        counts = counts.permute([i for i, _ in sorted(enumerate(used), key=lambda pair: pair[1])])
        shape = [1] * len(self.site.shape)
        for d, size in zip(sorted(used), counts.shape, strict=True):
            shape[d] = size
        return self.site.expected(counts.reshape(shape))


@dataclass(frozen=True)
class Group:
    """Assignments that share a site, with the sites that depend on them.

    ``assigned`` are the assignments' own sites; ``observed`` the observations by the axes (places
    in ``names``) of the assignments that they vary with, ``partial`` those of which elements are
    missing. ``copies`` of the group stand side by side
    where several fits run as one: their axis comes first, and is not summed over.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    assigned: tuple[Assigned, ...]
    observed: tuple[tuple[tuple[int, ...], tuple[Layout, ...]], ...]
    copies: int = 1
    partial: tuple[Layout, ...] = ()

    @cached_property
    def num_states(self) -> int:
        """The number of joint states, of all copies together."""
        return math.prod(self.sizes)

    @cached_property
    def zero(self) -> Tensor:
        """A number for each joint state, not yet filled in."""
        sites = [a.site for a in self.assigned]
        sites += [layout.site for _, layouts in self.observed for layout in layouts]
        sites += [layout.site for layout in self.partial]
        dtype = sites[0].dtype if sites else torch.float64
        return torch.zeros((1,) * len(self.sizes), dtype=dtype)

    def spread(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """A matrix over the states of ``axes`` as a tensor that broadcasts over all of them."""
        shape = [n if i in axes else 1 for i, n in enumerate(self.sizes)]
        return x.reshape((*shape, *x.shape[1:]))

    def marginal(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """A matrix over the joint states summed to one over the states of ``axes``."""
        away = [i for i in range(len(self.sizes)) if i not in axes]
        if not away:
            return x
        total = x.reshape((*self.sizes, *x.shape[1:])).sum(away)
        return total.reshape((-1, *x.shape[1:]))


@dataclass(frozen=True)
class Mixture:
    """What the kernel needs of a plan: the groups, and the sites that stand outside the rows.

    Those come with their statistics, which no assignment touches, and their base measure.
    """

    plan: Plan
    groups: tuple[Group, ...]
    outside: tuple[tuple[SiteModel, SiteStatistics, float], ...]
    scale: float
    copies: int | None = None

    @property
    def num_states(self) -> int:
        """The number of joint states of all groups together."""
        return sum(group.num_states for group in self.groups)

    @property
    def layouts(self) -> Iterator[Layout]:
        """All observations in the rows."""
        for group in self.groups:
            for _, layouts in group.observed:
                yield from layouts
            yield from group.partial

    @property
    def partial(self) -> list[Layout]:
        """The observations of which elements are missing."""
        return [layout for group in self.groups for layout in group.partial]


def mixture_of(structure: Structure, plan: Plan) -> Mixture | str:
    """The kernel of a program, or the reason why it has none."""
    reading, trace, unit = plan.reading, plan.reading.traces[0], set(structure.unit)
    if structure.imputed:
        return "an assignment is partly known"
    if not unit:
        return "no plate makes independent rows"
    parents: dict[str, dict[int, str]] = {}  # for each site the dims of the states it varies with
    outside = []
    for name in trace.factors:
        plates = set(structure.plates[name])
        reason = no_product(structure, plan, name)
        if reason:
            return reason
        varies = varying_states(structure, plan, name)
        if name in structure.assignments:
            if plates != unit:
                return f"assignment '{name}' does not stand in exactly the rows' plates"
        elif not plates & unit and not varies:
            outside.append(_outside(reading.sites[name], plan))
            continue
        elif not unit <= plates:
            return f"site '{name}' does not stand in all of the rows' plates"
        parents[name] = varies
    groups = []
    linked = [set(v.values()) for v in parents.values()]
    for names in _components(list(structure.assignments), linked):
        ordered = tuple(z for z in structure.assignments if z in names)
        sizes = tuple(structure.assignments[z] for z in ordered)
        if math.prod(sizes) > MOST_STATES:
            return f"{', '.join(ordered)} have {math.prod(sizes)} joint states"
        own = {n: v for n, v in parents.items() if set(v.values()) & names or not (v or names)}
        assigned = tuple(assigned_of(structure, plan, z, ordered) for z in ordered)
        seen = [n for n in own if n not in structure.assignments]
        partial = [n for n in seen if reading.sites[n].family.partial is not None]
        whole = observed_of(structure, plan, [n for n in seen if n not in partial], ordered)
        layouts = tuple(_layout(structure, plan, n, ordered) for n in partial)
        groups.append(Group(ordered, sizes, assigned, whole, partial=layouts))
    return Mixture(plan, tuple(groups), tuple(outside), float(trace.scale))


def no_product(structure: Structure, plan: Plan, name: str) -> str:
    """Why the log-probabilities of a site are no product of matrices; empty where they are."""
    site, node = plan.reading.sites.get(name), plan.reading.traces[0].trace.nodes[name]
    if site is None:
        return f"no exponential family is known for site '{name}'"
    latent = site.family.latent is not None
    if latent and (site.family.partial is None or structure.chains):
        return f"the statistics of site '{name}' depend on its parameters"
    if site.family.by_row:
        return f"the statistics of site '{name}' are the rows themselves"
    if site.along_rows:
        return f"an argument of site '{name}' varies along the rows"
    enumerated = _enumerated_dims(site, structure, plan)
    if site.family.partial is not None:
        inner = [d for d in range(len(site.shape)) if d not in enumerated]
        if (
            any(site.shape[d] > 1 for d in inner if d not in site.unit_dims)
            or site.mask is not None
        ):
            return f"elements of the vectors of site '{name}' are missing, inside a row"
        return ""
    if name in structure.assignments:
        if any(not _same_along(t, d) for t in site.sufficient for d in site.unit_dims):
            return f"the states of assignment '{name}' differ by row"
    elif node["value"].dim() > structure.nesting + len(node["fn"].event_shape):
        return f"the data of site '{name}' differ by state"
    elif any(not _same_along(t, d) for t in site.data.few for d in enumerated):
        return f"the statistics of site '{name}' differ by state"
    elif site.mask is not None and any(not _same_along(site.mask, d) for d in enumerated):
        return f"the mask of site '{name}' differs by state"
    return ""


def varying_states(structure: Structure, plan: Plan, name: str) -> dict[int, str]:
    """The batch dims of a site along which it differs by state, and the assignment's name."""
    site = plan.reading.sites[name]
    enumerated = _enumerated_dims(site, structure, plan)
    return {d: z for d, z in enumerated.items() if d in site.keep or z == name}


def _enumerated_dims(site: SiteModel, structure: Structure, plan: Plan) -> dict[int, str]:
    """The batch dims of a site that hold states, and of which assignment."""
    trace = plan.reading.traces[0]
    symbols = {s: z for z, s in trace.states.items()}
    found = {}
    for dim, symbol in trace.trace.nodes[site.name]["infer"]["_dim_to_symbol"].items():
        at = len(site.shape) - site.events + dim
        if symbol in symbols and at >= 0:
            found[at] = symbols[symbol]
    return found


def _same_along(x: Tensor, dim: int) -> bool:
    return x.shape[dim] == 1 or bool((x == x.narrow(dim, 0, 1)).all())


def _density(site: SiteModel, arguments: Arguments) -> Tensor:
    one = torch.ones((1,) * len(site.shape)).to(site.sufficient[0])
    return site.family.log_density(arguments, site.sufficient, one)


def assigned_of(structure: Structure, plan: Plan, name: str, names: tuple[str, ...]) -> Assigned:
    """An assignment's own site, with the assignments ``names`` as the axes."""
    site = plan.reading.sites[name]
    place = {z: d for d, z in varying_states(structure, plan, name).items()}
    dims = tuple(place.get(other, -1) for other in names)
    shape = tuple(1 if d in site.unit_dims else n for d, n in enumerate(site.shape))
    base, _, _ = unwrap(plan.reading.traces[0].trace.nodes[site.name]["fn"])
    value = plan.reading.traces[0].trace.nodes[site.name]["value"]
    arguments = site.evaluate(plan.reading.points[0], lambda: base)
    measure = pad(base.log_prob(value), len(shape), 0) - _density(site, arguments)
    for d in site.unit_dims:
        measure = measure.narrow(d, 0, 1)
    site = replace(site, shape=shape, data=replace(site.data, first=True))
    return Assigned(site, dims, measure.detach())


def observed_of(
    structure: Structure, plan: Plan, sites: Iterable[str], names: tuple[str, ...]
) -> tuple[tuple[tuple[int, ...], tuple[Layout, ...]], ...]:
    """Observations by the axes that they vary with, those that vary with most first."""
    observed: dict[tuple[int, ...], tuple[Layout, ...]] = {}
    for name in sites:
        layout = _layout(structure, plan, name, names)
        observed[layout.axes] = (*observed.get(layout.axes, ()), layout)
    return tuple(sorted(observed.items(), key=lambda item: -len(item[0])))


def _layout(structure: Structure, plan: Plan, name: str, names: tuple[str, ...]) -> Layout:
    site, varies = plan.reading.sites[name], varying_states(structure, plan, name)
    enumerated = _enumerated_dims(site, structure, plan)
    rest = [d for d in range(len(site.shape)) if d not in enumerated and d not in site.unit_dims]
    placed = sorted((names.index(z), d) for d, z in varies.items())
    return Layout(
        site,
        tuple(axis for axis, _ in placed),
        tuple(d for _, d in placed),
        tuple(d for d in rest if d in site.keep),
        tuple(d for d in rest if d not in site.keep),
        tuple(sorted(site.unit_dims)),
    )


def _components(names: list[str], linked: Iterable[set[str]]) -> list[set[str]]:
    """The connected components; an empty one for what hangs on no assignment."""
    groups: list[set[str]] = [{name} for name in names]
    alone = False
    for link in linked:
        alone = alone or not link
        touched = [g for g in groups if g & link]
        if len(touched) > 1:
            groups = [g for g in groups if not g & link]
            groups.append(set().union(*touched))
    return groups + ([set()] if alone else [])


def _outside(site: SiteModel, plan: Plan) -> tuple[SiteModel, SiteStatistics, float]:
    trace, point = plan.reading.traces[0], plan.reading.points[0]
    dtype = site.dtype
    found = site.expected(torch.ones(site.shape[: len(site.shape) - site.events], dtype=dtype))
    base, _, _ = unwrap(trace.trace.nodes[site.name]["fn"])
    density = site.expected_log_density(site.evaluate(point, lambda: base), found)
    return site, found, float(trace.factors[site.name].tensor.sum() - density)
