"""Groups that share a population: waiting times in clinics, many of which saw few patients.

A clinic has a level of its own; patients are of two kinds, of which one waits longer. Levels are
draws from a normal population whose mean and scale are learned, with a prior that keeps the scale
off zero (Chung et al., 2013); they are summed out on a grid, since their joint mode with the scale
shrinks too far. Against the truth: levels by clinic, without and with the population.
"""

import argparse
from importlib.util import find_spec

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, MAP, e_step

MEAN, SCALE, EXTRA, NOISE, SHARE = 20.0, 2.0, 12.0, 4.0, 0.3
GRID = torch.linspace(-3, 3, 41, dtype=torch.float64)  # of levels, in standard deviations
HEIGHTS = (-(GRID**2) / 2).softmax(0)


def model(times: Tensor, seen: Tensor, pooling: bool) -> None:
    """Times [clinics, patients], padded; ``seen`` says which are there."""
    share = pyro.param("share", torch.tensor(0.5), constraint=constraints.unit_interval)
    extra = pyro.param("extra", torch.tensor(10.0))
    noise = pyro.param("noise", torch.tensor(3.0), constraint=constraints.positive)
    if pooling:
        mean = pyro.param("mean", torch.tensor(10.0))
        scale = pyro.sample("scale", dist.Gamma(2.0, 0.1))
    with pyro.plate("clinics", len(times), dim=-2):
        if pooling:
            level = mean + scale * GRID[pyro.sample("step", dist.Categorical(HEIGHTS))]
        else:
            level = pyro.param("level", times.mean() * torch.ones(len(times), 1))
        with pyro.plate("patients", times.shape[1], dim=-1), poutine.mask(mask=seen):
            kind = pyro.sample("kind", dist.Bernoulli(share))
            pyro.sample("time", dist.Normal(level + extra * kind, noise), obs=times)


def simulate(clinics: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The levels, the times, and which of them are there: from 2 to ``most`` patients a clinic."""
    torch.manual_seed(0)
    level = MEAN + SCALE * torch.randn(clinics, 1)
    size = torch.logspace(0.301, torch.tensor(most).log10().item(), clinics).round()
    kind = torch.bernoulli(torch.full((clinics, most), SHARE))
    times = level + EXTRA * kind + NOISE * torch.randn(clinics, most)
    return level.squeeze(-1), times, torch.arange(most) < size[:, None]


def picture(truth: Tensor, alone: Tensor, together: Tensor, size: Tensor) -> None:
    """The errors of both estimates by the number of patients."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.scatter(size, alone - truth, color="#D55E00", marker="s", s=18, label="clinic by clinic")
    axes.scatter(size, together - truth, color="#0072B2", s=18, label="with the population")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="patients seen", ylabel="estimated level less truth (minutes)")
    axes.legend()
    figure.savefig("hierarchical.png", dpi=150)
    print("hierarchical.png written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer clinics and patients")
    quick = parser.parse_args().quick
    truth, times, seen = simulate(20 if quick else 60, 20 if quick else 60)
    separate = EM(accelerate="squarem").fit(model, times, seen, False, init="model")
    fit = EM(accelerate="squarem").fit(model, times, seen, True, init="model")
    print(fit.explain(), end="\n\n")
    by_gradient = MAP().fit(model, times, seen, True, init=fit)
    print(f"MAP from there gains {by_gradient.log_joint - fit.log_joint:.1e} nats", end="\n\n")

    alone = separate.params["level"].squeeze(-1)
    steps = e_step(model, fit.params, times, seen, True).marginals["step"].squeeze()
    together = fit.params["mean"] + fit.params["scale"] * (steps @ GRID)
    size = seen.sum(-1)
    print("patients   truth  clinic by clinic  with the population")
    for i in range(0, len(truth), len(truth) // 10):
        print(f"{size[i]:8}  {truth[i]:6.1f}  {alone[i]:16.1f}  {together[i]:19.1f}")
    print("\nroot mean squared error of the levels (minutes)")
    for name, own in (("up to 5", size <= 5), ("6 or more", size > 5), ("all", size > 0)):
        errors = [(f - truth)[own].square().mean().sqrt() for f in (alone, together)]
        print(f"{name:9s} patients: {errors[0]:5.2f} alone, {errors[1]:5.2f} together")
    known = {"mean": MEAN, "scale": SCALE, "extra": EXTRA, "noise": NOISE, "share": SHARE}
    print("\n", ", ".join(f"{n} {float(fit.params[n]):.2f} ({v:g})" for n, v in known.items()))
    if find_spec("matplotlib") is not None:
        picture(truth, alone, together, size)


if __name__ == "__main__":
    main()
