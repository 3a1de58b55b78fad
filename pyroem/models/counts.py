"""Mixtures for counts: Poisson, and Poisson with extra zeros, as Pyro programs."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.models.assignments import (
    Program,
    assignment,
    beside,
    check_count,
    equal_weights,
    rows,
)
from pyroem.models.priors import Prior, component_weights


def poisson_mixture(
    components: int, prior: Prior | None = None, distribution: type[dist.Poisson] = dist.Poisson
) -> Program:
    """The program ``program(x, labels=None, exposure=None)`` for counts ``x [N, D]``.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ Poisson(exposure_n rate_kj)

    with ``weights [K]`` on the simplex and ``rate [K, D]``. ``exposure [N]`` are positive numbers
    (time, area), one if left out. With a ``prior`` (see :func:`pyroem.models.priors.weak_prior`)

        weights ~ Dirichlet(1 + s),   rate_kj ~ Gamma(1 + s mean_j, s),   s = size / K

    ``distribution`` may be a subclass, with another support. For ``labels`` see
    :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a setting or shape
    outside of these.
    """
    check_count("components", components)
    return partial(_poisson, components=components, prior=prior, distribution=distribution)


def _poisson(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    exposure: torch.Tensor | None = None,
    *,
    components: int,
    prior: Prior | None,
    distribution: type[dist.Poisson],
) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    weights = component_weights(x, K, prior)
    if prior is None:
        rate = pyro.param("rate", lambda: x.new_ones(K, D), constraint=constraints.positive)
    else:
        size, mean = x.new_tensor(prior.size / K), prior.mean.to(x)
        rate = pyro.sample("rate", dist.Gamma(1 + size * mean, size).expand([K, D]).to_event(2))
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        expected = rate[z]
        if exposure is not None:
            expected = expected * beside("exposure", exposure, x).unsqueeze(-1)
        pyro.sample("x", distribution(expected).to_event(1), obs=x)


def zero_inflated_mixture(components: int) -> Program:
    """The program ``program(x, labels=None)`` for counts ``x [N, D]`` with extra zeros.

        z_n ~ Categorical(weights)
        x_nj | z_n = k  is 0 with probability gate_kj, and otherwise ~ Poisson(rate_kj)

    with ``weights [K]`` on the simplex, ``gate [K, D]`` and ``rate [K, D]``. For ``labels`` see
    :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a setting or shape
    outside of these. See Lambert (1992), Technometrics 34.
    """
    check_count("components", components)
    return partial(_zero_inflated, components=components)


def _zero_inflated(x: torch.Tensor, labels: torch.Tensor | None = None, *, components: int) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    weights = equal_weights(x, K)
    rate = pyro.param("rate", lambda: x.new_ones(K, D), constraint=constraints.positive)
    start = lambda: x.new_full((K, D), 0.2)  # noqa: E731
    gate = pyro.param("gate", start, constraint=constraints.unit_interval)
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        pyro.sample("x", dist.ZeroInflatedPoisson(rate[z], gate=gate[z]).to_event(1), obs=x)
