"""Gradient-based MAP: the same objective, by any torch or Pyro optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor

from pyroem.errors import SettingError
from pyroem.loop import State
from pyroem.problem import Problem
from pyroem.solver import Solver
from pyroem.structure import Params

Factory = Callable[[list[Tensor]], torch.optim.Optimizer]
LINE_SEARCH = 25  # evaluations that one L-BFGS iteration may take


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
    differentiation. The best point seen is returned. All other settings are those of
    :class:`~pyroem.solver.Solver`.
    """

    optimizer: Any = field(default="lbfgs", kw_only=False)
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    standardise: bool = True
    max_iter: int = 5000

    name = "MAP"
    monotone = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise SettingError(f"MAP: lr must be a positive number, got {self.lr!r}.")
        if isinstance(self.optimizer, str) and self.optimizer.lower() not in ("adam", "lbfgs"):
            raise SettingError(
                f"MAP: optimizer must be 'adam', 'lbfgs', a torch or Pyro optimiser or a factory,"
                f" got {self.optimizer!r}."
            )
        if not isinstance(self.optimizer, str) and not callable(self.optimizer):
            raise SettingError(f"MAP: optimizer cannot be called: {self.optimizer!r}.")

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
        parameters, steps = problem.structure.parameters, problem.plan.steps
        if not self.standardise:
            steps = {n: torch.ones_like(s) for n, s in steps.items()}
        raw = {
            n: (parameters[n].unconstrain(params[n]) / steps[n]).detach().clone().requires_grad_()
            for n in problem.free
        }
        held = {n: v for n, v in params.items() if n not in raw}
        memory = _Memory(problem, raw, held, steps)
        if raw:
            memory.optimiser = self._make(list(raw.values()), list(raw))
        memory.evaluate()
        return State(memory.params(), memory.value, memory.passes, memory, memory.slope)

    def step(self, problem: Problem, state: State) -> State:
        """One iteration of the optimiser."""
        memory: _Memory = state.memory
        if memory.optimiser is not None:
            memory.optimiser(memory)
            memory.keep_above_floors()
        memory.evaluate()
        return State(memory.params(), memory.value, memory.passes, memory, memory.slope)

    def _make(self, leaves: list[Tensor], names: list[str]) -> Callable[[_Memory], None]:
        optimizer, options = self.optimizer, dict(self.options)
        if self._is_lbfgs:
            defaults = {"history_size": 20, "line_search_fn": "strong_wolfe"}
            torch_optimiser = torch.optim.LBFGS(
                leaves,
                **{
                    "lr": self.lr or 1.0,
                    "max_iter": 1,
                    "max_eval": LINE_SEARCH,
                    "tolerance_grad": 0.0,
                    "tolerance_change": 0.0,
                    **defaults,
                    **options,
                },
            )
            return lambda memory: _step(torch_optimiser, memory)
        if isinstance(optimizer, PyroOptim):
            pyro_optimiser = copy.deepcopy(optimizer)
            return lambda memory: _pyro_step(pyro_optimiser, memory)
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
        return lambda memory: _step(made, memory)


def _step(optimiser: torch.optim.Optimizer, memory: _Memory) -> None:
    optimiser.step(memory.closure)


def _pyro_step(optimiser: PyroOptim, memory: _Memory) -> None:
    memory.closure()
    optimiser(list(memory.raw.values()))
    if isinstance(optimiser, PyroLRScheduler):
        optimiser.step()  # one epoch is one pass over the data


class _Memory:
    """The optimiser's leaves with the objective and gradient where they stand.

    An evaluation at the point that was evaluated last is not repeated.
    """

    def __init__(self, problem: Problem, raw: Params, held: Params, steps: Params) -> None:
        self.problem, self.raw, self.held, self.steps = problem, raw, held, steps
        self.optimiser: Callable[[_Memory], None] | None = None
        self.value, self.passes, self._floored = 0.0, 0, False
        self._at: list[Tensor] = []
        self._grads: list[Tensor] = []

    def _constrained(self) -> Params:
        parameters = self.problem.structure.parameters
        return {n: parameters[n].constrain(r * self.steps[n]) for n, r in self.raw.items()}

    @property
    def slope(self) -> float:
        """The largest element of the gradient per row; 0 while a variance is held at its floor."""
        if self._floored:
            return 0.0
        return max((float(g.abs().max()) for g in self._grads if g.numel()), default=0.0)

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
        with torch.enable_grad():
            values = self._constrained()
            log_likelihood, log_prior = self.problem.log_joint({**self.held, **values})
            total = log_likelihood + log_prior
            loss = -total / self.problem.rows
            self._grads = list(torch.autograd.grad(loss, leaves)) if leaves else []
        self._at = [leaf.detach().clone() for leaf in leaves]
        self.value, self.passes = float(total.detach()), self.passes + 1

    def closure(self) -> float:
        """What a torch optimiser calls: sets the gradients and returns the loss."""
        self.evaluate()
        for leaf, grad in zip(self.raw.values(), self._grads, strict=True):
            leaf.grad = grad.clone()
        return -self.value / self.problem.rows

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
