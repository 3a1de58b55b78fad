"""Gaussian mixtures, as a Pyro program."""

from collections.abc import Callable
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

Covariance = Literal["full", "diagonal", "tied", "spherical"]


def gaussian_mixture(
    components: int, covariance: Covariance = "full"
) -> Callable[[torch.Tensor], None]:
    """The program of a Gaussian mixture, for rows ``x [N, D]``.

        z_n ~ Categorical(weights),   x_n | z_n = k ~ Normal(loc_k, Sigma_k)

    with ``weights [K]`` on the simplex, ``loc [K, D]``, and by the argument ``covariance``

    - ``"full"``: ``covariance [K, D, D]``, ``Sigma_k = covariance_k``
    - ``"diagonal"``: ``scale [K, D]``, ``Sigma_k = diag(scale_k ** 2)``
    - ``"tied"``: ``covariance [D, D]``, ``Sigma_k = covariance``
    - ``"spherical"``: ``scale [K]``, ``Sigma_k = scale_k ** 2 * I``

    Its own initial values make all components equal, which is a fixed point of EM: a solver
    starts from the data instead. Raises ``ValueError`` on a setting or shape outside of these.
    """
    if components < 1:
        raise ValueError(f"Expected components >= 1; got {components}.")
    if covariance not in get_args(Covariance):
        raise ValueError(f"Expected covariance in {get_args(Covariance)}; got {covariance!r}.")
    matrix = covariance in ("full", "tied")

    def model(x: torch.Tensor) -> None:
        if x.ndim != 2:
            raise ValueError(f"Expected x of shape [N, D]; got {list(x.shape)}.")
        K, (N, D) = components, x.shape
        one = torch.eye(D, dtype=x.dtype, device=x.device) if matrix else x.new_ones(())
        shape = {"full": (K, D, D), "diagonal": (K, D), "tied": (D, D), "spherical": (K,)}
        weights = pyro.param("weights", lambda: x.new_ones(K) / K, constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: x.new_zeros(K, D))
        spread = pyro.param(
            "covariance" if matrix else "scale",
            lambda: one.expand(shape[covariance]).clone(),
            constraint=constraints.positive_definite if matrix else constraints.positive,
        )
        with pyro.plate("rows", N):
            z = pyro.sample("z", dist.Categorical(weights))
            rows = spread if covariance == "tied" else spread[z]
            if matrix:
                emission = dist.MultivariateNormal(loc[z], covariance_matrix=rows)
            else:
                rows = rows.unsqueeze(-1) if covariance == "spherical" else rows
                emission = dist.Normal(loc[z], rows).to_event(1)
            pyro.sample("x", emission, obs=x)

    return model
