"""Pictures of a comparison, of a selection and of a fitted Gaussian mixture. Needs matplotlib.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; line styles and
markers differ too, so that the pictures survive a black-and-white printer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#A8A8A8"
SMALLEST_GAP = 1e-10
MOST_POINTS = 5000
CLOSE = 10.0  # differences of a criterion up to here are drawn to scale, larger ones by logarithm
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class _Comparison(Protocol):
    """Fits by name; each has a ``history`` of records with iteration, log_joint and seconds."""

    @property
    def fits(self) -> Mapping[str, Any]: ...


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


def require_matplotlib() -> None:
    """Raise an ``ImportError`` that says how to install matplotlib, where it lacks."""
    try:
        import matplotlib  # noqa: F401  (only to see if it is there)
    except ImportError:
        raise ImportError("Pictures need matplotlib: pip install 'pyroem[plot]'.") from None


def comparison(comparison: _Comparison, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
    """Draw each solver's gap to the best log-joint, against iterations and against seconds.

        gap(t) = max over solvers and iterations of log_joint  -  log_joint(t)

    Gaps below a floor, 1e-10 or the rounding error of the log-joint if that is larger, are drawn
    at the floor, and the axis says so. Records that are not finite are not drawn.

    Raises:
        ValueError: no record of any fit is finite.
    """
    require_matplotlib()
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
    with _style():
        if axes is None:
            import matplotlib.pyplot as plt

            _, axes = plt.subplots(1, 2, figsize=(6.8, 2.9), sharey=True, layout="constrained")
        by_iteration, by_seconds = axes
        for look, (name, history) in zip(_looks(), histories.items(), strict=False):
            gaps = [max(best - record.log_joint, floor) for record in history]
            label = _text(name if gaps else f"{name} (no finite value)")
            for ax, unit, times in (
                (by_iteration, 1.0, [float(record.iteration) for record in history]),
                (by_seconds, tick, [record.seconds for record in history]),
            ):
                ax.plot(times, gaps, label=label, markevery=_spread(times, unit), **look)
        _time_axis(by_iteration, "iteration", 1.0, max(r.iteration for r in records))
        _time_axis(by_seconds, "seconds", tick, max(r.seconds for r in records))
        for ax in (by_iteration, by_seconds):
            ax.set_yscale("log")
            ax.grid(True, which="major", color="#E3E3E3", linewidth=0.6)
            ax.set_axisbelow(True)
        by_iteration.set_ylabel(f"gap to the best log-joint\n(drawn down to {floor:.0e})")
        _legend(by_iteration, by_seconds)
    return by_iteration, by_seconds


def selection(selection: _Selection, axes: Axes | None = None) -> Axes:
    """Draw a criterion against the number of components: a line for each of the settings.

    What is drawn is the distance to the best value, which the axis names; above 10 by logarithm,
    since settings that do not suit the data are often worse by hundreds. Fits that ended badly are
    left out. A ring marks the best.

    Raises:
        ValueError: no fit ended well.
    """
    require_matplotlib()
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
    with _style():
        if axes is None:
            import matplotlib.pyplot as plt

            size = (3.4, 2.5 + 0.16 * math.ceil(len(lines) / 4) * (len(lines) > 1))
            _, axes = plt.subplots(figsize=size, layout="constrained")
        thin: dict[str, Any] = {"linewidth": 1.1, "markersize": 4.0}
        for number, (look, name) in enumerate(zip(_looks(), lines, strict=False)):
            if number >= len(COLOURS):  # the same colour again, with filled markers
                look = {**look, "markerfacecolor": look["color"]}
            if len(lines) > len(COLOURS):
                look = {**look, **thin}
            axes.plot(*zip(*lines[name], strict=True), label=_text(name), **look)
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "#000000"}
        axes.plot(best.components, 0.0, "o", markersize=10, label="_best", zorder=5, **ring)
        if highest > 5 * CLOSE:
            axes.set_yscale("symlog", linthresh=CLOSE)
        axes.set_ylim(bottom=-0.25 * min(max(highest, 1e-9), CLOSE))
        sizes = sorted({row.components for row in selection.rows})
        if len(sizes) <= 12:
            axes.set_xticks(sizes)
        axes.set_xlabel("components")
        if criterion == "cv":
            axes.set_ylabel(f"held-out log-likelihood\nbelow the best, {value:.2f}")
        else:
            axes.set_ylabel(f"{criterion.upper()} above the best, {value:.2f}")
        axes.grid(True, which="major", color="#E3E3E3", linewidth=0.6)
        axes.set_axisbelow(True)
        if len(lines) > 1:
            _legend_below(axes)
    return axes


def fitted_mixture(
    fit_params: Mapping[str, Tensor],
    x: Tensor,
    columns: Sequence[str],
    axes: Axes | None = None,
) -> Axes:
    """Draw rows ``x [N, D]`` and the components of `pyroem.models.gaussian_mixture`.

    One column: a histogram, the mixture's density and its weighted components. Two or more: the
    first two columns, and where each component has Mahalanobis distance 1 and 2 from its mean.

    Raises:
        ValueError: ``columns`` does not name the columns of ``x``.
    """
    require_matplotlib()
    if x.ndim != 2 or x.shape[1] != len(columns):
        raise ValueError(f"Expected x of shape [N, {len(columns)}]; got {list(x.shape)}.")
    with _style():
        if axes is None:
            import matplotlib.pyplot as plt

            _, axes = plt.subplots(figsize=(3.4, 3.1), layout="constrained")
        draw = _densities if len(columns) == 1 else _ellipses
        draw(axes, fit_params, x.detach().cpu(), columns)
        _legend(axes)
    return axes


def report(
    compared: _Comparison, fit_params: Mapping[str, Tensor], x: Tensor, columns: Sequence[str]
) -> Figure:
    """One figure: the fitted mixture at the left, the solvers' gaps at the right.

    It belongs to no window: save it with ``figure.savefig(path)``.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(10.2, 3.3), layout="constrained", dpi=200)
        left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(1, 2), wspace=0.03))
        fitted_mixture(fit_params, x, columns, left.subplots())
        comparison(compared, right.subplots(1, 2, sharey=True))
    return figure


def mixture_moments(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[K]``, means ``[K, D]`` and covariances ``[K, D, D]`` of a Gaussian mixture.

    The components are ordered by the mean of their first column.
    """
    weights, loc = params["weights"].detach(), params["loc"].detach()
    K, D = loc.shape
    if "covariance" in params:
        covariances = params["covariance"].detach().expand(K, D, D)
    elif "variance" in params:
        covariances = torch.diag_embed(params["variance"].detach())
    else:
        scale = params["scale"].detach()
        scale = scale.unsqueeze(-1) if scale.ndim == 1 else scale
        covariances = torch.diag_embed(scale.expand(K, D) ** 2)
    order = loc[:, 0].argsort()
    return weights[order], loc[order], covariances[order]


def _densities(ax: Axes, params: Mapping[str, Tensor], x: Tensor, columns: Sequence[str]) -> None:
    weights, means, covariances = mixture_moments(params)
    low, high = x.min().item(), x.max().item()
    margin = 0.05 * (high - low)
    grid = torch.linspace(low - margin, high + margin, 400, dtype=torch.float64)
    parts = torch.distributions.Normal(means, covariances[:, :, 0].sqrt(), validate_args=False)
    densities = weights.unsqueeze(-1) * parts.log_prob(grid).exp()
    bins = min(60, max(10, 2 * math.ceil(len(x) ** (1 / 3))))
    ax.hist(x[:, 0].numpy(), bins=bins, density=True, color="#D0D0D0", label="data")
    ax.plot(grid.numpy(), densities.sum(0).numpy(), color="#000000", label="mixture")
    looks = zip(_looks(), densities, weights.tolist(), strict=False)
    for number, (look, density, weight) in enumerate(looks, start=1):
        style = {"color": look["color"], "linestyle": look["linestyle"]}
        ax.plot(grid.numpy(), density.numpy(), label=f"k = {number} ({weight:.0%})", **style)
    ax.set_xlabel(_text(columns[0]))
    ax.set_ylabel("density")


def _ellipses(ax: Axes, params: Mapping[str, Tensor], x: Tensor, columns: Sequence[str]) -> None:
    weights, means, covariances = mixture_moments(params)
    points = x[:: math.ceil(len(x) / MOST_POINTS), :2]
    first, second = points.unbind(-1)
    dots: dict[str, Any] = {"s": 9, "color": GREY, "alpha": 0.6, "linewidths": 0, "zorder": 1}
    ax.scatter(first.numpy(), second.numpy(), rasterized=True, **dots)
    angle = torch.linspace(0, 2 * math.pi, 100, dtype=covariances.dtype)
    circle = torch.stack([angle.cos(), angle.sin()])
    components = zip(_looks(), weights.tolist(), means, covariances, strict=False)
    for number, (look, weight, mean, covariance) in enumerate(components, start=1):
        block = covariance[:2, :2]
        style = {"color": look["color"], "linestyle": look["linestyle"]}
        label = f"k = {number} ({weight:.0%})"
        if not (mean.isfinite().all() and block.isfinite().all()):
            ax.plot([], [], label=f"{label}, not finite", **style)
            continue
        values, vectors = torch.linalg.eigh(block)
        axis = vectors * values.clamp(min=0).sqrt()
        for radius in (1, 2):
            outline = mean[:2].unsqueeze(-1) + radius * axis @ circle
            ax.plot(*outline.numpy(), label=label if radius == 1 else None, **style)
        ax.plot(*mean[:2].tolist(), marker="+", markersize=8, color=look["color"])
    ax.set_xlabel(_text(columns[0]))
    ax.set_ylabel(_text(columns[1]))
    some = f"first 2 of {len(columns)} columns; " if len(columns) > 2 else ""
    ax.set_title(f"{some}1 and 2 sd", loc="right", fontsize=8)


def _text(name: str) -> str:
    """A name as it stands: matplotlib would read formulas between dollar signs."""
    return name.replace("$", r"\$")


def _floor(best: float) -> float:
    """The smallest power of ten that is neither below 1e-10 nor lost in rounding."""
    rounding = 4 * torch.finfo(torch.float64).eps * abs(best)
    return float(10.0 ** math.ceil(math.log10(max(SMALLEST_GAP, rounding)) - 1e-9))


def _looks() -> Iterator[dict[str, Any]]:
    for colour, line, marker in zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False):
        yield {
            "color": colour,
            "linestyle": line,
            "marker": marker,
            "markerfacecolor": "white",
        }


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


def _legend_below(axes: Axes) -> None:
    """Below the axes, in as many columns as fit: it covers no data, whatever the lines."""
    figure = axes.figure
    handles, labels = axes.get_legend_handles_labels()
    widest = max(map(len, labels))
    columns = max(1, min(len(labels), 4 if widest < 8 else 28 // widest))
    if figure.get_layout_engine() is not None and figure.axes == [axes]:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    else:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns)


def _legend(*axes: Axes) -> None:
    """Above the axes if they have a figure with room for it, otherwise where it covers least.

    None for more than a dozen lines: it would be larger than the picture.
    """
    figure = axes[0].figure
    handles, labels = axes[0].get_legend_handles_labels()
    if len(handles) > 12:
        return
    if figure.get_layout_engine() is not None and set(figure.axes) == set(axes):
        columns = min(len(handles), 2 * len(axes) + 1)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    else:
        axes[-1].legend(handles, labels, loc="best")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield
