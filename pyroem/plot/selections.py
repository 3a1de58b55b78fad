"""A criterion against the number of components."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pyroem.plot.style import COLOURS, COLUMN, as_text, grid, legend_below, looks, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOSE = 10.0  # differences of a criterion up to here are drawn to scale, larger ones by logarithm


class _Candidate(Protocol):
    @property
    def components(self) -> int: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def counts(self) -> bool: ...


class _Selection(Protocol):
    """Candidates, each with an attribute that bears the criterion's name."""

    @property
    def rows(self) -> Sequence[_Candidate]: ...
    @property
    def criterion(self) -> str: ...
    @property
    def best(self) -> _Candidate | None: ...


def selection(selection: _Selection, ax: Axes | None = None) -> Axes:
    """Draw a criterion against the number of components: a line for each of the settings.

    What is drawn is the distance to the best value, which the axis names; above 10 by logarithm,
    since settings that do not suit the data are often worse by hundreds. Fits that ended badly are
    left out. A ring marks the best.

    Raises:
        ValueError: no fit ended well.
    """
    criterion, best = selection.criterion, selection.best
    if best is None:
        raise ValueError("Expected at least one fit that ended well; there is none.")
    value = float(getattr(best, criterion))
    sign = -1.0 if criterion == "cv" else 1.0
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in selection.rows:
        points = lines.setdefault(", ".join(map(str, row.settings.values())), [])
        own = getattr(row, criterion)
        able = row.counts and own is not None and math.isfinite(own)
        points.append((row.components, sign * (own - value) if able else math.nan))
    gaps = [gap for points in lines.values() for _, gap in points]
    highest = max(gap for gap in gaps if not math.isnan(gap))
    with styled():
        if ax is None:
            ax = new_axes(COLUMN, 2.5 + 0.16 * math.ceil(len(lines) / 4) * (len(lines) > 1))
        thin: dict[str, Any] = {"linewidth": 1.1, "markersize": 4.0}
        for number, (look, name) in enumerate(zip(looks(), lines, strict=False)):
            if number >= len(COLOURS):  # the same colour again, with filled markers
                look = {**look, "markerfacecolor": look["color"]}
            if len(lines) > len(COLOURS):
                look = {**look, **thin}
            ax.plot(*zip(*lines[name], strict=True), label=as_text(name), **look)
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "#000000"}
        ax.plot(best.components, 0.0, "o", markersize=10, label="_best", zorder=5, **ring)
        if highest > 5 * CLOSE:
            ax.set_yscale("symlog", linthresh=CLOSE)
        ax.set_ylim(bottom=-0.25 * min(max(highest, 1e-9), CLOSE))
        sizes = sorted({row.components for row in selection.rows})
        if len(sizes) <= 12:
            ax.set_xticks(sizes)
        ax.set_xlabel("components")
        if criterion == "cv":
            ax.set_ylabel(f"held-out log-likelihood\nbelow the best, {value:.2f}")
        else:
            ax.set_ylabel(f"{criterion.upper()} above the best, {value:.2f}")
        grid(ax)
        if len(lines) > 1:
            legend_below(ax)
    return ax
