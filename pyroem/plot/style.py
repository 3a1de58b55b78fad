"""What all pictures share: colours, line styles, sizes and legends.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; line styles and
markers differ too, so that the pictures survive a black-and-white printer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY, PALE, GRID = "#A8A8A8", "#D0D0D0", "#E3E3E3"
MOST_POINTS = 5000
COLUMN = 3.4  # inches: the width of a column of a paper
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


def require_matplotlib() -> None:
    """Raise an ``ImportError`` that says how to install matplotlib, where it lacks."""
    try:
        import matplotlib  # noqa: F401  (only to see if it is there)
    except ImportError:
        raise ImportError("Pictures need matplotlib: pip install 'pyroem[plot]'.") from None


@contextmanager
def styled() -> Iterator[None]:
    """The style, while a picture is drawn; needs matplotlib."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_axes(
    width: float = COLUMN, height: float = 2.6, rows: int = 1, columns: int = 1, **settings: Any
) -> Any:
    """Axes of a new figure of pyplot's, ``width`` by ``height`` inches."""
    import matplotlib.pyplot as plt

    size = (width, height)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)[1]


def look_of(k: int) -> dict[str, Any]:
    """Colour and marker of the ``k``-th thing: no two of the first 49 are the same."""
    n = len(COLOURS)
    return {"color": COLOURS[k % n], "marker": MARKERS[(k + k // n) % n]}


def looks() -> Iterator[dict[str, Any]]:
    """Colour, line and marker of one thing after the other."""
    for k, line in zip(count(), cycle(LINES), strict=False):
        yield {**look_of(k), "linestyle": line, "markerfacecolor": "white"}


def line_looks() -> Iterator[dict[str, Any]]:
    """The same without markers."""
    for look in looks():
        yield {"color": look["color"], "linestyle": look["linestyle"]}


def as_text(name: str) -> str:
    """A name as it stands.

    matplotlib would read formulas between dollar signs, and hide labels that begin with ``_``.
    """
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def percent(share: float) -> str:
    """A share in words: small ones and nearly whole ones with a digit more."""
    if 0 < share < 0.001:
        return "< 0.1%"
    return f"{share:.0%}" if 0.0095 <= share < 0.9995 or share in (0, 1) else f"{share:.1%}"


def grid(ax: Axes) -> None:
    """Faint lines behind everything."""
    ax.grid(True, which="major", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def legend_below(ax: Axes) -> None:
    """Below the axes, in as many columns as fit: it covers no data, whatever the lines."""
    figure = ax.figure
    handles, labels = ax.get_legend_handles_labels()
    widest = max(map(len, labels))
    columns = max(1, min(len(labels), 4 if widest < 8 else 28 // widest))
    if figure.get_layout_engine() is not None and figure.axes == [ax]:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    else:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns)


def legend(*axes: Axes) -> None:
    """Above the axes if they have a figure with room for it, otherwise where it covers least.

    Of more than a dozen lines the first ten only, and how many there are more.
    """
    figure = axes[0].figure
    handles, labels = axes[0].get_legend_handles_labels()
    if not handles:
        return
    if len(handles) > 12:
        from matplotlib.lines import Line2D

        more = Line2D([], [], linestyle="none")
        handles, labels = [*handles[:10], more], [*labels[:10], f"and {len(labels) - 10} more"]
    if figure.get_layout_engine() is not None and set(figure.axes) == set(axes):
        inches, widest = figure.bbox.width / figure.dpi, max(map(len, labels))
        columns = max(1, min(len(handles), int(inches / (0.45 + 0.055 * widest))))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    else:
        where = axes[-1] if axes[-1].get_legend_handles_labels()[0] else axes[0]
        where.legend(handles, labels, loc="best", frameon=True, framealpha=0.75, edgecolor="none")
