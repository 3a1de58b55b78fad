"""GaussianMixture against scikit-learn's, and what it has beyond."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Theirs
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyroem.estimators import GaussianMixture, MixedMixture, PoissonMixture
from pyroem.estimators.shapes import FORMS

rng = np.random.default_rng(0)
N = 200
SHIFT = np.array([1.0, 0.2, -0.3])
X = rng.normal(size=(N, 3)) + 4 * rng.integers(0, 3, size=(N, 1)) * SHIFT + 10
FOUR = ("full", "tied", "diag", "spherical")
ATTRIBUTES = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")

four = pytest.mark.parametrize("covariance_type", FOUR)
unfinished = pytest.mark.filterwarnings("ignore:.*did not converge")


def assert_same(own: GaussianMixture, theirs: Theirs, rtol: float = 1e-8) -> None:
    for name in ATTRIBUTES:
        scale = np.abs(getattr(theirs, name)).max()
        assert_allclose(
            getattr(own, name), getattr(theirs, name), rtol=rtol, atol=rtol * scale, err_msg=name
        )
    assert own.n_iter_ == theirs.n_iter_
    assert own.converged_ == theirs.converged_


@unfinished
@pytest.mark.parametrize("iterations", [2, 7, 100])
@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random", "random_from_data"])
@four
def test_the_numbers_of_scikit_learn(covariance_type: str, init: str, iterations: int) -> None:
    settings: dict[str, Any] = {
        "covariance_type": covariance_type,
        "init_params": init,
        "max_iter": iterations,
        "tol": 1e-3,
        "random_state": 3,
    }
    own, theirs = GaussianMixture(3, **settings).fit(X), Theirs(3, **settings).fit(X)
    assert_same(own, theirs)
    assert_allclose(own.lower_bound_, theirs.lower_bound_, rtol=1e-8)
    # Its first objective is at weights that do not sum to one, where starts are single rows.
    assert_allclose(own.lower_bounds_[1:], theirs.lower_bounds_[1:], rtol=1e-8)
    assert_allclose(own.score_samples(X), theirs.score_samples(X), rtol=1e-8)
    assert_allclose(own.predict_proba(X), theirs.predict_proba(X), rtol=1e-6, atol=1e-8)
    assert_array_equal(own.predict(X), theirs.predict(X))
    assert_allclose(own.bic(X), theirs.bic(X), rtol=1e-8)
    assert_allclose(own.aic(X), theirs.aic(X), rtol=1e-8)
    for a, b in zip(own.sample(20), theirs.sample(20), strict=True):
        assert_allclose(a, b, rtol=1e-5)


@unfinished
@pytest.mark.parametrize("given", ["weights", "means", "precisions", "all"])
@four
def test_from_given_values(covariance_type: str, given: str) -> None:
    start = Theirs(3, covariance_type=covariance_type, random_state=1, max_iter=3).fit(X)
    names = ["weights", "means", "precisions"] if given == "all" else [given]
    settings: dict[str, Any] = {f"{n}_init": getattr(start, f"{n}_") for n in names}
    settings |= {"covariance_type": covariance_type, "tol": 1e-6, "random_state": 0}
    settings |= {"init_params": "kmeans", "max_iter": 20}
    assert_same(GaussianMixture(3, **settings).fit(X), Theirs(3, **settings).fit(X))


@unfinished
@four
def test_a_warm_start_goes_on_as_theirs(covariance_type: str) -> None:
    settings: dict[str, Any] = {"covariance_type": covariance_type, "init_params": "kmeans"}
    settings |= {"max_iter": 2, "tol": 1e-3, "warm_start": True, "random_state": 0}
    own, theirs = GaussianMixture(3, **settings), Theirs(3, **settings)
    for _ in range(4):
        assert_same(own.fit(X), theirs.fit(X))
        assert_allclose(own.lower_bound_, theirs.lower_bound_, rtol=1e-9)


def test_the_best_of_several_starts_is_theirs() -> None:
    settings: dict[str, Any] = {"init_params": "random", "n_init": 4, "tol": 1e-4}
    settings |= {"max_iter": 300, "random_state": 0}
    assert_same(GaussianMixture(3, **settings).fit(X), Theirs(3, **settings).fit(X))


def test_the_default_start_is_no_worse() -> None:
    wide = np.concatenate([X, rng.normal(size=(60, 3)) * 0.3 - 4, rng.normal(size=(40, 3)) + 25])
    for seed in range(3):
        own = GaussianMixture(5, random_state=seed).fit(wide)
        theirs = Theirs(5, random_state=seed, tol=1e-8, max_iter=1000).fit(wide)
        assert own.score(wide) > theirs.score(wide) - 1e-4


def test_starting_values_that_make_no_sense() -> None:
    wrong: dict[str, Any] = {"covariance_type": "wide", "prior": "strong", "reg_covar": -1}
    for weights, message in (
        ([[0.5], [0.5]], r"should have the shape of \(2,\), but got \(2, 1\)"),
        ([1.2, 0.3], re.escape("range [0, 1], but got max value 1.20000, min value 0.30000")),
        ([0.5, 0.2], r"normalized, but got sum\(weights\) = 0.70000"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianMixture(2, weights_init=weights).fit(X)
    with pytest.raises(ValueError, match="precisions_init"):
        GaussianMixture(2, covariance_type="VEE", precisions_init=np.ones(2)).fit(X)
    with pytest.raises(ValueError, match="missing values"):
        GaussianMixture(2, init_params="kmeans").fit(np.where(X > 14, np.nan, X))
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            GaussianMixture(2, **{name: value}).fit(X)
    with pytest.raises(ValueError, match="'loc'"):
        GaussianMixture(2, fixed="loc").fit(X)
    with pytest.raises(ValueError, match="means_init"):
        GaussianMixture(2, fixed="means").fit(X)


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_columns_on_small_scales_survive(covariance_type: str) -> None:
    """The same fit in other units, where scikit-learn's 1e-6 would swamp the data."""
    units = np.array([1e-4, 1.0, 1e3])
    settings: dict[str, Any] = {"covariance_type": covariance_type, "random_state": 0}
    plain = GaussianMixture(3, reg_covar=0, **settings).fit(X)
    small = GaussianMixture(3, **settings).fit(X * units)
    apart = small.score(X * units) + np.log(units).sum() - plain.score(X)
    assert -0.02 < apart <= 1e-6
    theirs = Theirs(3, tol=1e-8, max_iter=1000, **settings).fit(X * units)
    assert theirs.score(X * units) + np.log(units).sum() < plain.score(X) - 1


@pytest.mark.parametrize("name", sorted(FORMS))
def test_all_covariances(name: str) -> None:
    few = X[:80]
    found = GaussianMixture(2, covariance_type=name, random_state=0).fit(few)
    assert found.converged_
    shapes = {"full": (2, 3, 3), "tied": (3, 3), "diag": (2, 3), "spherical": (2,)}
    assert found.covariances_.shape == shapes[FORMS[name]]
    assert found.score(few) > GaussianMixture(1, covariance_type=name).fit(few).score(few)
    assert clone(found).set_params(init_params="kmeans").fit(few).converged_


@pytest.mark.parametrize(
    ("name", "mclust"),
    [("tied-diagonal", "EEI"), ("tied-spherical", "EII"), ("diagonal", "VVI"), ("diag", "VVI")],
)
def test_other_names_of_covariances(name: str, mclust: str) -> None:
    one = GaussianMixture(2, covariance_type=name, random_state=0).fit(X)
    other = GaussianMixture(2, covariance_type=mclust, random_state=0).fit(X)
    assert_array_equal(one.covariances_, other.covariances_)


@four
def test_a_prior_keeps_components_apart_from_points(covariance_type: str) -> None:
    twin = np.concatenate([np.repeat(X[:1], 8, 0), X[:60]])
    held = GaussianMixture(2, covariance_type=covariance_type, prior="weak", random_state=0)
    held.fit(twin)
    assert held.converged_
    matrix = covariance_type in ("full", "tied")
    spread = np.linalg.eigvalsh(held.covariances_) if matrix else held.covariances_
    assert spread.min() > 1e-2
    fit = held.fit_result_
    assert_allclose(held.score_samples(twin), fit.log_prob(), rtol=1e-8)
    assert_allclose(held.result_on(twin).log_joint, fit.log_joint, rtol=1e-9)
    assert_allclose(held.lower_bound_, fit.log_joint / len(twin), atol=1e-7)


def test_a_collapse_is_said() -> None:
    twin = np.concatenate([np.repeat(X[:1], 8, 0), X[:60]])
    start: dict[str, Any] = {"weights_init": [0.2, 0.8], "means_init": [X[0], X.mean(0)]}
    start["precisions_init"] = np.stack([1e6 * np.eye(3), np.eye(3)])
    with pytest.warns(ConvergenceWarning, match=r"degenerate.*collapsed"):
        found = GaussianMixture(2, reg_covar=0, **start).fit(twin)
    assert not found.converged_
    assert found.status_ == "degenerate"


def test_what_is_held() -> None:
    start = Theirs(3, random_state=0).fit(X)
    held = GaussianMixture(
        3,
        means_init=start.means_ + 0.1,
        precisions_init=start.precisions_,
        fixed=("means", "precisions"),
    ).fit(X)
    assert_array_equal(held.means_, start.means_ + 0.1)
    assert_allclose(held.precisions_, start.precisions_, rtol=1e-10)
    assert held.n_parameters_ == 2


def test_no_iterations_give_the_start() -> None:
    start = GaussianMixture(3, max_iter=0, init_params="kmeans", random_state=0).fit(X)
    theirs = Theirs(3, max_iter=0, random_state=0).fit(X)
    for name in ATTRIBUTES:
        assert_allclose(getattr(start, name), getattr(theirs, name), rtol=1e-8)
    assert (start.n_iter_, start.converged_) == (0, False)
    assert GaussianMixture(3, max_iter=0, random_state=0).fit(X).means_.shape == (3, 3)


def test_a_mixture_made_by_hand() -> None:
    fitted = Theirs(3, random_state=0).fit(X)
    own = GaussianMixture(3)
    for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
        setattr(own, name, getattr(fitted, name))
    own.n_features_in_ = 3
    assert_allclose(own.score_samples(X), fitted.score_samples(X), rtol=1e-9)
    assert_allclose(own.bic(X), fitted.bic(X), rtol=1e-9)


def test_grid_search_over_components() -> None:
    search = GridSearchCV(
        GaussianMixture(random_state=0),
        {"n_components": [1, 2, 3], "covariance_type": ["diag", "spherical"]},
        cv=3,
    ).fit(X)
    assert search.best_params_["n_components"] == 3
    assert search.best_estimator_.fit_result_.converged
    scores = GridSearchCV(Theirs(random_state=0), {"n_components": [1]}, cv=3).fit(X)
    alone = GridSearchCV(GaussianMixture(), {"n_components": [1]}, cv=3).fit(X)
    assert_allclose(alone.best_score_, scores.best_score_, rtol=1e-4)


def test_pipelines() -> None:
    steps = make_pipeline(StandardScaler(), GaussianMixture(3, random_state=0)).fit(X)
    assert steps.predict(X).shape == (N,)
    scaled = StandardScaler().fit_transform(X)
    assert_allclose(steps.score(X), GaussianMixture(3, random_state=0).fit(scaled).score(scaled))
    assert_allclose(steps.transform(X), steps.predict_proba(X))
    assert_allclose(steps.fit_transform(X), steps.predict_proba(X))


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    found = GaussianMixture(3, random_state=0).set_output(transform="pandas").fit(frame)
    assert_array_equal(found.feature_names_in_, ["a", "b", "c"])
    out = found.transform(frame)
    assert list(out.columns) == list(found.get_feature_names_out())
    assert list(out.columns) == ["gaussianmixture0", "gaussianmixture1", "gaussianmixture2"]
    assert_allclose(out, found.predict_proba(frame))
    with pytest.raises(ValueError, match="feature names should match"):
        found.predict(frame.rename(columns={"a": "d"}))
    with pytest.warns(UserWarning, match="feature names"):
        found.predict(X)


def test_kinds_that_a_data_frame_says() -> None:
    pandas = pytest.importorskip("pandas")
    kinds = pandas.Categorical(rng.integers(0, 3, N))
    frame = pandas.DataFrame({"a": X[:, 0], "b": X[:, 1] > 10, "c": kinds})
    found = MixedMixture(2, kinds="auto", random_state=0).fit(frame)
    assert found.kinds_ == ["gaussian", "bernoulli", 3]
    frame["d"] = rng.integers(0, 9, N)
    with pytest.raises(ValueError, match="'d' has type int64"):
        MixedMixture(2, kinds="auto").fit(frame)
    counts = PoissonMixture(2, random_state=0).fit(frame[["d"]])
    assert_array_equal(counts.feature_names_in_, ["d"])


def test_missing_values_are_missing() -> None:
    """A column that is missing in a row leaves the marginal density of the others."""
    found = GaussianMixture(3, random_state=0).fit(X)
    gone = X.copy()
    gone[:, 1] = np.nan
    keep = [0, 2]
    marginal = clone(found).set_params(covariance_type="full")
    marginal.weights_, marginal.means_ = found.weights_, found.means_[:, keep]
    covariances = found.covariances_[:, keep][:, :, keep]
    inverse = np.linalg.inv(covariances)
    marginal.precisions_cholesky_ = np.stack([np.linalg.cholesky(p) for p in inverse])
    marginal.n_features_in_ = 2
    assert_allclose(found.score_samples(gone), marginal.score_samples(X[:, keep]), rtol=1e-9)
    gone[0] = np.nan
    assert_allclose(found.predict_proba(gone)[0], found.weights_, rtol=1e-12)
