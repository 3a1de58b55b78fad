"""Programs as people write them: each runs, says the truth, and leaves the user's things alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import pyroem
from pyroem import EM, MAP, DataError, Fit, ModelError, SettingError, Status, families

G = torch.Generator().manual_seed(0)
PAIR = 4.0 * torch.randint(2, (60,), generator=G) + torch.randn(60, generator=G)
COVARIATE = torch.randn(60, generator=G)
RESPONSE = torch.where(
    torch.rand(60, generator=G) < 0.5, 2 * COVARIATE + 1, -COVARIATE - 2
) + 0.3 * torch.randn(60, generator=G)
COUNTS = torch.cat([torch.poisson(torch.full((40,), 3.0), generator=G), torch.zeros(30)])


def pair(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


# ---------------------------------------------------------------------------------------
# Modules


def lines(means: Callable[[Tensor], Tensor], update: bool = False) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor) -> None:
        net = pyro.module("net", means, update_module_params=update)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        mean = net(x[:, None])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(torch.where(z == 0, mean[:, 0], mean[:, 1]), scale), obs=y)

    return model


class Lines(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 2))  # plain torch modules inside
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.net(x[:, None])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            mean = torch.where(z == 0, mean[:, 0], mean[:, 1])
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


def by_hand(weight: Tensor, bias: Tensor, scale: Tensor) -> float:
    mean = COVARIATE.double()[:, None] * weight[:, 0] + bias
    density = dist.Normal(mean, scale).log_prob(RESPONSE.double()[:, None])
    return float((density.logsumexp(-1) - np.log(2)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["module", "updated", "pyro"])
def test_modules(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net: Any = nn.Linear(1, 2, dtype=dtype)
    model: Any = Lines().to(dtype) if kind == "pyro" else lines(net, kind == "updated")
    owner = model.net[0] if kind == "pyro" else net
    before = owner.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = [s.fit(model, COVARIATE, RESPONSE) for s in (EM(), MAP())]
    for fit in fits:
        weight, bias = (
            next(v for n, v in fit.params.items() if n.endswith(e)) for e in ("ht", "s")
        )
        scale = next(v for n, v in fit.params.items() if n.endswith("scale"))
        assert fit.converged
        assert fit.log_likelihood == pytest.approx(by_hand(weight, bias, scale))
        assert sorted(weight[:, 0].tolist()) == pytest.approx([-1, 2], abs=0.2)
    assert isinstance(owner.weight, nn.Parameter) and owner.weight.requires_grad
    assert owner.weight.dtype == dtype and torch.equal(owner.weight, before)


def test_a_module_parameter_is_asked_for_again() -> None:
    net = nn.Linear(1, 2)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        weight, bias = pyro.param("net$$$weight"), pyro.param("net$$$bias")
        mean = x[:, None] * weight[:, 0] + bias
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            mean = torch.where(z == 0, mean[:, 0], mean[:, 1])
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    fit = EM().fit(model, COVARIATE, RESPONSE)
    weight, bias = fit.params["net$$$weight"], fit.params["net$$$bias"]
    assert fit.converged
    assert fit.log_likelihood == pytest.approx(by_hand(weight, bias, torch.tensor(0.3).double()))


# ---------------------------------------------------------------------------------------
# Zero inflation, masks, labels


@pytest.mark.parametrize("solver", [EM(), MAP()], ids=["EM", "MAP"])
@pytest.mark.parametrize(
    "rate",
    [lambda r, z: r * z, lambda r, z: torch.where(z == 1, r, torch.zeros(()))],
    ids=["product", "where"],
)
def test_zero_inflated_counts(solver: Any, rate: Callable[[Tensor, Tensor], Tensor]) -> None:
    def model(n: Tensor) -> None:
        share = pyro.param("share", torch.tensor(0.5), constraint=constraints.unit_interval)
        r = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("rows", len(n)):
            z = pyro.sample("z", dist.Bernoulli(share))
            pyro.sample("n", dist.Poisson(rate(r, z)), obs=n)

    fit = solver.fit(model, COUNTS)
    assert fit.converged
    share, r = fit.params["share"], fit.params["rate"]
    zeros = COUNTS == 0
    counted = share.log() + dist.Poisson(r).log_prob(COUNTS.double())
    by_hand = torch.where(zeros, torch.logaddexp(counted, (1 - share).log()), counted).sum()
    assert fit.log_likelihood == pytest.approx(float(by_hand))
    # The score equation of the zero-truncated Poisson.
    assert float(r / (1 - (-r).exp())) == pytest.approx(float(COUNTS[~zeros].mean()), rel=1e-4)


@pytest.mark.parametrize("code", [-1, 9, -999])
def test_masked_cells_may_hold_any_code(code: int) -> None:
    def model(y: Tensor, mask: Tensor) -> None:
        p = pyro.param("p", torch.tensor([[0.7, 0.3], [0.2, 0.8]]), constraint=constraints.simplex)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.4)).long()
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Categorical(p[z]), obs=y)

    y, mask = (PAIR > 2).long(), COVARIATE > -0.5
    reference = EM().fit(model, y, mask)
    fit = EM().fit(model, torch.where(mask, y, code), mask)
    assert fit.converged and fit.log_joint == pytest.approx(reference.log_joint)
    with pytest.raises(DataError, match=r"'y'.*Categorical"):
        EM().fit(model, torch.where(mask, code, y), mask)
    with pytest.raises(DataError, match="every cell is masked"):
        EM().fit(model, y, torch.zeros(60, dtype=torch.bool))


def test_some_labels_are_known() -> None:
    def model(x: Tensor, labels: Tensor, known: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), obs=labels, obs_mask=known)
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    labels, known = (PAIR > 2).long(), torch.arange(60) < 6
    a, b = (s.fit(model, PAIR, labels, known) for s in (EM(), MAP()))
    assert a.converged and b.converged
    assert a.log_joint == pytest.approx(b.log_joint, abs=1e-5)
    weights, loc = a.params["weights"], a.params["loc"]
    each = weights.log() + dist.Normal(loc, 1.0).log_prob(PAIR.double()[:, None])
    by_hand = torch.where(known, each.gather(1, labels[:, None])[:, 0], each.logsumexp(1)).sum()
    assert a.log_likelihood == pytest.approx(float(by_hand))
    certain = torch.nn.functional.one_hot(labels, 2).double()
    r = torch.where(known[:, None], certain, each.softmax(1))
    torch.testing.assert_close(a.responsibilities(), r)
    assert torch.equal(a.predict(), r.argmax(1))
    torch.testing.assert_close(a.posterior()["z"].probs, r)
    assert a.sample(7)["z"].shape == (7,) and "partly known" in a.explain()
    unknown = r[~known]
    entropy = -float((unknown * unknown.log()).sum())
    assert (a.icl() - a.bic()) / 2 == pytest.approx(entropy)
    nothing_known = EM().fit(model, PAIR, labels, torch.zeros(60, dtype=torch.bool))
    assert nothing_known.predict().shape == (60,)
    assert nothing_known.status is Status.SYMMETRIC


def test_a_parameter_is_partly_known() -> None:
    known, values = torch.tensor([True, False, False]), torch.tensor([-6.0, 0.0, 0.0])

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        prior = dist.Normal(torch.zeros(3), 10.0)
        with pyro.plate("states", 3):
            loc = pyro.sample("loc", prior, obs=values, obs_mask=known)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    x = torch.cat([PAIR.double(), torch.full((7,), -6.1, dtype=torch.float64)])
    a, b = (s.fit(model, x) for s in (EM(), MAP()))
    assert a.converged and a.log_joint == pytest.approx(b.log_joint, abs=1e-5)
    found = a.params["loc_unobserved"][1:]
    assert sorted(found.tolist()) == pytest.approx([0, 4], abs=0.5)
    locs = torch.cat([values[:1].double(), found])
    each = a.params["weights"].log() + dist.Normal(locs, 1.0).log_prob(x[:, None])
    torch.testing.assert_close(a.log_prob(), each.logsumexp(1))


def test_a_penalty_outside_the_plate_belongs_to_no_row() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
        pyro.factor("penalty", -0.1 * (loc**2).sum())
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    fit = EM().fit(model, PAIR)
    assert fit.converged
    with pytest.raises(ModelError, match="not independent"):
        fit.log_prob()


def test_a_plate_of_parameters_and_observations() -> None:
    def model(y: Tensor) -> None:
        rows, items = pyro.plate("rows", 15, dim=-2), pyro.plate("items", 4, dim=-1)
        shift = pyro.sample("shift", dist.Bernoulli(0.5))  # for all rows at once
        with items:
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with rows, items:
            pyro.sample("y", dist.Normal(loc + shift, 1.0), obs=y)

    fit = EM().fit(model, PAIR.reshape(15, 4))
    assert fit.params["loc"].shape == (4,) and fit.status is not Status.NON_FINITE


def test_a_parameter_is_conditioned_on() -> None:
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    given = pyro.condition(model, {"weights": torch.tensor([0.5, 0.5])})
    fit = EM().fit(given, PAIR)
    assert fit.converged and set(fit.params) == {"loc"}
    each = dist.Normal(fit.params["loc"], 1.0).log_prob(PAIR.double()[:, None]) - np.log(2)
    torch.testing.assert_close(fit.log_prob(), each.logsumexp(1))


def test_reading_gathers_no_parameters_row_by_row() -> None:
    """Assignments are drawn thin: a covariance matrix for each row would take all memory."""
    x = torch.randn(1500, 3, generator=torch.Generator().manual_seed(0))
    sizes = []

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([[-1.0] * 3, [1.0] * 3]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            sizes.append(loc[z].numel())
            pyro.sample("x", dist.MultivariateNormal(loc[z], torch.eye(3)), obs=x)

    fit = EM(max_iter=3).fit(model, x)
    assert max(sizes) == 2 * 3
    assert len(fit.sample()["z"].unique()) == 2  # a draw has a state for each row
    assert sizes[-1] == 1500 * 3


def test_probabilities_close_to_one_keep_their_digits() -> None:
    """The kernel's log-probability of a Bernoulli is the program's, however sure it is."""
    logits = torch.tensor([-60.0, -30.0, -20.5, 0.0, 19.5, 20.5, 30.0, 60.0], dtype=torch.float64)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    family = families.family_of(dist.Bernoulli(logits=logits))
    assert family is not None
    one = torch.ones((), dtype=torch.float64)
    found = family.log_density({"logits": logits}, (x,), one)
    (eta,), normaliser = families.natural_parameters(family, {"logits": logits}, (x,))
    exact = dist.Bernoulli(logits=logits).log_prob(x)
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(eta * x - normaliser, exact, rtol=1e-14, atol=1e-14)


def test_a_mask_of_true_changes_nothing() -> None:
    def model(x: Tensor) -> None:
        with poutine.mask(mask=True):
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2) * 2))
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    report = EM().fit(model, PAIR).explain()
    assert "conjugate Dirichlet" in report and "conjugate Normal" in report


def test_elements_that_nothing_uses_stay() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
        scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)[1:]
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fit = EM().fit(model, PAIR)
    assert fit.converged and float(fit.params["scale"][0]) == 1.0


# ---------------------------------------------------------------------------------------
# Where a fit starts, and where it must not end


@pytest.mark.parametrize("solver", [EM(), MAP()], ids=["EM", "MAP"])
def test_values_of_the_program_that_lead_nowhere_are_replaced(solver: Any) -> None:
    """Placeholders far from the data tell the states apart, and yet all rows take one of them."""
    near, far = (solver.fit(pair, PAIR.double() * c + d) for c, d in ((1.0, 0.0), (1e-5, 1.0)))
    assert far.converged
    shift = 60 * np.log(1e-5)
    assert far.log_joint == pytest.approx(near.log_joint - shift, abs=1e-3)
    assert "best of" in far.start and len(far.restarts) > 1


def test_states_that_meet_at_a_saddle() -> None:
    init = {"loc": [-1.0, 1.0], "weights": [0.5, 0.5], "scale": [1.0, 1.0]}
    fit = EM().fit(pair, PAIR * 1e-5 + 1, init=init)
    assert fit.status is Status.SYMMETRIC and "moving them apart" in fit.message


def test_one_assignment_is_told_apart_and_another_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    y = 5.0 * torch.randint(2, (100,), generator=generator)
    x = y + 4.0 * torch.randint(2, (100,), generator=generator)
    x = x + torch.randn(100, generator=generator)
    y = y + torch.randn(100, generator=generator)

    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.param("m", torch.tensor([0.0, 5.0]))
        loc = pyro.param("loc", lambda: torch.randn(2, 2))
        weights = pyro.param("weights", torch.ones(2, 2) / 2, constraint=constraints.simplex)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            u = pyro.sample("u", dist.Categorical(weights[z]))
            pyro.sample("y", dist.Normal(m[z], 1.0), obs=y)
            pyro.sample("x", dist.Normal(loc[z, u], 1.0), obs=x)

    reference = EM().fit(model, x, y, init="kmeans")
    for init in ("auto", {"m": [0.0, 5.0]}):
        fit = EM().fit(model, x, y, init=init)
        assert fit.converged
        assert fit.log_joint >= reference.log_joint - 1e-3


def test_a_gradient_search_leaves_the_bound_it_starts_at() -> None:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        bounded = constraints.interval(0.5, 1.5)
        scale = pyro.param("scale", torch.ones(2) * 0.6, constraint=bounded)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    x = torch.cat([PAIR[PAIR < 2] - 3, 2 * PAIR[PAIR > 2]])
    start = EM(max_iter=1).fit(model, x, init="kmeans").params
    init = {**start, "scale": torch.full((2,), 1.5 - 1e-12)}
    a, b = EM().fit(model, x, init=init), MAP().fit(model, x, init=init)
    assert b.converged and a.log_joint == pytest.approx(b.log_joint, abs=1e-5 * len(x))


@pytest.mark.parametrize("second", [lambda a: 2 * a, lambda a: 0 * a + 3], ids=["sum", "constant"])
def test_columns_that_depend_on_one_another(second: Callable[[Tensor], Tensor]) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(2, 2))
        cov = pyro.param(
            "cov", torch.eye(2).repeat(2, 1, 1), constraint=constraints.positive_definite
        )
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.MultivariateNormal(loc[z], cov[z]), obs=x)

    x = torch.stack([PAIR, second(PAIR)], 1)
    first = EM(max_iter=100).fit(model, x)
    for fit in (first, MAP(max_iter=60).fit(model, x), MAP(max_iter=60).fit(model, x, init=first)):
        assert fit.status is Status.DEGENERATE and "cov[0], cov[1]" in fit.message


@pytest.mark.parametrize("kind", [dist.Laplace, lambda m, s: dist.StudentT(4.0, m, s)])
@pytest.mark.parametrize("solver", [EM(), MAP()], ids=["EM", "MAP"])
def test_families_far_from_the_origin(solver: Any, kind: Any) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(2))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", kind(loc[z], scale[z]), obs=x)

    x = PAIR.double()
    here, far = (solver.fit(model, data) for data in (x, 1e3 * x + 1e6))
    kinked = kind is dist.Laplace and isinstance(solver, MAP)
    assert far.converged or (kinked and far.status is Status.STALLED)
    change = 60 * np.log(1e3)
    best = EM().fit(model, x).log_joint if kinked else here.log_joint
    # A search by the gradient may stop at a kink, and says so; EM takes the weighted median.
    assert far.log_joint == pytest.approx(best - change, abs=0.5 if kinked else 1e-2)
    assert sorted(far.params["loc"].tolist()) == pytest.approx([1e6, 1.004e6], abs=600)


def test_guesses_are_different_starts() -> None:
    fit = EM(max_iter=3).fit(pair, PAIR, init="auto", restarts=4)
    assert len(fit.restarts) >= 4


# ---------------------------------------------------------------------------------------
# Surroundings


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", [EM(), MAP()], ids=["EM", "MAP"])
def test_gradients_switched_off(mode: Any, solver: Any) -> None:
    wanted = solver.fit(pair, PAIR)
    with mode():
        fit = solver.fit(pair, PAIR + 0.0)
        assert fit.log_joint == pytest.approx(wanted.log_joint)
        pyroem.e_step(pair, fit.params, PAIR)


def test_arrays_in_unusual_layouts() -> None:
    wanted = EM().fit(pair, PAIR).log_joint
    for array in (PAIR.numpy()[::-1], PAIR.numpy().astype(">f8"), PAIR.numpy().astype(">f4")):
        assert EM().fit(pair, array).log_joint == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(DataError, match="real"):
        EM().fit(pair, PAIR + 0j)


def test_derivatives_in_the_data_and_over_batches() -> None:
    params = {n: v.double() for n, v in EM().fit(pair, PAIR).params.items()}
    x = PAIR.double()
    got = torch.func.grad(lambda d: pyroem.log_joint(pair, params, d))(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(pyroem.log_joint(pair, params, leaf), leaf)
    torch.testing.assert_close(got, wanted)

    def with_prior(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    locs = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    batch = torch.func.vmap(lambda loc: pyroem.log_joint(with_prior, {"loc": loc}, x))(locs)
    for loc, value in zip(locs, batch, strict=True):
        torch.testing.assert_close(value, pyroem.log_joint(with_prior, {"loc": loc}, x))


# ---------------------------------------------------------------------------------------
# Refusals


def two_plates(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    with pyro.plate("a", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
    with pyro.plate("b", len(x)):
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def subsample(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    with pyro.plate("rows", 100, subsample=torch.arange(60)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def as_event(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    z = pyro.sample("z", dist.Bernoulli(torch.full((60,), 0.5)).to_event(1)).long()
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def noisy(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(loc[z] + torch.randn(60), 1.0), obs=x)


def grouped(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
    with pyro.plate("people", 6, dim=-2):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 10, dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[z] + effect, 1.0), obs=x.reshape(6, 10))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (two_plates, ("'x'", "'z'", "plate 'a'")),
        (subsample, ("'rows'", "60 of 100")),
        (as_event, ("'z'", "Bernoulli", "to_event", "plate")),
        (noisy, ("'x'", "random")),
        (grouped, ("'effect'", "Normal", "'people'", "obs=")),
    ],
)
@pytest.mark.parametrize("solver", [EM(), MAP()], ids=["EM", "MAP"])
def test_refusals(model: Callable[..., None], words: tuple[str, ...], solver: Any) -> None:
    with pytest.raises(ModelError) as caught:
        solver.fit(model, PAIR)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_rows() -> None:
    with pytest.raises(ModelError, match="no rows"):
        EM().fit(pair, torch.zeros(0))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"weights": "abc"}, "weights.*numbers"),
        ({"weights": [None] * 60}, "weights.*numbers"),
        ({"weights": [1.0] * 59 + [-2.0]}, r"-2.0 at index \(59,\)"),
        ({"init": {"loc": "abc"}}, "'loc'"),
        ({"init": "prior"}, "no parameter .* has a prior"),
    ],
)
def test_settings_of_a_fit(setting: dict[str, Any], words: str) -> None:
    with pytest.raises((DataError, SettingError), match=words):
        EM().fit(pair, PAIR, **setting)


def test_settings_of_solvers() -> None:
    with pytest.raises(SettingError, match="fixed"):
        EM(fixed=3)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(SettingError, match=r"torch\.optim\.Adam"):
        MAP(torch.optim.Adam([torch.zeros(1)]))
    with pytest.raises(SettingError, match="optimizer"):
        MAP(3)
    with pytest.raises(SettingError, match="lr="):
        MAP(pyro.optim.Adam({"lr": 0.1}), lr=0.2)
    with pytest.raises(SettingError, match="bogus"):
        MAP("lbfgs", options={"bogus": 1}).fit(pair, PAIR)
    with pytest.raises(SettingError, match="dict of names"):
        pyroem.compare(pair, PAIR, solvers=cast(Any, [EM()]))
    fit = EM(max_iter=2).fit(pair, PAIR)
    with pytest.raises(SettingError, match="Posterior"):
        pyroem.expected_log_joint(pair, fit.params, fit.responsibilities(), PAIR)


def test_a_saved_fit_belongs_to_its_data(tmp_path: Any) -> None:
    fit = EM(max_iter=5).fit(pair, PAIR)
    fit.save(tmp_path / "fit.pt")
    again = Fit.load(tmp_path / "fit.pt", pair, PAIR)
    assert again.log_joint == fit.log_joint
    with pytest.raises(SettingError, match="log-likelihood"):
        Fit.load(tmp_path / "fit.pt", pair, PAIR[:50])
    (tmp_path / "other.pt").write_text("not a fit")
    with pytest.raises(SettingError, match="not a file"):
        Fit.load(tmp_path / "other.pt", pair, PAIR)


def test_em_without_an_assignment_is_the_m_step() -> None:
    x = torch.linspace(-1.0, 3.0, 50, dtype=torch.float64)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    fit = EM().fit(model, x)
    assert fit.converged and fit.n_iter <= 3 and "Assignments: none" in fit.explain()
    assert float(fit.params["loc"]) == pytest.approx(1.0)
    assert float(fit.params["scale"]) == pytest.approx(float(x.std(correction=0)))
