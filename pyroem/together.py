"""The loop for many EM runs as one batch: what :func:`pyroem.loop.iterate` does for one run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from pyroem.batch import Batch, at, stack
from pyroem.diagnose import MARGIN
from pyroem.interrupt import checkpoint
from pyroem.loop import (
    LOOK,
    NOISE,
    Outcome,
    Progress,
    Record,
    Rule,
    State,
    Status,
    movement,
)
from pyroem.problem import Problem
from pyroem.structure import Params

DROPPED = "dropped early: a variance ran to its floor"


class _Course:
    """One run in the batch."""

    def __init__(self, number: int, params: Params, log_joint: float, seconds: float) -> None:
        self.number, self.params, self.value = number, params, log_joint
        self.history = [Record(0, log_joint, seconds, 1)]
        self.status: Status | None = None
        self.message, self.calm = "", 0

    def end(self, status: Status, message: str = "") -> None:
        self.status, self.message = status, message

    def outcome(self) -> Outcome:
        state = State(self.params, self.value, len(self.history))
        return Outcome(state, self.status or Status.MAX_ITER, tuple(self.history), self.message)


def iterate_together(
    problem: Problem, points: Sequence[Params], rule: Rule, progress: Progress
) -> list[Outcome]:
    """EM from every point, in one batch; a run that has ended leaves it.

    A run ends as in :func:`pyroem.loop.iterate`; one whose variance runs to its floor is dropped
    early. An interrupt ends all that still run.
    """
    clock = time.perf_counter()
    batch, params = Batch(problem, len(points)), stack(points)
    expected, log_joint = batch.e_step(params)
    seconds = time.perf_counter() - clock
    runs = [
        _Course(i, point, value, seconds)
        for i, (point, value) in enumerate(zip(points, log_joint.tolist(), strict=True))
    ]
    for run in runs:
        if not math.isfinite(run.value):
            run.end(Status.NON_FINITE, f"at the start the objective is {run.value}")
    noise = NOISE[problem.structure.program.dtype]
    active = list(runs)  # one for each copy in the batch
    try:
        for iteration in range(1, rule.max_iter + 1):
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
                    calm = abs(change) / problem.rows <= rule.tol
                    calm = calm and movement(at(params, i), at(before, i)) <= rule.param_tol
                    run.calm = run.calm + 1 if calm else 0
                    if run.calm >= rule.patience:
                        run.end(Status.CONVERGED)
                    elif low[i]:
                        run.end(Status.DEGENERATE, DROPPED)
                if run.status is not None:
                    run.params = at(last, i)
            checkpoint()
            going = [i for i, run in enumerate(active) if run.status is None]
            best = max(run.value for run in runs)
            progress(
                f" iteration {iteration}/{rule.max_iter}  {len(going)} of {len(runs)} runs  best"
                f" log_joint {best:.6f}  {seconds:.1f} s"
            )
            if not going:
                break
            if len(going) <= 0.75 * len(active):
                index = torch.tensor(going)
                active = [active[i] for i in going]  # the others have their parameters
                batch = Batch(problem, len(going))
                params = {n: v.index_select(0, index) for n, v in params.items()}
                expected = expected.select(index)
    except KeyboardInterrupt:
        for run in active:
            if run.status is None:
                run.end(Status.INTERRUPTED)
    for i, run in enumerate(active):
        if run.status in (None, Status.INTERRUPTED):
            run.params = at(params, i)
    progress.close()
    return [run.outcome() for run in runs]
