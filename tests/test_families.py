"""Every family against SciPy: the weighted maximum of one component, found independently."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import AffineTransform, constraints

from pyroem import EM, families
from pyroem.families import family_of

POSITIVE, UNIT, REAL = constraints.positive, constraints.unit_interval, constraints.real
RNG = np.random.default_rng(0)
WEIGHTS = RNG.uniform(0.2, 2.0, 200)

# For each family: the distribution of named parameters, their constraints, data, and the
# log-density of SciPy.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], Any, Callable[..., Any]]] = {
    "gamma": (
        lambda a, b: dist.Gamma(a, b),
        {"a": POSITIVE, "b": POSITIVE},
        RNG.gamma(30.0, 0.1, 200),
        lambda x, a, b: stats.gamma.logpdf(x, a, scale=1 / b),
    ),
    "gamma by its scale": (
        lambda a, s: dist.Gamma(a, 1 / s),
        {"a": POSITIVE, "s": POSITIVE},
        RNG.gamma(0.4, 3.0, 200),
        lambda x, a, s: stats.gamma.logpdf(x, a, scale=s),
    ),
    "inverse gamma": (
        lambda a, b: dist.InverseGamma(a, b),
        {"a": POSITIVE, "b": POSITIVE},
        1 / RNG.gamma(4.0, 0.5, 200),
        lambda x, a, b: stats.invgamma.logpdf(x, a, scale=b),
    ),
    "log-normal": (
        lambda m, s: dist.LogNormal(m, s),
        {"m": REAL, "s": POSITIVE},
        RNG.lognormal(3.0, 0.4, 200),
        lambda x, m, s: stats.lognorm.logpdf(x, s, scale=np.exp(m)),
    ),
    "Gamma of a shifted variable": (
        lambda a, b: dist.TransformedDistribution(dist.Gamma(a, b), [AffineTransform(3.0, -2.0)]),
        {"a": POSITIVE, "b": POSITIVE},
        3 - 2 * RNG.gamma(3.0, 0.5, 200),
        lambda x, a, b: stats.gamma.logpdf((3 - x) / 2, a, scale=1 / b) - np.log(2),
    ),
    "half-normal": (
        lambda s: dist.HalfNormal(s),
        {"s": POSITIVE},
        np.abs(RNG.normal(0, 3.0, 200)),
        lambda x, s: stats.halfnorm.logpdf(x, scale=s),
    ),
    "half-normal by its variance": (
        lambda v: dist.HalfNormal(v.sqrt()),
        {"v": POSITIVE},
        np.abs(RNG.normal(0, 0.1, 200)),
        lambda x, v: stats.halfnorm.logpdf(x, scale=v**0.5),
    ),
    "half-normal by its precision": (
        lambda t: dist.HalfNormal(t**-0.5),
        {"t": POSITIVE},
        np.abs(RNG.normal(0, 0.1, 200)),
        lambda x, t: stats.halfnorm.logpdf(x, scale=t**-0.5),
    ),
    "half-normal by its log scale": (
        lambda t: dist.HalfNormal(t.exp()),
        {"t": REAL},
        np.abs(RNG.normal(0, 0.1, 200)),
        lambda x, t: stats.halfnorm.logpdf(x, scale=np.exp(t)),
    ),
    "beta": (
        lambda a, b: dist.Beta(a, b),
        {"a": POSITIVE, "b": POSITIVE},
        RNG.beta(2.0, 5.0, 200),
        lambda x, a, b: stats.beta.logpdf(x, a, b),
    ),
    "von Mises": (
        lambda m, k: dist.VonMises(m, k),
        {"m": REAL, "k": POSITIVE},
        RNG.vonmises(2.5, 4.0, 200),
        lambda x, m, k: stats.vonmises.logpdf(x, k, loc=m),
    ),
    "negative binomial": (
        lambda p: dist.NegativeBinomial(2.5, p),
        {"p": UNIT},
        RNG.negative_binomial(2.5, 0.4, 200) + 0.0,
        lambda x, p: stats.nbinom.logpmf(x, 2.5, 1 - p),
    ),
    "geometric": (
        lambda p: dist.Geometric(p),
        {"p": UNIT},
        RNG.geometric(0.3, 200) - 1.0,
        lambda x, p: stats.geom.logpmf(x + 1, p),
    ),
    "Student's t": (
        lambda df, m, s: dist.StudentT(df, m, s),
        {"df": POSITIVE, "m": REAL, "s": POSITIVE},
        5 + 0.3 * RNG.standard_t(3.0, 200),
        lambda x, df, m, s: stats.t.logpdf(x, df, m, s),
    ),
    "Student's t, df given": (
        lambda m, v: dist.StudentT(4.0, m, v.sqrt()),
        {"m": REAL, "v": POSITIVE},
        1e4 + 30 * RNG.standard_t(3.0, 200),
        lambda x, m, v: stats.t.logpdf(x, 4.0, m, v**0.5),
    ),
    "Laplace": (
        lambda m, s: dist.Laplace(m, s),
        {"m": REAL, "s": POSITIVE},
        RNG.laplace(3.0, 2.0, 200),
        lambda x, m, s: stats.laplace.logpdf(x, m, s),
    ),
    "Weibull": (
        lambda a, k: dist.Weibull(a, k),
        {"a": POSITIVE, "k": POSITIVE},
        40 * RNG.weibull(2.5, 200),
        lambda x, a, k: stats.weibull_min.logpdf(x, k, scale=a),
    ),
    "Gumbel": (
        lambda m, s: dist.Gumbel(m, s),
        {"m": REAL, "s": POSITIVE},
        RNG.gumbel(3.0, 0.5, 200),
        lambda x, m, s: stats.gumbel_r.logpdf(x, m, s),
    ),
    "negative binomial, both": (
        lambda r, p: dist.NegativeBinomial(r, p),
        {"r": POSITIVE, "p": UNIT},
        RNG.negative_binomial(2.5, 0.2, 200) + 0.0,
        lambda x, r, p: stats.nbinom.logpmf(x, r, 1 - p),
    ),
    "beta-binomial": (
        lambda a, b: dist.BetaBinomial(a, b, 12),
        {"a": POSITIVE, "b": POSITIVE},
        RNG.binomial(12, RNG.beta(2.0, 3.0, 200)) + 0.0,
        lambda x, a, b: stats.betabinom.logpmf(x, 12, a, b),
    ),
    "zero-inflated Poisson": (
        lambda r, g: dist.ZeroInflatedPoisson(r, gate=g),
        {"r": POSITIVE, "g": UNIT},
        RNG.poisson(2.0, 200) * (RNG.random(200) < 0.7) + 0.0,
        lambda x, r, g: np.log(g * (x == 0) + (1 - g) * stats.poisson.pmf(x, r)),
    ),
    "zero-inflated negative binomial": (
        lambda p, g: dist.ZeroInflatedNegativeBinomial(2.0 * p.new_ones(1), probs=p, gate_logits=g),
        {"p": UNIT, "g": REAL},
        RNG.negative_binomial(2.0, 0.3, 200) * (RNG.random(200) < 0.7) + 0.0,
        lambda x, p, g: np.log(
            (x == 0) / (1 + np.exp(-g)) + stats.nbinom.pmf(x, 2.0, 1 - p) / (1 + np.exp(g))
        ),
    ),
    "zero-inflated negative binomial, all": (
        lambda r, p, g: dist.ZeroInflatedNegativeBinomial(r, probs=p, gate=g),
        {"r": POSITIVE, "p": UNIT, "g": UNIT},
        RNG.negative_binomial(4.0, 0.3, 200) * (RNG.random(200) < 0.7) + 0.0,
        lambda x, r, p, g: np.log(g * (x == 0) + (1 - g) * stats.nbinom.pmf(x, r, 1 - p)),
    ),
    "geometric by its logit": (
        lambda t: dist.Geometric(logits=t),
        {"t": REAL},
        RNG.geometric(0.03, 200) - 1.0,
        lambda x, t: stats.geom.logpmf(x + 1, 1 / (1 + np.exp(-t))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_weighted_maximum_is_that_of_scipy(name: str) -> None:
    make, supports, x, log_density = CASES[name]

    def program(x: Tensor) -> None:
        values = {n: pyro.param(n, torch.tensor(0.5), constraint=c) for n, c in supports.items()}
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(1)))
            pyro.sample("x", make(**values), obs=x)

    fit = EM(tol=1e-13, param_tol=1e-10).fit(program, x, weights=WEIGHTS)
    assert fit.converged, str(fit)
    assert "gradient" not in fit.explain()
    start = [float(fit.params[n]) * 1.1 + 0.01 for n in supports]
    best = optimize.minimize(
        lambda v: -np.sum(WEIGHTS * log_density(x, *v)) if np.isfinite(v).all() else np.inf,
        start,
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-11, "maxiter": 4000, "maxfev": 4000},
    )
    # torch's Bessel function of the von Mises distribution is good to 1e-7
    close = 1e-6 if name == "von Mises" else 1e-8
    assert fit.log_likelihood / len(x) == pytest.approx(-best.fun / len(x), abs=close)
    for parameter, value in zip(supports, best.x, strict=True):
        assert float(fit.params[parameter]) == pytest.approx(value, rel=1e-4)


def test_the_table_in_the_readme_names_every_family() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme.split("| family | arguments | conjugate priors |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    named: dict[str, tuple[str, str]] = {}
    for names, arguments, priors in rows:
        named.update({n: (arguments, priors) for n in re.findall(r"`(\w+)`", names)})
    shipped = {
        kind: family
        for kind, family in families.family._REGISTRY.items()
        if kind.__module__.split(".")[0] in ("torch", "pyro")
    }
    found = {kind.__name__: family for kind, family in shipped.items()}
    assert set(named) == {*found, "LogNormal"}
    for name, family in found.items():
        arguments, priors = named[name]
        assert ("none" in arguments) == (not any(c.form.known for c in family.coordinates)), name
        conjugate = {p.__name__ for c in family.coordinates for p in c.form.conjugate}
        alike = set(named) if "as" in priors else set[str]()
        assert set(re.findall(r"`(\w+)`", priors)) <= conjugate | alike, name


def test_a_transform_that_depends_on_a_parameter_is_no_family() -> None:
    def program(x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            moved = [AffineTransform(shift[z], 2.0)]
            pyro.sample("x", dist.TransformedDistribution(dist.Normal(0.0, 1.0), moved), obs=x)

    x = 2 * RNG.normal(size=200) + np.where(np.arange(200) % 2, -6.0, 6.0)
    fit = EM().fit(program, x)
    assert "no exponential family is registered for TransformedDistribution" in fit.explain()
    assert sorted(fit.params["shift"].tolist()) == pytest.approx(
        [x[x < 0].mean(), x[x > 0].mean()], abs=0.1
    )


POINTS = RNG.normal(size=(200, 3)) @ RNG.normal(size=(3, 3)) + [5.0, -3.0, 0.0]
LOWER = [(i, j) for i in range(3) for j in range(i + 1)]


def _tril(v: Any) -> Any:
    result = np.zeros((3, 3))
    for value, (i, j) in zip(v, LOWER, strict=True):
        result[i, j] = np.exp(value) if i == j else value
    return result


# The same for families with vectors and matrices: the distribution of all parameters, their starts
# and constraints, data, and the log-density of SciPy as a function of one unconstrained vector.
VECTORS: dict[str, tuple[Callable[..., Any], dict[str, Any], Any, int, Callable[..., Any], str]] = {
    "Dirichlet": (
        lambda alpha: dist.Dirichlet(alpha),
        {"alpha": (torch.ones(3), POSITIVE)},
        RNG.dirichlet([1.5, 4.0, 2.0], 200),
        3,
        lambda x, v: np.array([stats.dirichlet.logpdf(row, np.exp(v)) for row in x]),
        "on the expected statistics",
    ),
    "DirichletMultinomial": (
        lambda alpha: dist.DirichletMultinomial(alpha, 20),
        {"alpha": (torch.ones(3), POSITIVE)},
        np.array([RNG.multinomial(20, RNG.dirichlet([2.0, 5.0, 3.0])) for _ in range(200)]) + 0.0,
        3,
        lambda x, v: stats.dirichlet_multinomial.logpmf(x, np.exp(v), 20),
        "on the weighted rows",
    ),
    "MultivariateStudentT": (
        lambda df, loc, tril: dist.MultivariateStudentT(df, loc, tril),
        {
            "df": (torch.tensor(5.0), POSITIVE),
            "loc": (torch.zeros(3), REAL),
            "tril": (torch.eye(3), constraints.lower_cholesky),
        },
        POINTS / np.sqrt(RNG.chisquare(4, (200, 1)) / 4),
        10,
        lambda x, v: stats.multivariate_t.logpdf(
            x, v[:3], _tril(v[4:]) @ _tril(v[4:]).T, df=np.exp(v[3])
        ),
        "degrees of freedom kernel",
    ),
    "LowRankMultivariateNormal": (
        lambda loc, factor, diagonal: dist.LowRankMultivariateNormal(loc, factor, diagonal),
        {
            "loc": (torch.zeros(3), REAL),
            "factor": (torch.ones(3, 1), REAL),
            "diagonal": (torch.ones(3), POSITIVE),
        },
        RNG.normal(size=(200, 1)) * [[1.0, -2.0, 0.5]] + RNG.normal(size=(200, 3)) + 4.0,
        9,
        lambda x, v: stats.multivariate_normal.logpdf(
            x, v[:3], np.outer(v[3:6], v[3:6]) + np.diag(np.exp(v[6:]))
        ),
        "on the expected statistics",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_weighted_maximum_of_vectors_is_that_of_scipy(name: str) -> None:
    make, parameters, x, size, log_density, rung = VECTORS[name]

    def program(x: Tensor) -> None:
        values = {n: pyro.param(n, v, constraint=c) for n, (v, c) in parameters.items()}
        with pyro.plate("rows", len(x)):
            pyro.sample("x", make(**values), obs=x)

    fit = EM(tol=1e-14, param_tol=1e-8, max_iter=5000).fit(program, x, weights=WEIGHTS)
    assert fit.converged and rung in fit.explain() and "gradient" not in fit.explain()
    start = np.full(size, 0.1)
    if x.min() < 0 or x.max() > 1:
        start[:3] = np.average(x, 0, WEIGHTS) if size > 3 else 0.5
    best = optimize.minimize(
        lambda v: -np.mean(WEIGHTS * log_density(x, v)), start, method="BFGS", tol=1e-9
    )
    assert fit.log_likelihood / len(x) == pytest.approx(-best.fun, abs=1e-8)


@pytest.mark.parametrize("shape", [1e-3, 0.3, 1.0, 50.0, 1e6])
def test_shapes_small_and_large(shape: float) -> None:
    """The Newton iterations of the shape end where the derivative vanishes."""
    family = family_of(dist.Gamma(1.0, 1.0))
    assert family is not None
    t, rate = torch.tensor(shape, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    mean_log = torch.digamma(t) - rate.log()
    coordinate = family.coordinates[0]
    assert coordinate.profile is not None
    args = {"concentration": one, "rate": rate}
    for c in (coordinate, coordinate.profile):
        found = c.form.mode(*c.coefficients((t / rate, mean_log), one, args))
        assert float(found) == pytest.approx(shape, rel=1e-6)
