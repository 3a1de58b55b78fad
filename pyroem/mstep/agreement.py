"""Every family is held against the distribution that it speaks for, whoever registered it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from pyroem._pyro import Enumerated, unwrap
from pyroem.errors import ModelError
from pyroem.families import Coordinate
from pyroem.mstep.sites import SiteModel, pad
from pyroem.structure import Params

STEP = 1e-3  # relative distance at which a maximiser is compared with its neighbours


def check_families(
    sites: Iterable[SiteModel], traces: tuple[Enumerated, Enumerated], point: Params
) -> None:
    """Check each family's density at its sites, and its closed forms once.

    Raises:
    ------
    ModelError
        Naming the site, the distribution and what does not agree.
    """
    seen = set()
    for site in sites:
        if site.family.latent is None:
            _check_density(site, traces)
        else:
            _check_bound(site, traces)
        for coordinate in site.family.coordinates:
            argument = site.arguments[coordinate.argument]
            key = (id(site.family), coordinate.name)
            selected = (
                argument.selection is not None and argument.selection.coordinate is coordinate
            )
            if selected and argument.parameters and key not in seen:
                seen.add(key)
                _check_coordinate(site, coordinate, traces[0], point)


def _check_coordinate(
    site: SiteModel, coordinate: Coordinate, trace: Enumerated, point: Params
) -> None:
    """The kernel's maximiser must maximise the expected log-density, all rows weighing alike."""
    if coordinate.form.event_dim or not coordinate.form.known or coordinate.form.mode_of_cells:
        return
    node = trace.trace.nodes[site.name]
    base, _, _ = unwrap(node["fn"])
    rows = torch.ones(site.shape[: len(site.shape) - site.events], dtype=site.dtype)
    statistics = site.expected(rows, base)
    arguments = site.centred(site.evaluate(point, lambda: base))
    mode = coordinate.form.mode(
        *coordinate.coefficients(statistics.values, statistics.weight, arguments)
    )

    def density(value: Tensor) -> Tensor:
        moved = {**arguments, coordinate.argument: coordinate.inverse(value)}
        return site.family.log_density(moved, statistics.values, statistics.weight)

    best, step = density(mode), STEP * mode.abs()
    precision = 1e-7 if best.dtype == torch.float64 else 1e-3
    for other in (density(mode + step), density(mode - step)):
        gain = (other - best).nan_to_num(nan=0.0)
        if (gain[best.isfinite()] > precision * (1 + best[best.isfinite()].abs())).any():
            raise ModelError(
                f"Site '{site.name}': the closed form of coordinate '{coordinate.name}' in the"
                f" family of {type(base).__name__} does not maximise the expected log-density."
                f" Mend its coefficients (kernel {coordinate.form.kernel})."
            )


def _check_density(site: SiteModel, traces: tuple[Enumerated, ...]) -> None:
    """The family must agree with the distribution's own log_prob, up to the base measure.

    It is tried on a few rows and states, at both probes.
    """
    rank = len(site.shape)
    few = tuple(_few(t, rank) for t in site.data.few)
    one = torch.ones((1,) * rank, dtype=site.dtype)
    mask = one if site.mask is None else _few(site.mask, rank)
    cut = site if site.centre is None else replace(site, centre=_few(site.centre, rank))
    gaps, size = [], 1.0
    for trace in traces:
        node = trace.trace.nodes[site.name]
        own, _, _ = unwrap(node["fn"])
        arguments = {k: _few(v, rank) for k, v in site.arguments_in(own).items()}
        density = site.family.log_density(cut.centred(arguments), few, one)
        exact = _few(own.log_prob(pad(node["value"], rank, len(own.event_shape))), rank)
        possible = (mask > 0) & exact.isfinite()  # a count above zero at rate zero is not
        gaps.append(torch.where(possible, density - exact, 0.0))
        size += float(torch.where(possible, exact, 0.0).abs().max())
    tolerance = 1e-6 if one.dtype == torch.float64 else 1e-2
    worst = (gaps[0] - gaps[1]).abs().max()
    if not worst <= tolerance * size:
        raise ModelError(
            f"Site '{site.name}': the registered family of {type(own).__name__} does not agree with"
            f" its log_prob (difference {float(worst):g} beyond the base measure). Are the"
            " arguments within their bounds (a scale that may become negative needs a constraint)?"
            " Are covariates so large that exponentials overflow?"
            " If the family is your own, mend its statistics, natural parameters or log-normaliser."
        )


def _check_bound(site: SiteModel, traces: tuple[Enumerated, ...]) -> None:
    """From one probe to the other ``log_prob`` must gain at least what the expected density gains.

    So it is for every latent variable whose posterior at the first probe is used (Jensen).
    """
    rank = len(site.shape)
    bases = [unwrap(trace.trace.nodes[site.name]["fn"])[0] for trace in traces]
    x = site.data.value
    exact = [base.log_prob(x) for base in bases]
    arguments = [site.centred(site.arguments_in(base)) for base in bases]
    one = torch.ones((1,) * rank, dtype=site.dtype)
    for here, there in ((0, 1), (1, 0)):
        statistics = site.statistics_at(bases[here])
        density = [site.family.log_density(a, statistics, one) for a in arguments]
        gap = (density[there] - density[here]) - (exact[there] - exact[here])
        gap = gap[gap.isfinite()]
        size = 1 + exact[here][exact[here].isfinite()].abs().max()
        if gap.numel() and gap.max() > (1e-9 if x.dtype == torch.float64 else 1e-3) * size:
            raise ModelError(
                f"Site '{site.name}': the registered family of {type(bases[0]).__name__} is not a"
                f" lower bound of its log_prob (it exceeds it by {float(gap.max()):g}). Mend its"
                " latent statistics or its log_density."
            )


def _few(x: Tensor, rank: int, most: int = 32) -> Tensor:
    for dim in range(rank):
        x = x.narrow(dim, 0, min(most, x.shape[dim]))
    return x
