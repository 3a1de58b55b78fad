"""On which rung a parameter lands, for arguments that look like selections and are none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, MAP

X = torch.tensor([-2.1, -1.6, -2.4, -1.9, 3.0, 3.4, 2.6, 2.9, 3.3], dtype=torch.float64)
Link = Callable[[Tensor], Tensor]


def located(link: Link, start: tuple[float, float] = (1.0, 3.0)) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
        loc = pyro.param("loc", x.new_tensor(start))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(link(loc[z]), 0.5), obs=x)

    return model


def scaled(link: Link) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
        loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
        scale = pyro.param("scale", x.new_tensor(2.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], link(scale)), obs=x)

    return model


PIECEWISE = [
    (located(lambda m: m.abs() - 2), "loc"),
    (located(lambda m: m.clamp(min=-1.0)), "loc"),
    (located(lambda m: m.relu() - 1), "loc"),
    (located(lambda m: torch.where(m > 0, m, 0.3 * m)), "loc"),
    (located(torch.relu, (-3.0, 3.0)), "loc"),  # one component starts where the gradient is zero
    (scaled(lambda s: s.clamp(min=1.1)), "scale"),
]


@pytest.mark.parametrize(("model", "name"), PIECEWISE)
def test_a_piecewise_argument_is_no_selection(model: Callable[..., None], name: str) -> None:
    fit = EM().fit(model, X)
    assert fit.converged
    assert f"{name} (" in fit.explain() and "a function of it" in fit.explain()
    values = [r.log_joint for r in fit.history]
    assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(values))
    again = MAP().fit(model, X, init=fit)
    assert again.log_joint <= fit.log_joint + 1e-6 * len(X)


SELECTIONS = [
    located(lambda m: m),
    located(lambda m: m + 0.0),
    located(lambda m: m.unsqueeze(0).expand(1, *m.shape).squeeze(0)),
    located(lambda m: torch.stack([m, m]).mean(0)),
    scaled(lambda s: torch.stack([s, s]).max()),
]


@pytest.mark.parametrize("model", SELECTIONS)
def test_what_comes_out_unchanged_is_a_selection(model: Callable[..., None]) -> None:
    assert "numerically" not in EM(max_iter=2).fit(model, X).explain()


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (0.0, 1.0), (0.7, 5.0)])
def test_a_uniform_prior_binds(low: float, high: float) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Uniform(x.new_tensor([-9.0, -9.0]), 2.0).to_event(1))
        scale = pyro.sample("scale", dist.Uniform(low, high))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(loc[z.long()], scale), obs=x)

    fit = EM().fit(model, X)
    assert fit.converged and "clipped to its bounds" in fit.explain()
    assert float(fit.params["loc"].max()) == pytest.approx(2.0)
    assert low <= float(fit.params["scale"]) <= high
    again = MAP().fit(model, X, init=fit)
    assert again.log_joint <= fit.log_joint + 1e-6 * len(X)


def test_constants_of_a_prior_are_cast_with_the_data() -> None:
    shape, rate = torch.tensor(2.0), torch.tensor([0.5, 0.7])

    def model(x: Tensor) -> None:
        rates = pyro.sample("rates", dist.Gamma(shape, rate).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Poisson(rates[z]), obs=x)

    x = torch.tensor([0.0, 1.0, 2.0, 1.0, 9.0, 12.0, 11.0])
    fit = EM().fit(model, x)
    assert fit.converged and fit.params["rates"].dtype == torch.float64
    assert "conjugate Gamma" in fit.explain()
