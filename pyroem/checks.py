"""What a program must satisfy before it is fitted; each failure names the site and the fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroem._pyro import (
    VECTORS,
    Enumerated,
    Missing,
    Program,
    Site,
    Values,
    enumerated,
    is_plate_site,
    plate_frames,
    unwrap,
)
from pyroem.errors import DataError, ModelError
from pyroem.structure import Parameter, base_mask, quoted


def kind_of(site: Site) -> str:
    """The class name of the bare distribution, for messages."""
    return type(unwrap(site["fn"])[0]).__name__


def check_plates(site: Site) -> None:
    """Every plate must hold all of its rows: those around a site, and the one a site stands for."""
    sizes = [(f.name, f.size, getattr(f, "full_size", None)) for f in plate_frames(site)]
    if is_plate_site(site):
        sizes.append((site["name"], site["fn"].subsample_size, site["fn"].size))
    for plate, size, full in sizes:
        if size is not None and full is not None and size != full:
            raise ModelError(
                f"Plate '{plate}' is subsampled ({size} of {full}); a fit uses all the data."
                " Take subsample_size and subsample out of the program."
            )


def check_batch(name: str, site: Site) -> None:
    """Every batch dim of size over one must be a plate."""
    dims = {f.dim for f in plate_frames(site) if f.vectorized}
    shape = site["fn"].batch_shape
    wide = [i - len(shape) for i, size in enumerate(shape) if size > 1]
    loose = [dim for dim in wide if dim not in dims]
    if loose:
        raise ModelError(
            f"Site '{name}' has batch shape {tuple(shape)}, but no plate declares dim {loose[0]}."
            " Put the statement into a pyro.plate of that size, or declare the dim a part of the"
            " event with .to_event()."
        )


@dataclass(frozen=True)
class Checked:
    """Data that was checked: without unfit cells where there are such, and what is missing."""

    fill: Tensor | None = None
    missing: Missing | None = None


def check_observation(site: Site, partly: bool = False) -> Checked:
    """Check the data of an observation; where masked cells are unfit, give the data without.

    NaN is a missing value. ``partly`` says that the rest is a site of its own (``obs_mask``), or
    of other data: then nothing may be known.
    """
    name, fn, value = site["name"], site["fn"], site["value"]
    if isinstance(fn, pyro.distributions.Unit):
        return Checked()
    expected = tuple(fn.batch_shape + fn.event_shape)
    try:
        fits = torch.broadcast_shapes(value.shape, expected) == expected
    except RuntimeError:
        fits = False
    if not fits:
        raise DataError(
            f"Site '{name}': expected data of shape {expected}, got {tuple(value.shape)}."
        )
    base, _, _ = unwrap(fn)
    mask = base_mask(site)
    if mask is not None:
        own = tuple(mask.shape)
        mask = mask.reshape(mask.shape + (1,) * len(base.event_shape))
        try:
            value, mask = torch.broadcast_tensors(value, mask)
        except RuntimeError as error:
            raise DataError(
                f"Site '{name}': its mask has shape {own}, which does not fit data of shape"
                f" {tuple(value.shape)}."
            ) from error
    # A finite sum says the same of all its terms, and takes no memory.
    bad = torch.zeros(()).bool() if value.sum().isfinite() else ~value.isfinite()
    if mask is not None and not mask.any() and not partly:
        raise DataError(f"Site '{name}': every cell is masked; there is nothing to fit to.")
    shown = bad if mask is None else bad & mask
    missing = None
    if shown.any():
        _check_infinite(name, value, shown & ~value.isnan())
        missing = _missing(name, base, value, shown, mask, partly)
    filled = None
    if bad.any():
        if missing is None:
            filler = value[~bad].mean() if (~bad).any() else torch.zeros(())
        else:
            filler = missing.filler
        value = filled = torch.where(bad, filler.to(value), value)
    try:
        ok = base.support.check(value)
    except NotImplementedError:
        return Checked(filled, missing)
    if mask is not None:
        cell_mask = mask
        for _ in range(mask.dim() - ok.dim()):
            cell_mask = cell_mask[..., 0]
        hidden = ~ok & ~cell_mask
        if hidden.any() and (ok & cell_mask).any():
            example = value[tuple(int(i) for i in (ok & cell_mask).nonzero()[0])]
            at = hidden.reshape(hidden.shape + (1,) * (value.dim() - hidden.dim()))
            value = filled = torch.where(at, example, value)
        ok = ok | ~cell_mask
    if not ok.all():
        index = tuple(int(i) for i in (~ok).nonzero()[0])
        raise DataError(
            f"Site '{name}': {type(base).__name__} data must lie in"
            f" {_bounds_at(base.support, index, value.shape)}, got"
            f" {value[index].tolist()} at index {index} ({int((~ok).sum())} such cells)."
        )
    return Checked(filled, missing)


def _check_infinite(name: str, value: Tensor, bad: Tensor) -> None:
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"Site '{name}': expected finite data, or NaN for a missing value, got"
            f" {value[index].item()} at index {index} ({int(bad.sum())} such cells)."
        )


def _missing(
    name: str, base: Any, value: Tensor, bad: Tensor, mask: Tensor | None, partly: bool
) -> Missing:
    """What is missing, with an event that can stand in for it: one that was seen."""
    events = len(base.event_shape)
    gone = value.isnan()
    within = gone.flatten(value.dim() - events) if events else gone.unsqueeze(-1)
    total = gone.numel() if mask is None else int(mask.expand_as(gone).sum())
    if bool((gone if mask is None else gone | ~mask).all()) and not partly:
        raise DataError(f"Site '{name}': every value is missing; there is nothing to fit to.")
    whole = ~within.any(-1)
    if isinstance(base, VECTORS):
        seen = (~gone).reshape((-1, value.shape[-1]))
        rows = torch.where(seen, value.reshape(seen.shape), 0.0)
        if bool((~seen).all(0).any()) and not partly:
            column = int((~seen).all(0).nonzero()[0])
            raise DataError(f"Site '{name}': every value of column {column} is missing.")
        filler = rows.sum(0) / seen.sum(0).clamp(min=1)
    elif bool((~whole & ~within.all(-1)).any()):
        index = tuple(int(i) for i in (~whole & ~within.all(-1)).nonzero()[0])
        raise DataError(
            f"Site '{name}': the {type(base).__name__} at index {index} is missing in part, which"
            " has no density of its own. Give all of it, or NaN in all its elements."
        )
    else:
        seen = value.reshape((-1, *value.shape[value.dim() - events :]))[whole.reshape(-1)]
        filler = seen[0] if len(seen) else torch.zeros(value.shape[value.dim() - events :])
        if len(seen) and not events:
            filler = _suiting_all(base, value, gone, seen)
    return Missing(filler, int(bad.sum()), total)


def _suiting_all(base: Any, value: Tensor, gone: Tensor, seen: Tensor) -> Tensor:
    """A value that is in the support wherever one is missing; bounds may differ by row."""
    for filler in (seen[0], seen.min(), torch.zeros_like(seen[0]), seen.max()):
        try:
            if bool((base.support.check(torch.where(gone, filler, value)) | ~gone).all()):
                return filler
        except NotImplementedError:
            break
    return seen[0]


def _bounds_at(support: Any, index: tuple[int, ...], shape: torch.Size) -> str:
    """A support in words; where its bounds differ by cell, those at ``index``."""
    bounds = {k: v for k, v in vars(support).items() if isinstance(v, Tensor) and v.numel() > 1}
    if not bounds:
        return str(support)
    own = {}
    for k, v in vars(support).items():
        try:
            whole = v.expand(shape) if isinstance(v, Tensor) else v
            own[k] = whole[index].item() if isinstance(whole, Tensor) else whole
        except (RuntimeError, IndexError):
            return type(support).__name__
    inside = ", ".join(f"{k}={v:g}" for k, v in own.items() if isinstance(v, int | float))
    return f"{type(support).__name__.lstrip('_')}({inside}) there"


def check_assignments_plates(
    run: Enumerated, nodes: Mapping[str, Site], assignments: list[str]
) -> None:
    """A site that depends on an assignment must stand in all of the assignment's plates."""
    own = {n: {f.name for f in plate_frames(nodes[n]) if f.vectorized} for n in run.factors}
    for name, factor in run.factors.items():
        for z in assignments:
            if z in own and run.states[z] in factor.dims and not own[z] <= own[name]:
                plate = sorted(own[z] - own[name])[0]
                raise ModelError(
                    f"Site '{name}' depends on assignment '{z}' of plate '{plate}', but does not"
                    f" stand in that plate: it would share one '{z}' between all rows. Put both"
                    " into the same plate (not two plates over the same rows)."
                )


def check_dependence(
    first: Enumerated,
    program: Program,
    start: Values,
    nesting: int,
    factor_sites: frozenset[str],
    parameters: Mapping[str, Parameter],
) -> None:
    """Some site must depend on every parameter, and nothing may be random but its start.

    ``first`` is a run at the same values with another random seed.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    with torch.enable_grad():
        run = enumerated(program, leaves, nesting, factor_sites)
        total = sum((t.sum() for t in run.tensors().values()), torch.zeros(()))
        for name, parameter in parameters.items():
            if parameter.has_prior and name not in factor_sites:
                site = run.trace.nodes[name]
                total = total + site["fn"].log_prob(site["value"].detach()).sum()
    for name, factor in run.factors.items():
        if not torch.allclose(factor.tensor, first.factors[name].tensor, equal_nan=True):
            raise ModelError(
                f"Site '{name}': its log-probability differs between two runs at the same values,"
                " because the program draws random numbers. Draw them before the fit, and pass"
                " them in as data."
            )
    if not leaves:
        return
    if not total.requires_grad:
        grads: list[Tensor | None] = [None] * len(leaves)
    else:
        grads = list(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
    unused = [name for name, g in zip(leaves, grads, strict=True) if g is None]
    if unused:
        raise ModelError(
            f"No site depends on parameter {quoted(unused)}: the data cannot inform it. Take it out"
            " of the program, or use it."
        )
