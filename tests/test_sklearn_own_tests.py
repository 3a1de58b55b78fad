"""Scikit-learn's own tests of its GaussianMixture, run on ours.

They are taken from the installed package, with the class replaced by ours under scikit-learn's
defaults. ``SKIPPED`` says which are not run, and why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyroem.estimators import GaussianMixture

theirs = pytest.importorskip("sklearn.mixture.tests.test_gaussian_mixture")
of_both = pytest.importorskip("sklearn.mixture.tests.test_mixture")

INTERNAL = "it tests a private function of scikit-learn's module and uses no GaussianMixture"
ARRAY_API = "arrays of other libraries: this class takes what numpy reads, and says so in its tags"
SKIPPED = {
    "test_check_weights": "it wants a message that calls the smallest weight the largest;"
    " tests/test_estimators_gaussian.py checks the same errors",
    "test_suffstat_sk_full": INTERNAL,
    "test_suffstat_sk_tied": INTERNAL,
    "test_suffstat_sk_diag": INTERNAL,
    "test_gaussian_suffstat_sk_spherical": INTERNAL,
    "test_compute_log_det_cholesky": INTERNAL,
    "test_gaussian_mixture_log_probabilities": INTERNAL,
    "test_gaussian_mixture_precisions_init": "it calls the private methods _set_parameters and"
    " _initialize",
    "test_gaussian_mixture_all_init_does_not_estimate_gaussian_parameters": "it counts the calls of"
    " scikit-learn's private function",
    "test_gaussian_mixture_array_api_compliance": ARRAY_API,
    "test_gaussian_mixture_raises_where_array_api_not_implemented": ARRAY_API,
}
DEFAULTS: dict[str, Any] = {"init_params": "kmeans", "tol": 1e-3, "max_iter": 100}

pytestmark = [
    # Data on which k-means finds fewer clusters, or a component has too little: said, not hidden.
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]

taken = {n: f for n, f in vars(theirs).items() if n.startswith("test_") and n not in SKIPPED}
assert len(taken) > 20 and not set(taken) & set(globals())
globals().update(taken)


def with_their_defaults(*args: Any, **settings: Any) -> GaussianMixture:
    return GaussianMixture(*args, **{**DEFAULTS, **settings})


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "GaussianMixture", with_their_defaults)


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def global_dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def global_random_seed() -> int:
    return 42


def test_n_iter() -> None:
    of_both.test_gaussian_mixture_n_iter(with_their_defaults())


def test_more_components_than_rows() -> None:
    of_both.test_mixture_n_components_greater_than_n_samples_error(with_their_defaults())
