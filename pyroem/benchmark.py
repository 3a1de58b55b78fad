"""Several solvers on several problems, from many starts: one table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pyroem.compare import (
    NEAR,
    check_near,
    check_seeds,
    checked,
    cut_short,
    fit_all,
    study,
    tabulate,
)
from pyroem.comparison import Comparison, Study, as_frame, as_json, in_columns, in_html
from pyroem.em import EM
from pyroem.errors import SettingError
from pyroem.gradient import MAP
from pyroem.interrupt import deferred, pressed
from pyroem.progress import BAR, Progress, duration
from pyroem.solver import Solver
from pyroem.text import in_markdown
from pyroem.variational import SVI

Posed = tuple[Any, ...]  # a program and what it is called with
Quartiles = tuple[float, float, float]
TICK = 1e-9  # seconds: no run takes less


@dataclass(frozen=True)
class BenchmarkRow:
    """One solver on one problem, over all seeds.

    ``reached`` is the share of the runs that came within ``near`` of the best objective,
    ``converged`` that of those that ended well; ``gap`` (to the best, in nats), ``iterations``,
    ``passes`` and ``seconds`` are ``(lower quartile, median, upper quartile)``.

    ``cost`` is ``seconds[1] / reached``: the median seconds of a run times the runs that it takes
    on average until one reaches the best objective. ``ratio`` is the cost as a multiple of the
    least on the problem. Both are None for a solver that never reached it: however soon it ends,
    it is not fast. So are all numbers where ``error`` says why the solver could not run.
    """

    problem: str
    solver: str
    runs: int
    reached: float | None = None
    converged: float | None = None
    gap: Quartiles | None = None
    iterations: Quartiles | None = None
    passes: Quartiles | None = None
    seconds: Quartiles | None = None
    cost: float | None = None
    ratio: float | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Several solvers on several problems.

    Attributes:
    ----------
    rows
        One :class:`BenchmarkRow` for each problem and solver.
    studies
        By problem: a :class:`~pyroem.comparison.Study`, with every fit. A problem on which no
        solver could run has none.
    near
        How close to the best objective (in nats) counts as reaching it.
    missing
        By problem, the seeds that an interrupt kept from running.
    """

    rows: list[BenchmarkRow]
    studies: dict[str, Study]
    near: float
    missing: dict[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: the rows, and every run."""
        return {
            "near": self.near,
            "rows": [asdict(row) for row in self.rows],
            "runs": list(self._runs()),
            "missing": {name: list(seeds) for name, seeds in self.missing.items()},
        }

    def to_json(self, **kwargs: Any) -> str:
        """:meth:`to_dict` as JSON; numbers that are not finite become null."""
        return as_json(self.to_dict(), **kwargs)

    def to_pandas(self) -> Any:
        """One line for each problem, seed and solver, as a data frame. Needs pandas."""
        return as_frame(list(self._runs()))

    def to_markdown(self, *, wide: bool = False) -> str:
        """The table in Markdown; ``wide``: a line a problem and a column a solver.

        Its cells are the cost in seconds, the least of a problem in bold, and how many runs
        reached the best objective.
        """
        table, left = (self._wide(), {0}) if wide else (self._cells(), {0, 1})
        note = self._note(wide).replace("\n", "\n\n")
        return f"{in_markdown(table, left)}\n\n{note}\n"

    def _runs(self) -> Iterator[dict[str, Any]]:
        for problem, found in self.studies.items():
            for seed, comparison in found.comparisons.items():
                for row in comparison.rows:
                    own = asdict(row)
                    run = {"problem": problem, "solver": own.pop("name"), "seed": seed, **own}
                    yield {**run, "gap_to_best": found.gap(row), "reached": found.reached(row)}

    def _cells(self) -> list[list[str]]:
        head = ["problem", "solver", "reached", "iterations", "passes", "seconds", "times fastest"]
        return [head, *map(_line, self.rows)]

    def _wide(self) -> list[list[str]]:
        solvers = list(dict.fromkeys(row.solver for row in self.rows))
        cells = {(row.problem, row.solver): _cell(row) for row in self.rows}
        return [
            ["problem", *solvers],
            *(
                [name, *(cells.get((name, solver), "") for solver in solvers)]
                for name in dict.fromkeys(row.problem for row in self.rows)
            ),
        ]

    def _note(self, wide: bool = False) -> str:
        reached = f"the best objective of their problem, within {self.near:g} nats"
        cost = "the median seconds of a run, times the runs until one reaches the best objective"
        note = [
            f"Median [quartiles]. reached: runs that reached {reached}.",
            f"times fastest: {cost}, as a multiple of the least.",
        ]
        if wide:
            note = [f"Seconds: {cost}.", f"In brackets the runs that reached {reached}."]
        failed = [f"{r.problem}, {r.solver}: {r.error}" for r in self.rows if r.error is not None]
        left = (f"{name} (seeds {_listed(seeds)})" for name, seeds in self.missing.items())
        cut = [f"interrupted; missing: {', '.join(left)}"] if self.missing else []
        return "\n".join([*note, *failed, *cut])

    def __str__(self) -> str:
        return in_columns(self._cells(), {0, 1}, self._note())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return in_html(self._cells(), self._note())


def all_solvers() -> dict[str, Solver]:
    """EM, plain and accelerated; MAP by L-BFGS and Adam; SVI with a point mass."""
    return {
        "EM": EM(),
        "EM (SQUAREM)": EM(accelerate="squarem"),
        "EM (Anderson)": EM(accelerate="anderson"),
        "MAP (L-BFGS)": MAP(),
        "MAP (Adam)": MAP("adam"),
        "SVI (point)": SVI(),
    }


def benchmark(
    problems: Mapping[str, Posed | Callable[[int], Posed]],
    solvers: Mapping[str, Solver] | None = None,
    *,
    seeds: int = 5,
    init: Any = "random",
    near: float = NEAR,
    progress: bool = False,
) -> Benchmark:
    """Fit every problem with every solver, from the same starts: :func:`compare` for all seeds.

    Parameters
    ----------
    problems
        By name: a program and what it is called with, ``(model, *args)`` (keyword arguments by
        ``functools.partial``); or a function of the seed that returns such a tuple, for fresh data
        each time. Of fresh data, each run is held against the best objective of its own seed.
    solvers
        By name; without them the six of :func:`all_solvers`.
    seeds
        How many starts: seeds 0, 1, ... All solvers share each.
    init
        How they are found, as in ``Solver.fit``.
    near
        How close to the best objective (in nats) counts as reaching it.
    progress
        Show on stderr how far the benchmark is.

    A solver that cannot work on a problem (a PyroemError) gets a row that says why. An interrupt
    (Ctrl-C) returns what is done, whole comparisons only, and says what is missing; before the
    first comparison is whole it raises ``KeyboardInterrupt``.

    The cost is the expected running time of independent restarts.

    Raises:
    ------
    SettingError
        For problems, solvers or settings that make no sense.

    Source: of the expected running time: Auger and Hansen (2005), CEC, with the median in the place
    of the mean.
    """
    chosen = checked(solvers, all_solvers)
    check_seeds(seeds)
    check_near(near)
    if not isinstance(problems, Mapping) or not problems:
        raise SettingError(
            "problems: expected a dict of names to (model, *args) tuples, or to functions of a"
            f" seed that return one, got {problems if problems == {} else type(problems).__name__}."
        )
    for name, given in problems.items():
        posed(name, given, 0)  # before anything is fitted
    runs = [(name, seed) for name in problems for seed in range(seeds)]
    found: dict[str, dict[int, Comparison]] = {name: {} for name in problems}
    errors: dict[str, dict[str, str]] = {name: {} for name in problems}
    done, begun = 0, time.monotonic()
    show = Progress("benchmark:", progress)
    with deferred(), suppress(KeyboardInterrupt):
        for name, seed in runs:
            show(_progress(name, seed, done, len(runs), time.monotonic() - begun))
            problem = posed(name, problems[name], seed)
            comparison = _compared(problem, chosen, init, seed, errors[name])
            if comparison is not None:
                if cut_short(comparison):
                    break
                found[name][seed] = comparison
            done += 1
            if pressed():
                break
    show.close()
    if not done:
        raise KeyboardInterrupt
    studies = {
        name: study(own, near, alike=not callable(problems[name]))
        for name, own in found.items()
        if own
    }
    rows = [r for n in problems for r in _rows(n, list(chosen), studies.get(n), errors[n])]
    return Benchmark(rows, studies, near, _by_problem(runs[done:]))


def _compared(
    problem: Posed, solvers: Mapping[str, Solver], init: Any, seed: int, errors: dict[str, str]
) -> Comparison | None:
    """The comparison of the solvers that have not failed yet; None where none of them can work."""
    left = {name: solver for name, solver in solvers.items() if name not in errors}
    fits, read = fit_all(problem[0], problem[1:], {}, left, init=init, seed=seed, errors=errors)
    return tabulate(fits, read, [n for n in left if n not in errors]) if fits else None


def _by_problem(runs: list[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    names = dict.fromkeys(name for name, _ in runs)
    return {name: tuple(seed for other, seed in runs if other == name) for name in names}


def posed(name: str, given: Any, seed: int) -> Posed:
    """The program of a problem and what it is called with.

    Raises:
    ------
    SettingError
        Where ``given`` is neither that nor a function of a seed that returns it.
    """
    found = given
    if callable(given):
        try:
            found = given(seed)
        except Exception as error:
            raise SettingError(
                f"problems: the function of '{name}' failed for seed {seed}"
                f" ({type(error).__name__}: {error}). Expected a function of a seed that returns"
                " (model, *args); a program goes in such a tuple itself."
            ) from error
    if not isinstance(found, tuple) or not found or not callable(found[0]):
        came = "what its function returned: " if callable(given) else ""
        raise SettingError(
            f"problems: '{name}' must be a tuple (model, *args), or a function of a seed that"
            f" returns one, got {came}{type(found).__name__}."
        )
    return found


def _rows(
    problem: str, solvers: list[str], found: Study | None, errors: Mapping[str, str]
) -> Iterator[BenchmarkRow]:
    """The lines of a problem; a solver that was never run has none."""
    by_name = {} if found is None else {row.name: row for row in found.rows}
    costs = {n: max(r.seconds[1], TICK) / r.best for n, r in by_name.items() if r.best}
    least = min((cost for n, cost in costs.items() if n not in errors), default=1.0)
    for name in solvers:
        row = by_name.get(name)
        if name in errors:
            yield BenchmarkRow(problem, name, row.runs if row else 0, error=errors[name])
        elif row is not None:
            spreads = row.gap, row.iterations, row.passes, row.seconds
            cost = costs.get(name)
            ratio = None if cost is None else cost / least
            yield BenchmarkRow(
                problem, name, row.runs, row.best, row.converged, *spreads, cost, ratio
            )


def _line(row: BenchmarkRow) -> list[str]:
    if row.reached is None or row.iterations is None or row.passes is None or row.seconds is None:
        return [row.problem, row.solver, "error", "", "", "", ""]
    return [
        row.problem,
        row.solver,
        f"{_count(row)}/{row.runs}",
        _spread(row.iterations, "{:.0f}"),
        _spread(row.passes, "{:.0f}"),
        _spread(row.seconds, "{:.3g}"),
        "never reached" if row.ratio is None else f"{row.ratio:.1f}",
    ]


def _cell(row: BenchmarkRow) -> str:
    if row.error is not None:
        return "error"
    share = f"({_count(row)}/{row.runs})"
    if row.cost is None:
        return f"never {share}"
    text = f"{row.cost:.2g}"
    return f"**{text}** {share}" if row.ratio == 1 else f"{text} {share}"


def _count(row: BenchmarkRow) -> int:
    return round((row.reached or 0) * row.runs)


def _spread(values: Quartiles, form: str) -> str:
    low, middle, high = map(form.format, values)
    return f"{middle} [{low}, {high}]"


def _listed(seeds: tuple[int, ...]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"


def _progress(name: str, seed: int, done: int, total: int, seconds: float) -> str:
    full = BAR * done // total
    text = f"{name}, seed {seed}  {done}/{total}  [{'#' * full}{'-' * (BAR - full)}]"
    return f"{text}  ~{duration(seconds * (total - done) / done)} left" if done else text


__all__ = ["Benchmark", "BenchmarkRow", "all_solvers", "benchmark"]
