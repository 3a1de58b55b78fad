"""Closed forms: the maximiser of a parameter's kernel, summed over every place where it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import unwrap
from pyroem.constraints import SharedConstraint
from pyroem.families import forms
from pyroem.families.forms import Form
from pyroem.mstep.plan import Block, Plan
from pyroem.mstep.runs import Expected, Run, coefficients_of, prior_coefficients
from pyroem.mstep.selection import as_blocks
from pyroem.structure import Params

APART = 1e-10  # relative distance of neighbours in order
FAR_OUT = 230.0  # exp(-230) is 1e-100
SMALLEST = {torch.float64: 1e-100, torch.float32: 1e-30}


def closed_update(
    plan: Plan,
    block: Block,
    params: Params,
    expected: Expected,
    floor: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The maximiser of the expected log-joint in one parameter, the others held fixed.

    Blocks without any weight (a dead component) keep their value.
    """
    form, old = block.form, params[block.name]
    assert form is not None
    run = Run(plan, params)
    parameter = plan.structure.parameters[block.name]
    has_prior, held = parameter.has_prior, parameter.held
    prior = prior_coefficients(form, run.prior(block.name), old) if has_prior else None
    if form.mode_of_cells is not None:
        value = form.mode_of_cells(*_cells(block, run, expected, prior)).reshape(old.shape)
    else:
        totals = pooled(block, run, expected)
        if prior is not None:
            totals = tuple(t + p.reshape(t.shape) for t, p in zip(totals, prior, strict=True))
        if held is not None and form.mode_beside is not None:
            dims = form.event_dim
            around = as_blocks(old, dims), as_blocks(held, dims)
            value = form.mode_beside(*around, *totals).reshape(old.shape)
        elif block.shared is not None:
            value = in_common(block.shared, form, old, totals)
        else:
            value = form.mode(*totals).reshape(old.shape)
        if block.ordered:
            value = in_order(form, value, totals)
    if not math.isfinite(value.sum()):
        value = _without_infinities(value, form)
        value = torch.where(_finite_blocks(value, form.event_dim), value, old)
    if floor is not None and block.name in floor:
        value = clipped(block, value, floor[block.name])
    if "scalar" in form.domain:
        value = _inside(value, block.lower, block.upper)
        if has_prior:
            value = _below(value, run.prior(block.name))
    return value if held is None else torch.where(held, old, value)


def in_order(form: Form, value: Tensor, totals: tuple[Tensor, ...]) -> Tensor:
    """The maximiser with elements that increase along the last dim: pooled adjacent violators.

    A unimodal kernel that adds has its constrained maximum where neighbours out of order share the
    mode of their summed coefficients (Barlow et al., 1972). They are kept apart by a hair, since
    the constraint is strict.
    """
    length = value.shape[-1]
    rows = value.reshape((-1, length)).clone()
    shaped = [t.reshape((-1, length)) for t in totals]
    for r, row in enumerate(rows):
        pools: list[tuple[Tensor, int]] = []  # coefficients, number of elements
        for i in range(length):
            if math.isnan(row[i]):
                return value
            pools.append((torch.stack([t[r, i] for t in shaped]), 1))
            while len(pools) > 1 and form.mode(*pools[-2][0]) >= form.mode(*pools[-1][0]):
                (b, n), (a, m) = pools.pop(), pools.pop()
                pools.append((a + b, m + n))
        row.copy_(torch.cat([form.mode(*c).expand(n) for c, n in pools]))
        row.copy_(_without_infinities(row, form))
        for i in range(1, length):
            row[i] = torch.maximum(row[i], row[i - 1] + APART * (1 + row[i - 1].abs()))
    return rows.reshape(value.shape)


def in_common(
    shared: SharedConstraint, form: Form, old: Tensor, totals: tuple[Tensor, ...]
) -> Tensor:
    """The maximiser over blocks that have something in common, for every copy of the parameter."""
    weight, scatter = totals
    if form is forms.INVERSE_RATE:  # -a log t - b / t, where a covariance has half of each
        weight, scatter = 2 * weight, 2 * scatter
    events = shared.event_dim
    shape = old.shape[old.dim() - events :]
    sizes = shape if form is forms.INVERSE_RATE else shape[:1]
    found = []
    for n, w, before in zip(
        weight.reshape((-1, *sizes)),
        scatter.reshape((-1, *shape)),
        old.reshape((-1, *shape)),
        strict=True,
    ):
        try:
            found.append(shared.maximise(n, w, before))
        except torch.linalg.LinAlgError:  # a scatter without full rank
            found.append(before)
    return torch.stack(found).reshape(old.shape)


def clipped(block: Block, value: Tensor, floor: Tensor) -> Tensor:
    """A parameter with every variance above its floor, and under its constraint still."""
    clip = block.uses[0].coordinate.clip
    if clip is None:
        return value
    high = clip(value, floor)
    if block.shared is None or bool((high - value).abs().max() <= 1e-12 * value.abs().max()):
        return high
    events = block.shared.event_dim
    flat = high.reshape((-1, *high.shape[high.dim() - events :]))
    return torch.stack([block.shared.project(x) for x in flat]).reshape(value.shape)


def _cells(
    block: Block, run: Run, expected: Expected, prior: tuple[Tensor, ...] | None
) -> tuple[Any, ...]:
    """The number of the block in every cell, the number of blocks, and the cells' coefficients."""
    value = run.params[block.name]
    count = value.numel()
    parts = []
    for use in block.uses:
        found = torch.broadcast_tensors(use.cells, *coefficients_of(use, value, run, expected))
        parts.append([c.reshape(-1)[found[0].reshape(-1) >= 0] for c in found])
    if prior is not None:
        parts.append([torch.arange(count), *(p.reshape(-1) for p in prior)])
    index, *coefficients = (torch.cat(list(p)) for p in zip(*parts, strict=True))
    return index, count, *coefficients


def _without_infinities(value: Tensor, form: Form) -> Tensor:
    """Logits, log-rates and the like without a maximum, far out; NaN (no weight at all) stays."""
    if form is forms.LOGITS:  # categories without data, beside the likeliest one
        top = torch.where(value.isfinite(), value, -torch.inf).amax(-1, keepdim=True)
        return torch.where(value == -torch.inf, top - FAR_OUT, value)
    if form.event_dim:
        return value
    far = FAR_OUT if math.isfinite(form.longest) else 1e300
    return torch.where(value.isinf(), value.sign() * far, value)


def _finite_blocks(x: Tensor, event_dim: int) -> Tensor:
    finite = x.isfinite()
    if event_dim:
        batch = finite.shape[: finite.dim() - event_dim]
        finite = finite.flatten(len(batch)).all(-1).reshape(batch + (1,) * event_dim)
    return finite


def _inside(x: Tensor, lower: float, upper: float) -> Tensor:
    """Clip to the open interval; a closed unit interval may be reached."""
    if (lower, upper) == (0.0, 1.0):
        return x.clamp(0.0, 1.0)
    if lower == 0.0:
        return x.clamp(SMALLEST[x.dtype], upper if upper < torch.inf else 1 / SMALLEST[x.dtype])
    width = 1e-12 if x.dtype == torch.float64 else 1e-6
    low = lower + width * max(1.0, abs(lower)) if lower > -torch.inf else None
    high = upper - width * max(1.0, abs(upper)) if upper < torch.inf else None
    return x if low is None and high is None else x.clamp(low, high)


def _below(x: Tensor, prior: Any) -> Tensor:
    """Off the upper bound of a Uniform prior, which gives it no density."""
    base, _, _ = unwrap(prior["fn"])
    if type(base) is not dist.Uniform:
        return x
    return torch.minimum(x, torch.nextafter(base.high.to(x), base.low.to(x)))


def pooled(block: Block, run: Run, expected: Expected) -> tuple[Tensor, ...]:
    """The coefficients of a parameter's kernel, summed over every cell where it stands."""
    form, value = block.form, run.params[block.name]
    assert form is not None
    blocks = as_blocks(value, form.event_dim)
    event = tuple(blocks.shape[1:])
    if block.alone and block.uses[0].cells.numel() == len(blocks):  # the usual case needs no sums
        found = coefficients_of(block.uses[0], value, run, expected)
        shapes = [(*event[:1] * dims,) if form.event_dim else () for dims in form.coefficient_dims]
        if all(
            c.shape[: c.dim() - len(s)] == block.uses[0].cells.shape
            for c, s in zip(found, shapes, strict=True)
        ):
            return tuple(c.reshape((len(blocks), *s)) for c, s in zip(found, shapes, strict=True))
    totals: list[Tensor] = []
    for dims in form.coefficient_dims:
        shape = (*event[:1] * dims,) if form.event_dim else ()
        totals.append(torch.zeros((len(blocks), *shape), dtype=value.dtype, device=value.device))
    for use in block.uses:
        coefficients = coefficients_of(use, value, run, expected)
        for i, (c, dims) in enumerate(zip(coefficients, form.coefficient_dims, strict=True)):
            c = _summed(c, use.cells, dims)
            batch = torch.broadcast_shapes(c.shape[: c.dim() - dims], use.cells.shape)
            index = use.cells.expand(batch).reshape(-1)
            c = c.expand(batch + c.shape[c.dim() - dims :]).reshape(
                (-1, *c.shape[c.dim() - dims :])
            )
            chosen = index >= 0
            totals[i] = totals[i].index_add(0, index[chosen], c[chosen])
    return tuple(totals)


def _summed(c: Tensor, cells: Tensor, dims: int) -> Tensor:
    """Coefficients summed over the dims along which the same block stands everywhere."""
    rank = c.dim() - dims
    if rank != cells.dim():
        return c
    alike = [d for d in range(rank) if cells.shape[d] == 1 and c.shape[d] > 1]
    return c.sum(alike, keepdim=True) if alike else c
