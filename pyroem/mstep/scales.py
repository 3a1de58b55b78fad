"""The data's own scales: floors of variances, and units of length for numerical searches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyroem.families import forms
from pyroem.mstep.blocks import Block
from pyroem.mstep.probing import Reading
from pyroem.mstep.selection import as_blocks
from pyroem.structure import Structure


def _scatter(block: Block, structure: Structure, event: tuple[int, ...]) -> Tensor | None:
    """For each block of a parameter the data's variance where it stands (the smallest of them)."""
    assert block.form is not None
    value = structure.parameters[block.name].value
    count = len(as_blocks(value, block.form.event_dim))
    result = torch.full((count, *event), torch.inf, dtype=value.dtype)
    dims = len(event)
    for use in block.uses:
        scale = use.site.scale
        if scale is None:
            return None
        batch = torch.broadcast_shapes(scale.shape[: scale.dim() - dims], use.cells.shape)
        scale = scale.expand(batch + event).reshape((-1, *event))
        index = use.cells.expand(batch).reshape(-1)
        chosen = index >= 0
        where = index[chosen].reshape((-1,) + (1,) * dims).expand(scale[chosen].shape)
        result = result.scatter_reduce(0, where, scale[chosen], "amin")
    return result


def variance_floors(
    structure: Structure, blocks: Mapping[str, Block], relative: float
) -> dict[str, Tensor]:
    """For each parameter that stands for a variance, its floor: ``relative`` times the data's."""
    floors = {}
    for block in blocks.values():
        if block.form is None or not block.uses or relative <= 0:
            continue
        if block.uses[0].coordinate.clip is None:
            continue
        shape = structure.parameters[block.name].shape
        batch = shape[: len(shape) - block.form.event_dim]
        event = shape[len(batch) :][:1]
        scale = _scatter(block, structure, event)
        if scale is not None:
            scale = torch.where(scale.isfinite(), scale, 0.0)  # elements that no site uses
            floors[block.name] = (scale * relative).reshape(batch + event)
    return floors


def search_steps(
    structure: Structure, reading: Reading, blocks: Mapping[str, Block]
) -> dict[str, Tensor]:
    """For each parameter the unit in which its unconstrained coordinates are searched.

    A coordinate that moves a location by ``J`` for each unit is measured in ``sd / J``, with
    ``sd`` the data's standard deviation; all others (logarithms, logits) are of order one.
    """
    steps = {}
    for name, parameter in structure.parameters.items():
        raw = parameter.unconstrain(parameter.value)
        unit = torch.ones_like(raw)
        block = blocks[name]
        if block.form in (forms.LOCATION, forms.VECTOR_LOCATION) and raw.shape == parameter.shape:
            assert block.form is not None
            event = parameter.shape[len(parameter.shape) - block.form.event_dim :]
            scale = _scatter(block, structure, event)
            if scale is not None:
                unit = scale.sqrt().reshape(raw.shape)
        elif block.shared is not None:
            pass  # logarithms and angles
        elif block.form in (forms.COVARIANCE, forms.SCALE_TRIL, forms.PRECISION):
            shape = parameter.shape
            scale = _scatter(block, structure, shape[-1:])
            if scale is not None and raw.shape == shape:
                sd = scale.sqrt().reshape((*shape[:-1], 1))
                sd = 1 / sd if block.form is forms.PRECISION else sd
                eye = torch.eye(shape[-1], dtype=torch.bool)
                unit = torch.where(eye, torch.ones_like(raw), sd.expand_as(raw))
        elif block.form is None:
            own = _coefficient_steps(reading, name) if raw.shape == parameter.shape else None
            if own is None:
                unit = unit * _general_step(structure, reading, name)
            else:
                unit = own.reshape(raw.shape).to(raw)
        steps[name] = torch.where(unit.isfinite() & (unit > 0), unit, torch.ones_like(unit))
    return steps


def _coefficient_steps(reading: Reading, name: str) -> Tensor | None:
    """For each coefficient of a predictor what moves it by one: by ``sd``, if it is a location."""
    sizes = []
    for site in reading.sites.values():
        for key, argument in site.arguments.items():
            affine = argument.affine
            if affine is None or name not in affine.names:
                continue
            at = affine.names.index(name)
            first, size = sum(affine.sizes[:at]), affine.sizes[at]
            unit = 1.0
            if key == site.family.location and site.scale is not None:
                unit = float(site.scale.sqrt().mean())
            found = torch.zeros(sum(affine.sizes), dtype=affine.constant.dtype)
            for m, elements in affine.entries:
                if m >= 0:
                    own = affine.matrices[m].square().mean(0).sqrt() / unit
                    found[elements] = torch.maximum(found[elements], own)
            sizes.append(found[first : first + size])
    if not sizes:
        return None
    largest = torch.stack(sizes).amax(0)
    return torch.where(largest > 0, 1 / largest.clamp(min=1e-300), 1.0)


def _general_step(structure: Structure, reading: Reading, name: str) -> float:
    """``sd / J`` of a parameter that a location depends on in some smooth way."""
    parameter = structure.parameters[name]
    raw = [parameter.unconstrain(p[name]) for p in reading.points]
    moved = float((raw[1] - raw[0]).abs().max()) if raw[0].numel() else 0.0
    found = []
    for site in reading.sites.values():
        change = reading.location_changes.get((site.name, name))
        if change and site.scale is not None:
            found.append(float(site.scale.sqrt().mean()) * moved / change)
    for site_name, mark in reading.landmarks.items():
        change = reading.location_changes.get((site_name, name))
        if change:
            found.append(mark.spread * moved / change)
    return min(found, default=1.0)


__all__ = ["search_steps", "variance_floors"]
