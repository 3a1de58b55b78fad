"""Mixtures of regressions, as regressors."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, gammaln, log_softmax
from sklearn.base import RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from pyroem.estimators.base import (
    Fitted,
    Params,
    as_tensor,
    row_weights,
    selected,
)
from pyroem.estimators.labels import known_components
from pyroem.estimators.mixture import log_sum, responsibilities
from pyroem.fit import Fit
from pyroem.models.assignments import Program
from pyroem.models.regression import mixture_of_regressions

Self = TypeVar("Self", bound="MixtureOfRegressions")
FAMILIES = ("gaussian", "poisson", "binomial")


class MixtureOfRegressions(RegressorMixin, Fitted):
    """A mixture of K regressions of ``y`` on ``X``, without knowing which row is whose.

        z_n ~ Categorical(weights),   eta_nk = intercept_k + coef_k . x_n
        y_n | z_n = k  ~  Normal(eta_nk, scale_k), Poisson(exp(eta_nk)) or Binomial(1, logit eta_nk)

    As a regressor it predicts the mean of the mixture, and ``score`` is R squared. What asks about
    components needs ``y`` too, and has names that scikit-learn's checks allow a regressor:
    ``responsibilities(X, y)``, ``predict_component(X, y)``, ``log_prob(X, y)``. ``labels`` in
    ``fit`` say which component some rows belong to.

    Parameters
    ----------
    family
        ``"gaussian"``, ``"poisson"`` (``y`` are counts) or ``"binomial"`` (``y`` is 0 or 1).
    fit_intercept
        Whether each regression has an intercept.
    concomitant
        Whether the weights depend on ``X`` by a softmax gate (a mixture of experts).
    {settings}

    Attributes:
    ----------
    coef_, intercept_
        ``(n_components, n_features)`` and ``(n_components,)``.
    weights_
        ``(n_components,)``; of a mixture of experts their mean over the rows of the fit.
    gate_
        Of a mixture of experts: the coefficients of the gate, the intercept first if there is one.
    scale_
        ``(n_components,)``, of the Gaussian family.
    {attributes}
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        family: str = "gaussian",
        fit_intercept: bool = True,
        concomitant: bool = False,
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
        self.family = family
        self.fit_intercept = fit_intercept
        self.concomitant = concomitant
        self.solver = solver
        self.init = init
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.fixed = fixed
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose

    def _read(self, X: Any, y: Any, reset: bool = False) -> tuple[NDArray, NDArray]:
        if self.family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}; got {self.family!r}.")
        X, y = validate_data(
            self,
            X,
            y,
            reset=reset,
            dtype=[np.float64, np.float32],
            y_numeric=True,
            ensure_min_samples=2 if reset else 1,
        )
        if self.family != "gaussian":
            most = np.inf if self.family == "poisson" else 1
            wrong = y[(y < 0) | (y > most) | (y != np.floor(y))]
            if len(wrong):
                wanted = "counts" if self.family == "poisson" else "0 and 1"
                raise ValueError(f"y: family {self.family!r} expects {wanted}; got {wrong[0]}.")
        return X, y.astype(np.float64)

    def fit(self: Self, X: Any, y: Any, sample_weight: Any = None, labels: Any = None) -> Self:
        """Fit to rows ``X (n_samples, n_features)`` and responses ``y (n_samples,)``.

        ``sample_weight`` counts rows: 2 as the row twice, 0 as its absence. ``labels`` are the
        components of the rows, ``-1`` where they are not known.
        """
        X, args, weights = self._ready(X, y, sample_weight, labels=labels)
        self._accept(self._run(args, weights), X.dtype)
        return self

    def _accept(self, fit: Fit, dtype: Any) -> None:
        super()._accept(fit, dtype)
        if self.concomitant:
            X, weights = fit.problem.structure.program.args[0].numpy(), fit.problem.row_weights
            share = np.exp(self._log_weights(X))
            own = None if weights is None else weights.numpy()
            self.weights_ = np.average(share, axis=0, weights=own).astype(dtype)

    def _ready(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        reset: bool = True,
        labels: Any = None,
    ) -> tuple[NDArray, tuple[Any, ...], NDArray | None]:
        """The rows that count, the program's arguments, and the rows' weights."""
        X, y = self._read(X, y, reset)
        weights = row_weights(sample_weight, X)
        self._check_settings(len(X))
        known = known_components(labels, len(X), self.n_components)
        keep = None if weights is None else weights > 0
        X, y, known, weights = selected(keep, X, y, known, weights)
        args = tuple(as_tensor(a) for a in (X, y, known) if a is not None)
        return X, args, weights

    def _run(self, args: tuple[Any, ...], weights: NDArray | None) -> Fit:
        return self._fit_program(args, weights, self.init)

    def _make_program(self) -> Program:
        family: Any = self.family
        intercept, gated = bool(self.fit_intercept), bool(self.concomitant)
        return mixture_of_regressions(int(self.n_components), family, intercept, gated)

    def _take(self, params: Params, dtype: Any) -> None:
        own = params["coefficients"].astype(dtype)
        self.coef_ = np.ascontiguousarray(own[:, 1:] if self.fit_intercept else own)
        self.intercept_ = own[:, 0].copy() if self.fit_intercept else np.zeros(len(own), dtype)
        if self.concomitant:
            self.gate_ = np.ascontiguousarray(params["gate"].astype(dtype))
        else:
            self.weights_ = params["weights"].astype(dtype)
        if self.family == "gaussian":
            self.scale_ = params["scale"].astype(dtype)

    def _give(self) -> Params:
        own = [self.intercept_[:, None], self.coef_] if self.fit_intercept else [self.coef_]
        found: Params = {"coefficients": np.concatenate(own, 1).astype(np.float64)}
        if self.concomitant:
            found["gate"] = self.gate_.astype(np.float64)
        else:
            weights = self.weights_.astype(np.float64)
            found["weights"] = weights / weights.sum()
        if self.family == "gaussian":
            found["scale"] = self.scale_.astype(np.float64)
        return found

    def result_on(self, X: Any, y: Any, sample_weight: Any = None, labels: Any = None) -> Fit:
        """A :class:`~pyroem.Fit` of these rows at the fitted parameters, which it leaves alone."""
        check_is_fitted(self)
        _, args, weights = self._ready(X, y, sample_weight, reset=False, labels=labels)
        return self._result_on(args, weights)

    def _covariates(self, X: Any) -> NDArray:
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=[np.float64, np.float32])

    def _log_weights(self, X: NDArray) -> NDArray:
        """``log p(z_n = k | x_n)``, rows by components."""
        if not self.concomitant:
            return np.broadcast_to(np.log(self.weights_), (len(X), len(self.weights_)))
        gate = self.gate_
        logits = X @ gate[:, 1:].T + gate[:, 0] if self.fit_intercept else X @ gate.T
        return log_softmax(logits, axis=1)

    def _means(self, X: NDArray) -> NDArray:
        """The mean response of each component, rows by components."""
        eta = X @ self.coef_.T + self.intercept_
        return {"gaussian": lambda e: e, "poisson": np.exp, "binomial": expit}[self.family](eta)

    def _log_joint(self, X: Any, y: Any) -> NDArray:
        check_is_fitted(self)
        X, y = self._read(X, y)
        eta, y = X @ self.coef_.T + self.intercept_, y[:, None]
        if self.family == "gaussian":
            apart = (y - eta) / self.scale_
            found = -0.5 * apart**2 - np.log(self.scale_) - 0.5 * math.log(2 * math.pi)
        elif self.family == "poisson":
            found = y * eta - np.exp(eta) - gammaln(y + 1)
        else:
            found = y * eta - np.logaddexp(0, eta)
        return found + self._log_weights(X)

    def predict(self, X: Any) -> NDArray:
        """The mean of ``y`` given ``x``: ``sum_k p(k | x) E[y | x, k]``."""
        X = self._covariates(X)
        return (np.exp(self._log_weights(X)) * self._means(X)).sum(1)

    def predict_means(self, X: Any) -> NDArray:
        """The mean of ``y`` under each component, rows by components."""
        return self._means(self._covariates(X))

    def responsibilities(self, X: Any, y: Any = None) -> NDArray:
        """``p(k | x, y)``, rows by components; without ``y`` that is ``p(k | x)``."""
        if y is None:
            return np.exp(self._log_weights(self._covariates(X)))
        return responsibilities(self._log_joint(X, y))

    def predict_component(self, X: Any, y: Any = None) -> NDArray[np.int64]:
        """The most probable component of each row."""
        return self.responsibilities(X, y).argmax(1)

    def log_prob(self, X: Any, y: Any) -> NDArray:
        """``log p(y_n | x_n)`` of each row."""
        return log_sum(self._log_joint(X, y))

    def sample(self, X: Any) -> tuple[NDArray, NDArray[np.int64]]:
        """Draw a response for each row of ``X``, and the components that they come from."""
        X = self._covariates(X)
        rng = check_random_state(self.random_state)
        shares = np.exp(self._log_weights(X)).cumsum(1)
        z = (rng.uniform(size=(len(X), 1)) * shares[:, -1:] > shares).sum(1)
        mean = self._means(X)[np.arange(len(X)), z]
        if self.family == "gaussian":
            return rng.normal(mean, self.scale_[z]), z
        drawn = rng.poisson(mean) if self.family == "poisson" else rng.binomial(1, mean)
        return drawn.astype(np.float64), z

    def _total(self, X: Any, y: Any, sample_weight: Any) -> tuple[float, float]:
        found = self.log_prob(X, y)
        weights = row_weights(sample_weight, found)
        rows = float(len(found) if weights is None else weights.sum())
        return rows * float(np.average(found, weights=weights)), rows

    def aic(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Akaike's criterion: ``2 df - 2 log_likelihood``; smaller is better."""
        return 2 * self.n_parameters_ - 2 * self._total(X, y, sample_weight)[0]

    def bic(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Schwarz's criterion: ``df log(n_samples) - 2 log_likelihood``."""
        total, rows = self._total(X, y, sample_weight)
        return self.n_parameters_ * math.log(rows) - 2 * total

    def icl(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """``bic + 2 H``, with ``H`` the entropy of the responsibilities."""
        found = self.responsibilities(X, y)
        entropy = -(found * np.log(np.where(found > 0, found, 1.0))).sum(1)
        weights = row_weights(sample_weight, found)
        total = entropy.sum() if weights is None else weights @ entropy
        return self.bic(X, y, sample_weight) + 2 * float(total)
