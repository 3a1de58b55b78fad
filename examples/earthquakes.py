"""A hidden Markov model in Pyro's own idiom: major earthquakes a year, 1900 to 2006.

Data: Zucchini, MacDonald and Langrock, Hidden Markov Models for Time Series.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyroem
from pyroem import datasets


def model(counts: torch.Tensor, states: int) -> None:
    flat = torch.ones(states) / states
    initial = pyro.param("initial", flat, constraint=constraints.simplex)
    transition = pyro.param(
        "transition", flat.expand(states, states), constraint=constraints.simplex
    )
    rate = pyro.param("rate", torch.ones(states), constraint=constraints.positive)
    z = None
    for t in pyro.markov(range(len(counts))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=counts[t])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first 40 years only")
    columns, values = datasets.load("earthquakes")
    counts = values[:, columns.index("count")]
    counts = counts[:40] if parser.parse_args().quick else counts

    fit = pyroem.EM(tol=1e-7).fit(model, counts, 2)
    print(fit.explain(), end="\n\n")
    for name, value in fit.params.items():
        print(name, value.numpy().round(3).tolist())
    path = fit.predict()  # the most probable sequence of states (Viterbi)
    print("".join(str(int(path[f"z_{t}"])) for t in range(len(counts))))


if __name__ == "__main__":
    main()
