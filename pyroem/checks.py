"""What a program must satisfy before it is fitted; each failure names the site and the fault."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

from pyroem._pyro import (
    Enumerated,
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


def check_observation(site: Site, partly: bool = False) -> Tensor | None:
    """Check the data of an observation; where masked cells are unfit, return the data without.

    ``partly`` says that the rest is a site of its own (``obs_mask``): then nothing may be known.
    """
    name, fn, value = site["name"], site["fn"], site["value"]
    if isinstance(fn, pyro.distributions.Unit):
        return None
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
    if shown.any():
        index = tuple(int(i) for i in shown.nonzero()[0])
        raise DataError(
            f"Site '{name}': expected finite data, got {value[index].item()} at index {index}"
            f" ({int(shown.sum())} such cells). Mask them (poutine.mask, .mask() or obs_mask)."
        )
    filled = None
    if bad.any():
        value = filled = torch.where(bad, value[~bad].mean() if (~bad).any() else 0.0, value)
    try:
        ok = base.support.check(value)
    except NotImplementedError:
        return filled
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
            f"Site '{name}': {type(base).__name__} data must lie in {base.support}, got"
            f" {value[index].tolist()} at index {index} ({int((~ok).sum())} such cells)."
        )
    return filled


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
