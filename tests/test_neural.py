"""Programs with neural parts: generalised EM for the network, formulas for the rest."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, MAP, SettingError
from pyroem.mstep.maximise import ascend
from pyroem.problem import pose

GENERATOR = torch.Generator().manual_seed(1)
X = torch.linspace(-2.0, 2.0, 160, dtype=torch.float64)
UPPER = torch.rand(160, generator=GENERATOR) < torch.sigmoid(2 * X)
NOISE = 0.1 * torch.randn(160, generator=GENERATOR, dtype=torch.float64)
Y = torch.where(UPPER, torch.sin(2 * X) + 2, -0.5 * X**2) + NOISE


class Experts:
    """Two curves, one network each, with a gate that is linear in the input."""

    def __init__(self, gate: torch.nn.Module | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = ((1, 8), (8, 2))
            first, last = (torch.nn.Linear(*size) for size in sizes)
            self.net = torch.nn.Sequential(first, torch.nn.Tanh(), last)
            self.gate = gate or torch.nn.Linear(1, 2)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        pyro.module("net", self.net)
        pyro.module("gate", self.gate)
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        inputs = x.unsqueeze(-1)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.gate(inputs)))
            loc = self.net(inputs)
            loc = torch.where(z == 0, loc[:, 0], loc[:, 1])
            pyro.sample("y", dist.Normal(loc, scale[z]), obs=y)


OPTIMISERS: dict[str, Any] = {
    "lbfgs": "lbfgs",
    "adam": "adam",
    "class": torch.optim.Adam,
    "factory": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "too fast": partial(torch.optim.SGD, lr=1e4),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optimiser_climbs_and_the_rest_keeps_its_formulas(name: str) -> None:
    solver = EM(optimizer=OPTIMISERS[name], inner_steps=5, max_iter=30)
    fit = solver.fit(Experts(), X, Y, init="model")
    values = [r.log_joint for r in fit.history]
    assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(values))
    assert values[-1] > values[0] + 50
    told = fit.explain()
    assert "net$$$0.weight (8x1): by safeguarded ascent steps" in told
    assert "gate$$$weight (2x1): regression" in told
    assert "scale (2): closed form" in told
    assert all(p.requires_grad for p in Experts().net.parameters())


def test_a_network_as_the_gate() -> None:
    gate = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    fit = EM(max_iter=60).fit(Experts(gate), X, Y, init="model")
    assert "gate$$$0.weight (4x1): by safeguarded ascent steps" in fit.explain()
    by_gradient = MAP(max_iter=300).fit(Experts(gate), X, Y, init=fit)
    assert by_gradient.log_joint >= fit.log_joint - 1e-9 * abs(fit.log_joint)


def test_the_inner_steps_never_end_lower_than_they_began() -> None:
    problem = pose(Experts(), (X, Y), {})
    names = [n for n in problem.free if n.startswith("net$$$0")]
    params = {n: p.value for n, p in problem.structure.parameters.items()}
    own = {n: params[n] for n in names}

    def objective(values: dict[str, Tensor]) -> Tensor:
        return -sum((v**2).sum() for v in values.values()) + torch.zeros(())

    for lr in (1e-3, 1.0, 1e6):
        make = partial(torch.optim.SGD, lr=lr)
        structure, steps = problem.structure, problem.plan.steps
        found = ascend(objective, own, structure.parameters, steps, make, 5, 1.0)
        assert float(objective(found)) >= float(objective(own))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "newton"}, "optimizer must be"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)}, "optimizer must be"),
        ({"inner_steps": 0}, "inner_steps must be a positive integer"),
        ({"inner_steps": True}, "inner_steps must be a positive integer"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        EM(**settings)
