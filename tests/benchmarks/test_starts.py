"""How often the default start leads to the best known optimum, beside scikit-learn's."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets
from sklearn.mixture import GaussianMixture

from benchmarks.harness import SCALE, show
from pyroem import EM, datasets
from pyroem.models import gaussian_mixture

pytestmark = pytest.mark.benchmark
SEEDS = max(int(100 * SCALE), 5)
NEAR = 0.01  # nats: so close to the best is the same optimum
OURS = {"full": "full", "tied": "tied", "diag": "diagonal", "spherical": "spherical"}

# The best log-likelihoods found by any means: thousands of starts, moves, other programs.
BEST_KNOWN = {
    ("faithful", 2, "full"): -1130.26396,
    ("faithful", 3, "full"): -1119.21397,  # confirmed by two programs; -1114.43987 exists beside it
    ("faithful", 3, "tied"): -1126.31593,
    ("faithful", 3, "diag"): -1127.00752,
    ("faithful", 3, "spherical"): -1637.43442,
    ("iris", 2, "full"): -214.35470,
    ("iris", 3, "full"): -180.18548,
    ("iris", 3, "tied"): -256.35404,
    ("iris", 3, "diag"): -306.86046,
    ("iris", 3, "spherical"): -384.31410,
    ("wine", 3, "tied"): -3170.58206,
    ("wine", 3, "diag"): -3294.26188,
    ("wine", 3, "spherical"): -11179.00989,
    ("breast cancer", 2, "full"): 4312.73792,
    ("breast cancer", 2, "tied"): 3302.45322,
    ("breast cancer", 2, "diag"): -756.77659,
    ("diabetes", 2, "full"): 9595.33603,
    ("diabetes", 2, "diag"): 7734.33003,
}


def rows_of(name: str) -> Any:
    """The data; of the breast cancer data the ten means."""
    if name == "faithful":
        return datasets.load(name)[1].numpy()
    load = {
        "iris": sklearn_datasets.load_iris,
        "wine": sklearn_datasets.load_wine,
        "breast cancer": sklearn_datasets.load_breast_cancer,
        "diabetes": sklearn_datasets.load_diabetes,
    }[name]
    return load().data[:, :10] if name == "breast cancer" else load().data


@pytest.mark.parametrize("name, k, covariance", BEST_KNOWN)
def test_the_best_known_optimum(name: str, k: int, covariance: str) -> None:
    x = rows_of(name)
    counts, spent = {}, {}
    for init in ("auto", "scikit-learn"):
        found, clock = [], time.perf_counter()
        for seed in range(SEEDS):
            if init == "auto":
                fit = EM().fit(gaussian_mixture(k, OURS[covariance]), x, seed=seed)
                found.append(fit.log_likelihood if fit.converged else -np.inf)
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer = GaussianMixture(
                    k,
                    covariance_type=covariance,
                    random_state=seed,
                    tol=1e-8,
                    max_iter=5000,
                    reg_covar=1e-9 * float(x.var(0).min()),
                ).fit(x)
            found.append(peer.score(x) * len(x))
        spent[init] = (time.perf_counter() - clock) / SEEDS
        counts[init] = sum(value >= BEST_KNOWN[name, k, covariance] - NEAR for value in found)
    show(
        {
            "data": f"{name}, K={k}, {covariance}",
            "seeds": str(SEEDS),
            "pyroem": str(counts["auto"]),
            "scikit-learn": str(counts["scikit-learn"]),
            "a fit": f"{1e3 * spent['auto']:.0f} ms",
            "scikit-learn's": f"{1e3 * spent['scikit-learn']:.0f} ms",
        }
    )
