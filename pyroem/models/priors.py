"""Weak conjugate priors, scaled to the data: hyperparameters for the ready-made programs.

They are computed once, from all rows, and given to the function that makes the program: a program
that took them from the rows that it is called with would be another one for each block of rows.
"""

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch

from pyroem.models.assignments import check_count, equal_weights, rows


class Prior(NamedTuple):
    """What a weak prior is scaled to. Made by :func:`weak_prior`."""

    mean: torch.Tensor
    """The mean of each column ``[D]``."""
    covariance: torch.Tensor
    """The covariance of the columns ``[D, D]``."""
    size: float
    """How many rows the prior counts for, shared out equally between the components."""


class CategoryPrior(NamedTuple):
    """What a weak prior on categories is scaled to. Made by :func:`weak_category_prior`."""

    proportions: tuple[torch.Tensor, ...]
    """For each column the proportions of its categories ``[C_j]``."""
    size: float
    """How many rows the prior counts for, shared out equally between the components."""


def weak_prior(x: Any, size: float = 1.0) -> Prior:
    """Mean and covariance (divided by N - 1) of the rows ``x [N, D]`` that hold no NaN.

    A component of a program with this prior starts from ``size / K`` rows that look like the
    average one, as in Latent GOLD (Vermunt and Magidson, Technical guide, "Bayes constants").
    """
    x = _complete(x, size)
    return Prior(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), float(size))


def weak_category_prior(x: Any, categories: tuple[int, ...], size: float = 1.0) -> CategoryPrior:
    """The proportions of codes 0, ..., C_j - 1 in column j of ``x``; else as :func:`weak_prior`."""
    x = _complete(x, size, len(categories))
    codes = [torch.arange(check_count("categories", c)).to(x) for c in categories]
    for j, own in enumerate(codes):
        if not bool(torch.isin(x[:, j], own).all()):
            raise ValueError(f"Expected codes 0, ..., {len(own) - 1} in column {j}.")
    shown = (x[:, j, None] == c for j, c in enumerate(codes))
    return CategoryPrior(tuple(s.to(x.dtype).mean(0) for s in shown), float(size))


def component_weights(
    x: torch.Tensor, components: int, prior: Prior | CategoryPrior | None
) -> torch.Tensor:
    """``weights [K]``: a parameter without a prior, else ``~ Dirichlet(1 + size / K)``."""
    if prior is None:
        return equal_weights(x, components)
    size = x.new_tensor(prior.size / components)
    return pyro.sample("weights", dist.Dirichlet((1 + size).expand(components)))


def _complete(x: Any, size: float, columns: int | None = None) -> torch.Tensor:
    x = rows(x, columns)
    x = x[~x.isnan().any(-1)]
    if len(x) < 2:
        raise ValueError(f"Expected at least two rows without NaN; got {len(x)}.")
    if not size > 0:
        raise ValueError(f"Expected size > 0; got {size}.")
    return x
