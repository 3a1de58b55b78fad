"""Write a model of your own: segments of customers, with shares and habits that differ.

Each customer belongs to a segment; the probabilities of the segments depend on age through a
softmax gate. In a segment the number of visits is Poisson, log-linear in the distance to the shop,
for the time that a customer was watched; the slopes have a common mean, which is learned. None of
it is built into pyroem: ``explain()`` tells how each parameter is updated. What is found stands
beside the truth, as far as standard errors let it.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyroem

GATE = torch.tensor([[0.5, 0.0], [1.0, -1.0]])  # intercept and age, by segment
LEVEL, SLOPE = torch.tensor([1.0, 7.4]), torch.tensor([-0.8, -0.2])


def segments(count: int) -> Callable[..., None]:
    """The program for ``count`` segments: a plain function of the data."""

    def program(age: Tensor, distance: Tensor, weeks: Tensor, visits: Tensor) -> None:
        gate = pyro.param("gate", lambda: 0.1 * torch.randn(2, count))
        level = pyro.param("level", lambda: torch.rand(count), constraint=constraints.positive)
        common = pyro.sample("common", dist.Normal(0.0, 1.0))
        with pyro.plate("segments", count):
            slope = pyro.sample("slope", dist.Normal(common, 0.5))
        inputs = torch.stack([torch.ones_like(age), age], -1)
        with pyro.plate("customers", len(visits)):
            segment = pyro.sample("segment", dist.Categorical(logits=inputs @ gate))
            rate = level[segment] * (slope[segment] * distance).exp()
            pyro.sample("visits", dist.Poisson(weeks * rate), obs=visits)

    return program


def simulate(size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The segments, and what the program takes."""
    generator = torch.Generator().manual_seed(0)
    age, distance = torch.randn(2, size, generator=generator)
    weeks = torch.randint(1, 9, (size,), generator=generator).float()
    logits = torch.stack([torch.ones(size), age], -1) @ GATE
    segment = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    rate = LEVEL[segment] * (SLOPE[segment] * distance).exp()
    return segment, (age, distance, weeks, torch.poisson(weeks * rate, generator=generator))


def against_the_truth(fit: pyroem.Fit, segment: Tensor) -> None:
    """Estimates, standard errors and the truth; of the gate only differences are determined."""
    errors, order = fit.uncertainty().standard_errors, fit.params["level"].argsort()
    print("          estimate  std. error   truth")
    for name, truth in (("level", LEVEL), ("slope", SLOPE)):
        for k in range(2):
            estimate, error = fit.params[name][order[k]], errors[name][order[k]]
            print(f"{name}[{k}]  {estimate:8.3f}  {error:10.3f}  {truth[k]:6.2f}")
    contrast, truth = (g[:, 0] - g[:, 1] for g in (fit.params["gate"][:, order], GATE))
    print("gate, segment 0 less 1:", contrast.numpy().round(2), "truth", truth.numpy())
    right = order[segment] == fit.predict()
    print(f"customers told apart: {right.double().mean():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer customers and segments")
    quick = parser.parse_args().quick
    segment, data = simulate(300 if quick else 3000)
    fits = {k: pyroem.EM().fit(segments(k), *data) for k in ((1, 2) if quick else (1, 2, 3))}
    print({f"{k} segments": f"BIC {fit.bic():.1f}, df {fit.df}" for k, fit in fits.items()})
    best = min(fits.values(), key=lambda fit: fit.bic())
    print(best.explain(), end="\n\n")
    against_the_truth(fits[2], segment)
    by_gradient = pyroem.MAP().fit(segments(best.params["level"].numel()), *data, init=best)
    print(f"MAP from there gains {by_gradient.log_joint - best.log_joint:.1e} nats")
    if find_spec("matplotlib") is not None:
        import matplotlib.pyplot as plt

        from pyroem import plot

        figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
        plot.program(fits[2], left)
        plot.density(fits[2], ax=right)
        figure.savefig("custom_model.png", dpi=200)
        print("custom_model.png written")


if __name__ == "__main__":
    main()
