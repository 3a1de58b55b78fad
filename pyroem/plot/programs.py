"""A program as a graph of its sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroem._pyro import isolated
from pyroem.errors import SettingError
from pyroem.estep.decode import partners
from pyroem.plot.style import COLUMN, PALE, as_text, new_axes, styled
from pyroem.sequences import observed, public_names
from pyroem.structure import whole_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyroem.fit import Fit

MOST_NODES = 30


def render_model(fit: Fit, filename: str | Path | None = None, **settings: Any) -> Any:
    """The fitted program's graph by Pyro's own ``pyro.render_model``, with its distributions.

    Needs the package graphviz and, to draw, its program ``dot``. ``filename`` is written, if given;
    the result shows itself in a notebook. Other settings go to Pyro.
    """
    import pyro

    program = fit.problem.sample.structure.program
    chosen = {"render_distributions": True, "render_params": True, **settings}
    target = None if filename is None else Path(filename)
    with isolated(program.dtype, 0):
        return pyro.render_model(program.model, program.args, program.kwargs, target, **chosen)


def program(fit: Fit, ax: Axes | None = None) -> Axes:
    """Draw the program as pyroem read it: parameters, assignments (round), observations (grey).

    An arrow means that the distribution of a site depends on a parameter or on an assignment. The
    steps of a chain are one, with an arrow to itself. :func:`render_model` has Pyro's own picture,
    with the plates.

    Raises:
        SettingError: more than 30 nodes would be drawn.
    """
    kinds, edges = _graph(fit)
    if len(kinds) > MOST_NODES:
        raise SettingError(
            f"program: expected at most {MOST_NODES} nodes; the program has {len(kinds)}."
        )
    apart = max(1.0, max(map(len, kinds)) / 9)  # names of nine letters fit into an inch
    places = _places(list(kinds), edges, apart)
    left, right = (f(x for x, _ in places.values()) for f in (min, max))
    bottom = min(y for _, y in places.values())
    with styled():
        if ax is None:
            ax = new_axes(max(COLUMN, 1.1 * (right - left + apart)), 0.3 + 0.7 * (1 - bottom))
        boxes = {name: _draw_node(ax, *at, name, kinds[name]) for name, at in places.items()}
        ax.set_xlim(left - 0.6 * apart, right + 0.6 * apart)
        ax.set_ylim(bottom - 0.5, 0.5)
        for a, b in sorted(edges):
            _draw_edge(ax, boxes[a], boxes[b])
        ax.set_axis_off()
    return ax


def _graph(fit: Fit) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """The kind of every node, and who depends on whom."""
    problem = fit.problem.sample
    structure, reading = problem.structure, problem.plan.reading
    names = public_names(structure)
    for chain in structure.chains:
        for first, later in partners(chain):
            names[later] = names.get(first, first)
        for own, *both in observed(structure, chain):
            names |= {site: own for site in both if site is not None}
    kinds = {name: "parameter" for name in structure.parameters}
    edges = set()
    for name, above in reading.prior_dependence.items():
        edges |= {(other, name) for other in above}
    trace = reading.traces[0]
    for site, above in reading.dependence.items():
        node = names.get(site, whole_of(site))
        seen = site in structure.observations and whole_of(site) == site
        kinds[node] = "observation" if seen else "assignment"
        edges |= {(other, node) for other in above}
        states = [n for n in trace.names(trace.factors[site].dims) if n in trace.states]
        edges |= {(names.get(z, whole_of(z)), node) for z in states if z != site}
    return kinds, {(a, b) for a, b in edges if a in kinds}


def _places(
    nodes: list[str], edges: set[tuple[str, str]], apart: float
) -> dict[str, tuple[float, float]]:
    """Every node below all that it depends on, and near the middle of those that depend on it."""
    above = {b: {a for a, c in edges if c == b and a != b} for b in nodes}
    below = {a: {b for c, b in edges if c == a and a != b} for a in nodes}
    depth: dict[str, int] = {}

    def lowest(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max(map(lowest, above[name]), default=-1)
        return depth[name]

    for name in nodes:
        lowest(name)
    for name in nodes:
        if not above[name] and below[name]:
            depth[name] = min(depth[b] for b in below[name]) - 1
    across: dict[str, float] = {}
    for level in range(max(depth.values(), default=0), -1, -1):
        own = sorted(n for n in nodes if depth[n] == level)
        aims = {n: [across[b] for b in below[n] if b in across] or [0.0] for n in own}
        middle = {n: sum(at) / len(at) for n, at in aims.items()}
        own.sort(key=lambda name: (middle[name], bool(above[name]), len(name), name))
        at = [middle[n] for n in own]
        for i in range(1, len(at)):
            at[i] = max(at[i], at[i - 1] + apart)
        shift = sum(middle.values()) / len(own) - sum(at) / len(own)
        across |= {name: x + shift for name, x in zip(own, at, strict=True)}
    return {name: (across[name], float(-depth[name])) for name in nodes}


def _draw_node(ax: Axes, x: float, y: float, name: str, kind: str) -> Any:
    box: dict[str, Any] = {"facecolor": "white", "edgecolor": "#000000", "linewidth": 0.9}
    box |= {"boxstyle": "round,pad=0.45,rounding_size=0.9"}
    if kind == "parameter":
        box |= {"edgecolor": "none", "boxstyle": "square,pad=0.25"}
    if kind == "observation":
        box |= {"facecolor": PALE}
    style = "italic" if kind == "parameter" else "normal"
    words: dict[str, Any] = {"ha": "center", "va": "center", "style": style, "zorder": 3}
    return ax.text(x, y, as_text(name), bbox=box, fontsize=8.5, **words)


def _draw_edge(ax: Axes, start: Any, end: Any) -> None:
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "linewidth": 0.9, "color": "#505050"}
    arrow |= {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    arrow |= {"shrinkA": 1, "shrinkB": 1, "mutation_scale": 9}
    if start is not end:
        ax.annotate("", end.get_position(), start.get_position(), arrowprops=arrow, zorder=2)
        return
    from matplotlib.text import OffsetFrom

    right = OffsetFrom(start, (1.0, 0.5))
    loop = {"arrowstyle": "-|>", "color": "#505050", "connectionstyle": "arc3,rad=-1.8"}
    ax.annotate("", (7, -5), (7, 5), xycoords=right, textcoords=right, arrowprops=loop)
