"""Data with holes: fitted as they are, without the incomplete rows, and with holes filled by means.

A simulation with a third of all cells missing shows what each costs, against the truth. Then the
holes of ``airquality`` are filled, with draws that say how certain that is. Writes
``missing_values.png`` (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

import torch
from torch import Tensor

from pyroem import EM, Fit, datasets
from pyroem.models import gaussian_mixture

LOC = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 2.0, -2.0, 1.0]], dtype=torch.float64)
TILT = torch.tensor([[1.0, 0.8, -0.6, 0.7]], dtype=torch.float64)
COVARIANCE = 0.4 * torch.eye(4, dtype=torch.float64) + TILT.T @ TILT


def simulate(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Components, whole rows, and rows with holes: more where the first column is high."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(2, (size,), generator=generator)
    noise = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    whole = LOC[z] + noise @ torch.linalg.cholesky(COVARIANCE).T
    missing = torch.rand(size, 4, generator=generator) < (whole[:, :1] - 1.5).sigmoid()
    missing[:, 0] = False
    return z, whole, whole.masked_fill(missing, torch.nan)


def simulation(size: int) -> None:
    """Three ways to treat the holes, against the truth and against the data without holes."""
    z, whole, x = simulate(size)
    complete = ~x.isnan().any(-1)
    filled = torch.where(x.isnan(), x.nanmean(0), x)
    ways = {"no holes": whole, "as they are": x, "complete rows": x[complete], "means": filled}
    cells = float(x.isnan().double().mean())
    print(f"{size} rows, {cells:.0%} of the cells missing, {int(complete.sum())} rows complete")
    print("                    root mean squared error of     rows told")
    print("fitted to           means  covariances   weights       apart")
    fits = {}
    for name, data in ways.items():
        fit = fits[name] = (
            EM(accelerate="squarem").fit(gaussian_mixture(2, "tied"), data).ordered("loc")
        )
        truth = {"loc": LOC, "covariance": COVARIANCE, "weights": torch.tensor([0.5, 0.5])}
        errors = [(fit.params[n] - v).square().mean().sqrt() for n, v in truth.items()]
        right = (fit.predict(whole if name == "no holes" else x) == z).double().mean()
        print(f"{name:15s} {errors[0]:9.3f} {errors[1]:12.3f} {errors[2]:9.3f} {right:11.1%}")

    holes, fit = x.isnan(), fits["as they are"]
    means, draws = fit.impute()[holes], fit.impute(draws=200)[:, holes]
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=x.dtype), 0)
    inside = ((low <= whole[holes]) & (whole[holes] <= high)).double().mean()
    for name, guess in (("expected values", means), ("column means", filled[holes])):
        error = (guess - whole[holes]).square().mean().sqrt()
        print(f"cells filled with their {name}: root mean squared error {error:.3f}")
    print(f"95% intervals of 200 draws hold {inside:.1%} of the true cells", end="\n\n")


def picture(x: Tensor, fit: Fit, draws: Tensor) -> None:
    """Ozone against temperature: what was measured, and draws for what was not."""
    import matplotlib.pyplot as plt

    holes = x[:, 0].isnan()
    low, high = draws[:, holes, 0].quantile(torch.tensor([0.05, 0.95], dtype=x.dtype), 0)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.scatter(x[~holes, 2], x[~holes, 0], s=14, color="0.55", label="measured")
    axes.vlines(x[holes, 2], low, high, color="#D55E00", alpha=0.5, label="90% of the draws")
    expected = fit.impute()[holes, 0]
    axes.scatter(x[holes, 2], expected, s=16, marker="s", color="#D55E00", label="expected")
    axes.set(xlabel="temperature (°F)", ylabel="ozone (ppb)", title="Ozone where it was missing")
    axes.legend(loc="upper left")
    figure.savefig("missing_values.png", dpi=150)
    print("missing_values.png written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows and draws")
    quick = parser.parse_args().quick
    simulation(500 if quick else 2000)

    columns, x = datasets.load("airquality", ["Ozone", "Wind", "Temp"])
    fit = EM().fit(gaussian_mixture(2), x).ordered("loc")
    print(f"airquality: {int(x.isnan().sum())} of {x.numel()} cells are missing", fit, sep="\n")
    draws = fit.impute(draws=50 if quick else 500)
    means = draws[:, :, 0].mean(1)
    print(f"mean of {columns[0]} on the days with a measurement: {x[:, 0].nanmean():.1f}")
    print(f"on all days, by {len(draws)} completions: {means.mean():.1f}, sd {means.std():.1f}")
    if find_spec("matplotlib") is not None:
        picture(x, fit, draws)


if __name__ == "__main__":
    main()
