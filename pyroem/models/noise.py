"""Gaussian mixtures with a component of uniform noise, as a Pyro program."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

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
    components: int, volume: float | Sequence[float], covariance: str = "full"
) -> Program:
    """The program ``program(x, labels=None)`` of K Gaussians and noise, for rows ``x [N, D]``.

        z_n ~ Categorical(weights)
        x_n | z_n = k ~ Normal(loc_k, Sigma_k) for k < K,   p(x_n | z_n = K) = 1 / volume

    with ``weights [K + 1]`` on the simplex, the noise last, ``loc [K, D]``, and ``covariance`` or
    ``scale`` as in :func:`pyroem.models.gaussian_mixture`. ``volume`` is that of the region of the
    data, see :func:`box_volume`; or, where values are missing, the lengths of its D sides
    (:func:`box_sides`): the density of a row is then over the columns that are seen of it. The
    noise is written as a Gaussian so wide that its density is one
    number on the data, times the constant that makes it ``1 / volume``: the density of the site
    ``level``, which always shows zero. So the noise stands in the same site as the other components
    (a site of its own needs masks that differ by component). It has no use as a simulator: rows
    sampled from the noise come from the wide Gaussian. Labels, for which see
    :func:`pyroem.models.assignments.assignment`, call the noise K. Raises ``ValueError`` on a
    setting or shape outside of these. See Banfield and Raftery (1993), Biometrics 49.
    """
    check_count("components", components)
    check_choice("covariance", covariance, COVARIANCES)
    sides = torch.as_tensor(volume, dtype=torch.float64)
    if sides.dim() > 1 or not bool(((sides > 0) & sides.isfinite()).all()):
        raise ValueError(
            f"Expected a volume, or lengths of sides, positive and finite; got {volume}."
        )
    return partial(_program, components=components, volume=sides, covariance=covariance)


def box_volume(x: Any) -> float:
    """The volume of the smallest box, sides parallel to the axes, around the rows ``x [N, D]``.

    NaN are left out.
    """
    return math.exp(sum(map(math.log, box_sides(x))))


def box_sides(x: Any) -> list[float]:
    """The lengths of the sides of the smallest box around the rows ``x [N, D]``; NaN are left out.

    Raises ``ValueError`` for a column without two different values.
    """
    x = rows(x).double()
    missing = x.isnan()
    sides = x.masked_fill(missing, -torch.inf).amax(0) - x.masked_fill(missing, torch.inf).amin(0)
    if not bool(((sides > 0) & sides.isfinite()).all()):
        raise ValueError(f"Expected columns of positive length; got sides {sides.tolist()}.")
    return [float(side) for side in sides]


def _program(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    volume: torch.Tensor,
    covariance: str,
) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    matrix, spherical = covariance in ("full", "tied"), covariance == "spherical"
    one = torch.eye(D).to(x) if matrix else x.new_ones(() if spherical else D)
    if D > 1 and not volume.dim() and bool(x.isnan().any()):
        raise ValueError(
            "Expected lengths of sides, box_sides(x), as values are missing; got one"
            " volume, which says nothing of single columns."
        )
    if volume.dim() and len(volume) != D:
        raise ValueError(f"Expected the lengths of {D} sides, one a column; got {len(volume)}.")
    sides = WIDTH * (volume if volume.dim() else volume ** (1 / D)).to(x)
    noise = torch.diag(sides.expand(D) ** 2) if matrix else sides.expand(D)
    weights = equal_weights(x, K + 1)
    loc = pyro.param("loc", lambda: x.new_zeros(K, D))
    spread = pyro.param(
        "covariance" if matrix else "scale",
        lambda: (one if covariance == "tied" else one.expand(K, *one.shape)).clone(),
        constraint=constraints.positive_definite if matrix else constraints.positive,
    )
    shown = spread.unsqueeze(-1).expand(K, D) if spherical else spread.expand(K, *one.shape)
    spreads = torch.cat([shown, noise.unsqueeze(0)])
    centres = torch.cat([loc, x.new_zeros(1, D)])
    level = torch.cat([x.new_ones(K), x.new_full((1,), math.sqrt(2 * math.pi) * WIDTH)])
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        if matrix:
            emission = dist.MultivariateNormal(centres[z], covariance_matrix=spreads[z])
        else:
            emission = dist.Normal(centres[z], spreads[z]).to_event(1)
        pyro.sample("x", emission, obs=x)
        # Exponential(c) has the density c at zero: a factor for each cell that is not missing.
        constant = dist.Exponential(level[z].unsqueeze(-1)).expand([*z.shape[:-1], N, D])
        pyro.sample("level", constant.to_event(1), obs=0 * x)
