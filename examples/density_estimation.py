"""A mixture as an estimate of a density: 200 rows from N(2, 1) and 600 from N(-1, 0.8).

Twenty iterations of EM from a random start (two of the rows as means), with the log-likelihood of
each; the mixture's density against a kernel density estimate and the truth, judged by held-out
rows. Writes ``density_estimation.png`` (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

import torch
from scipy.stats import gaussian_kde
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from pyroem import EM
from pyroem.models import gaussian_mixture

TRUTH = MixtureSameFamily(
    Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
    Normal(*torch.tensor([[2.0, -1.0], [1.0, 0.8]], dtype=torch.float64)),
)


def draw(first: int, second: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(first + second, generator=generator, dtype=torch.float64)
    return torch.cat([2 + noise[:first], -1 + 0.8 * noise[first:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half of the rows")
    part = 2 if parser.parse_args().quick else 1
    x, new = draw(200 // part, 600 // part, 0), draw(5_000, 15_000, 1)

    solver = EM(max_iter=20, tol=0, param_tol=0)
    chosen = torch.randint(len(x), (2,), generator=torch.Generator().manual_seed(0))
    start = {
        "weights": torch.ones(2) / 2,
        "loc": x[chosen].unsqueeze(-1),
        "covariance": x.var().expand(2, 1, 1),
    }
    fit = solver.fit(gaussian_mixture(2), x.unsqueeze(-1), init=start).ordered("loc")
    print("iteration  log-likelihood      gain")
    for before, record in zip((None, *fit.history), fit.history, strict=False):
        gain = record.log_joint - before.log_joint if before else 0.0
        print(f"{record.iteration:9d} {record.log_joint:15.6f} {gain:9.6f}")

    print("\n              weight      mean        sd   (left, right)")
    sd = fit.params["covariance"].reshape(-1).sqrt()
    for name, values in (
        ("truth", ([0.75, 0.25], [-1.0, 2.0], [0.8, 1.0])),
        ("fitted", (fit.params["weights"], fit.params["loc"].reshape(-1), sd)),
    ):
        pairs = (" ".join(f"{float(v):.3f}" for v in pair) for pair in values)
        print(f"{name:8s} " + "  ".join(pairs))

    print("\nmean log density of 20,000 new rows")
    kernel = torch.as_tensor(gaussian_kde(x.numpy()).logpdf(new.numpy()))
    for name, value in (
        ("truth", TRUTH.log_prob(new)),
        ("mixture", fit.log_prob(new.unsqueeze(-1))),
        ("kernel", kernel),
    ):
        print(f"  {name:8s} {float(value.mean()):.5f}")

    if find_spec("matplotlib") is not None:
        import matplotlib.pyplot as plt

        from pyroem import plot

        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.9), layout="constrained")
        grid = torch.linspace(*left_and_right(x), 300, dtype=torch.float64)
        right.plot(grid, TRUTH.log_prob(grid).exp(), color="#009E73", linestyle=":", label="truth")
        plot.density(fit, ax=right)
        left.plot([r.iteration for r in fit.history], [r.log_joint for r in fit.history], "o-")
        left.set_xlabel("iteration")
        left.set_ylabel("log-likelihood")
        figure.savefig("density_estimation.png", dpi=200)
        print("density_estimation.png written")


def left_and_right(x: Tensor) -> tuple[float, float]:
    return float(x.min()) - 0.3, float(x.max()) + 0.3


if __name__ == "__main__":
    main()
