"""EM in scikit-learn's order: its count of iterations, its stopping rule, its regularisation."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import torch

from pyroem.em import EM
from pyroem.fit import Fit
from pyroem.loop import Record, Rule, State
from pyroem.problem import Problem
from pyroem.structure import Params

LOWEST = -sys.float_info.max
MATRICES, SCALES = "covariance", "scale"


@dataclass(frozen=True, kw_only=True)
class PacedEM(EM):
    """EM whose iteration ``n`` goes from ``p_(n-1)`` to ``p_n`` and reports the objective before.

        L_n = log_joint(p_(n-1)),   p_n = M-step(E-step(p_(n-1))) with ``ridge`` on its variances

    It stops after the first iteration with ``|L_n - L_(n-1)| < tol`` a row. ``before`` is ``L_0``,
    where a fit goes on from an earlier one. ``ridge`` has a number for each column: it is added to
    the diagonal of the parameter ``covariance`` or to the squares of the parameter ``scale``. With
    a ridge the objective may fall.

    Source: scikit-learn 1.9, ``sklearn.mixture.GaussianMixture``.
    """

    ridge: tuple[float, ...] = ()
    before: float = LOWEST

    exact = False

    @property
    def monotone(self) -> bool:  # type: ignore[override]
        """Without a ridge it is plain EM."""
        return not any(self.ridge)

    @property
    def rule(self) -> Rule:
        """Below ``tol``, where the loop itself stops at ``tol``; parameters do not matter."""
        below = math.nextafter(self.tol, 0.0)
        return Rule(below, sys.float_info.max, self.max_iter, self.patience)

    def begin(self, problem: Problem, params: Params) -> State:
        """The start, as an iteration before the first would have left it."""
        return State(params, self.before, 0)

    def step(self, problem: Problem, state: State) -> State:
        """The E-step at the parameters, then an M-step."""
        expected, log_prior = problem.e_step(state.params)
        value = float(expected.log_likelihood + log_prior)
        params = problem.m_step(state.params, expected, effort=self.effort)
        return State(self.raised(params), value, state.passes + 1)

    def raised(self, params: Params) -> Params:
        """``params`` with the ridge on the variances, unless they are held."""
        free = [n for n in (MATRICES, SCALES) if n in params and n not in self.fixed]
        if not any(self.ridge) or not free:
            return params
        name, value = free[0], params[free[0]]
        ridge = torch.tensor(self.ridge, dtype=value.dtype)
        if name == MATRICES:
            return {**params, name: value + torch.diag(ridge)}
        by_column = value.dim() == 2  # [K, D], or one scale for all columns
        return {**params, name: (value**2 + (ridge if by_column else ridge.mean())).sqrt()}


def in_step(fit: Fit) -> Fit:
    """The fit with each objective in its history at the parameters that it belongs to."""
    if len(fit.history) < 2:
        return fit
    values = [r.log_joint for r in fit.history[1:]] + [fit.log_joint]
    pairs = zip(fit.history, values, strict=True)
    history = tuple(Record(r.iteration, v, r.seconds, r.passes) for r, v in pairs)
    return replace(fit, history=history)
