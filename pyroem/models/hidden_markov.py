"""Hidden Markov models, as a Pyro program."""

from functools import partial
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyroem.models.assignments import Program, beside, check_choice, check_count

Emission = Literal["gaussian", "poisson", "bernoulli", "categorical"]
Covariance = Literal["full", "diagonal"]


def hidden_markov(
    states: int,
    emission: Emission = "gaussian",
    covariance: Covariance = "full",
    categories: int | None = None,
) -> Program:
    """The program ``program(x, lengths=None)``, for sequences ``x [S, T, D]`` or one ``x [T, D]``.

        z_0 ~ Categorical(initial),   z_t | z_{t-1} = i ~ Categorical(transition_i)

    with ``initial [K]`` and ``transition [K, K]`` on the simplex, and by the argument ``emission``

    - ``"gaussian"``: ``x_t | z_t = k ~ Normal(loc_k, Sigma_k)``, ``loc [K, D]``, and
      ``Sigma_k = covariance_k [D, D]`` (``"full"``) or ``diag(scale_k ** 2)`` (``"diagonal"``)
    - ``"poisson"``: ``rate [K, D]``;  ``"bernoulli"``: ``probs [K, D]``;  ``"categorical"``:
      ``probs [K, D, categories]`` of codes 0, 1, ...: columns that are independent given the state

    Sequences of unequal lengths are padded to T steps, and ``lengths [S]`` says how many count.
    Raises ``ValueError`` on a setting or shape outside of these. See Rabiner (1989), Proceedings of
    the IEEE 77.
    """
    check_count("states", states)
    check_choice("emission", emission, get_args(Emission))
    check_choice("covariance", covariance, get_args(Covariance))
    if (emission == "categorical") != (categories is not None):
        raise ValueError(
            f"Expected categories with emission 'categorical', and only then; got {categories}"
            f" with {emission!r}."
        )
    check_count("categories", 1 if categories is None else categories)
    kind = f"{covariance} {emission}" if emission == "gaussian" else emission
    return partial(_program, states=states, kind=kind, categories=categories)


def _program(
    x: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    states: int,
    kind: str,
    categories: int | None,
) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"Expected x of shape [S, T, D] or [T, D]; got {list(x.shape)}.")
    if lengths is not None and x.ndim == 2:
        raise ValueError("Expected lengths with x of shape [S, T, D] only; got it with [T, D].")
    if lengths is not None:
        beside("lengths", lengths, x)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    K, T = states, x.shape[-2]
    start = lambda: x.new_ones(K) / K  # noqa: E731
    initial = pyro.param("initial", start, constraint=constraints.simplex)
    ways = lambda: x.new_ones(K, K) / K  # noqa: E731
    transition = pyro.param("transition", ways, constraint=constraints.simplex)
    tables = _tables(kind, x.new_ones(K, x.shape[-1]), categories)
    with pyro.plate("sequences", len(x)) if x.ndim == 3 else poutine.mask(mask=True):
        z = None
        for t in pyro.markov(range(T)):
            with poutine.mask(mask=True if lengths is None else t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
                step = _emission(kind, [table[z] for table in tables])
                pyro.sample(f"x_{t}", step, obs=x[:, t] if x.ndim == 3 else x[t])


def _tables(kind: str, ones: torch.Tensor, categories: int | None) -> list[torch.Tensor]:
    """The parameters of what is seen, equal for all states (``ones [K, D]``)."""
    if kind == "poisson":
        return [pyro.param("rate", ones, constraint=constraints.positive)]
    if kind == "bernoulli":
        return [pyro.param("probs", ones / 2, constraint=constraints.unit_interval)]
    if kind == "categorical":
        assert categories is not None
        start = ones.unsqueeze(-1).repeat(1, 1, categories) / categories
        return [pyro.param("probs", start, constraint=constraints.simplex)]
    loc = pyro.param("loc", torch.zeros_like(ones))
    if kind == "diagonal gaussian":
        return [loc, pyro.param("scale", ones, constraint=constraints.positive)]
    matrices = torch.diag_embed(ones)
    return [loc, pyro.param("covariance", matrices, constraint=constraints.positive_definite)]


def _emission(kind: str, arguments: list[torch.Tensor]) -> dist.TorchDistribution:
    if kind == "full gaussian":
        return dist.MultivariateNormal(*arguments)
    families = {
        "diagonal gaussian": dist.Normal,
        "poisson": dist.Poisson,
        "bernoulli": dist.Bernoulli,
        "categorical": dist.Categorical,
    }
    return families[kind](*arguments).to_event(1)
