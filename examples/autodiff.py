"""The marginal likelihood as a differentiable function: standard errors from its exact Hessian.

``pyroem.log_joint`` sums the assignments out and can be differentiated to any order, with
``torch.func`` too. Here: standard errors of a mixture's means at the EM optimum, and Fisher's
identity (the gradient of EM's Q is the gradient of the log-likelihood).
"""

import argparse

import torch

import pyroem
from pyroem import datasets
from pyroem.models import gaussian_mixture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half of the rows")
    _, x = datasets.load("faithful")
    x = x[::2] if parser.parse_args().quick else x
    model = gaussian_mixture(2)
    fit = pyroem.EM().fit(model, x)

    def objective(loc: torch.Tensor) -> torch.Tensor:
        return pyroem.log_joint(model, {**fit.params, "loc": loc}, x)

    loc = fit.params["loc"]
    hessian = torch.func.hessian(objective)(loc).reshape(loc.numel(), loc.numel())
    errors = torch.linalg.inv(-hessian).diagonal().sqrt().reshape(loc.shape)
    print("means           ", loc.numpy().round(3).tolist())
    print("standard errors ", errors.numpy().round(3).tolist(), "(the other parameters held)")

    start = {**fit.params, "loc": loc + 0.1}
    posterior = pyroem.e_step(model, start, x)

    def surrogate(loc: torch.Tensor) -> torch.Tensor:
        return pyroem.expected_log_joint(model, {**start, "loc": loc}, posterior, x)

    gap = torch.func.grad(surrogate)(start["loc"]) - torch.func.grad(objective)(start["loc"])
    print("Fisher's identity holds to", f"{float(gap.abs().max()):.1e}")


if __name__ == "__main__":
    main()
