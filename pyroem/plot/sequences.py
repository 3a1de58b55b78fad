"""Pictures of fitted chains: how states follow one another, and the states of a sequence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroem.errors import ModelError, SettingError
from pyroem.plot.style import (
    COLOURS,
    COLUMN,
    as_text,
    legend,
    look_of,
    new_axes,
    styled,
)
from pyroem.sequences import all_steps, observed
from pyroem.structure import Chain, quoted, seen_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyroem.fit import Fit

MOST_STATES = 4  # as a graph; more are a table in colours
MOST_NUMBERS = 12  # states whose table has its numbers written into it, in percent
LEAST = 0.005  # transitions rarer than that are not drawn


def transitions(fit: Fit, chain: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the transition graph of a chain: an arrow's width is the probability.

    Transitions below half a percent are left out. More than four states are drawn as a matrix.
    """
    found = fit.transitions()
    name = _chosen(chain, found, "chain")
    matrix = found[name]
    with styled():
        if ax is None:
            ax = new_axes(COLUMN, 3.1)
        if len(matrix) > MOST_STATES:
            _draw_matrix(ax, matrix, name)
        else:
            _draw_graph(ax, matrix, name)
    return ax


def decoded(
    fit: Fit,
    sequence: int = 0,
    site: str | None = None,
    column: int = 0,
    chain: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one sequence of an observation, coloured by its most probable path of states.

    Colours and marks tell the states; the line at the bottom shows them without the data.
    """
    structure = fit.problem.sample.structure
    values, chains = dict[str, Tensor](), dict[str, Chain]()
    for one in structure.chains:
        found = _values(fit, one)
        values |= found
        chains |= dict.fromkeys(found, one)
    if not values:
        why = f": {structure.no_chain}" if structure.no_chain else ""
        raise ModelError(f"decoded: the program was not read as a chain of states{why}.")
    name = _chosen(site, values, "site")
    own = chains[name]
    paths = fit.predict()
    path = paths if isinstance(paths, Tensor) else paths[chain or own.name]
    steps = path.shape[-1]
    path = path.reshape(-1, steps)
    if not 0 <= sequence < len(path):
        raise SettingError(f"sequence: expected 0 to {len(path) - 1}, got {sequence!r}.")
    x = values[name].reshape(len(path), steps, -1)
    if not 0 <= column < x.shape[2]:
        raise SettingError(f"column: expected 0 to {x.shape[2] - 1}, got {column!r}.")
    y, z = x[sequence, :, column].double(), path[sequence]
    seen = (~y.isnan()).nonzero().reshape(-1)
    last = int(seen[-1]) + 1 if len(seen) else 0
    if not len(seen):
        raise SettingError(f"sequence: nothing is seen of sequence {sequence}.")
    y, z, t = y[:last], z[:last], torch.arange(last)
    with styled():
        from matplotlib.ticker import MaxNLocator

        if ax is None:
            ax = new_axes(2 * COLUMN, 2.4)
        ax.set_xlim(-0.7, last - 0.3)
        ax.plot(t.numpy(), y.numpy(), color="#B8B8B8", linewidth=0.8, zorder=1)
        low, high = float(y.nan_to_num(math.inf).min()), float(y.nan_to_num(-math.inf).max())
        height = 0.05 * ((high - low) or 1.0)
        floor = low - 3 * height
        size = 14 if last <= 400 else 5
        for k in z.unique().tolist():
            style = look_of(k)
            dots: dict[str, Any] = {**style, "s": size, "linewidths": 0, "rasterized": last > 5000}
            label = f"{own.name} = {k}"
            ax.scatter(t[z == k].numpy(), y[z == k].numpy(), label=label, zorder=2, **dots)
            bars = [(at - 0.5, 1.0) for at in t[z == k].tolist()]
            ax.broken_barh(bars, (floor, height), color=style["color"], linewidth=0)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel(as_text(name if x.shape[2] == 1 else f"{name}[{column}]"))
        legend(ax)
    return ax


def _values(fit: Fit, chain: Chain) -> dict[str, Tensor]:
    """The observations of a chain: its plates, steps, columns; NaN where nothing is seen."""
    structure, nodes = fit.problem.sample.structure, fit.problem.sample.nodes
    found = {}
    for name, *both in observed(structure, chain):
        parts = {}
        for site in (s for s in both if s is not None):
            value, seen = nodes[site]["value"].double(), seen_cells(nodes[site])
            parts[site] = value if seen is None else torch.where(seen, value, torch.nan)
        found[name] = all_steps(structure, nodes, chain, parts)
    return found


def _chosen(name: str | None, known: Any, what: str) -> str:
    if name is None and len(known) == 1:
        return str(next(iter(known)))
    if name is None or name not in known:
        got = "none was named" if name is None else f"got {name!r}"
        raise SettingError(f"{what}: expected one of {quoted(known)}; {got}.")
    return name


def _draw_matrix(ax: Axes, matrix: Tensor, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    image = ax.imshow(matrix.numpy(), cmap="cividis", vmin=0, vmax=1)
    for i, row in enumerate(matrix.tolist() if len(matrix) <= MOST_NUMBERS else ()):
        for j, p in enumerate(row):
            colour = "white" if p < 0.5 else "black"
            ax.text(j, i, f"{100 * p:.0f}", color=colour, ha="center", va="center", fontsize=7)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, label="probability")
    ax.set_xlabel(f"{name}, the state after")
    ax.set_ylabel(f"{name}, the state before")


def _draw_graph(ax: Axes, matrix: Tensor, name: str) -> None:
    from matplotlib.patches import Circle, FancyArrowPatch

    k = len(matrix)
    turn = [math.pi / 2 - 2 * math.pi * i / k + (math.pi / 2 if k == 2 else 0) for i in range(k)]
    spread = 1.0 if k > 1 else 0.0
    corners = []
    centres = [(spread * math.cos(a), spread * math.sin(a)) for a in turn]
    radius = 0.22 if k <= 5 else 0.17
    for i, here in enumerate(centres):
        for j, there in enumerate(centres):
            p = float(matrix[i, j])
            if p < LEAST:
                continue
            width = 0.5 + 3.5 * p
            arrow: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 7 + 3 * p}
            arrow |= {"color": COLOURS[i % len(COLOURS)], "linewidth": width, "zorder": 1}
            if i == j:
                angle = turn[i] if k > 1 else math.pi / 2
                corners.append(_draw_loop(ax, here, angle, radius, p, arrow))
                continue
            bend = 0.22
            patch = FancyArrowPatch(
                _towards(here, there, radius, -0.35),
                _towards(there, here, radius, 0.35),
                connectionstyle=f"arc3,rad={bend}",
                shrinkA=0,
                shrinkB=0,
                **arrow,
            )
            ax.add_patch(patch)
            ax.text(*_beside(here, there, bend), _percent(p), **_words())
    for i, centre in enumerate(centres):
        ax.add_patch(Circle(centre, radius, facecolor="white", edgecolor=COLOURS[i % 7], zorder=3))
        ax.text(*centre, str(i), ha="center", va="center", zorder=4)
        corners += [(centre[0] + dx, centre[1] + dx) for dx in (-0.35, 0.35)]
    across, up = zip(*corners, strict=True)
    ax.set_xlim(min(across) - 0.2, max(across) + 0.2)
    ax.set_ylim(min(up) - 0.12, max(up) + 0.12)
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_title(as_text(f"transitions of {name}"))


def _draw_loop(
    ax: Axes, centre: tuple[float, float], angle: float, radius: float, p: float, arrow: Any
) -> tuple[float, float]:
    """From a state to itself, on the side away from the others; where its label stands."""
    from matplotlib.patches import FancyArrowPatch

    ends = [
        (centre[0] + radius * math.cos(angle + d), centre[1] + radius * math.sin(angle + d))
        for d in (0.6, -0.6)
    ]
    curve = "arc3,rad=-1.9"
    ax.add_patch(
        FancyArrowPatch(ends[0], ends[1], connectionstyle=curve, shrinkA=0, shrinkB=0, **arrow)
    )
    away = radius + 0.42
    at = (centre[0] + away * math.cos(angle), centre[1] + away * math.sin(angle))
    ax.text(*at, _percent(p), **_words())
    return at


def _towards(
    here: tuple[float, float], there: tuple[float, float], radius: float, turn: float
) -> tuple[float, float]:
    """The point on the circle around ``here`` that looks at ``there``, turned a little."""
    angle = math.atan2(there[1] - here[1], there[0] - here[0]) + turn
    return here[0] + radius * math.cos(angle), here[1] + radius * math.sin(angle)


def _beside(
    here: tuple[float, float], there: tuple[float, float], bend: float
) -> tuple[float, float]:
    """Where the label of a bent arrow stands: nearer to where it comes from."""
    dx, dy = there[0] - here[0], there[1] - here[1]
    part, side = 0.4, 0.5 * bend + 0.09
    return here[0] + part * dx + side * dy, here[1] + part * dy - side * dx


def _words() -> dict[str, Any]:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    return {"ha": "center", "va": "center", "fontsize": 7.5, "bbox": box, "zorder": 5}


def _percent(p: float) -> str:
    return f"{p:.0%}" if 0.095 <= p <= 0.995 or p > 0.9995 else f"{p:.1%}"
