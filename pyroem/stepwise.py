"""Stepwise EM: the parameters move after every mini-batch, for data whose single pass is long."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pyroem.errors import ModelError, SettingError
from pyroem.estep.emissions import Sequences
from pyroem.estep.engine import ChainEngine, MixtureEngine, log_prior
from pyroem.estep.kernel import Rows
from pyroem.loop import State
from pyroem.mstep.runs import Expected
from pyroem.mstep.update import QUICK
from pyroem.problem import Problem, maker_of
from pyroem.sampling import take
from pyroem.solver import Solver
from pyroem.statistics import SiteStatistics, add
from pyroem.streaming import Streamed
from pyroem.structure import Params

WARM_UP, CALM = 200, 1e-5  # iterations on the sample; nats a row


@dataclass(frozen=True)
class _Running:
    """The running statistics, scaled to all rows, and the number of mini-batches seen."""

    statistics: dict[str, SiteStatistics]
    count: int


@dataclass(frozen=True, kw_only=True)
class StepwiseEM(Solver):
    """EM that updates the parameters after every mini-batch (online EM).

    With ``S_t`` the expected statistics of mini-batch ``t`` at the current parameters, scaled to
    all rows, the running statistics move by

        s <- (1 - g_t) s + g_t S_t,    g_t = (1 + t / delay)^(-power),    t = 0, 1, ...

    and the M-step is made from them. One iteration is one pass over the data; a mini-batch takes
    rows at random, or, of data in blocks, follows their order, which should then be random.

    Parameters
    ----------
    batch
        The number of rows of a mini-batch.
    power
        Of the step sizes: above 0.5, at most 1. Larger averages over more mini-batches; smaller
        leaves a poor start sooner.
    delay
        The mini-batches in which the steps stay large.
    max_iter
        The number of passes.

    Small steps from far away take long: large data is first fitted on the sample of its rows that
    the program was read on, until the objective changes by less than 1e-5 a row.

    The objective in ``history`` is that of the mini-batches as they were met, each at the
    parameters before it was used (at the start: that of a sample); ``Fit.log_joint`` is exact, and
    takes one more pass. A fit that has used up its passes ends as MAX_ITER; ``EM`` goes on from
    it: ``EM().fit(model, data, init=fit)``.

    Source: Cappe and Moulines (2009), J. R. Statist. Soc. B 71, 593-613; Liang and Klein (2009).
    """

    batch: int = 2000
    power: float = 0.9
    delay: float = 2.0
    max_iter: int = 2

    monotone = False
    out_of_iterations = "its passes are done; EM().fit(..., init=fit) goes on from here"
    patience = 1
    memories = (_Running,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise SettingError(f"StepwiseEM: batch must be a positive integer, got {self.batch!r}.")
        if not 0.5 < self.power <= 1:
            raise SettingError(f"StepwiseEM: power must lie in (0.5, 1], got {self.power!r}.")
        if not self.delay > 0:
            raise SettingError(f"StepwiseEM: delay must be positive, got {self.delay!r}.")

    @property
    def exact(self) -> bool:
        """The objective is that of the mini-batches as they were met."""
        return False

    @property
    def name(self) -> str:
        """Its name in tables."""
        return "stepwise EM"

    def check(self, problem: Problem) -> None:
        """Mini-batches need rows, and statistics that add over them."""
        if not problem.structure.assignments:
            raise ModelError("The program has no assignment: stepwise EM has nothing to sum out.")
        if problem.everywhere is not None:
            raise ModelError("Stepwise EM does not run over several processes; EM does.")
        if not isinstance(problem.engine, MixtureEngine | ChainEngine):
            raise ModelError(
                f"Stepwise EM needs a program with a kernel; here {problem.engine.description}."
            )

    def begin(self, problem: Problem, params: Params) -> State:
        """EM on a sample, where there is one, whose rows stand for all."""
        small, value = problem.sample, -math.inf
        for _ in range(WARM_UP if problem.smaller is not None else 0):
            expected, log_prior = small.e_step(params)
            before, value = value, float(expected.log_likelihood + log_prior)
            if not value - before > CALM * small.rows:
                break
            params = small.m_step(params, expected, effort=QUICK)
        return State(params, float(sum(small.log_joint(params))), 0, None)

    def step(self, problem: Problem, state: State) -> State:
        """One pass over the mini-batches."""
        engine = problem.engine
        assert isinstance(engine, MixtureEngine | ChainEngine)
        over: Any = engine.over
        running: Any = state.memory
        params, total = state.params, torch.zeros((), dtype=problem.structure.program.dtype)
        for rows in minibatches(problem, self.batch, state.passes == 0):
            if not rows.total > 0:
                continue
            with torch.no_grad():
                found = over([rows], params)
            total = total + found.log_likelihood
            share = problem.rows / rows.total
            count = 0 if running is None else running.count
            gain = (1 + count / self.delay) ** -self.power
            new = {n: s.scaled(gain * share) for n, s in found.statistics.items()}
            if running is not None:
                old = {n: s.scaled(1 - gain) for n, s in running.statistics.items()}
                new = add(old, new)
            running = _Running(new, count + 1)
            params = problem.m_step(params, Expected(total, new, {}), effort=QUICK)
        value = float(total + log_prior(engine.plan, params))
        return State(params, value, state.passes + 1, running)


def minibatches(problem: Problem, size: int, check: bool) -> Iterator[Rows | Sequences]:
    """The rows in mini-batches of about ``size``, in random order where that is possible.

    ``check`` asks whether the program makes of a mini-batch what it makes of all rows.
    """
    engine = problem.engine
    assert isinstance(engine, MixtureEngine | ChainEngine)
    if isinstance(engine.chunks, Streamed):
        for rows in engine.chunks:
            yield from rows.parts(size)
        return
    if not problem.structure.unit:  # one sequence
        yield from engine.chunks
        return
    make = maker_of(problem.sample)
    structure = problem.structure
    count = structure.unit_shape[0]
    data = structure.program.args, structure.program.kwargs
    generator = torch.Generator().manual_seed(0)
    # At random, not every so-many-th row: data may have a period.
    shuffled = torch.randperm(count, generator=generator)
    for number, rows_of_batch in enumerate(shuffled.chunk(max(1, round(count / size)))):
        chosen = rows_of_batch.sort().values
        weights = None if problem.row_weights is None else problem.row_weights[chosen]
        few, length = take(data, chosen, count), len(chosen)
        what = f"Mini-batch {number}"
        yield make(few, length, weights, what, check)
