"""Mixtures of Student's t distributions."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyroem.em import EM
from pyroem.estimators import densities
from pyroem.estimators.base import Params, is_number
from pyroem.estimators.mixture import Mixture
from pyroem.models.assignments import Program
from pyroem.models.student_t import student_t_mixture
from pyroem.solver import Solver

COVARIANCES = ("full", "tied", "diag", "spherical")


class StudentTMixture(Mixture):
    """A mixture of Student's t distributions: clusters with heavy tails.

        z_n ~ Categorical(weights),   x_n | z_n = k ~ t(df_k, location_k, scale_k)

    for ``X (n_samples, n_features)``; NaN is a missing value. Where a component has light tails its
    degrees of freedom run off to infinity, along which the likelihood hardly changes: EM is
    accelerated (Anderson), and only the log-likelihood says when it stops. There is no
    ``partial_fit``: the statistics of a t distribution are not of fixed size.

    Parameters
    ----------
    covariance_type
        ``"full"`` or ``"tied"``: multivariate t with a scale matrix of each component, or of all;
        ``"diag"`` or ``"spherical"``: columns that are independent t given the component.
    df
        None: the degrees of freedom are found, one number for each component; or given.
    {settings}

    Attributes:
    ----------
    weights_, locations_, df_
        ``(n_components,)``, ``(n_components, n_features)``, ``(n_components,)``.
    scales_, precisions_cholesky_
        Squared scales (where ``df > 2``, the covariance is ``df / (df - 2)`` times that), and the
        Cholesky factors of their inverses, in the shapes of :class:`GaussianMixture`'s.
    {attributes}
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        df: float | None = None,
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
        self.covariance_type = covariance_type
        self.df = df

    def _check_settings(self, rows: int) -> None:
        super()._check_settings(rows)
        if self.df is not None and not (is_number(self.df) and self.df > 0):
            raise ValueError(f"df: expected None or one number > 0; got {self.df!r}.")
        if self.covariance_type not in COVARIANCES:
            raise ValueError(
                f"covariance_type: expected one of {', '.join(COVARIANCES)}; got"
                f" {self.covariance_type!r}."
            )

    def _solver(self, held: tuple[str, ...]) -> Solver:
        solver = super()._solver(held)
        if not isinstance(solver, EM):
            return solver
        return replace(solver, accelerate="anderson", param_tol=sys.float_info.max)

    @property
    def _matrix(self) -> bool:
        return self.covariance_type in ("full", "tied")

    def _make_program(self) -> Program:
        covariance: Any = {"diag": "diagonal"}.get(self.covariance_type, self.covariance_type)
        return student_t_mixture(int(self.n_components), covariance, self.df)

    def _take(self, params: Params, dtype: Any) -> None:
        spread = params["scale_tril" if self._matrix else "scale"]
        squared = spread @ np.swapaxes(spread, -1, -2) if self._matrix else spread**2
        cholesky = densities.precision_cholesky(squared, self.covariance_type)
        df = params.get("df", np.full(len(params["loc"]), 0.0 if self.df is None else self.df))
        self.weights_, self.df_ = params["weights"].astype(dtype), df.astype(dtype)
        self.locations_ = np.ascontiguousarray(params["loc"].astype(dtype))
        self.scales_, self.precisions_cholesky_ = squared.astype(dtype), cholesky.astype(dtype)

    def _give(self) -> Params:
        weights, squared = self.weights_.astype(np.float64), self.scales_.astype(np.float64)
        found = {"weights": weights / weights.sum(), "loc": self.locations_.astype(np.float64)}
        if self._matrix:
            found["scale_tril"] = np.linalg.cholesky(squared)
        else:
            found["scale"] = np.sqrt(squared)
        return found if self.df is not None else {**found, "df": self.df_.astype(np.float64)}

    def _log_density(self, X: NDArray) -> NDArray:
        own = self.df_, self.locations_, self.precisions_cholesky_
        return densities.student_t(X, *own, self.covariance_type)

    def _draw(self, rng: np.random.RandomState, k: int, n: int) -> NDArray:
        D = self.locations_.shape[1]
        squared = self.scales_ if self.covariance_type == "tied" else self.scales_[k]
        if self._matrix:
            normal = rng.multivariate_normal(np.zeros(D), squared, n)
            return self.locations_[k] + normal / np.sqrt(self._chi(rng, k, (n, 1)))
        normal = rng.standard_normal((n, D)) * np.sqrt(squared)
        return self.locations_[k] + normal / np.sqrt(self._chi(rng, k, (n, D)))

    def _chi(self, rng: np.random.RandomState, k: int, shape: tuple[int, int]) -> NDArray:
        return rng.chisquare(self.df_[k], shape) / self.df_[k]
