"""SVI with guides, NUTS, and comparisons over many seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor
from torch.distributions import constraints

from pyroem import (
    EM,
    MAP,
    SVI,
    ModelError,
    SettingError,
    Status,
    compare,
    datasets,
    mcmc,
)
from pyroem.models import bayesian_gaussian_mixture, gaussian_mixture, weak_prior

BY_NAME = {p.name: p for p in PROBLEMS}
SPREAD, NOISE = 3.0, 2.0
X = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * NOISE + 1


def one_mean(x: Tensor) -> None:
    """A normal mean with a normal prior: the posterior and the evidence have formulas."""
    loc = pyro.sample("loc", dist.Normal(0.0, SPREAD))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, NOISE), obs=x)


def posterior() -> tuple[float, float, float]:
    """Mean and standard deviation of the posterior, and the log-evidence."""
    n = len(X)
    precision = n / NOISE**2 + 1 / SPREAD**2
    mean = float(X.sum()) / NOISE**2 / precision
    covariance = NOISE**2 * torch.eye(n, dtype=torch.float64) + SPREAD**2
    evidence = dist.MultivariateNormal(torch.zeros(n).double(), covariance).log_prob(X)
    return mean, precision**-0.5, float(evidence)


def faithful() -> tuple[Any, Tensor]:
    x = datasets.load("faithful")[1]
    return bayesian_gaussian_mixture(2, weak_prior(x), "diagonal"), x


# ---------------------------------------------------------------------------------------
# Guides


@pytest.mark.parametrize("guide", ["normal", "multivariate", "laplace", AutoDiagonalNormal])
def test_a_normal_posterior(guide: Any) -> None:
    """The guide holds the posterior, so the bound is the evidence."""
    mean, std, evidence = posterior()
    fit = SVI(guide=guide, max_iter=1500).fit(one_mean, X)
    found = fit.approximation
    assert found is not None
    assert found.elbo == pytest.approx(evidence, abs=0.05)
    assert found.elbo <= evidence + 4 * found.elbo_error + 1e-3
    draws = found.draw(2000)["loc"]
    assert float(draws.mean()) == pytest.approx(mean, abs=0.1 * std)
    assert float(draws.std()) == pytest.approx(std, rel=0.1)
    assert float(fit.params["loc"]) == pytest.approx(mean, abs=0.15 * std)
    assert found.draw(3, seed=1)["loc"].tolist() == found.draw(3, seed=1)["loc"].tolist()


def test_a_point_mass_is_map() -> None:
    model, x = faithful()
    start = EM(max_iter=3).fit(model, x)
    wanted = MAP().fit(model, x, init=start)
    for solver in (SVI(), SVI(guide="delta")):
        fit = solver.fit(model, x, init=start)
        assert fit.log_joint == pytest.approx(wanted.log_joint, abs=1e-2)
    assert fit.approximation is not None
    assert math.isnan(fit.approximation.elbo)  # a point mass has no entropy
    assert "bounds nothing" in fit.approximation.note
    assert len(fit.approximation.draw(2)["loc"]) == 2
    table = compare(model, x, solvers={"delta": SVI(guide="delta", max_iter=5)})
    assert table.rows[0].elbo is None


def test_a_mixture_and_its_standard_errors() -> None:
    model, x = faithful()
    em = EM().fit(model, x)
    errors = em.uncertainty().standard_errors
    fit = SVI(guide="laplace", max_iter=800).fit(model, x, init=em)
    assert fit.approximation is not None
    draws = fit.approximation.draw(800)
    for name in ("loc", "variance"):
        assert torch.allclose(draws[name].std(0), errors[name], rtol=0.2)
    assert fit.log_joint <= em.log_joint
    assert fit.log_joint > em.log_joint - 0.5
    assert fit.approximation.elbo < em.log_joint


def test_a_chain_and_priors_of_all_kinds() -> None:
    """Programs of the laws' table run under Pyro's own inference as they stand."""
    for name in (
        "gaussian_gamma_precision",
        "hierarchical_means",
        "chain_sequences",
        "poisson_mixture",
    ):
        problem = BY_NAME[name]
        fit = SVI(guide="normal", max_iter=5).fit(problem.model, *problem.data, init=problem.params)
        assert fit.status is Status.MAX_ITER
        assert math.isfinite(fit.log_joint)
        random = [n for n, p in fit.problem.structure.parameters.items() if p.has_prior]
        assert fit.approximation is not None
        assert math.isfinite(fit.approximation.elbo)
        assert sorted(fit.approximation.draw(2)) == sorted(random)


def test_a_guide_of_ones_own() -> None:
    mean, std, evidence = posterior()

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.0))
        b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("loc", dist.Normal(a, b))

    before = dict(pyro.get_param_store().items())
    fit = SVI(guide=guide, max_iter=1500).fit(one_mean, X)
    assert dict(pyro.get_param_store().items()) == before
    assert fit.solver == "SVI (guide)"
    assert fit.approximation is not None
    assert fit.approximation.elbo == pytest.approx(evidence, abs=0.05)
    assert float(fit.params["loc"]) == pytest.approx(mean, abs=0.3 * std)

    def nothing(x: Tensor) -> None:
        pass

    with pytest.raises(SettingError, match="the guide does not sample 'loc'"):
        SVI(guide=nothing, max_iter=2).fit(one_mean, X)


def test_parameters_without_a_prior_are_points() -> None:
    x = datasets.load("faithful")[1]
    start = EM(max_iter=5).fit(gaussian_mixture(2), x)
    fit = SVI(guide="normal", max_iter=600).fit(gaussian_mixture(2), x, init=start)
    assert fit.log_joint == pytest.approx(-1130.26396, abs=0.05)
    assert fit.approximation is not None
    assert fit.approximation.elbo == pytest.approx(fit.log_joint, abs=1e-6)


def test_what_a_guide_does_not_take(tmp_path: Path) -> None:
    guided = SVI(guide="normal", max_iter=2)
    with pytest.raises(ModelError, match="does not take row weights"):
        guided.fit(one_mean, X, weights=torch.ones(40))
    with pytest.raises(ModelError, match="does not take fixed parameters"):
        SVI(guide="normal", fixed=("loc",)).fit(one_mean, X, init={"loc": 0.0})
    with pytest.raises(SettingError, match="guide must be one of delta, normal"):
        SVI(guide="flow")
    with pytest.raises(SettingError, match="particles must be a positive integer"):
        SVI(guide="normal", particles=0)
    with pytest.raises(SettingError, match=r"one of pyro\.optim"):
        SVI("adam", guide="normal").fit(one_mean, X)
    with pytest.raises(SettingError, match="cannot be stored"):
        guided.fit(one_mean, X, checkpoint=str(tmp_path / "a.pt"))


# ---------------------------------------------------------------------------------------
# NUTS


def test_nuts_on_a_normal_posterior() -> None:
    mean, std, _ = posterior()
    draws = mcmc(EM().fit(one_mean, X), draws=300, warmup=100, chains=2)
    found = draws.summary()["loc"]
    error = std / math.sqrt(float(found["n_eff"]))
    assert draws.params["loc"].shape == (2, 300)
    assert float(found["mean"]) == pytest.approx(mean, abs=5 * error)
    assert float(found["std"]) == pytest.approx(std, rel=0.15)
    assert float(found["r_hat"]) < 1.05
    assert draws.divergences == 0
    with pytest.raises(SettingError, match="draws must be a positive integer"):
        mcmc(EM().fit(one_mean, X), draws=0)


def test_nuts_on_a_mixture() -> None:
    """Weights on the simplex, assignments summed out: the posterior is about the maximum."""
    model, x = faithful()
    fit = EM().fit(model, x[::4])
    errors = fit.uncertainty().standard_errors
    draws = mcmc(fit, draws=40, warmup=40)
    weights = draws.params["weights"]
    assert torch.allclose(weights.sum(-1), torch.ones((), dtype=torch.float64))
    for name in ("loc", "weights"):
        away = (draws.params[name].mean((0, 1)) - fit.params[name]) / errors[name]
        assert float(away.abs().max()) < 1.5


# ---------------------------------------------------------------------------------------
# Comparisons over seeds


def test_a_study() -> None:
    x = datasets.load("faithful")[1]
    solvers = {"EM": EM(), "MAP": MAP()}
    study = compare(gaussian_mixture(3), x, solvers=solvers, seeds=4, seed=1, init="random")
    assert list(study.comparisons) == [1, 2, 3, 4]
    every = [row for c in study.comparisons.values() for row in c.rows]
    assert study.best == max(row.log_joint for row in every if row.converged)
    for row in study.rows:
        own = sorted(study.best - r.log_joint for r in every if r.name == row.name)
        assert row.runs == 4
        assert row.best == sum(gap <= study.near for gap in own) / 4
        assert row.gap[1] == pytest.approx((own[1] + own[2]) / 2)
        assert row.gap[0] <= row.gap[1] <= row.gap[2]
    alone = compare(gaussian_mixture(3), x, solvers=solvers, seed=2, init="random")
    assert [r.log_joint for r in alone.rows] == [r.log_joint for r in study.comparisons[2].rows]
    assert json.loads(study.to_json())["rows"][0]["name"] == "EM"
    assert json.loads(alone.to_json())["best"] == alone.best
    frame = study.to_pandas()
    assert len(frame) == 8
    assert (frame["gap_to_best"] >= 0).all()
    assert "4 starts; median [quartiles]" in str(study)
    assert "<table>" in study._repr_html_()
    with pytest.raises(SettingError, match="seeds: expected a positive integer"):
        compare(gaussian_mixture(3), x, seeds=0)


def test_the_bound_has_a_column_of_its_own() -> None:
    model, x = faithful()
    solvers = {"EM": EM(), "normal": SVI(guide="normal", max_iter=30)}
    table = compare(model, x, solvers=solvers)
    assert table.rows[0].elbo is None
    assert table.rows[1].elbo == table.fits["normal"].approximation.elbo
    assert str(table).splitlines()[0].endswith("elbo")
    assert "elbo" not in str(compare(model, x, solvers={"EM": EM()}))


def test_no_curvature_no_laplace() -> None:
    """Far from the mode there is no normal distribution to give; the fit is there none the less."""

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Cauchy(0.0, 1.0))
        with pyro.plate("rows", 1):
            pyro.sample("x", dist.Cauchy(loc, 1.0), obs=x)

    start = {"loc": torch.tensor(3.0)}
    fit = SVI(guide="laplace", max_iter=1).fit(model, torch.tensor([200.0]).double(), init=start)
    assert fit.status is Status.MAX_ITER
    assert fit.approximation is not None
    assert math.isnan(fit.approximation.elbo)
    with pytest.raises(ModelError, match="no Laplace approximation; raise max_iter"):
        fit.approximation.draw(3)


def test_draws_as_a_table_with_what_is_fixed() -> None:
    model, x = faithful()
    start = EM().fit(model, x[::8])
    fit = EM(fixed=("loc", "weights")).fit(model, x[::8], init=start)
    draws = mcmc(fit, draws=10, warmup=10)
    assert draws.params["loc"].shape == (1, 10, *fit.params["loc"].shape)
    assert bool((draws.params["loc"] == fit.params["loc"]).all())
    assert bool(draws.summary()["loc"]["r_hat"].isnan().all())
    lines = str(draws).splitlines()
    assert lines[1].split() == ["mean", "std", "5%", "95%", "n_eff", "r_hat"]
    assert any(line.startswith("loc[0, 1]") or line.startswith("loc[1]") for line in lines)


def test_slow_progress_under_noise_is_no_end() -> None:
    """The exact posterior is in the guide; clipped steps of one draw hardly move towards it."""
    x = torch.poisson(torch.full((40,), 3.0), generator=torch.Generator().manual_seed(0)).double()

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(5.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(a, b))

    assert SVI(guide=guide, max_iter=1000).fit(model, x).status is Status.MAX_ITER


def test_near_is_a_distance() -> None:
    model, x = faithful()
    with pytest.raises(SettingError, match="near: expected a number of nats >= 0"):
        compare(model, x, near=-1.0)
