"""Mixtures as density estimators, clusterers and transformers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from pyroem.estimators.base import Fitted, as_tensor, row_weights, selected
from pyroem.estimators.densities import draw_rows
from pyroem.estimators.labels import known_components
from pyroem.fit import Fit

Self = TypeVar("Self", bound="Mixture")


class Mixture(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, Fitted):
    """Rows that each come from one of K components.

    A subclass adds ``_log_density`` (rows by components, from its attributes) and ``_draw``.
    """

    weights_: NDArray

    def __init__(
        self,
        n_components: int = 1,
        *,
        solver: str = "em",
        init: Any = "auto",
        tol: float = 1e-8,
        max_iter: int = 1000,
        n_init: int = 1,
        fixed: Any = (),
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.solver = solver
        self.init = init
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.fixed = fixed
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose

    def _log_density(self, X: NDArray) -> NDArray:
        raise NotImplementedError

    def _draw(self, rng: np.random.RandomState, k: int, n: int) -> NDArray:
        raise NotImplementedError

    def _read(self, X: Any, reset: bool = False) -> NDArray:
        """The rows as numbers, with as many columns, and the same names, as in the fit."""
        return validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
        )

    def _learn(self, X: NDArray, weights: NDArray | None) -> None:
        """Set what the program is made from besides the settings: categories, a prior's scale."""

    def fit(self: Self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture to rows ``X (n_samples, n_features)``.

        ``y`` may say which component some rows belong to: whole numbers, ``-1`` where it is not
        known. A ``y`` without any ``-1`` is ignored, as all mixtures of scikit-learn do.
        ``sample_weight`` counts rows: 2 as the row twice, 0 as its absence.
        """
        X, args, weights = self._ready(X, y, sample_weight)
        self._accept(self._run(args, weights), X.dtype)
        for name in ("_running", "_posed"):
            self.__dict__.pop(name, None)
        return self

    def _ready(
        self, X: Any, y: Any, sample_weight: Any, reset: bool = True, labelled: bool = False
    ) -> tuple[NDArray, tuple[Any, ...], NDArray | None]:
        """The rows that count, the program's arguments, and the rows' weights."""
        X = self._read(X, reset=reset)
        weights = row_weights(sample_weight, X)
        self._check_settings(len(X))
        labels = known_components(y, len(X), self.n_components)
        if labelled and labels is None:
            labels = np.full(len(X), -1)
        keep = None if weights is None else weights > 0
        X, labels, weights = selected(keep, X, labels, weights)
        if reset:
            self._learn(X, weights)
        args = (as_tensor(X),) if labels is None else (as_tensor(X), as_tensor(labels))
        return X, args, weights

    def _run(self, args: tuple[Any, ...], weights: NDArray | None) -> Fit:
        return self._fit_program(args, weights, self.init)

    def result_on(self, X: Any, y: Any = None, sample_weight: Any = None) -> Fit:
        """A :class:`~pyroem.Fit` of these rows at the fitted parameters, which it leaves alone."""
        check_is_fitted(self)
        _, args, weights = self._ready(X, y, sample_weight, reset=False)
        return self._result_on(args, weights)

    def _log_joint(self, X: Any) -> NDArray:
        """``log p(x_n, z_n = k)``, rows by components."""
        check_is_fitted(self)
        with np.errstate(divide="ignore"):
            return self._log_density(self._read(X)) + np.log(self.weights_)

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> NDArray[np.int64]:
        """The components of the rows of ``X`` after a fit to them."""
        return self.fit(X, y, sample_weight).predict(X)

    def predict(self, X: Any) -> NDArray[np.int64]:
        """The most probable component of each row."""
        return self._log_joint(X).argmax(1)

    def predict_proba(self, X: Any) -> NDArray:
        """The responsibilities: the posterior probability of each component, for each row."""
        return responsibilities(self._log_joint(X))

    def transform(self, X: Any) -> NDArray:
        """The responsibilities, as features."""
        return self.predict_proba(X)

    @property
    def _n_features_out(self) -> int:
        return len(self.weights_)

    def score_samples(self, X: Any) -> NDArray:
        """The log-likelihood of each row."""
        return log_sum(self._log_joint(X))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """The mean log-likelihood of a row; ``y`` is ignored."""
        found = self.score_samples(X)
        return float(np.average(found, weights=row_weights(sample_weight, found)))

    def sample(self, n_samples: int = 1) -> tuple[NDArray, NDArray[np.int64]]:
        """Draw rows, and the components that they come from; they come component by component."""
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(
                f"Invalid value for 'n_samples': {n_samples}. Expected at least one sample."
            )
        rng = check_random_state(self.random_state)
        return draw_rows(rng, self.weights_, n_samples, lambda k, n: self._draw(rng, k, n))

    def impute(self, X: Any, *, draws: int | None = None, random_state: Any = None) -> NDArray:
        """``X`` with its missing values filled in, given what is seen of each row.

        By what is expected there (in categorical columns by the most probable category); with
        ``draws``, so many times at random, ``(draws, n_samples, n_features)``.
        """
        check_is_fitted(self)
        X = self._read(X)
        if draws is not None and (isinstance(draws, bool) or draws < 1):
            raise ValueError(f"draws: expected None or a whole number >= 1; got {draws!r}.")
        filled = X.copy() if draws is None else np.stack([X] * int(draws))
        gone = np.isnan(X)
        sites = {n: own for n, own in self._sites().items() if gone[:, own].any()}
        if sites:
            seed = int(check_random_state(random_state).randint(2**31 - 1))
            found = self._anchor().impute(as_tensor(X), draws=draws, seed=seed)
            found = {next(iter(sites)): found} if len(sites) == 1 else found
            for name, own in sites.items():
                filled[..., own] = found[name].numpy().reshape((*filled.shape[:-1], len(own)))
        return self._decoded(filled)

    def _sites(self) -> dict[str, list[int]]:
        """The program's observations, and the columns that each has."""
        return {"x": list(range(self.n_features_in_))}

    def _decoded(self, values: NDArray) -> NDArray:
        """The values of the data from the numbers that the program has for them."""
        return values

    def _anchor(self) -> Fit:
        """A fit at the fitted parameters, to some rows without missing values."""
        rng = np.random.RandomState(0)
        rows, _ = draw_rows(rng, self.weights_, 20, lambda k, n: self._draw(rng, k, n))
        with without_names():
            return self.result_on(rows)

    def _n_parameters(self) -> int:
        """The number of free parameters, as scikit-learn's mixtures tell it."""
        return self.n_parameters_

    def _total(self, X: Any, sample_weight: Any) -> tuple[float, float]:
        """The log-likelihood of rows, and their number."""
        found = self.score_samples(X)
        weights = row_weights(sample_weight, found)
        rows = float(len(found) if weights is None else weights.sum())
        return rows * float(np.average(found, weights=weights)), rows

    def aic(self, X: Any, sample_weight: Any = None) -> float:
        """Akaike's criterion on ``X``: ``2 df - 2 log_likelihood``; smaller is better."""
        return 2 * self._n_parameters() - 2 * self._total(X, sample_weight)[0]

    def bic(self, X: Any, sample_weight: Any = None) -> float:
        """Schwarz's criterion on ``X``: ``df log(n_samples) - 2 log_likelihood``."""
        total, rows = self._total(X, sample_weight)
        return self._n_parameters() * math.log(rows) - 2 * total

    def icl(self, X: Any, sample_weight: Any = None) -> float:
        """``bic + 2 H``, with ``H`` the entropy of the responsibilities."""
        found = self.predict_proba(X)
        logs = np.log(np.where(found > 0, found, 1.0))
        weights = row_weights(sample_weight, found)
        entropy = -(found * logs).sum(1)
        weighted = entropy.sum() if weights is None else float(weights @ entropy)
        return self.bic(X, sample_weight) + 2 * float(weighted)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


@contextmanager
def without_names() -> Iterator[None]:
    """For rows that were drawn, and so have no names of columns: no warning of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        yield


def log_sum(joint: NDArray) -> NDArray:
    """``log sum_k exp(joint_nk)`` of each row."""
    most = joint.max(1)
    return most + np.log(np.exp(joint - most[:, None]).sum(1))


def responsibilities(joint: NDArray) -> NDArray:
    """``exp(joint_nk) / sum_k exp(joint_nk)``."""
    found = np.exp(joint - joint.max(1, keepdims=True))
    return found / found.sum(1, keepdims=True)
