"""Gradient-based MAP: the same objective, by any torch or Pyro optimiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor

from pyroem.checkpoint import BusyError
from pyroem.errors import ModelError, SettingError
from pyroem.loop import State
from pyroem.mstep.intervals import interval_of
from pyroem.problem import Problem
from pyroem.solver import Solver
from pyroem.structure import Params, from_search, to_search

Factory = Callable[[list[Tensor]], torch.optim.Optimizer]
RIM, INWARD = 1e-5, 0.02  # fractions of an interval: what counts as its bound; a step inside
WALL = 100.0  # nats a row
LBFGS = {
    "max_iter": 1,
    "max_eval": 25,  # of one line search
    "tolerance_grad": 0.0,
    "tolerance_change": 0.0,
    "history_size": 20,
    "line_search_fn": "strong_wolfe",
}


@dataclass(frozen=True, kw_only=True)
class MAP(Solver):
    """Gradient ascent on ``log p(data | params) + log p(params)``, the assignments summed out.

    The mode is that of the density in the constrained space, without a Jacobian: what
    ``AutoDelta`` with ``TraceEnum_ELBO`` finds. The search runs in the unconstrained space of
    ``transform_to(constraint)``.

    Parameters
    ----------
    optimizer
        ``"lbfgs"``, ``"adam"``, a ``torch.optim`` class, a function from a list of tensors to a
        torch optimiser, or a ``pyro.optim`` object.
    lr
        Learning rate of ``"adam"`` (default 0.05), ``"lbfgs"`` (default 1) and torch classes.
    options
        Further keyword arguments of the optimiser.
    standardise
        Measure the coordinates that move a location in units of the data's standard deviation, so
        that no scale of the data stalls the search. The mode is the same; ``False`` gives the
        plain coordinates of ``AutoDelta``.

    Converged means, beside the rule for all solvers, that no element of the gradient per row is
    larger than ``10 sqrt(tol)``. The objective is divided by the number of rows before
    differentiation. The best point seen is returned.
    """

    optimizer: Any = field(default="lbfgs", kw_only=False)
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    standardise: bool = True
    max_iter: int = 5000

    monotone = False

    @property
    def name(self) -> str:
        """Its name in tables."""
        return "MAP"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise SettingError(f"MAP: lr must be a positive number, got {self.lr!r}.")
        if isinstance(self.optimizer, str) and self.optimizer.lower() not in ("adam", "lbfgs"):
            raise SettingError(
                f"MAP: optimizer must be 'adam', 'lbfgs', a torch or Pyro optimiser or a factory,"
                f" got {self.optimizer!r}."
            )
        if isinstance(self.optimizer, torch.optim.Optimizer):
            kind = type(self.optimizer).__name__
            raise SettingError(
                f"MAP: optimizer is an instance of {kind}, made for other tensors; pass the class"
                f" torch.optim.{kind} (settings in lr= and options=) or a function that makes one."
            )
        if not isinstance(self.optimizer, str) and not callable(self.optimizer):
            raise SettingError(
                f"MAP: optimizer must be 'adam', 'lbfgs', a torch or Pyro optimiser or a factory,"
                f" got {self.optimizer!r}."
            )
        if isinstance(self.optimizer, PyroOptim) and (self.lr is not None or self.options):
            raise SettingError(
                "MAP: a pyro.optim object brings its own settings; lr= and options= have no"
                " effect on it."
            )

    @property
    def patience(self) -> int:
        """First-order methods must hold still for a while; a line search need not."""
        return 2 if self._is_lbfgs else 10

    @property
    def _is_lbfgs(self) -> bool:
        if isinstance(self.optimizer, str):
            return self.optimizer.lower() == "lbfgs"
        return self.optimizer is torch.optim.LBFGS

    def begin(self, problem: Problem, params: Params) -> State:
        """Leaves in the unconstrained space, the optimiser, and the objective at the start."""
        parameters, steps = problem.structure.parameters, self._steps(problem)
        params = _released(problem, params)
        raw = to_search(parameters, {n: params[n] for n in problem.free}, steps)
        held = {n: v for n, v in params.items() if n not in raw}
        memory = _Memory(problem, raw, held, steps)
        if raw:
            memory.optimiser = self._make(list(raw.values()))
        memory.evaluate()
        return memory.state()

    def step(self, problem: Problem, state: State) -> State:
        """One iteration of the optimiser."""
        memory: _Memory = state.memory
        memory.moving = True
        if memory.optimiser is not None:
            memory.optimiser.step(memory)
            memory.keep_above_floors()
        memory.evaluate()
        memory.moving = False
        return memory.state()

    def freeze(self, memory: _Memory) -> dict[str, Any]:
        """The leaves, the objective there, and the optimiser's own state."""
        if memory.moving:
            raise BusyError
        optimiser = memory.optimiser and memory.optimiser.state(memory)
        return {**{name: getattr(memory, name) for name in _KEPT}, "optimiser": optimiser}

    def thaw(self, problem: Problem, frozen: dict[str, Any]) -> _Memory:
        """Leaves and an optimiser where they stood."""
        raw = {n: v.requires_grad_() for n, v in frozen["raw"].items()}
        memory = _Memory(problem, raw, frozen["held"], self._steps(problem))
        for name in _KEPT:
            setattr(memory, name, frozen[name])
        if raw:
            memory.optimiser = self._make(list(raw.values()))
            memory.optimiser.load(frozen["optimiser"], memory)
        return memory

    def _steps(self, problem: Problem) -> Params:
        steps = problem.plan.steps
        return steps if self.standardise else {n: torch.ones_like(s) for n, s in steps.items()}

    def _make(self, leaves: list[Tensor]) -> _Torch | _Pyro:
        optimizer, options = self.optimizer, dict(self.options)
        if self._is_lbfgs:
            optimizer, options = torch.optim.LBFGS, {**LBFGS, **options}
        if isinstance(optimizer, PyroOptim):
            return _Pyro(copy.deepcopy(optimizer))
        if isinstance(optimizer, str):
            optimizer, options = torch.optim.Adam, {"lr": 0.05, **options}
        if self.lr is not None:
            options["lr"] = self.lr
        try:
            made = optimizer(leaves, **options)
        except TypeError as error:
            raise SettingError(f"MAP: the optimiser cannot be made: {error}") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise SettingError(
                f"MAP: the optimizer factory must return a torch optimiser, got"
                f" {type(made).__name__}."
            )
        return _Torch(made)


def _released(problem: Problem, params: Params) -> Params:
    """``params`` with what stands at a bound moved off it, where the objective rises inwards.

    In unconstrained coordinates a bound is infinitely far away and flat: a search would stay.
    """
    near = {}
    for name in problem.free:
        bounds = interval_of(problem.structure.parameters[name].constraint)
        low, high = bounds or (-math.inf, math.inf)
        if math.isinf(high) and (math.isinf(low) or low == 0):
            continue  # free, or a scale, which has a floor of its own
        width = high - low if math.isfinite(high - low) else abs(low if high > 1e300 else high)
        value = params[name]
        edges = (value - low < RIM * width, high - value < RIM * width)
        if any(bool(edge.any()) for edge in edges):
            inside = torch.where(edges[0], low + INWARD * width, high - INWARD * width)
            near[name] = (edges, inside)
    if not near:
        return params
    leaves = {n: params[n].detach().clone().requires_grad_() for n in near}
    with torch.enable_grad():
        total = sum(problem.log_joint({**params, **leaves}), torch.zeros(()))
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    result = dict(params)
    for (name, (edges, inside)), slope in zip(near.items(), slopes, strict=True):
        if slope is not None:
            leave = (edges[0] & (slope > 0)) | (edges[1] & (slope < 0))
            result[name] = torch.where(leave, inside, params[name])
    return result


class _Torch:
    """An optimiser of torch, for all leaves."""

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self.optimiser = optimiser

    def step(self, memory: _Memory) -> None:
        self.optimiser.step(memory.closure)

    def state(self, memory: _Memory) -> Any:
        return self.optimiser.state_dict()

    def load(self, state: Any, memory: _Memory) -> None:
        self.optimiser.load_state_dict(state)


class _Pyro:
    """An optimiser of Pyro, which makes one of torch for each leaf at its first step."""

    def __init__(self, optimiser: PyroOptim) -> None:
        self.optimiser = optimiser

    def step(self, memory: _Memory) -> None:
        memory.closure()
        self.optimiser(list(memory.raw.values()))
        if isinstance(self.optimiser, PyroLRScheduler):
            self.optimiser.step()  # one epoch is one pass over the data

    def _parts(self, memory: _Memory) -> list[Any]:
        """For each leaf its optimiser, and the scheduler of it if there is one."""
        made = [self.optimiser.optim_objs[leaf] for leaf in memory.raw.values()]
        return [part for m in made for part in (m, getattr(m, "optimizer", None)) if part]

    def state(self, memory: _Memory) -> Any:
        if not self.optimiser.optim_objs:
            return None
        return [part.state_dict() for part in self._parts(memory)]

    def load(self, state: Any, memory: _Memory) -> None:
        if state is None:
            return
        before = {n: leaf.detach().clone() for n, leaf in memory.raw.items()}
        for leaf in memory.raw.values():
            leaf.grad = torch.zeros_like(leaf)
        self.optimiser(list(memory.raw.values()))  # a step is the only way to have them made
        with torch.no_grad():
            for name, leaf in memory.raw.items():
                leaf.copy_(before[name])
        for part, own in zip(self._parts(memory), state, strict=True):
            part.load_state_dict(own)


_KEPT = ("raw", "held", "value", "passes", "note", "_floored", "_loss", "_at", "_grads")


class _Memory:
    """The optimiser's leaves with the objective and gradient where they stand.

    An evaluation at the point that was evaluated last is not repeated.
    """

    def __init__(self, problem: Problem, raw: Params, held: Params, steps: Params) -> None:
        self.problem, self.raw, self.held, self.steps = problem, raw, held, steps
        self.optimiser: _Torch | _Pyro | None = None
        self.moving = False  # whether a step is under way, or was broken off
        self.value, self.passes, self.note = 0.0, 0, ""
        self._floored, self._loss = False, 0.0
        self._at: list[Tensor] = []
        self._grads: list[Tensor] = []

    def _constrained(self) -> Params:
        return from_search(self.problem.structure.parameters, self.raw, self.steps)

    @property
    def slope(self) -> float:
        """The largest element of the gradient per row; 0 while a variance is held at its floor."""
        if self._floored:
            return 0.0
        return max((float(g.abs().max()) for g in self._grads if g.numel()), default=0.0)

    def state(self) -> State:
        """Where the search stands."""
        return State(self.params(), self.value, self.passes, self, self.slope, self.note)

    def params(self) -> Params:
        parameters = self.problem.structure.parameters
        with torch.no_grad():
            values = {n: v.clone() for n, v in self._constrained().items()}
        return {n: values[n] if n in values else self.held[n] for n in parameters}

    def evaluate(self) -> None:
        """The objective and the gradient of its negative, per row."""
        leaves = list(self.raw.values())
        if self._at and all(torch.equal(a, b) for a, b in zip(self._at, leaves, strict=True)):
            return
        self._at, self.passes = [leaf.detach().clone() for leaf in leaves], self.passes + 1
        try:
            with torch.enable_grad():
                values = self._constrained()
                log_likelihood, log_prior = self.problem.log_joint({**self.held, **values})
                total = log_likelihood + log_prior
                loss = -total / self.problem.rows
                grads = torch.autograd.grad(loss, leaves) if leaves else ()
                self._grads = [g.contiguous() for g in grads]  # torch's L-BFGS takes views of them
            self.value, self.note = float(total.detach()), ""
        except (ModelError, torch.linalg.LinAlgError) as error:
            self.value, self.note = math.nan, str(error)
            self._grads = [torch.zeros_like(leaf) for leaf in leaves]

    def closure(self) -> float:
        """What a torch optimiser calls: sets the gradients and returns the loss.

        A line search that strays to where the objective is not finite is told of a steep wall.
        """
        self.evaluate()
        finite = math.isfinite(self.value)
        for leaf, grad in zip(self.raw.values(), self._grads, strict=True):
            leaf.grad = grad.clone() if finite else torch.zeros_like(grad)
        if finite:
            self._loss = -self.value / self.problem.rows
            return self._loss
        return self._loss + WALL

    def keep_above_floors(self) -> None:
        """Project variances that fell below their floor back onto it."""
        problem, params = self.problem, self.params()
        clipped, near = problem.clip(params), problem.clip(params, 1.0001)
        names = [n for n in problem.floors if n in self.raw]
        self._floored = any(not torch.equal(near[n], params[n]) for n in names)
        with torch.no_grad():
            for name in names:
                if not torch.equal(clipped[name], params[name]):
                    at = problem.structure.parameters[name].unconstrain(clipped[name])
                    self.raw[name].copy_(at / self.steps[name])
