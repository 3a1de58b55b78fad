"""Pictures of the way to the optimum: of one fit, and of several side by side."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pyroem.plot.style import COLUMN, as_text, grid, legend, looks, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST_GAP = 1e-10


class HasFits(Protocol):
    """Fits by name; each has a ``history`` of records with iteration, log_joint and seconds."""

    @property
    def fits(self) -> Mapping[str, Any]:
        """The fits."""
        ...


def comparison(comparison: HasFits, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
    """Draw each solver's gap to the best log-joint, against iterations and against seconds.

        gap(t) = max over solvers and iterations of log_joint  -  log_joint(t)

    Gaps below a floor, 1e-10 or the rounding error of the log-joint if that is larger, are drawn
    at the floor, and the axis says so. Records that are not finite are not drawn.

    Raises:
        ValueError: no record of any fit is finite.
    """
    histories = {
        name: [r for r in fit.history if math.isfinite(r.log_joint)]
        for name, fit in comparison.fits.items()
    }
    records = [record for history in histories.values() for record in history]
    if not records:
        raise ValueError("Expected a finite log-joint in some fit's history; there is none.")
    best = max(record.log_joint for record in records)
    floor = _floor(best)
    shortest = min((record.seconds for record in records if record.seconds > 0), default=1.0)
    tick = 10.0 ** math.floor(math.log10(shortest))
    with styled():
        if axes is None:
            axes = new_axes(2 * COLUMN, 2.9, columns=2, sharey=True)
        by_iteration, by_seconds = axes
        for look, (name, history) in zip(looks(), histories.items(), strict=False):
            gaps = [max(best - record.log_joint, floor) for record in history]
            label = as_text(name if gaps else f"{name} (no finite value)")
            for ax, unit, times in (
                (by_iteration, 1.0, [float(record.iteration) for record in history]),
                (by_seconds, tick, [record.seconds for record in history]),
            ):
                ax.plot(times, gaps, label=label, markevery=_spread(times, unit), **look)
        _time_axis(by_iteration, "iteration", 1.0, max(r.iteration for r in records))
        _time_axis(by_seconds, "seconds", tick, max(r.seconds for r in records))
        for ax in (by_iteration, by_seconds):
            ax.set_yscale("log")
            grid(ax)
        by_iteration.set_ylabel(f"gap to the best log-joint\n(drawn down to {floor:.0e})")
        legend(by_iteration, by_seconds)
    return by_iteration, by_seconds


def history(fits: Any | Mapping[str, Any], axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
    """Draw the log-joint of a fit, or of several by name, against iterations and against seconds.

    Without a prior the log-joint is the log-likelihood. Records that are not finite are not drawn.
    """
    named = fits if isinstance(fits, Mapping) else {fits.solver: fits}
    with styled():
        if axes is None:
            axes = new_axes(2 * COLUMN, 2.6, columns=2, sharey=True)
        by_iteration, by_seconds = axes
        for look, (name, fit) in zip(looks(), named.items(), strict=False):
            records = [r for r in fit.history if math.isfinite(r.log_joint)]
            values = [r.log_joint for r in records]
            for ax, times in (
                (by_iteration, [float(r.iteration) for r in records]),
                (by_seconds, [r.seconds for r in records]),
            ):
                some: dict[str, Any] = {"markevery": max(1, len(values) // 12)}
                ax.plot(times, values, label=as_text(name), **look, **some)
        by_iteration.set_xlabel("iteration")
        by_seconds.set_xlabel("seconds")
        priors = any(fit.log_prior for fit in named.values())
        by_iteration.set_ylabel("log-joint" if priors else "log-likelihood")
        for ax in (by_iteration, by_seconds):
            ax.ticklabel_format(axis="y", useOffset=False)
            grid(ax)
        if len(named) > 1:
            legend(by_iteration, by_seconds)
    return by_iteration, by_seconds


def _floor(best: float) -> float:
    """The smallest power of ten that is neither below 1e-10 nor lost in rounding."""
    rounding = 4 * torch.finfo(torch.float64).eps * abs(best)
    return float(10.0 ** math.ceil(math.log10(max(SMALLEST_GAP, rounding)) - 1e-9))


def _spread(times: list[float], unit: float) -> list[int]:
    """Indices of about eight records that are evenly spaced on a `_time_axis`: marker positions."""
    place = [math.asinh(time / unit) for time in times]
    targets = [place[-1] * step / 7 for step in range(8)] if place else []
    return sorted({min(bisect_left(place, target), len(place) - 1) for target in targets})


def _time_axis(ax: Axes, label: str, unit: float, longest: float) -> None:
    """From zero, and logarithmic beyond ``unit`` where the axis is long."""
    ax.set_xlabel(label)
    if longest > 20 * unit:
        ax.set_xscale("symlog", linthresh=unit, linscale=0.5)
        ax.set_xlim(0, 1.3 * longest)
    elif longest > 0:
        ax.set_xlim(0, 1.03 * longest)
