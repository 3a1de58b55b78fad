"""Pictures of `pyroem.models.gaussian_mixture` from its parameters alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pyroem.plot.densities import draw_data, draw_density, span
from pyroem.plot.planes import draw_ellipses, draw_points
from pyroem.plot.solvers import HasFits, comparison
from pyroem.plot.style import COLUMN, as_text, legend, new_axes, require_matplotlib, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def fitted_mixture(
    fit_params: Mapping[str, Tensor],
    x: Tensor,
    columns: Sequence[str],
    ax: Axes | None = None,
) -> Axes:
    """Draw rows ``x [N, D]`` and the components of `pyroem.models.gaussian_mixture`.

    One column: a histogram, the mixture's density and its weighted components. Two or more: the
    first two columns, and where each component has Mahalanobis distance 1 and 2 from its mean.

    Raises:
        ValueError: ``columns`` does not name the columns of ``x``.
    """
    if x.ndim != 2 or x.shape[1] != len(columns):
        raise ValueError(f"Expected x of shape [N, {len(columns)}]; got {list(x.shape)}.")
    x = x.detach().cpu().double()
    weights, means, covariances = mixture_moments(fit_params)
    labels = [f"k = {k} ({w:.0%})" for k, w in enumerate(weights.tolist(), start=1)]
    with styled():
        if ax is None:
            ax = new_axes(COLUMN, 3.1)
        ax.set_xlabel(as_text(columns[0]))
        if len(columns) == 1:
            grid = span(x[:, 0])
            parts = torch.distributions.Normal(means, covariances[:, :, 0].sqrt(), False)
            draw_data(ax, x[:, 0], grid)
            draw_density(ax, grid, weights.unsqueeze(-1) * parts.log_prob(grid).exp(), labels)
        else:
            draw_points(ax, x[:, :2])
            draw_ellipses(ax, means[:, :2], covariances[:, :2, :2], labels)
            ax.set_ylabel(as_text(columns[1]))
            some = f"first 2 of {len(columns)} columns; " if len(columns) > 2 else ""
            ax.set_title(f"{some}1 and 2 sd", loc="right", fontsize=8)
        legend(ax)
    return ax


def report(
    compared: HasFits, fit_params: Mapping[str, Tensor], x: Tensor, columns: Sequence[str]
) -> Figure:
    """One figure: the fitted mixture at the left, the solvers' gaps at the right.

    It belongs to no window: save it with ``figure.savefig(path)``.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    with styled():
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
