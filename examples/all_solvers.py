"""All solvers on problems of different kinds, from the same random starts: one table.

A solver is judged by the seconds that it takes, on average, to reach the best optimum of all; one
that ends soon, but elsewhere, is not fast. Writes ``all_solvers.md``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, MAP, SVI, benchmark, datasets, models

Posed = tuple[Any, ...]


def factor_analysers(x: Tensor) -> None:
    """Two Gaussians whose covariances have rank one, plus a common diagonal."""
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, x.shape[-1]))
    factor = pyro.param("factor", lambda: torch.randn(2, x.shape[-1], 1))
    noise = pyro.param("noise", torch.ones(x.shape[-1]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.LowRankMultivariateNormal(loc[z], factor[z], noise), obs=x)


def hierarchical(x: Tensor) -> None:
    """Components whose means are draws from a population, whose mean and variance are learned."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.InverseGamma(3.0, 4.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(mean, spread.sqrt()))
        variance = pyro.sample("variance", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()), obs=x)


def problems(size: int) -> dict[str, Posed | Callable[[int], Posed]]:
    """The first and the earthquakes ship with the package; the others are simulated."""
    generator = torch.Generator().manual_seed(0)
    faithful = datasets.load("faithful")[1]
    earthquakes = datasets.load("earthquakes", ["count"])[1]
    z = torch.randint(2, (size,), generator=generator)
    noise = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    items = torch.bernoulli(torch.tensor([0.8, 0.3])[z, None].expand(-1, 6), generator=generator)
    counts = torch.poisson(torch.tensor([[3.0, 8.0], [6.0, 2.0]])[z], generator=generator)
    design = torch.stack([torch.ones(size), noise[:, 0]], -1)
    lines = (torch.tensor([[0.0, 1.0], [1.0, -1.0]])[z] * design).sum(-1) + 0.4 * noise[:, 1]
    common = torch.tensor([1.0, -1.0, 2.0, 1.0]) * noise[:, :1]
    factors = common + 0.5 * noise.flip(0) + 3 * z[:, None] * torch.tensor([1, 0, 0, 1])
    heavy = (noise[:, :2] / noise[:, 2:3].abs().sqrt() + 4 * z[:, None])[: size // 2]
    groups = 4.0 * torch.randint(-1, 2, (size,), generator=generator) + noise[:, 0]
    return {
        "Gaussian mixture, 2 clusters": (models.gaussian_mixture(2), faithful),
        "Gaussian mixture, 3 that overlap": (models.gaussian_mixture(3, "tied"), faithful),
        "Latent classes": (models.bernoulli_mixture(2), items),
        "Poisson mixture": (models.poisson_mixture(2), counts),
        "Mixture of regressions": (models.mixture_of_regressions(2), design, lines),
        "Hidden Markov model": (models.hidden_markov(3, "poisson"), earthquakes),
        "Hierarchical priors": (hierarchical, groups),
        "Factor analysers": (factor_analysers, factors),
        "Student's t mixture": (models.student_t_mixture(2), heavy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows, starts and iterations")
    quick = parser.parse_args().quick
    solvers = {
        "EM": EM(max_iter=50 if quick else 3000),
        "EM, SQUAREM": EM(accelerate="squarem", max_iter=20 if quick else 1000),
        "EM, Anderson": EM(accelerate="anderson", max_iter=20 if quick else 1000),
        "MAP, L-BFGS": MAP(max_iter=20 if quick else 1000),
        "MAP, Adam": MAP("adam", max_iter=20 if quick else 2500),
        "SVI, point": SVI(max_iter=20 if quick else 2500),
    }
    posed, seeds = problems(100 if quick else 800), 1 if quick else 5
    found = benchmark(posed, solvers, seeds=seeds, progress=True)
    print(found, end="\n\n")
    text = f"{found.to_markdown(wide=True)}\n{found.to_markdown()}"
    Path("all_solvers.md").write_text(text, encoding="utf-8")
    print("all_solvers.md written")


if __name__ == "__main__":
    main()
