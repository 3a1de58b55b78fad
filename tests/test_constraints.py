"""Held elements, equal parameters, bounds, orders, and the number of free parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draws import Draws, real
from problems import PROBLEMS
from pyro import poutine
from scipy import optimize, stats
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, MAP, Fit, SettingError, StepwiseEM, compare

Model = Callable[..., None]
POSITIVE, SIMPLEX, UNIT = constraints.positive, constraints.simplex, constraints.unit_interval
DEFINITE, ORDERED = constraints.positive_definite, dist.constraints.ordered_vector
TIGHT: dict[str, Any] = {"tol": 1e-12, "param_tol": 1e-7, "max_iter": 5000}
DRAWS = Draws(0)
G, normal, uniform = DRAWS.generator, DRAWS.normal, DRAWS.uniform

# Rows in two states, seen in several ways.
Z = (uniform(200) < 0.4).long()
X = real([-2.0, 2.5])[Z] + real([0.7, 1.1])[Z] * normal(200)
X3 = real([-4.0, 0.0, 4.0])[torch.arange(200) % 3] + normal(200)
N = torch.poisson(real([1.5, 9.0])[Z], generator=G)
WAITS = -uniform(200).log() / real([4.0, 0.3])[Z]
ITEMS = (uniform(200, 5) < real([[0.8, 0.9, 0.7, 0.2, 0.1], [0.2, 0.1, 0.3, 0.9, 0.7]])[Z]).double()
ANSWERS = torch.multinomial(
    real([[0.45, 0.3, 0.15, 0.1], [0.1, 0.15, 0.3, 0.45]])[Z], 6, replacement=True, generator=G
)
TRIL = real([[[1.0, 0.0], [0.6, 0.8]], [[0.7, 0.0], [-0.5, 0.9]]])
POINTS = real([[-2.0, 0.0], [2.0, 1.0]])[Z] + (TRIL[Z] @ normal(200, 2, 1)).squeeze(-1)
SHARES = torch._standard_gamma(real([[2.0, 6.0], [6.0, 2.0]])[Z], generator=G)
SHARES = SHARES[:, 0] / SHARES.sum(1)
FEATURES = normal(200, 2)
COEFFICIENTS = real([[2.0, -1.0], [-1.0, 1.0]])
RESPONSES = (COEFFICIENTS[Z] * FEATURES).sum(-1) + 0.5 * normal(200)
EVENTS = torch.poisson((0.5 * COEFFICIENTS[Z] * FEATURES).sum(-1).exp(), generator=G)

# Sequences of three states that go round.
CHAIN = [torch.multinomial(real([0.4, 0.3, 0.3]), 40, replacement=True, generator=G)]
ROUND = real([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.2, 0.0, 0.8]])
for _ in range(5):
    CHAIN.append(torch.multinomial(ROUND[CHAIN[-1]], 1, generator=G).squeeze(1))
SEQUENCES = real([-4.0, 0.0, 4.0])[torch.stack(CHAIN, 1)] + normal(40, 6)


@contextmanager
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def param(name: str, values: Any, constraint: Any = constraints.real) -> Tensor:
    found: Tensor = pyro.param(name, torch.as_tensor(values), constraint=constraint)
    return found


def weights() -> Tensor:
    return param("weights", [0.45, 0.55], SIMPLEX)


def rows(x: Tensor, shares: Tensor, component: Callable[[Tensor], Any]) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(shares))
        pyro.sample("x", component(z), obs=x)


def gaussians(x: Tensor, loc: Tensor, scale: Tensor, shares: Tensor | None = None) -> None:
    spread = (lambda z: scale[z]) if scale.dim() else (lambda z: scale)
    rows(x, weights() if shares is None else shares, lambda z: dist.Normal(loc[z], spread(z)))


def means() -> Tensor:
    return param("loc", [-1.0, 1.0])


def scales() -> Tensor:
    return param("scale", [0.8, 1.2], POSITIVE)


def own_values(model: Model, *data: Tensor) -> dict[str, Tensor]:
    """What the program itself gives to its parameters, before Pyro's transforms round it."""
    with double_precision():
        nodes: Any = poutine.trace(model).get_trace(*data).nodes
    return {n: s["args"][1].detach() for n, s in nodes.items() if s["type"] == "param"}


# ---------------------------------------------------------------------------------------
# Held elements


def three(x: Tensor) -> None:
    loc = param("loc", [-3.0, 0.1, 3.0])
    shares = param("weights", [0.3, 0.3, 0.4], SIMPLEX)
    gaussians(x, loc, param("scale", [0.7, 1.0, 1.1], POSITIVE), shares)


def one_scale(x: Tensor) -> None:
    gaussians(x, means(), param("scale", 0.9, POSITIVE))


def chain(x: Tensor) -> None:
    initial = param("initial", [0.4, 0.3, 0.3], SIMPLEX)
    table = param("table", [[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.2, 0.0, 0.8]], SIMPLEX)
    loc, scale = param("loc", [-3.0, 0.0, 3.0]), param("scale", 1.0, POSITIVE)
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else table[z]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], scale), obs=x[:, t])


def answers(x: Tensor) -> None:
    start = torch.tensor([[1.0, 0.5, 0.0, -0.5], [-0.5, 0.0, 0.5, 1.0]]).unsqueeze(1)
    logits = param("logits", start.repeat(1, x.shape[1], 1))
    rows(x, weights(), lambda z: dist.Categorical(logits=logits[z]).to_event(1))


def answers_by_ratio(x: Tensor) -> None:
    ratios = param("ratios", [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]], POSITIVE)
    rows(x, weights(), lambda z: dist.Categorical(ratios[z]))


def items(x: Tensor) -> None:
    logits = param("logits", [[1.0, 1.0, 1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, 1.0, 1.0]])
    rows(x, weights(), lambda z: dist.Bernoulli(logits=logits[z]).to_event(1))


def item_probs(x: Tensor) -> None:
    probs = param("probs", [[0.7, 0.7, 0.7, 0.3, 0.3], [0.3, 0.3, 0.3, 0.7, 0.7]], UNIT)
    rows(x, weights(), lambda z: dist.Bernoulli(probs[z]).to_event(1))


def vectors(x: Tensor) -> None:
    loc = param("loc", [[-1.0, 0.1], [1.0, 0.9]])
    cov = param("cov", torch.tensor([[1.0, 0.3], [0.3, 1.0]]).repeat(2, 1, 1), DEFINITE)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], cov[z]))


def vectors_by_factor(x: Tensor) -> None:
    loc = param("loc", [[-1.0, 0.1], [1.0, 0.9]])
    start = torch.tensor([[1.0, 0.0], [0.3, 1.0]]).repeat(2, 1, 1)
    tril = param("tril", start, constraints.lower_cholesky)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], scale_tril=tril[z]))


def lines(features: Tensor, y: Tensor) -> None:
    beta = param("beta", [[1.3, 0.1], [-0.1, 1.2]])
    scale = param("scale", 0.9, POSITIVE)
    rows(y, weights(), lambda z: dist.Normal((beta[z] * features).sum(-1), scale))


def log_lines(features: Tensor, y: Tensor) -> None:
    beta = param("beta", [[1.1, -0.1], [-0.1, 0.7]])
    rows(y, weights(), lambda z: dist.Poisson((beta[z] * features).sum(-1).exp()))


def experts(features: Tensor, y: Tensor) -> None:
    gate = param("gate", [[0.3, -0.2], [0.1, 0.4]])
    beta = param("beta", [[1.3, 0.1], [-0.1, 1.2]])
    scale = param("scale", 0.9, POSITIVE)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(logits=features @ gate.T))
        pyro.sample("y", dist.Normal((beta[z] * features).sum(-1), scale), obs=y)


def log_rates(x: Tensor) -> None:
    rate = param("log_rate", [0.3, 2.1])
    rows(x, weights(), lambda z: dist.Poisson(rate[z].exp()))


def proportions(x: Tensor) -> None:
    a, b = param("a", [1.7, 5.3], POSITIVE), param("b", [5.3, 1.7], POSITIVE)
    rows(x, weights(), lambda z: dist.Beta(a[z], b[z]))


def lifetimes(x: Tensor) -> None:
    scale, shape = param("scale", [0.3, 3.1], POSITIVE), param("shape", [1.2, 1.4], POSITIVE)
    rows(x, weights(), lambda z: dist.Weibull(scale[z], shape[z]))


def gammas(x: Tensor) -> None:
    shape, rate = param("shape", [1.2, 1.4], POSITIVE), param("rate", [3.3, 0.5], POSITIVE)
    rows(x, weights(), lambda z: dist.Gamma(shape[z], rate[z]))


def heavy_tails(x: Tensor) -> None:
    loc, scale = means(), scales()
    df = param("df", [4.3, 6.1], POSITIVE)
    rows(x, weights(), lambda z: dist.StudentT(df[z], loc[z], scale[z]))


def bent(x: Tensor) -> None:
    loc = means()
    rows(x, weights(), lambda z: dist.Normal(3 * torch.tanh(loc[z]), 0.9))


def with_priors(x: Tensor) -> None:
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([3.0, 5.0, 2.0])))
    with pyro.plate("states", 3):
        loc = pyro.sample("loc", dist.Normal(0.5, 1.5))
        var = pyro.sample("var", dist.InverseGamma(3.0, 2.0))
    gaussians(x, loc, var.sqrt(), shares)


def with_other_priors(x: Tensor) -> None:
    with pyro.plate("states", 2):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    gaussians(x, means(), scale)


def items_with_priors(x: Tensor) -> None:
    probs = pyro.sample("probs", dist.Beta(2.0, 3.0).expand([2, 5]).to_event(2))
    rows(x, weights(), lambda z: dist.Bernoulli(probs[z]).to_event(1))


def with_vector_priors(x: Tensor) -> None:
    centre = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    loc = pyro.sample("loc", centre.expand([2]).to_event(1))
    cov = param("cov", torch.eye(2).repeat(2, 1, 1), DEFINITE)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], cov[z]))


def lines_with_priors(features: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    scale = param("scale", 0.9, POSITIVE)
    rows(y, weights(), lambda z: dist.Normal((beta[z] * features).sum(-1), scale))


ROW, COLUMN = torch.arange(200) % 4, torch.arange(200) // 4 % 3


def rows_and_columns(x: Tensor) -> None:
    a, b = param("a", [0.3, 0.2, 0.1, 0.7]), param("b", [0.1, 0.9, 0.4])
    centre, scale = param("centre", 0.6), param("scale", 1.0, POSITIVE)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(centre + a[ROW] + b[COLUMN], scale), obs=x)


THREE = {
    "weights": real([0.35, 0.25, 0.4]),
    "loc": real([-3.2, 0.3, 3.4]),
    "scale": real([0.6, 1.3, 0.9]),
}
PAIR = {"loc": real([-1.3, 1.7]), "weights": real([0.5, 0.5])}
LINES = {"beta": real([[1.3, 0.1], [-0.1, 1.2]]), "scale": real(0.7), "weights": real([0.4, 0.6])}
ONE_MATRIX = torch.tensor([True, False]).reshape(2, 1, 1).expand(2, 2, 2)
REFERENCE = torch.tensor([True, False, False, False]).expand(2, 6, 4)
SEVERAL = torch.tensor([True, False, True, False]).expand(2, 6, 4)

# The program, its data, what is held, values for the start (or the program's own), the degrees
# of freedom.
Held = tuple[Model, tuple[Tensor, ...], Any, dict[str, Tensor] | None, int]
HELD: dict[str, Held] = {
    "names": (three, (X3,), ("weights", "loc"), THREE, 3),
    "one name": (three, (X3,), "loc", THREE, 5),
    "true and false": (three, (X3,), {"scale": True, "loc": False}, THREE, 5),
    "a mean": (three, (X3,), {"loc": [True, False, False]}, THREE, 7),
    "a mean, the program's own": (three, (X3,), {"loc": [False, True, False]}, None, 7),
    "a mask of torch": (three, (X3,), {"loc": torch.tensor([False, True, True])}, THREE, 6),
    "a mean and scales": (
        three,
        (X3,),
        {"loc": [False, True, False], "scale": [True, True, False]},
        THREE,
        5,
    ),
    "a weight": (three, (X3,), {"weights": [True, False, False]}, THREE, 7),
    "all weights but one": (three, (X3,), {"weights": [True, True, False]}, THREE, 6),
    "a number": (one_scale, (X,), {"scale": torch.tensor(True)}, {**PAIR, "scale": real(0.8)}, 3),
    "one mean of a shared scale": (one_scale, (X,), {"loc": [False, True]}, None, 3),
    "transitions that cannot be": (
        chain,
        (SEQUENCES,),
        {"table": [[False, False, True], [True, False, False], [False, True, False]]},
        None,
        2 + 3 + 3 + 1,
    ),
    "transitions": (
        chain,
        (SEQUENCES,),
        {"table": [[True, False, False], [False, False, True], [False, False, False]]},
        None,
        2 + 1 + 1 + 2 + 3 + 1,
    ),
    "reference logits": (answers, (ANSWERS,), {"logits": REFERENCE}, None, 1 + 2 * 6 * 3),
    "several logits": (answers, (ANSWERS,), {"logits": SEVERAL}, None, 1 + 2 * 6 * 2),
    "ratios": (
        answers_by_ratio,
        (ANSWERS[:, 0],),
        {"ratios": [[True, False, False, False], [False] * 4]},
        None,
        1 + 3 + 3,
    ),
    "binary logits": (items, (ITEMS,), {"logits": torch.eye(5)[:2].bool()}, None, 1 + 8),
    "probabilities": (item_probs, (ITEMS,), {"probs": torch.eye(5)[:2].bool()}, None, 1 + 8),
    "parts of vectors": (vectors, (POINTS,), {"loc": [[True, False], [False, False]]}, None, 10),
    "a covariance": (vectors, (POINTS,), {"cov": ONE_MATRIX}, None, 1 + 4 + 3),
    "a covariance and parts of vectors": (
        vectors,
        (POINTS,),
        {"cov": ONE_MATRIX, "loc": [[False, True], [True, False]]},
        None,
        1 + 2 + 3,
    ),
    "a Cholesky factor": (vectors_by_factor, (POINTS,), {"tril": ONE_MATRIX}, None, 1 + 4 + 3),
    "a coefficient": (
        lines,
        (FEATURES, RESPONSES),
        {"beta": [[True, False], [False] * 2]},
        None,
        5,
    ),
    "a coefficient and a scale": (
        lines,
        (FEATURES, RESPONSES),
        {"beta": [[False, False], [False, True]], "scale": True},
        LINES,
        4,
    ),
    "a log-linear coefficient": (
        log_lines,
        (FEATURES, EVENTS),
        {"beta": [[True, False], [False, False]]},
        None,
        4,
    ),
    "a gate": (experts, (FEATURES, RESPONSES), {"gate": [[True] * 2, [False] * 2]}, None, 7),
    "a log-rate": (log_rates, (N,), {"log_rate": [False, True]}, None, 2),
    "concentrations": (proportions, (SHARES,), {"a": [True, False], "b": [False, True]}, None, 3),
    "rows": (lifetimes, (WAITS,), {"scale": [True, False], "shape": [False, True]}, None, 3),
    "a shape": (gammas, (WAITS,), {"shape": [True, False]}, None, 4),
    "a rate beside a shape": (gammas, (WAITS,), {"rate": [True, False]}, None, 4),
    "heavy tails": (
        heavy_tails,
        (X,),
        {"df": True, "loc": [True, False], "scale": [False, True]},
        None,
        3,
    ),
    "a function": (bent, (X,), {"loc": [True, False]}, None, 2),
    "conjugate priors": (
        with_priors,
        (X3,),
        {"shares": [True, False, False], "loc": [False, True, False], "var": [False, False, True]},
        {"shares": THREE["weights"], "loc": THREE["loc"], "var": THREE["scale"]},
        1 + 2 + 2,
    ),
    "priors of an event": (
        items_with_priors,
        (ITEMS,),
        {"probs": torch.eye(5)[:2].bool()},
        {
            "weights": real([0.45, 0.55]),
            "probs": real([[0.7, 0.7, 0.7, 0.3, 0.3], [0.3, 0.3, 0.3, 0.7, 0.7]]),
        },
        1 + 8,
    ),
    "other priors": (
        with_other_priors,
        (X,),
        {"scale": [True, False]},
        {**PAIR, "scale": real([0.8, 1.1])},
        4,
    ),
    "priors on vectors": (
        with_vector_priors,
        (POINTS,),
        {"loc": [[False, True], [True, False]]},
        {
            "loc": real([[-1.0, 0.1], [1.0, 0.9]]),
            "cov": torch.eye(2).double().repeat(2, 1, 1),
            "weights": real([0.5, 0.5]),
        },
        1 + 2 + 6,
    ),
    "priors on coefficients": (
        lines_with_priors,
        (FEATURES, RESPONSES),
        {"beta": [[True, False], [False, False]]},
        LINES,
        5,
    ),
}


def masks(fixed: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is held, as a mask for each parameter."""
    names = (fixed,) if isinstance(fixed, str) else fixed
    given = fixed if isinstance(fixed, dict) else dict.fromkeys(names, True)
    return {n: torch.as_tensor(m).expand(values[n].shape) for n, m in given.items()}


def held(fit: Fit, fixed: Any, start: dict[str, Tensor]) -> bool:
    """Whether the held elements are where they started, to the last bit."""
    return all(
        torch.equal(fit.params[n][m], start[n].to(fit.params[n])[m])
        for n, m in masks(fixed, fit.params).items()
    )


@pytest.mark.parametrize("name", HELD)
def test_held_elements(name: str) -> None:
    """All solvers agree on the rest, and what is held does not move."""
    model, data, fixed, init, df = HELD[name]
    start = own_values(model, *data) if init is None else init
    solvers = {
        "EM": EM(fixed=fixed, **TIGHT),
        "MAP": MAP(fixed=fixed, **TIGHT),
        "anderson": EM(fixed=fixed, accelerate="anderson", **TIGHT),
        "squarem": EM(fixed=fixed, accelerate="squarem", **TIGHT),
    }
    fits = [s.fit(model, *data, init=init or "model") for s in solvers.values()]
    for fit in fits:
        assert fit.converged, str(fit)
        assert fit.log_joint == pytest.approx(fits[0].log_joint, abs=1e-8 * len(data[0]))
        assert held(fit, fixed, start)
        assert fit.df == df and f"Free parameters: {df}." in fit.explain()
        for parameter, mask in masks(fixed, fit.params).items():
            count, total = int(mask.sum()), mask.numel()
            words = "fixed: held" if count == total else f"{count} held" if count else ""
            line = next(x for x in fit.explain().splitlines() if x.startswith(f"  {parameter} ("))
            assert words in line


@pytest.mark.parametrize("name", ["a mean", "a weight", "a covariance", "a coefficient"])
def test_the_engines_agree_on_held_elements(name: str) -> None:
    model, data, fixed, init, _ = HELD[name]
    a, b = (EM(fixed=fixed, engine=e, max_iter=30) for e in ("trace", "auto"))
    fits = [s.fit(model, *data, init=init or "model") for s in (a, b)]
    assert fits[0].log_joint == pytest.approx(fits[1].log_joint, rel=1e-10)


@pytest.mark.parametrize("name", ["a mean", "a weight", "a covariance", "parts of vectors"])
@pytest.mark.parametrize("init", ["kmeans", "random", "auto"])
def test_held_elements_through_searched_starts(name: str, init: str) -> None:
    """Several starts, run as one batch, keep the program's own values."""
    model, data, fixed, _, _ = HELD[name]
    fit = EM(fixed=fixed, max_iter=20).fit(model, *data, init=init, restarts=3)
    assert len(fit.restarts) >= 3 and held(fit, fixed, own_values(model, *data))
    if "weights" in fit.params:
        assert float(fit.params["weights"].sum()) == pytest.approx(1, abs=1e-12)


def test_held_elements_of_another_fit() -> None:
    first = EM(max_iter=5).fit(three, X3, init=THREE)
    mask = [True, True, False]
    fit = EM(fixed={"loc": mask}, max_iter=20).fit(three, X3, init=first)
    assert held(fit, {"loc": mask}, first.params)
    assert not torch.equal(fit.params["loc"], first.params["loc"])


def test_the_rest_of_a_partial_start_is_found() -> None:
    fixed = {"loc": [True, False], "scale": [False, True]}
    given = {"loc": real([-1.5, 2.0])}
    fit = EM(fixed=fixed).fit(gmm, X, init=given)
    assert fit.converged
    assert held(fit, fixed, {**own_values(gmm, X), **given})


def gmm(x: Tensor) -> None:
    gaussians(x, means(), scales())


def test_a_parameter_drawn_at_random_is_held_where_init_says() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(2))
        gaussians(x, loc, scales())

    fixed = {"loc": [True, False]}
    init = {"loc": real([-1.5, 2.0])}
    assert held(EM(fixed=fixed).fit(model, X, init=init), fixed, init)
    for asked in (fixed, "loc"):
        for given in ("auto", {"scale": [1.0, 1.0]}):
            with pytest.raises(SettingError, match=r"fixed.*'loc'.*random.*init=\{'loc'"):
                EM(fixed=asked).fit(model, X, init=given)


def test_held_elements_in_single_precision_and_step_by_step() -> None:
    fixed = {"cov": ONE_MATRIX, "loc": [[False, True], [True, False]]}
    start = own_values(vectors, POINTS)
    assert held(EM(fixed=fixed, dtype=torch.float32).fit(vectors, POINTS), fixed, start)
    assert held(StepwiseEM(fixed=fixed).fit(vectors, POINTS), fixed, start)


def test_held_elements_in_a_comparison() -> None:
    fixed = {"loc": [True, False, False]}
    table = compare(
        three,
        X3,
        solvers={"held": EM(fixed=fixed), "free": EM(), "MAP": MAP(fixed=fixed)},
        init=THREE,
    )
    assert held(table.fits["held"], fixed, THREE) and held(table.fits["MAP"], fixed, THREE)
    assert not held(table.fits["free"], fixed, THREE)
    assert table.fits["free"].log_joint >= table.fits["held"].log_joint
    assert [fit.df for fit in table.fits.values()] == [7, 8, 7]


@pytest.mark.parametrize("solver", [EM, MAP], ids=["EM", "MAP"])
def test_held_elements_in_a_checkpoint(solver: Any, tmp_path: Path) -> None:
    fixed, path = {"loc": [True, False, False]}, tmp_path / "fit.ckpt"
    whole = solver(fixed=fixed, max_iter=12).fit(three, X3, init=THREE)
    solver(fixed=fixed, max_iter=5).fit(three, X3, init=THREE, checkpoint=path)
    again = solver(fixed=fixed, max_iter=12).fit(three, X3, init=THREE, checkpoint=path)
    assert again.log_joint == whole.log_joint and held(again, fixed, THREE)
    other = solver(fixed={"loc": [False, True, False]}, max_iter=12)
    with pytest.raises(SettingError, match="fixed"):
        other.fit(three, X3, init=THREE, checkpoint=path)


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ("lok", r"no parameter 'lok'.*Did you mean 'loc'"),
        ({"lok": [True, False, False]}, r"no parameter 'lok'.*Did you mean 'loc'"),
        ({"loc": [True, False]}, r"'loc'.*booleans of shape \(3,\).*got torch.bool.*\(2,\)"),
        ({"loc": [[True, False, False]]}, r"'loc'.*shape \(3,\)"),
        ({"loc": torch.tensor([True])}, r"'loc'.*shape \(3,\)"),
        ({"loc": [1, 0, 0]}, r"'loc'.*booleans.*got torch.int64"),
        ({"loc": torch.tensor([1.0, 0.0, 0.0])}, r"'loc'.*booleans.*got torch.float32"),
        (3, "names of parameters, or a dict"),
        (None, "names of parameters, or a dict"),
        (["loc", 3], "no parameter '3'"),
    ],
)
@pytest.mark.parametrize("solver", [EM, MAP], ids=["EM", "MAP"])
def test_what_cannot_be_held(solver: Any, fixed: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        solver(fixed=fixed).fit(three, X3)


@pytest.mark.parametrize(
    ("model", "data", "fixed"),
    [
        (vectors, POINTS, {"cov": torch.eye(2).bool().expand(2, 2, 2)}),
        (vectors_by_factor, POINTS, {"tril": torch.eye(2).bool().expand(2, 2, 2)}),
    ],
)
def test_matrices_are_held_as_a_whole(model: Model, data: Tensor, fixed: Any) -> None:
    with pytest.raises(SettingError, match="as a whole only"):
        EM(fixed=fixed).fit(model, data)


@pytest.mark.parametrize("mask", [None, "first", {0: True}])
def test_what_is_no_mask(mask: Any) -> None:
    with pytest.raises(SettingError, match=r"fixed.*'loc'"):
        EM(fixed={"loc": mask}).fit(three, X3)


def test_numbers_in_lists_keep_their_digits() -> None:
    init = {"loc": [-3.2, 0.3, 3.4]}
    whole = EM(fixed="loc", max_iter=2).fit(three, X3, init=init)
    assert whole.params["loc"].tolist() == init["loc"]
    part = EM(fixed={"loc": [True, True, False]}, max_iter=2).fit(three, X3, init=init)
    assert part.params["loc"].tolist()[:2] == init["loc"][:2]


@pytest.mark.parametrize(
    ("model", "data", "fixed"),
    [
        (experts, (FEATURES, RESPONSES), {"gate": [[True, False], [False, False]]}),
        (rows_and_columns, (X,), {"a": [True, False, False, False]}),
    ],
    ids=["a gate", "rows and columns"],
)
def test_held_coefficients_beside_directions_without_effect(
    model: Model, data: tuple[Tensor, ...], fixed: Any
) -> None:
    fit = EM(fixed=fixed).fit(model, *data, init="model")
    start = own_values(model, *data)
    for name, mask in masks(fixed, fit.params).items():
        torch.testing.assert_close(fit.params[name][mask], start[name][mask], rtol=0, atol=1e-12)
    assert held(fit, fixed, start)


def test_a_saved_fit_knows_what_was_held(tmp_path: Path) -> None:
    fit = EM(fixed={"loc": [True, False, False], "weights": [True, False, False]}).fit(three, X3)
    fit.save(tmp_path / "fit.pt")
    again = Fit.load(tmp_path / "fit.pt", three, X3)
    assert again.df == fit.df and again.bic() == fit.bic()


# By hand


def test_the_rest_of_a_simplex() -> None:
    def model(x: Tensor) -> None:
        p = param("p", [0.1, 0.3, 0.4, 0.2], SIMPLEX)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(p), obs=x)

    x = torch.cat([torch.full((n,), i) for i, n in enumerate((10, 20, 30, 40))])
    fit = EM(fixed={"p": [False, True, False, False]}).fit(model, x)
    wanted = real([0.7 * 10 / 80, 0.3, 0.7 * 30 / 80, 0.7 * 40 / 80])
    torch.testing.assert_close(fit.params["p"], wanted, rtol=1e-12, atol=0)


def test_the_rest_of_a_vector_mean() -> None:
    """With a covariance given, the free elements are those of a regression."""
    cov = real([[1.0, 0.5, 0.2], [0.5, 1.5, -0.3], [0.2, -0.3, 0.8]])

    def model(x: Tensor) -> None:
        loc = param("loc", [0.7, 0.0, 0.0])
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(loc, cov), obs=x)

    x = torch.cat([POINTS, X.unsqueeze(1)], 1)
    fit = EM(fixed={"loc": [True, False, False]}).fit(model, x)
    mean, precision = x.mean(0), torch.inverse(cov)
    shift = torch.linalg.solve(precision[1:, 1:], precision[1:, 0]) * (0.7 - mean[0])
    torch.testing.assert_close(fit.params["loc"][1:], mean[1:] - shift, rtol=1e-10, atol=0)


def test_the_rest_of_a_regression() -> None:
    def model(features: Tensor, y: Tensor) -> None:
        beta, scale = param("beta", [0.7, 0.0]), param("scale", 1.0, POSITIVE)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(features @ beta, scale), obs=y)

    fit = EM(fixed={"beta": [True, False]}).fit(model, FEATURES, RESPONSES)
    a, b = FEATURES.unbind(1)
    rest = RESPONSES - 0.7 * a
    slope = float((b @ rest) / (b @ b))
    assert float(fit.params["beta"][1]) == pytest.approx(slope, rel=1e-10)
    wanted = float(((rest - slope * b) ** 2).mean().sqrt())
    assert float(fit.params["scale"]) == pytest.approx(wanted, rel=1e-10)


def test_the_rest_of_medians() -> None:
    def model(x: Tensor) -> None:
        loc = param("loc", [0.7, 0.0])
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Laplace(loc[Z], 1.0), obs=x)

    fit = EM(fixed={"loc": [True, False]}).fit(model, X)
    below = X[Z == 1] < fit.params["loc"][1]
    above = X[Z == 1] > fit.params["loc"][1]
    assert float(fit.params["loc"][0]) == 0.7
    assert abs(int(below.sum()) - int(above.sum())) <= 1


def test_the_rest_of_logits() -> None:
    def model(x: Tensor) -> None:
        logits = param("logits", [0.4, 0.0, 0.0, 0.0])
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(logits=logits), obs=x)

    x = torch.cat([torch.full((n,), i) for i, n in enumerate((10, 20, 30, 40))])
    fit = EM(fixed={"logits": [True, False, False, False]}).fit(model, x)
    wanted = 0.4 + real([0.0, math.log(2), math.log(3), math.log(4)])
    torch.testing.assert_close(fit.params["logits"], wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------
# Equal parameters


def stacked(x: Tensor) -> None:
    scale = param("scale", 1.0, POSITIVE)
    gaussians(x, means(), torch.stack([scale, scale], -1))


def expanded(x: Tensor) -> None:
    gaussians(x, means(), param("scale", 1.0, POSITIVE).expand(2))


def asked_twice(x: Tensor) -> None:
    first, second = param("scale", 1.0, POSITIVE), pyro.param("scale")
    rows(x, weights(), lambda z: dist.Normal(means()[z], torch.where(z == 0, first, second)))


def test_equal_parameters() -> None:
    """However the program says so."""
    wanted = EM(**TIGHT).fit(one_scale, X)
    for model in (stacked, expanded, asked_twice):
        fit = EM(**TIGHT).fit(model, X)
        assert fit.converged and fit.df == wanted.df == 4
        assert fit.log_joint == pytest.approx(wanted.log_joint, abs=1e-8 * 200)
        assert float(fit.params["scale"]) == pytest.approx(float(wanted.params["scale"]), rel=1e-5)


def test_opposite_means() -> None:
    def model(x: Tensor) -> None:
        apart = param("apart", 1.0, POSITIVE)
        gaussians(x, torch.stack([-apart, apart], -1), scales())

    a, b = (s.fit(model, X) for s in (EM(**TIGHT), MAP(**TIGHT)))
    assert a.converged and a.df == 1 + 1 + 2
    assert a.log_joint == pytest.approx(b.log_joint, abs=1e-8 * 200)
    r, x, v = a.responsibilities(), X, a.params["scale"] ** 2
    wanted = float((r[:, 1] * x / v[1] - r[:, 0] * x / v[0]).sum() / (r / v).sum())
    assert float(a.params["apart"]) == pytest.approx(wanted, rel=1e-5)


def test_one_parameter_at_two_sites() -> None:
    def model(x: Tensor, n: Tensor) -> None:
        rate = param("rate", [1.0, 5.0], POSITIVE)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights()))
            pyro.sample("x", dist.Exponential(rate[z]), obs=x)
            pyro.sample("n", dist.Poisson(rate[z]), obs=n)

    x = -uniform(200).log() / real([1.5, 9.0])[Z]
    a, b = (s.fit(model, x, N) for s in (EM(**TIGHT), MAP(**TIGHT)))
    assert a.converged and a.df == 3
    assert a.log_joint == pytest.approx(b.log_joint, abs=1e-8 * 200)
    r = a.responsibilities()
    wanted = (r * (1 + N.unsqueeze(1))).sum(0) / (r * (1 + x.unsqueeze(1))).sum(0)
    torch.testing.assert_close(a.params["rate"], wanted, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------
# Bounds: EM clips, and the conditions of Karush, Kuhn and Tucker hold


def bounded_scales(constraint: Any, start: list[float]) -> Model:
    return lambda x: gaussians(x, means(), param("scale", start, constraint))


def bounded_means(constraint: Any) -> Model:
    return lambda x: gaussians(x, param("loc", [-1.0, 1.0], constraint), scales())


def bounded_variances(x: Tensor) -> None:
    bounds = constraints.interval(0.7, 0.8)
    gaussians(x, means(), param("var", [0.72, 0.78], bounds).sqrt())


def bounded_share(x: Tensor) -> None:
    share = param("share", 0.2, constraints.interval(0.05, 0.3))
    loc, scale = means(), scales()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share)).long()
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def bounded_share_by_hand(x: Tensor) -> None:
    share = param("share", 0.2, constraints.interval(0.05, 0.3))
    gaussians(x, means(), scales(), torch.stack([1 - share, share], -1))


def bounded_rates(x: Tensor) -> None:
    rate = param("rate", [2.0, 6.0], constraints.interval(1.0, 7.0))
    rows(x, weights(), lambda z: dist.Poisson(rate[z]))


def bounded_shapes(x: Tensor) -> None:
    shape = param("shape", [1.2, 1.4], constraints.greater_than(1.1))
    rate = param("rate", [3.0, 0.5], POSITIVE)
    rows(x, weights(), lambda z: dist.Gamma(shape[z], rate[z]))


def bounded_logits(x: Tensor) -> None:
    start = [[1.0, 1.0, 1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, 1.0, 1.0]]
    logits = param("logits", start, constraints.interval(-1.3, 1.3))
    rows(x, weights(), lambda z: dist.Bernoulli(logits=logits[z]).to_event(1))


BOUNDED: dict[str, tuple[Model, Tensor, str, float, float]] = {
    "scales in an interval": (
        bounded_scales(constraints.interval(0.8, 1.0), [0.9, 0.95]),
        X,
        "scale",
        0.8,
        1.0,
    ),
    "scales in a half-open interval": (
        bounded_scales(constraints.half_open_interval(0.8, 1.0), [0.9, 0.95]),
        X,
        "scale",
        0.8,
        1.0,
    ),
    "scales above": (
        bounded_scales(constraints.greater_than(0.85), [1.2, 1.5]),
        X,
        "scale",
        0.85,
        math.inf,
    ),
    "scales from": (
        bounded_scales(constraints.greater_than_eq(0.85), [1.2, 1.5]),
        X,
        "scale",
        0.85,
        math.inf,
    ),
    "scales below": (
        bounded_scales(constraints.less_than(0.9), [0.5, 0.5]),
        X,
        "scale",
        -math.inf,
        0.9,
    ),
    "variances": (bounded_variances, X, "var", 0.7, 0.8),
    "means in an interval": (bounded_means(constraints.interval(-1.5, 2.0)), X, "loc", -1.5, 2.0),
    "means above": (bounded_means(constraints.greater_than(-1.5)), X, "loc", -1.5, math.inf),
    "means below": (bounded_means(constraints.less_than(2.0)), X, "loc", -math.inf, 2.0),
    "a probability": (bounded_share, X, "share", 0.05, 0.3),
    "a weight": (bounded_share_by_hand, X, "share", 0.05, 0.3),
    "rates": (bounded_rates, N, "rate", 1.0, 7.0),
    "shapes": (bounded_shapes, WAITS, "shape", 1.1, math.inf),
    "logits": (bounded_logits, ITEMS, "logits", -1.3, 1.3),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds(name: str) -> None:
    model, x, parameter, low, high = BOUNDED[name]
    fit = EM(**TIGHT).fit(model, x)
    value = fit.params[parameter]
    assert fit.converged and bool(((low <= value) & (value <= high)).all())
    leaves = {n: v.clone().requires_grad_() for n, v in fit.params.items()}
    total = pyroem.log_joint(model, leaves, x)
    slopes = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    at_low, at_high = value <= low + 1e-9, value >= high - 1e-9
    assert bool((at_low | at_high).any())
    slope = slopes[parameter]
    assert bool((slope[at_low] < 0).all() and (slope[at_high] > 0).all())
    for n, s in slopes.items():
        inside = ~(at_low | at_high) if n == parameter else torch.ones_like(s, dtype=torch.bool)
        if n == "weights":  # along the simplex
            s = s - s.mean()
        assert float(s[inside].abs().sum()) < 1e-4 * len(x), n
    again = MAP().fit(model, x, init=fit)
    assert again.log_joint <= fit.log_joint + 1e-8 * len(x)
    squarem = EM(accelerate="squarem", **TIGHT).fit(model, x)
    assert squarem.log_joint == pytest.approx(fit.log_joint, abs=1e-8 * len(x))


def test_a_bound_that_does_not_bind() -> None:
    wide = EM(**TIGHT).fit(bounded_scales(constraints.interval(0.1, 9.0), [0.8, 1.2]), X)
    free = EM(**TIGHT).fit(gmm, X)
    assert wide.log_joint == pytest.approx(free.log_joint, abs=1e-8 * 200)


# ---------------------------------------------------------------------------------------
# Order

SIZES = [30, 10, 25, 40, 15, 20]
GROUP = torch.repeat_interleave(torch.arange(6), torch.tensor(SIZES))
GROUPED = real([0.0, 1.2, 0.4, 0.9, 3.0, 2.6])[GROUP] + 0.5 * normal(140)
COUNTED = torch.poisson(real([1.0, 3.0, 2.0, 4.0, 6.0, 5.0])[GROUP], generator=G)
TOSSED = (uniform(140) < real([0.2, 0.6, 0.4, 0.5, 0.9, 0.7])[GROUP]).double()


def ordered(name: str) -> Tensor:
    return param(name, torch.linspace(-1, 1, 6), ORDERED)


def in_groups(x: Tensor, component: Callable[[], Any]) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("x", component(), obs=x)


def isotonic(x: Tensor) -> Tensor:
    """The means of the groups, in order."""
    averages = [float(x[k == GROUP].mean()) for k in range(6)]
    found = IsotonicRegression().fit_transform(range(6), averages, sample_weight=SIZES)
    return real(found)


@pytest.mark.parametrize("by_group", [False, True], ids=["one scale", "a scale for each"])
def test_ordered_means_are_an_isotonic_regression(by_group: bool) -> None:
    def model(x: Tensor) -> None:
        loc = ordered("loc")
        scale = param("scale", torch.ones(6) if by_group else 1.0, POSITIVE)
        in_groups(x, lambda: dist.Normal(loc[GROUP], scale[GROUP] if by_group else scale))

    fit = EM(**TIGHT).fit(model, GROUPED)
    loc, scale = fit.params["loc"], fit.params["scale"]
    assert fit.converged and "in order" in fit.explain() and bool((loc.diff() > 0).all())
    if not by_group:
        torch.testing.assert_close(loc, isotonic(GROUPED), rtol=0, atol=1e-8)
        wanted = float(((GROUPED - isotonic(GROUPED)[GROUP]) ** 2).mean().sqrt())
        assert float(scale) == pytest.approx(wanted, rel=1e-8)
        return
    x, k = GROUPED.numpy(), GROUP.numpy()
    best = optimize.minimize(
        lambda v: -stats.norm.logpdf(x, v[k], np.exp(v[6 + k])).sum(),
        np.r_[np.arange(6.0), np.zeros(6)],
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda v: np.diff(v[:6])}],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert fit.log_likelihood == pytest.approx(-best.fun, abs=1e-8 * len(x))
    np.testing.assert_allclose(loc, best.x[:6], atol=1e-4)


@pytest.mark.parametrize(
    ("data", "component", "link"),
    [
        (COUNTED, lambda t: dist.Poisson(t.exp()), torch.log),
        (TOSSED, lambda t: dist.Bernoulli(logits=t), torch.logit),
    ],
    ids=["log-rates", "logits"],
)
def test_ordered_logarithms_and_logits(
    data: Tensor, component: Callable[[Tensor], Any], link: Callable[[Tensor], Tensor]
) -> None:
    def model(x: Tensor) -> None:
        t = ordered("t")
        in_groups(x, lambda: component(t[GROUP]))

    fit = EM().fit(model, data)
    assert fit.converged and bool((fit.params["t"].diff() > 0).all())
    torch.testing.assert_close(fit.params["t"], link(isotonic(data)), rtol=0, atol=1e-8)
    assert MAP().fit(model, data, init=fit).log_joint <= fit.log_joint + 1e-8 * 140


def test_ordered_means_with_heavy_tails() -> None:
    def model(x: Tensor) -> None:
        loc, scale = ordered("loc"), param("scale", 1.0, POSITIVE)
        in_groups(x, lambda: dist.StudentT(4.0, loc[GROUP], scale))

    fit = EM(**TIGHT).fit(model, GROUPED)
    x, k = GROUPED.numpy(), GROUP.numpy()
    best = optimize.minimize(
        lambda v: -stats.t.logpdf(x, 4.0, v[k], np.exp(v[6])).sum(),
        np.r_[np.arange(6.0), 0.0],
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda v: np.diff(v[:6])}],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert fit.converged
    assert fit.log_likelihood == pytest.approx(-best.fun, abs=1e-8 * len(x))


@pytest.mark.parametrize("last", [False, True], ids=["inside", "at the end"])
def test_order_beside_a_group_of_successes_only(last: bool) -> None:
    """Its own logit is infinite; pooled with its neighbour's, it is not."""

    def model(x: Tensor) -> None:
        t = param("t", [-0.5, 0.1, 0.5], ORDERED)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=t[group]), obs=x)

    group = torch.arange(30) // 10
    wins = torch.tensor([6, 3, 10] if last else [3, 10, 6])
    x = (torch.arange(30) % 10 < wins[group]).double()
    fit = EM().fit(model, x)
    assert bool((fit.params["t"].diff() > 0).all())
    wanted = real([0.45, 0.45] if last else [0.3, 0.8, 0.8]).logit()
    torch.testing.assert_close(fit.params["t"][: len(wanted)], wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_order_of_groups_without_a_finite_mode(value: float) -> None:
    def model(x: Tensor) -> None:
        t = param("t", [-0.5, 0.1, 0.5], ORDERED)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=t[torch.arange(30) // 10]), obs=x)

    fit = EM().fit(model, torch.full((30,), value).double())
    assert bool((fit.params["t"].diff() > 0).all())
    assert not fit.converged or fit.log_likelihood == pytest.approx(0, abs=1e-6)


def test_ordered_medians_are_not_called_converged_early() -> None:
    """Weighted medians in order have no formula here: a search may stop at a kink, and says so."""

    def model(x: Tensor) -> None:
        loc, scale = ordered("loc"), param("scale", 1.0, POSITIVE)
        in_groups(x, lambda: dist.Laplace(loc[GROUP], scale))

    fit = EM().fit(model, GROUPED)
    n = len(GROUPED)
    falls = np.hstack([np.eye(6)[:5] - np.eye(6)[1:], np.zeros((5, 2 * n))])
    residuals = np.hstack([np.eye(6)[GROUP], np.eye(n), -np.eye(n)])
    bounds = [(None, None)] * 6 + [(0, None)] * (2 * n)
    cost = np.r_[np.zeros(6), np.ones(2 * n)]
    best = optimize.linprog(
        cost, A_ub=falls, b_ub=np.zeros(5), A_eq=residuals, b_eq=GROUPED.numpy(), bounds=bounds
    )
    wanted = -n * math.log(2 * best.fun / n) - n
    assert fit.log_likelihood <= wanted + 1e-8 * n
    assert not fit.converged or fit.log_likelihood == pytest.approx(wanted, abs=1e-6 * n)


Y_STATES = torch.multinomial(real([0.3, 0.3, 0.4]), 240, replacement=True, generator=G)
Y_SEEN = real([-3.0, 0.0, 3.0])[Y_STATES] + normal(240)


@pytest.mark.parametrize(
    ("centres", "pools"),
    [([-2.0, 0.0, 2.0], 3), ([0.0, 1.5, 0.5], 2), ([2.0, 1.0, 0.0], 1)],
    ids=["not binding", "one pair", "all"],
)
def test_ordered_means_of_a_mixture(centres: list[float], pools: int) -> None:
    """The states are told apart by ``y``; the means of ``x`` have to be in their order."""

    def model(x: Tensor, y: Tensor) -> None:
        shares = param("shares", torch.ones(3) / 3, SIMPLEX)
        loc = param("loc", [-1.0, 0.0, 1.0], ORDERED)
        scale, centre = param("scale", torch.ones(3), POSITIVE), param("centre", [-3.0, 0.0, 3.0])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(shares))
            pyro.sample("y", dist.Normal(centre[z], 1.0), obs=y)
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    x = real(centres)[Y_STATES] + torch.linspace(-2, 2, 240).double()[torch.randperm(240)]
    fit = EM(**TIGHT).fit(model, x, Y_SEEN)
    loc = fit.params["loc"]
    assert fit.converged and bool((loc.diff() > 0).all())
    assert 1 + int((loc.diff() > 1e-6).sum()) == pools
    a, b = x.numpy()[:, None], Y_SEEN.numpy()[:, None]

    def loss(v: Any) -> float:
        log_shares = np.r_[0, v[:2]] - np.logaddexp.reduce(np.r_[0, v[:2]])
        density = log_shares + stats.norm.logpdf(b, v[2:5])
        density = density + stats.norm.logpdf(a, v[5:8], np.exp(v[8:]))
        return -float(np.logaddexp.reduce(density, 1).sum())

    start = np.r_[0, 0, -3, 0, 3, -1, 0, 1, 0, 0, 0.0]
    best = optimize.minimize(
        loss,
        start,
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda v: np.diff(v[5:8])}],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert fit.log_likelihood == pytest.approx(-best.fun, abs=1e-7 * len(x))
    np.testing.assert_allclose(loc, best.x[5:8], atol=1e-3)
    anderson = EM(accelerate="anderson", **TIGHT).fit(model, x, Y_SEEN)
    assert anderson.log_joint == pytest.approx(fit.log_joint, abs=1e-8 * len(x))


def test_ordered_means_are_held_as_a_whole() -> None:
    def model(x: Tensor) -> None:
        loc = ordered("loc")
        in_groups(x, lambda: dist.Normal(loc[GROUP], 1.0))

    with pytest.raises(SettingError, match="as a whole only"):
        EM(fixed={"loc": [True, *[False] * 5]}).fit(model, GROUPED)
    fit = EM(fixed="loc").fit(model, GROUPED)
    assert torch.equal(fit.params["loc"], torch.linspace(-1, 1, 6, dtype=torch.float64))


# ---------------------------------------------------------------------------------------
# The number of free parameters

BY_NAME = {p.name: p for p in PROBLEMS}
BY_HAND = {
    "gaussian_mixture": 2 + 3 + 3,
    "diagonal_gaussian": 2 + 6 + 6,
    "full_gaussian": 1 + 4 + 2 * 3,
    "tied_gaussian": 2 + 6 + 3,
    "cholesky_gaussian": 1 + 4 + 2 * 3,
    "precision_gaussian": 1 + 4 + 2 * 3,
    "shared_mean": 1 + 1 + 2,
    "gaussian_inverse_gamma": 2 + 3 + 3,
    "gaussian_conjugate": 1 + 2 + 2,
    "latent_class": 2 + 3 * 6,
    "poisson_exp_link": 1 + 2,
    "categorical_logits": 1 + 2 * 3 * (4 - 1),
    "gamma_shared_rate": 1 + 2 + 1,
    "inverse_gamma_mixture": 1 + 2,
    "dirichlet_mixture": 1 + 2 * 3,
    "von_mises_mixture": 1 + 2 + 2,
    "multinomial_mixture": 2 + 3 * (4 - 1),
    "student_t_mixture": 1 + 2 + 2 + 1,
    "multivariate_t_mixture": 1 + 4 + 2 * 3,
    "weibull_mixture": 1 + 2 + 2,
    "zero_inflated_mixture": 1 + 4 + 2,
    "overdispersed_mixture": 1 + 1 + 2,
    "factor_analysers": 1 + 6 + 2 * 3 + 3,
    "ordered_means": 2 + 3 + 1,
    "linear_regressions": 1 + 4 + 2,
    "logistic_regressions": 1 + 2 + 2,
    "categorical_regressions": 1 + 2 * 2 * 2,
    "multivariate_regressions": 1 + 8 + 2 * 3,
    "mixture_of_experts": (3 - 1) * 2 + 3 * 2 + 1,
    "poisson_exposure": 1 + 2,
    "sum_to_zero": 2 + 1 + 2 + 3,
    "cumulative_means": 2 + 1 + 2 + 3,
    "binomial_assignment": 1 + 3 + 1,
    "two_assignments_table": 1 + 2 + 6 + 3,
    "two_assignments_sum": 1 + 1 + (2 + 2 - 1) + 1,
    "hierarchical_assignment": 1 + 2 * 2 + 2 + 3 + 1,
    "global_assignment": 1 + 2 + 2 + 1,
    "chain": 1 + 2 + 2 + 1,
    "chain_sequences": 2 + 3 * 2 + 3 + 3,
    "chain_second_order": 1 + 4 + 2 + 2,
}


def free(model: Model, *data: Tensor, fixed: Any = ()) -> int:
    """What a fit says, and its report."""
    fit = EM(max_iter=1, fixed=fixed).fit(model, *data, init="model")
    assert f"Free parameters: {fit.df}." in fit.explain()
    return fit.df


@pytest.mark.parametrize("name", BY_HAND)
def test_free_parameters_of_the_problems(name: str) -> None:
    problem = BY_NAME[name]
    assert free(problem.model, *problem.data) == BY_HAND[name]


def shares_by_logits(x: Tensor) -> None:
    gaussians(x, means(), scales(), param("logits", [0.1, 0.3]).softmax(-1))


def shares_by_ratio(x: Tensor) -> None:
    gaussians(x, means(), scales(), param("ratios", [1.0, 2.0], POSITIVE))


def shares_by_reference(x: Tensor) -> None:
    logit = param("logit", [0.3])
    shares = torch.cat([torch.zeros_like(logit), logit], -1).softmax(-1)
    gaussians(x, means(), scales(), shares)


def shares_by_sticks(x: Tensor) -> None:
    v = param("v", [0.4, 0.5], UNIT)
    shares = torch.stack([v[..., 0], (1 - v[..., 0]) * v[..., 1], (1 - v).prod(-1)], -1)
    gaussians(x, param("loc", [-1.0, 0.0, 1.0]), param("scale", 1.0, POSITIVE), shares)


def shifted(x: Tensor) -> None:
    loc, shift, scale = means(), param("shift", 0.1), scales()
    rows(x, weights(), lambda z: dist.Normal(loc[z] + shift, scale[z]))


def log_scales_shifted(x: Tensor) -> None:
    gaussians(x, means(), (param("log", [0.1, 0.2]) + param("shift", 0.0).unsqueeze(-1)).exp())


def log_rates_shifted(x: Tensor) -> None:
    rate, shift = param("log_rate", [0.3, 2.1]), param("shift", 0.1)
    rows(x, weights(), lambda z: dist.Poisson((rate[z] + shift).exp()))


def two_way(kind: Callable[[Tensor, Tensor], Any]) -> Model:
    def model(x: Tensor) -> None:
        a, b, scale = (
            param("a", torch.zeros(4)),
            param("b", torch.ones(3)),
            param("scale", 1.0, POSITIVE),
        )
        with pyro.plate("rows", len(x)):
            pyro.sample("x", kind(a[ROW] + b[COLUMN], scale), obs=x)

    return model


def two_way_counts(x: Tensor) -> None:
    a, b = param("a", torch.zeros(4)), param("b", torch.ones(3))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Poisson((a[ROW] + b[COLUMN]).exp()), obs=x)


def centred_effects(x: Tensor) -> None:
    mean, effect = param("mean", 0.1), param("effect", [0.1, 0.2, 0.3, 0.4])
    scale = param("scale", 1.0, POSITIVE)
    centred = mean.unsqueeze(-1) + effect - effect.mean(-1, keepdim=True)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(centred[..., ROW], scale), obs=x)


def collinear(features: Tensor, y: Tensor) -> None:
    beta, scale = param("beta", [0.1, 0.2, 0.3]), param("scale", 1.0, POSITIVE)
    design = torch.cat([features, features.sum(1, keepdim=True)], 1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, scale), obs=y)


def three_experts(with_intercepts: bool, by_softmax: bool = False) -> Model:
    def model(features: Tensor, y: Tensor) -> None:
        gate = param("gate", torch.arange(6.0).reshape(3, 2) / 10)
        beta = param("beta", [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        scale = param("scale", 1.0, POSITIVE)
        logits = features @ gate.T
        if with_intercepts:
            logits = logits + param("intercept", [0.0, 0.1, 0.2])
        gated = {"probs": logits.softmax(-1)} if by_softmax else {"logits": logits}
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(**gated))
            pyro.sample("y", dist.Normal((beta[z] * features).sum(-1), scale), obs=y)

    return model


def spherical(x: Tensor) -> None:
    loc, scale = param("loc", [[-1.0, 0.0], [1.0, 0.0]]), scales()
    cov = scale[..., None, None] * torch.eye(2)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], cov[z]))


def correlated(x: Tensor) -> None:
    loc, scale = param("loc", [[-1.0, 0.0], [1.0, 0.0]]), scales()
    tril = scale.unsqueeze(-1) * param("factor", torch.eye(2), dist.constraints.corr_cholesky)
    rows(x, weights(), lambda z: dist.MultivariateNormal(loc[z], scale_tril=tril))


def mean_and_log_scale_in_one(x: Tensor) -> None:
    both = param("both", [-0.5, 0.5])
    gaussians(x, both, both.exp())


def unused_coefficients(features: Tensor, y: Tensor) -> None:
    beta, scale = param("beta", torch.ones(2, 3)), param("scale", 1.0, POSITIVE)
    rows(y, weights(), lambda z: dist.Normal((beta[z][..., :2] * features).sum(-1), scale))


def unused_softplus(x: Tensor) -> None:
    gaussians(x, means(), torch.nn.functional.softplus(param("raw", [0.1, 0.2, 0.3])[..., :2]))


def unused_scales(x: Tensor) -> None:
    gaussians(x, means(), param("scale", [1.0, 0.8, 1.2], POSITIVE)[..., 1:])


def unused_simplex(x: Tensor) -> None:
    table = param("table", [[0.5, 0.5], [0.3, 0.7], [0.4, 0.6]], SIMPLEX)
    gaussians(x, means(), scales(), table[..., 2, :])


def products_of_scales(x: Tensor) -> None:
    gaussians(x, means(), scales() * param("factor", 1.0, POSITIVE).unsqueeze(-1))


def products_of_rates(x: Tensor) -> None:
    rate, factor = param("rate", [1.0, 5.0], POSITIVE), param("factor", 1.0, POSITIVE)
    rows(x, weights(), lambda z: dist.Poisson(rate[z] * factor))


def products_of_coefficients(features: Tensor, y: Tensor) -> None:
    a, b, scale = param("a", 1.0), param("b", [1.0, 0.5]), param("scale", 1.0, POSITIVE)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((a * b * features).sum(-1), scale), obs=y)


def population(x: Tensor) -> None:
    loc = param("mean", 0.1), param("tau", 1.0, POSITIVE)
    with pyro.plate("groups", 4):
        effect = pyro.sample("effect", dist.Normal(*loc))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(effect[ROW], 1.0), obs=x)


def two_factors(x: Tensor) -> None:
    """A covariance of rank two: the loadings are known up to a rotation."""
    factor = param("factor", torch.eye(5)[:, :2] + 0.1 * torch.arange(10.0).reshape(5, 2))
    noise = param("noise", torch.ones(5), POSITIVE)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.LowRankMultivariateNormal(torch.zeros(5), factor, noise), obs=x)


REGRESSION = (FEATURES, RESPONSES)
REDUNDANT: dict[str, tuple[Model, tuple[Tensor, ...], Any, int]] = {
    "a softmax of logits": (shares_by_logits, (X,), (), 1 + 4),
    "weights that are not normalised": (shares_by_ratio, (X,), (), 1 + 4),
    "a reference logit": (shares_by_reference, (X,), (), 1 + 4),
    "broken sticks": (shares_by_sticks, (X,), (), 2 + 3 + 1),
    "a[z] + b": (shifted, (X,), (), 1 + 2 + 2),
    "exp(a[z] + b), scales": (log_scales_shifted, (X,), (), 1 + 2 + 2),
    "exp(a[z] + b), rates": (log_rates_shifted, (N,), (), 1 + 2),
    "rows and columns": (two_way(dist.Normal), (X,), (), 4 + 3 - 1 + 1),
    "rows, columns, mean": (rows_and_columns, (X,), (), 4 + 3 - 1 + 1),
    "rows and columns of counts": (two_way_counts, (N,), (), 4 + 3 - 1),
    "rows and columns, heavy tails": (
        two_way(lambda m, s: dist.StudentT(4.0, m, s)),
        (X,),
        (),
        4 + 3 - 1 + 1,
    ),
    "effects that sum to zero": (centred_effects, (X,), (), 4 + 1),
    "covariates that are sums": (collinear, REGRESSION, (), 2 + 1),
    "a gate": (three_experts(False), REGRESSION, (), 2 * 2 + 6 + 1),
    "a gate with intercepts": (three_experts(True), REGRESSION, (), 2 * 3 + 6 + 1),
    "a gate by softmax": (three_experts(False, True), REGRESSION, (), 2 * 2 + 6 + 1),
    "a gate with a reference": (
        three_experts(False),
        REGRESSION,
        {"gate": [[True, True], [False, False], [False, False]]},
        2 * 2 + 6 + 1,
    ),
    "a gate with half a reference": (
        three_experts(False),
        REGRESSION,
        {"gate": [[True, False], [False, False], [False, False]]},
        2 * 2 + 6 + 1,
    ),
    "a gate with too much held": (
        three_experts(False),
        REGRESSION,
        {"gate": [[True, False], [True, False], [False, False]]},
        1 + 2 + 6 + 1,
    ),
    "spheres": (spherical, (POINTS,), (), 1 + 4 + 2),
    "scales and a correlation": (correlated, (POINTS,), (), 1 + 4 + 2 + 1),
    "one parameter in two roles": (mean_and_log_scale_in_one, (X,), (), 1 + 2),
    "coefficients that nothing uses": (unused_coefficients, REGRESSION, (), 1 + 4 + 1),
    "elements that nothing uses": (unused_softplus, (X,), (), 1 + 2 + 2),
    "elements of a closed form that nothing uses": (unused_scales, (X,), (), 1 + 2 + 2),
    "rows of a simplex that nothing uses": (unused_simplex, (X,), (), 1 + 2 + 2),
    "products of scales": (products_of_scales, (X,), (), 1 + 2 + 2),
    "products of rates": (products_of_rates, (N,), (), 1 + 2),
    "products of coefficients": (products_of_coefficients, REGRESSION, (), 2 + 1),
    "rows and columns, medians": (two_way(dist.Laplace), (X,), (), 4 + 3 - 1 + 1),
    "logits with one reference for two": (
        answers,
        (ANSWERS[:, :1],),
        {"logits": torch.arange(8).reshape(2, 1, 4) == 0},
        1 + 3 + 3,
    ),
    "a population's mean and scale": (population, (X,), (), 4 + 2),
    "loadings up to a rotation": (two_factors, (ITEMS,), (), 10 - 1 + 5),
}


@pytest.mark.parametrize("name", REDUNDANT)
def test_only_directions_that_change_the_model_count(name: str) -> None:
    model, data, fixed, df = REDUNDANT[name]
    assert free(model, *data, fixed=fixed) == df


@pytest.mark.parametrize("part", ["scales", "a row of a table", "vectors"])
def test_the_first_elements_are_used_only(part: str) -> None:
    def model(x: Tensor) -> None:
        if part == "scales":
            scale = param("scale", [0.8, 1.2, 1.0], POSITIVE)
            gaussians(x[:, 0], means(), scale[:2])
        elif part == "vectors":
            loc = param("loc", [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
            rows(x, weights(), lambda z: dist.MultivariateNormal(loc[:2][z], torch.eye(2)))
        else:
            table = param("table", [[0.4, 0.6], [0.5, 0.5], [0.3, 0.7]], SIMPLEX)
            gaussians(x[:, 0], means(), scales(), table[0])

    a, b = (s.fit(model, POINTS, init="model") for s in (EM(**TIGHT), MAP(**TIGHT)))
    assert a.converged and a.log_joint == pytest.approx(b.log_joint, abs=1e-8 * 200)


def test_criteria_count_what_is_free() -> None:
    fit = EM(fixed={"loc": [True, False]}).fit(gmm, X)
    assert fit.df == 4
    assert fit.aic() == pytest.approx(2 * 4 - 2 * fit.log_likelihood)
    assert fit.bic() == pytest.approx(4 * math.log(200) - 2 * fit.log_likelihood)
