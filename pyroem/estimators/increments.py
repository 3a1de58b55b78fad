"""Fits in parts: stepwise EM over the batches that ``partial_fit`` is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from pyroem._pyro import isolated
from pyroem.em import EM
from pyroem.errors import ModelError
from pyroem.estep.engine import MixtureEngine
from pyroem.estimators.base import as_tensor
from pyroem.estimators.labels import UNKNOWN
from pyroem.estimators.mixture import Mixture, draw_rows, without_names
from pyroem.fit import Fit
from pyroem.mstep.runs import Expected
from pyroem.mstep.update import QUICK
from pyroem.problem import Problem, maker_of
from pyroem.statistics import SiteStatistics, add
from pyroem.structure import Params

Self = TypeVar("Self", bound="Increments")
SAMPLE = 200  # rows of the first batch that the program is read on again
DRAWN = 20_000  # rows that stand for those of a fit that are gone
POWER, DELAY = 0.9, 2.0  # of the step sizes, as those of StepwiseEM


@dataclass(frozen=True)
class Running:
    """Where a fit in parts stands.

    ``sample`` are some rows of the first batch, on which the program is read: from them it has the
    centre that the ``statistics`` (of one row) are counted from. ``count`` batches were seen, of
    ``rows`` rows (weighted); the step sizes are those of batch ``age``.
    """

    sample: tuple[Any, ...]
    statistics: dict[str, SiteStatistics]
    count: int
    rows: float
    age: float = 0.0


class Increments(Mixture):
    """Adds ``partial_fit``."""

    def partial_fit(self: Self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """One step of stepwise EM on a batch of rows.

        The first call seeks a start and fits it; after :meth:`fit`, or in an estimator that was
        loaded, it goes on from there, as from a batch of all rows that were seen before.

            s <- (1 - g) s + g S(X),    g = (1 + t / 2)^(-0.9)  at batch t = 0, 1, ...

        with ``S`` the expected statistics of a row of the batch at the current parameters; then an
        M-step from ``s``. ``y`` and ``sample_weight`` are those of :meth:`fit`. ``converged_`` is
        False: nobody knows what comes. Missing values, if any come later, must come in the first
        batch too.

        Source: Cappe and Moulines (2009), J. R. Statist. Soc. B 71, 593-613.
        """
        running: Running | None = self.__dict__.get("_running")
        first = running is None and not hasattr(self, "converged_")
        X, args, weights = self._ready(X, y, sample_weight, reset=first, labelled=True)
        if running is None:
            if first:
                self._accept(self._run(args, weights), X.dtype)
            some = some_rows(X)
            sample = tuple(None if a is None else a[some].clone() for a in args)
            running = Running(sample, {}, 0, 0.0)
            if not first:
                new = len(X) if weights is None else float(weights.sum())
                running = self._behind(running, new)
        if np.isnan(X).any() and not running.sample[0].isnan().any():
            raise ValueError("X: values are missing, but none were in the first batch.")
        check_is_fitted(self)
        params = {n: torch.as_tensor(v) for n, v in self._give().items()}
        problem = self._problem(running)
        batch = None if weights is None else torch.as_tensor(weights)
        running, params, value = advance(problem, running, params, args, batch)
        self._take({n: v.numpy() for n, v in self._regularised(params).items()}, X.dtype)
        self._running, self._fit = running, None
        self.__dict__.pop("report_", None)
        self.converged_, self.status_, self.n_iter_ = False, "max_iter", running.count
        self.n_samples_seen_ = running.rows
        self.lower_bound_, self.lower_bounds_ = value, [value]
        return self

    def _accept(self, fit: Fit, dtype: Any) -> None:
        super()._accept(fit, dtype)
        self.n_samples_seen_ = fit.problem.rows

    def _behind(self, running: Running, new: float) -> Running:
        """With what was seen before by a fit: its rows, or where they are gone rows like them.

        A batch of ``new`` rows then weighs as much as its share of all rows.
        """
        fit: Fit | None = self.__dict__.get("_fit")
        if fit is not None:
            args, weights = fit.problem.structure.program.args, fit.problem.row_weights
        else:
            rng = np.random.RandomState(0)
            rows, _ = draw_rows(rng, self.weights_, DRAWN, lambda k, n: self._draw(rng, k, n))
            with without_names():
                args, weights = (as_tensor(self._read(rows)),), None
        if len(args) == 1:
            args = (*args, torch.full((len(args[0]),), UNKNOWN))
        seen = getattr(self, "n_samples_seen_", float(len(args[0])))
        gain = new / (seen + new)
        age = DELAY * (gain ** (-1 / POWER) - 1)
        params = {n: torch.as_tensor(v) for n, v in self._give().items()}
        found, _, _ = advance(self._problem(running), running, params, args, weights)
        return replace(found, rows=seen, age=age)

    def _regularised(self, params: Params) -> Params:
        """What a subclass does to the parameters after an M-step."""
        return params

    def _problem(self, running: Running) -> Problem:
        """The program, read on the sample; kept as long as this object lives."""
        found = self.__dict__.get("_posed")
        if found is None or found[0] is not running.sample:
            solver = EM(fixed=self._held(self._give()))
            problem = solver.pose(self._make_program(), running.sample, {}, None, None, None)
            found = self._posed = running.sample, problem
        return found[1]


def some_rows(X: NDArray) -> torch.Tensor:
    """Rows to read the program on: from all over the batch, some with missing values among them."""
    spread = np.arange(0, len(X), -(-len(X) // SAMPLE))
    missing = np.flatnonzero(np.isnan(X).any(1))[:SAMPLE]
    return torch.as_tensor(np.union1d(spread, missing))


def advance(
    problem: Problem, running: Running, params: Params, args: tuple[Any, ...], weights: Any
) -> tuple[Running, Params, float]:
    """One batch: the new running statistics and parameters, and the log-likelihood a row before."""
    engine = problem.engine
    if not isinstance(engine, MixtureEngine):
        raise ModelError(f"partial_fit: expected a program with a kernel; {engine.description}.")
    params = {n: problem.structure.value(n, v) for n, v in params.items()}
    what = "The batch"
    rows = maker_of(problem)((args, {}), len(args[0]), weights, what, True)
    with isolated(problem.structure.program.dtype, 0), torch.no_grad():
        found = engine.over([rows], params)
        seen = running.rows + rows.total
        gain = (1 + running.age / DELAY) ** -POWER
        new = {n: s.scaled(gain / rows.total) for n, s in found.statistics.items()}
        if running.statistics:
            old = {n: s.scaled(1 - gain) for n, s in running.statistics.items()}
            new = add(old, new)
        value = float(found.log_likelihood) / rows.total
        whole = {n: s.scaled(seen) for n, s in new.items()}
        params = problem.m_step(params, Expected(found.log_likelihood, whole, {}), effort=QUICK)
    ended = replace(
        running, statistics=new, count=running.count + 1, rows=seen, age=running.age + 1
    )
    return ended, params, value
