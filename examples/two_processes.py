"""Two processes share one log: tell them apart from the response times alone.

3,000 rows come from N(20, 5) and 7,000 from N(40, 5). EM starts from random assignments and must
recover weights, means and standard deviations; MAP must end at the same objective.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyroem


def model(x: torch.Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    size = 1_000 if parser.parse_args().quick else 10_000
    generator = torch.Generator().manual_seed(0)
    truth = (torch.arange(size) >= 0.3 * size).long()
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    x = torch.tensor([20.0, 40.0], dtype=torch.float64)[truth] + 5 * noise

    table = pyroem.compare(model, x, init="random")
    print(table, end="\n\n")
    fit = table.fits["EM"]
    print(fit.explain(), end="\n\n")
    order = fit.params["loc"].argsort()
    for name, value in fit.params.items():
        print(f"{name:8s}", [round(v, 3) for v in value[order].tolist()])
    predicted = order.argsort()[fit.predict(x)]
    print(f"rows told apart: {float((predicted == truth).double().mean()):.1%}")


if __name__ == "__main__":
    main()
