"""Closed-form EM: E-steps by enumeration, M-steps by the ladder."""

from __future__ import annotations

from dataclasses import dataclass

from pyroem.batch import no_batch
from pyroem.errors import ModelError
from pyroem.loop import State
from pyroem.mstep.update import QUICK, Expected
from pyroem.problem import Problem
from pyroem.solver import Solver
from pyroem.structure import Params


@dataclass(frozen=True, kw_only=True)
class EM(Solver):
    """Expectation-maximisation of ``log p(data | params) + log p(params)``.

    Each iteration computes the posterior of the assignments at ``params`` (E-step) and maximises
    the expected log-joint ``Q(. | params)`` over every parameter (M-step): in closed form where the
    program allows it, else numerically on the expected statistics, else by safeguarded ascent
    steps; ``Fit.explain()`` says which and why. No iteration lowers the objective.

    Source: Dempster, Laird and Rubin (1977); Meng and Rubin (1993) for blocks updated in turn.
    """

    name = "EM"
    monotone = True
    patience = 1

    def check(self, problem: Problem) -> None:
        """EM needs something to sum out."""
        if not problem.structure.assignments and not problem.structure.imputed:
            raise ModelError(
                "The program has no assignment: no unobserved sample site with finite discrete"
                " support. EM has nothing to sum out; use MAP, or add the discrete variable."
            )

    def together(self, problem: Problem) -> bool:
        """Runs of a program with closed forms go as one batch."""
        own = type(self).begin is EM.begin and type(self).step is EM.step
        return own and not no_batch(problem)

    def begin(self, problem: Problem, params: Params) -> State:
        """The E-step at the start."""
        expected, value = _expect(problem, params)
        return State(params, value, 1, expected)

    def step(self, problem: Problem, state: State) -> State:
        """An M-step, then the E-step at the new parameters."""
        params = problem.m_step(state.params, state.memory, effort=QUICK)
        expected, value = _expect(problem, params)
        return State(params, value, state.passes + 1, expected)


def _expect(problem: Problem, params: Params) -> tuple[Expected, float]:
    expected, log_prior = problem.e_step(params)
    return expected, float(expected.log_likelihood + log_prior)
