"""The search for a start: short EM runs from many guesses, of which fewer and fewer go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from pyroem.batch import Batch, no_batch, stack, unstack
from pyroem.diagnose import collapsed
from pyroem.guesses import guessed_together, placed, pooled_point
from pyroem.interrupt import pause_point
from pyroem.moves import moves, shakes
from pyroem.mstep.plan import Rung
from pyroem.mstep.update import Effort
from pyroem.problem import Problem
from pyroem.structure import Params

LAPS = ((4, 0.5), (10, 0.5), (100, 1.0))  # EM iterations of a race, and the share that goes on
BRIEF = Effort(1, 5, 3, 2)  # the effort of an M-step in the race
KINDS = ("kmeans", "random", "sphered")
TREES = {"kmeans": "ward", "sphered": "sphered ward"}  # one guess beside those of a kind
_HOW = {
    "kmeans": "k-means",
    "random": "random",
    "sphered": "k-means (sphered)",
    "ward": "Ward's",
    "sphered ward": "Ward's (sphered)",
}
ALIKE = 1e-5  # difference of the objective per row between runs in one optimum
RESERVE = 3  # finalists that are run when the chosen starts end in a collapse
BATCH = 12  # shakes that are run as one
MOST_SHAKES = 8  # batches of them
CALM = 1e-6  # change of the objective per row at which a run of the race has settled


@dataclass(frozen=True)
class Start:
    """A starting point and how it was made, in words for ``explain()``.

    ``sought`` are the parameters that were found from the data, not given.
    """

    params: Params
    how: str
    interrupted: bool = False
    sought: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """How long to search: at most so many rounds, until so many kinds of guesses have led to the
    best optimum; from there, unless all kinds have, shakes until so many rounds of them bring
    nothing; and at most so many split-and-merge moves.
    """

    rounds: int
    agreed: int
    shakes: int
    moves: int


AUTO, THOROUGH = Search(4, 2, 2, 0), Search(6, 3, 4, 6)


def guesses(
    problem: Problem,
    pooled: Params,
    method: str,
    seeds: Sequence[int],
    only: frozenset[str] | None = None,
) -> list[Start]:
    """One start for each seed, from guessed assignments."""
    how = f"{_HOW[method]} assignments"
    found = guessed_together(problem, pooled, method, seeds, only)
    sought = tuple(sorted(problem.free if only is None else only))
    return [
        Start(params, f"{how} (seed {seed}) and one M-step", sought=sought)
        for params, seed in zip(found, seeds, strict=True)
    ]


def race(
    problem: Problem,
    program: Params,
    count: int,
    seed: int,
    report: Callable[[str], None],
    kept: set[str],
    search: Search = AUTO,
) -> list[Start]:
    """Short EM runs from many guesses; the ``count`` best, and some in reserve.

    Guesses of different kinds race apart: random ones climb fast, and often into a collapse. They
    take over the program's values of the parameters ``kept``. As long as too few kinds meet in the
    best optimum, there are further rounds.
    """
    (tries, laps), clock = extent(problem), time.perf_counter()
    quick = len(laps) == len(LAPS) and not no_batch(problem)
    rounds = search.rounds if quick else 1
    only = frozenset(problem.free) - kept if kept else None
    pooled = pooled_point(problem, placed(problem, program), only)
    runs: list[_Run] = []
    made, racing = 0, list[_Run]()
    try:
        for number in range(rounds):
            fields: list[list[_Run]] = []
            for method in KINDS:
                many = max(tries, count) if method == "kmeans" else tries
                fields.append([])
                if number == 0 and method in TREES:
                    found = guesses(problem, pooled, TREES[method], [seed], only)
                    fields[-1] += [_Run(problem, g, method) for g in found]
                    made += 1
                size = 1 if no_batch(problem) else many
                first = 100 * seed + number * many
                for i in range(0, many, size):
                    pause_point()
                    report(f"a {method} guess, {made + 1}")
                    seeds = range(first + i, first + i + size)
                    found = guesses(problem, pooled, method, seeds, only)
                    fields[-1] += [_Run(problem, g, method) for g in found]
                    made += len(found)
                    racing = [run for field in fields for run in field]
            for length, share in laps if count == 1 else laps[:2]:
                report(f"{len(racing)} of {made} guesses in the race")
                _advance(problem, racing, length)
                for i, field in enumerate(fields):
                    keep = max(count, 1, round(share * len(field)))
                    fields[i] = _distinct(field, problem.rows, count)[:keep]
                racing = [run for field in fields for run in field]
            runs = _distinct([*runs, *racing], problem.rows, count + RESERVE, ALIKE)
            if len(runs[0].kinds) >= search.agreed:
                break
        more = partial(_joined, problem, count, report)
        if quick and len(runs[0].kinds) < len(KINDS) and not kept:
            runs = _shaken(problem, pooled, runs, more, search.shakes, seed)
        if search.moves and not kept:
            runs = _moved(problem, pooled, runs, more, search.moves)
    except KeyboardInterrupt:
        runs = [*runs, *racing]
        if not runs:
            raise
        best = max(runs, key=lambda run: run.promise)
        how = f"{best.start.how}; interrupted after a short EM run"
        return [Start(problem.clip(best.params), how, interrupted=True)]
    seconds = time.perf_counter() - clock
    how = f"best of {made} guesses after short EM runs ({seconds:.1f} s): "
    return [replace(run.start, how=how + run.start.how) for run in runs[: count + RESERVE]]


_More = Callable[[list["_Run"], list[Params], str, tuple[tuple[int, int], ...]], list["_Run"]]


def _shaken(
    problem: Problem, pooled: Params, runs: list[_Run], more: _More, most: int, seed: int
) -> list[_Run]:
    """The runs, and those from the best with a share of its rows reassigned at random; until
    ``most`` batches in a row bring nothing.
    """
    idle, first = 0, MOST_SHAKES * BATCH * seed
    for number in range(MOST_SHAKES):
        seeds = range(first + number * BATCH, first + (number + 1) * BATCH)
        points = shakes(problem, runs[0].params, pooled, seeds)
        before, runs = runs[0], more(runs, points, "shaken", ((10, BATCH), (100, 1)))
        idle = idle + 1 if runs[0] is before else 0
        if idle == most:
            break
    return runs


def _moved(
    problem: Problem, pooled: Params, runs: list[_Run], more: _More, most: int
) -> list[_Run]:
    """The runs, and those that split-and-merge moves from the best lead to, as long as it rises."""
    for _ in range(most):
        points = moves(problem, runs[0].params, pooled)
        before, runs = (
            runs[0],
            more(runs, points, "after a split-and-merge move", ((10, 4), (100, 1))),
        )
        if runs[0] is before:
            break
    return runs


def _joined(
    problem: Problem,
    count: int,
    report: Callable[[str], None],
    runs: list[_Run],
    points: list[Params],
    how: str,
    laps: tuple[tuple[int, int], ...],
) -> list[_Run]:
    """The best of the runs, and of new ones from ``points`` beside the best of them.

    ``laps`` are numbers of EM iterations, and how many then go on.
    """
    pause_point()
    start = runs[0].start
    text = start.how if start.how.endswith(how) else f"{start.how}, {how}"
    found = [_Run(problem, Start(point, text, sought=start.sought), how) for point in points]
    for length, most in laps:
        report(f"{len(found)} starts in the race, {how}")
        _advance(problem, found, length)
        found = _distinct(found, problem.rows, 0)[:most]
    return _distinct([*runs, *found], problem.rows, count + RESERVE, ALIKE)


def extent(problem: Problem) -> tuple[int, tuple[tuple[int, float], ...]]:
    """How many guesses of each kind, and which laps, the problem's size allows."""
    plan = problem.plan
    factors = plan.reading.traces[0].factors.values()
    work = sum(f.tensor.numel() + 20_000 for f in factors)  # a site costs something by itself
    if plan.on(Rung.ON_STATISTICS) or plan.on(Rung.GRADIENT):
        work *= 10
    if work <= 100_000:
        return (8 if no_batch(problem) else 12), LAPS
    return (6, LAPS[:-1]) if work <= 1_000_000 else (3, LAPS[:-1])


def _distinct(runs: list[_Run], rows: float, least: int, alike: float = 1e-9) -> list[_Run]:
    """The best first; runs that have met (up to the states' names) come last or go.

    They have where their objectives differ by ``alike`` a row at most.
    """
    ranked = sorted(runs, key=lambda run: run.promise, reverse=True)
    first, again = ranked[:1], list[_Run]()
    for run in ranked[1:]:
        same = abs(first[-1].promise[1] - run.promise[1]) <= alike * rows
        if same:
            first[-1].kinds |= run.kinds
        (again if same else first).append(run)
    return first + again[: max(0, least - len(first))]


def _advance(problem: Problem, runs: list[_Run], iterations: int) -> None:
    """Iterate all runs, as one where the problem allows."""
    moving = [run for run in runs if not run.settled]
    if len(moving) < 2 or no_batch(problem):
        for run in moving:
            run.advance(iterations)
        return
    batch = Batch(problem, len(moving))
    params, values = stack([run.params for run in moving]), [run.promise[1] for run in moving]
    try:
        for _ in range(iterations):
            expected, log_joint = batch.e_step(params)
            before, values = values, log_joint.tolist()
            for run, old, new in zip(moving, before, values, strict=True):
                run.settled = not abs(new - old) > CALM * problem.rows
            if all(run.settled for run in moving):
                break
            params = batch.m_step(params, expected)
            pause_point()
    finally:  # an interrupt keeps what was reached
        low = batch.collapsed(params, 100.0).tolist()
        points = unstack(params)
        for run, point, value, fallen in zip(moving, points, values, low, strict=True):
            run.params = point
            run.promise = (value == value and not fallen, value if value == value else -torch.inf)


class _Run:
    """A short EM run from a guess, in laps."""

    def __init__(self, problem: Problem, start: Start, kind: str) -> None:
        self.problem, self.start, self.params = problem, start, start.params
        self.kinds = {kind}  # of the guesses that led to where it is
        self.promise, self.settled = (False, -torch.inf), False

    def advance(self, iterations: int) -> None:
        """Iterate; ``promise`` then says whether it stays healthy, and its objective."""
        problem = self.problem
        for _ in range(0 if self.settled else iterations):
            expected, log_prior = problem.e_step(self.params)
            before, value = self.promise[1], float(expected.log_likelihood + log_prior)
            self.promise = (True, value) if value == value else (False, -torch.inf)
            if not abs(value - before) > CALM * problem.rows:
                self.settled = True
                break
            self.params = problem.m_step(self.params, expected, effort=BRIEF)
            pause_point()
        if collapsed(problem, self.params, 100.0):
            self.promise = (False, self.promise[1])
