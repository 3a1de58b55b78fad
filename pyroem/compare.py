"""Several solvers on one problem: one start, one objective, one clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.comparison import Comparison, Row, Study, StudyRow, quartiles
from pyroem.em import EM
from pyroem.errors import ModelError, SettingError
from pyroem.fit import Fit
from pyroem.gradient import MAP
from pyroem.interrupt import deferred, pressed
from pyroem.loop import Status, rank
from pyroem.matching import Matcher, canonical
from pyroem.problem import Problem
from pyroem.progress import Progress
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
    if solvers is not None and not isinstance(solvers, Mapping):
        raise SettingError(
            f"solvers: expected a dict of names to solvers, got {type(solvers).__name__}."
        )
    chosen = dict(default_solvers() if solvers is None else solvers)
    if not chosen:
        raise SettingError("solvers: expected at least one solver, got none.")
    for name, solver in chosen.items():
        if not isinstance(solver, Solver):
            raise SettingError(
                f"solvers: '{name}' must be a solver such as EM() or MAP(), got"
                f" {type(solver).__name__}."
            )
    if seeds is not None:
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
            raise SettingError(f"seeds: expected a positive integer, got {seeds!r}.")

        def once(number: int) -> Comparison:
            found: Comparison = compare(
                model,
                *args,
                solvers=chosen,
                init=init,
                restarts=restarts,
                seed=number,
                weights=weights,
                **kwargs,
            )
            return found

        return _study(once, range(seed, seed + seeds), near)
    problems: dict[Any, Problem] = {}
    fits: dict[str, Fit] = {}
    common = None
    with deferred():
        for name, solver in chosen.items():
            key = (solver.dtype, solver.fixed, solver.floor, solver.engine, str(solver.device))
            if key not in problems:
                problems[key] = solver.pose(model, args, kwargs, weights, init=init)
            problem = problems[key]
            solver.check(problem)
            with isolated(solver.dtype, seed):
                if common is None:
                    show = Progress("", any(s.progress for s in chosen.values()))
                    common = list(islice(starts(problem, init, restarts, seed, show), restarts))
                    show.close()
                own = [replace(s, params=_cast(s.params, solver.dtype)) for s in common]
                with suppress(ModelError, torch.linalg.LinAlgError):  # the run itself will say so
                    solver.begin(problem, own[0].params)  # what is made once is not on the clock
                fits[name] = solver.solve(problem, own, restarts)
            if fits[name].status is Status.INTERRUPTED or pressed():
                break
    widest = max(problems.values(), key=lambda p: torch.finfo(p.structure.program.dtype).bits)
    values = {name: _value(fit, widest) for name, fit in fits.items()}
    best = max(fits, key=lambda name: rank(fits[name].status, values[name][0]))
    rows = [
        _row(name, fit, fits[best], values[name], values[best][0]) for name, fit in fits.items()
    ]
    return Comparison(rows, fits, best, tuple(name for name in chosen if name not in fits))


def _study(once: Callable[[int], Comparison], seeds: Iterable[int], near: float) -> Study:
    found: dict[int, Comparison] = {}
    for number in seeds:
        found[number] = once(number)
        cut = any(f.status is Status.INTERRUPTED for f in found[number].fits.values())
        if found[number].missing or cut:
            break
    every = [(c, row) for c in found.values() for row in c.rows]
    top, best = max(
        every, key=lambda pair: rank(pair[0].fits[pair[1].name].status, pair[1].log_joint)
    )
    reference = top.fits[best.name]
    rows = []
    for name in dict.fromkeys(row.name for _, row in every):
        own = [(c.fits[name], row) for c, row in every if row.name == name]
        differences = [parameter_difference(fit, reference) for fit, _ in own]
        told = [x for x in differences if not math.isnan(x)]
        lines = [row for _, row in own]
        rows.append(
            StudyRow(
                name,
                len(own),
                sum(best.log_joint - row.log_joint <= near for row in lines) / len(own),
                sum(row.converged for row in lines) / len(own),
                quartiles([best.log_joint - row.log_joint for row in lines]),
                quartiles([row.iterations for row in lines]),
                quartiles([row.passes for row in lines]),
                quartiles([row.seconds for row in lines]),
                quartiles([row.seconds / max(row.iterations, 1) for row in lines]),
                quartiles([row.seconds / max(row.passes, 1) for row in lines]),
                quartiles(told) if told else (math.nan, math.nan, math.nan),
                len(own) - len(told),
            )
        )
    return Study(rows, found, best.log_joint, near)


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
        None if fit.approximation is None else fit.approximation.elbo,
    )


def parameter_difference(fit: Fit, reference: Fit) -> float:
    """The largest relative difference of any parameter, after the states are matched.

    ``max |a - b| / max |b|`` over the elements of a parameter, the largest over the parameters.
    NaN where it cannot be told which states are which (:class:`~pyroem.matching.Matcher`).
    """
    if fit is reference:
        return 0.0
    problem = reference.problem
    matched = Matcher(problem, reference.params)(fit.params)
    if matched.unclear:
        return math.nan
    own, other = canonical(problem, reference.params), canonical(problem, matched.params)
    return max((_relative(other[n], own[n]) for n in own if own[n].numel()), default=0.0)


def _relative(value: Tensor, reference: Tensor) -> float:
    gap, size = float((value - reference).abs().max()), float(reference.abs().max())
    return gap / size if size > 0 else gap


def match(fit: Fit, reference: Fit) -> Params:
    """The parameters of ``fit``, its states renamed as those of ``reference``.

    States are paired to agree on as many rows as possible (the Hungarian algorithm on the overlap
    of the posteriors).
    """
    return Matcher(reference.problem, reference.params)(fit.params).params


__all__ = [
    "Comparison",
    "Row",
    "Study",
    "compare",
    "default_solvers",
    "match",
    "parameter_difference",
]
