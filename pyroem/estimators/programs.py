"""What the estimators need beside the ready-made programs: counts that are not whole."""

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
from pyroem.models.priors import Prior


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
