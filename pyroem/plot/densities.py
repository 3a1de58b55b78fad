"""One column of the data, with the density that was fitted to it, and who is responsible where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroem.components import Components
from pyroem.plot.style import (
    GREY,
    MOST_POINTS,
    PALE,
    as_text,
    legend,
    line_looks,
    looks,
    new_axes,
    percent,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyroem.fit import Fit

POINTS = 400
POINT = 1e-7  # of the range of the data: a component that is narrower has no width
MOST_FOR_KDE = 20_000
MOST_VALUES = 400  # of a count that are drawn one by one
FAR = 12.0  # times the interquartile range: beyond, the tails are cut off


def density(
    fit: Fit, site: str | None = None, column: int = 0, ax: Axes | None = None, kde: bool = True
) -> Axes:
    """Draw one column of an observation: its histogram and what was fitted to it.

    The fitted density is that of the parameters, the mean over the rows, and the components are its
    parts (see :mod:`pyroem.components`); with them a kernel density estimate of the data, with
    Scott's bandwidth. Of counts and categories: relative frequencies, and the fitted probabilities.

    Raises:
        SettingError: there are several observations and none is named, or there is no such column.
    """
    found = fit.components(site)
    values, weights = found.column(column)
    with styled():
        if ax is None:
            ax = new_axes()
        ax.set_xlabel(as_text(found.column_name(column)))
        labels = shares_of(found)
        if found.discrete:
            _draw_counts(ax, found, values, weights, column, labels)
        else:
            grid = fine(found, column, values)
            draw_data(ax, values, grid, weights)
            if kde:
                _draw_kde(ax, values, span(values), weights)
            parts = found.density(grid, column)
            if parts is not None:
                draw_density(ax, grid, parts, labels, points_of(found, column, values))
        legend(ax)
        tell_rows(ax, found)
    return ax


def responsibilities(
    fit: Fit, site: str | None = None, column: int = 0, ax: Axes | None = None
) -> Axes:
    """Draw the posterior probability of each state against a column of an observation.

    ``p(z = k | x)`` as a curve where it is a function of the column alone (one column, the same
    distributions in all rows, no chain, and one observation); else one dot for each row.
    """
    found = fit.components(site)
    values, _ = found.column(column)
    structure = fit.problem.sample.structure
    differ = found.varies or found.varying_shares
    alone = not (structure.chains or differ or len(structure.observations) > 1)
    with styled():
        if ax is None:
            ax = new_axes()
        if alone and found.values.shape[1] == 1 and not found.discrete:
            grid = fine(found, column, values)
            parts = found.density(grid, column)
            assert parts is not None
            shares = (parts / parts.sum(0)).numpy()
            ax.set_xlim(float(grid[0]), float(grid[-1]))
            for look, label, share in zip(line_looks(), found.labels, shares, strict=False):
                ax.plot(grid.numpy(), share, label=as_text(label), **look)
            inside = values[(values >= grid[0]) & (values <= grid[-1])]
            some = inside[:: max(1, math.ceil(len(inside) / 500))].numpy()
            rug: dict[str, Any] = {"color": GREY, "linestyle": "none", "markersize": 4}
            ax.plot(some, [-0.05] * len(some), "|", label="data", **rug)
        else:
            seen = ~found.values[:, column].isnan() & (found.weights.sum(1) > 0)
            values = found.values[seen, column]
            rows = found.weights[seen] / found.weights[seen].sum(1, keepdim=True)
            step = math.ceil(len(values) / MOST_POINTS)
            for look, label, own in zip(looks(), found.labels, rows.T, strict=False):
                dots: dict[str, Any] = {"alpha": 0.6, "linewidths": 0, "rasterized": True}
                dots |= {"s": 16 if len(values) < 500 else 9}
                dots |= {"color": look["color"], "marker": look["marker"]}
                name = as_text(label)
                ax.scatter(values[::step].numpy(), own[::step].numpy(), label=name, **dots)
            if not found.discrete:
                ends = span(values)
                ax.set_xlim(float(ends[0]), float(ends[-1]))
        ax.set_xlabel(as_text(found.column_name(column)))
        ax.set_ylabel("posterior probability")
        ax.set_ylim(-0.08, 1.05)
        legend(ax)
        tell_rows(ax, found)
    return ax


def shares_of(found: Components) -> list[str]:
    """The labels of the states with their shares of the rows; of one state without."""
    if len(found.labels) < 2:
        return [as_text(label) for label in found.labels]
    pairs = zip(found.labels, found.shares.tolist(), strict=True)
    return [as_text(f"{label} ({percent(share)})") for label, share in pairs]


def tell_rows(ax: Axes, found: Components) -> None:
    """Say where not all rows are drawn."""
    if found.rows > len(found.values):
        words = f"{len(found.values):,} of {found.rows:,} rows"
        before = ax.get_title(loc="right")
        ax.set_title(f"{before}; {words}" if before else words, loc="right", fontsize=8)


def points_of(found: Components, column: int, values: Tensor) -> dict[int, float]:
    """The components that are a point, so far as the data can tell, and where."""
    means, covariances = found.moments
    reach = float(values.max() - values.min()) or abs(float(values[0])) or 1.0
    sd = covariances[:, column, column].clamp(min=0).sqrt()
    return {k: float(means[k, column]) for k, s in enumerate(sd.tolist()) if s < POINT * reach}


def fine(found: Components, column: int, values: Tensor) -> Tensor:
    """:func:`span`, with more points where the data and the components are."""
    whole = span(values)
    low, high = float(whole[0]), float(whole[-1])
    means, covariances = found.moments
    mean, sd = means[:, column, None], covariances[:, column, column, None].clamp(min=0).sqrt()
    around = mean + sd * torch.linspace(-5, 5, 101, dtype=torch.float64)
    levels = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    some = values[:: math.ceil(len(values) / 100_000)].double()
    grid = torch.cat([whole, torch.quantile(some, levels), around.reshape(-1)])
    grid = grid[grid.isfinite() & (grid >= low) & (grid <= high)].unique()
    bound = math.pi if found.circular else math.inf
    return grid[(grid >= -bound) & (grid <= bound)]


def span(values: Tensor, margin: float = 0.05) -> Tensor:
    """Where to draw: the range of the data, without tails that would leave no room for the rest."""
    low, high = values.min().item(), values.max().item()
    some = values[:: math.ceil(len(values) / 100_000)]
    levels = torch.tensor([0.005, 0.25, 0.75, 0.995], dtype=some.dtype)
    left, lower, upper, right = torch.quantile(some, levels).tolist()
    reach = FAR * (upper - lower)
    if reach > 0:
        low, high = (
            (left if low < lower - reach else low),
            (right if high > upper + reach else high),
        )
    room = margin * (high - low) or 0.5
    return torch.linspace(low - room, high + room, POINTS, dtype=torch.float64)


def draw_data(ax: Axes, values: Tensor, grid: Tensor, weights: Tensor | None = None) -> None:
    """A histogram of the values within the grid, of density scale over all of them."""
    low, high = max(grid[0].item(), values.min().item()), min(grid[-1].item(), values.max().item())
    bins = min(60, max(10, 2 * math.ceil(len(values) ** (1 / 3))))
    own = torch.ones_like(values) if weights is None else weights
    if not high > low:  # one value: a bar around it
        low, high = grid[0].item(), grid[-1].item()
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    heights, _ = torch.histogram(values.double(), edges, weight=own.double())
    heights = heights / own.sum() / edges.diff()
    ax.stairs(heights.numpy(), edges.numpy(), fill=True, color=PALE, label="data")
    beyond = float(own[(values < low) | (values > high)].sum() / own.sum())
    if beyond > 0:
        ax.set_title(f"{beyond:.1%} of the data beyond", loc="right", fontsize=8)


def draw_density(
    ax: Axes,
    grid: Tensor,
    parts: Tensor,
    labels: Sequence[str],
    points: Mapping[int, float] | None = None,
) -> None:
    """The components ``[K, G]`` (with their weights) and their sum.

    Those in ``points`` have no width: a line where they are, and no part in the sum.
    """
    points = points or {}
    wide = [k for k in range(len(parts)) if k not in points]
    if wide:
        ax.plot(grid.numpy(), parts[wide].sum(0).numpy(), color="#000000", label="mixture")
    for k, (look, label, part) in enumerate(zip(line_looks(), labels, parts, strict=False)):
        if k in points:
            ax.axvline(points[k], label=f"{label}, a point", **look)
        elif len(parts) > 1:
            ax.plot(grid.numpy(), part.numpy(), label=label, **look)
    ax.set_ylabel("density")


def _draw_kde(ax: Axes, values: Tensor, grid: Tensor, weights: Tensor) -> None:
    from scipy.stats import gaussian_kde

    inside = (values >= grid[0]) & (values <= grid[-1])  # rows far away would set the bandwidth
    share, values, weights = (
        float(weights[inside].sum() / weights.sum()),
        values[inside],
        weights[inside],
    )
    if float(values.std(correction=0)) <= 0:
        return
    step = math.ceil(len(values) / MOST_FOR_KDE)
    estimate = gaussian_kde(values[::step].numpy(), weights=weights[::step].numpy())
    style: dict[str, Any] = {"color": "#707070", "linestyle": (0, (4, 2)), "linewidth": 1.2}
    ax.plot(grid.numpy(), share * estimate(grid.numpy()), label="KDE", **style)


def _draw_counts(
    ax: Axes,
    found: Components,
    values: Tensor,
    weights: Tensor,
    column: int,
    labels: Sequence[str],
) -> None:
    low, high = int(values.min()), int(values.max())
    step = max(1, math.ceil((high - low + 1) / MOST_VALUES))
    points = torch.arange(low, high + 1, step, dtype=torch.float64)
    parts = found.density(points, column)
    places = ((values - low) / step).long().clamp(max=len(points) - 1)
    seen = torch.zeros(len(points), dtype=torch.float64).index_add_(0, places, weights.double())
    ax.bar(
        points.numpy(), (seen / weights.sum() / step).numpy(), 0.8 * step, color=PALE, label="data"
    )
    ax.set_ylabel("probability")
    if high - low <= 12:
        ax.set_xticks(range(low, high + 1))
    if parts is None:
        return
    some: dict[str, Any] = {"markevery": max(1, len(points) // 12)}
    if found.categorical:
        some = {"linestyle": "none"}
    whole: dict[str, Any] = {"color": "#000000", "marker": "o", "markersize": 3.5}
    ax.plot(points.numpy(), parts.sum(0).numpy(), label="mixture", **whole, **some)
    if len(parts) > 1:
        for look, label, part in zip(looks(), labels, parts, strict=False):
            ax.plot(points.numpy(), part.numpy(), label=label, **(look | some))
