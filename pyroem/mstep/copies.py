"""Several fits of one program as one: every parameter with a leading dim of copies.

A plan whose blocks all have a closed form is a chain of elementwise operations over cells; copies
are more cells. Nothing else in the M-step needs to know.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyroem.mstep.plan import Plan, Rung, Use
from pyroem.mstep.selection import Selection
from pyroem.mstep.sites import Argument, SiteModel


def copyable(plan: Plan) -> str:
    """Why the plan cannot be copied; empty where it can."""
    for block in plan.blocks.values():
        if block.rung not in (Rung.CLOSED_FORM, Rung.FIXED):
            return f"parameter '{block.name}' has no closed form"
        if plan.structure.parameters[block.name].held is not None:
            return f"elements of parameter '{block.name}' are held"
    for site in plan.reading.sites.values():
        selections = [a.selection for a in site.arguments.values()]
        if any(s is None or s.factor is not None for s in selections):
            return f"an argument of site '{site.name}' has to be asked of the program"
    return ""


def copied(plan: Plan, count: int) -> Plan:
    """The plan of ``count`` copies."""
    sites = {name: copied_site(site, count) for name, site in plan.reading.sites.items()}
    blocks = {}
    for name, block in plan.blocks.items():
        uses = []
        for use in block.uses:
            blocks_each = _num_blocks(plan, block.name, use)
            cells = _offset(use.cells, count, blocks_each)
            uses.append(Use(sites[use.site.name], use.coordinate, cells))
        blocks[name] = replace(block, uses=tuple(uses))
    return replace(plan, blocks=blocks, reading=replace(plan.reading, sites=sites))


def copied_site(site: SiteModel, count: int) -> SiteModel:
    """A site with a leading batch dim of copies."""
    arguments = {
        key: Argument(
            key,
            argument.event_dim,
            frozenset({0} | {d + 1 for d in argument.varies}),
            argument.parameters,
            None if argument.selection is None else _copied_selection(argument.selection, count),
        )
        for key, argument in site.arguments.items()
    }
    return replace(
        site,
        shape=(count, *site.shape),
        arguments=arguments,
        data=replace(site.data, copied=True),
        mask=None if site.mask is None else site.mask.unsqueeze(0),
        unit_dims=frozenset(d + 1 for d in site.unit_dims),
    )


def _num_blocks(plan: Plan, name: str, use: Use) -> int:
    for argument in use.site.arguments.values():
        if argument.selection is not None and name in argument.selection.sizes:
            return argument.selection.sizes[name]
    raise AssertionError(name)


def _offset(cells: Tensor, count: int, each: int) -> Tensor:
    """Cells of all copies: block ``i`` of copy ``r`` is block ``r * each + i``."""
    first = (torch.arange(count).to(cells) * each).reshape((-1,) + (1,) * cells.dim())
    return torch.where(cells >= 0, cells + first, cells)


def _copied_selection(selection: Selection, count: int) -> Selection:
    total = sum(selection.sizes.values())
    index = selection.index
    result = torch.empty((count, *index.shape), dtype=index.dtype)
    result[:] = torch.where(index >= total, index - total + total * count, index)
    copy = torch.arange(count).reshape((-1,) + (1,) * index.dim())
    offsets, at = {}, 0
    for name, first in selection.offsets.items():
        size = selection.sizes[name]
        inside = (index >= first) & (index < first + size)
        result = torch.where(inside, index - first + at + copy * size, result)
        offsets[name], at = at, at + size * count
    sizes = {name: size * count for name, size in selection.sizes.items()}
    return replace(selection, index=result, offsets=offsets, sizes=sizes)
