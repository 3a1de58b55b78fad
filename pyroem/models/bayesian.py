"""Gaussian mixtures with the conjugate prior that mclust has, as a Pyro program."""

from functools import partial
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch

from pyroem.models.assignments import Program, assignment, check_choice, check_count, rows
from pyroem.models.priors import Prior, component_weights

Covariance = Literal["full", "diagonal", "tied", "spherical"]


def bayesian_gaussian_mixture(
    components: int,
    prior: Prior,
    covariance: Covariance = "full",
    shrinkage: float = 0.01,
    degrees: float | None = None,
) -> Program:
    """The program ``program(x, labels=None)`` of a Gaussian mixture that cannot collapse.

        weights ~ Dirichlet(1 + size / K),   z_n ~ Categorical(weights),
        x_n | z_n = k ~ Normal(loc_k, Sigma_k),
        loc_k | Sigma_k ~ Normal(mean, Sigma_k / shrinkage)

    for rows ``x [N, D]``, with ``weights [K]`` and ``loc [K, D]``. With ``nu = degrees`` (D + 2 if
    left out) and ``S = covariance of the prior / K^(2 / D)`` it is by the argument ``covariance``

    - ``"full"``: ``precision [K, D, D]``, ``Sigma_k = precision_k^-1 ~ InverseWishart(nu, S)``
    - ``"tied"``: ``precision [D, D]``, the same for all components
    - ``"diagonal"``: ``variance [K, D] ~ InverseGamma(nu / 2, diag(S) / 2)``
    - ``"spherical"``: ``variance [K] ~ InverseGamma(nu / 2, trace(S) / 2 D)``, the same for columns

    These are mclust's defaults, but that a diagonal has a scale for each column. The mode is that
    of the density of covariances: the Wishart prior of the site ``precision`` has ``nu + 2 D + 2``
    degrees of freedom, which makes its density at the precision proportional to that at the
    covariance. ``prior`` is made by :func:`pyroem.models.priors.weak_prior`, once, from all rows.
    For ``labels`` see :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a
    setting or shape outside of these. See Fraley and Raftery (2007), Journal of Classification 24.
    """
    check_count("components", components)
    check_choice("covariance", covariance, get_args(Covariance))
    if not isinstance(prior, Prior):
        raise ValueError(f"Expected a prior, made by weak_prior(x); got {type(prior).__name__}.")
    D = len(prior.mean)
    degrees = D + 2 if degrees is None else degrees
    if not shrinkage > 0:
        raise ValueError(f"Expected shrinkage > 0; got {shrinkage}.")
    if not degrees > D - 1:
        raise ValueError(f"Expected degrees > {D - 1} for {D} columns; got {degrees}.")
    if int(torch.linalg.cholesky_ex(prior.covariance).info):
        raise ValueError("Expected a prior with a positive definite covariance; it is singular.")
    scale = prior.covariance / components ** (2 / D)
    return partial(
        _program,
        components=components,
        prior=prior._replace(covariance=scale),
        covariance=covariance,
        shrinkage=float(shrinkage),
        degrees=float(degrees),
    )


def _program(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    prior: Prior,
    covariance: Covariance,
    shrinkage: float,
    degrees: float,
) -> None:
    x = rows(x, len(prior.mean))
    K, (N, D) = components, x.shape
    mean, S, nu = prior.mean.to(x), prior.covariance.to(x), x.new_tensor(degrees)
    weights = component_weights(x, K, prior)
    if covariance in ("full", "tied"):
        wishart = dist.Wishart(nu + 2 * D + 2, precision_matrix=S)
        own = wishart.expand([K]).to_event(1) if covariance == "full" else wishart
        precision = pyro.sample("precision", own)
        centre = dist.MultivariateNormal(mean.expand(K, D), precision_matrix=shrinkage * precision)
        loc = pyro.sample("loc", centre.to_event(1))
    else:
        each = S.diagonal() if covariance == "diagonal" else S.diagonal().mean()
        shape = [K, D] if covariance == "diagonal" else [K]
        gamma = dist.InverseGamma(nu / 2, each / 2).expand(shape)
        variance = pyro.sample("variance", gamma.to_event(len(shape)))
        wide = variance if covariance == "diagonal" else variance.unsqueeze(-1)
        spread = (wide / shrinkage).sqrt()
        loc = pyro.sample("loc", dist.Normal(mean, spread).expand([K, D]).to_event(2))
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        if covariance in ("full", "tied"):
            own = precision[z] if covariance == "full" else precision
            emission = dist.MultivariateNormal(loc[z], precision_matrix=own)
        else:
            emission = dist.Normal(loc[z], wide[z].sqrt()).to_event(1)
        pyro.sample("x", emission, obs=x)
