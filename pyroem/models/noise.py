"""Gaussian mixtures with a component of uniform noise, as a Pyro program."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.models.assignments import (
    Program,
    assignment,
    check_choice,
    check_count,
    equal_weights,
    rows,
)

COVARIANCES = ("full", "diagonal", "tied", "spherical")

WIDTH = 1e12
"""The spread of the noise, in sides of a cube of its volume: flat to the last bit on the data."""


def gaussian_mixture_with_noise(
    components: int, volume: float, covariance: str = "full"
) -> Program:
    """The program ``program(x, labels=None)`` of K Gaussians and noise, for rows ``x [N, D]``.

        z_n ~ Categorical(weights)
        x_n | z_n = k ~ Normal(loc_k, Sigma_k) for k < K,   p(x_n | z_n = K) = 1 / volume

    with ``weights [K + 1]`` on the simplex, the noise last, ``loc [K, D]``, and ``covariance`` or
    ``scale`` as in :func:`pyroem.models.gaussian_mixture`. ``volume`` is that of the region of the
    data, see :func:`box_volume`. The noise is written as a Gaussian so wide that its density is one
    number on the data, times the constant that makes it ``1 / volume``: the density of the site
    ``level``, which always shows zero. So the noise stands in the same site as the other components
    (a site of its own needs masks that differ by component). It has no use as a simulator: rows
    sampled from the noise come from the wide Gaussian. Labels, for which see
    :func:`pyroem.models.assignments.assignment`, call the noise K. Raises ``ValueError`` on a
    setting or shape outside of these. See Banfield and Raftery (1993), Biometrics 49.
    """
    check_count("components", components)
    check_choice("covariance", covariance, COVARIANCES)
    if not (volume > 0 and math.isfinite(volume)):
        raise ValueError(f"Expected a volume that is positive and finite; got {volume}.")
    return partial(_program, components=components, volume=float(volume), covariance=covariance)


def box_volume(x: torch.Tensor) -> float:
    """The volume of the smallest box, sides parallel to the axes, around the rows ``x [N, D]``."""
    x = rows(x)
    x = x[~x.isnan().any(-1)]
    if not len(x):
        raise ValueError("Expected a row without NaN; got none.")
    return math.exp(float((x.amax(0) - x.amin(0)).double().log().sum()))


def _program(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    volume: float,
    covariance: str,
) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    matrix = covariance in ("full", "tied")
    one = torch.eye(D).to(x) if matrix else x.new_ones(() if covariance == "spherical" else D)
    side = WIDTH * volume ** (1 / D)
    noise = (side**2 if matrix else side) * one
    weights = equal_weights(x, K + 1)
    loc = pyro.param("loc", lambda: x.new_zeros(K, D))
    spread = pyro.param(
        "covariance" if matrix else "scale",
        lambda: (one if covariance == "tied" else one.expand(K, *one.shape)).clone(),
        constraint=constraints.positive_definite if matrix else constraints.positive,
    )
    spreads = torch.cat([spread.expand(K, *one.shape), noise.unsqueeze(0)])
    centres = torch.cat([loc, x.new_zeros(1, D)])
    level = torch.cat([x.new_ones(K), x.new_full((1,), math.sqrt(2 * math.pi) * WIDTH)])
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        own = spreads[z].unsqueeze(-1) if covariance == "spherical" else spreads[z]
        if matrix:
            emission = dist.MultivariateNormal(centres[z], covariance_matrix=own)
        else:
            emission = dist.Normal(centres[z], own).to_event(1)
        pyro.sample("x", emission, obs=x)
        # Exponential(c) has the density c at zero: a factor for each cell that is not missing.
        constant = dist.Exponential(level[z].unsqueeze(-1)).expand([*z.shape[:-1], N, D])
        pyro.sample("level", constant.to_event(1), obs=0 * x)
