"""The loop for many EM runs as one batch: what :func:`pyroem.loop.iterate` does for one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyroem.batch import Batch, at, stack
from pyroem.diagnose import MARGIN
from pyroem.estep.kernel import Rows
from pyroem.estep.stacked import selected
from pyroem.interrupt import pause_point
from pyroem.loop import (
    LOOK,
    NOISE,
    Outcome,
    Record,
    Rule,
    State,
    Status,
    movement,
    resolution,
)
from pyroem.mstep.runs import Expected
from pyroem.problem import Problem
from pyroem.progress import Progress
from pyroem.structure import Params

DROPPED = "dropped early: a variance ran to its floor"


@dataclass
class Member:
    """One run in the batch; without a status it still goes."""

    number: int
    params: Params
    value: float
    history: list[Record]
    status: Status | None = None
    message: str = ""
    calm: int = 0

    def end(self, status: Status, message: str = "") -> None:
        """Leave the batch."""
        self.status, self.message = status, message

    def outcome(self) -> Outcome:
        """How it ended."""
        state = State(self.params, self.value, len(self.history))
        return Outcome(state, self.status or Status.MAX_ITER, tuple(self.history), self.message)


@dataclass(frozen=True)
class Together:
    """Where a batch stands between two iterations: all that it takes to go on from there.

    ``active`` are the numbers of the runs whose copies are in the batch.
    """

    iteration: int
    runs: tuple[Member, ...]
    active: tuple[int, ...]
    params: Params
    expected: Expected

    @property
    def open(self) -> bool:
        """Whether some run has not ended."""
        return any(run.status is None for run in self.runs)

    def trimmed(self) -> Together:
        """With histories up to its iteration only."""
        runs = (replace(r, history=r.history[: self.iteration + 1]) for r in self.runs)
        return replace(self, runs=tuple(runs))


def iterate_together(
    problem: Problem,
    points: Sequence[Params],
    rule: Rule,
    progress: Progress,
    course: Together | None = None,
    keep: Callable[[Together], None] | None = None,
    weights: Tensor | None = None,
    rows: Rows | None = None,
) -> list[Outcome]:
    """EM from every point, in one batch; a run that has ended leaves it.

    A run ends as in :func:`pyroem.loop.iterate`; one whose variance runs to its floor is dropped
    early. An interrupt ends all that still run. ``keep`` and ``course`` are as there. ``weights``
    (runs by rows) are row weights of each run's own, ``rows`` the data of each run, stacked.
    """
    clock = time.perf_counter()
    sizes = [problem.rows] * len(points) if weights is None else weights.sum(1).tolist()

    def batch_of(numbers: Sequence[int]) -> Batch:
        own = None if weights is None else weights[list(numbers)]
        data = None if rows is None else selected(rows, torch.tensor(numbers))
        return Batch(problem, len(numbers), own, data)

    if course is None:
        batch, params = batch_of(range(len(points))), stack(points)
        expected, log_joint = batch.e_step(params)
        seconds = time.perf_counter() - clock
        runs = [
            Member(i, point, value, [Record(0, value, seconds, 1)])
            for i, (point, value) in enumerate(zip(points, log_joint.tolist(), strict=True))
        ]
        for run in runs:
            if not math.isfinite(run.value):
                run.end(Status.NON_FINITE, f"at the start the objective is {run.value}")
        active = list(runs)  # one for each copy in the batch
        first = 1
    else:
        clock -= max(run.history[-1].seconds for run in course.runs)
        batch, params, expected = batch_of(course.active), course.params, course.expected
        runs = [replace(run, history=list(run.history)) for run in course.runs]
        active, first = [runs[i] for i in course.active], course.iteration + 1
    dtype = problem.structure.program.dtype
    noise = NOISE[dtype]

    def tell(iteration: int) -> None:
        if keep is not None:
            copies = tuple(replace(run) for run in runs)
            numbers = tuple(run.number for run in active)
            keep(Together(iteration, copies, numbers, params, expected))

    try:
        tell(first - 1)
        for iteration in range(first, rule.max_iter + 1):
            new = batch.m_step(params, expected)
            expected, log_joint = batch.e_step(new)
            seconds = time.perf_counter() - clock
            before, params = params, new
            low = [False] * len(active)
            if iteration % LOOK == 0:
                low = batch.collapsed(params, MARGIN).tolist()
            for i, (run, value) in enumerate(zip(active, log_joint.tolist(), strict=True)):
                if run.status is not None:
                    continue
                last = before  # where the run stands if it ends badly
                change = value - run.value
                if not math.isfinite(value):
                    run.end(Status.NON_FINITE, f"the objective became {value}")
                elif change < -noise * max(1.0, abs(run.value)):
                    message = f"iteration {iteration} lowered the objective by {-change:.3g}"
                    run.end(Status.DECREASED, message)
                else:
                    run.history.append(Record(iteration, value, seconds, iteration + 1))
                    run.value, last = value, params
                    tol = max(rule.tol, resolution(dtype, value, sizes[run.number]))
                    calm = abs(change) / sizes[run.number] <= tol
                    calm = calm and movement(at(params, i), at(before, i)) <= rule.param_tol
                    run.calm = run.calm + 1 if calm else 0
                    if run.calm >= rule.patience:
                        run.end(Status.CONVERGED)
                    elif low[i]:
                        run.end(Status.DEGENERATE, DROPPED)
                if run.status is not None:
                    run.params = at(last, i)
            going = [i for i, run in enumerate(active) if run.status is None]
            if going and progress.due():
                note = f"{len(going)} of {len(runs)} runs go on"
                slowest = max(_change(active[i]) / sizes[active[i].number] for i in going)
                moved = max(movement(at(params, i), at(before, i)) for i in going)
                limits = (rule.tol, rule.param_tol, rule.max_iter)
                best = max(run.value for run in runs)
                progress.iteration(iteration, limits, best, slowest, moved, seconds, note=note)
            if not going:
                break
            if len(going) <= 0.75 * len(active):
                index = torch.tensor(going)
                active = [active[i] for i in going]  # the others have their parameters
                batch = batch_of([run.number for run in active])
                params = {n: v.index_select(0, index) for n, v in params.items()}
                expected = expected.select(index)
            tell(iteration)
            pause_point()
    except KeyboardInterrupt:
        for run in active:
            if run.status is None:
                run.end(Status.INTERRUPTED)
    for i, run in enumerate(active):
        if run.status in (None, Status.INTERRUPTED):
            run.params = at(params, i)
    return [run.outcome() for run in runs]


def _change(run: Member) -> float:
    return abs(run.history[-1].log_joint - run.history[-2].log_joint)
