"""Programs that the estimators need beside the ready-made ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.families import register_family
from pyroem.families.family import registered
from pyroem.models.assignments import Program, assignment, equal_weights, rows
from pyroem.models.gaussian import NAMED, _spread, gaussian_mixture
from pyroem.models.priors import Prior


def labelled_gaussian_mixture(components: int, covariance: str) -> Program:
    """:func:`pyroem.models.gaussian_mixture` as ``program(x, labels=None)``.

    For ``labels`` see :func:`pyroem.models.assignments.assignment`.
    """
    return partial(_gaussian, gaussian_mixture(components, covariance), components, covariance)


def _gaussian(
    plain: Program,
    components: int,
    covariance: str,
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> None:
    if labels is None:
        return plain(x)
    covariance = NAMED.get(covariance, covariance)
    weights = equal_weights(x, components)
    loc = pyro.param("loc", lambda: x.new_zeros(components, x.shape[1]))
    spread = _spread(covariance, components, x)
    with pyro.plate("rows", len(x)):
        z = assignment(dist.Categorical(weights), x, labels)
        own = spread if covariance in ("EEE", "EEI", "EII") else spread[z]
        if covariance[2] != "I":
            emission = dist.MultivariateNormal(loc[z], covariance_matrix=own)
        else:
            own = own.sqrt() if covariance in ("VEI", "EVI") else own
            own = own.unsqueeze(-1) if covariance == "VII" else own
            emission = dist.Normal(loc[z], own).to_event(1)
        pyro.sample("x", emission, obs=x)


class RealPoisson(dist.Poisson):
    """The Poisson density on all numbers >= 0, where counts were averaged, scaled or smoothed.

        log p(x) = x log(rate) - rate - log Gamma(x + 1)

    It does not sum to one there: a likelihood up to a constant, as in a quasi-Poisson regression.
    """

    support = constraints.nonnegative

    def expand(self, batch_shape: Any, _instance: Any = None) -> RealPoisson:
        """With other batch dims."""
        return RealPoisson(self.rate.expand(batch_shape), validate_args=False)


_poisson = registered(dist.Poisson)
assert _poisson is not None
register_family(RealPoisson, _poisson)


def real_poisson_mixture(components: int, prior: Prior | None = None) -> Program:
    """:func:`pyroem.models.poisson_mixture` for numbers >= 0 that need not be whole."""
    return partial(_real_poisson, components=components, prior=prior)


def _real_poisson(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    prior: Prior | None,
) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    if prior is None:
        weights = equal_weights(x, K)
        rate = pyro.param("rate", lambda: x.new_ones(K, D), constraint=constraints.positive)
    else:
        size, mean = x.new_tensor(prior.size / K), prior.mean.to(x)
        weights = pyro.sample("weights", dist.Dirichlet((1 + size).expand(K)))
        rate = pyro.sample("rate", dist.Gamma(1 + size * mean, size).expand([K, D]).to_event(2))
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        pyro.sample("x", RealPoisson(rate[z]).to_event(1), obs=x)
