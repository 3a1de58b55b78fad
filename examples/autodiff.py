"""Derivatives of and through a fit: standard errors, influence of rows, sensitivity to a prior.

``pyroem.log_joint`` can be differentiated to any order, with ``torch.func`` too;
``pyroem.implicit`` differentiates the optimum. Each derivative is held against something else:
``fit.uncertainty()``, fits without a row or with another prior. Writes ``autodiff.png``: which rows
pull the first mean which way (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, datasets

SOLVER = EM(tol=1e-14, param_tol=1e-9)  # differences of refits need settled fits


def model(x: Tensor, strength: Tensor) -> None:
    """Two normals in each column; ``strength`` is how many rows the prior of the means is worth."""
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    scale = pyro.param("scale", torch.ones(2, 2), constraint=constraints.positive)
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), strength.rsqrt()).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def unpacked(v: Tensor) -> dict[str, Tensor]:
    """The parameters from nine free numbers."""
    shapes = {"loc": v[:4].reshape(2, 2), "scale": v[4:8].reshape(2, 2)}
    return {**shapes, "weights": torch.stack([v[8], 1 - v[8]])}


def curvature(fit: pyroem.Fit, x: Tensor, strength: Tensor) -> None:
    """Standard errors by the exact Hessian, beside those of the fit."""
    best = torch.cat([fit.params[n].reshape(-1) for n in ("loc", "scale", "weights")])[:-1]

    def objective(v: Tensor) -> Tensor:
        return pyroem.log_joint(model, unpacked(v), x, strength)

    hessian = torch.func.jacrev(torch.func.grad(objective))(best)
    by_hand = torch.linalg.inv(-hessian).diagonal().sqrt()
    print(fit.uncertainty())
    print("standard errors by hand:", [f"{e:.6g}" for e in by_hand.tolist()], end="\n\n")


def influence(fit: pyroem.Fit, x: Tensor, strength: Tensor) -> None:
    """What each row does to each parameter: derivatives, and a refit without the strongest."""
    weights = torch.ones(len(x), dtype=x.dtype, requires_grad=True)
    params = pyroem.implicit(fit, x, strength, weights=weights)
    flat = torch.cat([params[n].reshape(-1) for n in ("loc", "scale", "weights")])
    slopes = torch.stack([torch.autograd.grad(p, weights, retain_graph=True)[0] for p in flat])
    print("element  row  without it: by the derivative   refitted")
    for i, row in enumerate(slopes.abs().argmax(1).tolist()):
        rest = (torch.arange(len(x)) != row).to(x)
        again = SOLVER.fit(model, x, strength, init=fit, weights=rest).params
        own = torch.cat([again[n].reshape(-1) for n in ("loc", "scale", "weights")])
        print(f"{i:7} {row:4} {-slopes[i, row]:29.5f} {own[i] - flat[i]:10.5f}")
    if find_spec("matplotlib") is not None:
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(4.4, 3.4), layout="constrained")
        own = slopes[0] / slopes[0].abs().max()
        dots = ax.scatter(*x.T, c=own, cmap="PuOr", vmin=-1, vmax=1, s=16, edgecolors="0.6", lw=0.3)
        figure.colorbar(dots, label="influence on loc[0, 0], of the largest")
        figure.savefig("autodiff.png", dpi=200)


def sensitivity(fit: pyroem.Fit, x: Tensor, strength: Tensor) -> None:
    """How the means move with the strength of their prior: implicitly, and by two refits."""
    setting = strength.clone().requires_grad_()
    loc = pyroem.implicit(fit, x, setting)["loc"].reshape(-1)
    slopes = [torch.autograd.grad(m, setting, retain_graph=True)[0].item() for m in loc]
    low, high = (SOLVER.fit(model, x, strength + h, init=fit).params["loc"] for h in (-0.01, 0.01))
    print("\nd loc / d strength  ", [f"{s:.6f}" for s in slopes])
    print("by two refits       ", [f"{s:.6f}" for s in ((high - low) / 0.02).reshape(-1).tolist()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half of the rows")
    x = datasets.load("faithful")[1]
    x = (x - x.mean(0)) / x.std(0)
    x = x[::2] if parser.parse_args().quick else x
    strength = torch.tensor(1.0, dtype=x.dtype)
    fit = SOLVER.fit(model, x, strength).ordered("loc")
    for part in (curvature, influence, sensitivity):
        part(fit, x, strength)


if __name__ == "__main__":
    main()
