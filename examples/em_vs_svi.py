"""The research comparison: EM, gradients and variational inference on one program.

A Bayesian mixture of two normals. EM and MAP end at the same mode; the guides approximate the
posterior around it: their standard deviations stand beside the standard errors from the exact
Hessian, and beside draws by NUTS. Writes ``em_vs_svi.png`` (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

from torch import Tensor
from torch.distributions import Normal

from pyroem import EM, MAP, SVI, Comparison, compare, datasets, mcmc
from pyroem.models import bayesian_gaussian_mixture, weak_prior


def picture(table: Comparison, draws: dict[str, Tensor], loc: Tensor, error: Tensor) -> None:
    """The way of each solver; and what each says of one mean."""
    import matplotlib.pyplot as plt

    from pyroem.plot import COLOURS

    figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.2), layout="constrained")
    table.plot(axes[:2])
    for name, colour in zip(draws, COLOURS, strict=False):
        axes[2].hist(draws[name], bins=20, density=True, histtype="step", color=colour, label=name)
    grid = draws["NUTS"].sort().values
    axes[2].plot(grid, Normal(loc, error).log_prob(grid).exp(), color="black", label="Hessian")
    axes[2].set(xlabel="loc[0, 0]", ylabel="density", ylim=(0, 1.4 * axes[2].get_ylim()[1]))
    axes[2].legend(loc="upper right", fontsize=8)
    figure.savefig("em_vs_svi.png", dpi=200)
    print("em_vs_svi.png written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows, steps and draws")
    quick = parser.parse_args().quick
    _, x = datasets.load("faithful")
    x = (x - x.mean(0)) / x.std(0)  # steps of one size suit columns of one size
    x = x[::4] if quick else x
    model = bayesian_gaussian_mixture(2, weak_prior(x), "diagonal")
    steps = 300 if quick else 2000
    solvers = {
        "EM": EM(),
        "MAP": MAP(),
        "SVI, point": SVI(max_iter=steps),
        "SVI, normal": SVI(guide="normal", max_iter=steps),
        "SVI, Laplace": SVI(guide="laplace", max_iter=steps),
    }
    table = compare(model, x, solvers=solvers)
    print(table, end="\n\n")

    fit = table.fits["EM"]
    print("standard deviations of the means")
    errors = {"Hessian": fit.uncertainty().standard_errors["loc"]}
    drawn = {}
    for name in ("SVI, normal", "SVI, Laplace"):
        approximation = table.fits[name].approximation
        if approximation is not None and not approximation.note:
            drawn[name] = approximation.draw(1000)["loc"]
    draws = mcmc(fit, draws=20 if quick else 300, warmup=20 if quick else 200)
    drawn["NUTS"] = draws.params["loc"].flatten(0, 1)
    errors |= {name: values.std(0) for name, values in drawn.items()}
    for name, value in errors.items():
        print(f"{name:13s}", [round(v, 4) for v in value.reshape(-1).tolist()])

    pair = {"EM": EM(), "MAP": MAP()}
    print(f"\n{compare(model, x, seeds=3 if quick else 20, init='random', solvers=pair)}")
    if find_spec("matplotlib") is not None:
        one = {name: values[:, 0, 0] for name, values in drawn.items()}
        picture(table, one, fit.params["loc"][0, 0], errors["Hessian"][0, 0])


if __name__ == "__main__":
    main()
