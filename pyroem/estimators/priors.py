"""Mixtures that may have a weak conjugate prior, scaled to the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyroem.estimators.increments import Increments
from pyroem.models.priors import Prior, weak_prior

SIZE = 1.0  # rows that the prior counts for


class WithPrior(Increments):
    """A mixture that may have a weak conjugate prior, scaled to the data."""

    def __init__(
        self,
        n_components: int = 1,
        *,
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
        self.prior = prior

    def _learn(self, X: NDArray, weights: NDArray | None) -> None:
        self.__dict__.pop("prior_", None)
        if self.prior is not None:
            found = weighted_prior(X, weights)
            self.prior_ = [found.mean.numpy(), found.covariance.numpy()]

    def _own_prior(self) -> Prior | None:
        if self.prior is None:
            return None
        mean, covariance = (torch.as_tensor(a) for a in self.prior_)
        return Prior(mean, covariance, SIZE)


def weighted_prior(X: NDArray, weights: NDArray | None) -> Prior:
    """:func:`pyroem.models.priors.weak_prior` of weighted rows; a weight of 2 is the row twice."""
    complete = ~np.isnan(X).any(1)
    rows = X[complete].astype(np.float64)
    own = np.ones(len(rows)) if weights is None else weights[complete]
    if weights is None or len(rows) < 2 or own.sum() <= 1:
        return weak_prior(torch.as_tensor(rows), SIZE)
    mean = np.average(rows, axis=0, weights=own)
    apart = rows - mean
    covariance = (own[:, None] * apart).T @ apart / (own.sum() - 1)
    return Prior(torch.as_tensor(mean), torch.as_tensor(covariance), SIZE)
