"""Derivatives of and through a fit: standard errors, influence of rows, sensitivity to a prior.

``pyroem.log_joint`` can be differentiated to any order, with ``torch.func`` too;
``pyroem.implicit`` differentiates the optimum. Each derivative is held against something else:
Fisher's identity, ``fit.uncertainty()``, fits without a row or with another prior.
"""

import argparse

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
    """Fisher's identity away from the optimum; standard errors by the exact Hessian at it."""
    best = torch.cat([fit.params[n].reshape(-1) for n in ("loc", "scale", "weights")])[:-1]
    away = best + 0.1
    posterior = pyroem.e_step(model, unpacked(away), x, strength)

    def objective(v: Tensor) -> Tensor:
        return pyroem.log_joint(model, unpacked(v), x, strength)

    def surrogate(v: Tensor) -> Tensor:
        return pyroem.expected_log_joint(model, unpacked(v), posterior, x, strength)

    slope, own = torch.func.grad(objective)(away), torch.func.grad(surrogate)(away)
    print(f"gradients: of log p {slope.norm():.6f}, of Q {own.norm():.6f}", end="")
    print(f", of their difference {(slope - own).norm():.1e} (Fisher's identity)\n")
    hessian = torch.func.jacrev(torch.func.grad(objective))(best)
    by_hand = torch.linalg.inv(-hessian).diagonal().sqrt()
    print(fit.uncertainty())
    print("standard errors by hand:", [f"{e:.6g}" for e in by_hand.tolist()], end="\n\n")


def influence(fit: pyroem.Fit, x: Tensor, strength: Tensor) -> None:
    """What each row does to the first mean: derivatives, and refits without the strongest."""
    weights = torch.ones(len(x), dtype=x.dtype).requires_grad_()
    params = pyroem.implicit(fit, x, strength, weights=weights)
    (slopes,) = torch.autograd.grad(params["loc"][0, 0], weights)
    print("row  x               loc[0, 0] without it: by the derivative   refitted")
    for row in slopes.abs().argsort(descending=True)[:5].tolist():
        rest = torch.ones(len(x), dtype=x.dtype)
        rest[row] = 0
        again = SOLVER.fit(model, x, strength, init=fit, weights=rest)
        gone = float(again.params["loc"][0, 0] - fit.params["loc"][0, 0])
        print(f"{row:3}  {x[row].numpy().round(2)!s:30} {-slopes[row]:25.5f} {gone:10.5f}")


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
    curvature(fit, x, strength)
    influence(fit, x, strength)
    sensitivity(fit, x, strength)


if __name__ == "__main__":
    main()
