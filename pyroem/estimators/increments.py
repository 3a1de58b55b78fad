"""Fits in parts: stepwise EM over the batches that ``partial_fit`` is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from pyroem._pyro import isolated
from pyroem.em import EM
from pyroem.errors import ModelError
from pyroem.estep.engine import MixtureEngine
from pyroem.estimators.mixture import Mixture
from pyroem.mstep.runs import Expected
from pyroem.mstep.update import QUICK
from pyroem.problem import Problem, maker_of
from pyroem.statistics import SiteStatistics, add
from pyroem.structure import Params

Self = TypeVar("Self", bound="Increments")
SAMPLE = 200  # rows of the first batch that the program is read on again
POWER, DELAY = 0.9, 2.0  # of the step sizes, as those of StepwiseEM


@dataclass(frozen=True)
class Running:
    """Where a fit in parts stands.

    ``sample`` are some rows of the first batch, on which the program is read: from them it has the
    centre that the ``statistics`` (of one row) are counted from. ``count`` batches were seen, of
    ``rows`` rows (weighted).
    """

    sample: tuple[Any, ...]
    statistics: dict[str, SiteStatistics]
    count: int
    rows: float


class Increments(Mixture):
    """Adds ``partial_fit``."""

    def partial_fit(self: Self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """One step of stepwise EM on a batch of rows; the first call seeks a start and fits it.

            s <- (1 - g) s + g S(X),    g = (1 + t / 2)^(-0.9)  at batch t = 0, 1, ...

        with ``S`` the expected statistics of a row of the batch at the current parameters; then an
        M-step from ``s``. ``y`` and ``sample_weight`` are those of :meth:`fit`. ``converged_`` is
        False: nobody knows what comes. Missing values, if any come later, must come in the first
        batch too.

        Source: Cappe and Moulines (2009), J. R. Statist. Soc. B 71, 593-613.
        """
        running: Running | None = self.__dict__.get("_running")
        X, args, weights = self._ready(X, y, sample_weight, reset=running is None, labelled=True)
        if running is None:
            self.__dict__.pop("converged_", None)
            self._accept(self._run(args, weights), X.dtype)
            some = some_rows(X)
            sample = tuple(None if a is None else a[some].clone() for a in args)
            running = Running(sample, {}, 0, 0.0)
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
        self.lower_bound_, self.lower_bounds_ = value, [value]
        return self

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
        gain = (1 + running.count / DELAY) ** -POWER
        new = {n: s.scaled(gain / rows.total) for n, s in found.statistics.items()}
        if running.statistics:
            old = {n: s.scaled(1 - gain) for n, s in running.statistics.items()}
            new = add(old, new)
        value = float(found.log_likelihood) / rows.total
        whole = {n: s.scaled(seen) for n, s in new.items()}
        params = problem.m_step(params, Expected(found.log_likelihood, whole, {}), effort=QUICK)
    return Running(running.sample, new, running.count + 1, seen), params, value
