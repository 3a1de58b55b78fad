"""What a fit offers, and how honestly it says how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import SetValues, brute_force
from problems import PROBLEMS, Problem, gaussian_mixture, poisson_mixture
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor
from torch.distributions import constraints

import pyroem
import pyroem.batch
from pyroem import EM, MAP, Fit, ModelError, SettingError, Status
from pyroem import families as registry
from pyroem.families import Coordinate, exponential_family, forms, register_family
from pyroem.loop import State
from pyroem.models import gaussian_mixture as gaussians

BY_NAME = {p.name: p for p in PROBLEMS}
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)


def at(problem: Problem, *data: Tensor, **settings: Any) -> Fit:
    """A fit that has hardly moved from the problem's own point."""
    solver = EM(max_iter=1, **settings)
    return solver.fit(problem.model, *(data or problem.data), init=problem.params)


def by_assignment(problem: Problem, fit: Fit, found: Any) -> dict[str, Any]:
    """What a fit says of its assignments, a chain's steps apart."""
    chains = fit.problem.structure.chains
    if isinstance(found, Tensor):
        found = {chains[0].name if chains else next(iter(problem.states)): found}
    for name in [name for name in found if name not in problem.states]:
        whole, rank, length = found.pop(name), len(chains[0].plates), chains[0].length
        found.update({f"{name}_{t}": whole.select(rank, t) for t in range(length)})
    return dict(found)


# ---------------------------------------------------------------------------------------
# Posterior, prediction, rows


@every_problem
def test_posterior_and_responsibilities(problem: Problem) -> None:
    fit = at(problem)
    found = by_assignment(problem, fit, fit.responsibilities())
    assert set(found) == set(problem.states)
    marginals = pyroem.e_step(problem.model, fit.params, *problem.data).marginals
    posterior = fit.posterior()
    if fit.problem.structure.chains:
        probs = {z: d.probs for z, d in posterior.items()}
        probs = by_assignment(problem, fit, probs)
        posterior = {z: dist.Categorical(p) for z, p in probs.items()}
    for z, probabilities in found.items():
        assert probabilities.shape[-1] == problem.states[z]
        assert bool((probabilities >= 0).all())
        total = probabilities.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
        torch.testing.assert_close(probabilities, marginals[z])
        d = posterior[z]
        if isinstance(d, dist.Bernoulli):
            torch.testing.assert_close(d.probs, probabilities[..., 1])
        else:
            torch.testing.assert_close(d.probs, probabilities)
    own: dict[str, Any] = dict(poutine.trace(problem.model).get_trace(*problem.data).nodes)
    for z, d in posterior.items():
        kind = type(own[z]["fn"])
        if kind in (dist.Bernoulli, dist.OneHotCategorical):
            assert isinstance(d, kind)


def most_probable(problem: Problem, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The best joint value of the assignments on the tiny data, by trying all of them."""
    assert problem.tiny is not None
    with SetValues(params):
        nodes: Any = poutine.trace(problem.model).get_trace(*problem.tiny).nodes
    sites = {z: nodes[z]["fn"] for z in nodes if z in problem.states}
    shapes = {z: fn.batch_shape for z, fn in sites.items()}
    sizes = [problem.states[z] for z, s in shapes.items() for _ in range(s.numel())]
    best, value = {}, -math.inf
    for combination in torch.cartesian_prod(*(torch.arange(k) for k in sizes)).reshape(
        -1, len(sizes)
    ):
        parts = combination.split([s.numel() for s in shapes.values()])
        states = {z: p.reshape(shapes[z]) for z, p in zip(shapes, parts, strict=True)}
        values = {
            z: fn.enumerate_support(expand=False).reshape((-1, *fn.event_shape))[states[z]]
            for z, fn in sites.items()
        }
        with SetValues({**params, **values}):
            trace = poutine.trace(problem.model).get_trace(*problem.tiny)
        trace.compute_log_prob()
        found = 0.0
        for name, node in trace.nodes.items():
            if name in sites:
                found += float(node["unscaled_log_prob"].sum())
            elif node["type"] == "sample" and node["is_observed"]:
                found += float(node["log_prob_sum"])
        if found > value:
            best, value = states, found
    return best, value


FEW = ["gaussian_mixture", "chain", "two_assignments_sum", "bernoulli_blend", "nested_assignments"]


@pytest.mark.parametrize("name", FEW)
def test_predict_finds_the_most_probable_joint_assignment(name: str) -> None:
    problem = BY_NAME[name]
    assert problem.tiny is not None
    data = problem.tiny
    if name == "chain":
        data = (data[0][:6],)
        problem = replace(problem, tiny=data, states={f"z_{t}": 2 for t in range(6)})
    fit = at(problem, *data)
    best, _ = most_probable(problem, fit.params)
    found = by_assignment(problem, fit, fit.predict())
    assert found.keys() == best.keys()
    for z, states in best.items():
        assert torch.equal(found[z].reshape(-1), states.reshape(-1)), z


ROWS = [p for p in PROBLEMS if p.row_plate is not None]


@pytest.mark.parametrize("problem", ROWS, ids=repr)
def test_rows_sum_to_the_log_likelihood(problem: Problem) -> None:
    fit = at(problem)
    rows = fit.log_prob()
    assert len(rows) == len(problem.data[0])
    assert float(rows.sum()) == pytest.approx(fit.log_likelihood, rel=1e-10)
    half = tuple(x[::2] for x in problem.data)
    torch.testing.assert_close(fit.log_prob(*half), rows[::2], rtol=1e-10, atol=1e-10)


def test_rows_that_hang_together_have_no_log_prob() -> None:
    with pytest.raises(ModelError, match="log_prob"):
        at(BY_NAME["global_assignment"]).log_prob()


def test_methods_take_new_data() -> None:
    problem = BY_NAME["gaussian_mixture"]
    fit = at(problem)
    new = torch.tensor([-3.0, 0.1, 4.0])
    assert fit.predict(new).tolist() == [0, 1, 2]
    assert fit.responsibilities(new).shape == (3, 3)
    assert fit.log_prob(new).shape == (3,)
    assert fit.posterior(new)["z"].batch_shape == (3,)
    with pytest.raises(ModelError, match=r"'loc'.*\(3, 3\).*\(3, 2\)"):
        at(BY_NAME["diagonal_gaussian"]).predict(torch.zeros(5, 3))


@every_problem
def test_sample(problem: Problem) -> None:
    fit = at(problem)
    names = {*problem.states, *fit.problem.structure.observations}
    if fit.problem.structure.chains:
        names = {name.split("_")[0] for name in names}
    if problem.row_plate is None:
        draw = fit.sample()
        assert set(draw) == names
        return
    rows = len(problem.data[0])
    for n in (1, rows - 1, rows, 2 * rows + 3):
        draw = fit.sample(n)
        assert set(draw) == names
        assert {len(v) for v in draw.values()} == {n}
    again = fit.sample(n)
    other = fit.sample(n, seed=1)
    assert all(torch.equal(draw[k], again[k]) for k in draw)
    assert not all(torch.equal(draw[k], other[k]) for k in draw)
    assert set(fit.sample()) == names


def test_samples_have_the_fitted_moments() -> None:
    fit = at(BY_NAME["gaussian_mixture"])
    draw = fit.sample(30_000, seed=3)
    for k in range(3):
        rows = draw["x"][draw["z"] == k]
        share = float(fit.params["weights"][k])
        assert len(rows) / 30_000 == pytest.approx(share, abs=0.02)
        assert float(rows.mean()) == pytest.approx(float(fit.params["loc"][k]), abs=0.06)
        assert float(rows.std()) == pytest.approx(float(fit.params["scale"][k]), rel=0.05)


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_sample_refuses(n: Any) -> None:
    with pytest.raises(SettingError, match="sample"):
        at(BY_NAME["gaussian_mixture"]).sample(n)


# ---------------------------------------------------------------------------------------
# Degrees of freedom and criteria


@pytest.mark.parametrize(
    "name, df",
    [
        ("gaussian_mixture", 2 + 3 + 3),
        ("diagonal_gaussian", 2 + 6 + 6),
        ("full_gaussian", 1 + 4 + 6),
        ("tied_gaussian", 2 + 6 + 3),
        ("cholesky_gaussian", 1 + 4 + 6),
        ("precision_gaussian", 1 + 4 + 6),
        ("shared_mean", 1 + 1 + 2),
        ("latent_class", 2 + 18),
        ("categorical_logits", 1 + 2 * 3 * 3),
        ("multinomial_mixture", 2 + 3 * 3),
        ("bernoulli_where", 4),
        ("chain_second_order", 1 + 4 + 2 + 2),
        ("global_assignment", 1 + 2 + 2 + 1),
    ],
)
def test_degrees_of_freedom(name: str, df: int) -> None:
    assert at(BY_NAME[name]).df == df


def test_fixed_parameters_are_not_free() -> None:
    fit = at(BY_NAME["full_gaussian"], fixed=("cov", "weights"))
    assert fit.df == 4
    for name in ("cov", "weights"):
        assert torch.equal(fit.params[name], BY_NAME["full_gaussian"].params[name])
    assert "fixed" in fit.explain()


def test_criteria() -> None:
    problem = BY_NAME["gaussian_mixture"]
    fit = at(problem)
    rows = len(problem.data[0])
    assert fit.aic() == pytest.approx(2 * 8 - 2 * fit.log_likelihood)
    assert fit.bic() == pytest.approx(8 * math.log(rows) - 2 * fit.log_likelihood)
    assert fit.bic(10) == pytest.approx(8 * math.log(10) - 2 * fit.log_likelihood)
    r = fit.responsibilities()
    assert fit.icl() == pytest.approx(fit.bic() - 2 * float(torch.xlogy(r, r).sum()))
    weights = torch.arange(rows) % 3
    weighted = EM(max_iter=1).fit(
        problem.model, *problem.data, init=problem.params, weights=weights
    )
    total = float(weights.sum())
    assert weighted.bic() == pytest.approx(8 * math.log(total) - 2 * weighted.log_likelihood)
    r = weighted.responsibilities()
    entropy = -float((torch.xlogy(r, r).sum(-1) * weights).sum())
    assert weighted.icl() == pytest.approx(weighted.bic() + 2 * entropy)


def test_icl_takes_the_joint_entropy_of_a_chain() -> None:
    problem = BY_NAME["chain"]
    short = at(problem, problem.data[0][:7])
    posterior = brute_force(problem.model, short.params, (problem.data[0][:7],)).posterior
    entropy = -float(torch.xlogy(posterior, posterior).sum())
    assert short.icl(7) == pytest.approx(short.bic(7) + 2 * entropy, rel=1e-9)


# ---------------------------------------------------------------------------------------
# The record of a fit


@pytest.mark.parametrize("name", ["gaussian_mixture", "gaussian_inverse_gamma", "chain"])
def test_history(name: str) -> None:
    problem = BY_NAME[name]
    fit = EM().fit(problem.model, *problem.data, init=problem.params)
    assert fit.converged and fit.status is Status.CONVERGED
    assert fit.n_iter == len(fit.history) - 1
    assert [r.iteration for r in fit.history] == list(range(fit.n_iter + 1))
    for old, new in zip(fit.history, fit.history[1:], strict=False):
        assert new.log_joint >= old.log_joint - 1e-9 * abs(old.log_joint)
        assert new.seconds >= old.seconds and new.passes > old.passes
    assert fit.history[-1].log_joint == pytest.approx(fit.log_joint, rel=1e-12)
    assert fit.log_joint == pytest.approx(fit.log_likelihood + fit.log_prior, rel=1e-14)
    value = pyroem.log_joint(problem.model, fit.params, *problem.data)
    assert float(value) == pytest.approx(fit.log_joint, rel=1e-12)
    for name_ in problem.params:
        assert f"  {name_} (" in fit.explain()


@pytest.mark.parametrize("solver", [EM(max_iter=20), MAP(max_iter=20)])
def test_save_and_load(solver: Any, tmp_path: Path) -> None:
    problem = BY_NAME["poisson_mixture"]
    weights = torch.arange(len(problem.data[0])) % 2 + 1
    fit = solver.fit(problem.model, *problem.data, init="kmeans", restarts=2, weights=weights)
    path = tmp_path / "fit.pt"
    fit.save(path)
    back = Fit.load(path, problem.model, *problem.data, weights=weights)
    assert back.params.keys() == fit.params.keys()
    assert all(torch.equal(back.params[n], fit.params[n]) for n in fit.params)
    for key in ("log_likelihood", "log_prior", "history", "status", "message", "start", "restarts"):
        assert getattr(back, key) == getattr(fit, key), key
    assert back.solver == fit.solver
    assert back.explain() == fit.explain()
    assert back.bic() == fit.bic() and back.icl() == fit.icl()
    torch.testing.assert_close(back.responsibilities(), fit.responsibilities())


def test_guide_serves_predictive() -> None:
    fit = at(BY_NAME["gaussian_inverse_gamma"])
    x = torch.zeros(5, dtype=torch.float64)
    predictive = Predictive(
        poutine.uncondition(fit.problem.structure.program.model), guide=fit.guide(), num_samples=4
    )
    draws = predictive(x)
    assert draws["x"].shape == (4, 5)
    mixed = at(BY_NAME["gaussian_mixture"])
    pyro.clear_param_store()
    model: Any = poutine.uncondition(gaussian_mixture)
    draws = Predictive(model, guide=mixed.guide(), num_samples=500)(x)
    assert draws["x"].shape == (500, 5)
    torch.testing.assert_close(pyro.param("loc").detach(), mixed.params["loc"])
    shares = [float((draws["z"] == k).double().mean()) for k in range(3)]
    assert shares == pytest.approx(mixed.params["weights"].tolist(), abs=0.04)


def test_restarts_are_recorded() -> None:
    problem = BY_NAME["gaussian_mixture"]
    fit = EM(max_iter=30).fit(problem.model, *problem.data, init="random", restarts=3, seed=4)
    assert len(fit.restarts) == 3
    healthy = [r.log_joint for r in fit.restarts if r.status is not Status.DEGENERATE]
    assert fit.log_joint == pytest.approx(max(healthy), rel=1e-12)
    assert "Restarts: " in fit.explain()
    again = EM(max_iter=30).fit(problem.model, *problem.data, init="random", restarts=3, seed=4)
    assert again.restarts == fit.restarts
    one = EM(max_iter=30).fit(problem.model, *problem.data, init="random", seed=5)
    assert one.log_joint == pytest.approx(fit.restarts[1].log_joint, rel=1e-12)


@pytest.mark.parametrize("init", ["auto", "kmeans", "ward", "random", "prior", "model"])
def test_init(init: str) -> None:
    problem = BY_NAME["gaussian_inverse_gamma"]
    fit = EM(max_iter=15).fit(problem.model, *problem.data, init=init)
    assert fit.status in (Status.CONVERGED, Status.MAX_ITER)
    assert fit.start in fit.explain()
    assert fit.log_joint > fit.history[0].log_joint


def test_init_with_values_or_a_fit() -> None:
    problem = BY_NAME["gaussian_mixture"]
    first = EM().fit(problem.model, *problem.data, init=problem.params)
    again = EM().fit(problem.model, *problem.data, init=first)
    assert again.n_iter <= 2
    assert again.log_joint == pytest.approx(first.log_joint, abs=1e-5)
    some = EM(max_iter=1).fit(problem.model, *problem.data, init={"loc": [-2.0, 0.0, 3.0]})
    assert some.history[0].log_joint > first.log_joint - 60
    assert "the rest" in some.start
    held = EM(fixed="loc").fit(problem.model, *problem.data, init={"loc": [-2.0, 0.0, 3.0]})
    assert held.params["loc"].tolist() == [-2.0, 0.0, 3.0]


@pytest.mark.parametrize("solver", [EM, MAP])
@pytest.mark.parametrize("name", ["gaussian_mixture", "full_gaussian", "poisson_mixture", "chain"])
def test_float32(solver: Any, name: str) -> None:
    problem = BY_NAME[name]
    fit = solver(dtype=torch.float32).fit(problem.model, *problem.data, init=problem.params)
    assert {v.dtype for v in fit.params.values()} == {torch.float32}
    assert fit.converged, str(fit)
    exact = solver().fit(problem.model, *problem.data, init=problem.params)
    assert fit.log_joint == pytest.approx(exact.log_joint, rel=1e-3)


# ---------------------------------------------------------------------------------------
# How a fit ends


def test_max_iter() -> None:
    problem = BY_NAME["gaussian_mixture"]
    fit = EM(max_iter=2).fit(problem.model, *problem.data, init=problem.params)
    assert fit.status is Status.MAX_ITER and not fit.converged and fit.n_iter == 2
    assert "max_iter" in fit.status.explanation and "max iter" in str(fit)


def gaussian_pair(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_zeros(2))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


@pytest.mark.parametrize("solver", [EM(), MAP()])
def test_non_finite(solver: Any) -> None:
    def zero_inflated(n: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        rate = pyro.param("rate", torch.tensor([1.0, 2.0]), constraint=constraints.nonnegative)
        with pyro.plate("rows", len(n)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("n", dist.Poisson(rate[z]), obs=n)

    n = torch.tensor([0.0, 1.0, 2.0, 5.0])
    init = {"weights": torch.tensor([0.5, 0.5]), "rate": torch.tensor([0.0, 0.0])}
    fit = solver.fit(zero_inflated, n, init=init)
    expected = Status.NON_FINITE if isinstance(solver, EM) else Status.SYMMETRIC
    assert fit.status is expected and not fit.converged
    if isinstance(solver, EM):  # MAP cannot stand on the boundary itself, and leaves it
        assert fit.n_iter == 0 and "-inf" in fit.message
    assert fit.explain()


@pytest.mark.parametrize("solver", [EM(), MAP()])
def test_symmetric(solver: Any) -> None:
    x = torch.cat([torch.linspace(-3, -1, 30), torch.linspace(1, 4, 30)])
    fit = solver.fit(gaussian_pair, x, init="model")
    assert fit.status is Status.SYMMETRIC and not fit.converged
    assert "states 0 and 1 of 'z'" in fit.message
    assert solver.fit(gaussian_pair, x).converged


def test_collapse_is_degenerate() -> None:
    x = torch.cat([torch.full((10,), 2.0), torch.linspace(-3, 0, 30)])
    init = {"loc": torch.tensor([2.0, -1.5]), "scale": torch.tensor([0.1, 1.0])}
    fit = EM().fit(gaussian_pair, x, init={**init, "weights": torch.tensor([0.3, 0.7])})
    assert fit.status is Status.DEGENERATE and not fit.converged
    assert "scale[0]" in fit.message and "'x'" in fit.message
    assert math.isfinite(fit.log_joint)
    by_gradient = MAP(max_iter=300).fit(
        gaussian_pair, x, init={**init, "weights": torch.tensor([0.3, 0.7])}
    )
    assert not by_gradient.converged


def test_collapse_of_a_covariance_is_degenerate() -> None:
    cloud = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    x = torch.cat([torch.tensor([[6.0, 6.0]]).repeat(8, 1), cloud])
    init = {
        "weights": torch.tensor([0.2, 0.8]),
        "loc": torch.tensor([[6.0, 6.0], [0.0, 0.0]]),
        "covariance": torch.stack([0.1 * torch.eye(2), torch.eye(2)]),
    }
    fit = EM().fit(gaussians(2), x, init=init)
    assert fit.status is Status.DEGENERATE
    assert "covariance[0]" in fit.message


def test_a_dead_component_is_degenerate() -> None:
    x = torch.linspace(-1, 1, 50)
    init = {
        "weights": torch.tensor([0.5, 0.5]),
        "loc": torch.tensor([0.0, 100.0]),
        "scale": torch.tensor([1.0, 1.0]),
    }
    fit = EM().fit(gaussian_pair, x, init=init)
    assert fit.status is Status.DEGENERATE and not fit.converged
    assert "state 1" in fit.message and "'z'" in fit.message
    assert all(bool(v.isfinite().all()) for v in fit.params.values())


def test_a_healthy_restart_beats_a_collapsed_one() -> None:
    x = torch.cat(
        [torch.full((6,), 2.0), torch.randn(60, generator=torch.Generator().manual_seed(0))]
    )
    fit = EM(max_iter=100).fit(gaussian_pair, x, init="random", restarts=4)
    if any(r.status is not Status.DEGENERATE for r in fit.restarts):
        assert fit.status is not Status.DEGENERATE


@dataclass(frozen=True, kw_only=True)
class Interrupted(EM):
    """EM whose user loses patience in the fourth iteration."""

    def step(self, problem: Any, state: State) -> State:
        if state.passes == 4:
            raise KeyboardInterrupt
        return super().step(problem, state)


def test_interrupted() -> None:
    problem = BY_NAME["gaussian_mixture"]
    fit = Interrupted().fit(problem.model, *problem.data, init="kmeans", restarts=3)
    assert fit.status is Status.INTERRUPTED and not fit.converged
    assert fit.n_iter == 3 and len(fit.restarts) == 1
    assert fit.log_joint == pytest.approx(fit.history[-1].log_joint)


def test_solvers_of_two_dtypes_are_compared() -> None:
    problem = BY_NAME["gaussian_mixture"]
    solvers = {"double": EM(), "single": EM(dtype=torch.float32)}
    for given in (problem.params, "kmeans"):
        table = pyroem.compare(problem.model, *problem.data, solvers=solvers, init=given)
        assert table.fits["single"].params["loc"].dtype == torch.float32
        assert table.rows[1].parameter_difference < 1e-3
        for row in table.rows:  # judged by one objective
            params = {n: v.double() for n, v in table.fits[row.name].params.items()}
            exact = float(pyroem.log_joint(problem.model, params, *problem.data))
            assert row.log_joint == pytest.approx(exact, rel=1e-12)


def test_an_interrupt_ends_a_comparison() -> None:
    problem = BY_NAME["gaussian_mixture"]
    solvers = {"a": EM(max_iter=5), "b": Interrupted(), "c": EM()}
    table = pyroem.compare(problem.model, *problem.data, solvers=solvers, init="kmeans")
    assert [row.name for row in table.rows] == ["a", "b"]
    assert table.rows[1].status == "interrupted" and table.best in ("a", "b")


@pytest.mark.parametrize("engine", ["kernel", "trace"])
def test_interrupted_search_for_a_start(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    calls = 0
    where = pyroem.batch.Batch if engine == "kernel" else pyroem.problem.Problem
    inner = where.e_step

    def impatient(self: Any, params: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (3 if engine == "kernel" else 20):
            raise KeyboardInterrupt
        return inner(self, params)

    monkeypatch.setattr(where, "e_step", impatient)
    x = BY_NAME["gaussian_mixture"].data[0]
    fit = EM(engine=engine).fit(random_locations, x)
    assert fit.status is Status.INTERRUPTED and fit.n_iter == 0
    assert "interrupted" in fit.start and math.isfinite(fit.log_joint)


def random_locations(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, dtype=x.dtype))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def test_a_collapse_calls_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BY_NAME["gaussian_mixture"]
    verdicts = iter([Status.DEGENERATE, Status.DEGENERATE, Status.CONVERGED])

    def judge(problem: Any, solver: Any, start: Any, outcome: Any) -> Any:
        return replace(outcome, status=next(verdicts))

    monkeypatch.setattr(pyroem.solver, "judge", judge)
    fit = EM(max_iter=3).fit(random_locations, *problem.data)
    assert [r.status for r in fit.restarts] == [*[Status.DEGENERATE] * 2, Status.CONVERGED]
    assert fit.converged


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    problem = BY_NAME["gaussian_mixture"]
    EM(max_iter=3, progress=True).fit(problem.model, *problem.data, init=problem.params)
    captured = capsys.readouterr()
    assert "EM iteration" in captured.err and not captured.out
    EM(max_iter=3).fit(problem.model, *problem.data, init=problem.params)
    assert not capsys.readouterr().err


def test_every_status_is_explained() -> None:
    assert all(status.explanation for status in Status)


# ---------------------------------------------------------------------------------------
# A worked example


def two_gaussians(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def test_two_gaussians_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 5 * torch.randn(10_000, generator=generator, dtype=torch.float64)
    truth = (torch.arange(10_000) >= 3_000).long()
    x = noise + torch.tensor([20.0, 40.0], dtype=torch.float64)[truth]
    fit = EM().fit(two_gaussians, x, init="random")
    assert fit.converged
    order = fit.params["loc"].argsort()
    assert fit.params["weights"][order].tolist() == pytest.approx([0.3, 0.7], abs=0.015)
    assert fit.params["loc"][order].tolist() == pytest.approx([20.0, 40.0], abs=0.4)
    assert fit.params["scale"][order].tolist() == pytest.approx([5.0, 5.0], abs=0.3)
    predicted = order.argsort()[fit.predict()]
    assert float((predicted == truth).double().mean()) > 0.96
    by_gradient = MAP().fit(two_gaussians, x, init="random")
    assert by_gradient.converged
    assert abs(by_gradient.log_joint - fit.log_joint) <= 1e-6 * len(x)


# ---------------------------------------------------------------------------------------
# Families that the user registers


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families registered in a test are gone after it."""
    monkeypatch.setattr(registry.family, "_REGISTRY", dict(registry.family._REGISTRY))


class Rayleigh(dist.TorchDistribution):
    """A distribution that no library knows of."""

    arg_constraints = {"scale": constraints.positive}  # noqa: RUF012  (torch does it so)
    support = constraints.positive

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        super().__init__(scale.shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Rayleigh:
        return Rayleigh(self.scale.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.scale.dtype)
        return self.scale * (-2 * u.log()).sqrt()

    def log_prob(self, x: Tensor) -> Tensor:
        return x.log() - 2 * self.scale.log() - x**2 / (2 * self.scale**2)


def rayleigh_mixture(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    scale = pyro.param("scale", x.new_tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", Rayleigh(scale[z]), obs=x)


def rayleigh_data() -> Tensor:
    torch.manual_seed(1)
    parts = [Rayleigh(torch.full((n,), s).double()).sample() for n, s in ((150, 1.0), (100, 5.0))]
    return torch.cat(parts)


def rayleigh_family(coordinates: tuple[Coordinate, ...] = ()) -> registry.Family:
    return exponential_family(
        ("scale",),
        lambda x: (x**2,),
        lambda s: (-0.5 * s**-2,),
        lambda s: 2 * s.log(),
        coordinates,
    )


RAYLEIGH_SCALE = Coordinate("scale", "scale", forms.SCALE, lambda s, w, args: (2 * w, 0.5 * s[0]))


@pytest.mark.parametrize(
    "family, words",
    [
        (lambda: None, "no closed form (the statistics of Rayleigh are the rows)"),
        (rayleigh_family, "its family has no Coordinate for it"),
        (lambda: rayleigh_family((RAYLEIGH_SCALE,)), "scale (2): closed form"),
    ],
    ids=["none", "on statistics", "closed form"],
)
def test_own_family(
    own_registry: None, family: Callable[[], registry.Family | None], words: str
) -> None:
    entry = family()
    if entry is not None:
        register_family(Rayleigh, entry)
    x = rayleigh_data()
    fit = EM(tol=1e-12, param_tol=1e-8).fit(rayleigh_mixture, x)
    assert fit.converged, str(fit)
    assert words in fit.explain()
    by_gradient = MAP(tol=1e-12, param_tol=1e-8).fit(rayleigh_mixture, x)
    assert fit.log_joint == pytest.approx(by_gradient.log_joint, abs=1e-6)
    r = fit.responsibilities()
    wanted = ((r * x.unsqueeze(-1) ** 2).sum(0) / (2 * r.sum(0))).sqrt()
    torch.testing.assert_close(fit.params["scale"], wanted, rtol=1e-4, atol=1e-4)


def test_gamma_of_known_shape(own_registry: None) -> None:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
        rate = pyro.param("rate", x.new_tensor([0.5, 3.0]), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Gamma(x.new_tensor(2.0), rate[z]), obs=x)

    def coefficients(s: Any, w: Tensor, args: Any) -> tuple[Tensor, Tensor]:
        return args["concentration"] * w, s[1]

    family = exponential_family(
        ("concentration", "rate"),
        lambda x: (x.log(), x),
        lambda a, b: (a - 1, -b),
        lambda a, b: torch.lgamma(a) - a * b.log(),
        (Coordinate("rate", "rate", forms.RATE, coefficients),),
    )
    register_family(dist.Gamma, family)
    generator = torch.Generator().manual_seed(0)
    draws = torch._standard_gamma(torch.full((200,), 2.0).double(), generator=generator)
    x = torch.cat([draws[:120] / 0.4, draws[120:] / 4.0])
    fit = EM(tol=1e-12, param_tol=1e-8).fit(model, x)
    assert fit.converged and "rate (2): closed form" in fit.explain()
    r = fit.responsibilities()
    wanted = 2 * r.sum(0) / (r * x.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(fit.params["rate"], wanted, rtol=1e-4, atol=1e-4)


def test_a_wrong_family_is_found_out(own_registry: None) -> None:
    wrong = exponential_family(
        ("scale",), lambda x: (x**2,), lambda s: (-1.0 * s**-2,), lambda s: 2 * s.log()
    )
    register_family(Rayleigh, wrong)
    with pytest.raises(ModelError, match=r"'x'.*Rayleigh.*log_prob"):
        EM().fit(rayleigh_mixture, rayleigh_data())
    formula = Coordinate("scale", "scale", forms.SCALE, lambda s, w, args: (3 * w, 0.5 * s[0]))
    wrong = exponential_family(
        ("scale",),
        lambda x: (x**2,),
        lambda s: (-0.5 * s**-2.0,),
        lambda s: 2 * s.log(),
        (formula,),
    )
    register_family(Rayleigh, wrong)
    with pytest.raises(ModelError, match=r"'x'.*'scale'.*Rayleigh.*coefficients"):
        EM().fit(rayleigh_mixture, rayleigh_data())
    with pytest.raises(SettingError, match="register_family"):
        register_family(Rayleigh, 3)  # type: ignore[arg-type]  # wrong on purpose


def test_the_same_program_serves_many_fits() -> None:
    problem = BY_NAME["poisson_mixture"]
    a, b = (
        EM(max_iter=5).fit(poisson_mixture, *problem.data, init="random", seed=7) for _ in range(2)
    )
    assert all(torch.equal(a.params[n], b.params[n]) for n in a.params)


def test_basins_and_the_order_of_states() -> None:
    problem = BY_NAME["gaussian_mixture"]
    fit = EM().fit(problem.model, *problem.data, init="random", restarts=6)
    ended = [r.log_joint for r in fit.restarts if r.status is Status.CONVERGED]
    assert sum(count for _, count in fit.basins) == len(ended)
    assert fit.basins[0][0] == max(ended)
    values = [value for value, _ in fit.basins]
    assert values == sorted(values, reverse=True)
    assert all(a - b > 1e-5 * fit.problem.rows for a, b in pairwise(values))
    found = fit.ordered("loc")
    assert bool((found.params["loc"].diff() >= 0).all())
    assert sum(found.problem.parts(found.params)) == pytest.approx(fit.log_joint, rel=1e-12)
    assert torch.equal(found.ordered("loc").params["loc"], found.params["loc"])
    moved = found.responsibilities().sum(0).argsort()
    assert torch.equal(moved, found.params["weights"].argsort())
    with pytest.raises(SettingError, match="ordered: expected one of loc, "):
        fit.ordered("nothing")
