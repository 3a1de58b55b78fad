"""Mixtures of regressions against references of their own: SciPy's optimisers and EM in NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from scipy import optimize, special, stats
from sklearn.linear_model import GammaRegressor, Lasso, LinearRegression, PoissonRegressor
from torch import Tensor, nn
from torch.distributions import constraints

from pyroem import EM, Fit, Status

Array = NDArray[Any]
REAL, POSITIVE, SIMPLEX = constraints.real, constraints.positive, constraints.simplex
LOWER, DEFINITE = constraints.lower_cholesky, constraints.positive_definite
TIGHT = EM(tol=1e-13, param_tol=1e-9, max_iter=5000)

RNG = np.random.default_rng(0)
N = 200
X = np.column_stack([np.ones(N), RNG.normal(size=(N, 2))])
ETA = X @ [0.4, 0.8, -0.5]
WEIGHTS = RNG.uniform(0.2, 2.0, N)
EXPOSURE = RNG.uniform(0.5, 4.0, N)
TRIALS = RNG.integers(1, 15, N) + 0.0
CHOICE_LOGITS = X @ [[0.0, 0.5, -0.5], [0.0, 1.0, 0.2], [0.0, -0.3, 0.6]]
CHOICES = np.array([RNG.choice(3, p=p) for p in special.softmax(CHOICE_LOGITS, 1)])


def linear(b: Tensor, x: Tensor) -> Tensor:
    return (b * x).sum(-1)


def linears(b: Tensor, x: Tensor) -> Tensor:
    """Several linear functions of each row."""
    return (b * x.unsqueeze(-2)).sum(-1)


def beside_zero(t: Tensor) -> Tensor:
    """Logits of which the first one is the reference."""
    return torch.cat([torch.zeros_like(t[..., :1]), t], -1)


def chosen(logits: Array) -> Array:
    return special.log_softmax(logits, 1)[np.arange(N), CHOICES]


def best_of(f: Callable[[Array], float], start: Array, tol: float = 1e-10) -> Any:
    return optimize.minimize(f, start, jac="3-point", method="BFGS", tol=tol)


def line(fit: Fit, name: str) -> str:
    """What ``explain()`` says of a parameter."""
    return next(row for row in fit.explain().splitlines() if row.startswith(f"  {name} ("))


# ---------------------------------------------------------------------------------------
# One component


class Case(NamedTuple):
    """The distribution of covariates and parameters; their shapes and constraints; the data; the
    log-density of SciPy at parameters; a word in what ``explain()`` says of the coefficients.
    """

    make: Callable[..., Any]
    parameters: Mapping[str, tuple[tuple[int, ...], Any]]
    covariates: tuple[Array, ...]
    y: Any
    log_density: Callable[..., Any]
    rung: str = "regression: Newton's method (IRLS)"


BETA = {"b": ((3,), REAL)}
COUNTS = RNG.poisson(EXPOSURE * np.exp(ETA)) + 0.0
OVERDISPERSED = RNG.negative_binomial(3.0, 3 / (3 + np.exp(ETA))) + 0.0
HEAVY = ETA + 0.5 * RNG.standard_t(3.0, N)
PAIRS = np.column_stack([ETA, 1 - ETA]) + RNG.normal(size=(N, 2)) @ [[1.0, 0.5], [0.0, 0.7]]
SQUARES = "regression: weighted least squares"

CASES = {
    "Gaussian": Case(
        lambda x, b, s: dist.Normal(linear(b, x), s),
        {**BETA, "s": ((), POSITIVE)},
        (X,),
        ETA + 0.7 * RNG.normal(size=N),
        lambda y, b, s: stats.norm.logpdf(y, X @ b, s),
        SQUARES,
    ),
    "Gaussian with an offset": Case(
        lambda x, e, b, s: dist.Normal(e + linear(b, x), s),
        {**BETA, "s": ((), POSITIVE)},
        (X, EXPOSURE),
        ETA + EXPOSURE + 0.7 * RNG.normal(size=N),
        lambda y, b, s: stats.norm.logpdf(y, EXPOSURE + X @ b, s),
        SQUARES,
    ),
    "log-normal": Case(
        lambda x, b, s: dist.LogNormal(linear(b, x), s),
        {**BETA, "s": ((), POSITIVE)},
        (X,),
        np.exp(ETA + 0.7 * RNG.normal(size=N)),
        lambda y, b, s: stats.lognorm.logpdf(y, s, scale=np.exp(X @ b)),
        SQUARES,
    ),
    "heteroscedastic": Case(
        lambda x, b, g: dist.Normal(linear(b, x), linear(g, x).exp()),
        {**BETA, "g": ((3,), REAL)},
        (X,),
        ETA + np.exp(X @ [0.1, 0.3, -0.3]) * RNG.normal(size=N),
        lambda y, b, g: stats.norm.logpdf(y, X @ b, np.exp(X @ g)),
        SQUARES,
    ),
    "Student's t, df given": Case(
        lambda x, b, s: dist.StudentT(4.0, linear(b, x), s),
        {**BETA, "s": ((), POSITIVE)},
        (X,),
        HEAVY,
        lambda y, b, s: stats.t.logpdf(y, 4.0, X @ b, s),
        SQUARES,
    ),
    "Student's t": Case(
        lambda x, b, df, s: dist.StudentT(df, linear(b, x), s),
        {**BETA, "df": ((), POSITIVE), "s": ((), POSITIVE)},
        (X,),
        HEAVY,
        lambda y, b, df, s: stats.t.logpdf(y, df, X @ b, s),
        SQUARES,
    ),
    "multivariate, by the Cholesky factor": Case(
        lambda x, b, c: dist.MultivariateNormal(linears(b, x), scale_tril=c),
        {"b": ((2, 3), REAL), "c": ((2, 2), LOWER)},
        (X,),
        PAIRS,
        lambda y, b, c: stats.multivariate_normal.logpdf(y - X @ b.T, cov=c @ c.T),
        SQUARES,
    ),
    "multivariate, by the covariance": Case(
        lambda x, b, c: dist.MultivariateNormal(linears(b, x), c),
        {"b": ((2, 3), REAL), "c": ((2, 2), DEFINITE)},
        (X,),
        PAIRS,
        lambda y, b, c: stats.multivariate_normal.logpdf(y - X @ b.T, cov=c),
        SQUARES,
    ),
    "Bernoulli": Case(
        lambda x, b: dist.Bernoulli(logits=linear(b, x)),
        BETA,
        (X,),
        RNG.binomial(1, special.expit(ETA)) + 0.0,
        lambda y, b: stats.bernoulli.logpmf(y, special.expit(X @ b)),
    ),
    "Binomial": Case(
        lambda x, n, b: dist.Binomial(n, logits=linear(b, x)),
        BETA,
        (X, TRIALS),
        RNG.binomial(TRIALS.astype(int), special.expit(ETA)) + 0.0,
        lambda y, b: stats.binom.logpmf(y, TRIALS, special.expit(X @ b)),
    ),
    "geometric": Case(
        lambda x, b: dist.Geometric(logits=linear(b, x)),
        BETA,
        (X,),
        RNG.geometric(special.expit(ETA)) - 1.0,
        lambda y, b: stats.geom.logpmf(y + 1, special.expit(X @ b)),
    ),
    "Poisson": Case(
        lambda x, b: dist.Poisson(linear(b, x).exp()),
        BETA,
        (X,),
        RNG.poisson(np.exp(ETA)) + 0.0,
        lambda y, b: stats.poisson.logpmf(y, np.exp(X @ b)),
    ),
    "Poisson, exposure as an offset": Case(
        lambda x, e, b: dist.Poisson((linear(b, x) + e.log()).exp()),
        BETA,
        (X, EXPOSURE),
        COUNTS,
        lambda y, b: stats.poisson.logpmf(y, EXPOSURE * np.exp(X @ b)),
    ),
    "Poisson, exposure as a factor": Case(
        lambda x, e, b: dist.Poisson(linear(b, x).exp() * e),
        BETA,
        (X, EXPOSURE),
        COUNTS,
        lambda y, b: stats.poisson.logpmf(y, EXPOSURE * np.exp(X @ b)),
    ),
    "negative binomial": Case(
        lambda x, b: dist.NegativeBinomial(3.0, logits=linear(b, x) - np.log(3.0)),
        BETA,
        (X,),
        OVERDISPERSED,
        lambda y, b: stats.nbinom.logpmf(y, 3.0, 3 / (3 + np.exp(X @ b))),
    ),
    "Gamma": Case(
        lambda x, b, a: dist.Gamma(a, a / linear(b, x).exp()),
        {**BETA, "a": ((), POSITIVE)},
        (X,),
        RNG.gamma(2.5, np.exp(ETA) / 2.5),
        lambda y, b, a: stats.gamma.logpdf(y, a, scale=np.exp(X @ b) / a),
    ),
    "Exponential": Case(
        lambda x, b: dist.Exponential((-linear(b, x)).exp()),
        BETA,
        (X,),
        RNG.exponential(np.exp(ETA)),
        lambda y, b: stats.expon.logpdf(y, scale=np.exp(X @ b)),
    ),
    "Categorical with a reference": Case(
        lambda x, b: dist.Categorical(logits=beside_zero(linears(b, x))),
        {"b": ((2, 3), REAL)},
        (X,),
        CHOICES,
        lambda y, b: chosen(X @ np.vstack([np.zeros(3), b]).T),
    ),
    "Categorical without a reference": Case(
        lambda x, b: dist.Categorical(logits=linears(b, x)),
        {"b": ((3, 3), REAL)},
        (X,),
        CHOICES,
        lambda y, b: chosen(X @ b.T),
    ),
    "zero-inflated Poisson, gate and rate": Case(
        lambda x, b, g: dist.ZeroInflatedPoisson(linear(b, x).exp(), gate_logits=linear(g, x)),
        {**BETA, "g": ((3,), REAL)},
        (X,),
        RNG.poisson(np.exp(ETA + 0.5)) * (RNG.random(N) < special.expit(1 + X[:, 1])) + 0.0,
        lambda y, b, g: np.log(
            special.expit(X @ g) * (y == 0)
            + special.expit(-X @ g) * stats.poisson.pmf(y, np.exp(X @ b))
        ),
    ),
    "negative binomial, size unknown": Case(
        lambda x, b, r: dist.NegativeBinomial(r, logits=linear(b, x) - r.log()),
        {**BETA, "r": ((), POSITIVE)},
        (X,),
        OVERDISPERSED,
        lambda y, b, r: stats.nbinom.logpmf(y, r, r / (r + np.exp(X @ b))),
        "",
    ),
    "Weibull": Case(
        lambda x, b, k: dist.Weibull(linear(b, x).exp(), k),
        {**BETA, "k": ((), POSITIVE)},
        (X,),
        np.exp(ETA) * RNG.weibull(1.7, N),
        lambda y, b, k: stats.weibull_min.logpdf(y, k, scale=np.exp(X @ b)),
        "",
    ),
    "Poisson with positive coefficients": Case(
        lambda x, b: dist.Poisson(linear(b, x.abs())),
        {"b": ((3,), POSITIVE)},
        (X,),
        RNG.poisson(np.abs(X) @ [1.0, 2.0, 0.5]) + 0.0,
        lambda y, b: stats.poisson.logpmf(y, np.abs(X) @ b),
        "on the weighted rows",
    ),
    "a mean that is not affine": Case(
        lambda x, b, s: dist.Normal(linear(b, x).exp(), s),
        {**BETA, "s": ((), POSITIVE)},
        (X,),
        np.exp(ETA) + 0.3 * RNG.normal(size=N),
        lambda y, b, s: stats.norm.logpdf(y, np.exp(X @ b), s),
        "ascent steps",
    ),
    "probit": Case(
        lambda x, b: dist.Bernoulli(0.5 * (1 + torch.erf(linear(b, x) / 2**0.5))),
        BETA,
        (X,),
        (ETA + RNG.normal(size=N) > 0) + 0.0,
        lambda y, b: stats.bernoulli.logpmf(y, stats.norm.cdf(X @ b)),
        "ascent steps",
    ),
}


def starting(shape: tuple[int, ...], constraint: Any) -> Tensor:
    if constraint in (LOWER, DEFINITE):
        return torch.eye(shape[0]).unsqueeze(0)
    return torch.full((1, *shape), 0.0 if constraint is REAL else 1.0)


def split(v: Array, parameters: Mapping[str, tuple[tuple[int, ...], Any]]) -> list[Any]:
    """An unconstrained vector as the parameters."""
    found: list[Any] = []
    for shape, constraint in parameters.values():
        if constraint in (LOWER, DEFINITE):
            lower = np.array([[np.exp(v[0]), 0.0], [v[1], np.exp(v[2])]])
            found.append(lower if constraint is LOWER else lower @ lower.T)
            v = v[3:]
        else:
            size = int(np.prod(shape))
            part = v[:size].reshape(shape)
            found.append(np.exp(part) if constraint is POSITIVE else part)
            v = v[size:]
    assert not len(v)
    return found


@pytest.mark.parametrize("assigned", [False, True], ids=["rows", "one state"])
@pytest.mark.parametrize("name", CASES)
def test_the_weighted_maximum_is_that_of_scipy(name: str, assigned: bool) -> None:
    case = CASES[name]

    def program(*data: Tensor) -> None:
        *covariates, y = data
        values = {
            n: pyro.param(n, starting(*kind), constraint=kind[1])
            for n, kind in case.parameters.items()
        }
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(1))) if assigned else 0
            own = {n: v[z] for n, v in values.items()}
            pyro.sample("y", case.make(*covariates, **own), obs=y)

    fit = EM(tol=1e-13, param_tol=1e-10).fit(program, *case.covariates, case.y, weights=WEIGHTS)
    assert fit.converged, str(fit)
    assert case.rung in line(fit, "b")

    def loss(v: Array) -> float:
        values = split(v, case.parameters)
        return -float(np.mean(WEIGHTS * case.log_density(case.y, *values)))

    sizes = [3 if c in (LOWER, DEFINITE) else int(np.prod(s)) for s, c in case.parameters.values()]
    best = best_of(loss, np.zeros(sum(sizes)))
    assert fit.log_likelihood / N == pytest.approx(-best.fun, abs=1e-8)
    for n, value in zip(case.parameters, split(best.x, case.parameters), strict=True):
        np.testing.assert_allclose(fit.params[n][0], value, rtol=1e-4, err_msg=n)


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("Gaussian", LinearRegression(fit_intercept=False)),
        ("Poisson", PoissonRegressor(alpha=0.0, fit_intercept=False, tol=1e-10, max_iter=1000)),
        ("Gamma", GammaRegressor(alpha=0.0, fit_intercept=False, tol=1e-10, max_iter=1000)),
    ],
)
def test_coefficients_are_those_of_scikit_learn(name: str, machine: Any) -> None:
    case = CASES[name]

    def program(x: Tensor, y: Tensor) -> None:
        values = {
            n: pyro.param(n, starting(*kind), constraint=kind[1])[0]
            for n, kind in case.parameters.items()
        }
        with pyro.plate("rows", len(y)):
            pyro.sample("y", case.make(x, **values), obs=y)

    fit = TIGHT.fit(program, X, case.y, weights=WEIGHTS)
    machine.fit(X, case.y, sample_weight=WEIGHTS)
    np.testing.assert_allclose(fit.params["b"][0], machine.coef_, rtol=1e-5)


# ---------------------------------------------------------------------------------------
# Two components

BOTH = np.array([[1.0, 1.0, -0.5], [-1.0, -0.7, 0.8]])
HIDDEN = (RNG.random(N) < 0.4).astype(int)
OWN = (X * BOTH[HIDDEN]).sum(1)
SHARED = np.where(HIDDEN, 1.0, -1.0) + 2 * X[:, 1] + np.where(HIDDEN, -1.0, 1.0) * X[:, 2]
RESPONSES = {
    "Gaussian": 2 * OWN + 0.5 * RNG.normal(size=N),
    "Poisson": RNG.poisson(np.exp(OWN + 1)) + 0.0,
    "Bernoulli": RNG.binomial(1, special.expit(6 * OWN)) + 0.0,
    "Binomial": RNG.binomial(TRIALS.astype(int) + 5, special.expit(OWN)) + 0.0,
    "shared": SHARED + 0.4 * RNG.normal(size=N),
    "experts": OWN + 0.4 * RNG.normal(size=N),
}
STARTS: dict[str, Any] = {
    "weights": np.array([0.5, 0.5]),
    "gate": np.array([0.1, -0.2, 0.3]),
    "b": BOTH + 0.3,
    "s": np.array([1.0, 0.7]),
    "a": np.array([-0.5, 1.5]),
    "c": np.array(1.0),
    "d": np.array([0.5, -0.5]),
}


def two(kind: str) -> Callable[..., None]:
    """The program of a mixture of two regressions."""

    def given(name: str, constraint: Any = REAL) -> Tensor:
        return pyro.param(name, torch.from_numpy(STARTS[name]), constraint=constraint)

    def program(x: Tensor, n: Tensor, y: Tensor) -> None:
        if kind == "experts":
            assignment = dist.Categorical(logits=beside_zero((x @ given("gate")).unsqueeze(-1)))
        else:
            assignment = dist.Categorical(given("weights", SIMPLEX))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", assignment)
            if kind == "shared":
                s = pyro.param("s", torch.tensor(1.0), constraint=POSITIVE)
                t = given("a")[z] + given("c") * x[:, 1] + given("d")[z] * x[:, 2]
                pyro.sample("y", dist.Normal(t, s), obs=y)
                return
            t = linear(given("b")[z], x)
            if kind == "Poisson":
                pyro.sample("y", dist.Poisson(t.exp()), obs=y)
            elif kind == "Bernoulli":
                pyro.sample("y", dist.Bernoulli(logits=t), obs=y)
            elif kind == "Binomial":
                pyro.sample("y", dist.Binomial(n, logits=t), obs=y)
            else:
                pyro.sample("y", dist.Normal(t, given("s", POSITIVE)[z]), obs=y)

    return program


def marginal(kind: str, p: dict[str, Array]) -> float:
    """The marginal log-likelihood per row, by SciPy."""
    y = RESPONSES[kind][:, None]
    if kind == "experts":
        t = X @ p["gate"]
        log_weights = -np.logaddexp(0, np.column_stack([t, -t]))
    else:
        log_weights = np.log(p["weights"])
    t = X @ p["b"].T if "b" in p else p["a"] + p["c"] * X[:, 1:2] + p["d"] * X[:, 2:]
    if kind == "Poisson":
        each = stats.poisson.logpmf(y, np.exp(t))
    elif kind == "Bernoulli":
        each = stats.bernoulli.logpmf(y, special.expit(t))
    elif kind == "Binomial":
        each = stats.binom.logpmf(y, TRIALS[:, None] + 5, special.expit(t))
    else:
        each = stats.norm.logpdf(y, t, p["s"])
    return float(special.logsumexp(log_weights + each, axis=1).mean())


def climb(fit: Fit, value: Callable[[dict[str, Array]], float]) -> float:
    """The maximum that SciPy finds near a fit: over logits of weights and logarithms of scales."""
    simplexes = ("weights", "transition")
    shapes = {n: tuple(v.shape) for n, v in fit.params.items()}
    parts = []
    for n, v in fit.params.items():
        known = v.numpy()
        if n in simplexes:
            known = np.log(known[..., 1:] / known[..., :1])
        parts.append(np.ravel(np.log(known) if n == "s" else known))

    def of(v: Array) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for n, shape in shapes.items():
            size = int(np.prod(shape)) // (2 if n in simplexes else 1)
            part, v = v[:size], v[size:]
            if n in simplexes:
                part = special.softmax(np.column_stack([np.zeros(size), part]), axis=1)
            found[n] = (np.exp(part) if n == "s" else part).reshape(shape)
        return found

    start = np.concatenate(parts)
    start = start + 0.02 * np.random.default_rng(1).normal(size=len(start))
    return -float(best_of(lambda v: -value(of(v)), start, 1e-9).fun)


@pytest.mark.parametrize("kind", RESPONSES)
def test_an_optimum_of_em_is_one_of_scipy(kind: str) -> None:
    fit = TIGHT.fit(two(kind), X, TRIALS + 5, RESPONSES[kind], init="model")
    assert fit.converged, str(fit)
    assert fit.df == sum(v.numel() for v in fit.params.values()) - (kind != "experts")
    own = marginal(kind, {n: v.numpy() for n, v in fit.params.items()})
    assert fit.log_likelihood / N == pytest.approx(own, abs=1e-12)
    assert own == pytest.approx(climb(fit, lambda p: marginal(kind, p)), abs=1e-6)
    coefficient = "gate" if kind == "experts" else "a" if kind == "shared" else "b"
    assert "regression" in line(fit, coefficient)
    assert "ascent steps" not in fit.explain()


def by_hand(kind: str, iterations: int) -> dict[str, Array]:
    """EM for Gaussian responses in NumPy, from the same start."""
    y, p = RESPONSES[kind], {n: np.array(v) for n, v in STARTS.items()}
    if kind == "shared":  # the coefficients of all components as one vector
        theta, scale = np.concatenate([p["a"], [p["c"]], p["d"]]), np.ones(2)
        e = np.eye(2)
        designs = [
            np.column_stack([np.tile(e[k], (N, 1)), X[:, 1], X[:, 2:] * e[k]]) for k in (0, 1)
        ]
    else:
        theta, scale = p["b"].reshape(-1), p["s"]
        designs = [np.hstack([X * (k == 0), X * (k == 1)]) for k in (0, 1)]
    gate, log_weights = p["gate"], np.log(p["weights"])
    for _ in range(iterations):
        if kind == "experts":
            log_weights = -np.logaddexp(0, np.column_stack([X @ gate, -X @ gate]))
        eta = np.column_stack([d @ theta for d in designs])
        r = special.softmax(log_weights + stats.norm.logpdf(y[:, None], eta, scale), axis=1)
        precision = r / scale**2
        pairs = list(zip(designs, precision.T, strict=True))
        theta = np.linalg.solve(
            sum(d.T @ (d * w[:, None]) for d, w in pairs), sum(d.T @ (w * y) for d, w in pairs)
        )
        eta = np.column_stack([d @ theta for d in designs])
        squares = (r * (y[:, None] - eta) ** 2).sum(0)
        scale = np.sqrt(squares / r.sum(0))
        if kind == "shared":
            scale = np.full(2, np.sqrt(squares.sum() / N))
        for _ in range(30 if kind == "experts" else 0):
            share = special.expit(X @ gate)
            curvature = X.T @ (X * (share * (1 - share))[:, None])
            gate = gate + np.linalg.solve(curvature, X.T @ (r[:, 1] - share))
        if kind != "experts":
            log_weights = np.log(r.mean(0))
    if kind == "shared":
        a, c, d = theta[:2], theta[2], theta[3:]
        return {"weights": np.exp(log_weights), "a": a, "c": c, "d": d, "s": scale[0]}
    own = {"b": theta.reshape(2, 3), "s": scale}
    return {**own, **({"gate": gate} if kind == "experts" else {"weights": np.exp(log_weights)})}


@pytest.mark.parametrize("iterations", [1, 5, 20])
@pytest.mark.parametrize("kind", ["Gaussian", "shared", "experts"])
def test_every_iteration_is_that_of_em_by_hand(kind: str, iterations: int) -> None:
    expected = by_hand(kind, iterations)
    init = {n: torch.from_numpy(np.array(STARTS[n])) for n in expected}
    if kind == "shared":
        init["s"] = torch.tensor(1.0, dtype=torch.float64)
    solver = EM(max_iter=iterations, tol=0, param_tol=0)
    fit = solver.fit(two(kind), X, TRIALS + 5, RESPONSES[kind], init=init)
    assert fit.status is Status.MAX_ITER and set(fit.params) == set(expected)
    for n, value in expected.items():
        np.testing.assert_allclose(fit.params[n], value, rtol=1e-8, atol=1e-8, err_msg=n)


def test_a_gate_without_a_reference_has_directions_that_change_nothing() -> None:
    def program(x: Tensor, y: Tensor) -> None:
        gate = pyro.param("gate", torch.tensor([[0.1, 0.0, 0.2], [0.0, 0.3, 0.0]]))
        b = pyro.param("b", torch.from_numpy(BOTH))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=x @ gate.T))
            pyro.sample("y", dist.Normal(linear(b[z], x), 0.4), obs=y)

    fit = TIGHT.fit(program, X, RESPONSES["experts"])
    assert fit.converged and fit.df == 9
    assert "3 of its 6 directions change nothing" in line(fit, "gate")
    np.testing.assert_allclose(fit.params["gate"].sum(0), 0.0, atol=1e-12)


# ---------------------------------------------------------------------------------------
# Priors

MEAN = np.array([0.3, -0.2, 0.1])
SPREAD = np.array([[1.0, 0.5, 0.0], [0.5, 2.0, -0.3], [0.0, -0.3, 0.7]]) / 20


def normal(size: int) -> Tensor:
    return pyro.sample("b", dist.Normal(torch.from_numpy(MEAN), 0.2).to_event(1))


def normal_in_a_plate(size: int) -> Tensor:
    with pyro.plate("covariates", size):
        return pyro.sample("b", dist.Normal(torch.from_numpy(MEAN), 0.2))


def multivariate(size: int) -> Tensor:
    prior = dist.MultivariateNormal(torch.from_numpy(MEAN), torch.from_numpy(SPREAD))
    return pyro.sample("b", prior)


def by_precision(size: int) -> Tensor:
    precision = torch.from_numpy(np.linalg.inv(SPREAD))
    prior = dist.MultivariateNormal(torch.from_numpy(MEAN), precision_matrix=precision)
    return pyro.sample("b", prior)


@pytest.mark.parametrize(
    ("prior", "covariance"),
    [
        (normal, 0.04 * np.eye(3)),
        (normal_in_a_plate, 0.04 * np.eye(3)),
        (multivariate, SPREAD),
        (by_precision, SPREAD),
    ],
)
@pytest.mark.parametrize("repeated", [False, True], ids=["", "a column twice"])
def test_a_normal_prior_has_the_closed_form(
    prior: Callable[[int], Tensor], covariance: Array, repeated: bool
) -> None:
    def program(x: Tensor, y: Tensor) -> None:
        b = prior(3)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ b, 0.5), obs=y)

    x, y = X.copy(), CASES["Gaussian"].y
    if repeated:
        x[:, 2] = x[:, 1]
    fit = EM().fit(program, x, y, weights=WEIGHTS)
    precision, left = np.linalg.inv(covariance), x.T * (WEIGHTS / 0.25)
    expected = np.linalg.solve(left @ x + precision, left @ y + precision @ MEAN)
    assert fit.converged and fit.n_iter <= 2 and fit.df == 3
    assert SQUARES in line(fit, "b") and "Normal prior" in line(fit, "b")
    np.testing.assert_allclose(fit.params["b"], expected, rtol=1e-8)


def test_a_ridge_in_a_mixture_has_the_closed_form_at_its_optimum() -> None:
    def program(x: Tensor, y: Tensor) -> None:
        s = pyro.param("s", torch.ones(2), constraint=POSITIVE)
        b = pyro.sample("b", dist.Normal(torch.zeros(2, 3), 0.5).to_event(2))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(linear(b[z], x), s[z]), obs=y)

    y = RESPONSES["Gaussian"]
    fit = TIGHT.fit(program, X, y, init={"b": BOTH})
    assert fit.converged and "Normal prior" in line(fit, "b")
    s, b = fit.params["s"].numpy(), fit.params["b"].numpy()
    r = special.softmax(stats.norm.logpdf(y[:, None], X @ b.T, s), axis=1)
    for k in range(2):
        left = X.T * r[:, k] / s[k] ** 2
        np.testing.assert_allclose(b[k], np.linalg.solve(left @ X + 4 * np.eye(3), left @ y), 1e-6)
        own = np.average((y - X @ b[k]) ** 2, weights=r[:, k]) ** 0.5
        assert s[k] == pytest.approx(own, rel=1e-6)


def test_effects_with_a_prior_beside_coefficients_without() -> None:
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 8, N)
    y = X @ [1.0, 0.5, -0.5] + 0.8 * rng.normal(size=8)[groups] + 0.5 * rng.normal(size=N)

    def program(x: Tensor, g: Tensor, y: Tensor) -> None:
        b = pyro.param("b", torch.zeros(3))
        with pyro.plate("groups", 8):
            u = pyro.sample("u", dist.Normal(0.0, 0.7))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ b + u[g], 0.5), obs=y)

    fit = EM().fit(program, X, torch.from_numpy(groups), y)
    assert fit.converged and fit.df == 11
    assert "together with 'u'" in line(fit, "b") and "change nothing" not in fit.explain()
    whole = np.hstack([X, np.eye(8)[groups]])
    penalty = np.diag([0.0] * 3 + [1 / 0.49] * 8)
    expected = np.linalg.solve(whole.T @ whole / 0.25 + penalty, whole.T @ y / 0.25)
    np.testing.assert_allclose(np.concatenate([fit.params["b"], fit.params["u"]]), expected, 1e-8)


@pytest.mark.parametrize(
    "seed",
    [
        2,
        3,
        1,
    ],
)
def test_a_laplace_prior_is_the_lasso_and_no_closed_form(seed: int) -> None:
    def program(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Laplace(torch.zeros(5), 0.05).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ b, 0.5), obs=y)

    x = np.hstack([X, np.random.default_rng(seed).normal(size=(N, 2))])
    y = CASES["Gaussian"].y
    fit = EM().fit(program, x, y)
    text = line(fit, "b")
    assert "numerically" in text and "Laplace prior is no Normal" in text
    assert "closed form" not in text and "least squares" not in text
    lasso = Lasso(alpha=0.25 / (0.05 * N), fit_intercept=False, tol=1e-12).fit(x, y)
    best = stats.norm.logpdf(y, x @ lasso.coef_, 0.5).sum()
    best += stats.laplace.logpdf(lasso.coef_, scale=0.05).sum()
    gap = (best - fit.log_joint) / N
    assert fit.status is Status.STALLED or (fit.converged and gap == pytest.approx(0, abs=1e-8))


# ---------------------------------------------------------------------------------------
# Designs without full rank, covariates of any size


def single(kind: str) -> Callable[[Tensor, Tensor], None]:
    """The program of one regression, from coefficients that are not zero."""

    def program(x: Tensor, y: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        size = x.abs().amax(0).clamp(min=1e-300)
        start = 0.1 * torch.randn(x.shape[1], generator=generator, dtype=torch.float64) / size
        t = x @ pyro.param("b", start)
        with pyro.plate("rows", len(y)):
            if kind == "Gaussian":
                pyro.sample("y", dist.Normal(t, 0.5), obs=y)
            elif kind == "Bernoulli":
                pyro.sample("y", dist.Bernoulli(logits=t), obs=y)
            else:
                pyro.sample("y", dist.Poisson(t.exp()), obs=y)

    return program


def simulated(kind: str, eta: Array) -> Array:
    rng = np.random.default_rng(2)
    if kind == "Gaussian":
        return eta + 0.5 * rng.normal(size=len(eta))
    if kind == "Bernoulli":
        return rng.binomial(1, special.expit(eta)) + 0.0
    return rng.poisson(np.exp(eta)) + 0.0 if kind == "Poisson" else rng.gamma(2.0, np.exp(eta) / 2)


COVARIATES = RNG.normal(size=(N, 2))
ONE_HOT = np.eye(4)[RNG.integers(0, 4, N)]
DESIGNS = {
    "a column twice": np.hstack([X, X[:, 1:2]]),
    "a column of zeros": np.hstack([X, np.zeros((N, 1))]),
    "indicators and an intercept": np.hstack([X, ONE_HOT]),
    "a sum of others, in other units": np.hstack([X, 1e-4 * X @ [[1.0], [2.0], [3.0]]]),
    "more columns than rows": RNG.normal(size=(20, 30)),
    "nothing but zeros": np.zeros((N, 2)),
}


@pytest.mark.parametrize("kind", ["Gaussian", "Bernoulli", "Poisson"])
@pytest.mark.parametrize("name", list(DESIGNS)[:4])
def test_without_full_rank_the_solution_is_the_one_nearest_to_zero(name: str, kind: str) -> None:
    x = DESIGNS[name]
    rank = np.linalg.matrix_rank(x)
    basis = np.linalg.svd(x, full_matrices=False)[0][:, :rank]
    y = simulated(kind, 0.5 * ETA)
    fit, reduced = (TIGHT.fit(single(kind), d, y, weights=WEIGHTS) for d in (x, basis))
    b = fit.params["b"].numpy()
    assert fit.converged and reduced.converged and fit.df == rank == reduced.df
    assert f"{x.shape[1] - rank} of its {x.shape[1]} directions" in line(fit, "b")
    assert "change nothing" in line(fit, "b") and "change nothing" not in line(reduced, "b")
    np.testing.assert_allclose(x @ b, basis @ reduced.params["b"].numpy(), atol=1e-8)
    np.testing.assert_allclose(b, np.linalg.pinv(x) @ x @ b, atol=1e-10)
    if kind == "Gaussian":
        root = np.sqrt(WEIGHTS)
        np.testing.assert_allclose(
            b, np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0], atol=1e-10
        )


def test_more_columns_than_rows() -> None:
    x = DESIGNS["more columns than rows"]
    y = simulated("Gaussian", x[:, 0])
    fit = TIGHT.fit(single("Gaussian"), x, y)
    assert fit.converged and fit.df == 20
    assert "10 of its 30 directions change nothing" in line(fit, "b")
    np.testing.assert_allclose(fit.params["b"], np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-10)

    def with_a_scale(x: Tensor, y: Tensor) -> None:
        b = pyro.param("b", torch.zeros(x.shape[1]))
        s = pyro.param("s", torch.tensor(1.0), constraint=POSITIVE)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ b, s), obs=y)

    fit = EM().fit(with_a_scale, x, y)
    assert fit.status is Status.DEGENERATE and "ran to its floor" in fit.message
    np.testing.assert_allclose(x @ fit.params["b"].numpy(), y, atol=1e-8)


def test_a_mixture_without_full_rank() -> None:
    x, y = DESIGNS["a column twice"], RESPONSES["Gaussian"]

    def program(x: Tensor, y: Tensor) -> None:
        b = pyro.param("b", torch.zeros(2, x.shape[1]))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(linear(b[z], x), 0.5), obs=y)

    start = np.hstack([BOTH, [[1.0], [2.0]]])
    fit = TIGHT.fit(program, x, y, init={"b": start})
    reduced = TIGHT.fit(program, X, y, init={"b": BOTH})
    assert fit.converged and fit.df == reduced.df == 6
    assert "2 of its 8 directions change nothing" in line(fit, "b")
    assert fit.log_likelihood == pytest.approx(reduced.log_likelihood, abs=1e-8)
    b = fit.params["b"].numpy()
    np.testing.assert_allclose(b[:, 1], b[:, 3], atol=1e-10)


@pytest.mark.parametrize("kind", ["Gaussian", "Bernoulli"])
def test_a_design_of_zeros(kind: str) -> None:
    fit = EM().fit(single(kind), DESIGNS["nothing but zeros"], simulated(kind, ETA))
    assert fit.converged and fit.df == 0


SIZES = {
    "small, middling and large": (np.array([1.0, 1e-6, 1.0, 1e6]), np.zeros(4)),
    "far from zero": (np.ones(4), np.array([0.0, 1e2, -1e3, 1e4])),
    "very far from zero": (np.ones(4), np.array([0.0, 1e5, 0.0, 0.0])),
    "all of it": (np.array([1.0, 1e-6, 1.0, 1e6]), np.array([0.0, 0.0, 1e5, 0.0])),
}


@pytest.mark.parametrize("kind", ["Gaussian", "Bernoulli"])
@pytest.mark.parametrize("name", list(SIZES))
def test_units_of_covariates_do_not_matter(name: str, kind: str) -> None:
    plain = np.hstack([X, COVARIATES[:, :1]])
    scale, offset = SIZES[name]
    x, y = plain * scale + offset, simulated(kind, ETA)
    fit = TIGHT.fit(single(kind), x, y)
    assert fit.converged, str(fit)
    assert fit.df == 4 and "change nothing" not in line(fit, "b")
    if kind == "Gaussian":
        expected = plain @ np.linalg.lstsq(plain, y, rcond=None)[0]
    else:
        expected = plain @ TIGHT.fit(single(kind), plain, y).params["b"].numpy()
    np.testing.assert_allclose(x @ fit.params["b"].numpy(), expected, rtol=1e-6, atol=1e-6)


def with_a_log_link(kind: str) -> Callable[[Tensor, Tensor], None]:
    def program(x: Tensor, y: Tensor) -> None:
        t = (x @ pyro.param("b", torch.zeros(2))).exp()
        with pyro.plate("rows", len(y)):
            if kind == "Poisson":
                pyro.sample("y", dist.Poisson(t), obs=y)
            elif kind == "Gamma":
                pyro.sample("y", dist.Gamma(2.0, 2 / t), obs=y)
            elif kind == "Normal":
                pyro.sample("y", dist.Normal(0.0, t), obs=y)
            else:
                pyro.sample("y", dist.ZeroInflatedPoisson(t, gate=torch.tensor(0.2)), obs=y)

    return program


LINKED = {
    "Poisson": simulated("Poisson", ETA),
    "Gamma": simulated("Gamma", ETA),
    "Normal": simulated("Gamma", ETA) * np.where(np.arange(N) % 2, 1.0, -1.0),
    "zero-inflated": simulated("Poisson", ETA + 1) * (np.arange(N) % 5 > 0),
}


@pytest.mark.parametrize("kind", LINKED)
@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (30.0, 0.0), (1.0, 100.0)])
def test_a_log_link_is_a_regression(kind: str, size: float, offset: float) -> None:
    x, y = np.column_stack([X[:, 0], X[:, 1] * size + offset]), LINKED[kind]
    fit, plain = (TIGHT.fit(with_a_log_link(kind), d, y) for d in (x, X[:, :2]))
    assert fit.converged and plain.converged
    assert "Newton's method (IRLS)" in line(fit, "b"), fit.explain()
    assert fit.log_likelihood / N == pytest.approx(plain.log_likelihood / N, abs=1e-8)


@pytest.mark.parametrize(
    ("kind", "size", "offset"),
    [
        *((kind, size, 0.0) for kind in LINKED for size in (300.0, 1e4)),
        *((kind, 6.0, 2010.0) for kind in LINKED),
        *((kind, 1e6, 0.0) for kind in LINKED),
        *((kind, 1.0, 1e4) for kind in LINKED),
    ],
)
def test_a_log_link_with_covariates_of_any_size(kind: str, size: float, offset: float) -> None:
    x, y = np.column_stack([X[:, 0], X[:, 1] * size + offset]), LINKED[kind]
    solver = EM(tol=1e-12, param_tol=1e-7, max_iter=40)
    fit, plain = (solver.fit(with_a_log_link(kind), d, y) for d in (x, X[:, :2]))
    assert fit.converged and plain.converged
    assert fit.log_likelihood / N == pytest.approx(plain.log_likelihood / N, abs=1e-8)


def test_covariates_in_the_hundreds_in_a_mixture() -> None:
    init = {"b": BOTH * [1.0, 1 / 300, 1 / 300]}
    x = X * [1.0, 300.0, 300.0]
    fit = TIGHT.fit(two("Poisson"), x, TRIALS, RESPONSES["Poisson"], init=init)
    plain = TIGHT.fit(two("Poisson"), X, TRIALS, RESPONSES["Poisson"], init={"b": BOTH})
    assert plain.converged and fit.converged, str(fit)
    assert fit.log_likelihood / N == pytest.approx(plain.log_likelihood / N, abs=1e-8)


def from_zero(kind: str) -> tuple[Callable[[Tensor, Tensor], None], Array, float]:
    """A program whose optimum is far from its start, its data, and the log-likelihood there."""
    rng = np.random.default_rng(6)
    x, start = X[:, 1], 30.0 if kind == "Bernoulli" else 0.0
    y: Array
    if kind == "Normal":
        y = 3e-4 * np.exp(0.5 * x) * rng.normal(size=N)
    elif kind == "Exponential":
        y = 1e-8 * rng.exponential(np.exp(0.3 * x))
    elif kind == "Poisson":
        y = rng.poisson(1e7 * np.exp(0.3 * x)) + 0.0
    else:
        y = rng.binomial(1, special.expit(x)) + 0.0

    def program(x: Tensor, y: Tensor) -> None:
        t = x @ pyro.param("b", torch.tensor([start, 0.0]))
        with pyro.plate("rows", len(y)):
            if kind == "Normal":
                pyro.sample("y", dist.Normal(0.0, t.exp()), obs=y)
            elif kind == "Exponential":
                pyro.sample("y", dist.Exponential((-t).exp()), obs=y)
            elif kind == "Poisson":
                pyro.sample("y", dist.Poisson(t.exp()), obs=y)
            else:
                pyro.sample("y", dist.Bernoulli(logits=t), obs=y)

    def loss(v: Array) -> float:
        t = v[0] + v[1] * x
        if kind == "Normal":
            found = stats.norm.logpdf(y, 0.0, np.exp(t))
        elif kind == "Exponential":
            found = stats.expon.logpdf(y, scale=np.exp(t))
        elif kind == "Poisson":
            found = stats.poisson.logpmf(y, np.exp(t))
        else:
            found = stats.bernoulli.logpmf(y, special.expit(t))
        return -float(np.mean(found))

    level = {"Normal": -8.0, "Exponential": -18.0, "Poisson": 16.0, "Bernoulli": 0.0}[kind]
    return program, y, -best_of(loss, np.array([level, 0.0])).fun


@pytest.mark.parametrize("kind", ["Normal", "Exponential", "Poisson", "Bernoulli"])
def test_an_optimum_far_from_the_start(kind: str) -> None:
    program, y, best = from_zero(kind)
    fit = EM().fit(program, X[:, :2], y)
    assert not fit.converged or fit.log_likelihood / N == pytest.approx(best, abs=1e-6)


# ---------------------------------------------------------------------------------------
# No maximum

SEPARATED = (X[:, 1] + 0.3 * X[:, 2] > 0.2) + 0.0
FIRST = ONE_HOT[:, 0] > 0
CONTRAST = np.column_stack([np.ones(N), ONE_HOT[:, 1:]])
SPLIT: dict[str, tuple[str, Array, Array]] = {
    "separated": ("Bernoulli", X, SEPARATED),
    "one answer": ("Bernoulli", X, np.ones(N)),
    "one answer in a group": ("Bernoulli", CONTRAST, np.where(FIRST, 1.0, SEPARATED)),
    "no events in a group": ("Poisson", CONTRAST, np.where(FIRST, 0.0, COUNTS)),
    "one answer, an effect of each group": ("Bernoulli", ONE_HOT, np.where(FIRST, 1.0, SEPARATED)),
    "no events, an effect of each group": ("Poisson", ONE_HOT, np.where(FIRST, 0.0, COUNTS)),
}


def supremum(kind: str, x: Array, y: Array) -> float:
    """The log-likelihood at the means of the groups, or without any error."""
    if x is X:
        return 0.0
    means = ONE_HOT @ ((ONE_HOT.T @ y) / ONE_HOT.sum(0))
    family = stats.poisson if kind == "Poisson" else stats.bernoulli
    return float(family.logpmf(y, means).sum())


@functools.cache
def separated(name: str) -> Fit:
    kind, x, y = SPLIT[name]
    return EM().fit(single(kind), x, y)


@pytest.mark.parametrize("name", list(SPLIT))
def test_a_separation_does_no_harm(name: str) -> None:
    kind, x, y = SPLIT[name]
    fit = separated(name)
    assert fit.status in (Status.CONVERGED, Status.MAX_ITER, Status.STALLED, Status.DEGENERATE)
    assert all(bool(v.isfinite().all()) for v in fit.params.values())
    assert fit.log_likelihood == pytest.approx(supremum(kind, x, y), abs=1e-5)


@pytest.mark.parametrize("name", ["separated", "one answer in a group", "no events in a group"])
def test_a_separation_is_told(name: str) -> None:
    fit = separated(name)
    assert fit.status is not Status.CONVERGED or fit.message


# ---------------------------------------------------------------------------------------
# Ways to write a regression


def test_a_linear_module_is_a_regression() -> None:
    net = nn.Linear(2, 1)

    def program(x: Tensor, y: Tensor) -> None:
        mean = pyro.module("net", net)(x)
        s = pyro.param("s", torch.tensor(1.0), constraint=POSITIVE)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean.squeeze(-1), s), obs=y)

    y = CASES["Gaussian"].y
    fit = TIGHT.fit(program, X[:, 1:], y)
    assert fit.converged and fit.n_iter <= 2
    assert SQUARES in line(fit, "net$$$weight") and "'net$$$bias'" in line(fit, "net$$$weight")
    found = [*fit.params["net$$$bias"].tolist(), *fit.params["net$$$weight"][0].tolist()]
    np.testing.assert_allclose(found, np.linalg.lstsq(X, y, rcond=None)[0], rtol=1e-8)


def test_a_linear_module_for_two_components() -> None:
    net = nn.Linear(2, 2)

    def program(x: Tensor, n: Tensor, y: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=SIMPLEX)
        s = pyro.param("s", torch.ones(2), constraint=POSITIVE)
        means = pyro.module("net", net)(x[:, 1:])
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            mean = torch.where(z == 0, means[:, 0], means[:, 1])
            pyro.sample("y", dist.Normal(mean, s[z]), obs=y)

    y = RESPONSES["Gaussian"]
    init = {"net$$$bias": BOTH[:, 0], "net$$$weight": BOTH[:, 1:]}
    fit = TIGHT.fit(program, X, TRIALS, y, init=init)
    plain = TIGHT.fit(two("Gaussian"), X, TRIALS, y, init={"b": BOTH})
    assert fit.converged and SQUARES in line(fit, "net$$$weight")
    assert fit.df == plain.df and fit.log_likelihood == pytest.approx(plain.log_likelihood)
    np.testing.assert_allclose(fit.params["net$$$weight"], plain.params["b"][:, 1:], rtol=1e-5)


def test_some_coefficients_are_held() -> None:
    y, values = RESPONSES["Gaussian"], 2 * BOTH
    mask = torch.tensor([[True, False, False], [False, True, True]])
    init = {"b": torch.from_numpy(values)}
    solver = EM(fixed={"b": mask}, tol=1e-13, param_tol=1e-9)
    fit = solver.fit(two("Gaussian"), X, TRIALS, y, init=init)
    assert fit.converged and fit.df == 6 and "3 held" in fit.explain()
    b = fit.params["b"].numpy()
    np.testing.assert_array_equal(b[mask.numpy()], values[mask.numpy()])

    def value(p: dict[str, Array]) -> float:
        return marginal("Gaussian", {**p, "b": np.where(mask.numpy(), values, p["b"])})

    own = value({n: v.numpy() for n, v in fit.params.items()})
    assert fit.log_likelihood / N == pytest.approx(own, abs=1e-12)
    assert own == pytest.approx(climb(fit, value), abs=1e-6)
    whole = EM(fixed={"b"}).fit(two("Gaussian"), X, TRIALS, y, init=init)
    assert whole.converged and whole.df == 3 and "fixed" in line(whole, "b")
    np.testing.assert_array_equal(whole.params["b"], values)


def test_a_held_coefficient_tells_repeated_columns_apart() -> None:
    x, y = DESIGNS["a column twice"], CASES["Gaussian"].y
    held = {"b": torch.tensor([False, True, False, False])}
    init = {"b": torch.tensor([0.0, 0.25, 0.0, 0.0], dtype=torch.float64)}
    fit = EM(fixed=held).fit(single("Gaussian"), x, y, init=init)
    expected = np.linalg.lstsq(X, y, rcond=None)[0]
    assert fit.converged and fit.df == 3 and "change nothing" not in line(fit, "b")
    np.testing.assert_allclose(
        fit.params["b"], [expected[0], 0.25, expected[2], expected[1] - 0.25], atol=1e-10
    )


def test_a_component_dies() -> None:
    def program(x: Tensor, y: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=SIMPLEX)
        b = pyro.param("b", torch.zeros(3, 3))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(linear(b[z], x), 0.5), obs=y)

    start = np.vstack([2 * BOTH, [1e3, 0.0, 0.0]])
    fit = EM().fit(program, X, RESPONSES["Gaussian"], init={"b": start})
    assert fit.status is Status.DEGENERATE and "state 2 of assignment 'z'" in fit.message
    np.testing.assert_array_equal(fit.params["b"][2], start[2])
    np.testing.assert_allclose(fit.params["b"][:2], 2 * BOTH, atol=0.3)


def with_a_mask(kind: str) -> Callable[..., None]:
    def program(x: Tensor, y: Tensor, seen: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=SIMPLEX)
        b = pyro.param("b", torch.from_numpy(BOTH))
        with pyro.plate("rows", len(y)), poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Categorical(weights))
            t = linear(b[z], x)
            y_given = dist.Poisson(t.exp()) if kind == "Poisson" else dist.Normal(t, 0.5)
            pyro.sample("y", y_given, obs=y)

    return program


SEEN = np.arange(N) % 5 < 4


@functools.cache
def on_seen_rows(kind: str) -> Fit:
    y = RESPONSES[kind][SEEN]
    return TIGHT.fit(with_a_mask(kind), X[SEEN], y, torch.ones(len(y), dtype=torch.bool))


@pytest.mark.parametrize("code", [0.0, -1.0, 1e6, np.nan])
@pytest.mark.parametrize("kind", ["Gaussian", "Poisson"])
def test_missing_responses(kind: str, code: float) -> None:
    y = np.where(SEEN, RESPONSES[kind], code)
    fit, plain = TIGHT.fit(with_a_mask(kind), X, y, torch.from_numpy(SEEN)), on_seen_rows(kind)
    assert fit.converged and plain.converged and "regression" in line(fit, "b")
    assert fit.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-8)
    np.testing.assert_allclose(fit.params["b"], plain.params["b"], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("Gaussian", 0.0),
        ("Gaussian", 999.0),
        ("Gaussian", 1e6),
        ("Gaussian", np.nan),
        ("Poisson", 0.0),
        ("Poisson", 999.0),
        ("Poisson", 1e5),
        ("Poisson", np.nan),
    ],
)
def test_missing_covariates_of_masked_rows(kind: str, code: float) -> None:
    x = X.copy()
    x[~SEEN, 1:] = code
    args = x, RESPONSES[kind], torch.from_numpy(SEEN)
    fit, plain = TIGHT.fit(with_a_mask(kind), *args), on_seen_rows(kind)
    assert fit.converged and plain.converged and "regression" in line(fit, "b")
    assert fit.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-8)


def test_groups_of_rows_with_covariates() -> None:
    groups, size = 40, 6
    rng = np.random.default_rng(3)
    times = np.broadcast_to(np.eye(size), (groups, size, size))  # an effect of each place
    x = np.concatenate([times, rng.normal(size=(groups, size, 1))], -1)
    true = rng.normal(size=(2, size + 1))
    y = (x * true[(rng.random(groups) < 0.4).astype(int)][:, None]).sum(-1)
    y = y + 0.7 * rng.normal(size=(groups, size))

    def program(x: Tensor, y: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=SIMPLEX)
        b = pyro.param("b", torch.from_numpy(true))
        s = pyro.param("s", torch.ones(2), constraint=POSITIVE)
        with pyro.plate("groups", len(y), dim=-2):
            z = pyro.sample("z", dist.Categorical(weights))
            with pyro.plate("rows", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(linear(b[z], x), s[z]), obs=y)

    def value(p: dict[str, Array]) -> float:
        t = np.einsum("gip,kp->gik", x, p["b"])
        each = stats.norm.logpdf(y[..., None], t, p["s"]).sum(1)
        return float(special.logsumexp(np.log(p["weights"]) + each, axis=1).mean())

    fit = TIGHT.fit(program, x, y)
    assert fit.converged and "40 rows (plate groups)" in fit.explain()
    assert SQUARES in line(fit, "b") and fit.df == 17
    own = value({n: v.numpy() for n, v in fit.params.items()})
    assert fit.log_likelihood / groups == pytest.approx(own, abs=1e-12)
    assert own == pytest.approx(climb(fit, value), abs=1e-6)


def test_an_autoregression_that_switches() -> None:
    length, sequences = 10, 30
    rng = np.random.default_rng(4)
    x, state = np.zeros((length, sequences)), rng.integers(0, 2, sequences)
    for t in range(length):
        state = np.where(rng.random(sequences) < 0.1, 1 - state, state)
        mean = np.array([1.0, -1.0])[state] + np.array([0.6, -0.3])[state] * x[t - 1] * (t > 0)
        x[t] = mean + 0.5 * rng.normal(size=sequences)

    def program(x: Tensor) -> None:
        matrix = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
        transition = pyro.param("transition", matrix, constraint=SIMPLEX)
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=SIMPLEX)
        a = pyro.param("a", torch.tensor([0.5, -0.5]))
        b = pyro.param("b", torch.zeros(2))
        s = pyro.param("s", torch.ones(2), constraint=POSITIVE)
        with pyro.plate("sequences", x.shape[1]):
            z: Any = None
            for t in pyro.markov(range(len(x))):
                z = pyro.sample(f"z_{t}", dist.Categorical(weights if z is None else transition[z]))
                mean = a[z] + b[z] * x[t - 1] if t else a[z]
                pyro.sample(f"x_{t}", dist.Normal(mean, s[z]), obs=x[t])

    def value(p: dict[str, Array]) -> float:
        forward = np.log(p["weights"])
        for t in range(length):
            mean = p["a"] + p["b"] * (x[t - 1][:, None] if t else 0.0)
            if t:
                steps = forward[..., None] + np.log(p["transition"])
                forward = special.logsumexp(steps, axis=-2)
            forward = forward + stats.norm.logpdf(x[t][:, None], mean, p["s"])
        return float(special.logsumexp(forward, axis=-1).mean())

    fit = TIGHT.fit(program, x)
    assert fit.converged and fit.df == 9
    assert SQUARES in line(fit, "a") and SQUARES in line(fit, "b")
    own = value({n: v.numpy() for n, v in fit.params.items()})
    assert fit.log_likelihood / sequences == pytest.approx(own, abs=1e-12)
    assert own == pytest.approx(climb(fit, value), abs=1e-6)


# ---------------------------------------------------------------------------------------
# What varies along the rows and is not affine


def test_a_product_of_parameters_is_climbed() -> None:
    y = CASES["Gaussian"].y

    def program(x: Tensor, y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(1.0))
        b = pyro.param("b", torch.ones(3))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a * (x @ b), 0.5), obs=y)

    fit = EM().fit(program, X, y)
    assert fit.converged and "ascent steps" in line(fit, "b")
    expected = X @ np.linalg.lstsq(X, y, rcond=None)[0]
    best = stats.norm.logpdf(y, expected, 0.5).sum()
    assert fit.log_likelihood / N == pytest.approx(best / N, abs=1e-8)


@pytest.mark.parametrize("kind", ["exp", "probit"])
def test_two_components_by_ascent_steps(kind: str) -> None:
    rng, shares = np.random.default_rng(5), np.array([0.6, 0.4])
    y = np.exp(0.3 * OWN) + 0.1 * rng.normal(size=N)
    if kind == "probit":
        y = rng.binomial(20, stats.norm.cdf(0.5 * OWN)) + 0.0

    def program(x: Tensor, y: Tensor) -> None:
        b = pyro.param("b", 0.3 * torch.from_numpy(BOTH))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.from_numpy(shares)))
            t = linear(b[z], x)
            chance = 0.5 * (1 + torch.erf(t / 2**0.5))
            given = dist.Binomial(20, chance) if kind == "probit" else dist.Normal(t.exp(), 0.1)
            pyro.sample("y", given, obs=y)

    def value(p: dict[str, Array]) -> float:
        t = X @ p["b"].T
        if kind == "probit":
            each = stats.binom.logpmf(y[:, None], 20, stats.norm.cdf(t))
        else:
            each = stats.norm.logpdf(y[:, None], np.exp(t), 0.1)
        return float(special.logsumexp(np.log(shares) + each, axis=1).mean())

    fit = EM(tol=1e-11, param_tol=1e-6).fit(program, X, y)
    assert fit.converged and "ascent steps" in line(fit, "b")
    own = value({n: v.numpy() for n, v in fit.params.items()})
    assert fit.log_likelihood / N == pytest.approx(own, abs=1e-12)
    assert own == pytest.approx(climb(fit, value), abs=1e-6)


def logistic(x: Tensor, y: Tensor) -> None:
    b = pyro.param("b", torch.zeros(4))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_large_covariate_saturates_no_probe(seed: int) -> None:
    """Where probabilities are 0 or 1 at the probes they seem affine in anything."""
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(300), rng.normal(size=(300, 3))])
    y = (rng.uniform(size=300) < special.expit(x @ [0.3, 1.0, -1.0, 0.5])).astype(float)
    wanted = EM().fit(logistic, x, y)
    fit = EM().fit(logistic, x * [1, 1e6, 1, 1], y)
    assert fit.converged
    assert fit.log_likelihood == pytest.approx(wanted.log_likelihood, abs=1e-6)
    scaled = fit.params["b"] * torch.tensor([1, 1e6, 1, 1])
    assert torch.allclose(scaled, wanted.params["b"], rtol=1e-4)
