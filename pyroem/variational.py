"""Pyro's own variational inference on the program, its assignments enumerated."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import infer, poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.optim import ClippedAdam, PyroOptim, clipped_adam
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.errors import ModelError, SettingError
from pyroem.gradient import MAP
from pyroem.loop import Rule, State
from pyroem.problem import Problem
from pyroem.structure import Params
from pyroem.uncertainty import rows_of_derivatives

GUIDES: dict[str, Any] = {
    "delta": AutoDelta,
    "normal": AutoNormal,
    "multivariate": AutoMultivariateNormal,
    "laplace": AutoLaplaceApproximation,
}
MEDIAN = 401  # draws of a guide that does not know its median
FINAL = 100  # draws for the ELBO at the end
WINDOW = 100  # steps that are averaged
SPAN = 3  # windows that are compared with as many before
PATIENCE = 3  # windows in a row at the end of which nothing rises or drifts
VISIBLE = 0.5  # nats: the standard error up to which a rise of the mean ELBO can be seen
DRIFT = 1.0  # of a parameter between two spans, in its standard deviation within windows
MANY = 1000  # draws for the gradient at the end
STEEP = 4.0  # standard errors of a gradient that is not zero
LITTLE = 1e-3  # of a parameter's size, or of one: a drift that does not matter


@dataclass(frozen=True, kw_only=True)
class SVI(MAP):
    """Pyro's variational inference, the assignments summed out.

    Without a guide, the point mass ``AutoDelta``: ``ClippedAdam`` on the objective of MAP, step for
    step what ``SVI(model, AutoDelta(...), ClippedAdam(...), TraceEnum_ELBO())`` does, on the
    kernel's gradient where the program has a kernel.

    With a guide, Pyro's own ``SVI`` on the enumerated program: the guide is over the parameters
    that have a prior (``pyro.sample``); those without one (``pyro.param``) are points. The fit's
    ``params`` are the guide's medians, its ``log_joint`` is that of these, and
    ``fit.approximation`` has the ELBO and draws from the guide.

    Parameters
    ----------
    guide
        None; ``"normal"``, ``"multivariate"``, ``"laplace"``, ``"delta"``; one of Pyro's autoguide
        classes, or a function from a model to a guide; or a guide of your own, with the program's
        arguments, that samples every parameter that has a prior.
    particles
        Draws for each step's estimate of the ELBO.
    optimizer, lr, options
        As for :class:`MAP`; by default Pyro's ``ClippedAdam`` with ``lr=0.05`` (0.02 with a guide).
    decay
        What the learning rate has fallen to after ``max_iter`` steps, as a share of ``lr``.

    With a guide the objective is an estimate, and ``history`` has its mean over the last 100 steps.
    Every 100 steps the last 300 are compared with the 300 before. The fit has converged when three
    times in a row the mean ELBO is no higher, but for a standard error (of half a nat at most, else
    nothing is seen: give more ``particles``), and the guide's parameters have not drifted: in the
    mean square by no more than they scatter within 100 steps; and where at last the mean gradient
    of 1000 draws is zero, but for four standard errors.
    """

    optimizer: Any = field(default=clipped_adam.ClippedAdam, kw_only=False)
    guide: Any = None
    particles: int = 1
    decay: float = 0.1
    standardise: bool = False
    max_iter: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise SettingError(f"SVI: decay must be a share of lr, above 0, got {self.decay!r}.")
        if isinstance(self.guide, str) and self.guide not in GUIDES:
            raise SettingError(
                f"SVI: guide must be one of {', '.join(GUIDES)}, an autoguide class or a guide, got"
                f" {self.guide!r}."
            )
        if self.guide is not None and not isinstance(self.guide, str) and not callable(self.guide):
            raise SettingError(f"SVI: guide must be callable, got {self.guide!r}.")
        if isinstance(self.particles, bool) or self.particles < 1:
            raise SettingError(
                f"SVI: particles must be a positive integer, got {self.particles!r}."
            )

    @property
    def name(self) -> str:
        """Its name in tables."""
        if self.guide is None:
            return "SVI"
        own = self.guide if isinstance(self.guide, str) else getattr(self.guide, "__name__", "own")
        return f"SVI ({own})"

    @property
    def exact(self) -> bool:
        """Whether a state's objective is exact."""
        return self.guide is None

    @property
    def rule(self) -> Rule:
        """When to stop."""
        if self.guide is None:
            return super().rule
        words = (
            f"from {SPAN * WINDOW} steps to the next neither the mean ELBO rises nor the guide"
            f" drifts by more than noise, {PATIENCE} times"
        )
        return replace(super().rule, tol=0.0, words=words)

    def _make(self, leaves: list[Tensor]) -> Any:
        if self.optimizer is not clipped_adam.ClippedAdam:
            return super()._make(leaves)
        return MAP(self.optimizer, options=self.settings(0.05))._make(leaves)

    def settings(self, lr: float) -> dict[str, Any]:
        """Of Pyro's ``ClippedAdam``."""
        own = {"lr": lr, "lrd": self.decay ** (1 / self.max_iter), **self.options}
        return own if self.lr is None else {**own, "lr": self.lr}

    def check(self, problem: Problem) -> None:
        """Raise where Pyro's own inference cannot work on the problem."""
        super().check(problem)
        if self.guide is None:
            return
        for wrong, what in (
            (problem.everywhere is not None, "rows over several processes"),
            (problem.smaller is not None, "data as large as this (or in blocks)"),
            (problem.row_weights is not None, "row weights"),
            (bool(problem.structure.program.modules), "parameters in modules"),
            (len(problem.free) < len(problem.structure.parameters), "fixed parameters"),
        ):
            if wrong:
                raise ModelError(f"SVI with a guide does not take {what}; SVI() without one does.")
        if any(p.held is not None for p in problem.structure.parameters.values()):
            raise ModelError("SVI with a guide does not take fixed elements.")

    def begin(self, problem: Problem, params: Params) -> State:
        """The guide around the start."""
        if self.guide is None:
            return super().begin(problem, params)
        return _Guided(self, problem, params).state()

    def step(self, problem: Problem, state: State) -> State:
        """One step of the optimiser."""
        if not isinstance(state.memory, _Guided):
            return super().step(problem, state)
        state.memory.step()
        return state.memory.state()

    def freeze(self, memory: Any) -> Any:
        """Refused for a guide, whose optimiser and draws are Pyro's own."""
        if isinstance(memory, _Guided):
            raise SettingError("checkpoint: SVI with a guide cannot be stored.")
        return super().freeze(memory)

    def approximation(self, problem: Problem, state: State) -> Approximation | None:
        """The guide where the fit ended."""
        return state.memory.approximation() if isinstance(state.memory, _Guided) else None


@dataclass(frozen=True, eq=False)
class Approximation:
    """The guide at the end of a fit: an approximate posterior of the parameters with a prior.

    Attributes:
    ----------
    elbo, elbo_error
        The evidence lower bound, ``E_q[log p(data, params) - log q(params)]``, as the mean of 100
        draws, and its standard error.
    note
        Why there is none (NaN), where that is so.
    point
        Whether it is a point mass, which has no entropy: its ELBO would bound nothing.
    """

    elbo: float
    elbo_error: float
    _draw: Callable[[int], list[Params]]
    note: str = ""
    point: bool = False

    def draw(self, n: int = 1000, seed: int = 0) -> Params:
        """``n`` draws of the parameters (first dim)."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SettingError(f"draw: n must be a positive integer, got {n!r}.")
        if self.note and not self.point:
            raise ModelError(f"draw: {self.note}")
        with isolated(torch.get_default_dtype(), seed):
            drawn = self._draw(n)
        return {name: torch.stack([d[name] for d in drawn]) for name in drawn[0]}

    def mapped(self, change: Callable[[Params], Params]) -> Approximation:
        """The same with every draw changed: its states renamed, say."""
        return replace(self, _draw=lambda n: [change(one) for one in self._draw(n)])


class _Guided:
    """Pyro's SVI, with a parameter store of its own."""

    def __init__(self, solver: SVI, problem: Problem, params: Params) -> None:
        self.structure, self.problem = problem.structure, problem
        self.program = self.structure.program
        self.names = [n for n, p in self.structure.parameters.items() if p.has_prior]
        self.losses: list[float] = []
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None  # an origin, and from there
        self.windows: list[tuple[Tensor, Tensor]] = []  # mean and variance
        self.calm, self.particles = 0, solver.particles
        self.store: Any = None
        self.model = self.program.trainable()
        with self._own():
            store = pyro.get_param_store()
            for name, parameter in self.structure.parameters.items():
                if not parameter.has_prior:
                    store.setdefault(name, params[name].clone(), parameter.constraint)
            self.guide = self._made(solver.guide, params)
            self.svi = infer.SVI(self.model, self.guide, self._optimiser(solver), self._elbo())
            self.guide(*self.program.args, **self.program.kwargs)  # an autoguide is set up then
            self.at = self._medians()

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        """Pyro's parameter store as this fit left it."""
        with warnings.catch_warnings(), pyro.get_param_store().scope(self.store):
            warnings.filterwarnings("ignore", message=".*were not registered in the param store.*")
            yield
            self.store = pyro.get_param_store().get_state()

    def _elbo(self, particles: int | None = None) -> Any:
        return TraceEnum_ELBO(
            num_particles=particles or self.particles,
            max_plate_nesting=self.structure.nesting,
            strict_enumeration_warning=False,
        )

    def _made(self, guide: Any, params: Params) -> Any:
        kind = GUIDES.get(guide, guide) if isinstance(guide, str) else guide
        if not self.names:
            return lambda *args, **kwargs: None  # all parameters are points
        known = isinstance(kind, type) or kind in GUIDES.values()
        if not known:
            return kind
        exposed = poutine.block(self.model, expose=self.names)
        start = {n: params[n] for n in self.names}
        return kind(exposed, init_loc_fn=init_to_value(values=start))

    def _optimiser(self, solver: SVI) -> Any:
        given = solver.optimizer
        if isinstance(given, PyroOptim):
            return given
        if given is not clipped_adam.ClippedAdam:
            raise SettingError(
                "SVI: with a guide, optimizer must be one of pyro.optim (an object), got"
                f" {given!r}."
            )
        return ClippedAdam(solver.settings(0.02))

    def step(self) -> None:
        """One step of the optimiser."""
        args, kwargs = self.program.args, self.program.kwargs
        with self._own():
            self.losses.append(float(self.svi.step(*args, **kwargs)))
            if hasattr(self.guide, "median") or len(self.losses) % WINDOW == 0:
                self.at = self._medians()
        self._watch()
        if len(self.losses) % WINDOW == 0:
            self.calm = self.calm + 1 if self._level() and self._still() else 0
            if self.calm >= PATIENCE and not self._flat():
                self.calm = 0

    def _watch(self) -> None:
        """Mean and variance of all numbers that are learned, over windows of steps."""
        values = [v.detach().reshape(-1) for v in self.store["params"].values()]
        at = torch.cat(values).double() if values else torch.zeros(0, dtype=torch.float64)
        if self.sums is None:
            self.sums = at.clone(), torch.zeros_like(at), torch.zeros_like(at)
        origin, total, squares = self.sums
        total += at - origin
        squares += (at - origin) ** 2
        if len(self.losses) % WINDOW == 0:
            mean = total / WINDOW
            self.windows.append((origin + mean, (squares / WINDOW - mean**2).clamp(min=0)))
            self.sums, self.windows = None, self.windows[-2 * SPAN :]

    def _still(self) -> bool:
        """Whether what is learned drifts by no more than it scatters."""
        if len(self.windows) < 2 * SPAN:
            return False
        means = torch.stack([mean for mean, _ in self.windows])
        scatter = torch.stack([variance for _, variance in self.windows]).mean(0)
        old, new = means[:SPAN].mean(0), means[SPAN:].mean(0)
        size = torch.maximum(old.abs(), torch.ones_like(old))
        drift = torch.where((new - old).abs() <= LITTLE * size, 0.0, (new - old) ** 2 / scatter)
        return not len(drift) or bool(drift.mean() <= DRIFT**2)

    def _flat(self) -> bool:
        """Whether no element of the ELBO's mean gradient, over fresh draws, differs from zero.

        Nor all of it together (Hotelling's test). Clipped steps can stand still where it does.
        """
        args, kwargs = self.program.args, self.program.kwargs
        with self._own(), torch.enable_grad():
            leaves = [v for _, v in pyro.get_param_store().named_parameters()]
            found = []
            for _ in range(MANY):
                loss = self._elbo(1).differentiable_loss(self.model, self.guide, *args, **kwargs)
                own = torch.autograd.grad(loss, leaves, allow_unused=True)
                found.append(torch.cat([s.reshape(-1) for s in own if s is not None]).double())
        slopes = torch.stack(found)
        error = slopes.std(0) / MANY**0.5
        told = error > 1e-9 * slopes.abs().amax(0)  # else it is no estimate
        if bool((told & (slopes.mean(0).abs() > STEEP * error)).any()):
            return False
        size = int(told.sum())
        if not size or size > MANY // 10:
            return True
        scaled = slopes[:, told] / slopes[:, told].std(0)  # noise that elements share hides less
        precision = torch.linalg.pinv(scaled.T.cov().reshape(size, size), hermitian=True)
        mean = scaled.mean(0)
        return float(MANY * mean @ precision @ mean) <= size + STEEP * (2 * size) ** 0.5 + STEEP**2

    def _level(self) -> bool:
        """Whether the mean of the last steps is above that before by no more than the noise.

        And the noise small enough for a rise to be seen.
        """
        count = SPAN * WINDOW
        if len(self.losses) < 2 * count:
            return False
        losses = torch.tensor(self.losses[-2 * count :], dtype=torch.float64)
        old, new = losses[:count], losses[count:]
        error = float(((new.var() + old.var()) / count).sqrt())
        return float(old.mean() - new.mean()) <= error <= VISIBLE

    def _medians(self) -> Params:
        """The guide's medians, and the points."""
        args, kwargs = self.program.args, self.program.kwargs
        with torch.no_grad():
            if not self.names:
                found = {}
            elif isinstance(self.guide, AutoLaplaceApproximation):
                found = self._draws(1, self.guide)[0]  # a point, until it is done
            elif hasattr(self.guide, "median"):
                found = dict(self.guide.median(*args, **kwargs))
            else:
                drawn = self._draws(MEDIAN, self.guide)
                found = {n: torch.stack([d[n] for d in drawn]).median(0).values for n in self.names}
            parameters, store = self.structure.parameters, pyro.get_param_store()
            for name in self.names:
                own = parameters[name]
                if not bool(torch.as_tensor(own.constraint.check(found[name])).all()):
                    found[name] = own.constrain(own.unconstrain(found[name]))
            return {n: (found[n] if n in found else store[n]).detach().clone() for n in parameters}

    def _draws(self, n: int, guide: Any) -> list[Params]:
        args, kwargs = self.program.args, self.program.kwargs
        drawn = []
        with torch.no_grad():
            for _ in range(n):
                nodes = poutine.trace(guide).get_trace(*args, **kwargs).nodes
                missing = [name for name in self.names if name not in nodes]
                if missing:
                    raise SettingError(f"SVI: the guide does not sample '{missing[0]}'.")
                drawn.append({name: nodes[name]["value"].clone() for name in self.names})
        return drawn

    def state(self) -> State:
        """Where the fit stands: the medians, and the mean of the ELBO over the last steps."""
        if not self.losses:
            with self._own(), torch.no_grad():
                first = -float(self.svi.evaluate_loss(*self.program.args, **self.program.kwargs))
            return State(self.at, first, 1, self)
        last = self.losses[-WINDOW:]
        value = -math.fsum(last) / len(last)
        steps = len(self.losses) * self.particles
        return State(self.at, value, steps, self, done=self.calm >= PATIENCE)

    def _laplace(self) -> Any:
        """A normal distribution with the curvature of the objective at the mode.

        Pyro's own ``laplace_approximation`` would draw the assignments instead of summing them out.
        """
        args, kwargs = self.program.args, self.program.kwargs
        with torch.enable_grad():
            loss = self._elbo(1).differentiable_loss(self.model, self.guide, *args, **kwargs)
            (slope,) = torch.autograd.grad(loss, self.guide.loc, create_graph=True)
            information = rows_of_derivatives(slope, self.guide.loc)
        covariance = information.inverse()
        scale = covariance.diagonal().sqrt()
        normal = AutoMultivariateNormal(poutine.block(self.model, expose=self.names))
        normal._setup_prototype(*args, **kwargs)
        for name, value in (
            ("loc", self.guide.loc.detach()),
            ("scale", scale),
            ("scale_tril", torch.linalg.cholesky(covariance / scale / scale[:, None])),
        ):
            delattr(normal, name)
            normal.register_buffer(name, value)
        return normal

    def approximation(self) -> Approximation:
        """The ELBO at the end, and draws."""
        args, kwargs = self.program.args, self.program.kwargs
        with self._own():
            guide = self.guide
            if isinstance(guide, AutoDelta):
                note = "a point mass has no entropy, so that its ELBO bounds nothing."
                return Approximation(math.nan, math.nan, self._drawn(guide), note, point=True)
            if isinstance(guide, AutoLaplaceApproximation):
                try:
                    guide = self._laplace()
                except torch.linalg.LinAlgError:
                    note = (
                        "the curvature is not positive definite where the fit ended, so that there"
                        " is no Laplace approximation; raise max_iter."
                    )
                    return Approximation(math.nan, math.nan, lambda n: [], note)
            svi = infer.SVI(self.model, guide, self.svi.optim, self._elbo(1))
            values = [-float(svi.evaluate_loss(*args, **kwargs)) for _ in range(FINAL)]
        found = torch.tensor(values, dtype=torch.float64)

        error = float(found.std() / FINAL**0.5)
        return Approximation(float(found.mean()), error, self._drawn(guide))

    def _drawn(self, guide: Any) -> Callable[[int], list[Params]]:
        def draw(n: int) -> list[Params]:
            with self._own():
                return self._draws(n, guide)

        return draw
