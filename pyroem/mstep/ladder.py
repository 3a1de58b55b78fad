"""The ladder: for each parameter the first rung that holds, and why."""

from __future__ import annotations

from dataclasses import replace

import torch
from pyro import distributions as dist
from torch.distributions import constraints

from pyroem._pyro import unwrap
from pyroem.constraints import structure_of
from pyroem.families import forms
from pyroem.mstep.affine import Affine
from pyroem.mstep.blocks import Block, Rung, Use
from pyroem.mstep.intervals import bounds_of, interval_of, is_ordered
from pyroem.mstep.probing import Reading
from pyroem.mstep.sites import Argument, SiteModel
from pyroem.structure import Parameter, Structure, base_mask


def place(structure: Structure, reading: Reading, parameter: Parameter) -> Block:
    """The first rung of the ladder that holds for a parameter, and why."""
    name = parameter.name
    if parameter.df == 0:
        return Block(name, Rung.FIXED, "it has only one possible value")
    touched = [s for s, depends in reading.dependence.items() if name in depends]
    without = [s for s in touched if s not in reading.sites]
    if without:
        site = reading.traces[0].trace.nodes[without[0]]
        kind = type(unwrap(site["fn"])[0]).__name__
        if without[0] in structure.parameters:
            reason = f"the prior of '{without[0]}' depends on an assignment"
        else:
            reason = f"no exponential family is registered for {kind} (site '{without[0]}')"
        return Block(name, Rung.GRADIENT, reason)
    hyper = [p for p, depends in reading.prior_dependence.items() if name in depends]
    unread = [p for p in hyper if p not in reading.priors]
    if unread:
        reason = f"the prior of '{unread[0]}' depends on it"
        closed = Block(name, Rung.ON_STATISTICS, reason)
    else:
        sites = [*(reading.sites[s] for s in touched), *(reading.priors[p] for p in hyper)]
        closed = _closed(reading, parameter, sites)
    if closed.rung is not Rung.ON_STATISTICS:
        return closed
    for s in touched:
        site = reading.sites[s]
        if site.along_rows and all(_evaluable(site, a) for a in site.arguments.values()):
            closed = replace(closed, rung=Rung.ON_ROWS)
        elif site.along_rows:
            argument = next(a for a in site.arguments.values() if a.varies & site.unit_dims)
            plate = "', '".join(structure.unit)
            reason = (
                f"argument {argument.name} of site '{s}' varies along plate '{plate}' and is not"
                " affine in it"
            )
            return Block(name, Rung.GRADIENT, reason)
    return closed


def _evaluable(site: SiteModel, argument: Argument) -> bool:
    """Whether it can be had without a run of the program over all rows."""
    affine = argument.affine
    if argument.selection is not None or not argument.varies & site.unit_dims:
        return True
    return affine is not None and not affine.loose


def _closed(reading: Reading, parameter: Parameter, sites: list[SiteModel]) -> Block:
    """The closed form, or a block on the statistics with the reason why there is none."""
    name = parameter.name

    def numeric(reason: str) -> Block:
        return Block(name, Rung.ON_STATISTICS, reason)

    uses = []
    for site in sites:
        for argument in site.arguments.values():
            if name not in argument.parameters:
                continue
            affine = argument.affine
            if argument.selection is None and affine is not None and name in affine.names:
                use = _single_use(site, affine, name)
                if use is None:
                    return _regression(reading, parameter, sites)
                uses.append(use)
                continue
            if argument.selection is None and name in argument.proportional:
                coordinate, cells = argument.proportional[name]
                uses.append(Use(site, coordinate, cells, multiple=True))
                continue
            if argument.selection is None:
                if any(c.argument == argument.name for c in site.family.coordinates):
                    why = "is a function of it, not a selection"
                else:
                    why = "has no closed form (its family has no Coordinate for it)"
                return numeric(f"argument {argument.name} of {site.title} {why}")
            cells = argument.selection.cells_of(name)
            selection = argument.selection
            uses.append(Use(site, selection.coordinate, cells, selection.factor))
    if not uses:
        only = "only its prior" if parameter.has_prior else "nothing"
        return numeric(f"{only} depends on it")
    form = uses[0].coordinate.form
    other = next((u for u in uses if u.coordinate.form is not form), None)
    if other is not None:
        return numeric(
            f"it stands as {uses[0].coordinate.name} in {uses[0].site.title} and as"
            f" {other.coordinate.name} in {other.site.title}"
        )
    if not form.known:
        site = uses[0].site
        kind = type(site.data.base).__name__
        why = f" (the statistics of {kind} are the rows)" if site.family.by_row else ""
        return numeric(f"{uses[0].coordinate.name} of {site.title} has no closed form{why}")
    bounds = bounds_of(parameter, form)
    if bounds is None:
        return numeric(
            f"its constraint {parameter.constraint} does not suit the {form.name} kernel"
        )
    where = ", ".join(dict.fromkeys(f"{u.coordinate.name} of {u.site.title}" for u in uses[:3]))
    if len(uses) > 3:
        where += f" and {len(uses) - 3} more sites"
    reason = f"{form.name} kernel ({where})"
    if parameter.has_prior:
        prior = reading.traces[0].trace.nodes[name]
        base, _, masks = unwrap(prior["fn"])
        kind = type(base).__name__
        if type(base) is dist.Uniform and form.event_dim == 0:
            reason += ", Uniform prior: clipped to its bounds"
        elif masks or base_mask(prior) is not None:
            why = f"its {kind} prior is masked"
            return Block(name, Rung.ON_STATISTICS, why, form, tuple(uses), *bounds)
        elif type(base) in form.conjugate:
            reason += f", conjugate {kind} prior"
        else:
            alike = _regression(reading, parameter, sites)
            if alike.rung is Rung.REGRESSION:
                return alike
            why = f"the {kind} prior is not conjugate to the {form.name} kernel"
            return Block(name, Rung.ON_STATISTICS, why, form, tuple(uses), *bounds)
    shared = structure_of(parameter.kind)
    if shared is not None:
        reason += f", {shared.name}: {shared.how}"
    if is_ordered(parameter):
        if form.mode_of_cells is not None:
            return numeric(f"its constraint {parameter.constraint} does not suit the {form.name}")
        reason += ", in order: neighbours that are not are pooled"
    unnormalised = form is forms.SIMPLEX and parameter.kind is not constraints.simplex
    if unnormalised and parameter.held is not None:
        return numeric("some elements of its vectors are held")
    block = Block(name, Rung.CLOSED_FORM, reason, form, tuple(uses), *bounds)
    return replace(block, ordered=is_ordered(parameter), shared=shared)


def _single_use(site: SiteModel, affine: Affine, name: str) -> Use | None:
    """The place of a parameter whose elements stand alone, multiplied or shifted by constants."""
    form = affine.coordinate.form
    factors = [m for m in affine.matrices if bool((m != 1).any())]
    shifted = bool((affine.constant != 0).any())
    if not affine.single or affine.loose or (factors and form.stretched is None):
        return None
    if form is not forms.LOCATION and any(bool((m < 0).any()) for m in factors):
        return None
    if shifted and form.shifted is None:
        free = torch.tensor([m < 0 for m, _ in affine.entries])
        if bool((affine.constant[:, ~free] != 0).any()):
            return None
        shifted = False
    first = sum(affine.sizes[: affine.names.index(name)])
    size = affine.sizes[affine.names.index(name)]
    local = torch.tensor([int(e[0]) - first if m >= 0 else -1 for m, e in affine.entries])
    local = torch.where((local >= 0) & (local < size), local, -1)
    rows, cells = affine.counts
    columns = [
        affine.matrices[m][:, 0] if m >= 0 else torch.ones(rows).to(affine.constant)
        for m, _ in affine.entries
    ]
    factor = affine.unspread(torch.stack(columns, 1)) if factors else None
    index = local.reshape((1, cells)).expand((rows, cells))
    if factor is not None and form is not forms.LOCATION:  # an exposure of zero: nothing to learn
        index = torch.where(torch.stack(columns, 1) == 0, -1, index)
        factor = torch.where(factor == 0, 1.0, factor)
    offset = affine.unspread(affine.constant.expand((rows, cells))) if shifted else None
    factor = None if factor is None else factor.to(affine.dtype)
    offset = None if offset is None else offset.to(affine.dtype)
    return Use(site, affine.coordinate, affine.unspread(index), factor, offset)


def _regression(reading: Reading, parameter: Parameter, sites: list[SiteModel]) -> Block:
    """A coefficient of predictors, or a block on the statistics with the reason why it is none."""
    name, prior = parameter.name, ""
    for site in sites:
        twice = [a.name for a in site.arguments.values() if name in a.parameters]
        if len(twice) > 1:
            reason = f"it stands in arguments {' and '.join(twice)} of {site.title}"
            return Block(name, Rung.ON_STATISTICS, reason)
        for argument in site.arguments.values():
            if name in argument.parameters:
                if argument.selection is None:
                    known = argument.affine is not None and name in argument.affine.names
                    coordinate = argument.affine.coordinate if known and argument.affine else None
                else:
                    coordinate = argument.selection.coordinate
                if coordinate is None or coordinate.form.expansion is None:
                    reason = f"argument {argument.name} of {site.title} is a function of it"
                    return Block(name, Rung.ON_STATISTICS, f"{reason}, not a selection")
    if interval_of(parameter.constraint) != (-torch.inf, torch.inf):
        reason = f"a coefficient of a predictor, under the constraint {parameter.constraint}"
        return Block(name, Rung.ON_STATISTICS, reason)
    if parameter.has_prior:
        node = reading.traces[0].trace.nodes[name]
        base, _, masks = unwrap(node["fn"])
        if (
            type(base) not in (dist.Normal, dist.MultivariateNormal)
            or masks
            or (base_mask(node) is not None)
        ):
            reason = f"a coefficient of a predictor, whose {type(base).__name__} prior is no Normal"
            return Block(name, Rung.ON_STATISTICS, reason)
        prior = f", {type(base).__name__} prior"
    return Block(name, Rung.REGRESSION, prior)
