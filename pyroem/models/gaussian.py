"""Gaussian mixtures, as Pyro programs: scikit-learn's covariances and mclust's fourteen."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.constraints import DIAGONALS, MATRICES, covariances, variances
from pyroem.models.assignments import (
    Program,
    assignment,
    check_choice,
    check_count,
    equal_weights,
    rows,
)

# Each name is mclust's: volume, shape and orientation, E(qual), V(ariable) or I(dentity).
NAMED = {
    "full": "VVV",
    "tied": "EEE",
    "diagonal": "VVI",
    "tied-diagonal": "EEI",
    "spherical": "VII",
    "tied-spherical": "EII",
}
COVARIANCES = (*NAMED, "EII", "VII", "EEI", "VEI", "EVI", "VVI", "EEE", *MATRICES, "VVV")


def gaussian_mixture(components: int, covariance: str = "full") -> Program:
    """The program ``program(x, labels=None)`` of a Gaussian mixture, for rows ``x [N, D]``.

        z_n ~ Categorical(weights),   x_n | z_n = k ~ Normal(loc_k, Sigma_k)

    with ``weights [K]`` on the simplex, ``loc [K, D]``, and by the argument ``covariance``

    - ``"full"`` or ``"VVV"``: ``covariance [K, D, D]``
    - ``"tied"`` or ``"EEE"``: ``covariance [D, D]``
    - ``"diagonal"`` or ``"VVI"``: ``scale [K, D]``, ``Sigma_k = diag(scale_k ** 2)``
    - ``"tied-diagonal"`` or ``"EEI"``: ``scale [1, D]``
    - ``"spherical"`` or ``"VII"``: ``scale [K]``; ``"tied-spherical"`` or ``"EII"``: ``scale []``
    - ``"VEI"``, ``"EVI"``: ``variance [K, D]`` (:class:`pyroem.constraints.variances`)
    - ``"VEE"``, ``"EVV"``, ``"EEV"``, ``"VEV"``, ``"EVE"``, ``"VVE"``: ``covariance [K, D, D]``
      (:class:`pyroem.constraints.covariances`)

    Its own initial values make all components equal, which is a fixed point of EM: a solver
    starts from the data instead. For ``labels`` see
    :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a setting or shape
    outside of these.
    """
    check_count("components", components)
    name = NAMED.get(check_choice("covariance", covariance, COVARIANCES), covariance)
    return partial(_program, components=components, covariance=name)


def _program(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    covariance: str,
) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    weights = equal_weights(x, K)
    loc = pyro.param("loc", lambda: x.new_zeros(K, D))
    spread = _spread(covariance, K, x)
    each = covariance[0] == "V" or covariance in (*DIAGONALS, *MATRICES)
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        own = spread[z] if each else spread
        if covariance[2] != "I":
            emission = dist.MultivariateNormal(loc[z], covariance_matrix=own)
        else:
            own = own.sqrt() if covariance in DIAGONALS else own
            own = own.unsqueeze(-1) if covariance == "VII" else own
            emission = dist.Normal(loc[z], own).to_event(1)
        pyro.sample("x", emission, obs=x)


def _spread(covariance: str, K: int, x: torch.Tensor) -> torch.Tensor:
    """The parameter that holds the covariances, in the form that suits their structure."""
    D = x.shape[1]
    one = torch.eye(D, dtype=x.dtype, device=x.device)
    positive, definite = constraints.positive, constraints.positive_definite
    if covariance in MATRICES:
        shared = covariances(covariance)
        return pyro.param("covariance", lambda: one.repeat(K, 1, 1), constraint=shared)
    if covariance in DIAGONALS:
        return pyro.param("variance", lambda: x.new_ones(K, D), constraint=variances(covariance))
    if covariance in ("VVV", "EEE"):
        stack = (K, 1, 1) if covariance == "VVV" else (1, 1)
        return pyro.param("covariance", lambda: one.repeat(*stack), constraint=definite)
    shape = {"VVI": (K, D), "EEI": (1, D), "VII": (K,), "EII": ()}[covariance]
    return pyro.param("scale", lambda: x.new_ones(shape), constraint=positive)
