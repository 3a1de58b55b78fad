"""Fits: the base of all solvers, and what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import isolated, unwrap
from pyroem.diagnose import collapsed, dead
from pyroem.errors import ModelError, SettingError
from pyroem.estep.trace import factor_weights, posterior
from pyroem.explain import describe
from pyroem.families import forms
from pyroem.loop import Outcome, Record, State, Status, iterate
from pyroem.problem import Problem, check_weights, pose
from pyroem.starts import Start, starts
from pyroem.structure import Params, Structure, read
from pyroem.symmetry import coinciding


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Settings that all solvers share. A solver holds settings only; ``fit`` takes the problem.

    Parameters
    ----------
    tol
        Stop when the objective changes by no more than this (in nats a row) ...
    param_tol
        ... and every parameter by no more than this fraction of its largest element.
    max_iter
        The most iterations from one start.
    fixed
        Names of parameters that are held at their start.
    floor
        No variance goes below this fraction of the data's own variance; 0 turns the floor off. A
        variance that ends at its floor makes the fit DEGENERATE.
    dtype
        The floating type of the fit; data and constants are cast to it.
    progress
        Show a line of progress on stderr.
    """

    tol: float = 1e-8
    param_tol: float = 1e-5
    max_iter: int = 1000
    fixed: Iterable[str] = ()
    floor: float = 1e-10
    dtype: torch.dtype = torch.float64
    progress: bool = False

    name: ClassVar[str] = "solver"

    def __post_init__(self) -> None:
        own = type(self).__name__
        for key in ("tol", "param_tol", "floor"):
            value = getattr(self, key)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise SettingError(f"{own}: {key} must be a number >= 0, got {value!r}.")
        if isinstance(self.max_iter, bool) or not isinstance(self.max_iter, int) or (
            self.max_iter < 1
        ):
            raise SettingError(f"{own}: max_iter must be a positive integer, got {self.max_iter!r}.")
        if self.dtype not in (torch.float32, torch.float64):
            raise SettingError(
                f"{own}: dtype must be torch.float64 or torch.float32, got {self.dtype!r}."
            )
        fixed = (self.fixed,) if isinstance(self.fixed, str) else tuple(self.fixed)
        object.__setattr__(self, "fixed", fixed)

    @property
    def monotone(self) -> bool:
        """Whether a step that lowers the objective is an error."""
        raise NotImplementedError

    @property
    def patience(self) -> int:
        """For how many iterations in a row the stopping rule must hold."""
        raise NotImplementedError

    def check(self, problem: Problem) -> None:
        """Raise where the solver cannot work on the problem."""

    def begin(self, problem: Problem, params: Params) -> State:
        """The state at the start."""
        raise NotImplementedError

    def step(self, problem: Problem, state: State) -> State:
        """One iteration."""
        raise NotImplementedError

    def fit(
        self,
        model: Callable[..., Any],
        *args: Any,
        init: Any = "auto",
        restarts: int = 1,
        seed: int = 0,
        weights: Any = None,
        **kwargs: Any,
    ) -> Fit:
        """Fit a Pyro program to data.

        Parameters
        ----------
        model, args, kwargs
            The program and what it is called with. (A program whose own argument is called
            ``init``, ``restarts``, ``seed`` or ``weights`` is wrapped with ``functools.partial``.)
        init
            ``"auto"`` (the program's own values where they tell the states apart, else the best
            of several guesses), ``"kmeans"``, ``"random"``, ``"prior"``, ``"model"`` (the values
            that the program gives), a dict of values (what it lacks is found), or a ``Fit``.
        restarts
            The number of starts; the best fit is returned, with the objective of each.
        seed
            Of all that is random. The global random state is left alone.
        weights
            One non-negative weight a row: 2 counts a row twice, 0 leaves it out.

        Raises
        ------
        PyroemError
            For a program, data or settings that cannot work, before any fitting; never for a fit
            that goes badly (see ``Fit.status``).
        """
        if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 1:
            raise SettingError(f"restarts must be a positive integer, got {restarts!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise SettingError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}.")
        problem = pose(
            model, args, kwargs, dtype=self.dtype, fixed=self.fixed, floor=self.floor,
            weights=weights,
        )
        self.check(problem)
        with isolated(self.dtype, seed):
            return self.solve(problem, starts(problem, init, restarts, seed))

    def solve(self, problem: Problem, chosen: list[Start]) -> Fit:
        """Run from every start; the best healthy run becomes the fit."""
        runs: list[Outcome] = []
        for i, start in enumerate(chosen):
            label = self.name if len(chosen) == 1 else f"{self.name} {i + 1}/{len(chosen)}"
            runs.append(self._run(problem, start, label))
            if runs[-1].status is Status.INTERRUPTED:
                break
        best = max(range(len(runs)), key=lambda i: _rank(runs[i]))
        return _finish(problem, self, chosen[best], runs[best], tuple(runs))

    def _run(self, problem: Problem, start: Start, label: str) -> Outcome:
        outcome = iterate(
            problem,
            self,
            start.params,
            tol=self.tol,
            param_tol=self.param_tol,
            max_iter=self.max_iter,
            progress=self.progress,
            label=label,
        )
        return _judge(problem, start, outcome)


def _rank(run: Outcome) -> tuple[bool, bool, float]:
    value = run.state.log_joint
    finite = math.isfinite(value)
    healthy = run.status not in (Status.DEGENERATE, Status.NON_FINITE)
    return finite, healthy, value if finite else -math.inf


def _judge(problem: Problem, start: Start, outcome: Outcome) -> Outcome:
    """Look at where a run ended: collapse and symmetry overrule convergence."""
    params = outcome.state.params
    if outcome.status in (Status.NON_FINITE, Status.DECREASED):
        return outcome
    expected, _ = problem.e_step(params)
    problems = collapsed(problem, params) + dead(problem, expected)
    if problems:
        return replace(outcome, status=Status.DEGENERATE, message="; ".join(problems))
    structure, plan = problem.structure, problem.plan
    same = coinciding(structure, plan, start.params)
    if same:
        still = coinciding(structure, plan, params)
        stuck = {z: [p for p in pairs if p in still.get(z, [])] for z, pairs in same.items()}
        stuck = {z: pairs for z, pairs in stuck.items() if pairs}
        if stuck:
            z, pairs = next(iter(stuck.items()))
            message = f"states {pairs[0][0]} and {pairs[0][1]} of '{z}' started alike and stayed so"
            return replace(outcome, status=Status.SYMMETRIC, message=message)
    return outcome


def _finish(
    problem: Problem, solver: Solver, start: Start, run: Outcome, runs: tuple[Outcome, ...]
) -> Fit:
    params = {n: v.detach().clone() for n, v in run.state.params.items()}
    with torch.no_grad():
        try:
            log_likelihood, log_prior = (float(v) for v in problem.log_joint(params))
        except ModelError:
            log_likelihood = log_prior = math.nan
    restarts = tuple(Restart(r.state.log_joint, r.status, len(r.history) - 1) for r in runs)
    return Fit(
        params, log_likelihood, log_prior, run.history, run.status, run.message, solver, start.how,
        restarts, problem,
    )


@dataclass(frozen=True)
class Restart:
    """How one of several starts ended."""

    log_joint: float
    status: Status
    n_iter: int


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted program.

    Attributes
    ----------
    params
        Every parameter by name, in the constrained space.
    log_likelihood, log_prior
        The two parts of the objective at ``params``.
    history
        One :class:`~pyroem.loop.Record` for each iteration.
    status, message
        How the fit ended, and the particulars.
    start
        How the start was found.
    restarts
        The objective, status and iterations of every start.
    """

    params: Params
    log_likelihood: float
    log_prior: float
    history: tuple[Record, ...]
    status: Status
    message: str
    solver: Solver
    start: str
    restarts: tuple[Restart, ...]
    problem: Problem

    @property
    def log_joint(self) -> float:
        """``log_likelihood + log_prior``: what every solver maximises."""
        return self.log_likelihood + self.log_prior

    @property
    def converged(self) -> bool:
        """Whether the fit ended well."""
        return self.status is Status.CONVERGED

    @property
    def n_iter(self) -> int:
        """The number of iterations."""
        return len(self.history) - 1

    def explain(self) -> str:
        """How each parameter is updated and why, where the fit started and how it ended."""
        return describe(self)

    def __str__(self) -> str:
        note = f" ({self.message})" if self.message else ""
        return (
            f"{self.solver.name} fit: {self.status}{note} after {self.n_iter} iterations,"
            f" log_joint {self.log_joint:.6f}, log_likelihood {self.log_likelihood:.6f}"
        )

    def __repr__(self) -> str:
        return f"<{self}>"

    def _structure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
        """The structure on new data, or on that of the fit where none is given."""
        own = self.problem.structure
        if not args and not kwargs:
            return own
        structure = read(own.program.model, args, kwargs, dtype=own.program.dtype)
        for name, parameter in structure.parameters.items():
            if name not in self.params or parameter.shape != tuple(self.params[name].shape):
                raise ModelError(
                    f"On the new data parameter '{name}' has shape {parameter.shape}, but the fit"
                    f" has {tuple(self.params[name].shape) if name in self.params else 'none'}."
                )
        return structure

    def posterior(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """For each assignment its marginal posterior as a Pyro distribution over the plates.

        ``Bernoulli`` and ``OneHotCategorical`` assignments keep their kind; the others give a
        ``Categorical`` over the states.
        """
        structure = self._structure(args, kwargs)
        with isolated(structure.program.dtype, 0):
            marginals = posterior(structure, self.params).marginals
            nodes = structure.program.run(self.params).nodes
        return {z: _as_distribution(nodes[z], p) for z, p in marginals.items()}

    def responsibilities(self, *args: Any, **kwargs: Any) -> Any:
        """The posterior probability of each state: the plates' dims, then the states.

        One tensor where the program has one assignment, else a dict by assignment.
        """
        structure = self._structure(args, kwargs)
        with isolated(structure.program.dtype, 0):
            return _single(posterior(structure, self.params).marginals)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The most probable joint assignment of each row (a chain's: Viterbi), as state numbers.

        One tensor where the program has one assignment, else a dict by assignment.
        """
        structure = self._structure(args, kwargs)
        with isolated(structure.program.dtype, 0):
            best = posterior(structure, self.params, backend="logmax").marginals
        return _single({z: p.argmax(-1) for z, p in best.items()})

    def log_prob(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log-likelihood of each row (of each element of the rows' plates).

        Raises
        ------
        ModelError
            Where the rows are not independent given the parameters (a global assignment).
        """
        structure = self._structure(args, kwargs)
        with isolated(structure.program.dtype, 0), torch.no_grad():
            trace = structure.enumerate(self.params)
            rows, _, complete = trace.row_log_likelihood(trace.tensors(), structure.unit)
        if not complete:
            raise ModelError(
                "log_prob: the rows are not independent given the parameters, because some site"
                " outside their plate ties them together. Use log_likelihood."
            )
        return rows.expand(structure.unit_shape)

    def sample(self, n: int | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw assignments and observations from the fitted program.

        ``n`` rows are drawn by repeating the program over its own plates (covariates included) as
        often as needed; without ``n``, one draw of everything. Rows come in the first dim.
        """
        structure = self.problem.structure
        names = [*structure.assignments, *structure.observations]
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise SettingError(f"sample: n must be a positive integer, got {n!r}.")
        rows = structure.num_rows if structure.unit else 1
        draws: dict[str, list[Tensor]] = {name: [] for name in names}
        with isolated(structure.program.dtype, seed), torch.no_grad():
            for _ in range(1 if n is None else -(-n // rows)):
                nodes = structure.program.run(self.params, observed=False).nodes
                for name in names:
                    if not isinstance(nodes[name]["fn"], dist.Unit):
                        draws[name].append(_rows_first(structure, nodes[name], n is not None))
        drawn = {name: parts for name, parts in draws.items() if parts}
        if n is None:
            return {name: parts[0] for name, parts in drawn.items()}
        return {name: torch.cat(parts)[:n] for name, parts in drawn.items()}

    @property
    def df(self) -> int:
        """The number of free parameters: the dimension of the unconstrained space, fixed apart."""
        total = 0
        for name in self.problem.free:
            parameter = self.problem.structure.parameters[name]
            form = self.problem.plan.blocks[name].form
            free = parameter.df
            if form is forms.LOGITS or (form is forms.SIMPLEX and free == parameter.value.numel()):
                free -= free // parameter.shape[-1]  # only differences or ratios count
            total += free
        return total

    def aic(self) -> float:
        """Akaike's criterion ``2 df - 2 log_likelihood``: smaller is better."""
        return 2 * self.df - 2 * self.log_likelihood

    def bic(self, rows: float | None = None) -> float:
        """Schwarz's criterion ``df log(rows) - 2 log_likelihood``: smaller is better."""
        rows = self.problem.rows if rows is None else rows
        return self.df * math.log(rows) - 2 * self.log_likelihood

    def icl(self, rows: float | None = None) -> float:
        """``bic + 2 H``, with ``H`` the posterior entropy of all assignments jointly."""
        structure = self.problem.structure
        weights = self.problem.row_weights
        with isolated(structure.program.dtype, 0), torch.no_grad():
            trace = structure.enumerate(self.params)
            tensors = trace.tensors()
            value, found = factor_weights(
                trace, tensors, row_weights=weights, unit=structure.unit
            )
            mean = sum(torch.where(w > 0, w * tensors[n], 0.0).sum() for n, w in found.items())
        return self.bic(rows) + 2 * float(value - mean)

    def guide(self) -> Callable[..., dict[str, Tensor]]:
        """A Pyro guide at the fitted values, for ``pyro.infer.Predictive``.

        It samples every parameter that has a prior from a ``Delta``, and puts the others into
        Pyro's parameter store when it is called.
        """
        parameters, params = self.problem.structure.parameters, self.params

        def fitted(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            store = pyro.get_param_store()
            for name, parameter in parameters.items():
                value = params[name].clone()
                if parameter.has_prior:
                    pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
                else:
                    if name in store:
                        del store[name]
                    pyro.param(name, value, constraint=parameter.constraint)
            return dict(params)

        return fitted

    def save(self, path: str | Path) -> None:
        """Write the parameters and the record of the fit (not the program, not the data)."""
        torch.save(
            {
                "params": self.params,
                "log_likelihood": self.log_likelihood,
                "log_prior": self.log_prior,
                "history": [tuple(r) for r in self.history],
                "status": self.status.value,
                "message": self.message,
                "start": self.start,
                "restarts": [(r.log_joint, r.status.value, r.n_iter) for r in self.restarts],
                "solver": type(self.solver).__name__,
                "settings": {
                    k: getattr(self.solver, k)
                    for k in ("tol", "param_tol", "max_iter", "fixed", "floor", "dtype")
                },
            },
            path,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[..., Any],
        *args: Any,
        weights: Any = None,
        **kwargs: Any,
    ) -> Fit:
        """Read a fit back, with the program and data that it belongs to."""
        stored = torch.load(path, weights_only=True)
        settings = stored["settings"]
        kinds = {kind.__name__: kind for kind in Solver.__subclasses__()}
        solver = kinds.get(stored["solver"], Solver)(**settings)
        problem = pose(
            model, args, kwargs, dtype=solver.dtype, fixed=solver.fixed, floor=solver.floor,
            weights=weights,
        )
        return cls(
            problem.structure.values(stored["params"]),
            stored["log_likelihood"],
            stored["log_prior"],
            tuple(Record(*r) for r in stored["history"]),
            Status(stored["status"]),
            stored["message"],
            solver,
            stored["start"],
            tuple(Restart(a, Status(b), c) for a, b, c in stored["restarts"]),
            problem,
        )


def _single(values: dict[str, Tensor]) -> Any:
    return next(iter(values.values())) if len(values) == 1 else values


def _as_distribution(site: Any, probs: Tensor) -> Any:
    base, _, _ = unwrap(site["fn"])
    if isinstance(base, dist.Bernoulli):
        return dist.Bernoulli(probs[..., 1])
    if isinstance(base, dist.OneHotCategorical):
        return dist.OneHotCategorical(probs)
    return dist.Categorical(probs)


def _rows_first(structure: Structure, site: Any, flatten: bool) -> Tensor:
    """A site's draw with the rows' plates in front (flattened into one dim if asked)."""
    frames = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
    value: Tensor = site["value"]
    event = len(site["fn"].event_shape)
    if not flatten:
        return value
    if not set(structure.unit) <= set(frames) or not structure.unit:
        return value.unsqueeze(0)
    full = site["fn"].batch_shape + site["fn"].event_shape
    value = value.expand(full)
    at = [value.dim() - event + frames[p] for p in structure.unit]
    moved = value.movedim(at, list(range(len(at))))
    return moved.reshape((structure.num_rows, *moved.shape[len(at):]))


__all__ = ["Fit", "Restart", "Solver", "check_weights"]
