"""The base of all solvers: settings, the entry point ``fit``, and an honest verdict on each run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch

from pyroem._pyro import isolated
from pyroem.checkpoint import Journal, identity, in_words
from pyroem.distributed import Ranks, ranks_of, together
from pyroem.errors import SettingError
from pyroem.fit import Fit
from pyroem.interrupt import deferred, pause_point, pressed
from pyroem.loop import Outcome, Restart, Rule, State, Status, iterate, rank
from pyroem.problem import ENGINES, Problem, pose
from pyroem.progress import Progress
from pyroem.race import Start
from pyroem.shards import pose_shared
from pyroem.starts import starts
from pyroem.stored import check_path, read
from pyroem.structure import Held, Params
from pyroem.threads import threads_for
from pyroem.together import iterate_together
from pyroem.verdict import judge

SETTINGS = """
    Settings of every solver
    ------------------------
    tol
        Stop when the objective changes by no more than this (in nats a row) ...
    param_tol
        ... and every parameter by no more than this fraction of its largest element.
    max_iter
        The most iterations from one start.
    fixed
        Names of parameters that are held at their start; or a dict from names to masks, of which
        the true elements are held (True: all of them).
    floor
        No variance goes below this fraction of the data's own variance; 0 turns the floor off. A
        variance that ends at its floor makes the fit DEGENERATE.
    dtype
        The floating type of the fit; data and constants are cast to it.
    engine
        ``"kernel"``: matrix products over the statistics of the rows, for independent rows with
        finite assignments and exponential families; ``"trace"``: one enumerated Pyro trace for
        each pass, for every program; ``"auto"``: the kernel where there is one.
    device
        ``"cuda"``: the rows lie on an accelerator and the E-steps are computed there (by the
        kernel). Programs are read, and M-steps made, on the CPU.
    progress
        Show on stderr how far the fit is, and about how long it will still take: the changes of
        the objective and the parameters fall geometrically, and are extrapolated to ``tol`` and
        ``param_tol``; where they do not fall (or another solver than EM works) it says how long
        all iterations up to ``max_iter`` would take.
    keep_path
        Keep the parameters of every iteration, in ``Fit.path``: for pictures, and to look closely.
        Starts then run one after the other.
    """


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Settings that all solvers share. A solver holds settings only; ``fit`` takes the problem."""

    tol: float = 1e-8
    param_tol: float = 1e-5
    max_iter: int = 1000
    fixed: Iterable[str | Held] | Mapping[str, Any] = ()
    floor: float = 1e-10
    dtype: torch.dtype = torch.float64
    engine: str = "auto"
    device: str | torch.device | None = None
    progress: bool = False
    keep_path: bool = False

    def __init_subclass__(cls) -> None:
        cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n" + SETTINGS

    def __post_init__(self) -> None:
        own = type(self).__name__
        for key in ("tol", "param_tol", "floor"):
            value = getattr(self, key)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise SettingError(f"{own}: {key} must be a number >= 0, got {value!r}.")
        if (
            isinstance(self.max_iter, bool)
            or not isinstance(self.max_iter, int)
            or (self.max_iter < 1)
        ):
            raise SettingError(
                f"{own}: max_iter must be a positive integer, got {self.max_iter!r}."
            )
        if self.dtype not in (torch.float32, torch.float64):
            raise SettingError(
                f"{own}: dtype must be torch.float64 or torch.float32, got {self.dtype!r}."
            )
        if self.engine not in ENGINES:
            raise SettingError(
                f"{own}: engine must be one of {', '.join(ENGINES)}, got {self.engine!r}."
            )
        object.__setattr__(self, "fixed", _parts(own, self.fixed))

    @property
    def name(self) -> str:
        """What reports call the solver."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device | None:
        """The device, if it is not the CPU."""
        if self.device is None:
            return None
        try:
            torch.zeros((), dtype=self.dtype, device=self.device)
        except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
            raise SettingError(
                f"{type(self).__name__}: device {str(self.device)!r} cannot be used: {error}"
            ) from error
        device = torch.device(self.device)
        return None if device.type == "cpu" else device

    @property
    def monotone(self) -> bool:
        """Whether a step that lowers the objective is an error."""
        raise NotImplementedError

    out_of_iterations: ClassVar[str] = ""  # what to say where they ran out

    @property
    def exact(self) -> bool:
        """Whether ``State.log_joint`` is the objective at ``State.params``."""
        return True

    @property
    def patience(self) -> int:
        """For how many iterations in a row the stopping rule must hold."""
        raise NotImplementedError

    @property
    def rule(self) -> Rule:
        """When to stop."""
        own = self.keep_path
        return Rule(self.tol, self.param_tol, self.max_iter, self.patience, keep_path=own)

    def pose(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        weights: Any,
        ranks: Ranks | None = None,
        init: Any = None,
    ) -> Problem:
        """The program with its data, read and planned under the solver's settings.

        With ``ranks``, the data is that of this process, one of several. Elements that are held
        have the values that ``init`` gives.
        """
        given = getattr(init, "params", init)
        given = given if isinstance(given, Mapping) else {}
        fixed = [
            replace(part, value=given.get(part.name)) if isinstance(part, Held) else part
            for part in _parts(type(self).__name__, self.fixed)
        ]
        if ranks is not None:
            if self.engine == "trace":
                raise SettingError("engine='trace': a fit over several processes needs the kernel.")
            return pose_shared(
                model,
                args,
                kwargs,
                ranks,
                dtype=self.dtype,
                fixed=fixed,
                floor=self.floor,
                weights=weights,
                device=self._device,
            )
        return pose(
            model,
            args,
            kwargs,
            dtype=self.dtype,
            fixed=fixed,
            floor=self.floor,
            weights=weights,
            engine=self.engine,
            device=self._device,
        )

    def check(self, problem: Problem) -> None:
        """Raise where the solver cannot work on the problem."""

    def begin(self, problem: Problem, params: Params) -> State:
        """The state at the start."""
        raise NotImplementedError

    def step(self, problem: Problem, state: State) -> State:
        """One iteration."""
        raise NotImplementedError

    def approximation(self, problem: Problem, state: State) -> Any:
        """An approximate posterior of the parameters, if the solver makes one."""
        return None

    memories: ClassVar[tuple[type, ...]] = ()  # own dataclasses in State.memory, for checkpoints

    def freeze(self, memory: Any) -> Any:
        """``State.memory`` for a checkpoint: tensors, plain values, dataclasses of them."""
        return memory

    def thaw(self, problem: Problem, frozen: Any) -> Any:
        """``State.memory`` again, of what :meth:`freeze` made of it."""
        return frozen

    def fit(
        self,
        model: Callable[..., Any],
        *args: Any,
        init: Any = "auto",
        restarts: int = 1,
        seed: int = 0,
        weights: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 60.0,
        distributed: Any = False,
        **kwargs: Any,
    ) -> Fit:
        """Fit a Pyro program to data.

        Parameters
        ----------
        model, args, kwargs
            The program and what it is called with. (A program whose own argument is called
            ``init``, ``restarts``, ``seed``, ``weights``, ``checkpoint``, ``checkpoint_every`` or
            ``distributed`` is wrapped with ``functools.partial``.)
        init
            ``"auto"`` (the program's own values where they tell the states apart, else the best
            of several guesses), ``"thorough"`` (more guesses, then split-and-merge moves: where a
            better optimum is worth some seconds), ``"kmeans"``, ``"ward"`` (Ward's tree, cut into
            clusters), ``"random"``, ``"prior"``, ``"model"`` (the values that the program gives),
            a dict of values (what it lacks is found), or a ``Fit``. A dict may also hold an
            assignment: the states of all rows, or their probabilities (rows by states), from which
            one M-step leads to the start.
        restarts
            The number of starts; the best fit is returned, with the objective of each.
        seed
            Of all that is random. The global random state is left alone.
        weights
            One non-negative weight a row: 2 counts a row twice, 0 leaves it out.
        checkpoint
            A file that holds all that was done so far. Where it exists the fit goes on from it,
            and ends where a fit without a break ends. With a larger ``max_iter`` a fit that ran
            out of iterations gets more.
        checkpoint_every
            The seconds between two writes; the file is also written at the end and at a Ctrl-C.
        distributed
            Fit the rows of several processes, each of which makes the same call with rows (and
            weights) of its own: True for all processes of ``torch.distributed``, or a process
            group. All end with the same fit: that of all rows. A process may have no rows: data of
            shape ``(0, ...)``. It needs a program with a kernel, whose parameters and arguments
            are not computed from the data. What a ``Fit`` says of rows when no data is given
            concerns those of its own process.

            Where one process fails, or is interrupted, all end. Where one is gone they end with an
            error, at the latest after the timeout of the process group
            (``init_process_group(timeout=...)``, 30 minutes unless told otherwise).

        Raises:
        ------
        PyroemError
            For a program, data or settings that cannot work, before any fitting; never for a fit
            that goes badly (see ``Fit.status``).
        """
        if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 1:
            raise SettingError(f"restarts must be a positive integer, got {restarts!r}.")
        if isinstance(seed, np.integer):
            seed = int(seed)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise SettingError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}.")
        ranks = ranks_of(distributed)
        if ranks is not None and checkpoint is not None:
            raise SettingError("checkpoint: a fit by several processes cannot be stored.")
        path = check_path(checkpoint, checkpoint_every)
        if ranks is not None and ranks.rank and self.progress:  # one of them tells how it goes
            quiet, given = replace(self, progress=False), (init, restarts, seed, weights)
            names = ("init", "restarts", "seed", "weights")
            own = dict(zip(names, given, strict=True))
            return quiet.fit(model, *args, **own, distributed=distributed, **kwargs)
        stored = None if path is None else read(path)
        with deferred(), together(ranks):
            if ranks is not None:
                ranks.check_same(
                    lambda: {
                        **self._plain,
                        "init": in_words(init),
                        "restarts": restarts,
                        "seed": seed,
                    }
                )
            problem = self.pose(model, args, kwargs, weights, ranks, init)
            self.check(problem)
            pause_point()
            show = Progress(f"{self.name}:", self.progress)
            journal = Journal(self, problem, path, checkpoint_every)
            with isolated(self.dtype, seed):
                chosen = starts(problem, init, restarts, seed, show)
                if path is not None:
                    own = identity(self, problem, init, restarts, seed)
                    journal.begin(stored, own, chosen)
                if ranks is None:
                    return self.solve(problem, chosen, restarts, journal)
                fit = self.solve(problem, _agreed(ranks, chosen), restarts)
                return replace(fit, params=ranks.share(fit.params))

    @property
    def _plain(self) -> dict[str, Any]:
        """The settings that can be compared between processes; the device may differ."""
        plain = (int, float, str, tuple, torch.dtype, type(None))
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        same = {"solver": self.name, **values}
        return {
            name: value
            for name, value in same.items()
            if isinstance(value, plain) and name not in ("device", "progress")
        }

    def solve(
        self,
        problem: Problem,
        chosen: Iterable[Start],
        count: int = 1,
        journal: Journal | None = None,
    ) -> Fit:
        """Run from the first ``count`` starts, and from the others while no run is healthy.

        The best healthy run becomes the fit.
        """
        coming, journal = iter(chosen), journal or Journal(self, problem)
        show = Progress(self.name, self.progress)
        try:
            runs = self._run_together(problem, coming, count, journal, show)
            while len(runs) < count or not any(_rank(run)[1] for _, run in runs):
                try:
                    start = next(coming, None)
                except KeyboardInterrupt:
                    if not runs:
                        raise
                    start = None
                if start is None:
                    break
                show.start(self.name if count == 1 else f"{self.name} start {len(runs) + 1}")
                runs.append((start, self._run(problem, start, len(runs), journal, show)))
                if runs[-1][1].status is Status.INTERRUPTED or pressed():
                    break
        finally:
            show.close()
        journal.save(always=True)
        start, best = max(runs, key=lambda pair: _rank(pair[1]))
        cut = any(run.status is Status.INTERRUPTED for _, run in runs)
        if (cut or pressed()) and (len(runs) < count or best.status is not Status.INTERRUPTED):
            message = f"in start {len(runs)} of {count}; the best: {best.status}"
            best = replace(best, status=Status.INTERRUPTED, message=message)
        return _finish(problem, self, start, best, tuple(run for _, run in runs))

    def together(self, problem: Problem) -> bool:
        """Whether runs from several starts can go as one batch."""
        return False

    def _run_together(
        self,
        problem: Problem,
        coming: Iterator[Start],
        count: int,
        journal: Journal,
        show: Progress,
    ) -> list[tuple[Start, Outcome]]:
        """All ``count`` runs as one batch, if that can be; judged as far as the best needs it."""
        if count < 2 or self.keep_path or not self.together(problem):
            return []
        chosen = list(islice(coming, count))
        known = journal.outcomes()
        if known is not None:
            return list(zip(chosen, known, strict=True))
        show.start(f"{self.name}, {count} starts:")
        points = [start.params for start in chosen]
        course, keep = journal.batch_course(), journal.keep_batch if journal.path else None
        with threads_for(problem.engine.work * count):
            outcomes = iterate_together(problem, points, self.rule, show, course, keep)
        runs = list(zip(chosen, outcomes, strict=True))
        judged: set[int] = set()
        while True:  # the best must hold what it promises
            best = max(range(len(runs)), key=lambda i: _rank(runs[i][1]))
            if best in judged:
                break
            judged.add(best)
            runs[best] = (runs[best][0], judge(problem, self, *runs[best]))
        show.end(f"best: {_ending(runs[best][1])}")
        journal.batch_ended([outcome for _, outcome in runs])
        return runs

    def _run(
        self, problem: Problem, start: Start, number: int, journal: Journal, show: Progress
    ) -> Outcome:
        known = journal.outcome(number)
        if known is not None:
            return known
        with threads_for(problem.engine.work):
            outcome = iterate(
                problem,
                self,
                start.params,
                self.rule,
                progress=show,
                interrupted=start.interrupted,
                course=journal.course(number),
                keep=journal.keep(number),
            )
            judged = judge(problem, self, start, outcome)
        show.end(_ending(judged))
        journal.ended(number, outcome.status, judged)
        return judged


def _ending(run: Outcome) -> str:
    last = run.history[-1]
    return (
        f"{run.status} after {last.iteration} iterations  log_joint {run.state.log_joint:.6f}"
        f"  {last.seconds:.1f} s"
    )


def _parts(solver: str, fixed: Any) -> tuple[str | Held, ...]:
    """What is fixed: names, and masks as nested tuples, so that settings can be compared."""
    if isinstance(fixed, str):
        return (fixed,)
    if isinstance(fixed, Mapping):
        parts = [_part(name, mask) for name, mask in fixed.items()]
        return tuple(part for part in parts if part is not None)
    if not isinstance(fixed, Iterable):
        raise SettingError(
            f"{solver}: fixed must be names of parameters, or a dict from names to masks, got"
            f" {fixed!r}."
        )
    return tuple(fixed)


def _part(name: str, mask: Any) -> str | Held | None:
    if isinstance(mask, bool):
        return name if mask else None

    def frozen(x: Any) -> Any:
        return tuple(map(frozen, x)) if isinstance(x, list) else x

    try:
        return Held(name, frozen(torch.as_tensor(mask).tolist()))
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(
            f"fixed: for parameter '{name}' expected True, or a mask of booleans, got {mask!r}."
        ) from error


def _agreed(ranks: Ranks, chosen: Iterable[Start]) -> Iterator[Start]:
    """The starts of the first process, which are those of all but for rounding."""
    for start in chosen:
        params = ranks.share(start.params, start.interrupted)
        yield replace(start, params=params, interrupted=pressed())


def _rank(run: Outcome) -> tuple[bool, bool, float]:
    return rank(run.status, run.state.log_joint)


def _finish(
    problem: Problem, solver: Solver, start: Start, run: Outcome, runs: tuple[Outcome, ...]
) -> Fit:
    params = {n: v.detach().clone() for n, v in run.state.params.items()}
    log_likelihood, log_prior = run.parts or problem.parts(params)
    restarts = tuple(Restart(r.state.log_joint, r.status, len(r.history) - 1) for r in runs)
    return Fit(
        params,
        log_likelihood,
        log_prior,
        run.history,
        run.status,
        run.message,
        solver.name,
        solver.rule,
        start.how,
        restarts,
        problem,
        solver.approximation(problem, run.state),
        run.path,
    )
