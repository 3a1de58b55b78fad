"""Mixtures for binary and categorical columns: latent class analysis."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import validate_data

from pyroem.estimators import densities
from pyroem.estimators.base import Params, outside
from pyroem.estimators.labels import is_unknown
from pyroem.estimators.priors import SIZE, WithPrior
from pyroem.models.assignments import Program
from pyroem.models.categories import bernoulli_mixture, latent_class
from pyroem.models.priors import CategoryPrior

UNKNOWN = ("warn", "error", "missing")


class BernoulliMixture(WithPrior):
    """A mixture for binary columns, which are independent given the component.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ Bernoulli(probs_kj)

    for ``X (n_samples, n_features)``; NaN is a missing value.

    Parameters
    ----------
    binarize
        Values above it are 1, the others 0. None: ``X`` must hold 0 and 1 only.
    {settings}
    {prior}

    Attributes:
    ----------
    weights_, probs_
        ``(n_components,)`` and ``(n_components, n_features)``.
    {attributes}
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        binarize: float | None = 0.0,
        prior: str | None = None,
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
        super().__init__(
            n_components,
            prior=prior,
            solver=solver,
            init=init,
            tol=tol,
            max_iter=max_iter,
            n_init=n_init,
            fixed=fixed,
            random_state=random_state,
            warm_start=warm_start,
            verbose=verbose,
        )
        self.binarize = binarize

    def _read(self, X: Any, reset: bool = False) -> NDArray:
        X = super()._read(X, reset)
        missing = np.isnan(X)
        if self.binarize is not None:
            threshold = self.binarize
            if reset:
                self._check_coding(X, threshold)
            return np.where(missing, X, np.greater(X, threshold).astype(X.dtype))
        if not np.all(missing | (X == 0) | (X == 1)):
            wrong = X[~(missing | (X == 0) | (X == 1))][0]
            raise ValueError(f"X: expected 0 and 1, as binarize is None; got {wrong}.")
        return X

    def _check_coding(self, X: NDArray, threshold: float) -> None:
        """Warn of items coded 1 and 2 where both are above ``binarize``."""
        for j, column in enumerate(X.T):
            seen = np.unique(column[~np.isnan(column)])
            if threshold < 1 and seen.tolist() == [1, 2]:
                warnings.warn(
                    f"X: column {j} has the values {seen[0]:g} and {seen[1]:g}, both above"
                    f" binarize={threshold:g}: it tells nothing. Set binarize=1.5.",
                    UserWarning,
                    stacklevel=outside(),
                )

    def _make_program(self) -> Program:
        return bernoulli_mixture(int(self.n_components), self._own_prior())

    def _take(self, params: Params, dtype: Any) -> None:
        self.weights_ = params["weights"].astype(dtype)
        self.probs_ = np.ascontiguousarray(params["probs"].astype(dtype))

    def _give(self) -> Params:
        weights = self.weights_.astype(np.float64)
        return {"weights": weights / weights.sum(), "probs": self.probs_.astype(np.float64)}

    def _log_density(self, X: NDArray) -> NDArray:
        return densities.bernoulli(X, self.probs_)

    def _draw(self, rng: np.random.RandomState, k: int, n: int) -> NDArray:
        return (rng.uniform(size=(n, self.probs_.shape[1])) < self.probs_[k]).astype(np.float64)


class LatentClass(WithPrior):
    """Latent class analysis: categorical columns, independent given the class.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ Categorical(probs_j[k])

    for ``X (n_samples, n_features)`` with values of any kind that can be sorted; each column has
    the categories that ``numpy.unique`` finds in it. NaN (None among objects) is a missing value.

    Parameters
    ----------
    handle_unknown
        What a category is, in new data, that was not in the fit: ``"missing"`` (a missing value),
        ``"warn"`` (the same, with a warning), or ``"error"``.
    {settings}
    {prior}

    Attributes:
    ----------
    weights_
        ``(n_components,)``.
    categories_
        For each column its categories, sorted.
    probs_
        For each column the probabilities of its categories, ``(n_components, n_categories)``.
    {attributes}
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        handle_unknown: str = "warn",
        prior: str | None = None,
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
        super().__init__(
            n_components,
            prior=prior,
            solver=solver,
            init=init,
            tol=tol,
            max_iter=max_iter,
            n_init=n_init,
            fixed=fixed,
            random_state=random_state,
            warm_start=warm_start,
            verbose=verbose,
        )
        self.handle_unknown = handle_unknown

    def _read(self, X: Any, reset: bool = False) -> NDArray:
        """Codes ``(n_samples, n_features)`` from 0; NaN where a value is missing."""
        if self.handle_unknown not in UNKNOWN:
            raise ValueError(
                f"handle_unknown: expected one of {', '.join(UNKNOWN)};"
                f" got {self.handle_unknown!r}."
            )
        values = validate_data(
            self,
            X,
            reset=reset,
            dtype=None,
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
        )
        if values.dtype.kind not in "biufOUS":
            raise ValueError(f"X: expected numbers or strings; got {values.dtype}.")
        if values.dtype.kind == "O":
            values = np.where(
                [[is_unknown(cell) for cell in row] for row in values], np.nan, values
            )
        if reset and not self._warm():
            self.categories_ = [categories_of(column, j) for j, column in enumerate(values.T)]
        pairs = zip(values.T, self.categories_, strict=True)
        codes = [self._codes(column, own, j) for j, (column, own) in enumerate(pairs)]
        return np.stack(codes, 1).astype(np.float32 if values.dtype == np.float32 else np.float64)

    def _codes(self, column: NDArray, categories: NDArray, j: int) -> NDArray:
        missing = is_missing(column)
        codes = np.full(len(column), np.nan)
        seen = column[~missing]
        try:
            at = np.minimum(np.searchsorted(categories, seen), len(categories) - 1)
            known = categories[at] == seen
        except TypeError as error:
            raise ValueError(f"X: column {j} holds values of another kind than the fit.") from error
        if not np.all(known) and self.handle_unknown != "missing":
            told = (
                f"X: column {j} holds {seen[~known][0]!r}, which was not in the fit; expected one"
                f" of {', '.join(map(repr, categories[:10].tolist()))}."
            )
            if self.handle_unknown == "error":
                raise ValueError(told)
            warnings.warn(f"{told} It counts as a missing value.", UserWarning, stacklevel=5)
        codes[~missing] = np.where(known, at, np.nan)
        return codes

    def _learn(self, X: NDArray, weights: NDArray | None) -> None:
        self.__dict__.pop("prior_", None)
        if self.prior is not None:
            own = np.ones(len(X)) if weights is None else weights
            proportions = []
            for column, categories in zip(X.T, self.categories_, strict=True):
                seen = ~np.isnan(column)
                codes = column[seen].astype(np.intp)
                counts = np.bincount(codes, own[seen], minlength=len(categories))
                proportions.append(counts / counts.sum())
            self.prior_ = proportions

    def _make_program(self) -> Program:
        sizes = [len(own) for own in self.categories_]
        if self.prior is None:
            return latent_class(int(self.n_components), sizes)
        prior = CategoryPrior(tuple(torch.as_tensor(p) for p in self.prior_), SIZE)
        return latent_class(int(self.n_components), sizes, prior)

    def _take(self, params: Params, dtype: Any) -> None:
        self.weights_ = params["weights"].astype(dtype)
        columns = range(len(self.categories_))
        self.probs_ = [np.ascontiguousarray(params[f"probs_{j}"].astype(dtype)) for j in columns]

    def _give(self) -> Params:
        weights = self.weights_.astype(np.float64)
        tables = {f"probs_{j}": t.astype(np.float64) for j, t in enumerate(self.probs_)}
        scaled = {name: table / table.sum(1, keepdims=True) for name, table in tables.items()}
        return {"weights": weights / weights.sum(), **scaled}

    def _log_density(self, X: NDArray) -> NDArray:
        return densities.categorical(X, self.probs_)

    def _draw(self, rng: np.random.RandomState, k: int, n: int) -> NDArray:
        columns = []
        for own, table in zip(self.categories_, self.probs_, strict=True):
            share = table[k].astype(np.float64)
            columns.append(own[rng.choice(len(own), size=n, p=share / share.sum())])
        return beside(columns)

    def _sites(self) -> dict[str, list[int]]:
        return {f"x_{j}": [j] for j in range(len(self.categories_))}

    def _decoded(self, values: NDArray) -> NDArray:
        pairs = zip(np.moveaxis(values, -1, 0), self.categories_, strict=True)
        return beside([own[codes.astype(np.intp)] for codes, own in pairs])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        return tags


def beside(columns: list[NDArray]) -> NDArray:
    """Columns as the last dim of one array; of objects, where they are of several kinds."""
    if len({column.dtype for column in columns}) > 1:
        columns = [column.astype(object) for column in columns]
    return np.stack(columns, -1)


def is_missing(column: NDArray) -> NDArray[np.bool_]:
    """Where a column is NaN."""
    if column.dtype.kind == "O":
        return np.array([is_unknown(x) for x in column], dtype=bool)
    return np.isnan(column) if column.dtype.kind == "f" else np.zeros(len(column), dtype=bool)


def categories_of(column: NDArray, j: int) -> NDArray:
    """What ``numpy.unique`` finds in column ``j``, apart from missing values."""
    seen = column[~is_missing(column)]
    if not len(seen):
        raise ValueError(f"X: every value of column {j} is missing.")
    try:
        return np.unique(seen)
    except TypeError as error:
        kinds = ", ".join(sorted({type(x).__name__ for x in seen}))
        raise ValueError(
            f"X: expected values of one kind in column {j}; got {kinds}, which cannot be sorted."
        ) from error


CategoricalMixture = LatentClass
