"""The programs, as any Pyro user would write them, with data and starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyroem

Params = dict[str, Tensor]
Program = Callable[[Tensor], None]


def full_gaussian(k: int) -> Program:
    """A mixture of Gaussians with a covariance matrix each."""

    def program(x: Tensor) -> None:
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: torch.randn(k, x.shape[-1], dtype=x.dtype))
        cov = pyro.param("cov", eye.repeat(k, 1, 1), constraint=constraints.positive_definite)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(loc[z], covariance_matrix=cov[z]), obs=x)

    return program


def gaussian(k: int) -> Program:
    """A mixture of univariate Gaussians."""

    def program(x: Tensor) -> None:
        weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: torch.randn(k, dtype=x.dtype))
        scale = pyro.param("scale", x.new_ones(k), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    return program


def latent_classes(k: int) -> Program:
    """Binary items."""

    def program(x: Tensor) -> None:
        start = 0.2 + 0.6 * torch.rand(k, x.shape[-1], dtype=x.dtype)
        weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
        probs = pyro.param("probs", start, constraint=constraints.unit_interval)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=x)

    return program


def gaussian_chain(k: int) -> Program:
    """A hidden Markov model with a diagonal Gaussian for each state."""

    def program(x: Tensor) -> None:
        even = x.new_ones(k, k) / k
        initial = pyro.param("initial", even[0], constraint=constraints.simplex)
        transition = pyro.param("transition", even, constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: torch.randn(k, x.shape[-1], dtype=x.dtype))
        scale = pyro.param("scale", x.new_ones(k, x.shape[-1]), constraint=constraints.positive)
        z = None
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], scale[z]).to_event(1), obs=x[t])

    return program


def ragged_chains(k: int) -> Callable[[Tensor, Tensor], None]:
    """The same for padded sequences."""

    def program(x: Tensor, lengths: Tensor) -> None:
        even = x.new_ones(k, k) / k
        initial = pyro.param("initial", even[0], constraint=constraints.simplex)
        transition = pyro.param("transition", even, constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: torch.randn(k, x.shape[-1], dtype=x.dtype))
        scale = pyro.param("scale", x.new_ones(k, x.shape[-1]), constraint=constraints.positive)
        with pyro.plate("sequences", len(x)):
            z = None
            for t in pyroem.markov(x.shape[1]):
                with pyro.poutine.mask(mask=t < lengths):
                    probs = initial if z is None else transition[z]
                    z = pyro.sample(f"z_{t}", dist.Categorical(probs))
                    pyro.sample(f"x_{t}", dist.Normal(loc[z], scale[z]).to_event(1), obs=x[:, t])

    return program


def chain_rows(steps: int, d: int, k: int) -> tuple[Tensor, Params]:
    """One sequence whose states stay for about ten steps, and a start."""
    options: Any = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    centres = 1.5 * torch.randn(k, d, **options)
    moves = torch.rand(steps, **options) < 0.1
    drawn = torch.randint(k, (steps,), generator=options["generator"])
    z = drawn[torch.where(moves, torch.arange(steps), 0).cummax(0).values]
    transition = 0.8 * torch.eye(k, dtype=torch.float64) + 0.2 / k
    start = {
        "initial": torch.full((k,), 1 / k, dtype=torch.float64),
        "transition": transition,
        "loc": centres + 0.3 * torch.randn(k, d, **options),
        "scale": torch.full((k, d), 1.3, dtype=torch.float64),
    }
    return centres[z] + torch.randn(steps, d, **options), start


def gaussian_rows(n: int, d: int, k: int, apart: float = 3.0) -> tuple[Tensor, Params]:
    """Rows for ``full_gaussian`` and a start. They are drawn in place, so that none is copied."""
    options: Any = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    centres = apart * torch.randn(k, d, **options)
    scales = 0.5 + torch.rand(k, d, **options)
    mix = torch.eye(d, dtype=torch.float64) + 0.2 * torch.randn(d, d, **options)
    start = {
        "weights": torch.full((k,), 1 / k, dtype=torch.float64),
        "loc": centres + 0.5 * torch.randn(k, d, **options),
        "cov": 2 * torch.eye(d, dtype=torch.float64).repeat(k, 1, 1),
    }
    x = torch.empty(n, d, dtype=torch.float64)
    for part in x.split(10_000):
        z = torch.randint(k, (len(part),), generator=options["generator"])
        part.copy_(centres[z] + (scales[z] * torch.randn(len(part), d, **options)) @ mix)
    return x, start


def pair_rows(n: int, apart: float) -> tuple[Tensor, Params]:
    """Rows for ``gaussian(2)``, seven in ten so many standard deviations above, and a start."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[: int(0.7 * n)] += apart
    values = {"weights": [0.5, 0.5], "loc": [-0.5, 0.8 * apart], "scale": [1.5, 1.5]}
    return x, {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def item_rows(n: int, items: int, k: int) -> tuple[Tensor, Params]:
    """Rows for ``latent_classes`` and a start."""
    options: Any = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    probs = 0.1 + 0.8 * torch.rand(k, items, **options)
    start = {
        "weights": torch.full((k,), 1 / k, dtype=torch.float64),
        "probs": 0.5 * probs + 0.5 * torch.rand(k, items, **options).clamp(0.1, 0.9),
    }
    z = torch.randint(k, (n,), generator=options["generator"])
    return (torch.rand(n, items, **options) < probs[z]).double(), start


# Mixtures whose states are apart, for a few passes over much data.
APART: dict[str, tuple[Program, Callable[[int], tuple[Tensor, Params]]]] = {
    "gaussian, K=2": (gaussian(2), lambda n: pair_rows(n, 4.0)),
    "full covariance, D=4 K=5": (full_gaussian(5), lambda n: gaussian_rows(n, 4, 5)),
    "full covariance, D=16 K=8": (full_gaussian(8), lambda n: gaussian_rows(n, 16, 8)),
    "latent classes, 20 items K=5": (latent_classes(5), lambda n: item_rows(n, 20, 5)),
}

# Overlapping mixtures, on which EM creeps: a name, a program, and its rows and start.
SLOW: dict[str, tuple[Program, Callable[[int], tuple[Tensor, Params]]]] = {
    "gaussian, K=2": (gaussian(2), lambda n: pair_rows(n, 2.0)),
    "full covariance, D=2 K=5": (full_gaussian(5), lambda n: gaussian_rows(n, 2, 5, 1.5)),
    "full covariance, D=8 K=4": (full_gaussian(4), lambda n: gaussian_rows(n, 8, 4, 0.3)),
    "latent classes, 8 items K=3": (latent_classes(3), lambda n: item_rows(n, 8, 3)),
}
