"""What EM climbs: the log-likelihood of 0.3 N(1, 2) + 0.7 N(9, 3) along each of its parameters.

Each of the five parameters varies with the rest at the truth; then all five are found at once by
EM from a random start (two of the rows as means), in 40 iterations. A start that ends in a poor
local optimum (a spike on a few rows that happen to lie close), and restarts that mend it. Writes
``likelihood_profiles.png`` (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM

TRUTH = {
    "weights": torch.tensor([0.3, 0.7]),
    "loc": torch.tensor([1.0, 9.0]),
    "scale": torch.tensor([2.0, 3.0]),
}
FIVE = ("weights[0]", "loc[0]", "loc[1]", "scale[0]", "scale[1]")


def model(x: Tensor) -> None:
    weights = pyro.param("weights", lambda: torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2))
    scale = pyro.param("scale", lambda: torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    rows = 500 if parser.parse_args().quick else 5000
    generator = torch.Generator().manual_seed(0)
    z = (torch.rand(rows, generator=generator) < 0.7).long()
    noise = torch.randn(rows, generator=generator)
    x = (TRUTH["loc"][z] + TRUTH["scale"][z] * noise).double()

    curves = [pyroem.likelihood_curve(model, TRUTH, x, which=name) for name in FIVE]
    print("the rest at the truth:   highest at   truth")
    for curve in curves:
        best = float(curve.values[curve.log_joint.argmax()])
        print(f"  {curve.name:20s} {best:12.3f} {curve.estimate:7.3f}")

    solver = EM(max_iter=40, tol=0, param_tol=0, keep_path=True)
    chosen = torch.randint(rows, (2,), generator=torch.Generator().manual_seed(4))
    start = {"weights": torch.ones(2) / 2, "loc": x[chosen], "scale": x.std().expand(2)}
    fit = solver.fit(model, x, init=start).ordered("loc")
    print("\nall five at once\niteration  log-likelihood", *(f"{name:>10s}" for name in FIVE))
    for record in fit.history[::4]:
        at = fit.path[record.iteration]
        order = at["loc"].argsort()
        five = [at["weights"][order[0]], *at["loc"][order], *at["scale"][order]]
        numbers = "".join(f"{float(v):11.4f}" for v in five)
        print(f"{record.iteration:9d} {record.log_joint:15.3f}{numbers}")

    spike = {"weights": [0.95, 0.05], "loc": [6.6, 2.45], "scale": [4.5, 0.05]}
    poor = EM().fit(model, x, init={name: torch.tensor(v) for name, v in spike.items()})
    print(f"\na poor start:    {poor}\n  share of the spike {float(poor.params['weights'][1]):.2%}")
    mended = EM().fit(model, x, init="random", restarts=10)
    print(f"ten restarts:    {mended}")
    for value, count in mended.basins:
        print(f"  {count} of them ended at {value:.3f}")

    if find_spec("matplotlib") is not None:
        import matplotlib.pyplot as plt

        from pyroem import plot

        figure, axes = plt.subplots(2, 3, figsize=(8.4, 4.6), layout="constrained")
        for curve, ax in zip(curves, axes.flat, strict=False):
            plot.likelihood(curve, ax=ax).set_ylabel("")
            ax.axvline(curve.estimate, color="black", linewidth=0.8)
        for ax in axes[:, 0]:
            ax.set_ylabel("log-likelihood")
        plot.responsibilities(fit, ax=axes[1, 2])
        figure.savefig("likelihood_profiles.png", dpi=200)
        print("likelihood_profiles.png written")


if __name__ == "__main__":
    main()
