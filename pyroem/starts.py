"""Where a fit starts: guessed assignments and one M-step; no model needs its own code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.errors import ModelError, SettingError
from pyroem.given import around, assignments
from pyroem.guesses import placed, pooled_point
from pyroem.mstep.plan import Rung
from pyroem.mstep.update import QUICK
from pyroem.problem import Problem
from pyroem.race import AUTO, THOROUGH, Search, Start, extent, guesses, race
from pyroem.structure import Params, check_names
from pyroem.symmetry import coinciding
from pyroem.threads import threads_for

SEARCHES = {"auto": AUTO, "thorough": THOROUGH}
METHODS = (*SEARCHES, "kmeans", "ward", "random", "prior", "model")


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
    states = _guessed(problem, init)
    if states:
        values = {n: v for n, v in init.items() if n not in states}
        if count > 1:
            _refuse("given values", count)
        return Starts([lambda: [_given(problem, values, seed, states)]])
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
    if init in SEARCHES:
        return Starts(_auto(problem, program, count, seed, report, SEARCHES[init]))

    if init == "ward" and count > 1:
        _refuse("Ward's clusters", count)

    def guessed() -> list[Start]:
        pooled = pooled_point(problem, placed(problem, program))
        return guesses(problem, pooled, init, range(seed, seed + count))

    return Starts([guessed])


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
    problem: Problem, given: Mapping[str, Any], seed: int, states: Mapping[str, Any] | None = None
) -> Start:
    """Values that the user gives; what is missing is found around them, or from the ``states``."""
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
    if states:
        how = "the assignments given and one M-step"
        return Start(around(problem, program, states, rest), how, sought=tuple(sorted(rest)))
    if not rest or not structure.assignments:
        return Start(program, "the values given")
    if _telling(problem, values)[1]:
        how = "the values given, the rest found around them"
        return Start(_around(problem, program, rest), how, sought=tuple(sorted(rest)))
    pooled = pooled_point(problem, program, rest)
    (start,) = guesses(problem, pooled, "kmeans", [seed], rest)
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
    pooled = pooled_point(problem, params, rest)
    expected, _ = problem.e_step(pooled)
    return problem.m_step(pooled, expected, rest)


def _auto(
    problem: Problem,
    program: Params,
    count: int,
    seed: int,
    report: Callable[[str], None],
    search: Search,
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

    def sought() -> list[Start]:
        with threads_for(problem.engine.work * 2 * extent(problem)[0]):
            try:
                return race(problem, program, wanted, seed, report, kept, search)
            finally:
                report("")

    return [*groups, sought]
