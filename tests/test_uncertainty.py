"""Information matrices, standard errors, EM's rate, derivatives through a fit."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS, Problem
from scipy.optimize import approx_fprime
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, MAP, ModelError, SettingError, blocks, datasets, implicit, mcmc
from pyroem.derivatives import by_rows, coordinates, log_likelihood
from pyroem.derivatives import run as trace_of
from pyroem.models import gaussian_mixture, hidden_markov, latent_class, poisson_mixture
from pyroem.problem import pose
from pyroem.uncertainty import METHODS, curvature, objective, scores

BY_NAME = {p.name: p for p in PROBLEMS}
each = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def faithful() -> Tensor:
    return datasets.load("faithful")[1]


_posed: dict[str, tuple[Any, Any]] = {}


def at_its_point(problem: Problem) -> tuple[Any, Any]:
    if problem.name not in _posed:
        posed = pose(problem.model, problem.data, {})
        _posed[problem.name] = posed, coordinates(posed, posed.structure.values(problem.params))
    return _posed[problem.name]


# ---------------------------------------------------------------------------------------
# The objective and its derivatives, on every problem


@each
def test_the_objective_is_that_of_the_engine(problem: Problem) -> None:
    """Value, rows and gradient; the kernel and forward-backward compute them another way.

    And Louis' formula is the Hessian.
    """
    posed, at = at_its_point(problem)
    found = trace_of(posed.structure, at.values)
    value = log_likelihood(posed.structure, found, found.tensors())
    wanted = posed.log_joint(at.values)
    assert float(value) == pytest.approx(float(wanted[0]), rel=1e-10, abs=1e-8)
    rows = by_rows(posed, found)
    if rows is not None:
        assert float(rows.sum()) == pytest.approx(float(wanted[0]), rel=1e-10, abs=1e-8)
    u = at.vector.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sum(posed.log_joint(at.params(u))), u)
    own, hessian = objective(posed, at)
    assert torch.allclose(own, slope, rtol=1e-8, atol=1e-8 * float(slope.abs().max()))
    # Louis' formula: I_c - I_m is -l'' at any point, and the missing information a variance.
    parts = curvature(posed, at)
    size = float(hessian.abs().max())
    assert torch.allclose(parts.observed, -hessian, rtol=1e-9, atol=1e-9 * size)
    assert torch.allclose(hessian, hessian.T, rtol=1e-9, atol=1e-9 * size)
    assert torch.allclose(parts.missing, parts.missing.T, rtol=1e-9, atol=1e-9 * size)
    least = float(torch.linalg.eigvalsh(0.5 * (parts.missing + parts.missing.T)).min())
    assert least >= -1e-9 * float(parts.missing.abs().max().clamp(min=1e-12))


@each
def test_scores_of_rows_sum_to_the_gradient(problem: Problem) -> None:
    posed, at = at_its_point(problem)
    if by_rows(posed, trace_of(posed.structure, at.values)) is None:
        with pytest.raises(ModelError, match="rows are not independent"):
            scores(posed, at)
        return
    u = at.vector.clone().requires_grad_()
    (slope,) = torch.autograd.grad(posed.log_joint(at.params(u))[0], u)
    total = scores(posed, at).sum(0)
    assert torch.allclose(total, slope, rtol=1e-8, atol=1e-8 * float(slope.abs().max()))


def test_the_hessian_by_differences() -> None:
    """Of a mixture with full covariances and of a chain: differences of the gradient."""
    for name in ("full_gaussian", "chain_sequences", "hierarchical_means"):
        posed, at = at_its_point(BY_NAME[name])
        _, hessian = objective(posed, at)

        def gradient(u: np.ndarray, posed: Any = posed, at: Any = at) -> np.ndarray:
            own = torch.as_tensor(u).requires_grad_()
            (found,) = torch.autograd.grad(sum(posed.log_joint(at.params(own))), own)
            return np.asarray(found)

        # scipy's forward differences: first order in the step
        numeric = approx_fprime(at.vector.numpy(), gradient, 1e-6)
        size = float(hessian.abs().max())
        np.testing.assert_allclose(numeric, hessian, rtol=1e-4, atol=1e-4 * size)


# ---------------------------------------------------------------------------------------
# Standard errors where they are known


def one_normal(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def test_one_normal_by_formula() -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    fit = EM().fit(one_normal, x)
    n, scale = len(x), float(fit.params["scale"])
    found = fit.uncertainty()
    assert float(found.standard_errors["loc"]) == pytest.approx(scale / math.sqrt(n), rel=1e-6)
    assert float(found.standard_errors["scale"]) == pytest.approx(
        scale / math.sqrt(2 * n), rel=1e-6
    )
    assert not found.message
    table = found.to_dict()["elements"]
    assert list(table) == ["loc", "scale"]
    assert table["loc"]["standard_error"] == float(found.standard_errors["loc"])
    assert f"{float(fit.params['loc']):.6g}" in str(found)
    low, high = found.intervals()["loc"]
    half = 1.959963984540054 * scale / math.sqrt(n)
    assert float(high - low) == pytest.approx(2 * half, rel=1e-6)
    low, high = found.intervals(scale="unconstrained")["scale"]
    assert float(low * high) == pytest.approx(scale**2, rel=1e-9)
    # The sandwich: the fourth moment for the scale.
    away = x - x.mean()
    fourth = float((away**4).mean()) / scale**4
    sandwich = fit.uncertainty("sandwich").standard_errors
    assert float(sandwich["scale"]) == pytest.approx(
        scale * math.sqrt((fourth - 1) / (4 * n)), rel=1e-6
    )


def test_weights_of_known_classes() -> None:
    """Components far apart: the weights' standard errors are those of a multinomial."""
    n = torch.tensor([1.0] * 30 + [1000.0] * 50 + [100000.0] * 20).double().unsqueeze(-1)
    fit = EM().fit(poisson_mixture(3), n)
    found = fit.uncertainty().standard_errors
    p = fit.params["weights"]
    assert torch.allclose(found["weights"], (p * (1 - p) / 100).sqrt(), rtol=1e-6)
    rates, counts = fit.params["rate"].squeeze(), 100 * p
    assert torch.allclose(found["rate"].squeeze(), (rates / counts).sqrt(), rtol=1e-5)


def test_methods_agree_as_they_should() -> None:
    """On data from the model: Louis' exactly, the others up to sampling error."""
    generator = torch.Generator().manual_seed(1)
    z = torch.rand(20_000, generator=generator) < 0.4
    x = torch.randn(20_000, generator=generator, dtype=torch.float64) + 3.0 * z
    fit = EM(tol=1e-12).fit(gaussian_mixture(2), x.unsqueeze(-1))
    found = {m: fit.uncertainty(m).standard_errors for m in METHODS}
    for name, se in found["observed"].items():
        assert torch.allclose(found["louis"][name], se, rtol=1e-6)
        assert torch.allclose(found["outer"][name], se, rtol=0.08)
        assert torch.allclose(found["sandwich"][name], se, rtol=0.08)


def test_weights_count_rows() -> None:
    x = faithful()
    weights = torch.ones(len(x), dtype=torch.float64)
    weights[:100] = 2.0
    a = EM(tol=1e-12).fit(gaussian_mixture(2), x, weights=weights)
    b = EM(tol=1e-12).fit(gaussian_mixture(2), torch.cat([x, x[:100]]), init=a)
    for method in METHODS:
        one, two = (f.uncertainty(method).standard_errors for f in (a, b))
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=1e-4)


def test_a_chain() -> None:
    """Standard errors of a hidden Markov model are those of its Hessian by differences."""
    x = datasets.load("earthquakes")[1]
    fit = EM(tol=1e-13).fit(hidden_markov(2, "poisson"), x)
    found = fit.uncertainty()
    rate = found.standard_errors["rate"].reshape(-1)
    assert bool((rate > 0).all())
    for method in ("outer", "sandwich"):
        with pytest.raises(ModelError, match="rows are not independent"):
            fit.uncertainty(method)
    louis = fit.uncertainty("louis").standard_errors["rate"].reshape(-1)
    assert torch.allclose(louis, rate, rtol=1e-6)


# ---------------------------------------------------------------------------------------
# Where there is no number


def test_a_bound_is_named() -> None:
    """A class that always says yes: its probability stands at 1."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(300, generator=generator) < 0.5
    p = torch.where(z[:, None], torch.tensor([1.0, 0.8, 0.9]), torch.tensor([0.2, 0.1, 0.3]))
    y = torch.bernoulli(p.double(), generator=generator)
    fit = EM().fit(latent_class(2, [2, 2, 2]), y.long())
    found = fit.uncertainty()
    probs = fit.params["probs_0"]
    assert bool((probs < 1e-6).any())
    assert "at a bound" in found.message
    assert bool(found.standard_errors["probs_0"][probs < 1e-6].isnan().all())
    assert bool(found.standard_errors["probs_1"].isfinite().all())


def test_what_the_data_do_not_determine_is_named() -> None:
    def logits(x: Tensor) -> None:
        own = pyro.param("logits", torch.tensor([0.3, -0.2]))
        loc = pyro.param("loc", torch.tensor([0.0, 5.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=own))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator, dtype=torch.float64)
    x[:80] += 5
    found = EM(tol=1e-12).fit(logits, x).uncertainty()
    assert bool(found.standard_errors["logits"].isnan().all())
    assert bool(found.standard_errors["loc"].isfinite().all())
    assert "do not determine logits[0], logits[1]" in found.message


def test_no_maximum_no_number() -> None:
    x = faithful()
    saddle = EM(max_iter=1).fit(gaussian_mixture(2), x, init="random", seed=1)
    found = saddle.uncertainty()
    assert found.message
    assert "settled" in found.message or "no maximum" in found.message
    with pytest.raises(SettingError, match="expected one of observed, louis, outer, sandwich"):
        saddle.uncertainty("fisher")
    with pytest.raises(ModelError, match=r"are no maximum|not positive definite"):
        implicit(saddle)


# ---------------------------------------------------------------------------------------
# EM's own rate


@pytest.mark.parametrize(
    "name, steps", [("faithful", (5, 6)), ("prior", (12, 13)), ("chain", (20, 21))]
)
def test_the_rate_predicts_the_steps(name: str, steps: tuple[int, int]) -> None:
    """The parameters' distance shrinks by the largest eigenvalue of the rate matrix."""
    if name == "faithful":
        solver, program, x = EM(tol=1e-15, param_tol=1e-12), gaussian_mixture(2), faithful()
    elif name == "prior":
        problem = BY_NAME["gaussian_gamma_precision"]
        solver, program, x = EM(tol=1e-15, param_tol=1e-12), problem.model, problem.data[0]
    else:
        solver, program = EM(tol=1e-15, param_tol=1e-12), hidden_markov(2, "poisson")
        x = datasets.load("earthquakes")[1]
    best = solver.fit(program, x)
    eigenvalues = torch.linalg.eigvals(best.rate_matrix()).real
    assert float(eigenvalues.min()) > -1e-9
    assert float(eigenvalues.max()) < 1
    start = {n: v.clone() for n, v in best.params.items()}
    free = "loc" if "loc" in start else "rate"
    start[free] = start[free] * 1.001
    points = [
        EM(max_iter=i, tol=1e-300, param_tol=1e-300).fit(program, x, init=start).params[free]
        for i in steps
    ]
    gaps = [(point - best.params[free]).norm() for point in points]
    assert float(gaps[1] / gaps[0]) == pytest.approx(float(eigenvalues.max()), rel=0.02)
    assert best.rate == pytest.approx(float(eigenvalues.max()), rel=1e-6)


# ---------------------------------------------------------------------------------------
# Derivatives through a fit


def test_influence_of_rows_by_differences() -> None:
    x = faithful()
    solver = EM(tol=1e-15, param_tol=1e-11)
    fit = solver.fit(gaussian_mixture(2), x)
    weights = torch.ones(len(x), dtype=torch.float64).requires_grad_()
    params = implicit(fit, weights=weights)
    for name in params:
        assert torch.allclose(params[name], fit.params[name], rtol=1e-10)
    (found,) = torch.autograd.grad(params["loc"][0, 1], weights)
    for row in (0, 7, 100):
        ends = []
        for sign in (1, -1):
            own = torch.ones(len(x), dtype=torch.float64)
            own[row] += sign * 1e-3
            again = solver.fit(gaussian_mixture(2), x, init=fit, weights=own)
            ends.append(float(again.params["loc"][0, 1]))
        assert float(found[row]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)


def with_a_prior(x: Tensor, spread: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.sample("loc", dist.Normal(0.0, spread).expand([2]).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def test_data_and_prior_by_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=generator, dtype=torch.float64)
    x[:25] += 4
    spread = torch.tensor(2.0, dtype=torch.float64)
    solver = EM(tol=1e-15, param_tol=1e-12)
    fit = solver.fit(with_a_prior, x, spread)
    own, setting = x.clone().requires_grad_(), spread.clone().requires_grad_()
    params = implicit(fit, own, setting)
    by_row, by_setting = torch.autograd.grad(params["loc"][0], [own, setting])

    def loc(x: Tensor, spread: Tensor) -> float:
        return float(solver.fit(with_a_prior, x, spread, init=fit).params["loc"][0])

    step = 1e-4
    ends = [loc(x, spread + s * step) for s in (1, -1)]
    assert float(by_setting) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)
    for row in (0, 40):
        moved = [x.clone(), x.clone()]
        moved[0][row] += step
        moved[1][row] -= step
        ends = [loc(m, spread) for m in moved]
        assert float(by_row[row]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_map_fits_have_them_too() -> None:
    x = faithful()
    a, b = EM(tol=1e-13).fit(gaussian_mixture(2), x), MAP(tol=1e-13).fit(gaussian_mixture(2), x)
    order = (
        torch.tensor([1, 0])
        if a.params["loc"][0, 0] * 0 + ((a.params["loc"][0] - b.params["loc"][0]).abs().max() > 1)
        else torch.tensor([0, 1])
    )
    one, two = a.uncertainty().standard_errors, b.uncertainty().standard_errors
    assert torch.allclose(one["loc"], two["loc"][order], rtol=1e-3)


def test_data_in_blocks_is_refused() -> None:
    """The program was read on some of the rows: their standard errors are not those of all."""
    x = faithful().repeat(40, 1)
    halves = [x[:5000], x[5000:]]
    fit = EM().fit(gaussian_mixture(2), blocks(lambda: iter(halves)))
    for ask in (fit.uncertainty, fit.rate_matrix, lambda: implicit(fit), lambda: mcmc(fit)):
        with pytest.raises(ModelError, match="data in blocks is not supported"):
            ask()


def test_refused() -> None:
    x = faithful()
    fit = EM().fit(gaussian_mixture(2), x)
    with pytest.raises(ModelError, match="are no maximum for these arguments"):
        implicit(fit, x + torch.tensor([0.1, 1.0]))
    with pytest.raises(SettingError, match="weights must have the shape of the rows"):
        implicit(fit, weights=torch.ones(3))
    with pytest.raises(SettingError, match="level must be between 0 and 1"):
        fit.uncertainty().intervals(95)


# ---------------------------------------------------------------------------------------
# Elements that run to infinity, latent families, what is fixed, what is missing


def never(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    logits = pyro.param("logits", torch.tensor([[1.0, 0.5, -1.0, 0.5], [-1.0, -1.0, 0.5, -0.5]]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Bernoulli(logits=logits[z]).to_event(1), obs=x)


def never_in_one_class() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = (torch.rand(400, generator=generator) < 0.5).long()
    p = torch.tensor([[0.8, 0.7, 0.2, 0.6], [0.0, 0.2, 0.7, 0.3]])
    return (torch.rand(400, 4, generator=generator) < p[z]).double()


def test_a_logit_that_runs_to_infinity() -> None:
    fit = EM(max_iter=400).fit(never, never_in_one_class())
    assert fit.converged
    assert "logits[1, 0] runs to minus infinity" in fit.message
    found = fit.uncertainty()
    assert "logits[1, 0] runs to minus infinity" in found.message
    missing = found.standard_errors["logits"].isnan()
    assert missing.nonzero().tolist() == [[1, 0]]
    ends = fit.profile("logits[1, 0]", points=3).interval
    assert ends[0] == -math.inf
    # On the boundary of that interval the log-joint, the rest maximised by EM, is 1.92 lower.
    held = torch.zeros(2, 4, dtype=torch.bool)
    held[1, 0] = True
    start = {n: v.clone() for n, v in fit.params.items()}
    start["logits"][1, 0] = ends[1]
    there = EM(fixed={"logits": held}, tol=1e-12).fit(never, never_in_one_class(), init=start)
    assert fit.log_joint - there.log_joint == pytest.approx(1.9207, abs=1e-3)


def student(x: Tensor) -> None:
    df = pyro.param("df", torch.tensor(5.0), constraint=constraints.positive)
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.StudentT(df, loc, scale), obs=x)


def test_light_tails_leave_the_degrees_of_freedom_open() -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(1)).double()
    start = {"df": torch.tensor(150.0), "loc": x.mean(), "scale": x.std()}
    fit = EM(max_iter=50).fit(student, x, init=start)
    assert "df runs to infinity" in fit.message
    found = fit.uncertainty()
    assert bool(found.standard_errors["df"].isnan())
    assert float(found.standard_errors["loc"]) == pytest.approx(float(x.std()) / 200**0.5, rel=0.05)
    profile = fit.profile("df", points=3)
    assert profile.interval[1] == math.inf
    assert "higher" not in profile.message
    assert "again" not in profile.message


def inflated(x: Tensor) -> None:
    gate = pyro.param("gate", torch.tensor(0.3), constraint=constraints.unit_interval)
    rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.ZeroInflatedPoisson(rate, gate=gate), obs=x)


def heavy(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 4.0]))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.StudentT(torch.tensor(4.0).double(), loc[z], scale[z]), obs=x)


@pytest.mark.parametrize("model", [student, inflated, heavy])
def test_the_rate_counts_what_a_family_does_not_know(model: Any) -> None:
    """Against the ratio of successive steps of EM itself."""
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(150, generator=generator, dtype=torch.float64)
    tails = normal / (0.3 + torch.rand(150, generator=generator, dtype=torch.float64))
    counts = torch.poisson(torch.full((150,), 1.5), generator=generator).double()
    data = {"student": tails, "heavy": torch.cat([tails, tails + 6])}
    x = data.get(model.__name__, torch.where(normal > 0.5, 0.0, counts))
    solver = EM(tol=0, param_tol=1e-12, max_iter=2000, keep_path=True)
    fit = solver.fit(model, x, init="model")
    path = [torch.cat([v.reshape(-1) for v in p.values()]) for p in fit.path]
    i = len(path) // 2
    ratio = (path[i + 1] - path[i]).norm() / (path[i] - path[i - 1]).norm()
    assert fit.rate == pytest.approx(float(ratio), abs=2e-3)


def three(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 4.0, 9.0]))
    scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def in_three() -> Tensor:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x + torch.tensor([0.0] * 60 + [4.0] * 80 + [9.0] * 60)


@pytest.mark.parametrize("method", METHODS)
def test_a_held_share_leaves_the_others_as_certain_as_each_other(method: str) -> None:
    held = torch.tensor([True, False, False])
    start = {"weights": torch.tensor([0.3, 0.4, 0.3])}
    fit = EM(fixed={"weights": held}, tol=1e-12).fit(three, in_three(), init=start)
    found = fit.uncertainty(method)
    errors = found.standard_errors["weights"]
    assert found.message == ""
    assert float(errors[0]) == 0
    assert float(errors[1]) == pytest.approx(float(errors[2]), rel=1e-6)
    assert 0.02 < float(errors[1]) < 0.05
    assert 0 < fit.rate < 1


def test_an_outer_product_that_is_singular_is_told() -> None:
    """Six rows' scores do not span eight directions."""
    x = in_three()[[0, 1, 70, 71, 150, 151]]
    params = EM().fit(three, in_three()).params
    fit = EM(max_iter=1).fit(three, x, init=params)
    assert "outer product of the scores is nearly singular" in fit.uncertainty("outer").message


def test_a_collapse_is_said_first() -> None:
    x = torch.cat([in_three(), torch.full((3,), 20.0, dtype=torch.float64)])
    start = {"loc": torch.tensor([0.0, 5.0, 20.0]), "scale": torch.tensor([1.0, 3.0, 0.1])}
    fit = EM().fit(three, x, init=start)
    assert fit.status.value == "degenerate"
    assert fit.uncertainty().message.startswith("The fit did not converge: degenerate (scale[2]")


def test_nothing_is_free() -> None:
    fit = EM(fixed={"weights", "loc", "scale"}).fit(three, in_three(), init="model")
    asked: list[Any] = [partial(fit.uncertainty, m) for m in METHODS]
    asked += [fit.rate_matrix, lambda: fit.rate, lambda: implicit(fit), lambda: mcmc(fit)]
    asked += [lambda: fit.profile("loc[0]")]
    for ask in asked:
        with pytest.raises(ModelError, match="every parameter is fixed"):
            ask()


def test_influence_with_missing_cells_and_weights_of_numpy() -> None:
    def masked(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).double() / 2))
            pyro.sample("x", dist.Normal(loc[z], 1.0).mask(~x.isnan()), obs=x)

    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[20:] += 3
    x[4] = math.nan
    solver = EM(tol=1e-15, param_tol=1e-12)
    fit = solver.fit(masked, x)
    assert torch.allclose(implicit(fit, weights=np.ones(50))["loc"], fit.params["loc"])
    own = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(implicit(fit, own)["loc"][0], own)
    ends = []
    for sign in (1, -1):
        moved = x.clone()
        moved[0] += sign * 1e-3
        ends.append(float(solver.fit(masked, moved, init=fit).params["loc"][0]))
    assert float(found[0]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)
    assert float(found[4]) == 0


def test_levels_and_indices() -> None:
    fit = EM().fit(three, in_three())
    with pytest.raises(SettingError, match="level must be between 0 and 1, got 'a'"):
        fit.uncertainty().intervals("a")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="level must be between 0 and 1, got 'a'"):
        fit.profile("loc[0]", level="a")  # type: ignore[arg-type]
    assert fit.curve("loc[-1]", [1.0]).name == "loc[2]"
    with pytest.raises(SettingError, match="expected one element"):
        fit.curve("loc[-4]")


def test_rare_events_and_priors_are_no_infinity() -> None:
    """What a sample of the rows does not show is no reason to say so."""

    def rare(y: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)

    y = torch.zeros(50_000)
    assert "minus infinity" in EM().fit(rare, y).message
    y[:4] = 1
    fit = EM().fit(rare, y)
    assert fit.converged and not fit.message
    assert float(fit.uncertainty().standard_errors["logit"]) == pytest.approx(0.5, rel=1e-3)

    def vague(y: Tensor) -> None:
        logit = pyro.sample("logit", dist.Normal(0.0, 1e5))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)

    assert "infinity" not in MAP().fit(vague, torch.zeros(50)).message
