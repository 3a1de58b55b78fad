"""Nine points on a line, two normal components: every step of EM written out, beside pyroem's.

E-step   r_nk = w_k N(x_n | m_k, s_k) / sum_j w_j N(x_n | m_j, s_j)         (Bayes' rule)
M-step   w_k = mean_n r_nk,   m_k = sum_n r_nk x_n / sum_n r_nk,
         s_k^2 = sum_n r_nk (x_n - m_k)^2 / sum_n r_nk

Writes ``two_processes_by_hand.png``: the components from iteration to iteration (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from pyroem import EM, Fit, e_step

X = np.array([-3.0, -2.5, -1.5, -1.0, 0.5, 1.5, 2.0, 3.5, 4.0])
START = {"weights": [0.5, 0.5], "loc": [-1.0, 1.0], "scale": [1.0, 1.0]}


def model(x: torch.Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def normals(x: np.ndarray, w: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
    """``w_k N(x_n | m_k, s_k)``: points by components."""
    scaled = (x[:, None] - m) / s
    return np.asarray(w * np.exp(-0.5 * scaled**2) / (s * np.sqrt(2 * np.pi)))


def picture(fit: Fit) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.6), sharey=True, layout="constrained")
    grid = np.linspace(-6, 7, 300)
    for ax, i in zip(axes, (0, 1, fit.n_iter), strict=True):
        parts = normals(grid, *(fit.path[i][n].numpy() for n in ("weights", "loc", "scale")))
        ax.plot(grid, parts.sum(1), color="black")
        ax.plot(grid, parts[:, 0], color="#0072B2")
        ax.plot(grid, parts[:, 1], color="#D55E00", linestyle="--")
        ax.plot(X, np.zeros_like(X), "|", color="black", markersize=14)
        ax.set(title=f"iteration {i}", xlabel="x", ylabel="" if i else "density")
    figure.savefig("two_processes_by_hand.png", dpi=200)
    print("two_processes_by_hand.png written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three iterations")
    iterations = 3 if parser.parse_args().quick else 8
    solver = EM(max_iter=iterations, tol=0, param_tol=0, keep_path=True)
    fit = solver.fit(model, X, init=START)
    w, m, s = (np.array(START[name]) for name in ("weights", "loc", "scale"))
    worst = 0.0
    for i in range(iterations):
        density = normals(X, w, m, s)
        r = density / density.sum(1, keepdims=True)  # E-step: Bayes' rule
        value = np.log(density.sum(1)).sum()
        w = r.mean(0)  # M-step: weighted shares, means, variances
        m = (r * X[:, None]).sum(0) / r.sum(0)
        s = np.sqrt((r * (X[:, None] - m) ** 2).sum(0) / r.sum(0))

        own = r[:, 1], np.concatenate([w, m, s**2])
        after, before = fit.path[i + 1], e_step(model, fit.path[i], X)
        moments = [after["weights"], after["loc"], after["scale"] ** 2]
        theirs = before.marginals["z"][:, 1].numpy(), torch.cat(moments).numpy()
        print(
            f"iteration {i + 1}: log-likelihood before {value:.6f}, {fit.history[i].log_joint:.6f}"
        )
        for name, (one, two) in {"by hand": own, "pyroem": theirs}.items():
            print(f"  {name:8s} P(right) {' '.join(f'{p:.4f}' for p in one)}")
            print(f"  {'':8s} weights, means, variances {' '.join(f'{v:.5f}' for v in two)}")
        worst = max(worst, *(float(np.abs(a - b).max()) for a, b in zip(own, theirs, strict=True)))
    print(f"\nlargest difference in any number of any iteration: {worst:.1e}")
    if find_spec("matplotlib") is not None:
        picture(fit)


if __name__ == "__main__":
    main()
