"""All the data of a program that was read on some of its rows, and whether it fits that reading."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import Program, plate_frames, unwrap
from pyroem.checks import check_observation
from pyroem.errors import DataError
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Run
from pyroem.mstep.sites import SiteModel, narrow, pad
from pyroem.structure import Parameter, Params, Structure, base_mask

ALMOST = 1e-9
SAME = 1e-12  # relative; what is computed from sums may differ in the last digits


@dataclass(frozen=True)
class Whole:
    """The program on all rows: its sites, and the values that it gives to its parameters.

    ``index`` are the rows on which ``structure`` was read.
    """

    structure: Structure
    program: Program
    nodes: Mapping[str, Any]
    parameters: dict[str, Parameter]
    index: Tensor

    def agrees(self, plan: Plan, places: Tensor | None = None) -> bool:
        """Whether all rows are what the reading of some said.

        The data of those rows must be the same, and so must everything that does not belong to a
        row: arguments and priors, which a program may have computed from all of the data.
        ``places`` says where ``index`` stands among the rows that were read, if not in all places.
        """
        structure, reading = self.structure, plan.reading
        for name in structure.observations:
            some = reading.traces[0].trace.nodes[name]
            if not _same_rows(structure, self.nodes[name], some, self.index, places):
                return False
        pairs = zip(reading.points, reading.traces, strict=True)
        return all(self.agrees_at(plan, point, t.trace.nodes) for point, t in pairs)

    def same_rows(self, few: Whole, index: Tensor) -> bool:
        """Whether the observations of the rows ``index`` are those of ``few``, those rows alone."""
        return all(
            _same_rows(self.structure, self.nodes[name], few.nodes[name], index, None)
            for name in self.structure.observations
        )

    def agrees_at(self, plan: Plan, point: Params, some: Mapping[str, Any] | None = None) -> bool:
        """Whether arguments, priors and scales are the same on all rows at ``point``.

        ``some`` are the program's sites there on the rows that were read, if they are known.
        """
        structure = self.structure
        some = Run(plan, point).nodes if some is None else some
        nodes = self.program.run(point, nesting=structure.nesting).nodes
        for name in (*structure.factor_sites, *structure.parameters):
            scales = (torch.as_tensor(n[name].get("scale", 1.0)) for n in (nodes, some))
            if not _close(*scales):
                return False
        for name, site in plan.reading.sites.items():
            base, few = unwrap(nodes[name]["fn"])[0], unwrap(some[name]["fn"])[0]
            if type(base) is not type(few):
                return False
            own = site.family.arguments(_thin(base, site))
            for key, value in site.family.arguments(few).items():
                argument = site.arguments[key]
                rank, events = len(site.shape), argument.event_dim
                if not _constant(pad(own[key], rank, events), site.unit_dims):
                    return False
                cut = (narrow(v, events, rank, argument.varies) for v in (own[key], value))
                if not _close(*cut):
                    return False
        for name in structure.parameters:
            if structure.parameters[name].has_prior:
                densities = (n[name]["fn"].log_prob(point[name]) for n in (nodes, some))
                if not _close(*densities):
                    return False
        return True


def whole_data(
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int,
    index: Tensor,
    check: bool = True,
    part: bool = False,
) -> Whole | None:
    """The program on all rows; None where it has other sites, plates or parameters than on some.

    Data that was checked before need not be checked again, apart from masked data. Of a part of
    the data all may be masked.
    """
    program = replace(structure.program, args=args, kwargs=kwargs, fill={})
    nodes = program.run(_first_states(structure)).nodes  # one state: nothing of size rows x states
    fill = {}
    for name in (*structure.factor_sites, *structure.parameters):
        if name not in nodes:
            return None
        if name in structure.parameters:
            continue
        sizes = {f.name: f.size for f in plate_frames(nodes[name]) if f.vectorized}
        if any(sizes.get(plate) != rows for plate in structure.unit if plate in sizes):
            return None
    for name in structure.observations:
        if not check and base_mask(nodes[name]) is None:
            continue
        checked = check_observation(nodes[name], partly=part)
        if checked.missing is not None:
            raise DataError(
                f"missing values at site '{name}', of which the sample had none that the program"
                " was read on. Leave the rows out, ask about them in memory, or have such a row"
                " among the first ones of the fit."
            )
        if checked.fill is not None:
            fill[name] = checked.fill
            nodes[name]["value"] = checked.fill
    parameters: dict[str, Parameter] = {}
    for name, parameter in structure.parameters.items():
        value = nodes[name]["value"].detach().clone().to(program.dtype)
        if tuple(value.shape) != parameter.shape or not value.isfinite().all():
            return None
        parameters[name] = parameter if parameter.random else replace(parameter, value=value)
    return Whole(structure, replace(program, fill=fill), nodes, parameters, index)


def _first_states(structure: Structure) -> Params:
    """The first state of every assignment."""
    own = {name: parameter.value for name, parameter in structure.parameters.items()}
    nodes = structure.program.run(own, nesting=structure.nesting).nodes
    first = {}
    for z in structure.assignments:
        value = nodes[z]["value"]
        events = len(nodes[z]["fn"].event_shape)
        first[z] = value.reshape((-1, *value.shape[value.dim() - events :]))[0]
    return first


def _same_rows(
    structure: Structure, whole: Any, some: Any, index: Tensor, places: Tensor | None
) -> bool:
    """Whether the rows ``index`` of an observation are those of the sample; its mask too."""
    frames = {f.name: f.dim for f in plate_frames(whole) if f.vectorized}
    plate = structure.unit[0]
    if plate not in frames:
        return torch.equal(whole["value"], some["value"])
    base, declared, _ = unwrap(whole["fn"])
    events, at = len(base.event_shape), frames[plate] - declared
    value, mask = some["value"], _first(base_mask(some), structure.nesting + declared)
    value = _first(value, structure.nesting + declared + events)
    assert value is not None

    def cut(x: Tensor, dim: int, rows: Tensor) -> Tensor:
        return x.index_select(dim, rows.to(x.device))

    def cut_mask(x: Tensor, rows: Tensor) -> Tensor:
        return x if x.dim() < -at or x.shape[at] == 1 else cut(x, at, rows)

    if places is not None:
        value = cut(value, at - events, places)
        mask = mask if mask is None else cut_mask(mask, places)
    own, own_mask = cut(whole["value"], at - events, index), base_mask(whole)
    if own.shape != value.shape or (mask is None) != (own_mask is None):
        return False
    if mask is None or own_mask is None:
        return bool(_equal(own, value).all())
    own_seen, seen = torch.broadcast_tensors(cut_mask(own_mask, index), mask)
    if not torch.equal(own_seen, seen):
        return False
    hidden = ~seen.reshape(seen.shape + (1,) * events)  # there each has its own filling
    return bool((_equal(own, value) | hidden).all()) if own.numel() else True


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors agree; a product of matrices depends on its size in the last digits."""
    if not a.is_floating_point() or not a.numel():
        return a == b
    return (a - b).abs() <= ALMOST * (a.abs() + b.abs().max())


def _first(x: Tensor | None, rank: int) -> Tensor | None:
    """``x`` in the first state: dims to the left of ``rank`` are those of states."""
    while x is not None and x.dim() > rank:
        x = x[0]
    return x


def _thin(base: Any, site: SiteModel) -> Any:
    """The distribution without the rows over which a plate expanded it.

    What is derived from its tensors (logits from probabilities) then does not take rows times
    states.
    """
    first, thin = len(site.shape) - len(base.batch_shape), copy.copy(base)
    batch = list(base.batch_shape)
    for d in site.unit_dims:
        at = d - first
        if at < 0 or batch[at] == 1:
            continue
        tensors = {n: v for n, v in vars(thin).items() if isinstance(v, Tensor)}
        wide = {n: v for n, v in tensors.items() if v.dim() > at and v.shape[at] == batch[at]}
        if any(v.stride(at) for v in wide.values()):
            return base
        vars(thin).update({n: v.narrow(at, 0, 1) for n, v in wide.items()})
        batch[at] = 1
    thin._batch_shape = torch.Size(batch)
    return thin


def _constant(x: Tensor, dims: frozenset[int]) -> bool:
    # What a plate expanded has stride 0 there; comparing it would take rows times states.
    moving = [d for d in dims if x.shape[d] > 1 and x.stride(d) > 0]
    return all(bool((x == x.narrow(d, 0, 1)).all()) for d in moving)


def constant_along_rows(nodes: Mapping[str, Any], plan: Plan) -> bool:
    """Whether no argument of a distribution differs along the rows."""
    for name, site in plan.reading.sites.items():
        base = unwrap(nodes[name]["fn"])[0]
        for key, value in site.family.arguments(_thin(base, site)).items():
            x = pad(value, len(site.shape), site.arguments[key].event_dim)
            if not _constant(x, site.unit_dims):
                return False
    return True


def same_arguments(nodes: Mapping[str, Any], plan: Plan) -> bool:
    """Whether arguments and priors are those of the rows that were read.

    ``nodes`` are the program's sites on other rows, at the first point of the reading.
    """
    if not constant_along_rows(nodes, plan):
        return False
    params, some = plan.reading.points[0], plan.reading.traces[0].trace.nodes
    for name, site in plan.reading.sites.items():
        pair = [site.family.arguments(unwrap(n[name]["fn"])[0]) for n in (nodes, some)]
        for key, argument in site.arguments.items():
            cut = [
                narrow(v[key], argument.event_dim, len(site.shape), argument.varies) for v in pair
            ]
            if not _close(*cut):
                return False
    for name, parameter in plan.structure.parameters.items():
        if parameter.has_prior:
            densities = [n[name]["fn"].log_prob(params[name]) for n in (nodes, some)]
            if not _close(*densities):
                return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool(((a == b) | ((a - b).abs() <= SAME * (a.abs() + b.abs()))).all())
