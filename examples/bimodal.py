"""How many processes are there? 3,000 rows from N(20, 5) and 7,000 from N(40, 5).

The fit of two components from a random start, the rows told apart, and the number of components
that AIC and BIC choose among 1 to 6. Writes ``bimodal.png``: the histogram, a kernel density
estimate, the fitted density and its components (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

import torch

import pyroem
from pyroem import EM
from pyroem.models import gaussian_mixture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, 1 to 3")
    quick = parser.parse_args().quick
    first, second = (300, 700) if quick else (3_000, 7_000)
    generator = torch.Generator().manual_seed(0)
    truth = torch.cat([torch.zeros(first), torch.ones(second)]).long()
    noise = torch.randn(first + second, generator=generator, dtype=torch.float64)
    x = (torch.tensor([20.0, 40.0], dtype=torch.float64)[truth] + 5 * noise).unsqueeze(-1)

    fit = EM().fit(gaussian_mixture(2), x, init="random").ordered("loc")
    print(fit, end="\n\n")
    print(fit.uncertainty(), end="\n\n")
    states = fit.predict()
    for name, rows in (("first", slice(None, 100)), ("last", slice(-100, None))):
        counts = torch.bincount(states[rows], minlength=2).tolist()
        print(f"{name:5s} 100 rows: {counts[0]} in the left component, {counts[1]} in the right")
    print(f"rows told apart: {float((states == truth).double().mean()):.1%}", end="\n\n")

    most = 3 if quick else 6
    # Too many components overlap: EM alone would take thousands of iterations.
    solver = EM(accelerate="anderson", param_tol=1e-3)
    found = pyroem.select(gaussian_mixture, x, components=range(1, most + 1), solver=solver)
    print(found, end="\n\n")
    fits = [candidate for candidate in found.rows if candidate.counts]
    for name in ("aic", "bic"):
        best = min(fits, key=lambda candidate: getattr(candidate, name))
        print(f"{name.upper()} chooses {best.components} components")

    if find_spec("matplotlib") is not None:
        from pyroem import plot

        plot.density(fit).figure.savefig("bimodal.png", dpi=200)
        print("bimodal.png written")


if __name__ == "__main__":
    main()
