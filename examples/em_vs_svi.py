"""The research comparison: EM, gradients and variational inference on one program.

A Bayesian mixture of two normals. EM and MAP end at the same mode; the guides approximate the
posterior around it: their standard deviations stand beside the standard errors from the exact
Hessian, and beside draws by NUTS.
"""

import argparse

from pyroem import EM, MAP, SVI, compare, datasets, mcmc
from pyroem.models import bayesian_gaussian_mixture, weak_prior


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
    for name in ("SVI, normal", "SVI, Laplace"):
        approximation = table.fits[name].approximation
        if approximation is not None and not approximation.note:
            errors[name] = approximation.draw(1000)["loc"].std(0)
    draws = mcmc(fit, draws=20 if quick else 300, warmup=20 if quick else 200)
    errors["NUTS"] = draws.params["loc"].flatten(0, 1).std(0)
    for name, value in errors.items():
        print(f"{name:13s}", [round(v, 4) for v in value.reshape(-1).tolist()])

    pair = {"EM": EM(), "MAP": MAP()}
    print(f"\n{compare(model, x, seeds=3 if quick else 20, init='random', solvers=pair)}")


if __name__ == "__main__":
    main()
