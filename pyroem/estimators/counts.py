"""Mixtures for counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyroem.estimators import densities
from pyroem.estimators.base import Params
from pyroem.estimators.priors import WithPrior
from pyroem.estimators.programs import real_poisson_mixture
from pyroem.models.assignments import Program
from pyroem.models.counts import poisson_mixture


class PoissonMixture(WithPrior):
    """A mixture for counts, whose columns are Poisson, independent given the component.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ Poisson(rates_kj)

    for counts ``X (n_samples, n_features)``; NaN is a missing value. Numbers >= 0 that are not
    whole have the density ``x log(rate) - rate - log Gamma(x + 1)``, a likelihood up to a constant.

    Parameters
    ----------
    {settings}
    {prior}

    Attributes:
    ----------
    weights_, rates_
        ``(n_components,)`` and ``(n_components, n_features)``.
    {attributes}
    """

    def _read(self, X: Any, reset: bool = False) -> NDArray:
        X = super()._read(X, reset)
        if np.nanmin(X, initial=0.0) < 0:
            raise ValueError(
                f"Negative values in data passed to X in {type(self).__name__}: expected counts,"
                f" got {np.nanmin(X)}."
            )
        return X

    def _learn(self, X: NDArray, weights: NDArray | None) -> None:
        super()._learn(X, weights)
        seen = X[~np.isnan(X)]
        self.whole_counts_ = bool(np.all(seen == np.floor(seen)))

    def _make_program(self) -> Program:
        make = poisson_mixture if self.whole_counts_ else real_poisson_mixture
        return make(int(self.n_components), self._own_prior())

    def _take(self, params: Params, dtype: Any) -> None:
        self.weights_ = params["weights"].astype(dtype)
        self.rates_ = np.ascontiguousarray(params["rate"].astype(dtype))

    def _give(self) -> Params:
        weights = self.weights_.astype(np.float64)
        return {"weights": weights / weights.sum(), "rate": self.rates_.astype(np.float64)}

    def _log_density(self, X: NDArray) -> NDArray:
        return densities.poisson(X, self.rates_)

    def _draw(self, rng: np.random.RandomState, k: int, n: int) -> NDArray:
        return rng.poisson(self.rates_[k], (n, self.rates_.shape[1])).astype(np.float64)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        return tags
