"""The only loop: steps of a solver, the stopping rule, and an honest status."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyroem.diagnose import collapsed
from pyroem.errors import ModelError
from pyroem.interrupt import pause_point
from pyroem.problem import Problem
from pyroem.progress import Progress
from pyroem.structure import Params

NOISE = {torch.float64: 1e-10, torch.float32: 2e-5}  # rounding of the objective, relative
LOOK = 50  # iterations after which a gradient search is looked at for a collapse
STILL = 10  # iterations without any movement after which a search has stalled


class Status(Enum):
    """How a fit ended. Only ``CONVERGED`` is a success."""

    CONVERGED = "converged"
    MAX_ITER = "max_iter"
    DECREASED = "decreased"
    NON_FINITE = "non_finite"
    DEGENERATE = "degenerate"
    SYMMETRIC = "symmetric"
    STALLED = "stalled"
    INTERRUPTED = "interrupted"

    @property
    def explanation(self) -> str:
        """What the status means, in a sentence."""
        return _EXPLANATIONS[self]

    def __str__(self) -> str:
        return self.value.replace("_", " ")


_EXPLANATIONS = {
    Status.CONVERGED: "The objective and the parameters stopped changing.",
    Status.MAX_ITER: "The iterations ran out before the fit settled; raise max_iter.",
    Status.DECREASED: "An iteration lowered the objective by more than rounding; the point before"
    " it is returned.",
    Status.NON_FINITE: "The objective or a parameter became NaN or infinite; the last finite point"
    " is returned.",
    Status.DEGENERATE: "A component collapsed: a variance at its floor, or a state without data.",
    Status.SYMMETRIC: "States that started alike and stayed so, or met at a saddle: no optimum."
    " Give init values that differ by state, or init='auto'.",
    Status.STALLED: "The search can go no further although the gradient has not vanished: a kink, a"
    " bound, or rounding.",
    Status.INTERRUPTED: "The fit was interrupted; the best point so far is returned.",
}


def rank(status: Status, log_joint: float) -> tuple[bool, bool, float]:
    """A key that puts healthy ends first, then the higher objective."""
    finite = math.isfinite(log_joint)
    healthy = status not in (Status.DEGENERATE, Status.NON_FINITE, Status.SYMMETRIC)
    return finite, healthy, log_joint if finite else -math.inf


class Record(NamedTuple):
    """One line of a fit's history. ``passes`` counts evaluations of the program over the data."""

    iteration: int
    log_joint: float
    seconds: float
    passes: int


@dataclass(frozen=True)
class Restart:
    """How one of several starts ended."""

    log_joint: float
    status: Status
    n_iter: int


@dataclass(frozen=True)
class State:
    """Where a solver stands: a point, its objective, and what the next step needs (``memory``).

    ``slope`` is the largest element of the gradient per row, of solvers that know it; ``note`` says
    why the objective is not finite, where that is known; ``done``, that it has settled by a rule of
    the solver's own.
    """

    params: Params
    log_joint: float
    passes: int
    memory: Any = None
    slope: float = 0.0
    note: str = ""
    done: bool = False


class Stepper(Protocol):
    """What the loop needs of a solver."""

    @property
    def monotone(self) -> bool:
        """Whether a step that lowers the objective is an error."""
        ...

    @property
    def exact(self) -> bool:
        """Whether a state's objective is exact, so that the best state can be told."""
        ...

    def begin(self, problem: Problem, params: Params) -> State:
        """The state at the start."""
        ...

    def step(self, problem: Problem, state: State) -> State:
        """One iteration."""
        ...


@dataclass(frozen=True)
class Rule:
    """When to stop: see :func:`iterate`."""

    tol: float
    param_tol: float
    max_iter: int
    patience: int
    words: str = ""  # of a rule of the solver's own
    keep_path: bool = False  # whether to keep the parameters of every iteration


@dataclass(frozen=True)
class Outcome:
    """The end of one run from one start.

    ``parts`` are the log-likelihood and the log prior there, where they are known.
    """

    state: State
    status: Status
    history: tuple[Record, ...]
    message: str = ""
    parts: tuple[float, float] | None = None
    path: tuple[Params, ...] = ()


@dataclass(frozen=True)
class Course:
    """Where a run stands between two iterations: all that it takes to go on from there.

    ``history`` may have grown since; :meth:`trimmed` gives it as it was.
    """

    iteration: int
    state: State
    best: State
    history: list[Record]
    calm: int = 0
    still: int = 0
    fallen: bool = False
    path: list[Params] = field(default_factory=list)

    def trimmed(self) -> Course:
        """With the history up to its iteration only."""
        upto = self.iteration + 1
        return replace(self, history=self.history[:upto], path=self.path[:upto])


def iterate(
    problem: Problem,
    solver: Stepper,
    params: Params,
    rule: Rule,
    *,
    progress: Progress,
    interrupted: bool = False,
    course: Course | None = None,
    keep: Callable[[Course], None] = lambda course: None,
) -> Outcome:
    """Step until the objective changes by at most ``tol`` a row and every parameter by at most
    ``param_tol`` of its size, ``patience`` times in a row; at most ``max_iter`` times. A change of
    the objective within its rounding counts as none where the parameters move by theirs only.

    Never raises for a bad fit: the status says what happened. The best point seen is returned.
    ``keep`` is told where the run stands after every iteration that is not its last; given back
    as ``course``, the run goes on from there as if it had never ended.
    """
    clock = time.perf_counter() - (course.history[-1].seconds if course else 0.0)
    if course is None:
        state = _attempt(lambda: solver.begin(problem, params), State(params, math.nan, 1))
        history = [Record(0, state.log_joint, time.perf_counter() - clock, state.passes)]
        if not _finite(state):
            message = f"at the start {_culprit(state)}"
            return Outcome(state, Status.NON_FINITE, tuple(history), message)
        if interrupted:
            return Outcome(state, Status.INTERRUPTED, tuple(history))
        course = Course(0, state, state, history, path=_kept(state) if rule.keep_path else [])
    state, best, history = course.state, course.best, list(course.history)
    path = list(course.path)
    calm, still, fallen = course.calm, course.still, course.fallen
    noise = NOISE[problem.structure.program.dtype]
    rounding = 8 * torch.finfo(problem.structure.program.dtype).eps
    status, message = Status.MAX_ITER, ""
    try:
        keep(course)
        for iteration in range(course.iteration + 1, rule.max_iter + 1):
            new = _attempt(partial(solver.step, problem, state), state)
            record = Record(iteration, new.log_joint, time.perf_counter() - clock, new.passes)
            if not _finite(new):
                status, message = Status.NON_FINITE, _culprit(new)
                break
            slack = noise * max(1.0, abs(state.log_joint))
            change = new.log_joint - state.log_joint
            if solver.monotone and change < -slack:
                message = f"iteration {iteration} lowered the objective by {-change:.3g}"
                floors = collapsed(problem, new.params)  # there an update is no maximiser
                status = Status.DEGENERATE if floors else Status.DECREASED
                message = "; ".join([*floors, message])
                break
            history.append(record)
            old, state = state, new
            path += _kept(state) if rule.keep_path else []
            if state.log_joint > best.log_joint:
                best = state
            tol = max(rule.tol, _resolution(problem, state))
            settled = abs(change) / problem.rows <= tol
            level = new.slope <= steepest(problem, state, rule.tol)
            # How far the parameters moved matters only where the objective did not.
            near = settled or abs(change) <= slack
            moved = movement(new.params, old.params) if near else math.inf
            settled = settled or moved <= rounding  # the objective is not known better than that
            still = still + 1 if moved == 0 and change == 0 else 0
            calm = calm + 1 if settled and level and moved <= rule.param_tol else 0
            if progress.due():
                progress.iteration(
                    iteration,
                    (tol, rule.param_tol, rule.max_iter),
                    record.log_joint,
                    change / problem.rows,
                    movement(new.params, old.params),
                    record.seconds,
                    geometric=solver.monotone,
                )
            if calm >= rule.patience or new.done:
                status = Status.CONVERGED
                break
            if not solver.monotone and iteration % LOOK == 0:
                before, fallen = fallen, bool(collapsed(problem, state.params))
                if before and fallen:
                    break  # a collapse only goes on: the verdict on it is the caller's
            if still >= STILL:
                status = Status.STALLED
                break
            keep(Course(iteration, state, best, history, calm, still, fallen, path))
            pause_point()
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    good = not solver.exact or state.log_joint >= best.log_joint - noise * abs(best.log_joint)
    last = state if good else best
    return Outcome(last, status, tuple(history), message, path=tuple(path))


def _kept(state: State) -> list[Params]:
    return [{name: value.detach().clone() for name, value in state.params.items()}]


def _attempt(step: Callable[[], State], state: State) -> State:
    """A step; where the program cannot run at the point that it leads to, a state without value."""
    try:
        return step()
    except (ModelError, torch.linalg.LinAlgError) as error:
        return replace(state, log_joint=math.nan, note=" ".join(str(error).split()))


def resolution(dtype: torch.dtype, log_joint: float, rows: float) -> float:
    """In float32 the objective itself is known to so much a row only."""
    return 0.0 if dtype == torch.float64 else 1e-2 * NOISE[torch.float32] * abs(log_joint) / rows


def _resolution(problem: Problem, state: State) -> float:
    return resolution(problem.structure.program.dtype, state.log_joint, problem.rows)


def steepest(problem: Problem, state: State, tol: float) -> float:
    """The largest gradient per row that an optimum may have."""
    return 10 * math.sqrt(tol + _resolution(problem, state))


def _finite(state: State) -> bool:
    if not math.isfinite(state.log_joint):
        return False
    total = sum((v.detach().sum() for v in state.params.values()), 0.0)
    return math.isfinite(total) or all(bool(v.isfinite().all()) for v in state.params.values())


def _culprit(state: State) -> str:
    if state.note:
        return state.note
    bad = [n for n, v in state.params.items() if not v.isfinite().all()]
    if bad:
        return f"parameter '{bad[0]}' is not finite"
    return f"the objective became {state.log_joint}"


def movement(new: Params, old: Params) -> float:
    """The largest change of any parameter, relative to the parameter's own largest element."""

    def relative(a: Tensor, b: Tensor) -> float:
        if not a.numel():
            return 0.0
        size = torch.maximum(a.abs().max(), b.abs().max())
        return float((a - b).abs().max() / size) if size > 0 else 0.0

    return max((relative(new[n], old[n]) for n in new), default=0.0)
