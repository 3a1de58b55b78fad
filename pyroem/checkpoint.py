"""Checkpoints: what a fit has done so far in a file, from which it goes on as if it never ended."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pyroem.accelerate import Trail
from pyroem.batch import at
from pyroem.errors import PyroemError, SettingError
from pyroem.loop import NOISE, Course, Outcome, Rule, State, Status
from pyroem.mstep.runs import Expected
from pyroem.problem import Problem
from pyroem.race import Start
from pyroem.starts import Starts
from pyroem.statistics import SiteStatistics
from pyroem.stored import BROKEN, FORMAT, pack, unpack, write
from pyroem.structure import Params
from pyroem.together import Member, Together

KINDS: tuple[type, ...] = (
    Course,
    Expected,
    Member,
    Outcome,
    SiteStatistics,
    Start,
    State,
    Together,
    Trail,
)
FREE = ("max_iter", "progress", "device")  # settings that a fit may go on with others of


class BusyError(Exception):
    """A state that was left in the middle of a step cannot be stored."""


class Keeper(Protocol):
    """What a checkpoint needs of a solver."""

    @property
    def rule(self) -> Rule:
        """When to stop."""
        ...

    @property
    def exact(self) -> bool:
        """Whether ``State.log_joint`` is the objective at ``State.params``."""
        ...

    @property
    def memories(self) -> tuple[type, ...]:
        """The solver's own dataclasses in ``State.memory``."""
        ...

    def freeze(self, memory: Any) -> Any:
        """``State.memory`` as tensors, plain values and ``memories``."""
        ...

    def thaw(self, problem: Problem, frozen: Any) -> Any:
        """What :meth:`freeze` was given."""
        ...


# ---------------------------------------------------------------------------------------
# Whose checkpoint it is


def identity(solver: Any, problem: Problem, init: Any, restarts: int, seed: int) -> dict[str, str]:
    """What must be the same for a fit to go on, in words."""
    structure = problem.structure
    shapes = {n: p.shape for n, p in structure.parameters.items()}
    settings = {f.name: getattr(solver, f.name) for f in fields(solver) if f.name not in FREE}
    settings["fixed"] = sorted(map(str, settings["fixed"]))  # a set has any order
    return {
        "the solver": type(solver).__qualname__,
        **{key: _words(value) for key, value in settings.items()},
        "the parameters": _words(shapes),
        "the assignments": _words(dict(structure.assignments)),
        "the observations": _words(structure.observations),
        "the number of rows": str(structure.num_rows),
        "the weight of all rows": f"{problem.rows:.12g}",
        "init": in_words(init),
        "restarts": str(restarts),
        "seed": str(seed),
    }


def in_words(init: Any) -> str:
    """A start that was asked for; values as a digest."""
    given = getattr(init, "params", init)
    return _digest(given) if isinstance(given, Mapping) else _words(given)


def _words(value: Any) -> str:
    """Words that are the same in every process."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_words(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_words, value)) + ")"
    if isinstance(value, (set, frozenset)):
        return _words(sorted(value, key=str))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return str(value)
    if isinstance(value, Tensor):
        return _digest({"": value})
    named = getattr(value, "__qualname__", None)
    if named:
        return f"{value.__module__}.{named}"
    own = vars(value) if hasattr(value, "__dict__") else {}
    plain = {k: v for k, v in own.items() if isinstance(v, (int, float, str, dict, type))}
    return type(value).__qualname__ + _words(plain)


def _digest(values: Mapping[str, Any]) -> str:
    total = hashlib.sha256()
    for name in sorted(values):
        value = torch.as_tensor(values[name]).detach().to(torch.float64).contiguous()
        total.update(repr((name, value.tolist())).encode())
    return f"values ({total.hexdigest()[:8]})"


# ---------------------------------------------------------------------------------------
# What was done so far


@dataclass
class Entry:
    """One run: where it stands, and how it ended if it did."""

    course: Course | None = None
    outcome: Outcome | None = None


class Journal:
    """What a fit has done so far; with a ``path`` it is written to a file every so often.

    A fit that goes on asks for its runs in the same order as before: those that have ended are
    known (:meth:`outcome`), and one that has not goes on where it stood (:meth:`course`).
    """

    def __init__(
        self, solver: Keeper, problem: Problem, path: Path | None = None, every: float = 60.0
    ) -> None:
        self.solver, self.problem, self.path, self.every = solver, problem, path, every
        self.identity: dict[str, str] = {}
        self.starts: Starts | None = None
        self.entries: dict[int, Entry] = {}
        self.batch: Together | None = None
        self.batch_outcomes: list[Outcome] | None = None
        self._rng: Tensor | None = None
        self._written = -math.inf

    # -- the file

    def begin(
        self, stored: Mapping[str, Any] | None, identity: dict[str, str], starts: Starts
    ) -> None:
        """Take up what is ``stored``, if it belongs to this fit."""
        self.identity, self.starts = identity, starts
        if stored is None or self.path is None:
            return
        where = f"checkpoint {self.path}:"
        try:
            self._check(stored, where)
            kinds = {kind.__name__: kind for kind in (*KINDS, *self.solver.memories)}
            for number, (course, outcome) in unpack(stored["runs"], kinds).items():
                self.entries[number] = Entry(self._thawed(course), outcome)
            self.batch, self.batch_outcomes = unpack(stored["batch"], kinds)
            starts.resume(*unpack(stored["starts"], kinds))
            self._rng = stored["rng"]
        except PyroemError:
            raise
        except BROKEN as error:
            raise SettingError(f"{where} damaged ({error}). Move it away to start anew.") from error
        reached, limit = self._reached(), self.solver.rule.max_iter
        if reached > limit:
            raise SettingError(
                f"{where} the fit has made {reached} iterations, but max_iter is {limit}: a fit"
                " that goes on may be given more iterations, not fewer."
            )
        self._written = time.monotonic()

    def _reached(self) -> int:
        """The most iterations that any run has made."""
        histories = [e.course.history for e in self.entries.values() if e.course]
        histories += [list(e.outcome.history) for e in self.entries.values() if e.outcome]
        histories += [run.history for run in self.batch.runs] if self.batch else []
        return max(map(len, histories), default=1) - 1

    def _check(self, stored: Mapping[str, Any], where: str) -> None:
        old, new = stored["fit"], self.identity
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        if keys:
            parts = (f"{k} was {old.get(k, 'not there')}, is {new.get(k, 'none')}" for k in keys)
            raise SettingError(
                f"{where} it belongs to another fit: {'; '.join(parts)}. Take up the fit with what"
                " it was begun with, or give another file."
            )
        params, value = stored["point"]["params"], stored["point"]["log_joint"]
        if params is None:
            return
        found = sum((self.problem if self.solver.exact else self.problem.sample).parts(params))
        noise = NOISE[self.problem.structure.program.dtype]
        if not abs(found - value) <= noise * max(1.0, abs(value)):
            raise SettingError(
                f"{where} it belongs to another fit: where that stood its log_joint was"
                f" {value:.6f}, but the program with the data given has {found:.6f} there."
            )

    def save(self, always: bool = False) -> None:
        """Write the file, if the last time is a while ago."""
        if self.path is None or not (always or time.monotonic() - self._written >= self.every):
            return
        if self.batch is None and not self.entries:
            return
        try:
            write(self.path, self._content())
        except BusyError:
            return  # the file as it is holds an earlier point, which is as good
        except OSError as error:
            warnings.warn(  # a full disk must not end a fit
                f"checkpoint {self.path} could not be written: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._written = time.monotonic()

    def _content(self) -> dict[str, Any]:
        assert self.starts is not None
        runs = {
            number: (self._frozen(entry.course), pack(entry.outcome and _bare(entry.outcome)))
            for number, entry in self.entries.items()
        }
        outcomes = self.batch_outcomes and [_bare(o) for o in self.batch_outcomes]
        params, log_joint = self._point()
        return {
            "format": FORMAT,
            "fit": self.identity,
            "starts": pack((self.starts.found, self.starts.searched)),
            "runs": runs,
            "batch": pack((self.batch and self.batch.trimmed(), outcomes)),
            "point": {"params": pack(params), "log_joint": log_joint},
            "rng": torch.get_rng_state() if self._rng is None else self._rng,
        }

    def _frozen(self, course: Course | None) -> Any:
        if course is None:
            return None
        memory = self.solver.freeze(course.state.memory)
        state, best = replace(course.state, memory=memory), replace(course.best, memory=None)
        return pack(replace(course.trimmed(), state=state, best=best))

    def _thawed(self, course: Course | None) -> Course | None:
        if course is None:
            return None
        memory = self.solver.thaw(self.problem, course.state.memory)
        return replace(course, state=replace(course.state, memory=memory))

    def _point(self) -> tuple[Params | None, float]:
        """Some point and its objective, by which program and data are known again."""
        states = [e.course.state for e in self.entries.values() if e.course is not None]
        states += [e.outcome.state for e in self.entries.values() if e.outcome is not None]
        if self.batch is not None:
            for copy, number in enumerate(self.batch.active):
                run = self.batch.runs[number]
                if run.status is None:
                    states.append(State(at(self.batch.params, copy), run.value, 0))
            states += [o.state for o in self.batch_outcomes or ()]
        states = [s for s in states if math.isfinite(s.log_joint)]
        if not states:
            return None, math.nan
        if self.solver.exact:
            return states[0].params, states[0].log_joint
        return states[0].params, sum(self.problem.sample.parts(states[0].params))

    # -- what the fit tells and asks

    def keep(self, number: int) -> Callable[[Course], None]:
        """Where to tell how far a run is."""

        def told(course: Course) -> None:
            if self.path is not None:
                self.entries[number] = Entry(course)
                self.save()

        return told

    def keep_batch(self, batch: Together) -> None:
        """How far the batch is."""
        self.batch, self.batch_outcomes = batch, None
        self.save()

    def course(self, number: int) -> Course | None:
        """Where a run that has not ended stood; None for one that is new."""
        self._draw_on()
        entry = self.entries.get(number)
        return None if entry is None else entry.course

    def batch_course(self) -> Together | None:
        """Where the batch stood."""
        self._draw_on()
        return self.batch

    def _draw_on(self) -> None:
        if self._rng is not None:  # an optimiser may draw random numbers
            torch.set_rng_state(self._rng)
            self._rng = None

    def outcome(self, number: int) -> Outcome | None:
        """How a run ended; None where it has not, or may have more iterations now."""
        entry = self.entries.get(number)
        if entry is None or (entry.course and entry.course.iteration < self.solver.rule.max_iter):
            return None
        return entry.outcome

    def outcomes(self) -> list[Outcome] | None:
        """The same of the batch."""
        if self.batch is None or (
            self.batch.open and self.batch.iteration < self.solver.rule.max_iter
        ):
            return None
        return self.batch_outcomes

    def ended(self, number: int, status: Status, judged: Outcome) -> None:
        """A run has ended with ``status``; ``judged`` is the verdict on it."""
        if self.path is None or status is Status.INTERRUPTED:
            return
        entry = self.entries.get(number, Entry())
        # A run that only ran out of iterations may be given more.
        entry.outcome = judged
        if not (entry.course and entry.course.iteration == self.solver.rule.max_iter):
            entry.course = None
        self.entries[number] = entry
        self.save()

    def batch_ended(self, outcomes: list[Outcome]) -> None:
        """The batch has ended, and its best runs are judged."""
        if all(outcome.status is not Status.INTERRUPTED for outcome in outcomes):
            self.batch_outcomes = outcomes
            self.save()


def _bare(outcome: Outcome) -> Outcome:
    """Without what only a next step would need."""
    return replace(outcome, state=replace(outcome.state, memory=None))
