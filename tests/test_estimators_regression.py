"""MixtureOfRegressions."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor

import pyroem
from pyroem import estimators
from pyroem.estimators import MixtureOfRegressions

rng = np.random.default_rng(0)
N = 100
X = rng.normal(size=(N, 2))
Z = rng.integers(0, 2, N)
ETA = np.where(Z == 0, 1 + 1.5 * X[:, 0], -1.0 - X[:, 1])
Y = {
    "gaussian": ETA + 0.3 * rng.normal(size=N),
    "poisson": rng.poisson(np.exp(0.8 * ETA + 1)).astype(float),
    "binomial": (rng.uniform(size=N) < 1 / (1 + np.exp(-3 * ETA))).astype(float),
}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "gaussian": ({}, "gaussian"),
    "poisson": ({"family": "poisson"}, "poisson"),
    "binomial": ({"family": "binomial"}, "binomial"),
    "no intercept": ({"fit_intercept": False}, "gaussian"),
    "experts": ({"concomitant": True}, "gaussian"),
}
CASES = {
    name: (MixtureOfRegressions(2, init="kmeans", random_state=0, **own), family)
    for name, (own, family) in SETTINGS.items()
}
each = pytest.mark.parametrize("name", list(CASES))
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
_fits: dict[str, Any] = {}


def fitted(name: str) -> tuple[Any, np.ndarray]:
    estimator, family = CASES[name]
    if name not in _fits:
        _fits[name] = clone(estimator).set_params(max_iter=60).fit(X, Y[family])
    return _fits[name], Y[family]


@each
def test_formulas_are_those_of_the_program(name: str) -> None:
    estimator, y = fitted(name)
    fit = estimator.fit_result_
    assert_allclose(estimator.log_prob(X, y), fit.log_prob(), rtol=1e-8, atol=1e-9)
    assert_allclose(estimator.responsibilities(X, y), fit.responsibilities(), atol=1e-9)
    assert_array_equal(estimator.predict_component(X, y), fit.predict())
    assert_allclose(estimator.bic(X, y), fit.bic(), rtol=1e-9)
    assert_allclose(estimator.aic(X, y), fit.aic(), rtol=1e-9)
    assert_allclose(estimator.icl(X, y), fit.icl(), rtol=1e-8)
    assert_allclose(estimator.result_on(X, y).log_likelihood, fit.log_likelihood, rtol=1e-10)


@pytest.mark.parametrize(
    ("family", "reference"),
    [
        ("gaussian", LinearRegression()),
        ("poisson", PoissonRegressor(alpha=0, tol=1e-9, max_iter=1000)),
        ("binomial", LogisticRegression(C=np.inf, tol=1e-9, max_iter=1000)),
    ],
)
def test_one_component_is_a_regression(family: str, reference: Any) -> None:
    own = MixtureOfRegressions(1, family=family).fit(X, Y[family])
    reference.fit(X, Y[family])
    assert_allclose(own.coef_[0], np.ravel(reference.coef_), rtol=1e-4)
    assert_allclose(own.intercept_, np.ravel(reference.intercept_), rtol=1e-4)
    if family != "binomial":
        assert_allclose(own.predict(X), reference.predict(X), rtol=1e-4)
    else:
        assert_allclose(own.predict(X), reference.predict_proba(X)[:, 1], rtol=1e-4)


def test_the_components_are_found() -> None:
    estimator, y = fitted("gaussian")
    assert estimator.converged_
    own = np.column_stack([estimator.intercept_, estimator.coef_])
    own = own[own[:, 0].argsort()]
    assert_allclose(own, np.array([[-1.0, 0.0, -1.0], [1.0, 1.5, 0.0]]), atol=0.15)
    assert_allclose(estimator.scale_, 0.3, atol=0.08)
    right = (estimator.predict_component(X, y) == Z).mean()
    assert max(right, 1 - right) > 0.9


def test_an_adopted_fit_is_like_an_own_one() -> None:
    own = clone(CASES["experts"][0])
    program, args, weights = own.prepare(X, Y["gaussian"], np.linspace(0.5, 1.5, N))
    found = own.adopt(pyroem.EM().fit(program, *args, weights=weights))
    assert_allclose(
        found.weights_,
        np.average(found.fit_result_.responsibilities(), axis=0, weights=weights),
        rtol=1e-4,
    )
    assert_allclose(found.log_prob(X, Y["gaussian"]), found.fit_result_.log_prob(), rtol=1e-8)


@each
def test_predictions_are_the_mean_of_the_mixture(name: str) -> None:
    estimator, y = fitted(name)
    shares = estimator.responsibilities(X)
    assert_allclose(shares.sum(1), 1)
    assert_allclose(estimator.predict(X), (shares * estimator.predict_means(X)).sum(1))
    assert_allclose(shares.mean(0), estimator.weights_, rtol=1e-6)
    spread = ((y - y.mean()) ** 2).sum()
    assert_allclose(estimator.score(X, y), 1 - ((y - estimator.predict(X)) ** 2).sum() / spread)
    many = np.repeat(X[:3], 4000, axis=0)
    drawn = estimator.sample(many)[0].reshape(3, 4000)
    error = drawn.std(1) / 4000**0.5
    assert (np.abs(drawn.mean(1) - estimator.predict(X[:3])) < 5 * error).all()


@each
def test_copies_predict_the_same(name: str, tmp_path: Path) -> None:
    estimator, y = fitted(name)
    estimator.save(tmp_path / "regressions.json")
    for other in (
        pickle.loads(pickle.dumps(estimator)),
        copy.deepcopy(estimator),
        estimators.load(tmp_path / "regressions.json"),
    ):
        assert_array_equal(other.predict(X), estimator.predict(X))
        assert_array_equal(other.log_prob(X, y), estimator.log_prob(X, y))


@each
def test_weights_repeat_rows(name: str) -> None:
    estimator, y = fitted(name)
    counts = np.random.default_rng(1).integers(0, 3, N)
    start = {n: v.numpy() for n, v in estimator.fit_result_.params.items()}
    given = clone(estimator).set_params(init=start, max_iter=2)
    weighted = clone(given).fit(X, y, sample_weight=counts)
    repeated = clone(given).fit(X.repeat(counts, axis=0), y.repeat(counts))
    assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-7)
    assert_allclose(weighted.weights_, repeated.weights_, rtol=1e-7)


def test_known_components() -> None:
    labels = np.where(np.arange(N) < 20, 1 - Z, -1)
    found = clone(CASES["gaussian"][0]).fit(X, Y["gaussian"], labels=labels)
    own = found.fit_result_.responsibilities().numpy()
    assert_allclose(own[:20, 1], labels[:20], atol=1e-12)
    assert (found.predict_component(X, Y["gaussian"]) == 1 - Z).mean() > 0.9


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="family"):
        MixtureOfRegressions(family="gamma").fit(X, Y["gaussian"])
    with pytest.raises(ValueError, match="expects counts"):
        MixtureOfRegressions(family="poisson").fit(X, Y["gaussian"])
    with pytest.raises(ValueError, match="expects 0 and 1"):
        MixtureOfRegressions(family="binomial").fit(X, Y["poisson"])
