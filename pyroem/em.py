"""Closed-form EM: E-steps by enumeration, M-steps by the ladder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pyroem.accelerate import SCHEMES, Trail, accelerated
from pyroem.batch import no_batch
from pyroem.errors import SettingError
from pyroem.loop import State
from pyroem.mstep.runs import Expected
from pyroem.mstep.update import QUICK, Effort
from pyroem.problem import Problem
from pyroem.solver import Solver
from pyroem.structure import Params

LEARNING_RATE = 0.05
_TITLES = {"squarem": "SQUAREM", "anderson": "Anderson"}


@dataclass(frozen=True, kw_only=True)
class EM(Solver):
    """Expectation-maximisation of ``log p(data | params) + log p(params)``.

    Each iteration computes the posterior of the assignments at ``params`` (E-step) and maximises
    the expected log-joint ``Q(. | params)`` over every parameter (M-step): in closed form where the
    program allows it, else numerically on the expected statistics, else by safeguarded ascent
    steps; ``Fit.explain()`` says which and why. No iteration lowers the objective.

    Parameters
    ----------
    accelerate
        ``"anderson"`` or ``"squarem"`` extrapolate between the steps, never to a lower objective.
        Where states overlap, Anderson acceleration often takes more than ten times fewer passes
        over the data than plain EM, SQUAREM some five times fewer. Of several optima they may find
        another one than plain EM does.
    optimizer, inner_steps
        What makes the steps over the data, in each iteration, for parameters that have neither a
        closed form nor statistics (a neural network, say): ``"lbfgs"``, ``"adam"``, a
        ``torch.optim`` class, or a function from a list of tensors to a torch optimiser
        (``partial(torch.optim.Adam, lr=0.01)``); and how many. Where they end lower than they
        began, they are taken back as far as needed; where that does not help, L-BFGS takes over.

    Source: Dempster, Laird and Rubin (1977); Meng and Rubin (1993) for blocks updated in turn.
    """

    accelerate: str | None = None
    optimizer: Any = "lbfgs"
    inner_steps: int = 10

    monotone = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accelerate not in (None, *SCHEMES):
            raise SettingError(
                f"EM: accelerate must be None, 'squarem' or 'anderson', got {self.accelerate!r}."
            )
        if isinstance(self.inner_steps, bool) or not (
            isinstance(self.inner_steps, int) and self.inner_steps > 0
        ):
            raise SettingError(
                f"EM: inner_steps must be a positive integer, got {self.inner_steps!r}."
            )
        names = ("lbfgs", "adam")
        if self.optimizer not in names and (
            not callable(self.optimizer) or isinstance(self.optimizer, torch.optim.Optimizer)
        ):
            raise SettingError(
                "EM: optimizer must be 'lbfgs', 'adam', a torch.optim class or a function from a"
                f" list of tensors to a torch optimiser, got {self.optimizer!r}."
            )

    @property
    def effort(self) -> Effort:
        """How far each M-step goes."""
        make = self.optimizer
        if isinstance(make, str):
            make = None if make == "lbfgs" else partial(torch.optim.Adam, lr=LEARNING_RATE)
        return replace(QUICK, steps=self.inner_steps, optimiser=make)

    @property
    def name(self) -> str:
        """With the acceleration, if there is one."""
        return "EM" if self.accelerate is None else f"EM ({_TITLES[self.accelerate]})"

    @property
    def patience(self) -> int:
        """An accelerated fit ends after a jump and a plain step that both change nothing."""
        return 1 if self.accelerate is None else 2

    def together(self, problem: Problem) -> bool:
        """Runs of a program with closed forms go as one batch."""
        own = type(self).begin is EM.begin and type(self).step is EM.step
        return own and self.accelerate is None and not no_batch(problem)

    def begin(self, problem: Problem, params: Params) -> State:
        """The E-step at the start."""
        expected, value = _expect(problem, params)
        return State(params, value, 1, expected if self.accelerate is None else Trail(expected))

    def step(self, problem: Problem, state: State) -> State:
        """An M-step, then the E-step at the new parameters, or at a better guess of where to go."""
        if self.accelerate is not None:
            expect, update = partial(_expect, problem), partial(problem.m_step, effort=self.effort)
            scheme = SCHEMES[self.accelerate]
            return accelerated(problem, state, scheme, expect, update, self.param_tol)
        params = problem.m_step(state.params, state.memory, effort=self.effort)
        expected, value = _expect(problem, params)
        return State(params, value, state.passes + 1, expected)


def _expect(problem: Problem, params: Params) -> tuple[Expected, float]:
    expected, log_prior = problem.e_step(params)
    return expected, float(expected.log_likelihood + log_prior)
