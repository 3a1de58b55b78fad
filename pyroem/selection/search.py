"""Fits of a grid of programs, which share their starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pyroem._pyro import isolated
from pyroem.em import EM
from pyroem.errors import SettingError
from pyroem.fit import Fit
from pyroem.interrupt import deferred, pause_point, pressed
from pyroem.loop import Status, rank
from pyroem.problem import Problem
from pyroem.progress import Progress
from pyroem.selection.candidates import CRITERIA, Candidate, Selection, best_of, criteria_of
from pyroem.selection.folds import check_folds, held_out
from pyroem.selection.programs import (
    Posed,
    cast_once,
    check_common,
    check_components,
    check_grid,
    pose_all,
)
from pyroem.selection.shared import (
    FAINT,
    passed_on,
    promising,
    run_from,
    split_starts,
    value_at,
)
from pyroem.solver import Solver
from pyroem.starts import Start, starts

SLACK = 1e-7  # nats a row by which a larger program may lie below a smaller one
GUESSES = 3  # of k-means, beside what other fits give
NEIGHBOURS = 3  # fits at the same K, nearest in size, whose responsibilities a fit may start from


def select(
    model_factory: Callable[..., Callable[..., Any]],
    *args: Any,
    components: Iterable[int] = range(1, 10),
    covariance: Iterable[Any] | None = None,
    criterion: str = "bic",
    solver: Solver | None = None,
    weights: Any = None,
    seed: int = 0,
    restarts: int = 1,
    folds: int = 5,
    progress: bool = False,
    grid: Mapping[str, Iterable[Any]] | None = None,
    **kwargs: Any,
) -> Selection:
    """Fit a program with several numbers of components and settings; choose by a criterion.

    Parameters
    ----------
    model_factory
        ``model_factory(K, covariance=c, **further)`` returns the program with ``K`` components, as
        :func:`pyroem.models.gaussian.gaussian_mixture` does.
    args, kwargs
        What the program is called with, as in ``Solver.fit``.
    components, covariance, grid
        The values to try: numbers of components; settings of the factory's ``covariance`` (None:
        the factory is called without); of its further keywords, ``grid={"df": [3, 5, None]}``.
        Every combination is fitted.
    criterion
        ``"bic"``, ``"aic"``, ``"icl"``, ``"caic"``, ``"sabic"`` (see :class:`Candidate`): the
        smaller the better, the other way round than in mclust. Or ``"cv"``, the log-likelihood of
        held-out rows, the larger the better, with ``folds`` folds; that takes ``folds`` more fits
        of every program. Rows are those of the program's plate; all data is cut alike.
    solver
        ``EM()`` unless given. ``EM(accelerate="squarem")`` takes about half the time.
    weights, seed, restarts
        As in ``Solver.fit``; ``restarts`` are made of every program.
    progress
        Say on stderr which fit of how many is being made.

    Fits share their starts. With the same number of components, the settings with the fewest and
    the most parameters search for a start as ``Solver.fit`` does. The others start from what looks
    best after a short run: k-means, the responsibilities of fits at hand, their own fit with fewer
    components and one of these split in two. Then every fit that is worse than one with fewer
    parameters starts from the responsibilities of that one, and every fit that is worse than that
    with fewer components from a split of these; the better result is kept. So where a program
    contains another (and its M-step is exact) its likelihood is no lower. Data in blocks, and fits
    without assignments, share nothing: each searches for itself.

    An interrupt (Ctrl-C) ends the selection with the fits so far, and names what is missing.

    Raises:
    ------
    PyroemError
        For arguments, programs or data that cannot work, before any fit is made.
    """
    solver = EM() if solver is None else solver
    check_common(solver, restarts, seed)
    if criterion not in CRITERIA:
        raise SettingError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}.")
    sizes, lists = check_components(components), check_grid(covariance, grid)
    show = Progress("select:", progress or solver.progress)
    solver = replace(solver, progress=False)
    with deferred():
        data = args, kwargs = cast_once(args, kwargs, solver)
        posed = pose_all(model_factory, args, kwargs, sizes, lists, solver, weights)
        parts = None
        if criterion == "cv":
            parts = check_folds(posed[0], solver, data, folds, seed)
        search = Search(solver, posed, data, seed, restarts, show)
        held: dict[int, float] = {}
        try:
            for k in sizes:
                search.fit_all(k)
                search.settle(k)
                for i in search.at(k) if parts is not None else ():
                    show(f"held-out rows of {posed[i].label}")
                    clock = time.perf_counter()
                    held[i] = held_out(posed[i], solver, data, parts or [], seed, restarts)
                    search.seconds[i] += time.perf_counter() - clock
        except KeyboardInterrupt:
            if not search.fits:
                raise
        finally:
            show.close()
        return _selection(search, criterion, held, parts is not None)


class Search:
    """The fits so far, by their place in the grid; each is replaced only by a better one."""

    def __init__(
        self,
        solver: Solver,
        posed: Sequence[Posed],
        data: Any,
        seed: int,
        restarts: int,
        show: Progress,
    ) -> None:
        self.solver, self.posed, self.data = solver, posed, data
        self.seed, self.restarts, self.show = seed, restarts, show
        self.fits: dict[int, Fit] = {}
        self.seconds = dict.fromkeys(range(len(posed)), 0.0)
        self.tried: set[tuple[int, int]] = set()  # (the fit that gave a start, who got it)

    def extended(self, posed: Sequence[Posed]) -> Search:
        """The same fits, with more programs to fit."""
        search = Search(
            self.solver, [*self.posed, *posed], self.data, self.seed, self.restarts, self.show
        )
        search.fits, search.seconds = self.fits, {**search.seconds, **self.seconds}
        return search

    def best(self, k: int) -> Fit:
        """The fit with ``k`` components, of one program for each number of them."""
        (i,) = self.at(k)
        if i not in self.fits:
            self.fit_all(k)
            self.settle(k)
        return self.fits[i]

    def at(self, k: int) -> list[int]:
        """The programs with ``k`` components, those with few parameters first."""
        own = [i for i, p in enumerate(self.posed) if p.components == k]
        return sorted(own, key=lambda i: self.posed[i].problem.df)

    def smaller(self, i: int) -> Fit | None:
        """The fit of the same settings with the next smaller number of components."""
        own = self.posed[i]
        below = [
            j
            for j, p in enumerate(self.posed)
            if p.settings == own.settings and p.components < own.components and self.healthy(j)
        ]
        return self.fits[max(below, key=lambda j: self.posed[j].components)] if below else None

    def healthy(self, i: int) -> bool:
        """Whether there is a fit that others may start from."""
        fit = self.fits.get(i)
        return fit is not None and fit.status is not Status.INTERRUPTED and healthy(fit)

    def fit_all(self, k: int) -> None:
        """A first fit of every program with ``k`` components."""
        own = self.at(k)
        for i in dict.fromkeys([own[0], own[-1], *own]):
            pause_point()
            count = f"fit {len(self.fits) + 1} of {len(self.posed)}"
            self.show(f"{count}: {self.posed[i].label}")
            clock = time.perf_counter()
            problem = self.posed[i].problem
            rivals = [] if i in (own[0], own[-1]) else self._rivals(i, own)
            self.fits[i] = self._first(problem, rivals)
            self.seconds[i] += time.perf_counter() - clock
            if self.fits[i].status is Status.INTERRUPTED or pressed():
                raise KeyboardInterrupt

    def _first(self, problem: Problem, rivals: Sequence[Start]) -> Fit:
        """The fit from the most promising rivals; from a search as in ``fit`` without any."""
        if rivals:
            chosen = promising(problem, self.solver, rivals, self.restarts, self.seed)
            return run_from(problem, self.solver, [*chosen, *rivals], len(chosen), self.seed)
        # Without assignments there is nothing random, and one start.
        wanted = self.restarts if problem.structure.assignments else 1
        with isolated(self.solver.dtype, self.seed):
            return self.solver.solve(problem, starts(problem, "auto", wanted, self.seed), wanted)

    def _rivals(self, i: int, own: Sequence[int]) -> list[Start]:
        """Starts of a program from fits at hand, from its smaller fit, and from k-means."""
        problem, size = self.posed[i].problem, self.posed[i].problem.df
        known = [j for j in own if self.healthy(j)]
        near = sorted(known, key=lambda j: abs(self.posed[j].problem.df - size))[:NEIGHBOURS]
        known = [j for j in known if j in near or j in (own[0], own[-1])]
        found = list(passed_on(problem, [(self.posed[j].label, self.fits[j]) for j in known]))
        smaller = self.smaller(i)
        if smaller is not None:
            found += split_starts(problem, smaller, self.data, self.seed)
        if found:
            with suppress(SettingError):
                found += starts(problem, "kmeans", GUESSES, self.seed)
        return found

    def settle(self, k: int) -> None:
        """Refit what lies below a smaller program until nothing changes any more."""
        changed = True
        while changed:
            changed = False
            for i in self.at(k):
                self.show(f"order of the fits: {self.posed[i].label}")
                changed |= self._above_nested(i)
                changed |= self._above_smaller(i)

    def _above_nested(self, i: int) -> bool:
        """Start from fits with fewer parameters and a higher likelihood; whether it helped.

        The best of these starts is tried in any case; others only where the start itself is
        better than the fit: that is so of any fit whose program is contained in this one, since a
        step of EM from its responsibilities does not lower the likelihood.
        """
        posed, helped = self.posed[i], False
        sources = [
            j
            for j in self.at(posed.components)
            if self.healthy(j)
            and (self.posed[j].problem.df < posed.problem.df or not self.healthy(i))
            and (not self.healthy(i) or self._below(self.fits[i], self.fits[j]))
            and (id(self.fits[j]), i) not in self.tried
        ]
        self.tried |= {(id(self.fits[j]), i) for j in sources}
        given = passed_on(posed.problem, [(self.posed[j].label, self.fits[j]) for j in sources])
        valued = sorted(((value_at(posed.problem, s), s) for s in given), key=lambda p: -p[0])
        for number, (value, start) in enumerate(valued):
            if number and self.healthy(i) and not value > self.fits[i].log_joint:
                break
            helped |= self._improve(i, [start])
        return helped

    def _above_smaller(self, i: int) -> bool:
        """Start from the fit with fewer components, split, if that has the higher likelihood."""
        smaller, problem = self.smaller(i), self.posed[i].problem
        if smaller is None or (id(smaller), i) in self.tried:
            return False
        if self.healthy(i) and not self._below(self.fits[i], smaller):
            return False
        self.tried.add((id(smaller), i))
        helped = False
        for share in (1.0, FAINT, FAINT**2):
            given = split_starts(problem, smaller, self.data, self.seed, share)
            chosen = promising(problem, self.solver, given, 1, self.seed)
            helped |= bool(chosen) and self._improve(i, chosen)
            if self.healthy(i) and not self._below(self.fits[i], smaller):
                break
        return helped

    def _below(self, fit: Fit, other: Fit) -> bool:
        gap = other.log_likelihood - fit.log_likelihood
        return gap > SLACK * fit.problem.rows

    def _improve(self, i: int, chosen: Sequence[Start]) -> bool:
        """Run from other starts; keep the better fit, and say whether it is the new one."""
        pause_point()
        clock = time.perf_counter()
        fit = run_from(self.posed[i].problem, self.solver, chosen, len(chosen), self.seed)
        self.seconds[i] += time.perf_counter() - clock
        if fit.status is Status.INTERRUPTED or pressed():
            raise KeyboardInterrupt
        old = self.fits[i]
        better = rank(fit.status, fit.log_joint) > rank(old.status, old.log_joint)
        if better:
            self.fits[i] = fit
        return better


def healthy(fit: Fit) -> bool:
    """Whether a fit has a likelihood that says something: no collapse, no saddle."""
    finite, healthy, _ = rank(fit.status, fit.log_joint)
    return finite and healthy


def _selection(search: Search, criterion: str, held: Mapping[int, float], asked: bool) -> Selection:
    rows, missing = [], []
    for i, posed in enumerate(search.posed):
        fit = search.fits.get(i)
        cut = fit is None or fit.status is Status.INTERRUPTED
        if cut or (asked and i not in held):
            missing.append(posed.label)
        if fit is None:
            continue
        # A solver whose objective is not exact has no other end than that of its iterations.
        ended = fit.converged or (not search.solver.exact and fit.status is Status.MAX_ITER)
        found = criteria_of(fit)
        rows.append(
            Candidate(
                components=posed.components,
                settings=dict(posed.settings),
                log_likelihood=fit.log_likelihood,
                df=fit.df,
                cv=held.get(i),
                n_iter=fit.n_iter,
                seconds=search.seconds[i],
                status=fit.status,
                counts=ended,
                fit=fit,
                **found,
            )
        )
    return Selection(tuple(rows), criterion, best_of(rows, criterion), tuple(missing))
