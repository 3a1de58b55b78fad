"""Gaussian mixtures: scikit-learn's class on pyroem's program and solvers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from pyroem._pyro import isolated
from pyroem.estimators import densities, initial
from pyroem.estimators.base import Fitted, Params
from pyroem.estimators.labels import agreeing
from pyroem.estimators.paced import LOWEST, PacedEM, in_step
from pyroem.estimators.priors import WithPrior
from pyroem.estimators.shapes import ALIASES, PRIORS, Shape
from pyroem.fit import Fit
from pyroem.loop import Status
from pyroem.models.assignments import Program
from pyroem.models.bayesian import bayesian_gaussian_mixture
from pyroem.models.gaussian import COVARIANCES, gaussian_mixture
from pyroem.solver import Solver
from pyroem.starts import SEARCHES, starts

PROPPED = 1.01  # of reg_covar: a variance below is reg_covar
SKLEARN = ("kmeans", "k-means++", "random", "random_from_data")


class GaussianMixture(WithPrior):
    """A Gaussian mixture, in the place of ``sklearn.mixture.GaussianMixture``.

    It has that class's arguments, attributes and methods, and from the same start the same numbers
    after the same iterations. On purpose it differs in this:

    - ``init_params="auto"`` seeks a start by short runs from many guesses, which finds better
      optima than one run of k-means; scikit-learn's four ways are there too.
    - ``tol=1e-8`` and ``max_iter=1000``: scikit-learn stops at 1e-3, often far from an optimum.
    - ``reg_covar`` adds no more than a thousandth of a column's variance to it, so that columns on
      small scales survive.
    - ``weights_init`` and the first weights of "k-means++" and "random_from_data" sum to one.
    - A fit that ended badly says so: ``converged_`` is True for CONVERGED only, and a
      ``ConvergenceWarning`` has the words (a collapsed component, components that are alike).
    - NaN is a missing value (missing at random), in the fit and in all predictions.
    - ``y`` may say which component some rows belong to (see :meth:`fit`).

    Parameters
    ----------
    n_components
        The number of components.
    covariance_type
        ``"full"``, ``"tied"``, ``"diag"``, ``"spherical"``; ``"tied-diagonal"``,
        ``"tied-spherical"``; or one of mclust's fourteen names, EII to VVV.
    tol, max_iter
        The fit stops when the log-likelihood changes by less than ``tol`` (in nats a row).
    reg_covar
        Added to the variances in each M-step, where ``solver`` is ``"em"``, there is no prior, and
        the covariances of the components share nothing or everything (not for VEI, EVI, VEE, EVV,
        VEV, EVE, EEV, VVE, whose structure it would break).
    n_init
        The number of starts, of which the best is kept.
    init_params
        ``"auto"``, ``"thorough"`` (a longer search), or scikit-learn's ``"kmeans"``,
        ``"k-means++"``, ``"random"``, ``"random_from_data"`` (for data without missing values).
    weights_init, means_init, precisions_init
        Values to start from.
    solver
        ``"em"``, or ``"map"``: gradient ascent by L-BFGS.
    fixed
        Of ``"weights"``, ``"means"``, ``"precisions"``, those that are held at their start, which
        has to be given.
    prior
        None, or ``"weak"``: the conjugate prior that mclust has, under which no component can
        collapse (full, tied, diag, spherical).
    random_state
        Of starts, and of :meth:`sample`.
    warm_start
        Whether a second ``fit`` starts where the one before ended.
    verbose
        Whether to show on stderr how far the fit is.
    verbose_interval
        Has no effect: what is shown is shown once a second.

    Attributes:
    ----------
    weights_, means_
        ``(n_components,)`` and ``(n_components, n_features)``.
    covariances_, precisions_, precisions_cholesky_
        ``(n_components, n_features, n_features)``; of type "tied" ``(n_features, n_features)``, of
        diagonal types ``(n_components, n_features)``, of spherical types ``(n_components,)``.
    {attributes}
    """

    names: ClassVar[Mapping[str, str]] = {"means": "loc"}

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-8,
        reg_covar: float = 1e-6,
        max_iter: int = 1000,
        n_init: int = 1,
        init_params: str = "auto",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        solver: str = "em",
        fixed: Any = (),
        prior: str | None = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.solver = solver
        self.fixed = fixed
        self.prior = prior
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval

    @property
    def _shape(self) -> Shape:
        return Shape(self.covariance_type, self.prior is not None)

    def _check_settings(self, rows: int) -> None:
        super()._check_settings(rows)
        if self.covariance_type not in (*COVARIANCES, *ALIASES):
            raise ValueError(
                f"covariance_type: expected one of {', '.join((*COVARIANCES, *ALIASES))}; got"
                f" {self.covariance_type!r}."
            )
        if self.init_params not in (*SEARCHES, *SKLEARN):
            raise ValueError(
                f"init_params: expected one of {', '.join((*SEARCHES, *SKLEARN))}; got"
                f" {self.init_params!r}."
            )
        whole = isinstance(self.max_iter, int | np.integer) and not isinstance(self.max_iter, bool)
        if not whole or self.max_iter < 0:
            raise ValueError(f"max_iter: expected a whole number >= 0; got {self.max_iter!r}.")
        if not self.reg_covar >= 0:
            raise ValueError(f"reg_covar: expected a number >= 0; got {self.reg_covar!r}.")
        if self.prior is not None and self._shape.mclust not in PRIORS:
            raise ValueError(
                "prior: expected covariance_type full, tied, diag or spherical; got"
                f" {self.covariance_type!r}."
            )
        if self.precisions_init is not None and self._shape.mclust not in PRIORS:
            raise ValueError(
                "precisions_init: expected covariance_type full, tied, diag or spherical; got"
                f" {self.covariance_type!r}."
            )

    def _learn(self, X: NDArray, weights: NDArray | None) -> None:
        super()._learn(X, weights)
        self.ridge_ = initial.ridge(X, weights, self.reg_covar)

    def _make_program(self) -> Program:
        K, prior = int(self.n_components), self._own_prior()
        if prior is None:
            return gaussian_mixture(K, self._shape.mclust)
        return bayesian_gaussian_mixture(K, prior, PRIORS[self._shape.mclust])

    def _take(self, params: Params, dtype: Any) -> None:
        covariances = self._shape.covariances(params[self._shape.spread], self.n_components)
        try:
            cholesky = densities.precision_cholesky(covariances, self._shape.form)
        except np.linalg.LinAlgError as error:
            raise ValueError(initial.SINGULAR) from error
        self.weights_ = params["weights"].astype(dtype)
        self.means_ = np.ascontiguousarray(params["loc"].astype(dtype))
        self.covariances_ = covariances.astype(dtype)
        self.precisions_cholesky_ = cholesky.astype(dtype)
        matrix = self._shape.form in ("full", "tied")
        precisions = cholesky @ np.swapaxes(cholesky, -1, -2) if matrix else cholesky**2
        self.precisions_ = precisions.astype(dtype)

    def _give(self) -> Params:
        params = {"weights": self.weights_, "loc": self.means_}
        params[self._shape.spread] = self._shape.parameter(
            np.asarray(self.covariances_, dtype=np.float64)
        )
        found = {n: np.asarray(v, dtype=np.float64) for n, v in params.items()}
        found["weights"] = found["weights"] / found["weights"].sum()
        return found

    def _log_density(self, X: NDArray) -> NDArray:
        return densities.gaussian(X, self.means_, self.precisions_cholesky_, self._shape.form)

    def _draw(self, rng: np.random.RandomState, k: int, n: int) -> NDArray:
        mean = self.means_[k]
        covariance = self.covariances_ if self._shape.form == "tied" else self.covariances_[k]
        if self._shape.form in ("full", "tied"):
            return rng.multivariate_normal(mean, covariance, n)
        return mean + rng.standard_normal(size=(n, len(mean))) * np.sqrt(covariance)

    def _inits(self, args: tuple[Any, ...], weights: NDArray | None) -> Iterator[Any]:
        """The starts, one after the other, as the core takes them; a search is one."""
        X, K, shape = args[0].numpy(), int(self.n_components), self._shape
        inits = self.weights_init, self.means_init, self.precisions_init
        values = initial.given_values(*inits, shape.form, K, X.shape[1])
        own = zip(("weights", "loc", shape.spread), values, strict=True)
        given = {n: v.astype(np.float64) for n, v in own if v is not None}
        if shape.spread in given:
            given[shape.spread] = shape.parameter(given[shape.spread])
        if self._warm():
            yield self._give()
            return
        if self.init_params in SEARCHES or len(given) == 3:
            yield given or self.init_params
            return
        if np.isnan(X).any():
            raise ValueError(
                f"init_params={self.init_params!r}: expected data without missing values; use"
                " init_params='auto'."
            )
        rng = check_random_state(self.random_state)
        labels = args[1].numpy() if len(args) > 1 else None
        labels = None if labels is None or not (labels >= 0).any() else labels
        simple = self.prior is None and shape.mclust in PRIORS
        for _ in range(int(self.n_init)):
            resp = initial.first_responsibilities(X, K, self.init_params, rng, weights)
            if self.init_params in initial.SEEDS and (labels is not None or not simple):
                resp = initial.nearest_seed(X, resp)
            resp = resp if labels is None else agreeing(resp, labels)
            if not simple:
                yield {"z": resp, **given}
                continue
            found = initial.moments(X, resp, weights, shape.form, self.ridge_)
            if shape.spread not in given:
                initial.check_regular(found[2], shape.form)
            start = dict(zip(("weights", "loc"), found[:2], strict=True))
            yield {**start, shape.spread: shape.parameter(found[2]), **given}

    def _held(self, init: Any) -> tuple[str, ...]:
        given = {
            "weights": self.weights_init,
            "means": self.means_init,
            "precisions": self.precisions_init,
        }
        fixed = (self.fixed,) if isinstance(self.fixed, str) else tuple(self.fixed)
        wrong = [n for n in fixed if n not in given]
        if wrong:
            raise ValueError(f"fixed: expected names of {', '.join(given)}; got {wrong[0]!r}.")
        missing = [n for n in fixed if given[n] is None and not isinstance(init, Mapping)]
        if missing:
            raise ValueError(f"fixed: {missing[0]!r} is held, so give {missing[0]}_init.")
        own = {"weights": "weights", "means": "loc", "precisions": self._shape.spread}
        return tuple(own[n] for n in fixed)

    @property
    def _ridged(self) -> bool:
        return self.prior is None and self._shape.mclust in (*PRIORS, "EEI", "EII")

    def _solver(self, held: tuple[str, ...]) -> Solver:
        if self.solver == "map":
            return super()._solver(held)
        return PacedEM(
            tol=self.tol,
            max_iter=max(int(self.max_iter), 1),
            fixed=held,
            progress=bool(self.verbose),
            ridge=tuple(self.ridge_.tolist()) if self._ridged else (),
        )

    def _run(self, args: tuple[Any, ...], weights: NDArray | None) -> Fit:
        inits = list(self._inits(args, weights))
        searched = inits[0] in SEARCHES if isinstance(inits[0], str) else False
        solver, program = self._solver(self._held(self._warm() and inits[0])), self._make_program()
        if self._warm() and isinstance(solver, PacedEM):
            rows = len(args[0]) if weights is None else weights.sum()
            solver = replace(solver, before=max(self.lower_bound_ * rows, LOWEST))
        exact = all(isinstance(i, Mapping) and "z" not in i and len(i) == 3 for i in inits)
        seed = 0 if exact else check_random_state(self.random_state).randint(2**31 - 1)
        problem = solver.pose(program, args, {}, weights, None, inits[0])
        with isolated(solver.dtype, seed):
            if searched:
                chosen: Any = starts(problem, inits[0], int(self.n_init), seed)
            else:
                chosen = [next(starts(problem, init, 1, seed)) for init in inits]
            if self.max_iter == 0:
                fit = Fitted._result_on(self, args, weights, next(iter(chosen)).params)
                return replace(fit, status=Status.MAX_ITER, history=fit.history[:1])
            fit = solver.solve(problem, chosen, int(self.n_init) if searched else len(chosen))
        return in_step(fit) if isinstance(solver, PacedEM) else fit

    def _propped_up(self, fit: Fit) -> Fit:
        """Degenerate, where nothing but ``reg_covar`` keeps a component from a collapse."""
        shape, ridge = self._shape, self.ridge_
        if fit.status not in (Status.CONVERGED, Status.MAX_ITER) or not self._ridged:
            return fit
        if shape.spread in self._held(fit.params):
            return fit
        spread = np.nanvar(fit.problem.structure.program.args[0].numpy(), axis=0)
        found = shape.covariances(fit.params[shape.spread].numpy(), int(self.n_components))
        if shape.form in ("full", "tied"):
            found = np.diagonal(found, axis1=-2, axis2=-1)
        elif shape.form == "spherical":
            found, ridge, spread = found[:, None], ridge.mean(), spread.mean()
        low = (found <= PROPPED * ridge) & (spread > 10 * ridge)
        if not low.any():
            return fit
        where = np.flatnonzero(low.any(-1)).tolist() if low.ndim == 2 else []
        which = f" of component {', '.join(map(str, where))}" if where else ""
        message = f"a variance{which} is nothing but reg_covar; use fewer components, or a prior"
        return replace(fit, status=Status.DEGENERATE, message=message)

    def _accept(self, fit: Fit, dtype: Any) -> None:
        super()._accept(self._propped_up(fit) if self.solver == "em" else fit, dtype)
        if self.solver == "em":
            self.lower_bounds_ = [r.log_joint / fit.problem.rows for r in fit.history[:-1]]
            self.lower_bound_ = self.lower_bounds_[-1] if self.lower_bounds_ else -np.inf

    def _regularised(self, params: Any) -> Any:
        solver = self._solver(self._held(params))
        return solver.raised(params) if isinstance(solver, PacedEM) else params

    def _n_parameters(self) -> int:
        """The number of free parameters, also of a mixture whose attributes were set by hand."""
        if hasattr(self, "n_parameters_"):
            return self.n_parameters_
        return self._shape.parameters(*self.means_.shape)
