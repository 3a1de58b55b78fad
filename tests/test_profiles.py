"""Profiles, curves and surfaces of the objective."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from scipy.optimize import brentq, minimize
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, Curve, Fit, ModelError, Profile, SettingError, Surface, blocks, datasets
from pyroem.models import gaussian_mixture, hidden_markov, poisson_mixture
from pyroem.structure import Held

HALF = 1.920729410347062  # of the 95 % quantile of chi-squared with one degree of freedom
BY_NAME = {p.name: p for p in PROBLEMS}


def one_normal(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def coin(x: Tensor) -> None:
    p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def die(x: Tensor) -> None:
    p = pyro.param("p", torch.ones(3) / 3, constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Categorical(p), obs=x)


def counts(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.nonnegative)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def two_normals(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 4.0]))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


def normals(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample() -> Tensor:
    """Two normals that overlap."""
    x = normals(120)
    x[:45] += 4
    return x


@cache
def mixture() -> Fit:
    return EM(tol=1e-13, max_iter=5000).fit(two_normals, sample(), init={"loc": [0.0, 4.0]})


@cache
def faithful() -> Fit:
    return EM(tol=1e-12).fit(gaussian_mixture(2), datasets.load("faithful")[1])


def ends(depth: Callable[[float], float], estimate: float, low: float, high: float) -> Any:
    """Where ``depth``, the maximum less the profile, meets the threshold."""
    found = [brentq(lambda t: depth(t) - HALF, *sorted((estimate, end))) for end in (low, high)]
    return pytest.approx(found, rel=1e-5)


def check_heights(found: Profile, depth: Callable[[float], float]) -> None:
    wanted = [depth(t) for t in found.values.tolist()]
    np.testing.assert_allclose(found.maximum - found.log_joint, wanted, atol=1e-6)


# ---------------------------------------------------------------------------------------
# Formulas


def test_the_mean_of_a_normal() -> None:
    """``pl(t) = -n/2 log(1 + (t - mean)^2 / s^2)``: as wide as Student's t, not as Wald."""
    x = 3 * normals(12) + 10
    fit = EM().fit(one_normal, x)
    found = fit.profile("loc")
    n, mean, var = len(x), float(x.mean()), float(x.var(unbiased=False))
    check_heights(found, lambda t: n / 2 * math.log1p((t - mean) ** 2 / var))
    half = math.sqrt(var * math.expm1(2 * HALF / n))
    assert found.interval == pytest.approx((mean - half, mean + half), rel=1e-6)
    assert found.message == ""
    for t, params in zip(found.values, found.params, strict=True):
        assert float(params["loc"]) == pytest.approx(float(t), rel=1e-8)
        wanted = var + (t - mean) ** 2
        assert float(params["scale"] ** 2) == pytest.approx(float(wanted), rel=1e-3)


def test_the_scale_and_the_variance_of_a_normal() -> None:
    """The interval does not depend on how the parameter is written."""
    x = 3e-4 * normals(12)  # small units
    fit = EM().fit(one_normal, x)
    found = fit.profile("scale")
    n, s = len(x), float(fit.params["scale"])

    def depth(t: float) -> float:
        return n * (math.log(t / s) + 0.5 * (s / t) ** 2 - 0.5)

    check_heights(found, depth)
    assert found.interval == ends(depth, s, s / 5, 5 * s)
    squared = fit.profile(lambda p: p["scale"] ** 2, name="variance")
    assert squared.name == "variance"
    assert squared.interval == pytest.approx([t**2 for t in found.interval], rel=1e-5)
    assert squared.estimate == pytest.approx(s**2)


@pytest.mark.parametrize("program, which, ones", [(coin, "p", 7), (die, "p[1]", 5)])
def test_a_probability(program: Any, which: str, ones: int) -> None:
    """Of a coin and of one face of a die: those of a binomial."""
    n = 20
    x = torch.zeros(n)
    x[:ones] = 1
    if program is die:
        x[ones : ones + 4] = 2
    found = EM().fit(program, x).profile(which)
    p = ones / n

    def depth(t: float) -> float:
        return ones * math.log(p / t) + (n - ones) * math.log((1 - p) / (1 - t))

    check_heights(found, depth)
    assert found.interval == ends(depth, p, 1e-3, 0.99)
    if program is die:  # the others keep their ratios
        ratio = torch.stack([q["p"][2] / q["p"][0] for q in found.params])
        assert torch.allclose(ratio, torch.full_like(ratio, 4 / 11), rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_estimate_at_its_bound(value: float) -> None:
    """All tosses alike: a one-sided interval."""
    n = 30
    found = EM().fit(coin, torch.full((n,), value)).profile("p")
    away = math.exp(-HALF / n)
    wanted = (away, 1.0) if value else (0.0, 1 - away)
    assert found.interval == pytest.approx(wanted, rel=1e-5)
    assert "p is estimated at its bound" in found.message
    assert float(found.values[-1 if value else 0]) == value
    check_heights(found, lambda t: -n * math.log(t if value else 1 - t))


def test_no_counts_at_all() -> None:
    found = EM().fit(counts, torch.zeros(10)).profile("rate")
    assert found.interval == pytest.approx((0.0, HALF / 10), rel=1e-5)


def test_weights_count_rows() -> None:
    x, weights = 3 * normals(12), torch.ones(12)
    weights[:4] = 2
    one = EM().fit(one_normal, x, weights=weights).profile("loc")
    two = EM().fit(one_normal, torch.cat([x, x[:4]])).profile("loc")
    assert one.interval == pytest.approx(two.interval, rel=1e-6)


def test_a_prior_is_part_of_it() -> None:
    """``x ~ Normal(m, 1), m ~ Normal(0, s)``: the profile of the posterior, a parabola."""

    def program(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.new_tensor(0.0), 0.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = normals(10) + 2
    found = EM().fit(program, x).profile("loc")
    precision = 10 + 1 / 0.25
    mean, half = float(x.sum()) / precision, math.sqrt(2 * HALF / precision)
    assert found.interval == pytest.approx((mean - half, mean + half), rel=1e-6)
    check_heights(found, lambda t: precision / 2 * (t - mean) ** 2)


# ---------------------------------------------------------------------------------------
# Mixtures and chains, against scipy


def by_scipy(x: np.ndarray, fit: Fit, t: float) -> float:
    """The profile of the first mean: the other parameters by the simplex method."""

    def loss(v: np.ndarray) -> float:
        share = norm.logcdf(v[0]), norm.logcdf(-v[0])
        means = (t, v[1])
        parts = [w + norm.logpdf(x, m, math.exp(v[2])) for w, m in zip(share, means, strict=True)]
        return -float(logsumexp(np.stack(parts), axis=0).sum())

    p = {n: v.numpy() for n, v in fit.params.items()}
    start = np.array([norm.ppf(p["weights"][0]), p["loc"][1], math.log(p["scale"])])
    options = {"xatol": 1e-9, "fatol": 1e-11, "maxiter": 5000, "maxfev": 5000}
    return -float(minimize(loss, start, method="Nelder-Mead", options=options).fun)


def test_a_mixture_against_scipy() -> None:
    fit = mixture()
    x = sample().numpy()
    found = fit.profile("loc[0]", points=9)
    assert found.message == ""
    assert found.maximum == fit.log_joint
    for t, height in zip(found.values.tolist(), found.log_joint.tolist(), strict=True):
        assert height == pytest.approx(by_scipy(x, fit, t), abs=2e-6)
    for end in found.interval:
        assert found.maximum - by_scipy(x, fit, end) == pytest.approx(HALF, abs=1e-5)


def test_the_maximisers_are_what_they_are_said_to_be() -> None:
    """On the constraint, with the objective that is told, and no way up along it."""
    fit = mixture()
    x = sample()
    found = fit.profile(lambda p: p["loc"][1] - p["loc"][0], name="gap", points=7)
    assert found.name == "gap"
    assert float(found.values[3]) == found.estimate
    for t, height, params in zip(found.values, found.log_joint, found.params, strict=True):
        assert float(params["loc"][1] - params["loc"][0]) == pytest.approx(float(t), rel=1e-7)
        own = {n: v.clone().requires_grad_() for n, v in params.items()}
        value = pyroem.log_joint(two_normals, own, x)
        assert float(value.detach()) == pytest.approx(float(height), abs=1e-9)
        slopes = dict(zip(own, torch.autograd.grad(value, list(own.values())), strict=True))
        # Along the constraint: both means together, the scale, the share.
        assert abs(float(slopes["loc"].sum())) < 0.05
        assert abs(float(slopes["scale"])) < 0.05
        assert abs(float(slopes["weights"][0] - slopes["weights"][1])) < 0.05


def test_intervals_of_small_levels_are_walds() -> None:
    fit = faithful()
    errors = fit.uncertainty().to_dict()["elements"]
    z = norm.ppf(0.505)
    for which in ("loc[0, 1]", "weights[0]", "covariance[0, 0, 1]", "covariance[1, 1, 1]"):
        found = fit.profile(which, level=0.01, points=5)
        se = errors[which]["standard_error"]
        wald = (found.estimate - z * se, found.estimate + z * se)
        assert found.interval == pytest.approx(wald, abs=0.01 * z * se), which
        assert found.message == ""


def test_a_contrast_is_no_more_certain_than_its_parts() -> None:
    """Components far apart: variances of the two means add."""
    fit = faithful()
    widths = []
    for which in ("loc[0, 0]", "loc[1, 0]"):
        low, high = fit.profile(which, level=0.5, points=3).interval
        widths.append(high - low)
    low, high = fit.profile(lambda p: p["loc"][0, 0] - p["loc"][1, 0], 0.5, 3).interval
    assert high - low == pytest.approx(math.hypot(*widths), rel=0.05)


def test_poisson_mixtures_and_chains_go_on_from_the_fit() -> None:
    """The profile's ends are the optimum of fits in which the element is held there."""
    n = torch.cat([torch.arange(1.0, 8.0), torch.arange(18.0, 30.0)]).double().unsqueeze(-1)
    for program, x in (
        (poisson_mixture(2), n),
        (hidden_markov(2, "poisson"), datasets.load("earthquakes")[1][:60]),
    ):
        fit = EM(tol=1e-13, max_iter=5000).fit(program, x)
        found, name, index = fit.profile("rate[0, 0]", points=3), "rate", (0, 0)
        mask = torch.zeros(fit.params["rate"].shape, dtype=torch.bool)
        mask[index] = True
        for end in found.interval:
            start = {k: v.clone() for k, v in fit.params.items()}
            start[name][index] = end
            held = Held(name, mask, start[name])
            again = EM(tol=1e-13, max_iter=5000, fixed=(held,)).fit(program, x, init=start)
            assert fit.log_joint - again.log_joint == pytest.approx(HALF, abs=1e-4)


def test_both_kinds_of_parameters_that_the_data_do_not_determine() -> None:
    """Logits up to a constant: one of them is anything, their difference is known."""

    def program(x: Tensor) -> None:
        own = pyro.param("logits", torch.tensor([0.3, -0.2]))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(logits=own), obs=x)

    x = torch.zeros(20)
    x[:7] = 1
    fit = EM().fit(program, x)
    found = fit.profile("logits[0]")
    assert found.interval == (-math.inf, math.inf)
    assert "does not fall below the threshold" in found.message
    assert torch.allclose(found.log_joint, torch.full_like(found.log_joint, found.maximum))
    low, high = fit.profile(lambda p: p["logits"][1] - p["logits"][0]).interval

    def depth(t: float) -> float:
        p = 1 / (1 + math.exp(-t))
        return 7 * math.log(0.35 / p) + 13 * math.log(0.65 / (1 - p))

    assert (low, high) == ends(depth, math.log(7 / 13), -5, 3)


def test_a_bound_before_the_threshold() -> None:
    """The share of a component that the data hardly need: from nothing on."""

    def program(x: Tensor) -> None:
        share = pyro.param("share", torch.tensor(0.4), constraint=constraints.unit_interval)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(share))
            pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)

    x = normals(30, 1) + 0.2
    found = EM(tol=1e-13, max_iter=9000).fit(program, x).profile("share")
    assert found.estimate > 0.01
    low, high = found.interval
    assert low == 0.0
    assert "The bound 0 of share comes before the threshold" in found.message
    y = x.numpy()

    def height(t: float) -> float:
        return float(np.log(t * norm.pdf(y, 1) + (1 - t) * norm.pdf(y)).sum())

    assert height(found.estimate) - height(0.0) < HALF
    assert height(found.estimate) - height(high) == pytest.approx(HALF, abs=1e-5)
    check_heights(found, lambda t: height(found.estimate) - height(t))


def test_a_profile_that_rises_again() -> None:
    """At a high level the mean of one component takes the place of the other's."""
    x = normals(80)
    x[:30] += 3
    fit = EM(tol=1e-13, max_iter=5000).fit(two_normals, x, init={"loc": [0.0, 3.0]})
    found = fit.profile("loc[0]", level=0.99)
    assert "The profile rises again beyond loc[0]" in found.message
    assert found.interval[0] == -math.inf
    assert "does not fall below the threshold" in found.message
    assert not bool((found.log_joint > found.maximum + 1e-6).any())


def test_the_higher_of_two_maxima_is_told() -> None:
    """A second maximum that is met on the way out is followed back to where it is the lower."""
    fit = EM(tol=1e-13).fit(hidden_markov(2, "poisson"), datasets.load("earthquakes")[1])
    found = fit.profile("rate[0, 0]")
    fallen = (found.maximum - found.log_joint)[found.values <= found.estimate]
    assert bool((fallen.diff() < 1e-3).all())
    assert "rises again" in found.message  # between the values


# ---------------------------------------------------------------------------------------
# What is wrong is said


def test_a_fit_that_is_no_maximum() -> None:
    x = sample()
    fit = EM(max_iter=2).fit(two_normals, x, init={"loc": [0.5, 2.5]})
    found = fit.profile("loc[0]", points=5)
    assert "The fit did not converge: max iter" in found.message
    assert "The fit is not the maximum: at loc[0] = " in found.message
    assert float(found.log_joint.max()) > found.maximum
    assert str(found).startswith(f"loc[0]: {found.estimate:.6g}, 95% profile interval (")
    assert found.message in str(found)


def test_settings_are_refused() -> None:
    fit = mixture()
    for which, level, points, message in (
        ("lok[0]", 0.95, 21, "no parameter 'lok'.*Did you mean 'loc'"),
        ("loc[2]", 0.95, 21, r"has shape \(2,\): expected one element, such as 'loc\[1\]'"),
        ("loc", 0.95, 21, r"has shape \(2,\)"),
        (3, 0.95, 21, "expected the name of an element"),
        (lambda p: p["loc"], 0.95, 21, r"one number, got \(2,\)"),
        (lambda p: 1.0, 0.95, 21, "one number, got float"),
        (lambda p: torch.tensor(1.0), 0.95, 21, "does not depend on the free parameters"),
        (lambda p: p["loc"][0] / 0, 0.95, 21, "expected a finite number at the fit"),
        ("loc[0]", 95, 21, "level must be between 0 and 1, got 95"),
        ("loc[0]", 0.95, 2, "points must be a whole number of at least 3"),
    ):
        with pytest.raises(SettingError, match=message):
            fit.profile(which, level, points)  # type: ignore[arg-type]


def test_what_is_fixed_has_no_profile() -> None:
    mask = torch.tensor([True, False])
    fit = EM(fixed=("scale", Held("loc", mask))).fit(two_normals, sample())
    for which in ("scale", "loc[0]"):
        with pytest.raises(SettingError, match=f"'{which}' is fixed".replace("[", r"\[")):
            fit.profile(which)
    assert fit.profile("loc[1]", points=3).message == ""
    with pytest.raises(SettingError, match="does not depend on the free parameters"):
        fit.profile(lambda p: p["loc"][0] * p["scale"])
    assert bool(fit.curve("scale", [0.9, 1.1]).log_joint.isfinite().all())


def test_data_in_blocks_and_single_precision_are_refused() -> None:
    x = datasets.load("faithful")[1].repeat(40, 1)
    halves = [x[:5000], x[5000:]]
    fit = EM().fit(gaussian_mixture(2), blocks(lambda: iter(halves)))
    asked: list[Callable[[], object]] = [
        lambda: fit.profile("loc[0, 0]"),
        lambda: fit.curve("loc[0, 0]"),
        lambda: fit.surface("loc[0, 0]", "loc[1, 0]"),
    ]
    for ask in asked:
        with pytest.raises(ModelError, match="data in blocks is not supported"):
            ask()
    single = EM(dtype=torch.float32).fit(two_normals, sample())
    with pytest.raises(SettingError, match="must be in double precision"):
        single.profile("loc[0]")


def test_an_element_at_a_bound_is_held_and_named() -> None:
    x = torch.zeros(20)
    x[:7] = 1  # face 2 never came
    found = EM().fit(die, x).profile("p[0]", points=5)
    assert found.message == "p[2] at a bound, and held there."
    assert all(float(p["p"][2]) < 1e-6 for p in found.params)


def test_plain_numbers() -> None:
    found = mixture().profile("loc[0]", points=3)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["name"] == "loc[0]"
    assert again["interval"] == list(found.interval)
    assert again["params"][1]["loc"] == found.params[1]["loc"].tolist()
    for other in (mixture().curve("scale", [1.0, -1.0]), mixture().surface("scale", "loc[0]")):
        again = json.loads(json.dumps(other.to_dict()))
        assert again["maximum"] == pytest.approx(mixture().log_joint)
        assert str(other).startswith("log_joint at")


# ---------------------------------------------------------------------------------------
# Curves and surfaces


def test_a_curve_is_the_objective() -> None:
    fit = mixture()
    x = sample()
    for which, values in (
        ("loc[1]", [2.0, 3.5]),
        ("scale", [0.5, 1.5]),
        ("weights[0]", [0.1, 0.7]),
    ):
        found = fit.curve(which, values)
        assert isinstance(found, Curve)
        assert found.maximum == pytest.approx(fit.log_joint, abs=1e-9)
        for t, height in zip(values, found.log_joint.tolist(), strict=True):
            own = {n: v.clone() for n, v in fit.params.items()}
            if which == "weights[0]":
                own["weights"] = torch.tensor([t, 1 - t], dtype=torch.float64)
            elif which == "scale":
                own["scale"] = torch.tensor(t, dtype=torch.float64)
            else:
                own["loc"][1] = t
            wanted = float(pyroem.log_joint(two_normals, own, x))
            assert height == pytest.approx(wanted, abs=1e-8)


def test_a_curve_lies_below_the_profile() -> None:
    fit = mixture()
    found = fit.profile("loc[0]", points=7)
    cut = fit.curve("loc[0]", found.values)
    assert bool((cut.log_joint <= found.log_joint + 1e-7).all())
    assert bool((cut.log_joint[[0, -1]] < found.log_joint[[0, -1]] - 0.01).all())


def test_the_range_of_a_curve() -> None:
    """Four standard errors on either side; within the support; at the truth too."""
    fit = mixture()
    se = fit.uncertainty().standard_errors
    along = fit.curve("loc[0]").values
    assert len(along) == 101
    assert float(along[-1] - along[0]) == pytest.approx(8 * float(se["loc"][0]))
    few = EM().fit(coin, torch.tensor([1.0, 0.0, 0.0])).curve("p", points=5)
    assert float(few.values[0]) > 0
    assert float(few.values[-1]) < 1
    assert bool(few.log_joint.isfinite().all())


def test_a_curve_at_parameters_of_ones_own() -> None:
    x = sample()
    truth = {"weights": [0.625, 0.375], "loc": [0.0, 3.0], "scale": 1.0}
    found = pyroem.likelihood_curve(two_normals, truth, x, which="loc[1]", values=[2.0, 3.0])
    assert found.estimate == 3.0
    assert found.maximum == pytest.approx(float(found.log_joint[1]))
    wanted = pyroem.log_joint(two_normals, {**truth, "loc": [0.0, 2.0]}, x)
    assert float(found.log_joint[0]) == pytest.approx(float(wanted), abs=1e-9)
    twice = pyroem.likelihood_curve(
        two_normals, truth, x, which="scale", points=7, weights=torch.full((len(x),), 2.0)
    )
    assert twice.maximum == pytest.approx(2 * found.maximum)
    assert len(twice.values) == 7


def test_a_simplex_keeps_the_ratios_of_the_others() -> None:
    x = torch.tensor([0.0] * 5 + [1.0] * 3 + [2.0] * 2)
    fit = EM().fit(die, x)
    found = fit.curve("p[0]", [0.0, 0.2, 1.0, 1.2])
    wanted = 5 * math.log(0.2) + 3 * math.log(0.8 * 0.6) + 2 * math.log(0.8 * 0.4)
    assert float(found.log_joint[1]) == pytest.approx(wanted)
    assert math.isnan(float(found.log_joint[3]))
    assert "1 of 4 values leave the constraint" in found.message
    none = EM().fit(counts, torch.ones(3)).curve("rate", [0.0, 1.0])
    assert float(none.log_joint[0]) == -math.inf
    assert none.message == "The data are impossible at 1 of 2 values: -inf."
    both = fit.surface("p[0]", "p[1]", [[0.2, 0.9], [0.3]])
    wanted = 5 * math.log(0.2) + 3 * math.log(0.3) + 2 * math.log(0.5)
    assert float(both.log_joint[0, 0]) == pytest.approx(wanted)
    assert math.isnan(float(both.log_joint[1, 0]))


def test_matrices_stay_symmetric_and_positive() -> None:
    fit = faithful()
    x = datasets.load("faithful")[1]
    limit = float((fit.params["covariance"][0, 0, 0] * fit.params["covariance"][0, 1, 1]).sqrt())
    found = fit.curve("covariance[0, 1, 0]", [0.5, 2 * limit])
    own = {n: v.clone() for n, v in fit.params.items()}
    own["covariance"][0, 0, 1] = own["covariance"][0, 1, 0] = 0.5
    wanted = float(pyroem.log_joint(gaussian_mixture(2), own, x))
    assert float(found.log_joint[0]) == pytest.approx(wanted, abs=1e-7)
    assert math.isnan(float(found.log_joint[1]))
    assert "leave the constraint" in found.message


def test_ordered_means_stay_in_order() -> None:
    problem = BY_NAME["ordered_means"]
    fit = EM(max_iter=20).fit(problem.model, *problem.data)
    first, second = fit.params["loc"][:2].tolist()
    found = fit.curve("loc[0]", [first, second + 1])
    assert float(found.log_joint[0]) == pytest.approx(fit.log_joint)
    assert math.isnan(float(found.log_joint[1]))


def test_a_surface_and_a_path_on_it() -> None:
    fit = mixture()
    found = fit.surface("loc[0]", "loc[1]", points=5)
    assert isinstance(found, Surface)
    assert found.log_joint.shape == (5, 5)
    assert float(found.log_joint.max()) == float(found.log_joint[2, 2])
    assert float(found.log_joint[2, 2]) == pytest.approx(fit.log_joint, abs=1e-9)
    own = {n: v.clone() for n, v in fit.params.items()}
    own["loc"][0], own["loc"][1] = found.values[0][1], found.values[1][4]
    wanted = float(pyroem.log_joint(two_normals, own, sample()))
    assert float(found.log_joint[1, 4]) == pytest.approx(wanted, abs=1e-8)
    assert found.project(own) == (float(own["loc"][0]), float(own["loc"][1]))
    assert found.project(fit.params) == found.estimate
    with pytest.raises(SettingError, match="params lacks a value for 'loc'"):
        found.project({})


def test_curves_and_surfaces_refuse() -> None:
    fit = mixture()
    with pytest.raises(SettingError, match="expected a list of finite numbers"):
        fit.curve("scale", [1.0, math.nan])
    with pytest.raises(SettingError, match="values: expected a list of numbers"):
        fit.curve("scale", "wide")
    with pytest.raises(SettingError, match="points: expected a whole number of at least 2"):
        fit.curve("scale", points=1)
    with pytest.raises(SettingError, match=r"'loc\[0\]' twice"):
        fit.surface("loc[0]", "loc[0]")
    with pytest.raises(SettingError, match="sum to one"):
        fit.surface("weights[0]", "weights[1]")
    with pytest.raises(SettingError, match="expected those of two elements, got 1"):
        fit.surface("loc[0]", "loc[1]", [[1.0]])
    with pytest.raises(SettingError, match="no parameter 'lok'"):
        fit.curve("lok[0]")


def classes(y: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    p = pyro.param("p", SHARES * 0.8 + 0.2 / 3, constraint=constraints.simplex)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Categorical(p[z]).to_event(1), obs=y)


SHARES = torch.tensor(
    [[[0.5, 0.495, 0.005], [0.6, 0.4, 0.0]], [[0.1, 0.2, 0.7], [0.1, 0.3, 0.6]]]
).double()
SHARES = torch.cat([SHARES, SHARES * 0.5 + 0.5 * SHARES.flip(-1)], 1)


def test_a_bound_that_is_hardly_missed() -> None:
    """The share is 1e-6: next to the bound the log-joint is as high, wherever the search ends."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.rand(300, generator=generator) < 0.5).long()
    y = [torch.multinomial(SHARES[z, j], 1, generator=generator)[:, 0] for j in range(4)]
    solver = EM(tol=1e-10, accelerate="anderson")
    fit = solver.fit(classes, torch.stack(y, 1), init="model")
    found = fit.profile("p[0, 0, 2]", points=3)
    assert found.interval[0] == 0
    assert 0.05 < found.interval[1] < 1
    assert "failed" not in found.message
