"""The objective around a fit: along one parameter, over two, and the way that solvers take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroem.errors import SettingError
from pyroem.plot.style import COLOURS, GREY, as_text, grid, legend, looks, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyroem.curves import Curve, Surface
    from pyroem.fit import Fit
    from pyroem.profiles import Profile

DEPTH = 12.0  # nats below the highest value that are drawn of a curve beside a profile
SHADES = 14


def likelihood(
    curve: Curve | None = None, profile: Profile | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the log-joint along one parameter: with the rest held, and with the rest maximised.

    ``fit.curve("loc[0]")`` and ``fit.profile("loc[0]")``; either or both. The dotted line is where
    the profile's interval ends, which is shaded.

    Raises:
        SettingError: neither is given, or they are of different parameters.
    """
    both = [x for x in (curve, profile) if x is not None]
    if not both or len({x.name for x in both}) > 1:
        names = ", ".join(x.name for x in both) or "nothing"
        raise SettingError(f"Expected a curve, a profile or both, of one parameter; got {names}.")
    with styled():
        if ax is None:
            ax = new_axes()
        if curve is not None:
            label = "the rest held" if profile is not None else "log-joint"
            ax.plot(curve.values.numpy(), _finite(curve.log_joint), color=COLOURS[0], label=label)
        if profile is not None:
            _draw_profile(ax, profile)
        top = both[-1]
        ax.axvline(float(top.estimate), color=GREY, linewidth=0.8, zorder=0)
        if profile is not None and curve is not None:
            low = float(profile.log_joint[profile.log_joint.isfinite()].min())
            ax.set_ylim(bottom=min(low, profile.maximum - DEPTH / 4) - 0.5)
            values = profile.values
            ax.set_xlim(float(values.min()), float(values.max()))
        ax.set_xlabel(as_text(top.name))
        ax.set_ylabel("log-joint")
        ax.ticklabel_format(axis="y", useOffset=False)
        grid(ax)
        if len(both) > 1 or profile is not None:
            legend(ax)
    return ax


def _draw_profile(ax: Axes, profile: Profile) -> None:
    from scipy.stats import chi2

    style: dict[str, Any] = {"color": COLOURS[1], "linestyle": "--", "marker": "o"}
    style |= {"markersize": 3, "markerfacecolor": "white", "label": "profile"}
    ax.plot(profile.values.numpy(), _finite(profile.log_joint), **style)
    drop = 0.5 * float(chi2.ppf(profile.level, 1))
    ax.axhline(profile.maximum - drop, color="#000000", linestyle=":", linewidth=0.9)
    low, high = (float(end) for end in profile.interval)
    if low == low and high == high:
        left, right = max(low, float(profile.values.min())), min(high, float(profile.values.max()))
        label = f"{profile.level:.0%} interval"
        ax.axvspan(left, right, color=COLOURS[4], alpha=0.18, linewidth=0, label=label)


def surface(
    surface: Surface, paths: Mapping[str, Fit] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the log-joint over two parameters, and the paths of fits that kept theirs.

    The rest is held, so that a path is seen as its shadow: at its end it need not stand at the top,
    unless the rest ends where the surface was taken. A ring marks where a path began, a cross the
    point around which the surface was taken.

    Raises:
        SettingError: a fit has no path (give its solver ``keep_path=True``).
    """
    named = dict(paths or {})
    for name, fit in named.items():
        if not fit.path:
            raise SettingError(f"Fit '{name}' kept no path: use a solver with keep_path=True.")
    first, second = surface.values
    with styled():
        if ax is None:
            ax = new_axes(height=3.1)
        height = surface.log_joint.T
        depth = _levels(height)
        shown = height.clamp(min=float(depth[0])).numpy()
        filled = ax.contourf(first.numpy(), second.numpy(), shown, levels=depth, cmap="Greys_r")
        filled.set_alpha(0.55)
        for look, (name, fit) in zip(looks(), named.items(), strict=False):
            way = torch.tensor([surface.project(params) for params in fit.path])
            style = {**look, "markevery": max(1, len(way) // 25), "markersize": 3, "linewidth": 1.2}
            ax.plot(*way.T.numpy(), label=as_text(name), clip_on=True, **style)
            ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": 8}
            ax.plot(*way[0].tolist(), "o", color=look["color"], **ring)
        ax.plot(*map(float, surface.estimate), "+", color="#000000", markersize=10, zorder=6)
        ax.set_xlim(float(first.min()), float(first.max()))
        ax.set_ylim(float(second.min()), float(second.max()))
        ax.set_xlabel(as_text(surface.names[0]))
        ax.set_ylabel(as_text(surface.names[1]))
        bar = ax.figure.colorbar(filled, ax=ax, format="%.5g")
        bar.set_label("log-joint")
        bar.ax.tick_params(labelsize=7)
        if named:
            legend(ax, bar.ax)
    return ax


def _levels(height: Tensor) -> Tensor:
    """Levels that crowd towards the top, where the optimum is."""
    finite = height[height.isfinite()]
    top, bottom = float(finite.max()), float(finite.quantile(0.02))
    steps = torch.linspace(1, 0, SHADES, dtype=torch.float64) ** 2
    levels = top - (top - bottom) * steps
    return levels if top > bottom else torch.tensor([top - 1.0, top])


def _finite(values: Tensor) -> Any:
    return torch.where(values.isfinite(), values, torch.nan).numpy()
