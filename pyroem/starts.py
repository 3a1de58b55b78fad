"""Where a fit starts: guessed assignments and one M-step; no model needs its own code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.batch import Batch, no_batch, stack, unstack
from pyroem.diagnose import collapsed
from pyroem.errors import ModelError, SettingError
from pyroem.given import around, assignments
from pyroem.guesses import from_evidence, guessed_together, placed
from pyroem.interrupt import pause_point
from pyroem.mstep.plan import Rung
from pyroem.mstep.update import QUICK, Effort
from pyroem.problem import Problem
from pyroem.structure import Params, check_names
from pyroem.symmetry import coinciding
from pyroem.threads import threads_for

METHODS = ("auto", "kmeans", "random", "prior", "model")
LAPS = ((4, 0.5), (10, 0.5), (100, 1.0))  # EM iterations of a race, and the share that goes on
BRIEF = Effort(1, 5, 3, 2)  # the effort of an M-step in the race
RESERVE = 3  # finalists that are run when the chosen starts end in a collapse
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


class Starts(Iterator[Start]):
    """Starting points one after the other, found in groups when they are asked for.

    ``found`` are those of the first ``searched`` groups: given to :meth:`resume`, they come again
    without a search. What an interrupted search gave is not among them.
    """

    def __init__(self, groups: Iterable[Callable[[], list[Start]]]) -> None:
        self.groups = list(groups)
        self.found: list[Start] = []
        self.searched = 0
        self._coming: list[Start] = []
        self.finish: Callable[[Start], Start] = lambda start: start

    def __next__(self) -> Start:
        while not self._coming:
            if self.searched == len(self.groups):
                raise StopIteration
            self._coming = self.groups[self.searched]()
            if any(start.interrupted for start in self._coming):
                self.groups = self.groups[: self.searched]  # the user wants no more
            else:
                self._coming = [self.finish(start) for start in self._coming]
                self.searched += 1
                self.found += self._coming
        return self._coming.pop(0)

    def resume(self, found: list[Start], searched: int) -> None:
        """Go on after a search that was made before."""
        self.found, self.searched, self._coming = list(found), searched, list(found)


def starts(
    problem: Problem,
    init: Any,
    count: int,
    seed: int,
    report: Callable[[str], None] = lambda text: None,
) -> Starts:
    """``count`` starting points; after them, with ``"auto"``, some in reserve for when those fail.

    Where a search is needed it is made when its first start is asked for; ``report`` is told how
    it goes (an empty text at its end), and an interrupt ends it with the best guess so far.

    Raises:
    ------
    SettingError
        For an unknown method, parameters that the program does not have, shapes that do not match,
        and ``count > 1`` of a start that has nothing random.
    """
    guesses = _guessed(problem, init)
    if guesses:
        values = {n: v for n, v in getattr(init, "params", init).items() if n not in guesses}
        if count > 1:
            _refuse("given values", count)
        return Starts([lambda: [_given(problem, values, seed, guesses)]])
    found = _starts(problem.sample, init, count, seed, report)
    if problem.smaller is not None:
        found.finish = partial(_on_all_rows, problem)
    return found


def _guessed(problem: Problem, init: Any) -> dict[str, Any]:
    """The assignments that ``init`` gives."""
    given = init if isinstance(init, Mapping) else {}
    known = set(assignments(problem.structure)) - set(problem.structure.parameters)
    return {name: value for name, value in given.items() if name in known}


def _on_all_rows(problem: Problem, start: Start) -> Start:
    """A start that was sought on a sample, after one EM iteration over all rows.

    What is rare may not be in the sample. Its probability there is zero, a bound that a gradient
    does not leave.
    """
    if not start.sought:
        return start
    try:
        expected, _ = problem.e_step(start.params)
        params = problem.m_step(start.params, expected, frozenset(start.sought), QUICK)
    except (ModelError, torch.linalg.LinAlgError):
        return start
    if not all(bool(value.isfinite().all()) for value in params.values()):
        return start
    return replace(start, params=params, how=f"{start.how}; one EM iteration over all rows")


def _starts(
    problem: Problem,
    init: Any,
    count: int,
    seed: int,
    report: Callable[[str], None],
) -> Starts:
    given = getattr(init, "params", init)
    if isinstance(given, Mapping):
        if count > 1:
            _refuse("given values", count)
        return Starts([lambda: [_given(problem, given, seed)]])
    if init not in METHODS:
        raise SettingError(
            f"init: expected one of {', '.join(METHODS)}, a dict of values or a Fit, got {init!r}."
        )
    _check_fixed(problem)
    program = own_values(problem)
    if init == "prior" and not any(p.has_prior for p in problem.structure.parameters.values()):
        raise SettingError("init='prior': no parameter of the program has a prior to draw from.")
    if init in ("model", "prior") or not problem.structure.assignments:
        if not any(p.random for p in problem.structure.parameters.values()) and count > 1:
            _refuse("the program's own values", count)
        how = "draws from the priors" if init == "prior" else "the program's own values"
        return Starts(
            partial(lambda i: [Start(_drawn(problem, seed + i), how)], i) for i in range(count)
        )
    if init == "auto":
        return Starts(_auto(problem, program, count, seed, report))

    def guesses() -> list[Start]:
        pooled = from_evidence(problem, placed(problem, program), {}, None)
        return _guesses(problem, pooled, init, range(seed, seed + count))

    return Starts([guesses])


def _guesses(
    problem: Problem,
    pooled: Params,
    method: str,
    seeds: Sequence[int],
    only: frozenset[str] | None = None,
) -> list[Start]:
    how = "k-means assignments" if method == "kmeans" else "random assignments"
    found = guessed_together(problem, pooled, method, seeds, only)
    sought = tuple(sorted(problem.free if only is None else only))
    return [
        Start(params, f"{how} (seed {seed}) and one M-step", sought=sought)
        for params, seed in zip(found, seeds, strict=True)
    ]


def _refuse(what: str, count: int) -> NoReturn:
    raise SettingError(
        f"restarts={count}: {what} are the same at every restart. Use init='kmeans', 'random' or"
        " 'auto', or restarts=1."
    )


def own_values(problem: Problem) -> Params:
    """The program's own values (a draw where they are random)."""
    return {n: p.value for n, p in problem.structure.parameters.items()}


def _check_fixed(problem: Problem, given: Mapping[str, Any] | None = None) -> None:
    for block in problem.plan.on(Rung.FIXED):
        if problem.structure.parameters[block.name].random and block.name not in (given or {}):
            raise SettingError(
                f"fixed: parameter '{block.name}' has no value to be held at (the program draws it"
                f" at random). Give one: init={{'{block.name}': ...}}."
            )


def _drawn(problem: Problem, seed: int) -> Params:
    """The program's own values, with what is random drawn anew."""
    structure = problem.structure
    with isolated(structure.program.dtype, seed):
        nodes = structure.program.run({}).nodes
    fixed = {b.name for b in problem.plan.on(Rung.FIXED)}
    return {
        n: p.value if n in fixed else p.keep(nodes[n]["value"].detach().to(structure.program.dtype))
        for n, p in structure.parameters.items()
    }


def _given(
    problem: Problem, given: Mapping[str, Any], seed: int, guesses: Mapping[str, Any] | None = None
) -> Start:
    """Values that the user gives; what is missing is found around them, or from the ``guesses``."""
    structure = problem.structure
    check_names(given, structure.parameters, "init")
    _check_fixed(problem, given)
    values = {n: structure.value(n, v).detach().clone() for n, v in given.items()}
    values = {n: structure.parameters[n].keep(v) for n, v in values.items()}
    for name, value in values.items():
        if not structure.parameters[name].constraint.check(value).all():
            raise SettingError(
                f"init: the value of '{name}' is outside its support"
                f" {structure.parameters[name].constraint}."
            )
    program = {**own_values(problem), **values}
    rest = frozenset(problem.free) - frozenset(values)
    if guesses:
        how = "the assignments given and one M-step"
        return Start(around(problem, program, guesses, rest), how, sought=tuple(sorted(rest)))
    if not rest or not structure.assignments:
        return Start(program, "the values given")
    if _telling(problem, values)[1]:
        how = "the values given, the rest found around them"
        return Start(_around(problem, program, rest), how, sought=tuple(sorted(rest)))
    pooled = from_evidence(problem, program, {}, None, rest)
    (start,) = _guesses(problem, pooled, "kmeans", [seed], rest)
    return replace(start, how=f"the values given, the rest from {start.how}")


def _telling(problem: Problem, values: Mapping[str, Tensor]) -> tuple[set[str], bool]:
    """Which of ``values`` differ along an axis of states; whether they do so for all states."""
    found, complete = set(), True
    for group in problem.groups:
        axes = [(n, axis) for n, axis in group.axes if _in_observation(problem, n)]
        telling = set()
        for name, axis in axes:
            if name in values:
                first = values[name].narrow(axis, 0, 1)
                if not torch.allclose(values[name], first.expand_as(values[name])):
                    telling.add(name)
        found |= telling
        complete = complete and (bool(telling) or not axes or group.num_states < 2)
    return found, complete and bool(found)


def _in_observation(problem: Problem, name: str) -> bool:
    depends = problem.plan.reading.dependence
    return any(name in depends[s] for s in problem.structure.observations if s in depends)


def _around(problem: Problem, params: Params, rest: frozenset[str]) -> Params:
    """Find ``rest`` by one EM iteration from the other values, starting at pooled values."""
    pooled = from_evidence(problem, params, {}, None, rest)
    expected, _ = problem.e_step(pooled)
    return problem.m_step(pooled, expected, rest)


def _auto(
    problem: Problem, program: Params, count: int, seed: int, report: Callable[[str], None]
) -> list[Callable[[], list[Start]]]:
    """The program's own values where they tell the states apart; then the best of many guesses.

    Where the program's values tell only some assignments' states apart, the guesses keep those.
    """
    structure = problem.structure
    explicit = {n: v for n, v in program.items() if not structure.parameters[n].random}
    complete = len(explicit) == len(program)
    groups: list[Callable[[], list[Start]]] = []
    telling, apart = _telling(problem, explicit)
    depends = problem.plan.reading.dependence  # labels tell states apart, but are no values
    told = frozenset(n for n in structure.observations if n in depends and not depends[n])
    if complete and not coinciding(problem.plan.structure, problem.plan, program, without=told):
        how = "the program's own values, which differ by state"
        groups.append(lambda: [Start(problem.clip(program), how)])
    elif not complete and apart:
        rest = frozenset(problem.free) - frozenset(explicit)
        how = "the program's own values, which differ by state; the rest found around them"
        groups.append(
            lambda: [
                Start(
                    problem.clip(_around(problem, program, rest)), how, sought=tuple(sorted(rest))
                )
            ]
        )
    kept = telling if not groups and not apart else set()
    wanted = max(count - len(groups), 1)

    def race() -> list[Start]:
        with threads_for(problem.engine.work * 2 * _extent(problem)[0]):
            try:
                return _race(problem, program, wanted, seed, report, kept)
            finally:
                report("")

    return [*groups, race]


def _race(
    problem: Problem,
    program: Params,
    count: int,
    seed: int,
    report: Callable[[str], None],
    kept: set[str],
) -> list[Start]:
    """Short EM runs from many guesses; the ``count`` best, and some in reserve.

    k-means and random guesses race apart: random ones climb fast, and often into a collapse. The
    guesses take over the program's values of the parameters ``kept``.
    """
    (tries, laps), clock = _extent(problem), time.perf_counter()
    only = frozenset(problem.free) - kept if kept else None
    pooled = from_evidence(problem, placed(problem, program), {}, None, only)
    fields: list[list[_Run]] = [[], []]
    try:
        for field, method, many in zip(
            fields, ("kmeans", "random"), (max(tries, count), tries), strict=True
        ):
            size = 1 if no_batch(problem) else many
            for i in range(0, many, size):
                pause_point()
                report(f"a {method} guess, {i + 1} of {many}")
                seeds = range(100 * seed + i, 100 * seed + i + size)
                field += [_Run(problem, g) for g in _guesses(problem, pooled, method, seeds, only)]
        guesses = sum(map(len, fields))
        for length, share in laps if count == 1 else laps[:2]:
            report(f"{sum(map(len, fields))} of {guesses} guesses in the race")
            _advance(problem, [run for field in fields for run in field], length)
            for i, field in enumerate(fields):
                keep = max(count, 1, round(share * len(field)))
                fields[i] = _distinct(field, problem.rows, count)[:keep]
    except KeyboardInterrupt:
        runs = [run for field in fields for run in field]
        if not runs:
            raise
        best = max(runs, key=lambda run: run.promise)
        how = f"{best.start.how}; interrupted after a short EM run"
        return [Start(problem.clip(best.params), how, interrupted=True)]
    seconds = time.perf_counter() - clock
    how = f"best of {guesses} guesses after short EM runs ({seconds:.1f} s): "
    runs = _distinct([run for field in fields for run in field], problem.rows, count)
    return [replace(run.start, how=how + run.start.how) for run in runs[: count + RESERVE]]


def _extent(problem: Problem) -> tuple[int, tuple[tuple[int, float], ...]]:
    """How many guesses of each kind, and which laps, the problem's size allows."""
    plan = problem.plan
    factors = plan.reading.traces[0].factors.values()
    work = sum(f.tensor.numel() + 20_000 for f in factors)  # a site costs something by itself
    if plan.on(Rung.ON_STATISTICS) or plan.on(Rung.GRADIENT):
        work *= 10
    if work <= 100_000:
        return 12, LAPS
    return (6, LAPS[:-1]) if work <= 1_000_000 else (3, LAPS[:-1])


def _distinct(runs: list[_Run], rows: float, least: int) -> list[_Run]:
    """The best first; runs that have met (up to the states' names) come last or go."""
    ranked = sorted(runs, key=lambda run: run.promise, reverse=True)
    first, again = ranked[:1], list[_Run]()
    for run in ranked[1:]:
        same = abs(first[-1].promise[1] - run.promise[1]) <= 1e-9 * rows
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

    def __init__(self, problem: Problem, start: Start) -> None:
        self.problem, self.start, self.params = problem, start, start.params
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
