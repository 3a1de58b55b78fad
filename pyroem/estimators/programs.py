"""What the estimators need beside the ready-made programs: counts that are not whole."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.distributions import constraints

from pyroem.families import register_family
from pyroem.families.family import registered
from pyroem.models.assignments import Program
from pyroem.models.counts import poisson_mixture
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
    return poisson_mixture(components, prior, RealPoisson)
