"""Acceleration: the same optimum as plain EM, never a step down, in fewer passes."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS, Problem, gaussian_mixture, poisson_mixture
from torch import Tensor
from torch.distributions import constraints

import pyroem.em
from pyroem import EM, Fit, ModelError, SettingError, Status, compare
from pyroem import problem as problems_module
from pyroem.accelerate import Anderson, Trail, ridge
from pyroem.loop import State, movement
from pyroem.structure import Params

SCHEMES = ["squarem", "anderson"]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
BY_NAME = {p.name: p for p in PROBLEMS}

# Parameters are not compared where an optimum is flat, or where the M-step is numerical, so that
# plain EM, whose last steps are within its tolerance, ends beside the optimum.
FLAT = {"hierarchical_assignment", "two_assignments_table"}
NUMERIC = {
    "gaussian_conjugate",
    "gaussian_lognormal_scale",
    "poisson_exp_link",
    "gamma_mixture",
}
TIGHT: dict[str, Any] = {"tol": 1e-12, "param_tol": 1e-8}


def overlapping() -> tuple[Tensor, Params]:
    """Counts from two Poissons that overlap, and a start: plain EM takes over 1000 steps."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randint(0, 2, (400,), generator=generator)
    x = torch.poisson(torch.tensor([2.0, 4.0], dtype=torch.float64)[z], generator=generator)
    start = {"weights": [0.5, 0.5], "rate": [1.0, 6.0]}
    return x, {n: torch.tensor(v, dtype=torch.float64) for n, v in start.items()}


def two_poissons(n: Tensor) -> None:
    weights = pyro.param("weights", n.new_ones(2) / 2, constraint=constraints.simplex)
    rate = pyro.param("rate", n.new_ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Poisson(rate[z]), obs=n)


def walk(solver: EM, problem: Problem, steps: int) -> list[State]:
    """The first states of a fit."""
    posed = solver.pose(problem.model, problem.data, {}, None)
    states = [solver.begin(posed, posed.structure.values(problem.params))]
    for _ in range(steps):
        states.append(solver.step(posed, states[-1]))
    return states


# ---------------------------------------------------------------------------------------
# The optimum


@every_problem
def test_same_optimum_as_plain_em_and_no_step_down(problem: Problem) -> None:
    solvers: dict[str, Any] = {
        "plain": EM(**TIGHT, max_iter=100),
        **{s: EM(**TIGHT, max_iter=80, accelerate=s) for s in SCHEMES},
    }
    fits = compare(problem.model, *problem.data, solvers=solvers, init=problem.params).fits
    plain = fits.pop("plain")
    for fit in fits.values():
        values = [record.log_joint for record in fit.history]
        slack = 1e-12 * abs(values[-1])
        assert all(b >= a - slack for a, b in itertools.pairwise(values))
        assert fit.status in (Status.CONVERGED, plain.status)
        assert fit.log_joint >= plain.log_joint - 1e-11 * len(problem.data[0])
        assert fit.history[-1].passes <= plain.history[-1].passes
        if plain.status is Status.CONVERGED and problem.name not in FLAT | NUMERIC:
            assert movement(fit.params, plain.params) < 1e-6


@lru_cache(maxsize=1)
def settled() -> Fit:
    """Plain EM run to the end."""
    x, start = overlapping()
    return EM(tol=1e-14, param_tol=1e-10, max_iter=4000).fit(two_poissons, x, init=start)


@every_scheme
def test_slow_problem_takes_a_third_of_the_passes(scheme: str) -> None:
    (x, start), best = overlapping(), settled()
    assert best.converged and best.n_iter > 1000
    fit = EM(tol=1e-14, param_tol=1e-10, accelerate=scheme).fit(two_poissons, x, init=start)
    assert fit.converged
    assert movement(fit.params, best.params) < 1e-6

    def passes(run: Any) -> int:
        good = best.log_joint - 1e-8 * len(x)
        return next(r.passes for r in run.history if r.log_joint >= good)

    assert 3 * passes(fit) <= passes(best)


@every_scheme
@pytest.mark.parametrize("tol", [1e-6, 1e-9])
def test_stops_no_earlier_than_plain_em_would(scheme: str, tol: float) -> None:
    """Where it stops, a step of plain EM changes as little as the rule of plain EM asks."""
    x, start = overlapping()
    solvers: dict[str, Any] = {
        "plain": EM(tol=tol, max_iter=4000),
        "quick": EM(tol=tol, accelerate=scheme),
    }
    fits = compare(two_poissons, x, solvers=solvers, init=start).fits
    assert fits["quick"].log_joint >= fits["plain"].log_joint - tol * len(x)
    once = EM(max_iter=1).fit(two_poissons, x, init=fits["quick"].params)
    assert once.log_joint - fits["quick"].log_joint <= tol * len(x)
    assert movement(once.params, fits["quick"].params) <= 1e-5


@every_scheme
def test_float32(scheme: str) -> None:
    x, start = overlapping()
    double = EM(accelerate=scheme).fit(two_poissons, x, init=start)
    single = EM(dtype=torch.float32, accelerate=scheme).fit(two_poissons, x, init=start)
    assert single.converged
    assert single.log_joint == pytest.approx(double.log_joint, rel=1e-5)


# ---------------------------------------------------------------------------------------
# What is held


@every_scheme
def test_fixed_parameters_stay(scheme: str) -> None:
    problem = BY_NAME["gaussian_mixture"]
    fit = EM(fixed="loc", accelerate=scheme).fit(
        gaussian_mixture, *problem.data, init=problem.params
    )
    assert torch.equal(fit.params["loc"], problem.params["loc"])
    assert fit.converged
    held = EM(fixed=list(problem.params), accelerate=scheme)
    fit = held.fit(gaussian_mixture, *problem.data, init=problem.params)
    assert all(torch.equal(fit.params[n], v) for n, v in problem.params.items())


def items(x: Tensor) -> None:
    """Latent classes without priors, so that probabilities may reach 0 and 1."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    half = x.new_full((2, x.shape[-1]), 0.5)
    probs = pyro.param("probs", half, constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=x)


@every_scheme
@pytest.mark.parametrize("exact", [True, False])
def test_probabilities_at_zero_and_one(scheme: str, exact: bool) -> None:
    """One class never shows the first item and always the second: known at once, or found."""
    generator = torch.Generator().manual_seed(1)
    z = torch.rand(300, 1, generator=generator) < 0.4
    classes = torch.tensor([[0.0, 1.0, 0.2, 0.1, 0.2], [0.6, 0.6, 0.8, 0.9, 0.7]])
    probs = torch.where(z, classes[0], classes[1])
    x = (torch.rand(300, 5, generator=generator) < probs).double()
    begin = torch.tensor([[0.1, 0.9, 0.3, 0.3, 0.2], [0.8, 0.5, 0.7, 0.4, 0.7]]).double()
    if exact:
        begin[0, :2] = torch.tensor([0.0, 1.0])
    start = {"weights": torch.tensor([0.5, 0.5]), "probs": begin}
    plain = EM(**TIGHT, max_iter=1500).fit(items, x, init=start)
    fit = EM(**TIGHT, accelerate=scheme).fit(items, x, init=start)
    assert plain.params["probs"][0, 0] < 1e-10  # so it is a boundary
    assert fit.converged
    assert fit.log_joint >= plain.log_joint - 1e-10 * len(x)
    assert movement(fit.params, plain.params) < 1e-6
    assert fit.history[-1].passes < plain.history[-1].passes


@every_scheme
def test_variances_stay_above_their_floors(scheme: str) -> None:
    x = torch.cat([torch.zeros(5), torch.linspace(-2, 2, 60)]).double()
    start = {"weights": [0.1, 0.45, 0.45], "loc": [0.0, -1.0, 1.0], "scale": [0.05, 1.0, 1.0]}
    fit = EM(floor=1e-6, accelerate=scheme).fit(gaussian_mixture, x, init=start)
    assert fit.status is Status.DEGENERATE
    assert float(fit.params["scale"].min()) >= 0.999e-3 * float(x.std(correction=0))


# ---------------------------------------------------------------------------------------
# Falling back


@dataclass(frozen=True)
class Wild:
    """Proposes ``G(x)`` moved by ``shift``."""

    shift: float

    def propose(self, trail: Trail, x: Tensor, image: Tensor) -> Tensor | None:
        return image + self.shift

    def remember(self, trail: Trail, x: Tensor, image: Tensor, taken: bool | None) -> Trail:
        assert taken is False
        return trail


@pytest.mark.parametrize(("shift", "cost"), [(20.0, 2), (-3.0, 2), (1e4, 1), (math.nan, 1)])
def test_bad_jumps_leave_plain_em(shift: float, cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pyroem.em.SCHEMES, "squarem", Wild(shift))
    problem = BY_NAME["gaussian_and_poisson"]
    plain, wild = walk(EM(), problem, 5), walk(EM(accelerate="squarem"), problem, 5)
    for i, (a, b) in enumerate(zip(plain, wild, strict=True)):
        assert a.log_joint == b.log_joint
        assert all(torch.equal(a.params[n], b.params[n]) for n in a.params)
        assert (a.passes, b.passes) == (1 + i, 1 + cost * i)


@every_scheme
@pytest.mark.parametrize("error", [ModelError("no"), torch.linalg.LinAlgError("no"), None])
def test_points_that_cannot_be_evaluated(
    scheme: str, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point but EM's own fails, by an exception or an objective that is not a number."""
    problem = BY_NAME["poisson_mixture"]
    solver = EM(accelerate=scheme)
    own: list[Params] = []
    maximise, expectation = problems_module.m_step, problems_module.Problem.e_step

    def m_step(*args: Any) -> Params:
        own.append(maximise(*args))
        return own[-1]

    def e_step(self: Any, params: Params) -> Any:
        expected, log_prior = expectation(self, params)
        if own and not any(params is p for p in own):
            if error is not None:
                raise error
            expected = replace(expected, log_likelihood=torch.tensor(math.nan))
        return expected, log_prior

    plain = walk(EM(), problem, 12)
    monkeypatch.setattr(problems_module, "m_step", m_step)
    monkeypatch.setattr(problems_module.Problem, "e_step", e_step)
    states = walk(solver, problem, 12)
    assert states[-1].passes > plain[-1].passes  # jumps were tried
    for a, b in zip(plain, states, strict=True):
        assert a.log_joint == b.log_joint


def test_a_jump_beside_the_ridge_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    class Near(Wild):
        def remember(self, trail: Trail, x: Tensor, image: Tensor, taken: bool | None) -> Trail:
            assert taken
            return trail

    problem = BY_NAME["diagonal_gaussian"]
    near = EM(max_iter=2).fit(problem.model, *problem.data, init=problem.params)
    monkeypatch.setitem(pyroem.em.SCHEMES, "anderson", Near(0.03))
    problem = replace(problem, params=near.params)
    first, second = walk(EM(accelerate="anderson"), problem, 1)
    assert second.passes == 3  # the start, the jump, and the step of EM from it
    assert second.log_joint >= first.log_joint


# ---------------------------------------------------------------------------------------
# Accounts


@every_scheme
@pytest.mark.parametrize("name", ["gaussian_mixture", "poisson_regressions"])
def test_passes_are_e_steps(scheme: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, solver, calls = BY_NAME[name], EM(accelerate=scheme), [0]
    expectation = problems_module.Problem.e_step

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return expectation(*args)

    monkeypatch.setattr(problems_module.Problem, "e_step", counted)
    states = walk(solver, problem, 25)
    assert calls[0] == states[-1].passes
    assert all(b.passes > a.passes for a, b in itertools.pairwise(states))


@every_scheme
def test_states_are_values(scheme: str) -> None:
    """A state can be stored, and stepped from twice."""
    problem, solver = BY_NAME["gaussian_mixture"], EM(accelerate=scheme)
    posed = solver.pose(problem.model, problem.data, {}, None)
    state = walk(solver, problem, 7)[-1]
    stored = pickle.loads(pickle.dumps(state))
    one, two, three = (solver.step(posed, s) for s in (state, state, stored))
    assert one.log_joint == two.log_joint == three.log_joint
    assert one.passes == two.passes == three.passes


def test_settings() -> None:
    for wrong in ("fast", "SQUAREM", True, 3, ["squarem"]):
        with pytest.raises(SettingError, match="None, 'squarem' or 'anderson', got"):
            EM(accelerate=wrong)  # type: ignore[arg-type]
    assert EM().patience == 1
    assert EM(accelerate="squarem") == EM(accelerate="squarem") != EM()


def test_the_report_names_the_acceleration() -> None:
    problem = BY_NAME["poisson_mixture"]
    for scheme, title in (("squarem", "EM (SQUAREM)"), ("anderson", "EM (Anderson)")):
        fit = EM(accelerate=scheme).fit(poisson_mixture, *problem.data, init=problem.params)
        assert fit.solver == title and title in repr(fit)
        assert "How EM updates each parameter:" in fit.explain()


def test_ridge_has_the_norm_that_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    exact = torch.linalg.lstsq(A, b).solution
    torch.testing.assert_close(ridge(A, b, 1.0), exact)
    for fraction in (0.9, 0.1, 1e-4):
        found = ridge(A, b, fraction)
        assert float(found.square().sum() / exact.square().sum()) == pytest.approx(fraction)
    A[:, 2] = A[:, 0]  # of two equal columns each takes half
    assert bool(ridge(A, b, 1.0).isfinite().all())
    assert bool((ridge(0 * A, b, 1.0) == 0).all())
    assert Anderson().propose(Trail(None), b, b) is None  # type: ignore[arg-type]
