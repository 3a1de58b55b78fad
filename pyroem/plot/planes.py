"""Two columns of the data, and pairs of more, with the components that were fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroem.components import Components
from pyroem.errors import DataError, SettingError
from pyroem.plot.densities import (
    POINTS,
    draw_data,
    draw_density,
    fine,
    points_of,
    shares_of,
    span,
    tell_rows,
)
from pyroem.plot.style import (
    COLUMN,
    GREY,
    MOST_POINTS,
    as_text,
    legend,
    line_looks,
    look_of,
    new_axes,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyroem.fit import Fit

FINE = 80  # points of the plane in each direction
MOST_COLUMNS = 6
LEVELS = (0.02, 0.1, 0.3, 0.6, 0.9)  # of the highest density


def contours(
    fit: Fit, site: str | None = None, columns: tuple[int, int] = (0, 1), ax: Axes | None = None
) -> Axes:
    """Draw two columns of an observation: rows by their most probable state, and the components.

    An ellipse is where a component has Mahalanobis distance 1 and 2 from its mean, by the mean and
    the covariance that the program gives it. Where the observation has two columns only, thin lines
    are contours of the fitted density, at 2, 10, 30, 60 and 90 % of its highest value.
    """
    found = fit.components(site)
    two = _two(found, columns)
    with styled():
        if ax is None:
            ax = new_axes(COLUMN, 3.1)
        _draw_plane(ax, found, two)
        ax.set_xlabel(as_text(found.column_name(two[0])))
        ax.set_ylabel(as_text(found.column_name(two[1])))
        ax.set_title("ellipses: 1 and 2 sd", loc="right", fontsize=8)
        legend(ax)
        tell_rows(ax, found)
    return ax


def pairs(
    fit: Fit, site: str | None = None, columns: Sequence[int] | None = None, axes: Any = None
) -> Any:
    """Draw all pairs of columns of an observation, with each column by itself on the diagonal.

    The first six columns, unless ``columns`` says which. ``axes`` is an array of ``D`` by ``D``
    axes, which are returned.
    """
    found = fit.components(site)
    width = found.values.shape[1]
    chosen = list(range(min(width, MOST_COLUMNS))) if columns is None else list(columns)
    if len(chosen) < 2:
        raise SettingError(f"pairs: expected two columns or more, got {len(chosen)}.")
    for i in chosen:
        _two(found, (i, chosen[0] if i != chosen[0] else chosen[1]))
    with styled():
        if axes is None:
            inches = max(min(2 * COLUMN, 1.35 * len(chosen) + 0.6), 1.0 * len(chosen))
            axes = new_axes(inches, inches, len(chosen), len(chosen), sharex="col")
        for row, i in enumerate(chosen):
            for column, j in enumerate(chosen):
                ax = axes[row, column]
                if column > row:
                    ax.set_axis_off()
                    continue
                if row == column:
                    _draw_alone(ax, found, i)
                else:
                    _draw_plane(ax, found, (j, i), small=True)
                if row == len(chosen) - 1:
                    ax.set_xlabel(as_text(found.column_name(j)))
                if column == 0 and row:
                    ax.set_ylabel(as_text(found.column_name(i)))
                ax.locator_params(nbins=3)
                inner = column and row != column
                ax.tick_params(labelsize=7, labelleft=not inner, labelbottom=row == len(chosen) - 1)
        handles, labels = axes[1, 0].get_legend_handles_labels()
        if 1 < len(handles) <= 12:
            corner = axes[0, -1]
            corner.legend(handles, labels, loc="upper right", title="ellipses: 1 and 2 sd")
            corner.get_legend().get_title().set_fontsize(8)
    return axes


def _two(found: Components, columns: tuple[int, int]) -> tuple[int, int]:
    if found.values.shape[1] < 2:
        raise SettingError(f"Site '{found.name}' has one column; draw plot.density.")
    if len(columns) != 2 or columns[0] == columns[1]:
        raise SettingError(f"columns: expected two that differ, got {columns!r}.")
    for i in columns:
        found.column_name(i)  # raises where there is none
    return columns


def _draw_alone(ax: Axes, found: Components, column: int) -> None:
    values, weights = found.column(column)
    grid = fine(found, column, values)
    draw_data(ax, values, grid, weights)
    parts = None if found.discrete else found.density(grid, column)
    if parts is not None:
        draw_density(ax, grid, parts, found.labels, points_of(found, column, values))
    ax.set_ylabel("")
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _draw_plane(ax: Axes, found: Components, columns: tuple[int, int], small: bool = False) -> None:
    chosen = list(columns)
    points = found.values[:, chosen]
    seen = ~points.isnan().any(1) & (found.weights.sum(1) > 0)
    if not seen.any():
        raise DataError(f"Site '{found.name}': no row shows both columns.")
    draw_points(ax, points[seen], found.weights[seen].argmax(1), 4 if small else 9)
    if found.values.shape[1] == 2 and not found.varies and not found.discrete:
        _draw_contours(ax, found, points[seen], columns)
    means, covariances = found.moments
    labels = [as_text(label) for label in found.labels] if small else shares_of(found)
    draw_ellipses(ax, means[:, chosen], covariances[:, chosen][:, :, chosen], labels)


def _draw_contours(ax: Axes, found: Components, points: Tensor, columns: tuple[int, int]) -> None:
    first, second = (span(points[:, i], 0.2)[:: POINTS // FINE] for i in (0, 1))
    mesh = torch.stack(torch.meshgrid(first, second, indexing="xy"), -1)
    flat = mesh.reshape(-1, 2)[:, list(columns)]  # the columns in the program's own order
    height = found.joint_density(flat).reshape(mesh.shape[:2])
    if not height.isfinite().all() or float(height.max()) <= 0:
        return
    levels = [level * float(height.max()) for level in LEVELS]
    thin: dict[str, Any] = {"colors": "#505050", "linewidths": 0.6, "zorder": 2}
    ax.contour(first.numpy(), second.numpy(), height.numpy(), levels=levels, **thin)


def draw_points(ax: Axes, points: Tensor, states: Tensor | None = None, size: float = 9) -> None:
    """Points ``[N, 2]``, at most 5,000 of them; in the colours and shapes of their states."""
    step = math.ceil(max(1, len(points)) / MOST_POINTS)
    points = points[::step]
    dots: dict[str, Any] = {"s": size, "alpha": 0.5, "linewidths": 0, "zorder": 1}
    if states is None or int(states.max()) == 0:
        ax.scatter(*points.T.numpy(), color=GREY, rasterized=True, **dots)
        return
    for k in states.unique().tolist():
        first, second = points[states[::step] == k].T.numpy()
        ax.scatter(first, second, rasterized=True, **dots, **look_of(k))


def draw_ellipses(ax: Axes, means: Tensor, covariances: Tensor, labels: Sequence[str]) -> None:
    """Where components with means ``[K, 2]`` have Mahalanobis distance 1 and 2."""
    angle = torch.linspace(0, 2 * math.pi, 100, dtype=covariances.dtype)
    circle = torch.stack([angle.cos(), angle.sin()])
    for look, label, mean, block in zip(line_looks(), labels, means, covariances, strict=False):
        if not (mean.isfinite().all() and block.isfinite().all()):
            ax.plot([], [], label=f"{label}, not finite", **look)
            continue
        values, vectors = torch.linalg.eigh(block)
        axis = vectors * values.clamp(min=0).sqrt()
        for radius in (1, 2):
            outline = mean.unsqueeze(-1) + radius * axis @ circle
            ax.plot(*outline.numpy(), label=label if radius == 1 else None, **look)
        ax.plot(*mean.tolist(), marker="+", markersize=8, color=look["color"])
