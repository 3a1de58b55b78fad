"""Priors of the program: EM's mode is that of MAP, of Pyro's own SVI, and of formulas by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from draws import Draws, real
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints, transform_to

import pyroem
from pyroem import EM, MAP, Fit, Status, compare

Model = Callable[..., None]
POSITIVE, DEFINITE = constraints.positive, constraints.positive_definite
TIGHT: dict[str, Any] = {"tol": 1e-12, "param_tol": 1e-6}
DRAWS = Draws(0)
G, normal, uniform = DRAWS.generator, DRAWS.normal, DRAWS.uniform

# Rows in two states, seen in several ways.
Z = (uniform(200) < 0.4).long()
X = real([-2.0, 2.5])[Z] + real([0.7, 1.1])[Z] * normal(200)
N = torch.poisson(real([1.5, 9.0])[Z], generator=G)
WAITS = -uniform(200).log() / real([4.0, 0.3])[Z]
ITEMS = (uniform(200, 5) < real([[0.8, 0.9, 0.7, 0.2, 0.1], [0.2, 0.1, 0.3, 0.9, 0.7]])[Z]).double()
TRIL = real([[[1.0, 0.0], [0.6, 0.8]], [[0.7, 0.0], [-0.5, 0.9]]])
POINTS = real([[-2.0, 0.0], [2.0, 1.0]])[Z] + (TRIL[Z] @ normal(200, 2, 1)).squeeze(-1)
FEATURES = normal(200, 2)
RESPONSES = (real([[2.0, -1.0], [-1.0, 1.0]])[Z] * FEATURES).sum(-1) + 0.5 * normal(200)

# Rows in twelve groups, far apart; twenty tables of counts; 25 groups of trials.
GROUP = torch.arange(240) % 12
GROUPED = (1 + 1.5 * normal(12))[GROUP] + 0.5 * normal(240)
SHARES = torch._standard_gamma(real([2.0, 4.0, 6.0]).expand(20, 3), generator=G)
TABLES = torch.nn.functional.one_hot(
    torch.multinomial(SHARES, 30, replacement=True, generator=G), 3
).sum(1)
TABLES = TABLES.double()
TRIALS = torch.arange(250) % 25
WINS = (uniform(250, 6) < torch.sigmoid(0.8 * normal(25) - 0.5)[TRIALS].unsqueeze(1)).sum(1)
WINS = WINS.double()


def weights() -> Tensor:
    found: Tensor = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    return found


def param(name: str, values: Any, constraint: Any = constraints.real) -> Tensor:
    found: Tensor = pyro.param(name, torch.as_tensor(values), constraint=constraint)
    return found


def states(name: str, prior: Any) -> Tensor:
    """One draw for each state."""
    with pyro.plate(f"states of {name}", 2):
        value: Tensor = pyro.sample(name, prior)
    return value


def rows(x: Tensor, shares: Tensor, component: Callable[[Tensor], Any]) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(shares))
        pyro.sample("x", component(z), obs=x)


def gaussians(x: Tensor, loc: Tensor, scale: Tensor) -> None:
    spread = (lambda z: scale[z]) if scale.dim() else (lambda z: scale)
    rows(x, weights(), lambda z: dist.Normal(loc[z], spread(z)))


def means() -> Tensor:
    return param("loc", [-1.0, 1.0])


def scales() -> Tensor:
    return param("scale", [1.0, 1.0], POSITIVE)


# ---------------------------------------------------------------------------------------
# Programs: those of one prior are made from it


def latent_class(x: Tensor) -> None:
    shares = pyro.sample("weights", dist.Dirichlet(torch.tensor([3.0, 5.0])))
    probs = pyro.sample("probs", dist.Beta(2.0, 3.0).expand([2, 5]).to_event(2))
    rows(x, shares, lambda z: dist.Bernoulli(probs[z]).to_event(1))


def dirichlet_of_one_number(x: Tensor) -> None:
    """The concentration is a parameter too."""
    alpha = pyro.sample("alpha", dist.Gamma(5.0, 1.0))
    shares = pyro.sample("weights", dist.Dirichlet(alpha.unsqueeze(-1).expand(2)))
    scale = scales()
    rows(x, shares, lambda z: dist.Normal(torch.tensor([-2.0, 2.5])[z], scale[z]))


def counts(prior: Callable[[], Any], link: Callable[[Tensor], Tensor] = lambda t: t) -> Model:
    def model(x: Tensor) -> None:
        rate = link(states("rate", prior()))
        rows(x, weights(), lambda z: dist.Poisson(rate[z]))

    return model


def waits(prior: Callable[[], Any], link: Callable[[Tensor], Tensor] = lambda t: t) -> Model:
    def model(x: Tensor) -> None:
        rate = link(states("rate", prior()))
        rows(x, weights(), lambda z: dist.Exponential(rate[z]))

    return model


def spreads(prior: Callable[[], Any], link: Callable[[Tensor], Tensor] = lambda t: t) -> Model:
    def model(x: Tensor) -> None:
        gaussians(x, means(), link(states("spread", prior())))

    return model


def places(prior: Callable[[], Any]) -> Model:
    def model(x: Tensor) -> None:
        gaussians(x, states("loc", prior()), scales())

    return model


def vector_places(prior: Callable[[], Any]) -> Model:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", prior())
        cov = param("cov", torch.eye(2).repeat(2, 1, 1), DEFINITE)
        rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], cov[z]))

    return model


def normal_inverse_gamma(x: Tensor) -> None:
    var = states("var", dist.InverseGamma(3.0, 2.0))
    gaussians(x, states("loc", dist.Normal(0.3, (var / 0.2).sqrt())), var.sqrt())


def normal_inverse_gamma_shared(x: Tensor) -> None:
    var = pyro.sample("var", dist.InverseGamma(3.0, 2.0))
    gaussians(x, states("loc", dist.Normal(0.3, (var / 0.2).sqrt())), var.sqrt())


def normal_gamma(x: Tensor) -> None:
    precision = states("precision", dist.Gamma(3.0, 2.0))
    gaussians(x, states("loc", dist.Normal(0.3, (0.2 * precision).rsqrt())), precision.rsqrt())


def wishart(x: Tensor) -> None:
    loc = param("loc", [[-1.0, 0.0], [1.0, 0.0]])
    prior = dist.Wishart(torch.tensor(5.0), torch.tensor([[0.4, 0.1], [0.1, 0.3]]))
    precision = states("precision", prior)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], precision_matrix=precision[z]))


def wishart_shared(x: Tensor) -> None:
    loc = param("loc", [[-1.0, 0.0], [1.0, 0.0]])
    prior = dist.Wishart(torch.tensor(4.0), precision_matrix=torch.tensor([[2.0, 0.1], [0.1, 1.3]]))
    precision = pyro.sample("precision", prior)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], precision_matrix=precision))


def normal_wishart(x: Tensor) -> None:
    prior = dist.Wishart(torch.tensor(5.0), torch.tensor([[0.4, 0.1], [0.1, 0.3]]))
    precision = states("precision", prior)
    centre = dist.MultivariateNormal(torch.tensor([0.3, -0.2]), precision_matrix=0.5 * precision)
    loc = states("loc", centre)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], precision_matrix=precision[z]))


def correlations(x: Tensor) -> None:
    """Scales with a prior each, and one correlation for both states."""
    loc = param("loc", [[-1.0, 0.0], [1.0, 0.0]])
    spread = pyro.sample("spread", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.5))
    tril = spread.unsqueeze(-1) * factor
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], scale_tril=tril))


def hierarchy(spread: Callable[[], Tensor], centre: Callable[[], Tensor] | None = None) -> Model:
    """Grouped means: the population's scale is made by ``spread``."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0)) if centre is None else centre()
        tau = spread()
        with pyro.plate("groups", 12):
            loc = pyro.sample("loc", dist.Normal(mean, tau))
        sigma = param("sigma", 1.0, POSITIVE)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc[GROUP], sigma), obs=x)

    return model


def gamma_of_gamma(x: Tensor) -> None:
    b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    counts(lambda: dist.Gamma(3.0, b))(x)


def gamma_of_both(x: Tensor) -> None:
    a, b = pyro.sample("a", dist.Gamma(3.0, 1.0)), pyro.sample("b", dist.Gamma(3.0, 2.0))
    counts(lambda: dist.Gamma(a, b))(x)


def exponential_of_parameter(x: Tensor) -> None:
    b = param("b", 1.0, POSITIVE)
    counts(lambda: dist.Exponential(b))(x)


def inverse_gamma_of_gamma(x: Tensor) -> None:
    b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    spreads(lambda: dist.InverseGamma(3.0, b), torch.sqrt)(x)


def log_rates_of_population(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    var = pyro.sample("var", dist.InverseGamma(2.0, 1.0))
    counts(lambda: dist.Normal(mean, var.sqrt()), torch.exp)(x)


def two_layers(x: Tensor) -> None:
    top = pyro.sample("top", dist.Normal(0.0, 2.0))
    middle = pyro.sample("middle", dist.Normal(top, 1.0))
    gaussians(x, states("loc", dist.Normal(middle, 1.0)), scales())


def walk(x: Tensor) -> None:
    """The second mean has its prior around the first."""
    first = pyro.sample("first", dist.Normal(-1.0, 1.0))
    second = pyro.sample("second", dist.Normal(first, 1.0))
    gaussians(x, torch.stack([first, second], -1), scales())


def tables_of_dirichlet(x: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.LogNormal(torch.ones(3), 0.5).to_event(1))
    with pyro.plate("tables", 20):
        probs = pyro.sample("probs", dist.Dirichlet(alpha))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Multinomial(30, probs), obs=x)


def wins_of_beta(with_prior: bool) -> Model:
    def model(x: Tensor) -> None:
        if with_prior:
            a, b = (pyro.sample(n, dist.Gamma(2.0, 0.5)) for n in "ab")
        else:
            a, b = (param(n, 2.0, POSITIVE) for n in "ab")
        with pyro.plate("groups", 25):
            p = pyro.sample("p", dist.Beta(a, b))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Binomial(6, p[TRIALS]), obs=x)

    return model


def coefficients(features: Tensor, y: Tensor) -> None:
    """Coefficients around a population's, whose variance has a prior."""
    centre = pyro.sample("centre", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    var = pyro.sample("var", dist.InverseGamma(3.0, 2.0))
    beta = states("beta", dist.Normal(centre, var.sqrt()).to_event(1))
    scale = param("scale", 1.0, POSITIVE)
    rows(y, weights(), lambda z: dist.Normal((beta[z] * features).sum(-1), scale))


def coefficients_of_noise(features: Tensor, y: Tensor) -> None:
    """Zellner's prior: the spread of coefficients is a multiple of that of the noise."""
    var = pyro.sample("var", dist.InverseGamma(3.0, 2.0))
    beta = states("beta", dist.Normal(torch.zeros(2), (4 * var).sqrt()).to_event(1))
    rows(y, weights(), lambda z: dist.Normal((beta[z] * features).sum(-1), var.sqrt()))


CLOSED, NUMERIC = "closed form: {} kernel .*", "numerically, on the expected statistics"
NOT_CONJUGATE = f"{NUMERIC} .*the {{}} prior is not conjugate to the {{}} kernel"


def conjugate(kernel: str, prior: str) -> str:
    return CLOSED.format(kernel) + f", conjugate {prior} prior"


def found(prior: str, kernel: str) -> str:
    return NOT_CONJUGATE.format(prior, kernel)


CASES: dict[str, tuple[Model, tuple[Tensor, ...], dict[str, str]]] = {
    "Dirichlet and Beta": (
        latent_class,
        (ITEMS,),
        {"weights": conjugate("simplex", "Dirichlet"), "probs": conjugate("probability", "Beta")},
    ),
    "a Dirichlet of one number": (
        dirichlet_of_one_number,
        (X,),
        {"weights": conjugate("simplex", "Dirichlet"), "alpha": NUMERIC},
    ),
    "Gamma on rates": (
        counts(lambda: dist.Gamma(torch.tensor([2.0, 30.0]), torch.tensor([1.0, 5.0]))),
        (N,),
        {"rate": conjugate("rate", "Gamma")},
    ),
    "Exponential on rates": (
        counts(lambda: dist.Exponential(3.0)),
        (N,),
        {"rate": conjugate("rate", "Exponential")},
    ),
    "InverseGamma on rates": (
        counts(lambda: dist.InverseGamma(3.0, 4.0)),
        (N,),
        {"rate": found("InverseGamma", "rate")},
    ),
    "LogNormal on rates": (
        counts(lambda: dist.LogNormal(1.0, 0.5)),
        (N,),
        {"rate": found("LogNormal", "rate")},
    ),
    "Pareto on rates": (
        counts(lambda: dist.Pareto(1.0, 2.0)),
        (N,),
        {"rate": f"{NUMERIC} .*does not suit the rate kernel"},
    ),
    "Normal on log-rates": (
        counts(lambda: dist.Normal(1.0, 0.5), torch.exp),
        (N,),
        {"rate": "regression: .*log rate of site 'x', Normal prior"},
    ),
    "Gamma on rates of waits": (
        waits(lambda: dist.Gamma(4.0, 2.0)),
        (WAITS,),
        {"rate": conjugate("rate", "Gamma")},
    ),
    "InverseGamma on mean waits": (
        waits(lambda: dist.InverseGamma(4.0, 2.0), torch.reciprocal),
        (WAITS,),
        {"rate": conjugate("inverse rate", "InverseGamma")},
    ),
    "Gamma on precisions, p ** -0.5": (
        spreads(lambda: dist.Gamma(3.0, 2.0), lambda p: p**-0.5),
        (X,),
        {"spread": conjugate("rate", "Gamma")},
    ),
    "Gamma on precisions, p.rsqrt()": (
        spreads(lambda: dist.Gamma(3.0, 2.0), torch.rsqrt),
        (X,),
        {"spread": conjugate("rate", "Gamma")},
    ),
    "Exponential on precisions": (
        spreads(lambda: dist.Exponential(0.5), torch.rsqrt),
        (X,),
        {"spread": conjugate("rate", "Exponential")},
    ),
    "Chi2 on precisions": (
        spreads(lambda: dist.Chi2(5.0), lambda p: 1 / p.sqrt()),
        (X,),
        {"spread": conjugate("rate", "Chi2")},
    ),
    "InverseGamma on variances, v.sqrt()": (
        spreads(lambda: dist.InverseGamma(3.0, 2.0), torch.sqrt),
        (X,),
        {"spread": conjugate("inverse rate", "InverseGamma")},
    ),
    "InverseGamma on variances, v ** 0.5": (
        spreads(lambda: dist.InverseGamma(3.0, 2.0), lambda v: v**0.5),
        (X,),
        {"spread": conjugate("inverse rate", "InverseGamma")},
    ),
    **{
        f"{kind} on scales": (spreads(prior), (X,), {"spread": found(kind, "scale")})
        for kind, prior in {
            "LogNormal": lambda: dist.LogNormal(0.0, 0.5),
            "HalfNormal": lambda: dist.HalfNormal(0.5),
            "HalfCauchy": lambda: dist.HalfCauchy(0.5),
            "Gamma": lambda: dist.Gamma(3.0, 2.0),
            "InverseGamma": lambda: dist.InverseGamma(3.0, 2.0),
        }.items()
    },
    "Uniform on scales, not binding": (
        spreads(lambda: dist.Uniform(0.2, 5.0)),
        (X,),
        {"spread": CLOSED.format("scale") + "Uniform prior: clipped to its bounds"},
    ),
    "Normal on means": (
        places(lambda: dist.Normal(0.5, 1.5)),
        (X,),
        {"loc": conjugate("location", "Normal")},
    ),
    "StudentT on means": (
        places(lambda: dist.StudentT(3.0, 0.0, 1.0)),
        (X,),
        {"loc": found("StudentT", "location")},
    ),
    "Cauchy on means": (
        places(lambda: dist.Cauchy(0.0, 1.0)),
        (X,),
        {"loc": found("Cauchy", "location")},
    ),
    "Laplace on means": (
        places(lambda: dist.Laplace(0.0, 0.1)),
        (X,),
        {"loc": found("Laplace", "location")},
    ),
    "Uniform on means, not binding": (
        places(lambda: dist.Uniform(-4.0, 5.0)),
        (X,),
        {"loc": CLOSED.format("location") + "Uniform prior: clipped to its bounds"},
    ),
    "Normal on vector means": (
        vector_places(lambda: dist.Normal(torch.zeros(2, 2), torch.tensor([1.0, 3.0])).to_event(2)),
        (POINTS,),
        {"loc": conjugate("vector location", "Normal")},
    ),
    "MultivariateNormal on vector means": (
        vector_places(
            lambda: (
                dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]]))
                .expand([2])
                .to_event(1)
            )
        ),
        (POINTS,),
        {"loc": conjugate("vector location", "MultivariateNormal")},
    ),
    "normal-inverse-gamma": (
        normal_inverse_gamma,
        (X,),
        {
            "loc": conjugate("location", "Normal"),
            "var": "variance of site 'x', variance of the prior of 'loc'.*conjugate InverseGamma",
        },
    ),
    "normal-inverse-gamma, one variance": (
        normal_inverse_gamma_shared,
        (X,),
        {"loc": conjugate("location", "Normal"), "var": conjugate("inverse rate", "InverseGamma")},
    ),
    "normal-gamma": (
        normal_gamma,
        (X,),
        {"loc": conjugate("location", "Normal"), "precision": conjugate("rate", "Gamma")},
    ),
    "Wishart": (
        wishart,
        (POINTS,),
        {"precision": conjugate("precision matrix", "Wishart")},
    ),
    "one Wishart for both states": (
        wishart_shared,
        (POINTS,),
        {"precision": conjugate("precision matrix", "Wishart")},
    ),
    "Normal-Wishart": (
        normal_wishart,
        (POINTS,),
        {
            "loc": conjugate("vector location", "MultivariateNormal"),
            "precision": "of site 'x', precision_matrix of the prior of 'loc'.*conjugate Wishart",
        },
    ),
    "LKJCholesky with scales": (
        correlations,
        (POINTS,),
        {
            "spread": f"{NUMERIC} .*scale_tril of site 'x' is a function of it",
            "factor": f"{NUMERIC} .*scale_tril of site 'x' is a function of it",
        },
    ),
    "groups, InverseGamma on their variance": (
        hierarchy(lambda: pyro.sample("var", dist.InverseGamma(2.0, 1.0)).sqrt()),
        (GROUPED,),
        {
            "mean": CLOSED.format("location") + "of the prior of 'loc'.*conjugate Normal",
            "var": CLOSED.format("inverse rate") + "of the prior of 'loc'.*conjugate InverseGamma",
            "loc": conjugate("location", "Normal"),
        },
    ),
    "groups, LogNormal on their scale": (
        hierarchy(lambda: pyro.sample("tau", dist.LogNormal(0.0, 0.5))),
        (GROUPED,),
        {"tau": found("LogNormal", "scale"), "loc": conjugate("location", "Normal")},
    ),
    "groups, their mean a parameter": (
        hierarchy(lambda: pyro.sample("tau", dist.LogNormal(0.0, 0.5)), lambda: param("mean", 0.0)),
        (GROUPED,),
        {"mean": CLOSED.format("location") + "of the prior of 'loc'"},
    ),
    "a Gamma whose rate has a Gamma prior": (
        gamma_of_gamma,
        (N,),
        {
            "b": CLOSED.format("rate") + "of the prior of 'rate'.*conjugate Gamma",
            "rate": conjugate("rate", "Gamma"),
        },
    ),
    "a Gamma of two parameters": (
        gamma_of_both,
        (N,),
        {"a": found("Gamma", "shape"), "b": conjugate("rate", "Gamma")},
    ),
    "an Exponential of a parameter": (
        exponential_of_parameter,
        (N,),
        {"b": CLOSED.format("rate") + "of the prior of 'rate'"},
    ),
    "an InverseGamma whose rate has a Gamma prior": (
        inverse_gamma_of_gamma,
        (X,),
        {"b": conjugate("rate", "Gamma"), "spread": conjugate("inverse rate", "InverseGamma")},
    ),
    "log-rates of a population": (
        log_rates_of_population,
        (N,),
        {
            "mean": conjugate("location", "Normal"),
            "var": conjugate("inverse rate", "InverseGamma"),
            "rate": "regression: .*Normal prior",
        },
    ),
    "two layers": (
        two_layers,
        (X,),
        {name: conjugate("location", "Normal") for name in ("top", "middle", "loc")},
    ),
    "a walk": (
        walk,
        (X,),
        {
            "first": "loc of site 'x', loc of the prior of 'second'.*conjugate Normal",
            "second": conjugate("location", "Normal"),
        },
    ),
    "a Dirichlet whose concentration has a prior": (
        tables_of_dirichlet,
        (TABLES,),
        {"alpha": NUMERIC, "probs": conjugate("simplex", "Dirichlet")},
    ),
    "a Beta whose concentrations have priors": (
        wins_of_beta(True),
        (WINS,),
        {"a": NUMERIC, "b": NUMERIC, "p": conjugate("probability", "Beta")},
    ),
    "a Beta whose concentrations are parameters": (
        wins_of_beta(False),
        (WINS,),
        {"a": NUMERIC, "b": NUMERIC, "p": conjugate("probability", "Beta")},
    ),
    "coefficients of a population": (
        coefficients,
        (FEATURES, RESPONSES),
        {
            "centre": conjugate("location", "Normal"),
            "var": conjugate("inverse rate", "InverseGamma"),
            "beta": "regression: weighted least squares .*Normal prior",
        },
    ),
    "coefficients that spread as the noise": (
        coefficients_of_noise,
        (FEATURES, RESPONSES),
        {
            "var": "variance of site 'x', variance of the prior of 'beta'.*conjugate InverseGamma",
            "beta": "regression: weighted least squares .*Normal prior",
        },
    ),
}


def steepest(model: Model, fit: Fit, data: tuple[Tensor, ...]) -> float:
    """The largest element of the gradient per row, in the unconstrained space."""
    parameters = fit.problem.structure.parameters
    maps = {name: transform_to(p.constraint) for name, p in parameters.items()}
    raw = {n: maps[n].inv(v).detach().requires_grad_() for n, v in fit.params.items()}
    value = pyroem.log_joint(model, {n: maps[n](r) for n, r in raw.items()}, *data)
    gradients = torch.autograd.grad(value, list(raw.values()))
    return max(float(g.abs().max()) for g in gradients) / len(data[0])


def line_of(fit: Fit, name: str) -> str:
    """What ``explain()`` says of a parameter."""
    lines = fit.explain().split("each parameter:\n")[1].splitlines()
    return next(line for line in lines if line.startswith(f"  {name} ("))


@pytest.mark.parametrize("name", CASES)
def test_em_finds_the_mode_of_map(name: str) -> None:
    model, data, rungs = CASES[name]
    solvers = {"EM": EM(**TIGHT), "MAP": MAP(**TIGHT)}
    fits = compare(model, *data, solvers=solvers, init="kmeans").fits
    a, b = fits["EM"], fits["MAP"]
    assert a.converged and b.converged
    assert a.log_joint == pytest.approx(b.log_joint, abs=1e-8 * len(data[0]))
    assert steepest(model, a, data) < 1e-5
    for parameter, words in rungs.items():
        assert re.search(words, line_of(a, parameter)), line_of(a, parameter)


# ---------------------------------------------------------------------------------------
# Pyro's own: AutoDelta with TraceEnum_ELBO


@contextmanager
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def svi(model: Model, fit: Fit, data: tuple[Tensor, ...], steps: int = 30) -> list[float]:
    """The log joint along plain Pyro's way from the fit on."""
    parameters = fit.problem.structure.parameters
    drawn = {n: v for n, v in fit.params.items() if parameters[n].has_prior}
    for name, value in fit.params.items():
        if name not in drawn:
            pyro.param(name, value.clone(), constraint=parameters[name].constraint)
    start = init_to_value(values=drawn)
    guide = AutoDelta(poutine.block(model, expose=list(drawn)), init_loc_fn=start)
    way = SVI(
        config_enumerate(model),
        guide,
        Adam({"lr": 1e-3}),
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    )
    return [-way.step(*data) for _ in range(steps)]


@pytest.mark.parametrize(
    "name",
    [
        "Dirichlet and Beta",
        "Gamma on rates",
        "Gamma on precisions, p ** -0.5",
        "LogNormal on scales",
        "normal-inverse-gamma",
        "Normal-Wishart",
        "LKJCholesky with scales",
        "groups, InverseGamma on their variance",
        "a Gamma whose rate has a Gamma prior",
        "a Dirichlet whose concentration has a prior",
        "coefficients of a population",
    ],
)
def test_svi_finds_nothing_better(name: str) -> None:
    model, data, _ = CASES[name]
    fit = EM(**TIGHT).fit(model, *data, init="kmeans")
    with double_precision():
        way = svi(model, fit, data)
    assert way[0] == pytest.approx(fit.log_joint, rel=1e-10)
    assert max(way) <= fit.log_joint + 1e-6 * len(data[0])


# ---------------------------------------------------------------------------------------
# One component: formulas by hand


def single(fit: Fit, name: str) -> float:
    return float(fit.params[name])


def test_the_mode_of_a_gamma_poisson_model() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(4.0, 2.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    fit = EM().fit(model, N)
    assert single(fit, "rate") == pytest.approx(float((3 + N.sum()) / (2.5 + len(N))), rel=1e-12)


def test_the_mode_of_a_gamma_exponential_model() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(4.0, 2.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    fit = EM().fit(model, WAITS)
    wanted = float((3 + len(WAITS)) / (2.5 + WAITS.sum()))
    assert single(fit, "rate") == pytest.approx(wanted, rel=1e-12)


def test_the_mode_of_a_beta_bernoulli_model() -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(4.0, 2.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    x = ITEMS[:, 0]
    fit = EM().fit(model, x)
    assert single(fit, "p") == pytest.approx(float((3 + x.sum()) / (4.5 + len(x))), rel=1e-12)


def test_the_mode_of_a_dirichlet_categorical_model() -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([4.0, 1.0, 2.5])))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(p), obs=x)

    x = torch.arange(100) ** 2 % 3
    wanted = torch.bincount(x, minlength=3) + real([3.0, 0.0, 1.5])
    fit = EM().fit(model, x)
    torch.testing.assert_close(fit.params["p"], wanted / wanted.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mode_of_a_normal_normal_model(weighted: bool) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(5.0, 0.2))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.5), obs=x)

    w = torch.arange(200).double() % 3 if weighted else torch.ones(200).double()
    fit = EM().fit(model, X, weights=w)
    above = float((w * X).sum() / 1.5**2 + 5 / 0.2**2)
    assert single(fit, "loc") == pytest.approx(above / float(w.sum() / 2.25 + 25), rel=1e-12)


def test_the_mode_of_a_normal_inverse_gamma_model() -> None:
    centre, kappa, a, b = 1.0, 7.0, 3.0, 2.0

    def model(x: Tensor) -> None:
        var = pyro.sample("var", dist.InverseGamma(a, b))
        loc = pyro.sample("loc", dist.Normal(centre, (var / kappa).sqrt()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, var.sqrt()), obs=x)

    fit = EM(**TIGHT).fit(model, X)
    n, loc = len(X), float((X.sum() + kappa * centre) / (len(X) + kappa))
    squares = float(((X - loc) ** 2).sum()) + kappa * (loc - centre) ** 2
    assert single(fit, "loc") == pytest.approx(loc, rel=1e-10)
    assert single(fit, "var") == pytest.approx((b + squares / 2) / (a + 1 + (n + 1) / 2), rel=1e-10)


@pytest.mark.parametrize("jointly", [False, True], ids=["Wishart", "Normal-Wishart"])
def test_the_mode_of_a_wishart_model(jointly: bool) -> None:
    scale, df, kappa, centre = real([[0.4, 0.1], [0.1, 0.3]]), 6.0, 5.0, real([1.0, -1.0])

    def model(x: Tensor) -> None:
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(df), scale))
        prior = dist.MultivariateNormal(centre, precision_matrix=kappa * precision)
        loc = pyro.sample("loc", prior) if jointly else centre
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(loc, precision_matrix=precision), obs=x)

    fit = EM(**TIGHT).fit(model, POINTS)
    n, extra = len(POINTS), kappa if jointly else 0.0
    loc = (POINTS.sum(0) + kappa * centre) / (n + kappa) if jointly else centre
    apart = (POINTS - loc).T @ (POINTS - loc) + extra * torch.outer(loc - centre, loc - centre)
    wanted = (df - 3 + n + jointly) * torch.inverse(torch.inverse(scale) + apart)
    torch.testing.assert_close(fit.params["precision"], wanted, rtol=1e-9, atol=1e-9)
    if jointly:
        torch.testing.assert_close(fit.params["loc"], loc, rtol=1e-9, atol=1e-9)


def test_the_mode_of_grouped_means() -> None:
    """The population's variance and the groups' means satisfy their equations together."""

    def model(x: Tensor) -> None:
        var = pyro.sample("var", dist.InverseGamma(2.0, 1.0))
        with pyro.plate("groups", 12):
            loc = pyro.sample("loc", dist.Normal(0.5, var.sqrt()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc[GROUP], 0.5), obs=x)

    fit = EM(**TIGHT).fit(model, GROUPED)
    var, loc = fit.params["var"], fit.params["loc"]
    sums = torch.zeros(12).double().index_add(0, GROUP, GROUPED)
    torch.testing.assert_close(loc, (sums / 0.25 + 0.5 / var) / (20 / 0.25 + 1 / var))
    torch.testing.assert_close(var, (1 + ((loc - 0.5) ** 2).sum() / 2) / (2 + 1 + 12 / 2))


@pytest.mark.parametrize("shift", [0.05, 3.0], ids=["at the kink", "off the kink"])
def test_the_mode_under_a_laplace_prior(shift: float) -> None:
    """The lasso: a soft threshold."""

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Laplace(0.0, 0.01))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = shift + X[:50] - X[:50].mean()
    fit = EM().fit(model, x)
    wanted = max(shift - 100 / 50, 0.0)
    assert single(fit, "loc") == pytest.approx(wanted, abs=1e-9)
    assert fit.status is (Status.CONVERGED if wanted else Status.STALLED)


# ---------------------------------------------------------------------------------------
# Priors with bounds


BOUNDED: dict[str, tuple[Model, str, float, float]] = {
    "scales": (spreads(lambda: dist.Uniform(0.8, 1.0)), "spread", 0.8, 1.0),
    "variances": (spreads(lambda: dist.Uniform(0.1, 0.8), torch.sqrt), "spread", 0.1, 0.8),
    "precisions": (spreads(lambda: dist.Uniform(0.1, 1.2), torch.rsqrt), "spread", 0.1, 1.2),
    "means": (places(lambda: dist.Uniform(-1.5, 5.0)), "loc", -1.5, 5.0),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_uniform_prior_that_binds(name: str) -> None:
    """At a bound the slope points outwards, elsewhere it vanishes."""
    model, parameter, low, high = BOUNDED[name]
    fit = EM(**TIGHT).fit(model, X)
    assert fit.converged and "clipped to its bounds" in line_of(fit, parameter)
    leaves = {n: v.clone().requires_grad_() for n, v in fit.params.items()}
    value = fit.params[parameter]
    total = pyroem.log_joint(model, leaves, X)
    (slope,) = torch.autograd.grad(total, leaves[parameter])
    at_low, at_high = value <= low + 1e-9, value >= high - 1e-9
    assert bool((at_low | at_high).any())
    assert bool((slope[at_low] < 0).all() and (slope[at_high] > 0).all())
    assert float(slope[~(at_low | at_high)].abs().sum()) < 1e-5 * len(X)
    again = MAP(**TIGHT).fit(model, X, init=fit)
    assert again.log_joint <= fit.log_joint + 1e-8 * len(X)


def test_a_mode_at_the_boundary() -> None:
    """No counts in one group, and a density that is finite at a rate of zero."""

    def model(x: Tensor) -> None:
        rate = states("rate", dist.Exponential(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate[Z]), obs=x)

    x = torch.where(Z == 0, 0.0, N)
    fit = EM().fit(model, x)
    assert fit.converged and float(fit.params["rate"][0]) == pytest.approx(0, abs=1e-50)
    assert float(fit.params["rate"][1]) == pytest.approx(float(x.sum() / (1 + Z.sum())), rel=1e-12)


# ---------------------------------------------------------------------------------------
# What else a fit does with priors


def mixed(x: Tensor) -> None:
    """Conjugate priors, one that is not, and a parameter without any."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([3.0, 5.0])))
    loc = states("loc", dist.Normal(0.3, 0.5))
    scale = states("scale", dist.LogNormal(0.0, 0.5))
    shift = param("shift", 0.1)
    rows(x, shares, lambda z: dist.Normal(loc[z] + shift, scale[z]))


START: dict[str, Any] = {
    "shares": real([0.5, 0.5]),
    "loc": real([-1.0, 1.0]),
    "scale": real([1.0, 1.0]),
    "shift": real(0.0),
}


def test_a_prior_counts_once_whatever_the_weights() -> None:
    w = torch.arange(200) % 3
    repeated = EM(**TIGHT).fit(mixed, X.repeat_interleave(w), init=START)
    for solver in (EM(**TIGHT), EM(engine="trace", **TIGHT), MAP(**TIGHT)):
        fit = solver.fit(mixed, X, weights=w, init=START)
        assert fit.log_joint == pytest.approx(repeated.log_joint, abs=1e-8 * 200)
        assert fit.log_prior == pytest.approx(repeated.log_prior, abs=1e-5)


@pytest.mark.parametrize("accelerate", ["anderson", "squarem"])
def test_accelerated_fits_find_the_same_mode(accelerate: str) -> None:
    plain = EM(**TIGHT).fit(mixed, X, init=START)
    fit = EM(accelerate=accelerate, **TIGHT).fit(mixed, X, init=START)
    assert fit.converged and fit.n_iter <= plain.n_iter
    assert fit.log_joint == pytest.approx(plain.log_joint, abs=1e-8 * 200)


def test_single_precision() -> None:
    wanted = EM(**TIGHT).fit(mixed, X, init=START)
    fit = EM(dtype=torch.float32).fit(mixed, X, init=START)
    assert fit.params["loc"].dtype == torch.float32
    assert fit.log_joint == pytest.approx(wanted.log_joint, abs=1e-4 * 200)


def test_the_log_prior_is_the_density_in_the_constrained_space() -> None:
    fit = EM().fit(mixed, X, init=START)
    p = fit.params
    wanted = dist.Dirichlet(real([3.0, 5.0])).log_prob(p["shares"])
    wanted = wanted + dist.Normal(real(0.3), real(0.5)).log_prob(p["loc"]).sum()
    wanted = wanted + dist.LogNormal(real(0.0), real(0.5)).log_prob(p["scale"]).sum()
    assert fit.log_prior == pytest.approx(float(wanted), rel=1e-10)
    assert fit.log_joint == pytest.approx(fit.log_likelihood + fit.log_prior, rel=1e-14)


def test_starts_are_drawn_from_the_priors() -> None:
    fit = EM(max_iter=300).fit(latent_class, ITEMS, init="prior", seed=3, restarts=3)
    assert len(fit.restarts) == 3 and "draws from the priors" in fit.start
    best = EM().fit(latent_class, ITEMS)
    assert fit.log_joint <= best.log_joint + 1e-4


# ---------------------------------------------------------------------------------------
# A hierarchical scale without a prior: the density has no maximum

ERRORS = real([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
EFFECTS = real([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(prior: Callable[[Tensor], Any]) -> Model:
    """Eight groups that say little (Rubin, 1981)."""

    def model(y: Tensor) -> None:
        of_effects = prior(param("mean", 0.0))
        with pyro.plate("schools", 8):
            effect = pyro.sample("effect", of_effects)
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Normal(effect, ERRORS), obs=y)

    return model


COLLAPSING: dict[str, Model] = {
    "tau": schools(lambda m: dist.Normal(m, param("tau", 5.0, POSITIVE))),
    "var": schools(lambda m: dist.Normal(m, param("var", 25.0, POSITIVE).sqrt())),
    "precision": schools(lambda m: dist.Normal(m, param("precision", 0.1, POSITIVE).rsqrt())),
    "log_tau": schools(lambda m: dist.Normal(m, param("log_tau", 1.0).exp())),
}


@pytest.mark.parametrize("name", COLLAPSING)
@pytest.mark.parametrize("solver", [EM(), MAP(), EM(floor=0)], ids=["EM", "MAP", "no floor"])
def test_a_hierarchical_scale_without_a_prior(name: str, solver: Any) -> None:
    fit = solver.fit(COLLAPSING[name], EFFECTS)
    assert fit.status is Status.DEGENERATE
    assert re.search(rf"\b{name}\b", fit.message) and "prior of 'effect'" in fit.message
    assert "give that scale a prior" in fit.message and "no maximum" in fit.message


@pytest.mark.parametrize("solver", [EM(), MAP()], ids=["EM", "MAP"])
def test_means_of_components_with_a_scale_without_a_prior(solver: Any) -> None:
    def model(x: Tensor) -> None:
        loc = states("loc", dist.Normal(param("mean", 0.0), param("tau", 1.0, POSITIVE)))
        gaussians(x, loc, scales())

    fit = solver.fit(model, 0.1 * X)
    assert fit.status is Status.DEGENERATE
    assert "tau (the spread of the prior of 'loc')" in fit.message


def test_a_prior_that_keeps_the_scale_off_zero_mends_it() -> None:
    model = schools(lambda m: dist.Normal(m, pyro.sample("tau", dist.LogNormal(1.0, 0.5))))
    solvers = {"EM": EM(accelerate="anderson", **TIGHT), "MAP": MAP(**TIGHT)}
    fits = compare(model, EFFECTS, solvers=solvers).fits
    assert fits["EM"].converged and steepest(model, fits["EM"], (EFFECTS,)) < 1e-5
    assert fits["EM"].log_joint == pytest.approx(fits["MAP"].log_joint, abs=1e-8 * 8)


def test_groups_far_apart_have_a_local_maximum() -> None:
    """The density is unbounded at a scale of zero, but far from there it has a maximum too."""
    model = hierarchy(lambda: param("tau", 1.0, POSITIVE))
    solvers = {"EM": EM(**TIGHT), "MAP": MAP(**TIGHT)}
    init = {"mean": real(0.0), "loc": GROUPED[:12], "tau": real(1.0), "sigma": real(1.0)}
    fits = compare(model, GROUPED, solvers=solvers, init=init).fits
    assert fits["EM"].converged and steepest(model, fits["EM"], (GROUPED,)) < 1e-5
    assert fits["EM"].log_joint == pytest.approx(fits["MAP"].log_joint, abs=1e-8 * 240)
    assert 1 < single(fits["EM"], "tau") < 2


@pytest.mark.parametrize(
    "prior",
    [
        lambda m: dist.Normal(m, param("tau", 5.0, POSITIVE) ** 1.5),
        lambda m: dist.StudentT(4.0, m, param("tau", 5.0, POSITIVE)),
    ],
    ids=["a function", "StudentT"],
)
def test_other_hierarchical_scales_without_a_prior(prior: Callable[[Tensor], Any]) -> None:
    fit = EM(max_iter=50).fit(schools(prior), EFFECTS)
    assert fit.status is Status.DEGENERATE and "tau" in fit.message


def test_a_density_that_is_infinite_at_the_boundary() -> None:
    """No counts in one group, and a prior whose density is infinite at a rate of zero."""

    def model(x: Tensor) -> None:
        rate = states("rate", dist.Gamma(0.5, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate[Z]), obs=x)

    assert not EM().fit(model, torch.where(Z == 0, 0.0, N)).converged


def test_the_reason_why_a_masked_prior_has_no_closed_form() -> None:
    def model(x: Tensor) -> None:
        with poutine.mask(mask=torch.tensor([True, False])):
            loc = states("loc", dist.Normal(0.5, 1.5))
        gaussians(x, loc, scales())

    fits = compare(model, X, solvers={"EM": EM(**TIGHT), "MAP": MAP(**TIGHT)}).fits
    assert fits["EM"].log_joint == pytest.approx(fits["MAP"].log_joint, abs=1e-8 * 200)
    assert "mask" in line_of(fits["EM"], "loc")
