"""Nine points on a line, two normal components: every step of EM written out, beside pyroem's.

E-step   r_nk = w_k N(x_n | m_k, s_k) / sum_j w_j N(x_n | m_j, s_j)         (Bayes' rule)
M-step   w_k = mean_n r_nk,   m_k = sum_n r_nk x_n / sum_n r_nk,
         s_k^2 = sum_n r_nk (x_n - m_k)^2 / sum_n r_nk
"""

import argparse

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from pyroem import EM

X = np.array([-3.0, -2.5, -1.5, -1.0, 0.5, 1.5, 2.0, 3.5, 4.0])
START = {"weights": [0.5, 0.5], "loc": [-1.0, 1.0], "scale": [1.0, 1.0]}


def model(x: torch.Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three iterations")
    iterations = 3 if parser.parse_args().quick else 8
    w, m, s = (np.array(START[name]) for name in ("weights", "loc", "scale"))
    print("iteration   responsibility of the right component, by hand            log-likelihood")
    worst = 0.0
    for i in range(1, iterations + 1):
        density = w * np.exp(-0.5 * ((X[:, None] - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
        r = density / density.sum(1, keepdims=True)  # E-step: Bayes' rule
        value = np.log(density.sum(1)).sum()
        print(f"{i - 1:9d}   {' '.join(f'{p:.3f}' for p in r[:, 1])}   {value:14.6f}")
        w = r.mean(0)  # M-step: weighted shares, means, variances
        m = (r * X[:, None]).sum(0) / r.sum(0)
        s = np.sqrt((r * (X[:, None] - m) ** 2).sum(0) / r.sum(0))

        fit = EM(max_iter=i).fit(model, X, init=START)
        own = np.concatenate([w, m, s])
        theirs = torch.cat([fit.params[n] for n in ("weights", "loc", "scale")]).numpy()
        before = EM(max_iter=i - 1).fit(model, X, init=START) if i > 1 else None
        seen = None if before is None else before.responsibilities().numpy()
        worst = max(worst, float(np.abs(own - theirs).max()))
        worst = max(worst, 0.0 if seen is None else float(np.abs(seen - r).max()))
    print("\nafter these    by hand", own.round(6).tolist())
    print("                pyroem", theirs.round(6).tolist())
    print(f"largest difference in any number of any iteration: {worst:.1e}")


if __name__ == "__main__":
    main()
