"""What all estimators share: settings, a fit of their program, its report, files."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from pyroem.em import EM
from pyroem.errors import SettingError
from pyroem.estimators import storage
from pyroem.fit import Fit
from pyroem.gradient import MAP
from pyroem.loop import Status
from pyroem.models.assignments import Program
from pyroem.solver import Solver
from pyroem.starts import SEARCHES

Self = TypeVar("Self", bound="Fitted")
Params = dict[str, NDArray]
NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or increase"
    " max_iter, tol, or check for degenerate data."
)
INITS = (*SEARCHES, "kmeans", "ward", "random")
SETTINGS = """
    n_components
        The number of components.
    solver
        ``"em"`` (closed-form EM) or ``"map"`` (gradient ascent on the same objective by L-BFGS).
    init
        ``"auto"`` (short runs from many guesses; the best goes on), ``"thorough"`` (many more of
        them, and moves from the best), ``"kmeans"``, ``"ward"`` (hierarchical clusters),
        ``"random"``, or a dict from names of the program's parameters to values; what is missing
        is found around them.
    tol
        The fit stops when the log-likelihood changes by no more than this, in nats a row (and no
        parameter moves by more than 1e-5 of its size).
    max_iter
        The most iterations from one start.
    n_init
        The number of starts, of which the best is kept.
    fixed
        Names of the program's parameters (those of ``fit_result_.params``) that are held at the
        values that ``init`` gives.
    random_state
        Of the search for a start, and of :meth:`sample`.
    warm_start
        Whether a second ``fit`` starts where the one before ended.
    verbose
        Whether to show on stderr how far the fit is.
"""
ATTRIBUTES = """
    converged_, n_iter_, lower_bound_, lower_bounds_
        Whether the fit ended as CONVERGED and nothing else, after how many iterations, at which
        objective (nats a row), and the objective of each iteration.
    status_, n_parameters_
        How it ended, in a word; the number of free parameters.
    n_features_in_, feature_names_in_
        The number of columns, and their names if they had any.
"""

PRIOR = """
    prior
        None, or ``"weak"``: a conjugate prior that counts as one row, shared between components.
"""
SHARED = {"{settings}": SETTINGS, "{attributes}": ATTRIBUTES, "{prior}": PRIOR}


class Fitted(BaseEstimator):
    """An estimator that fits a ready-made program.

    A subclass says which (``_make_program``), and how the program's parameters and the estimator's
    attributes become one another (``_take``, ``_give``).
    """

    names: ClassVar[Mapping[str, str]] = {}  # other words for the program's parameters

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for mark, text in SHARED.items():
            cls.__doc__ = (cls.__doc__ or "").replace(f"    {mark}", text.strip("\n"))

    def _make_program(self) -> Program:
        raise NotImplementedError

    def _ready(
        self, X: Any, y: Any, sample_weight: Any, reset: bool = True
    ) -> tuple[NDArray, tuple[Any, ...], NDArray | None]:
        """The rows that count, the program's arguments, and the rows' weights."""
        raise NotImplementedError

    def _take(self, params: Params, dtype: Any) -> None:
        """Set the attributes from the program's parameters."""
        raise NotImplementedError

    def _give(self) -> Params:
        """The program's parameters from the attributes."""
        raise NotImplementedError

    @property
    def program_(self) -> Program:
        """The Pyro program that was fitted; ``fit_result_.params`` are its parameters by name."""
        check_is_fitted(self)
        return self._make_program()

    def prepare(
        self, X: Any, y: Any = None, sample_weight: Any = None
    ) -> tuple[Program, tuple[Any, ...], NDArray | None]:
        """The Pyro program of these settings, the arguments that it is called with, and weights.

        They are for a solver with settings of your own, whose fit :meth:`adopt` takes over::

            program, args, weights = mixture.prepare(X)
            fit = pyroem.EM(accelerate="anderson").fit(program, *args, weights=weights)
            mixture.adopt(fit)
        """
        _, args, weights = self._ready(X, y, sample_weight)
        return self._make_program(), args, weights

    def adopt(self: Self, fit: Fit) -> Self:
        """Take over a fit of this estimator's program, as if :meth:`fit` had made it."""
        self._accept(fit, np.dtype(np.float64))
        return self

    @property
    def fit_result_(self) -> Fit:
        """The :class:`~pyroem.Fit`, which holds the data: no pickle, copy or file takes it along.

        There :meth:`result_on` makes one on data.
        """
        check_is_fitted(self)
        if self.__dict__.get("_fit") is None:
            raise AttributeError(
                f"fit_result_: this {type(self).__name__} was copied, loaded or fitted in parts,"
                " and a Fit belongs to its data. result_on(X) gives one."
            )
        found: Fit = self.__dict__["_fit"]
        return found

    def _result_on(self, args: tuple[Any, ...], weights: Any, params: Any = None) -> Fit:
        params = self._give() if params is None else params
        solver = EM(fixed=tuple(params), max_iter=1)
        return solver.fit(self._make_program(), *args, init=params, weights=weights)

    def explain(self) -> str:
        """How each parameter was updated and why, where the fit started and how it ended."""
        check_is_fitted(self)
        fit = self.__dict__.get("_fit")
        found = fit.explain() if fit is not None else self.__dict__.get("report_")
        return found or f"{type(self).__name__}: {self.status_}, fitted in parts."

    def save(self, path: str | Path) -> None:
        """Write settings and fitted attributes to a JSON file, with all digits of every number."""
        check_is_fitted(self)
        storage.write(path, self._without_data())

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """The estimator in a file that :meth:`save` wrote; it predicts the same to the last bit."""
        return storage.read(path, {cls.__name__: cls})

    def _without_data(self: Self) -> Self:
        """A copy of the estimator with the report in place of the fit."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__)
        fit = copy.__dict__.pop("_fit", None)
        copy.__dict__.pop("_posed", None)
        if fit is not None:
            copy.report_ = fit.explain()
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return BaseEstimator.__getstate__(self._without_data())

    def _check_settings(self, rows: int) -> None:
        """Raise ``ValueError`` for settings outside of what is expected."""
        for name in ("n_components", "n_init"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1; got {value!r}.")
        if not is_number(self.tol) or not self.tol >= 0:
            raise ValueError(f"tol: expected a number >= 0; got {self.tol!r}.")
        if self.solver not in ("em", "map"):
            raise ValueError(f"solver: expected 'em' or 'map'; got {self.solver!r}.")
        if getattr(self, "prior", None) not in (None, "weak"):
            raise ValueError(f"prior: expected None or 'weak'; got {self.prior!r}.")
        if rows < self.n_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components},"
                f" n_samples = {rows}"
            )

    def _held(self, init: Any) -> tuple[str, ...]:
        """The parameters of ``fixed``, by the program's names; ``init`` must give their values."""
        fixed = (self.fixed,) if isinstance(self.fixed, str) else tuple(self.fixed)
        found = tuple(self.names.get(name, name) for name in fixed)
        given = init if isinstance(init, Mapping) else {}
        missing = [n for n, own in zip(fixed, found, strict=True) if own not in given]
        if missing:
            raise ValueError(
                f"fixed: {missing[0]!r} is held at its start, so a value is needed for it; give one"
                " with the start. (The names are those of the program's parameters, as in"
                " fit_result_.params.)"
            )
        return found

    def _solver(self, held: tuple[str, ...]) -> Solver:
        kind = EM if self.solver == "em" else MAP
        return kind(
            tol=self.tol, max_iter=int(self.max_iter), fixed=held, progress=bool(self.verbose)
        )

    def _warm(self) -> bool:
        return self.warm_start and hasattr(self, "converged_")

    def _fit_program(self, args: tuple[Any, ...], weights: Any, init: Any) -> Fit:
        """A fit of the program from ``init``, or from where the fit before ended."""
        if isinstance(init, Mapping):
            init = {self.names.get(name, name): value for name, value in init.items()}
        restarts = 1 if self._warm() or isinstance(init, Mapping) else int(self.n_init)
        init = self._give() if self._warm() else init
        if not isinstance(init, Mapping) and init not in INITS:
            raise SettingError(
                f"init: expected one of {', '.join(INITS)}, or a dict of values; got {init!r}."
            )
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        return self._solver(self._held(init)).fit(
            self._make_program(), *args, init=init, restarts=restarts, seed=seed, weights=weights
        )

    def _accept(self, fit: Fit, dtype: Any) -> None:
        """Set the attributes from a fit; warn where it did not end well."""
        self.__dict__.pop("report_", None)
        self._fit: Fit | None = fit
        self._take({n: v.detach().numpy().astype(np.float64) for n, v in fit.params.items()}, dtype)
        rows = fit.problem.rows
        self.converged_, self.status_ = fit.converged, fit.status.value
        self.n_iter_ = fit.n_iter
        self.lower_bounds_ = [r.log_joint / rows for r in fit.history[1:]]
        self.lower_bound_ = fit.log_joint / rows
        self.n_parameters_ = fit.df
        if not fit.converged and self.max_iter:
            told = f"{fit.status}: {fit.status.explanation}"
            told += f" ({fit.message})" if fit.message else ""
            if fit.status is Status.MAX_ITER:
                told = f"{NOT_CONVERGED} {told}"
            warnings.warn(told, ConvergenceWarning, stacklevel=outside())
        elif fit.message:
            warnings.warn(fit.message, ConvergenceWarning, stacklevel=outside())


def is_number(value: Any) -> bool:
    """Whether a setting is one real number."""
    return isinstance(value, float | int | np.number) and not isinstance(value, bool)


def outside() -> int:
    """The level of the stack at which the package was called, for a warning."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyroem."):
        frame, level = frame.f_back, level + 1
    return level


def row_weights(sample_weight: Any, X: Any) -> NDArray | None:
    """One weight for each row of ``X``, or None; raises where one is negative, or all are zero."""
    if sample_weight is None:
        return None
    return _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)


def selected(rows: NDArray[np.bool_] | None, *arrays: Any) -> tuple[Any, ...]:
    """Those rows of each array; what is None stays so."""
    if rows is None or rows.all():
        return arrays
    return tuple(None if a is None else a[rows] for a in arrays)


def as_tensor(x: Any) -> Any:
    """An array for the program, in double precision where it holds real numbers."""
    x = np.ascontiguousarray(x)
    return torch.as_tensor(x.astype(np.float64) if x.dtype.kind == "f" else x)
