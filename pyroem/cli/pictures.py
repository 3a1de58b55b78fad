"""Pictures of fitted Gaussian mixtures and of selections."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyroem import plot
from pyroem.cli.failures import UsageError
from pyroem.cli.outputs import check_picture
from pyroem.cli.tables import is_missing

NUMBER = re.compile(r"k = (\d+)")


def check_mixture_picture(family: str, picture: Path | None) -> None:
    """Raise a `UsageError` unless the family has a picture, which can be written."""
    if picture is not None and family != "gaussian":
        raise UsageError(f"--plot: expected with family gaussian only; got family {family}")
    check_picture("--plot", picture)


def complete(values: Any) -> Any:
    """The rows whose first two columns, which are drawn, have no missing value."""
    return values[~is_missing(values[:, :2]).any(1)]


def shown(values: Any) -> str:
    """What a picture shows, where that is not everything."""
    rows, columns = len(complete(values)), values.shape[1]
    parts = [f"the first 2 of {columns} columns"] if columns > 2 else []
    if rows < len(values):
        parts.append(f"{rows} of {len(values)} rows, the others lack a value")
    return f" ({'; '.join(parts)})" if parts else ""


def draw_mixture(
    params: dict[str, torch.Tensor], values: Any, columns: list[str], picture: Path
) -> None:
    """Write a picture of a Gaussian mixture, with the components' own numbers."""
    figure, axes = _blank(3.4, 3.1)
    rows = torch.as_tensor(complete(values))
    plot.fitted_mixture(params, rows, columns, axes)
    # The picture counts components by the mean of their first column.
    own = np.argsort(params["loc"][:, 0].numpy(), kind="stable") + 1
    for legend in (*figure.legends, axes.get_legend()):
        for text in legend.get_texts() if legend is not None else ():
            text.set_text(NUMBER.sub(lambda m: f"k = {own[int(m[1]) - 1]}", text.get_text()))
    figure.savefig(picture)


def draw_selection(selection: Any, picture: Path) -> None:
    """Write a picture of a selection's criterion."""
    lines = len({tuple(row.settings.items()) for row in selection.rows})
    height = 2.5 + 0.16 * math.ceil(lines / 4) * (lines > 1)
    figure, axes = _blank(3.4, height)
    selection.plot(axes)
    figure.savefig(picture)


def _blank(width: float, height: float) -> tuple[Any, Any]:
    """A figure that belongs to no window, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=200)
        return figure, figure.subplots()
