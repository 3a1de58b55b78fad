"""Fits of several programs, which share their starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pyroem._pyro import isolated
from pyroem.blocks import is_source
from pyroem.errors import SettingError
from pyroem.fit import Fit
from pyroem.interrupt import pause_point, pressed
from pyroem.loop import Status, rank
from pyroem.problem import Problem
from pyroem.progress import Progress
from pyroem.race import Start
from pyroem.selection.programs import Posed
from pyroem.selection.shared import (
    FAINT,
    passed_on,
    promising,
    run_from,
    split_starts,
    value_at,
)
from pyroem.solver import Solver
from pyroem.starts import starts

SLACK = 1e-7  # nats a row by which a larger program may lie below a smaller one
GUESSES = 3  # of k-means, beside what other fits give
ROUNDS = 10  # of refits; two or three suffice as a rule
NEIGHBOURS = 3  # fits at the same K, nearest in size, whose responsibilities a fit may start from


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
        self.sharing = not (data[0] and is_source(data[0][0]))
        self.tried: set[tuple[int, float, int]] = set()  # who gave a start, its fit, who got it

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

    def smaller(self, i: int) -> int | None:
        """The program of the same settings with the next smaller number of components."""
        own = self.posed[i]
        below = [
            j
            for j, p in enumerate(self.posed)
            if p.settings == own.settings and p.components < own.components and self.healthy(j)
        ]
        return max(below, key=lambda j: self.posed[j].components, default=None)

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
        if not self.sharing:
            return []
        known = [j for j in own if self.healthy(j)]
        near = sorted(known, key=lambda j: abs(self.posed[j].problem.df - size))[:NEIGHBOURS]
        known = [j for j in known if j in near or j in (own[0], own[-1])]
        found = list(passed_on(problem, [(self.posed[j].label, self.fits[j]) for j in known]))
        smaller = self.smaller(i)
        if smaller is not None:
            found += split_starts(problem, self.fits[smaller], self.data, self.seed)
        if found:
            with suppress(SettingError):
                found += starts(problem, "kmeans", GUESSES, self.seed)
        return found

    def settle(self, k: int) -> None:
        """Refit what lies below a smaller program until nothing changes any more."""
        for _ in range(ROUNDS if self.sharing else 0):
            changed = False
            for i in self.at(k):
                self.show(f"order of the fits: {self.posed[i].label}")
                changed |= self._above_nested(i)
                changed |= self._above_smaller(i)
            if not changed:
                break

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
            and self._try(j, i) not in self.tried
        ]
        self.tried |= {self._try(j, i) for j in sources}
        given = passed_on(posed.problem, [(self.posed[j].label, self.fits[j]) for j in sources])
        valued = sorted(((value_at(posed.problem, s), s) for s in given), key=lambda p: -p[0])
        for number, (value, start) in enumerate(valued):
            if number and self.healthy(i) and not value > self.fits[i].log_joint:
                break
            helped |= self._improve(i, [start])
        return helped

    def _above_smaller(self, i: int) -> bool:
        """Start from the fit with fewer components, split, if that has the higher likelihood."""
        place, problem = self.smaller(i), self.posed[i].problem
        if place is None or self._try(place, i) in self.tried:
            return False
        smaller = self.fits[place]
        if self.healthy(i) and not self._below(self.fits[i], smaller):
            return False
        self.tried.add(self._try(place, i))
        helped = False
        for share in (1.0, FAINT, FAINT**2):
            given = split_starts(problem, smaller, self.data, self.seed, share)
            chosen = promising(problem, self.solver, given, 1, self.seed)
            helped |= bool(chosen) and self._improve(i, chosen)
            if self.healthy(i) and not self._below(self.fits[i], smaller):
                break
        return helped

    def _try(self, source: int, i: int) -> tuple[int, float, int]:
        return source, self.fits[source].log_joint, i

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
