"""Several solvers on one problem: one start, one objective, one clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, overload

import torch

from pyroem._pyro import isolated
from pyroem.comparison import Comparison, Row, Study, StudyRow, quartiles
from pyroem.em import EM
from pyroem.errors import ModelError, PyroemError, SettingError
from pyroem.fit import Fit
from pyroem.gradient import MAP
from pyroem.interrupt import deferred, pressed
from pyroem.loop import Status, rank
from pyroem.matching import parameter_difference
from pyroem.problem import Problem
from pyroem.progress import Progress
from pyroem.race import Start
from pyroem.solver import Solver
from pyroem.starts import starts
from pyroem.structure import Params

NEAR = 0.01  # nats from the best objective that count as reaching it


def default_solvers() -> dict[str, Solver]:
    """EM, and MAP with Adam and with L-BFGS."""
    return {"EM": EM(), "MAP (Adam)": MAP("adam"), "MAP (L-BFGS)": MAP("lbfgs")}


@overload
def compare(
    model: Callable[..., Any],
    *args: Any,
    solvers: Mapping[str, Solver] | None = None,
    init: Any = "auto",
    restarts: int = 1,
    seed: int = 0,
    seeds: None = None,
    near: float = NEAR,
    weights: Any = None,
    **kwargs: Any,
) -> Comparison: ...


@overload
def compare(
    model: Callable[..., Any],
    *args: Any,
    solvers: Mapping[str, Solver] | None = None,
    init: Any = "auto",
    restarts: int = 1,
    seed: int = 0,
    seeds: int,
    near: float = NEAR,
    weights: Any = None,
    **kwargs: Any,
) -> Study: ...


def compare(
    model: Callable[..., Any],
    *args: Any,
    solvers: Mapping[str, Solver] | None = None,
    init: Any = "auto",
    restarts: int = 1,
    seed: int = 0,
    seeds: int | None = None,
    near: float = NEAR,
    weights: Any = None,
    **kwargs: Any,
) -> Comparison | Study:
    """Fit one program with several solvers, each from the same start (or starts).

    Every fit is judged on the same ``log_joint``, in the highest precision that any of the solvers
    has. Seconds and passes are those of the iterations from the start on; reading the program and
    finding the start are shared and not counted, nor is what a solver makes once. An interrupt
    (Ctrl-C) ends the comparison with the fits so far.

    With ``seeds=20`` all is done for 20 seeds, ``seed`` and those after it, each with a start of
    its own (most telling with ``init="random"``): a :class:`Study`, with medians and quartiles, and
    how often each solver came within ``near`` nats of the best objective of all.

    Raises:
    ------
    SettingError
        Where ``solvers`` is not a mapping of names to solvers; else as ``Solver.fit``.
    """
    chosen = checked(solvers, default_solvers)
    check_near(near)
    if seeds is None:
        fits, problems = fit_all(
            model,
            args,
            kwargs,
            chosen,
            init=init,
            restarts=restarts,
            seed=seed,
            weights=weights,
        )
        return tabulate(fits, problems, chosen)
    check_seeds(seeds)
    found: dict[int, Comparison] = {}
    for number in range(seed, seed + seeds):
        found[number] = compare(
            model,
            *args,
            solvers=chosen,
            init=init,
            restarts=restarts,
            seed=number,
            weights=weights,
            **kwargs,
        )
        if cut_short(found[number]):
            break
    return study(found, near)


def check_near(near: float) -> None:
    """Raise where ``near`` is no distance in nats."""
    if isinstance(near, bool) or not isinstance(near, int | float) or not 0 <= near < math.inf:
        raise SettingError(f"near: expected a number of nats >= 0, got {near!r}.")


def checked(
    solvers: Mapping[str, Solver] | None, default: Callable[[], dict[str, Solver]]
) -> dict[str, Solver]:
    """The solvers by name, or the default ones. Raises SettingError where they are none."""
    if solvers is not None and not isinstance(solvers, Mapping):
        raise SettingError(
            f"solvers: expected a dict of names to solvers, got {type(solvers).__name__}."
        )
    chosen = dict(default() if solvers is None else solvers)
    if not chosen:
        raise SettingError("solvers: expected at least one solver, got none.")
    for name, solver in chosen.items():
        if not isinstance(solver, Solver):
            raise SettingError(
                f"solvers: '{name}' must be a solver such as EM() or MAP(), got"
                f" {type(solver).__name__}."
            )
    return chosen


def check_seeds(seeds: Any) -> None:
    """Raise SettingError unless ``seeds`` is a number of seeds."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise SettingError(f"seeds: expected a positive integer, got {seeds!r}.")


def cut_short(found: Comparison) -> bool:
    """Whether an interrupt ended the comparison early."""
    return bool(found.missing) or any(
        fit.status is Status.INTERRUPTED for fit in found.fits.values()
    )


def fit_all(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    solvers: Mapping[str, Solver],
    *,
    init: Any = "auto",
    restarts: int = 1,
    seed: int = 0,
    weights: Any = None,
    errors: dict[str, str] | None = None,
) -> tuple[dict[str, Fit], list[Problem]]:
    """The fit of each solver from the same starts, and the problems that were posed for them.

    Where ``errors`` is given, the text of a solver's PyroemError goes there, and the others go on.
    An interrupt ends it with the fits so far.
    """
    problems: dict[Any, Problem] = {}
    fits: dict[str, Fit] = {}
    common: list[Start] = []

    def one(solver: Solver) -> Fit:
        key = (solver.dtype, solver.fixed, solver.floor, solver.engine, str(solver.device))
        if key not in problems:
            problems[key] = solver.pose(model, args, kwargs, weights, init=init)
        problem = problems[key]
        solver.check(problem)
        with isolated(solver.dtype, seed):
            if not common:
                show = Progress("", any(s.progress for s in solvers.values()))
                common.extend(islice(starts(problem, init, restarts, seed, show), restarts))
                show.close()
            own = [replace(s, params=_cast(s.params, solver.dtype)) for s in common]
            with suppress(ModelError, torch.linalg.LinAlgError):  # the run itself will say so
                solver.begin(problem, own[0].params)  # what is made once is not on the clock
            return solver.solve(problem, own, restarts)

    with deferred():
        for name, solver in solvers.items():
            try:
                fits[name] = one(solver)
            except PyroemError as error:
                if errors is None:
                    raise
                errors[name] = str(error)
                continue
            if fits[name].status is Status.INTERRUPTED or pressed():
                break
    return fits, list(problems.values())


def tabulate(fits: dict[str, Fit], problems: Iterable[Problem], names: Iterable[str]) -> Comparison:
    """The table of some fits of one problem, judged in the highest precision of all.

    ``names`` are those of the solvers that were asked for.
    """
    widest = max(problems, key=lambda p: torch.finfo(p.structure.program.dtype).bits)
    values = {name: _value(fit, widest) for name, fit in fits.items()}
    best = max(fits, key=lambda name: rank(fits[name].status, values[name][0]))
    rows = [
        _row(name, fit, fits[best], values[name], values[best][0]) for name, fit in fits.items()
    ]
    return Comparison(rows, fits, best, tuple(name for name in names if name not in fits))


def study(found: dict[int, Comparison], near: float, *, alike: bool = True) -> Study:
    """What comparisons from several seeds have in common.

    ``alike`` says that all are of the same data, so that there is one best objective. Otherwise
    each run is held against the best of its own seed.
    """
    every = [(c, row) for c in found.values() for row in c.rows]
    top, best = max(
        every, key=lambda pair: rank(pair[0].fits[pair[1].name].status, pair[1].log_joint)
    )
    reference = top.fits[best.name]
    result = Study([], found, best.log_joint if alike else None, near)

    def difference(fit: Fit, row: Row) -> float:
        return parameter_difference(fit, reference) if alike else row.parameter_difference

    rows = []
    for name in dict.fromkeys(row.name for _, row in every):
        own = [(c.fits[name], row) for c, row in every if row.name == name]
        differences = [difference(fit, row) for fit, row in own]
        told = [x for x in differences if not math.isnan(x)]
        lines = [row for _, row in own]
        rows.append(
            StudyRow(
                name,
                len(own),
                sum(map(result.reached, lines)) / len(own),
                sum(row.converged for row in lines) / len(own),
                quartiles([result.gap(row) for row in lines]),
                quartiles([row.iterations for row in lines]),
                quartiles([row.passes for row in lines]),
                quartiles([row.seconds for row in lines]),
                quartiles([row.seconds / max(row.iterations, 1) for row in lines]),
                quartiles([row.seconds / max(row.passes, 1) for row in lines]),
                quartiles(told) if told else (math.nan, math.nan, math.nan),
                len(own) - len(told),
            )
        )
    return replace(result, rows=rows)


def _cast(params: Params, dtype: torch.dtype) -> Params:
    return {name: value.to(dtype) for name, value in params.items()}


def _value(fit: Fit, problem: Problem) -> tuple[float, float]:
    """The log-joint and the log-likelihood, in the precision of ``problem``."""
    dtype = problem.structure.program.dtype
    if fit.problem.structure.program.dtype == dtype:
        return fit.log_joint, fit.log_likelihood
    with isolated(dtype, 0):
        log_likelihood, log_prior = problem.parts(_cast(fit.params, dtype))
    return log_likelihood + log_prior, log_likelihood


def _row(name: str, fit: Fit, best: Fit, value: tuple[float, float], highest: float) -> Row:
    last = fit.history[-1]
    return Row(
        name,
        *value,
        highest - value[0],
        fit.n_iter,
        last.passes,
        last.seconds,
        str(fit.status),
        fit.converged,
        parameter_difference(fit, best),
        None if fit.approximation is None or fit.approximation.point else fit.approximation.elbo,
    )


__all__ = [
    "Comparison",
    "Row",
    "Study",
    "check_near",
    "check_seeds",
    "checked",
    "compare",
    "cut_short",
    "default_solvers",
    "fit_all",
    "study",
    "tabulate",
]
