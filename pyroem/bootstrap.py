"""The bootstrap of a fit: how its parameters scatter over data like those that it was fitted to.

- ``"weighted"``: the rows get random weights instead of ones, ``n`` times a Dirichlet vector, and
  the program is fitted to the same data under them;
- ``"parametric"``: new data is drawn from the fitted program.

Every replicate starts at the fit, and its states are named as those of the fit.

Source: Newton and Raftery (1994), Journal of the Royal Statistical Society B 56, 3-48, for the
weights; Efron and Tibshirani (1993), An Introduction to the Bootstrap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.derivatives import check_in_memory, coordinates
from pyroem.em import EM
from pyroem.errors import ModelError, SettingError
from pyroem.estep.engine import TraceEngine
from pyroem.estep.kernel import Rows
from pyroem.fit import Fit
from pyroem.interrupt import deferred, pause_point, pressed
from pyroem.loop import Status
from pyroem.matching import Matcher, canonical
from pyroem.mstep.plan import Rung
from pyroem.problem import Problem, pose
from pyroem.progress import Progress
from pyroem.race import Start
from pyroem.redrawn import redrawn
from pyroem.resampled import Bootstrap, too_few
from pyroem.selection.replicates import places_of, replicate
from pyroem.solver import Solver
from pyroem.structure import Held, Params
from pyroem.threads import threads_for
from pyroem.together import iterate_together
from pyroem.verdict import judge

METHODS = ("weighted", "parametric")
MOST, NUMBERS = 50, 5_000_000  # replicates in a batch, and their row weights or statistics


@dataclass(frozen=True)
class Replicate:
    """How the fit of one replicate ended."""

    params: Params
    log_joint: float
    status: Status


def bootstrap(
    fit: Fit,
    replicates: int = 200,
    *,
    method: str = "weighted",
    seed: int = 0,
    solver: Solver | None = None,
    progress: bool = False,
) -> Bootstrap:
    """Standard errors and intervals of a fit from replicates of it.

    Parameters
    ----------
    fit
        The fit; each replicate starts there.
    replicates
        How many: some 200 for standard errors, 1000 and more for intervals.
    method
        ``"weighted"``: the row weights are ``n Dirichlet(1, ..., 1)``, with ``n`` rows; under
        weights ``w`` of the fit's own, ``sum(w) Dirichlet(w)``, so that a row of weight 2 is two
        rows. Rows are the elements of the plates that all assignments share (sequences, where
        these stand in a plate). Nothing is drawn from the program, which may be wrong.
        ``"parametric"``: observations are drawn from the fitted program, as by ``Fit.sample``;
        covariates and missing cells stay as they are. Of a chain a whole new one is drawn.
    seed
        Of the weights or draws.
    solver
        What fits the replicates: ``EM()`` unless told otherwise. The settings that a program is
        read under (``dtype``, ``fixed``, ``floor``, ``engine``) are those of the fit.
    progress
        Show on stderr how far it is.

    Where the mixture kernel serves the program and its M-step has closed forms, plain ``EM`` fits
    many replicates as one batch. Drawn data then takes no new reading of the program, unless the
    data is large (it was read on some of its rows) or on a device, or the program computes
    anything but what it observes from it: a prior, a bound, a mask. Such replicates are fitted one
    by one, as are those of all other programs.

    A replicate that did not converge, and one whose states cannot be paired clearly with those of
    the fit (:class:`~pyroem.matching.Matcher`), is left out, and counted: its numbers would belong
    to another parameter. Where more than half are left out there are no standard errors (NaN). An
    interrupt (Ctrl-C) returns the replicates so far; a batch that was under way does not count, as
    those in it that had ended were the easy ones.

    Raises:
    ------
    ModelError
        For data in blocks or spread over processes; where every parameter is fixed; for
        ``"weighted"`` of a program without a plate of rows (a single long chain); for
        ``"parametric"`` of a fit with row weights.
    SettingError
        For arguments that cannot work, and where observations cannot be drawn anew.
    """
    solver = _checked(fit, replicates, method, seed, solver)
    show = Progress("bootstrap:", progress or solver.progress)
    solver = replace(solver, progress=False)
    found, interrupted = list[Replicate](), False
    with deferred():
        try:
            make = _weighted if method == "weighted" else _parametric
            lots = make(fit, solver, replicates, seed)
            for one in _fitted(fit, solver, lots, replicates, show):
                found.append(one)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            show.close()
        return _gathered(fit, method, found, replicates - len(found), interrupted)


def _checked(fit: Fit, replicates: Any, method: Any, seed: Any, solver: Any) -> Solver:
    if not isinstance(fit, Fit):
        raise SettingError(f"bootstrap: expected a Fit, got {type(fit).__name__}.")
    if isinstance(replicates, bool) or not isinstance(replicates, int) or replicates < 2:
        raise SettingError(f"replicates: expected an integer of 2 or more, got {replicates!r}.")
    if method not in METHODS:
        raise SettingError(f"method: expected one of {', '.join(METHODS)}; got {method!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SettingError(f"seed: expected an integer from 0 to 2**32 - 1, got {seed!r}.")
    if solver is not None and not isinstance(solver, Solver):
        raise SettingError(f"solver: expected one such as EM(), got {type(solver).__name__}.")
    problem = fit.problem
    check_in_memory(problem, "bootstrap")
    if not problem.free:
        raise ModelError("bootstrap: every parameter is fixed; nothing scatters.")
    structure, weights = problem.structure, problem.row_weights
    if method == "weighted" and (not structure.unit or structure.num_rows < 2):
        raise ModelError(
            "bootstrap: the program has no plate of independent rows to weigh (or one row only)."
            " Use method='parametric'."
        )
    if method == "parametric" and weights is not None and bool((weights != 1).any()):
        raise ModelError(
            "bootstrap: the fit has row weights, and a row is drawn once, whatever its weight. Use"
            " method='weighted'."
        )
    solver = EM() if solver is None else solver
    solver.check(problem)
    return solver


@dataclass(frozen=True)
class Lot:
    """The problems of replicates that are fitted as one batch, or of one that is fitted alone.

    In a batch they differ in ``weights`` (replicates by rows), or in ``rows``, which are stacked.
    """

    problems: Sequence[Problem]
    seed: int
    weights: Tensor | None = None
    rows: Rows | None = None

    @property
    def together(self) -> bool:
        """Whether they are fitted as one batch."""
        return self.weights is not None or self.rows is not None


def _fitted(
    fit: Fit, solver: Solver, lots: Iterator[Lot], count: int, show: Progress
) -> Iterator[Replicate]:
    start, done = Start(fit.params, "the fit"), 0
    for lot in lots:
        first, done = done + 1, done + len(lot.problems)
        if lot.together:
            show.start(f"bootstrap, replicates {first} to {done} of {count}:")
            yield from _together(fit.problem, solver, start, lot, show)
        else:
            show(f"replicate {done} of {count}")
            yield _alone(lot.problems[0], solver, start, lot.seed)


def _together(
    problem: Problem, solver: Solver, start: Start, lot: Lot, show: Progress
) -> list[Replicate]:
    count, dtype = len(lot.problems), problem.structure.program.dtype
    with isolated(dtype, lot.seed), threads_for(problem.engine.work * count):
        points, rule = [start.params] * count, solver.rule
        ended = iterate_together(problem, points, rule, show, weights=lot.weights, rows=lot.rows)
        if pressed() or any(run.status is Status.INTERRUPTED for run in ended):
            raise KeyboardInterrupt
        pairs = zip(lot.problems, ended, strict=True)
        ended = [judge(posed, solver, start, run) for posed, run in pairs]
    return [Replicate(r.state.params, r.state.log_joint, r.status) for r in ended]


def _weighted(fit: Fit, solver: Solver, count: int, seed: int) -> Iterator[Lot]:
    problem = fit.problem
    dtype, shape = problem.structure.program.dtype, problem.structure.unit_shape
    shares = torch.ones(shape, dtype=dtype) if problem.row_weights is None else problem.row_weights
    generator, together = np.random.default_rng(seed), solver.together(problem)
    size = _lot_size(shares.numel()) if together else 1
    for first in range(0, count, size):
        weights = dirichlet(shares, min(size, count - first), generator)
        problems = [problem.weighted(own) for own in weights]
        yield Lot(problems, seed, weights=weights.reshape(len(weights), -1) if together else None)


def dirichlet(shares: Tensor, count: int, generator: np.random.Generator) -> Tensor:
    """``count`` vectors of row weights, ``sum(shares) Dirichlet(shares)``: first dim."""
    own = shares.double().numpy()
    drawn = generator.standard_gamma(own, size=(count, *own.shape))
    drawn *= own.sum() / drawn.reshape(count, -1).sum(1).reshape((count,) + (1,) * own.ndim)
    return torch.as_tensor(drawn).to(shares.dtype)


def _parametric(fit: Fit, solver: Solver, count: int, seed: int) -> Iterator[Lot]:
    places = places_of(fit.problem, "bootstrap")
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()
    anew = redrawn(fit.problem) if solver.together(fit.problem) else None
    size = 1 if anew is None else _lot_size(anew.numbers)
    for first in range(0, count, size):
        own = seeds[first : first + size]
        pause_point()
        data = [replicate(fit, places, one) for one in own]
        posed = None if anew is None else anew.problems(data)
        if posed is not None:
            yield Lot(posed[0], seed, rows=posed[1])
            continue
        for one, drawn in zip(own, data, strict=True):
            pause_point()
            yield Lot([_posed(fit, *drawn)], one)


def _lot_size(numbers: int) -> int:
    """How many replicates make a batch, of so many numbers each."""
    return max(1, min(MOST, NUMBERS // max(1, numbers)))


def _posed(fit: Fit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
    """The problem of the fit, with other data."""
    problem, program = fit.problem, fit.problem.structure.program
    held = {n: p.held for n, p in problem.structure.parameters.items() if p.held is not None}
    fixed: list[str | Held] = [
        *(block.name for block in problem.plan.on(Rung.FIXED)),
        *(Held(name, mask, fit.params[name]) for name, mask in held.items()),
    ]
    engine = "trace" if isinstance(problem.engine, TraceEngine) else "auto"
    settings: dict[str, Any] = {"dtype": program.dtype, "floor": problem.floor, "engine": engine}
    return pose(program.model, args, kwargs, fixed=fixed, **settings)


def _alone(problem: Problem, solver: Solver, start: Start, seed: int) -> Replicate:
    with isolated(problem.structure.program.dtype, seed):
        found = solver.solve(problem, [start])
    if found.status is Status.INTERRUPTED or pressed():
        raise KeyboardInterrupt
    return Replicate(found.params, found.log_joint, found.status)


def _gathered(
    fit: Fit, method: str, found: list[Replicate], missing: int, interrupted: bool
) -> Bootstrap:
    """The replicates with their states renamed, and what was left out."""
    problem = fit.problem
    matcher, at = Matcher(problem, fit.params), coordinates(problem, fit.params)
    bad = Counter(str(one.status) for one in found if one.status is not Status.CONVERGED)
    kept, values, unclear = list[Params](), list[float](), Counter[str]()
    for one in found:
        if one.status is Status.CONVERGED:
            matched = matcher(one.params)
            if matched.unclear:
                unclear[matched.unclear] += 1
            else:
                kept.append(canonical(problem, matched.params))
                values.append(one.log_joint)
    estimates = canonical(problem, fit.params)
    params = {
        n: torch.stack([p[n] for p in kept]) if kept else estimates[n].new_empty((0, *v.shape))
        for n, v in estimates.items()
        if n in at.names
    }
    return Bootstrap(
        method,
        {n: estimates[n] for n in at.names},
        {n: params[n] for n in at.names},
        torch.tensor(values, dtype=torch.float64),
        at.labels,
        unclear.total(),
        bad.total(),
        missing,
        " ".join(_told(fit, len(found), len(kept), bad, unclear, interrupted, missing)),
    )


def _told(
    fit: Fit,
    made: int,
    kept: int,
    bad: Counter[str],
    unclear: Counter[str],
    interrupted: bool,
    missing: int,
) -> Iterator[str]:
    if not fit.converged:
        yield f"The fit itself ended as {fit.status}."
    if bad:
        why = ", ".join(f"{number} {status}" for status, number in bad.most_common())
        yield f"{bad.total()} of {made} replicates left out: they did not converge ({why})."
    if unclear:
        most = unclear.most_common(1)[0][0]
        yield (
            f"{unclear.total()} of {made} replicates left out: it is ambiguous which of their"
            f" states are which of the fit's (mostly {most})."
        )
    if too_few(kept, made - kept):
        yield "Too few are left for standard errors and intervals: what is left is no fair sample."
    if interrupted:
        yield f"Interrupted: {missing} replicates were not made."
