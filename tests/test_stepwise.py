"""Stepwise EM."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_large import X, masked, mixture, simulated, student, with_holes
from torch import Tensor

from pyroem import EM, ModelError, SettingError, Status, StepwiseEM, blocks


@pytest.mark.parametrize("data", [X, blocks(X, rows=3000)], ids=["in memory", "in blocks"])
@pytest.mark.parametrize("init", ["auto", "random"])
def test_two_passes_come_close(data: Any, init: str) -> None:
    best = EM().fit(mixture, X)
    fit = StepwiseEM(batch=500).fit(mixture, data, init=init)
    assert fit.status is Status.MAX_ITER and fit.n_iter == 2
    assert "goes on from here" in fit.explain()
    assert fit.history[-1].passes == 2
    assert best.log_joint - fit.log_joint < 1e-3 * len(X)
    on = EM().fit(mixture, X, init=fit)
    assert on.converged and on.log_joint == pytest.approx(best.log_joint, rel=1e-7)


def test_the_objective_of_the_fit_is_exact() -> None:
    fit = StepwiseEM(batch=200, max_iter=1).fit(mixture, X)
    exact = EM(max_iter=1).fit(mixture, X, init=fit).history[0].log_joint
    assert fit.log_joint == pytest.approx(exact, rel=1e-12)
    assert fit.history[-1].log_joint == pytest.approx(exact, rel=0.02)


def test_a_batch_of_all_rows_is_em() -> None:
    x = simulated(3000)
    init = EM(max_iter=1).fit(mixture, x, init="kmeans")
    em = EM(max_iter=1).fit(mixture, x, init=init)
    fit = StepwiseEM(batch=10**6, max_iter=1).fit(mixture, x, init=init)
    for name in em.params:
        torch.testing.assert_close(fit.params[name], em.params[name], rtol=1e-9, atol=1e-9)


def test_weights_and_masks() -> None:
    x, weights = simulated(3000), torch.arange(3000, dtype=torch.float64) % 4
    best = EM().fit(mixture, x, weights=weights)
    for data in (x, blocks(x, rows=700)):
        fit = StepwiseEM(batch=250, max_iter=3).fit(mixture, data, weights=weights, init=best)
        assert best.log_joint - fit.log_joint < 3e-3 * 3000
    holes = with_holes()
    best = EM().fit(masked, holes)
    fit = StepwiseEM().fit(masked, holes, init=best)
    assert best.log_joint - fit.log_joint < 1e-3 * len(holes)


def test_a_prior_weighs_no_more_on_the_sample_that_starts_the_fit() -> None:
    x = simulated(20_000)[:, 0].abs().round()

    def counts(n: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(500.0, 1000.0).expand([2]).to_event(1))
        with pyro.plate("rows", len(n)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("n", dist.Poisson(rate[z]), obs=n)

    best = EM(tol=1e-10).fit(counts, x)
    for init in (best, "auto"):
        fit = StepwiseEM().fit(counts, x, init=init)
        assert best.log_joint - fit.log_joint < 1e-4 * len(x)
        assert fit.history[0].log_joint == pytest.approx(best.log_joint, rel=0.05)


def test_what_it_refuses() -> None:
    with pytest.raises(ModelError, match="the statistics of site 'x' depend on its parameters"):
        StepwiseEM().fit(student, X[:100, 0])
    for settings, match in (
        ({"batch": 0}, "batch must be a positive integer"),
        ({"power": 0.5}, r"power must lie in \(0.5, 1\]"),
        ({"delay": 0}, "delay must be positive"),
    ):
        with pytest.raises(SettingError, match=match):
            StepwiseEM(**settings)
