"""The estimators: scikit-learn's checks, and laws that hold for all classes alike."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyroem
from pyroem import estimators
from pyroem.estimators import (
    BernoulliMixture,
    CategoricalMixture,
    GaussianMixture,
    LatentClass,
    MixedMixture,
    MixtureOfRegressions,
    PoissonMixture,
    StudentTMixture,
)

rng = np.random.default_rng(0)
N = 150
KNOWN = rng.integers(0, 2, N)
NORMAL = rng.normal(size=(N, 3)) + 3.5 * KNOWN[:, None] * np.array([1.0, -0.5, 0.8])
COUNTS = rng.poisson(np.where(KNOWN[:, None] == 0, [2.0, 5.0, 1.0], [6.0, 1.0, 3.0])).astype(float)
BINARY = (rng.uniform(size=(N, 5)) < np.where(KNOWN[:, None] == 0, 0.15, 0.8)).astype(float)
CODES = np.column_stack(
    [BINARY[:, :2].sum(1), BINARY[:, 3] + COUNTS[:, 0].clip(0, 1), BINARY[:, 2:]]
)
MIXED = np.column_stack([NORMAL[:, 0], COUNTS[:, 0], BINARY[:, 0], CODES[:, 0], NORMAL[:, 1]])
KINDS = ["gaussian", "poisson", "bernoulli", 3, "gaussian"]
HEAVY = (rng.standard_t(2.5, size=(N, 3)) + 8.0 * KNOWN[:, None])[:90]
RESPONSE = np.where(KNOWN == 0, 1 + 2 * NORMAL[:, 0], -3 - NORMAL[:, 1]) + 0.3 * rng.normal(size=N)

MIXTURES = {
    "full": (GaussianMixture(2, random_state=0), NORMAL),
    "tied": (GaussianMixture(2, covariance_type="tied", random_state=0), NORMAL),
    "diag": (GaussianMixture(2, covariance_type="diag", random_state=0), NORMAL),
    "spherical": (GaussianMixture(2, covariance_type="spherical", random_state=0), NORMAL),
    "EEI": (GaussianMixture(2, covariance_type="tied-diagonal", random_state=0), NORMAL),
    "EII": (GaussianMixture(2, covariance_type="EII", random_state=0), NORMAL),
    "VEI": (GaussianMixture(2, covariance_type="VEI", random_state=0), NORMAL),
    "VEE": (GaussianMixture(2, covariance_type="VEE", random_state=0), NORMAL),
    "diag weak": (GaussianMixture(2, covariance_type="diag", prior="weak", random_state=0), NORMAL),
    "poisson": (PoissonMixture(2, random_state=0), COUNTS),
    "poisson weak": (PoissonMixture(2, prior="weak", random_state=0), COUNTS),
    "not whole": (PoissonMixture(2, random_state=0), COUNTS / 2),
    "bernoulli": (BernoulliMixture(2, random_state=0), BINARY),
    "bernoulli weak": (BernoulliMixture(2, prior="weak", random_state=0), BINARY),
    "latent class": (LatentClass(2, random_state=0), CODES),
    "latent class weak": (LatentClass(2, prior="weak", random_state=0), CODES),
    "t": (StudentTMixture(2, init="kmeans", random_state=0), HEAVY),
    "t tied": (StudentTMixture(2, covariance_type="tied", df=4.0, init="kmeans"), HEAVY),
    "t diag": (StudentTMixture(2, covariance_type="diag", df=4.0, init="kmeans"), HEAVY),
    "t spherical": (StudentTMixture(2, covariance_type="spherical", df=4.0, init="kmeans"), HEAVY),
    "mixed": (MixedMixture(2, kinds=KINDS, random_state=0), MIXED),
}
each = pytest.mark.parametrize("name", list(MIXTURES))
few = pytest.mark.parametrize("name", ["full", "poisson", "latent class", "t", "mixed"])

_fits: dict[str, Any] = {}


def fitted(name: str) -> tuple[Any, np.ndarray]:
    """A fitted estimator and its data; nobody may change it."""
    estimator, X = MIXTURES[name]
    if name not in _fits:
        _fits[name] = clone(estimator).fit(X)
    return _fits[name], X


def same(a: Any, b: Any, X: np.ndarray) -> None:
    """Two estimators predict the same, to the last bit."""
    assert_array_equal(a.predict_proba(X), b.predict_proba(X))
    assert_array_equal(a.score_samples(X), b.score_samples(X))
    assert_array_equal(a.predict(X), b.predict(X))


# The checks feed data on which a fit rightly complains: one row, more columns than rows, categories
# that are new.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:.*counts as a missing value:UserWarning")
@parametrize_with_checks([kind() for kind in estimators.CLASSES])
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@few
def test_adopted_fits_are_like_own_ones(name: str) -> None:
    """A fit by a solver of one's own choice, under weights: the estimator takes it over."""
    estimator, X = MIXTURES[name]
    weights = np.linspace(0, 2, len(X))
    settings = {"init_params" if name == "full" else "init": "thorough", "random_state": 3}
    own = clone(estimator).set_params(**settings)
    program, args, kept = own.prepare(X, sample_weight=weights)
    assert kept is not None
    assert len(kept) == len(X) - 1
    solver = pyroem.EM(accelerate="anderson")
    other = own.adopt(solver.fit(program, *args, weights=kept, init="kmeans"))
    assert other is own
    assert other.converged_
    mine = clone(other).fit(X, sample_weight=weights)
    assert_allclose(other.score(X), mine.score(X), rtol=1e-5)
    again = other.result_on(X, sample_weight=weights)
    assert_allclose(again.log_joint, other.lower_bound_ * weights.sum(), rtol=1e-9)


@each
def test_formulas_are_those_of_the_program(name: str) -> None:
    estimator, X = fitted(name)
    fit = estimator.fit_result_
    assert estimator.converged_
    assert fit.converged
    assert_allclose(estimator.score_samples(X), fit.log_prob(), rtol=1e-8, atol=1e-9)
    assert_allclose(estimator.predict_proba(X), fit.responsibilities(), rtol=1e-7, atol=1e-9)
    assert_array_equal(estimator.predict(X), fit.predict())
    assert_allclose(estimator.bic(X), fit.bic(), rtol=1e-9)
    assert_allclose(estimator.aic(X), fit.aic(), rtol=1e-9)
    assert_allclose(estimator.icl(X), fit.icl(), rtol=1e-8)
    assert_allclose(estimator.score(X) * len(X), fit.log_likelihood, rtol=1e-9)
    assert estimator.n_parameters_ == fit.df
    assert "converged" in estimator.explain()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@each
def test_missing_values_are_those_of_the_program(name: str) -> None:
    estimator, X = MIXTURES[name]
    X = X.copy()
    X[np.random.default_rng(1).uniform(size=X.shape) < 0.15] = np.nan
    estimator = clone(estimator).set_params(max_iter=5)
    estimator.fit(X)
    fit = estimator.fit_result_
    assert_allclose(estimator.score_samples(X), fit.log_prob(), rtol=1e-8, atol=1e-9)
    assert_allclose(estimator.predict_proba(X), fit.responsibilities(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["full", "tied", "VEI", "poisson", "bernoulli", "latent class", "t", "mixed"]
)
def test_missing_values_are_filled_in(name: str) -> None:
    estimator, X = fitted(name)
    X = X[:40].copy()
    gone = np.random.default_rng(1).uniform(size=X.shape) < 0.2
    X[gone] = np.nan
    filled = estimator.impute(X)
    assert_array_equal(filled[~gone], X[~gone])
    assert np.isfinite(filled).all()
    assert_array_equal(pickle.loads(pickle.dumps(estimator)).impute(X), filled)
    draws = estimator.impute(X, draws=100, random_state=0)
    assert draws.shape == (100, *X.shape)
    assert_array_equal(draws[7][~gone], X[~gone])
    assert_array_equal(draws, estimator.impute(X, draws=100, random_state=0))
    if name.startswith("latent"):
        share = (draws == filled).mean(0)[gone]
        assert (share > 0.3).all()  # the most probable of two or three categories
    elif name != "t":
        error = draws.std(0) / 100**0.5
        kinds = np.array([name != "mixed" or j != 3 for j in range(X.shape[1])])
        apart = np.abs(draws.mean(0) - filled) - 5 * error - 0.01
        assert (apart[gone & kinds] < 0).all()
    assert_array_equal(estimator.impute(fitted(name)[1]), fitted(name)[1])
    with pytest.raises(ValueError, match="draws"):
        estimator.impute(X, draws=0)


@each
def test_parameters_become_attributes_and_back(name: str) -> None:
    estimator, X = fitted(name)
    fit = estimator.result_on(X)
    for key, value in estimator.fit_result_.params.items():
        assert_allclose(fit.params[key], value, rtol=1e-10, atol=1e-12)
    assert_allclose(fit.log_likelihood, estimator.fit_result_.log_likelihood, rtol=1e-10)


@each
def test_draws_have_the_mixture_in_them(name: str) -> None:
    estimator, X = fitted(name)
    draws, z = estimator.sample(4000)
    assert draws.shape == (4000, X.shape[1])
    assert_allclose(np.bincount(z, minlength=2) / 4000, estimator.weights_, atol=0.04)
    if name == "not whole":
        return  # its density is no distribution
    # The mean log-likelihood of draws estimates minus the entropy: twice, from other draws.
    other, _ = copy.deepcopy(estimator).set_params(random_state=1).sample(4000)
    error = estimator.score_samples(draws).std() / 4000**0.5
    assert abs(estimator.score(draws) - estimator.score(other)) < 6 * error
    # Responsibilities are calibrated on draws.
    assert_allclose(estimator.predict_proba(draws)[:, 1].mean(), (z == 1).mean(), atol=0.04)


@each
def test_copies_predict_the_same(name: str, tmp_path: Path) -> None:
    estimator, X = fitted(name)
    path = tmp_path / "mixture.json"
    estimator.save(path)
    copies = [
        pickle.loads(pickle.dumps(estimator)),
        copy.deepcopy(estimator),
        type(estimator).load(path),
        estimators.load(path),
    ]
    for other in copies:
        same(estimator, other, X)
        assert other.explain() == estimator.explain()
        assert other.get_params().keys() == estimator.get_params().keys()
        with pytest.raises(AttributeError, match=r"result_on\(X\)"):
            _ = other.fit_result_
        assert_allclose(
            other.result_on(X).log_likelihood, estimator.fit_result_.log_likelihood, rtol=1e-10
        )
    assert not hasattr(clone(estimator), "weights_")
    json.loads(path.read_text())


def test_another_process_predicts_the_same(tmp_path: Path) -> None:
    estimator, X = fitted("full")
    (tmp_path / "mixture.pickle").write_bytes(pickle.dumps((estimator, X)))
    code = (
        "import pyroem, pickle, sys; assert 'sklearn' not in sys.modules;"
        "a, X = pickle.load(open(sys.argv[1], 'rb'));"
        "print(a.score_samples(X).tobytes().hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mixture.pickle")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == estimator.score_samples(X).tobytes().hex()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@each
def test_weights_repeat_rows(name: str) -> None:
    estimator, X = fitted(name)
    counts = np.random.default_rng(2).integers(0, 3, len(X))
    start = {n: v.numpy() for n, v in estimator.fit_result_.params.items()}
    given = clone(estimator).set_params(max_iter=2)
    if isinstance(estimator, GaussianMixture):
        given.set_params(means_init=estimator.means_)
    else:
        given.set_params(init=start)
    weighted = clone(given).fit(X, sample_weight=counts)
    repeated = clone(given).fit(X.repeat(counts, axis=0))
    assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), rtol=1e-6, atol=1e-7)
    total = repeated.score(X.repeat(counts, axis=0))
    assert_allclose(weighted.score(X, sample_weight=counts), total, rtol=1e-9)
    for criterion in ("aic", "bic", "icl"):
        own = getattr(weighted, criterion)(X, sample_weight=counts)
        assert_allclose(own, getattr(repeated, criterion)(X.repeat(counts, axis=0)), rtol=1e-8)


@pytest.mark.parametrize(
    "name", ["full", "VEE", "diag weak", "poisson", "bernoulli", "latent class", "t", "mixed"]
)
def test_known_components_stay_what_they_are(name: str) -> None:
    estimator, X = fitted(name)
    known = KNOWN[: len(X)]
    labels = np.where(np.arange(len(X)) < 30, 1 - known, -1)
    found = clone(estimator).fit(X, labels)
    own = found.fit_result_.responsibilities().numpy()
    assert_allclose(own[:30, 1], labels[:30], atol=1e-12)
    if estimator.get_params().get("init") != "kmeans":  # which may name components otherwise
        assert (found.predict(X) == 1 - known).mean() > 0.8


@each
def test_labels_without_unknowns_are_ignored(name: str) -> None:
    estimator, X = fitted(name)
    same(estimator, clone(estimator).fit(X, KNOWN[: len(X)]), X)


@pytest.mark.parametrize("name", ["full", "tied", "diag", "poisson", "bernoulli", "latent class",
                                  "mixed"])  # fmt: skip
def test_labels_clamp_responsibilities(name: str) -> None:
    """One iteration from given values, against the E-step and M-step by hand."""
    estimator, X = fitted(name)
    labels = np.where(np.arange(len(X)) % 3 == 0, KNOWN, -1)
    resp = estimator.predict_proba(X)
    resp[labels >= 0] = np.eye(2)[labels[labels >= 0]]
    one = clone(estimator).set_params(max_iter=1)
    if isinstance(estimator, GaussianMixture):
        start = {
            "weights_init": estimator.weights_,
            "means_init": estimator.means_,
            "precisions_init": estimator.precisions_,
        }
        one.set_params(**start, reg_covar=0)
    else:
        one.set_params(init={n: v.numpy() for n, v in estimator.fit_result_.params.items()})
    with pytest.warns(ConvergenceWarning):
        one.fit(X, labels)
    assert_allclose(one.weights_, resp.mean(0), rtol=1e-8)
    means = resp.T @ X / resp.sum(0)[:, None]
    if name in ("full", "tied", "diag"):
        assert_allclose(one.means_, means, rtol=1e-8)
    elif name in ("poisson", "bernoulli"):
        assert_allclose(one.rates_ if name == "poisson" else one.probs_, means, rtol=1e-8)
    elif name == "mixed":
        assert_allclose(one.tables_[1][:, 0], means[:, 1], rtol=1e-8)
        assert_allclose(one.tables_[0][:, 0], means[:, 0], rtol=1e-8)
    else:
        shown = X[:, 1] == estimator.categories_[1][0]
        assert_allclose(one.probs_[1][:, 0], resp.T @ shown / resp.sum(0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", ["em", "map"])
@few
def test_solvers_agree(name: str, solver: str) -> None:
    estimator, X = fitted(name)
    other = clone(estimator).set_params(solver=solver, max_iter=5000)
    if solver == "map" and name == "full":
        other.set_params(reg_covar=0)
    other.fit(X)
    assert_allclose(other.score(X), estimator.score(X), atol=1e-5)


parted = pytest.mark.parametrize(
    "name", ["full", "diag", "poisson weak", "bernoulli", "mixed", "latent class"]
)


@parted
def test_parts_approach_the_whole(name: str) -> None:
    estimator, X = fitted(name)
    whole = estimator.score(X)
    parts, order = clone(estimator), np.random.default_rng(3)
    first = whole - parts.partial_fit(X[:50]).score(X)
    for _ in range(10):
        for rows in np.array_split(order.permutation(len(X)), 3):
            parts.partial_fit(X[rows])
        parts = pickle.loads(pickle.dumps(parts))
    assert whole - parts.score(X) < 0.5 * first
    assert not parts.converged_
    assert parts.n_iter_ == 31
    assert "parts" in parts.explain()
    with pytest.raises(ValueError, match="features"):
        parts.partial_fit(X[:, :1])


@pytest.mark.parametrize("name", ["full", "diag", "poisson", "bernoulli", "mixed", "latent class"])
def test_a_part_that_is_the_whole_stays_at_the_optimum(name: str) -> None:
    estimator, X = fitted(name)
    parts = clone(estimator)
    for _ in range(3):
        parts.partial_fit(X)
    assert_allclose(np.sort(parts.weights_), np.sort(estimator.weights_), atol=1e-3)
    assert_allclose(parts.score(X), estimator.score(X), atol=1e-5)
    same(parts.fit(X), estimator, X)


def test_parts_with_weights_are_repeated_rows() -> None:
    X, counts = NORMAL[:60], np.random.default_rng(4).integers(0, 3, 30)
    start = GaussianMixture(2, random_state=0).partial_fit(X)
    a = copy.deepcopy(start).partial_fit(X[:30], sample_weight=counts)
    b = copy.deepcopy(start).partial_fit(X[:30].repeat(counts, axis=0))
    assert_allclose(a.means_, b.means_, rtol=1e-9)
    assert_allclose(a.covariances_, b.covariances_, rtol=1e-9)


def test_parts_with_missing_values() -> None:
    X = NORMAL.copy()
    X[np.random.default_rng(5).uniform(size=X.shape) < 0.1] = np.nan
    whole = GaussianMixture(2, random_state=0).fit(X)
    parts = GaussianMixture(2, random_state=0).partial_fit(X)
    for _ in range(2):
        parts.partial_fit(X)
    assert_allclose(parts.score(X), whole.score(X), atol=1e-5)
    late = GaussianMixture(2, random_state=0).partial_fit(NORMAL)
    with pytest.raises(ValueError, match="first batch"):
        late.partial_fit(X)


def test_parts_with_known_components() -> None:
    labels = np.where(np.arange(60) < 20, KNOWN[:60], -1)
    parts = GaussianMixture(2, random_state=0).partial_fit(NORMAL[:60], labels)
    for _ in range(5):
        parts.partial_fit(NORMAL[60:])
        parts.partial_fit(NORMAL[:60], labels)
    assert (parts.predict(NORMAL) == KNOWN).mean() > 0.9


@few
def test_what_is_held_stays(name: str) -> None:
    estimator, X = fitted(name)
    start = np.array([0.3, 0.7])
    held = clone(estimator).set_params(fixed=("weights",))
    with pytest.raises(ValueError, match="weights"):
        held.fit(X)
    if name == "full":
        held.set_params(weights_init=start)
    else:
        held.set_params(init={"weights": start})
    held.fit(X)
    assert_array_equal(held.weights_, start)
    assert held.n_parameters_ == estimator.n_parameters_ - 1


@few
def test_warm_start_goes_on(name: str) -> None:
    estimator, X = fitted(name)
    warm = clone(estimator).set_params(warm_start=True).fit(X)
    warm.fit(X)
    assert warm.n_iter_ <= 12
    assert_allclose(warm.score(X), estimator.score(X), atol=1e-6)


@few
def test_more_starts_are_no_worse(name: str) -> None:
    estimator, X = fitted(name)
    random = clone(estimator)
    random.set_params(**{"init_params" if name == "full" else "init": "random", "n_init": 3})
    assert random.fit(X).score(X) <= estimator.score(X) + 1e-5


@few
def test_iterations_that_ran_out_are_said(name: str) -> None:
    estimator, X = MIXTURES[name]
    with pytest.warns(ConvergenceWarning, match="did not converge.*raise max_iter"):
        short = clone(estimator).set_params(max_iter=1, tol=0.0).fit(X)
    assert not short.converged_
    assert short.status_ == "max_iter"


@each
def test_single_precision_stays(name: str) -> None:
    estimator, X = fitted(name)
    single = clone(estimator).fit(X.astype(np.float32))
    assert single.weights_.dtype == np.float32
    assert_allclose(single.score(X.astype(np.float32)), estimator.score(X), rtol=1e-3)


def test_latent_classes_of_any_kind() -> None:
    words = np.array(["no", "perhaps", "yes"], dtype=object)
    X = CODES.astype(object)
    X[:, 0] = words[CODES[:, 0].astype(int)]
    X[:, 1] = CODES[:, 1].astype(int) * 10
    found = LatentClass(2, random_state=0).fit(X)
    assert_array_equal(found.categories_[0], ["no", "perhaps", "yes"])
    assert_array_equal(found.categories_[1], [0, 10, 20])
    assert_allclose(found.score(X), fitted("latent class")[0].score(CODES), rtol=1e-9)
    draws, _ = found.sample(20)
    assert set(draws[:, 0]) <= set(words)
    X[0, 0] = None
    assert np.isfinite(found.score_samples(X)).all()
    unknown = X.copy()
    unknown[3, 0] = "never"
    with pytest.warns(UserWarning, match=r"column 0 holds 'never'.*missing value"):
        warned = found.predict_proba(unknown)
    unknown[3, 0] = None
    assert_array_equal(warned, found.predict_proba(unknown))
    unknown[3, 0] = "never"
    with pytest.raises(ValueError, match="column 0 holds 'never'"):
        found.set_params(handle_unknown="error").predict(unknown)
    assert CategoricalMixture is LatentClass


def test_counts_and_ones() -> None:
    with pytest.raises(ValueError, match="expected counts"):
        PoissonMixture(2).fit(-COUNTS)
    with pytest.raises(ValueError, match="expected 0 and 1"):
        BernoulliMixture(2, binarize=None).fit(COUNTS)
    split = BernoulliMixture(2, binarize=2.0, random_state=0).fit(COUNTS)
    plain = BernoulliMixture(2, binarize=None, random_state=0).fit((COUNTS > 2).astype(float))
    assert_array_equal(split.probs_, plain.probs_)


def test_kinds_of_columns() -> None:
    with pytest.raises(ValueError, match="data frame"):
        MixedMixture(kinds="auto").fit(MIXED)
    with pytest.raises(ValueError, match="one for each column, 5"):
        MixedMixture(kinds=["gaussian"]).fit(MIXED)
    with pytest.raises(ValueError, match="normal"):
        MixedMixture(kinds="normal").fit(MIXED)
    with pytest.raises(ValueError, match="column 0 is 'poisson'"):
        MixedMixture(kinds="poisson").fit(MIXED)
    with pytest.raises(ValueError, match="column 3 is 2"):
        MixedMixture(kinds=[*KINDS[:3], 2, "gaussian"]).fit(MIXED)


@pytest.mark.parametrize("kind", estimators.CLASSES)
def test_settings_that_make_no_sense(kind: type) -> None:
    y = (RESPONSE,) if kind is MixtureOfRegressions else ()
    X = BINARY
    for name, value in {
        "n_components": 0,
        "solver": "adam",
        "n_init": 0.5,
        "tol": -1.0,
        "max_iter": -1,
        "init_params" if kind is GaussianMixture else "init": "best",
    }.items():
        with pytest.raises(ValueError, match=name.removesuffix("_params")):
            kind(**{name: value}).fit(X, *y)
    with pytest.raises(ValueError, match="n_samples >= n_components"):
        kind(n_components=len(X) + 1).fit(X, *y)
    with pytest.raises(NotFittedError):
        kind().predict(X)
    with pytest.raises(NotFittedError):
        kind().save("nowhere.json")


def test_labels_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="whole numbers from -1"):
        GaussianMixture(2).fit(NORMAL, np.where(KNOWN == 1, 2, -1))
    with pytest.raises(ValueError, match="whole numbers from -1"):
        GaussianMixture(2).fit(NORMAL, np.where(KNOWN == 1, 0.5, -1))
    with pytest.raises(ValueError, match="one component for each row"):
        GaussianMixture(2).fit(NORMAL, [-1, 0])


def test_files_that_make_no_sense(tmp_path: Path) -> None:
    estimator, _ = fitted("full")
    path = tmp_path / "mixture.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file"):
        estimators.load(path)
    estimator.save(path)
    with pytest.raises(ValueError, match="expected one of PoissonMixture"):
        PoissonMixture.load(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(ValueError, match="99"):
        estimators.load(path)
    path.write_text(json.dumps({**content, "attributes": {"predict": 1}}))
    with pytest.raises(ValueError, match="predict"):
        estimators.load(path)
    with pytest.raises(ValueError, match="random_state"):
        clone(estimator).set_params(random_state=np.random.RandomState(0)).fit(NORMAL).save(path)


def test_a_way_down_to_the_program() -> None:
    estimator, X = fitted("poisson")
    fit = pyroem.EM().fit(estimator.program_, X, init={"rate": estimator.rates_})
    assert_allclose(fit.log_likelihood, estimator.fit_result_.log_likelihood, rtol=1e-8)


# ---------------------------------------------------------------------------------------
# What a user meets on a bad day


@few
def test_parts_go_on_after_a_fit(name: str, tmp_path: Path) -> None:
    """A small batch moves what a fit to many rows found by its share, not to itself."""
    if name == "t":
        pytest.skip("its statistics are not of fixed size")
    estimator, X = fitted(name)
    one = X[estimator.predict(X) == 0][:20]
    gone_on = copy.deepcopy(clone(estimator).fit(X))
    with_data = clone(estimator).fit(X).partial_fit(one)
    path = tmp_path / "model.json"
    estimator.save(path)
    for found in (with_data, gone_on.partial_fit(one), estimators.load(path).partial_fit(one)):
        before, after = estimator.score(X), found.score(X)
        assert before - 0.15 < after < before + 1e-6
        assert found.weights_[0] > estimator.weights_[0] - 0.02
        assert found.n_samples_seen_ == len(X) + 20
    if name == "latent class":
        return  # of these rows alone it would not know all categories
    alone = clone(estimator).partial_fit(one)
    assert alone.score(X) < estimator.score(X) - 0.5


@few
def test_unknown_labels_in_all_spellings(name: str) -> None:
    estimator, X = MIXTURES[name]
    y = np.where(np.arange(len(X)) < 12, 1 - fitted(name)[0].predict(X), -1)
    wanted = clone(estimator).fit(X, y)
    some = np.where(y < 0, np.nan, y)
    for labels in (some, [None if v != v else v for v in some], pandas.array(some, dtype="Int64")):
        found = clone(estimator).fit(X, labels)
        assert_array_equal(found.predict_proba(X), wanted.predict_proba(X))


def test_rows_that_are_all_alike() -> None:
    X = np.ones((50, 3))
    for kind in (GaussianMixture, PoissonMixture, StudentTMixture):
        with pytest.warns(ConvergenceWarning):
            assert not kind(2).fit(X).converged_
    with pytest.warns(ConvergenceWarning):
        assert not MixtureOfRegressions(2).fit(np.arange(50.0)[:, None], np.ones(50)).converged_


def test_what_only_reg_covar_keeps_up_has_not_converged() -> None:
    X = np.concatenate([np.zeros(40), rng.normal(3, 1, 160)])[:, None]
    with pytest.warns(ConvergenceWarning, match="a variance of component . is nothing but reg_cov"):
        assert GaussianMixture(2, random_state=0).fit(X).status_ == "degenerate"
    constant = np.column_stack([NORMAL, np.full(N, 3.0)])  # no component's own fault
    assert GaussianMixture(2, random_state=0).fit(constant).converged_


def test_separation_is_told() -> None:
    x = np.linspace(-3, 3, 60)[:, None]
    with pytest.warns(ConvergenceWarning, match="the likelihood has no maximum"):
        MixtureOfRegressions(1, family="binomial").fit(x, (x[:, 0] > 0).astype(int))


def test_items_coded_one_and_two_are_told() -> None:
    with pytest.warns(UserWarning, match=r"values 1 and 2, both above binarize=0.*binarize=1\.5"):
        BernoulliMixture(1).fit(BINARY + 1)


def test_refused_settings_are_named() -> None:
    for estimator, match in (
        (GaussianMixture(tol=-1), "tol: expected a number >= 0; got -1"),
        (StudentTMixture(2, df=cast(Any, [3, 5])), "df: expected None or one number > 0"),
        (PoissonMixture(2, fixed=("foo",)), r"names are those of.*fit_result_\.params"),
    ):
        with pytest.raises(ValueError, match=match):
            estimator.fit(COUNTS)
    with pytest.raises(ValueError, match="family: expected one of gaussian, poisson, binomial"):
        MixtureOfRegressions(family="Poisson").fit(NORMAL, RESPONSE)


def test_kinds_by_column_and_text_in_columns() -> None:
    frame = pandas.DataFrame(MIXED, columns=list("abcde"))
    kinds = dict(zip("abcde", KINDS, strict=True))
    named = MixedMixture(2, kinds=kinds, random_state=0).fit(frame)
    plain = MixedMixture(2, kinds=KINDS, random_state=0).fit(frame)
    assert_array_equal(named.predict_proba(frame), plain.predict_proba(frame))
    with pytest.raises(ValueError, match=r"kinds: expected a kind for each of the columns"):
        MixedMixture(2, kinds={"a": "gaussian"}).fit(frame)
    frame["c"] = np.where(frame["c"] > 0, "yes", "no")
    with pytest.raises(ValueError, match=r"columns \['c'\] hold text"):
        MixedMixture(2, kinds=kinds).fit(frame)
    text = frame[["c"]].assign(d=["a", "b", None] * (N // 3)).astype("string")
    assert LatentClass(2, random_state=0).fit(text).categories_[1].tolist() == ["a", "b"]


def test_imputation_of_frames_is_silent() -> None:
    frame = pandas.DataFrame(NORMAL, columns=list("abc"))
    frame.iloc[3, 1] = np.nan
    assert np.isfinite(GaussianMixture(2, random_state=0).fit(frame).impute(frame)).all()
