"""Latent classes: mixtures for binary and categorical columns, as Pyro programs."""

from collections.abc import Sequence
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.models.assignments import (
    Program,
    assignment,
    check_count,
    rows,
)
from pyroem.models.priors import CategoryPrior, Prior, component_weights


def bernoulli_mixture(components: int, prior: Prior | None = None) -> Program:
    """The program ``program(x, labels=None)`` for binary columns ``x [N, D]``.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ Bernoulli(probs_kj)

    with ``weights [K]`` on the simplex and ``probs [K, D]``. With a ``prior`` (see
    :func:`pyroem.models.priors.weak_prior`)

        weights ~ Dirichlet(1 + s),   s = size / K,
        probs_kj ~ Beta(1 + s mean_j, 1 + s (1 - mean_j))

    For ``labels`` see :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a
    setting or shape outside of these.
    """
    check_count("components", components)
    return partial(_bernoulli, components=components, prior=prior)


def _bernoulli(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    prior: Prior | None,
) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    weights = component_weights(x, K, prior)
    if prior is None:
        start = lambda: x.new_full((K, D), 0.5)  # noqa: E731
        probs = pyro.param("probs", start, constraint=constraints.unit_interval)
    else:
        size, mean = x.new_tensor(prior.size / K), prior.mean.to(x)
        beta = dist.Beta(1 + size * mean, 1 + size * (1 - mean))
        probs = pyro.sample("probs", beta.expand([K, D]).to_event(2))
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=x)


def latent_class(
    components: int, categories: Sequence[int], prior: CategoryPrior | None = None
) -> Program:
    """The program ``program(x, labels=None)`` of latent class analysis, for codes ``x [N, D]``.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ Categorical(probs_j[k])

    with ``weights [K]`` on the simplex and for each column j a parameter ``probs_<j> [K, C_j]`` and
    a site ``x_<j>``. ``categories`` are the numbers ``C_j``; the codes, integers or floats, are 0,
    ..., C_j - 1. With a ``prior`` (see :func:`pyroem.models.priors.weak_category_prior`)

        weights ~ Dirichlet(1 + s),   probs_j[k] ~ Dirichlet(1 + s proportions_j),   s = size / K

    For ``labels`` see :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a
    setting or shape outside of these. See Goodman (1974), Biometrika 61.
    """
    check_count("components", components)
    sizes = tuple(check_count("categories", c) for c in categories)
    if prior is not None and tuple(map(len, prior.proportions)) != sizes:
        found = tuple(map(len, prior.proportions))
        raise ValueError(f"Expected a prior on {sizes} categories; got one on {found}.")
    return partial(_latent_class, components=components, categories=sizes, prior=prior)


def _latent_class(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    categories: tuple[int, ...],
    prior: CategoryPrior | None,
) -> None:
    x, K = rows(x, len(categories)), components
    weights = component_weights(x, K, prior)
    tables = []
    for j, C in enumerate(categories):
        if prior is None:
            start = x.new_ones(K, C) / C
            table = pyro.param(f"probs_{j}", start, constraint=constraints.simplex)
        else:
            size = x.new_tensor(prior.size / K)
            dirichlet = dist.Dirichlet(1 + size * prior.proportions[j].to(x))
            table = pyro.sample(f"probs_{j}", dirichlet.expand([K]).to_event(1))
        tables.append(table)
    with pyro.plate("rows", len(x)):
        z = assignment(dist.Categorical(weights), x, labels)
        for j, table in enumerate(tables):
            pyro.sample(f"x_{j}", dist.Categorical(table[z]), obs=x[:, j])
