"""Ready-made programs, against closed formulas and other programs on simulated data."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draws import Draws, real
from hmmlearn import hmm
from pyro import poutine
from scipy import optimize, stats
from scipy.special import logsumexp
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, Fit, Status, blocks
from pyroem.models import (
    Prior,
    bayesian_gaussian_mixture,
    bernoulli_mixture,
    box_sides,
    box_volume,
    gaussian_mixture_with_noise,
    hidden_markov,
    latent_class,
    mixed_mixture,
    mixture_of_regressions,
    poisson_mixture,
    student_t_mixture,
    weak_category_prior,
    weak_prior,
    zero_inflated_mixture,
)

EXACT = EM(tol=1e-13, param_tol=1e-9, max_iter=20_000)


# ---------------------------------------------------------------------------------------
# Data: three components of 200 rows each, 400 in all for two


def truth(components: int = 3, each: int = 200) -> Tensor:
    """The component of each row, in turn."""
    return torch.arange(components * each) % components


def clusters(draws: Draws, z: Tensor, gap: float = 5.0) -> Tensor:
    centres = gap * real([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    return centres[z] + draws.normal(len(z), 2)


def counts(draws: Draws, z: Tensor) -> Tensor:
    return torch.poisson(RATE[z], generator=draws.generator)


def binary(draws: Draws, z: Tensor) -> Tensor:
    return (draws.uniform(len(z), PROBS.shape[1]) < PROBS[z]).double()


def codes(draws: Draws, z: Tensor) -> Tensor:
    columns = [(draws.uniform(len(z), 1) > t.cumsum(-1)[z, :-1]).sum(-1) for t in TABLES]
    return torch.stack(columns, -1).double()


def sequences(draws: Draws, count: int, steps: int) -> Tensor:
    """States of a sticky chain."""
    z = torch.zeros(count, steps, dtype=torch.long)
    z[:, 0] = (3 * draws.uniform(count)).long()
    for t in range(1, steps):
        moves = (draws.uniform(count) < 0.2) * (1 + (2 * draws.uniform(count)).long())
        z[:, t] = (z[:, t - 1] + moves) % 3
    return z


RATE = real([[2.0, 15.0], [9.0, 3.0], [25.0, 1.0]])
PROBS = real(np.random.default_rng(0).choice([0.1, 0.9], (3, 12)))
TABLES = [
    real([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]),
    real([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]),
    real([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]]),
    real([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]),
    real([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]]),
]
CATEGORIES = (2, 3, 4, 2, 3)
KINDS = ("gaussian", "poisson", 2, "bernoulli", "gaussian", 3, 2)


def of_kinds(draws: Draws, z: Tensor) -> Tensor:
    x, n, b, y = clusters(draws, z), counts(draws, z), binary(draws, z), codes(draws, z)
    return torch.stack([x[:, 0], n[:, 0], y[:, 0], b[:, 0], x[:, 1], y[:, 1], y[:, 3]], -1)


def lines(draws: Draws, z: Tensor, family: str) -> tuple[Tensor, Tensor]:
    x = draws.normal(len(z), 1)
    slopes = real([[0.0, 1.5], [2.0, -1.0], [-2.0, 0.5]])[z]
    eta = slopes[:, 0] + slopes[:, 1] * x[:, 0]
    if family == "gaussian":
        return x, eta + 0.3 * draws.normal(len(z))
    if family == "poisson":
        return x, torch.poisson((eta + 1).exp(), generator=draws.generator)
    return x, (draws.uniform(len(z), 10) < eta.sigmoid().unsqueeze(-1)).double().sum(-1)


Case = tuple[Any, tuple[Tensor, ...], int]


def cases() -> dict[str, Case]:
    """Programs of three components, data of theirs, and the textbook's number of parameters."""
    d, z = Draws(1), truth()
    x, n, b, y, m = (make(d, z) for make in (clusters, counts, binary, codes, of_kinds))
    trials = torch.full((len(z),), 10)
    found: dict[str, Case] = {
        "poisson": (poisson_mixture(3), (n,), 2 + 6),
        "poisson prior": (poisson_mixture(3, weak_prior(n)), (n,), 2 + 6),
        "zero-inflated": (zero_inflated_mixture(3), (n * (d.uniform(*n.shape) < 0.9),), 2 + 12),
        "bernoulli": (bernoulli_mixture(3), (b,), 2 + 36),
        "bernoulli prior": (bernoulli_mixture(3, weak_prior(b)), (b,), 2 + 36),
        "classes": (latent_class(3, CATEGORIES), (y,), 2 + 3 * 9),
        "classes prior": (
            latent_class(3, CATEGORIES, weak_category_prior(y, CATEGORIES)),
            (y,),
            2 + 3 * 9,
        ),
        "mixed": (mixed_mixture(3, KINDS), (m,), 2 + 3 * (4 + 1 + 1 + 1 + 2 + 1)),
        "binomial regressions": (
            mixture_of_regressions(3, "binomial", intercept=True),
            (*lines(d, z, "binomial"), torch.full_like(z, -1), trials),
            2 + 6,
        ),
    }
    covariances = {"full": 9, "tied": 3, "diagonal": 6, "spherical": 3}
    tail = x + 0.3 * torch.where(torch.arange(len(z)) % 7 == 0, 10.0, 0.0).unsqueeze(-1)
    noisy = torch.cat([x, 30 * d.uniform(60, 2) - 10])
    for covariance, free in covariances.items():
        t: Any = covariance
        found[f"t {t}"] = student_t_mixture(3, t), (tail,), 2 + 6 + free + 3
        found[f"t {t} 5"] = student_t_mixture(3, t, 5.0), (tail,), 2 + 6 + free
        program = gaussian_mixture_with_noise(3, box_volume(noisy), t)
        found[f"noise {t}"] = program, (noisy,), 3 + 6 + free
        found[f"bayesian {t}"] = (
            bayesian_gaussian_mixture(3, weak_prior(x), t),
            (x,),
            2 + 6 + free,
        )
    for family in ("gaussian", "poisson"):
        f: Any = family
        scales = 3 if f == "gaussian" else 0
        found[f"{f} regressions"] = (
            mixture_of_regressions(3, f, intercept=True),
            lines(d, z, f),
            2 + 6 + scales,
        )
        found[f"{f} experts"] = (
            mixture_of_regressions(3, f, intercept=True, concomitant=True),
            lines(d, z, f),
            4 + 6 + scales,
        )
    return found


def chains() -> dict[str, Case]:
    """The same for hidden Markov models."""
    d = Draws(2)
    z = sequences(d, 40, 12)
    flat = z.reshape(-1)
    x, n, b = (make(d, flat).reshape(40, 12, -1) for make in (clusters, counts, binary))
    y = codes(d, flat)[:, [1, 4]].reshape(40, 12, 2)
    return {
        "full": (hidden_markov(3), (x,), 2 + 6 + 6 + 9),
        "diagonal": (hidden_markov(3, covariance="diagonal"), (x,), 2 + 6 + 6 + 6),
        "poisson": (hidden_markov(3, "poisson"), (n,), 2 + 6 + 6),
        "bernoulli": (hidden_markov(3, "bernoulli"), (b,), 2 + 6 + 36),
        "categorical": (hidden_markov(3, "categorical", categories=3), (y,), 2 + 6 + 12),
    }


CASES, CHAINS = cases(), chains()
every_case = pytest.mark.parametrize("name", CASES)
every_chain = pytest.mark.parametrize("name", CHAINS)


def initial_values(program: Callable[..., None], *data: Tensor) -> dict[str, Tensor]:
    """The parameters of a program after one run of it."""
    with pyro.get_param_store().scope():
        poutine.trace(program).get_trace(*data)
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def accuracy(fit: Fit, z: Tensor) -> float:
    """The share of rows in the right component, under the best of all renamings."""
    table = torch.zeros(3, 3)
    table.index_put_(
        (torch.as_tensor(fit.predict()).reshape(-1), z.reshape(-1)), torch.ones(()), accumulate=True
    )
    pairs = optimize.linear_sum_assignment(-table.numpy())
    return float(table[pairs].sum() / table.sum())


# ---------------------------------------------------------------------------------------
# What holds for all


@cache
def fitted(name: str) -> Fit:
    program, data, _ = CASES[name]
    slow = name.startswith("t ") or "experts" in name  # one trace a pass: no search for a start
    return EM(max_iter=200).fit(program, *data, seed=0, init="kmeans" if slow else "auto")


@cache
def chain_fitted(name: str) -> Fit:
    program, data, _ = CHAINS[name]
    return EM().fit(program, *data, seed=0)


def updates(fit: Fit) -> dict[str, str]:
    """How each parameter is updated, by its name."""
    told = fit.explain().split("How EM updates each parameter:\n")[1].split("Free parameters")[0]
    return {line.split()[0]: line.split(": ", 1)[1] for line in told.splitlines() if line}


@every_case
def test_components_are_found(name: str) -> None:
    fit, z = fitted(name), truth()
    assert fit.status in (Status.CONVERGED, Status.MAX_ITER), str(fit)
    if name.startswith("noise"):
        rows = torch.as_tensor(fit.predict())
        assert float((rows[:600] < 3).double().mean()) > 0.95
        assert float((rows[600:] == 3).double().mean()) > 0.6
    else:
        assert accuracy(fit, z) > (0.7 if "regressions" in name or "experts" in name else 0.9)


@every_case
def test_free_parameters_are_counted_as_in_the_textbook(name: str) -> None:
    assert fitted(name).df == CASES[name][2]


@every_case
def test_every_parameter_has_its_formula(name: str) -> None:
    for parameter, rung in updates(fitted(name)).items():
        wanted = "regression" if parameter in ("coefficients", "gate") else "closed form"
        wanted = "closed form" if name == "zero-inflated" else wanted
        assert rung.startswith(wanted), (parameter, rung)
    by_trace = name[:2] == "t " or any(k in name for k in ("zero", "regressions", "experts"))
    assert ("mixture kernel" in fitted(name).explain()) is not by_trace


@every_case
def test_a_pickled_program_is_the_same(name: str) -> None:
    program, data, _ = CASES[name]
    params = fitted(name).params
    again = pickle.loads(pickle.dumps(program))
    values = [pyroem.log_joint(p, params, *data) for p in (program, again)]
    assert float(values[0]) == float(values[1])
    assert float(values[0]) == pytest.approx(fitted(name).log_joint, rel=1e-11)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_are_equal_at_the_start(name: str, dtype: torch.dtype) -> None:
    program, data, _ = CASES[name]
    start = initial_values(program, *(x.to(dtype) if x.is_floating_point() else x for x in data))
    for parameter, value in start.items():
        assert value.dtype == dtype
        if not (parameter in ("scale_tril", "covariance") and value.dim() == 2):  # tied
            torch.testing.assert_close(value, value[:1].expand_as(value))


@every_chain
def test_chains_are_found(name: str) -> None:
    fit, (program, data, df) = chain_fitted(name), CHAINS[name]
    assert fit.converged
    assert fit.df == df
    assert accuracy(fit, sequences(Draws(2), 40, 12)) > 0.9
    assert "chain kernel" in fit.explain()
    assert all(rung.startswith("closed form") for rung in updates(fit).values())
    again = pickle.loads(pickle.dumps(program))
    value = float(pyroem.log_joint(again, fit.params, *data))
    assert value == pytest.approx(fit.log_joint, rel=1e-11)


# ---------------------------------------------------------------------------------------
# The likelihood is the textbook's


def mixed_up(weights: Tensor, densities: Any) -> float:
    """The log-likelihood of a mixture, from log-densities ``[N, K]``."""
    return float(logsumexp(np.asarray(densities) + np.log(weights.numpy()), axis=1).sum())


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_the_likelihood_of_t_mixtures(covariance: str) -> None:
    fit, (x,) = fitted(f"t {covariance}"), CASES[f"t {covariance}"][1]
    p, points = fit.params, x.numpy()
    columns = []
    for k in range(3):
        df, loc = float(p["df"][k]), p["loc"][k].numpy()
        if "scale_tril" in p:
            tril = p["scale_tril"][k] if covariance == "full" else p["scale_tril"]
            columns.append(stats.multivariate_t.logpdf(points, loc, (tril @ tril.T).numpy(), df))
        else:
            columns.append(stats.t.logpdf(points, df, loc, p["scale"][k].numpy()).sum(-1))
    value = mixed_up(p["weights"], np.stack(columns, -1))
    assert fit.log_likelihood == pytest.approx(value, rel=1e-10)


def test_the_likelihoods_of_counts_and_codes() -> None:
    p, (n,) = fitted("poisson").params, CASES["poisson"][1]
    density = stats.poisson.logpmf(n.numpy()[:, None], p["rate"].numpy()).sum(-1)
    assert fitted("poisson").log_likelihood == pytest.approx(mixed_up(p["weights"], density))

    p, (n,) = fitted("zero-inflated").params, CASES["zero-inflated"][1]
    gate, zero = p["gate"].numpy(), n.numpy()[:, None] == 0
    pmf = (1 - gate) * stats.poisson.pmf(n.numpy()[:, None], p["rate"].numpy()) + gate * zero
    value = mixed_up(p["weights"], np.log(pmf).sum(-1))
    assert fitted("zero-inflated").log_likelihood == pytest.approx(value, rel=1e-10)

    p, (b,) = fitted("bernoulli").params, CASES["bernoulli"][1]
    density = stats.bernoulli.logpmf(b.numpy()[:, None], p["probs"].numpy()).sum(-1)
    value = mixed_up(p["weights"], density)
    assert fitted("bernoulli").log_likelihood == pytest.approx(value, rel=1e-10)

    p, (y,) = fitted("classes").params, CASES["classes"][1]
    density = sum(p[f"probs_{j}"].log().T[y[:, j].long()].numpy() for j in range(5))
    value = mixed_up(p["weights"], density)
    assert fitted("classes").log_likelihood == pytest.approx(value, rel=1e-10)


def test_the_likelihood_of_mixed_columns() -> None:
    p, (m,) = fitted("mixed").params, CASES["mixed"][1]
    x = m.numpy()[:, None]
    density = stats.norm.logpdf(x[..., [0, 4]], p["loc"].numpy(), p["scale"].numpy()).sum(-1)
    density += stats.poisson.logpmf(x[..., 1], p["rate"][:, 0].numpy())
    density += stats.bernoulli.logpmf(x[..., 3], p["probs"][:, 0].numpy())
    for name, place, column in (("probs_2", 0, 2), ("probs_2", 1, 6), ("probs_3", 0, 5)):
        density += p[name][:, place].log().T[m[:, column].long()].numpy()
    value = mixed_up(p["weights"], density)
    assert fitted("mixed").log_likelihood == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("family", ["gaussian", "poisson", "binomial"])
@pytest.mark.parametrize("concomitant", [False, True])
def test_the_likelihood_of_regressions(family: Any, concomitant: bool) -> None:
    x, y = lines(Draws(3), truth(), family)
    program = mixture_of_regressions(3, family, intercept=True, concomitant=concomitant)
    size = None if family == "gaussian" else torch.arange(600) % 3 + 10
    fit = EM(max_iter=5).fit(program, x, y, None, size, seed=0)
    p, X = fit.params, np.column_stack([np.ones(600), x.numpy()])
    eta = X @ p["coefficients"].numpy().T
    if family == "gaussian":
        density = stats.norm.logpdf(y.numpy()[:, None], eta, p["scale"].numpy())
    else:
        assert size is not None
        sizes, seen = size.numpy()[:, None], y.numpy()[:, None]
        if family == "poisson":
            density = stats.poisson.logpmf(seen, sizes * np.exp(eta))
        else:
            density = stats.binom.logpmf(seen, sizes, 1 / (1 + np.exp(-eta)))
    gate = torch.as_tensor(X) @ p["gate"].T if concomitant else p["weights"].log().expand(600, 3)
    value = mixed_up(torch.ones(3), density + gate.log_softmax(-1).numpy())
    assert fit.log_likelihood == pytest.approx(value, rel=1e-10)


# ---------------------------------------------------------------------------------------
# One component


def test_one_component_of_counts_and_codes() -> None:
    _, (n,), _ = CASES["poisson"]
    exposure = 0.5 + Draws(4).uniform(len(n))
    fit = EM().fit(poisson_mixture(1), n, exposure=exposure)
    torch.testing.assert_close(fit.params["rate"][0], n.sum(0) / exposure.sum())
    _, (y,), _ = CASES["classes"]
    fit = EM().fit(latent_class(1, CATEGORIES), y)
    for j, size in enumerate(CATEGORIES):
        share = torch.bincount(y[:, j].long(), minlength=size) / len(y)
        torch.testing.assert_close(fit.params[f"probs_{j}"][0], share.double())
    _, (b,), _ = CASES["bernoulli"]
    torch.testing.assert_close(EM().fit(bernoulli_mixture(1), b).params["probs"][0], b.mean(0))


def test_one_component_with_extra_zeros() -> None:
    n = CASES["zero-inflated"][1][0][::3, 1:]  # one component, one column
    fit = EXACT.fit(zero_inflated_mixture(1), n)
    # At the maximum E x = (1 - gate) rate and P(x > 0) = (1 - gate) (1 - exp(-rate)).
    shown, mean = float((n > 0).double().mean()), float(n.mean())
    rate = optimize.brentq(lambda r: shown * r / -np.expm1(-r) - mean, 1e-3, 100.0)
    assert float(fit.params["rate"]) == pytest.approx(rate, rel=1e-6)
    assert float(fit.params["gate"]) == pytest.approx(1 - mean / rate, rel=1e-5)


def test_one_component_of_t() -> None:
    x = torch.as_tensor(stats.t.rvs(3.0, 10.0, 2.0, size=(400, 1), random_state=0))
    for covariance in ("full", "diagonal", "tied", "spherical"):
        kind: Any = covariance
        fit = EXACT.fit(student_t_mixture(1, kind), x)
        p = fit.params
        spread = "scale_tril" if covariance in ("full", "tied") else "scale"
        own = [float(p[name]) for name in ("df", "loc", spread)]
        df, loc, scale = stats.t.fit(x.numpy().ravel())
        assert own == pytest.approx([df, loc, scale], rel=2e-3)
        best = stats.t.logpdf(x.numpy(), df, loc, scale).sum()
        assert fit.log_likelihood >= best - 1e-7


def test_one_regression_is_that_of_scikit_learn() -> None:
    d = Draws(5)
    x = d.normal(300, 3)
    eta = 0.5 + x @ real([1.0, -0.5, 0.2])
    X = x.numpy()

    def found(family: Any, y: Tensor) -> list[float]:
        fit = EXACT.fit(mixture_of_regressions(1, family, intercept=True), x, y)
        return fit.params["coefficients"][0].tolist()

    def theirs(estimator: Any, y: Tensor) -> list[float]:
        estimator.fit(X, y.numpy())
        return [float(np.ravel(estimator.intercept_)[0]), *np.ravel(estimator.coef_)]

    y = eta + d.normal(300)
    assert found("gaussian", y) == pytest.approx(theirs(LinearRegression(), y), rel=1e-8)
    y = torch.poisson(eta.exp(), generator=d.generator)
    poisson = PoissonRegressor(alpha=0.0, tol=1e-12, max_iter=10_000)
    assert found("poisson", y) == pytest.approx(theirs(poisson, y), rel=1e-5)
    y = (d.uniform(300) < eta.sigmoid()).double()
    logistic = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
    assert found("binomial", y) == pytest.approx(theirs(logistic, y), rel=1e-5)


# ---------------------------------------------------------------------------------------
# Labels

LABELLED = [name for name in CASES if "binomial" not in name]


def with_labels(name: str, labels: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    program, data, _ = CASES[name]
    some = torch.full((len(data[0]) - len(labels),), -1)  # rows of noise
    return program, (*data, torch.cat([labels, some]))


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_is_the_weight_of_its_component(name: str) -> None:
    z = truth()
    program, data = with_labels(name, torch.where(torch.arange(600) % 5 == 0, z, -1))
    *plain, labels = data
    params = fitted(name).params
    known = labels >= 0
    rows = pyroem.e_step(program, params, *data)
    free = pyroem.e_step(program, params, *plain)
    own, without = rows.marginals["z"], free.marginals["z"]
    torch.testing.assert_close(own[~known], without[~known], rtol=0, atol=1e-12)
    wanted = torch.nn.functional.one_hot(labels[known], own.shape[-1]).double()
    torch.testing.assert_close(own[known], wanted, rtol=0, atol=0)
    # log p(x, z = label) = log p(x) + log p(z = label | x)
    chosen = without[known].gather(-1, labels[known].unsqueeze(-1)).log().sum()
    if bool(chosen.isfinite()):
        value = float(free.log_likelihood + chosen)
        assert float(rows.log_likelihood) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("name", LABELLED)
def test_unknown_labels_say_nothing(name: str) -> None:
    program, data = with_labels(name, torch.full((600,), -1))
    params = fitted(name).params
    value = float(pyroem.log_joint(program, params, *data))
    assert value == pytest.approx(fitted(name).log_joint, rel=1e-12)


@pytest.mark.parametrize("name", ["poisson", "bernoulli", "classes", "mixed", "bayesian full"])
def test_labels_have_a_kernel(name: str) -> None:
    for labels in (truth(), torch.full((600,), -1), torch.where(truth() == 1, 1, -1)):
        program, data = with_labels(name, labels)
        fit = EM(max_iter=2).fit(program, *data, seed=0)
        assert "mixture kernel" in fit.explain()
        assert fit.df == CASES[name][2]


def test_all_labels_give_the_means_of_the_groups() -> None:
    z = truth()
    program, data = with_labels("poisson", z)
    fit = EM().fit(program, *data)
    for k in range(3):
        torch.testing.assert_close(fit.params["rate"][k], data[0][z == k].mean(0))
    assert torch.as_tensor(fit.predict()).tolist() == z.tolist()


def test_some_labels_clamp_responsibilities_even_far_away() -> None:
    z = truth()
    _, (x,), _ = CASES["bayesian full"]
    labels = torch.where(torch.arange(600) % 4 == 0, z.clamp(max=1), -1)
    labels[0], labels[4] = 1, 1  # wrong ones, one of them far away
    x = x.clone()
    x[4] += 3000.0
    program = gaussian_mixture_with_noise(2, 1e6, "diagonal")
    start = {
        "weights": real([0.4, 0.4, 0.2]),
        "loc": real([[0.0, 0.0], [5.0, 5.0]]),
        "scale": real([[1.0, 1.0], [1.0, 1.0]]),
    }
    fit = EM(max_iter=5, floor=0).fit(program, x, labels, init=start)
    weights, loc, scale = start.values()
    for _ in range(5):
        density = torch.distributions.Normal(loc, scale).log_prob(x.unsqueeze(1)).sum(-1)
        joint = (
            torch.cat([density, torch.full((600, 1), -np.log(1e6)).double()], -1) + weights.log()
        )
        shown = torch.nn.functional.one_hot(labels.clamp(min=0), 3).double()
        r = torch.where((labels >= 0).unsqueeze(-1), shown, joint.softmax(-1))
        n = r.sum(0)
        weights, loc = n / n.sum(), (r.T @ x)[:2] / n[:2, None]
        scale = ((r.T @ x**2)[:2] / n[:2, None] - loc**2).sqrt()
    assert float(joint[4, 1]) < float(joint[4, 2]) - 10  # without a label it would be noise
    for name, value in (("weights", weights), ("loc", loc), ("scale", scale)):
        torch.testing.assert_close(fit.params[name], value, rtol=1e-8, atol=1e-8)
    assert torch.as_tensor(fit.predict())[[0, 4]].tolist() == [1, 1]
    assert "mixture kernel" in fit.explain()


def test_a_label_thousands_of_nats_away() -> None:
    n = torch.cat([CASES["poisson"][1][0], real([[5000.0, 0.0]])])
    labels = torch.cat([torch.full((600,), -1), torch.tensor([0])])
    params = {"weights": real([0.3, 0.3, 0.4]), "rate": RATE}
    posterior = pyroem.e_step(poisson_mixture(3), params, n, labels)
    assert posterior.marginals["z"][-1].tolist() == [1.0, 0.0, 0.0]
    without = pyroem.e_step(poisson_mixture(3), params, n[:-1])
    own = np.log(0.3) + stats.poisson.logpmf([5000, 0], RATE[0]).sum()
    other = stats.poisson.logpmf([5000, 0], RATE[2]).sum()
    assert other - own > 5000
    found = float(posterior.log_likelihood - without.log_likelihood)
    assert found == pytest.approx(own, rel=1e-12)
    fit = EM(max_iter=3).fit(poisson_mixture(3), n, labels, init=params)
    assert "mixture kernel" in fit.explain()
    assert fit.responsibilities()[-1].tolist() == [1.0, 0.0, 0.0]
    assert fit.history[0].log_joint == pytest.approx(float(posterior.log_likelihood), rel=1e-12)


def test_new_rows_need_no_labels() -> None:
    n = CASES["poisson"][1][0]
    fit = EM().fit(poisson_mixture(3), n, torch.where(torch.arange(600) < 60, truth(), -1))
    new = counts(Draws(10), truth(each=20))
    alone = fit.responsibilities(new)
    torch.testing.assert_close(alone, fit.responsibilities(new, torch.full((60,), -1)))
    joint = fit.params["weights"].log() + dist.Poisson(fit.params["rate"]).log_prob(
        new.unsqueeze(1)
    ).sum(-1)
    torch.testing.assert_close(alone, joint.softmax(-1))


def test_labels_in_blocks_some_of_which_have_none() -> None:
    n = CASES["poisson"][1][0]
    labels = torch.where(torch.arange(600) < 100, truth(), -1)
    whole = EM().fit(poisson_mixture(3), n, labels)
    pairs = [(n[i : i + 150], labels[i : i + 150]) for i in range(0, 600, 150)]
    parts = EM().fit(poisson_mixture(3), blocks(lambda: iter(pairs)), init=whole)
    assert parts.log_joint == pytest.approx(whole.log_joint, rel=1e-10)


# ---------------------------------------------------------------------------------------
# Priors


def test_the_gaussian_prior_is_that_of_mclust() -> None:
    """The modes of Fraley and Raftery (2007), for rows whose components are known."""
    _, (x,), _ = CASES["bayesian full"]
    z, prior, (K, D) = truth(), weak_prior(x), (3, 2)
    shrinkage, nu, scale = 0.01, D + 2, prior.covariance / K ** (2 / D)
    outer = {}
    for k in range(K):
        own = x[z == k]
        n, mean = len(own), own.mean(0)
        gap, centred = mean - prior.mean, own - mean
        cross = shrinkage * n / (shrinkage + n) * torch.outer(gap, gap)
        outer[k] = (
            n,
            (n * mean + shrinkage * prior.mean) / (n + shrinkage),
            cross + centred.T @ centred,
        )

    def found(covariance: Any) -> dict[str, Tensor]:
        program = bayesian_gaussian_mixture(K, prior, covariance)
        return dict(EXACT.fit(program, x, z).params)

    full, tied, diagonal, spherical = map(found, ("full", "tied", "diagonal", "spherical"))
    for k, (n, loc, total) in outer.items():
        for p in (full, tied, diagonal, spherical):
            torch.testing.assert_close(p["loc"][k], loc, rtol=1e-7, atol=1e-7)
        wanted = (scale + total) / (nu + n + D + 2)
        torch.testing.assert_close(full["precision"][k].inverse(), wanted, rtol=1e-7, atol=1e-7)
        wanted = (scale.diagonal() + total.diagonal()) / (nu + n + 3)
        torch.testing.assert_close(diagonal["variance"][k], wanted, rtol=1e-7, atol=1e-7)
        wanted = (scale.diagonal().mean() + total.trace()) / (nu + (n + 1) * D + 2)
        torch.testing.assert_close(spherical["variance"][k], wanted, rtol=1e-7, atol=1e-7)
    wanted = (scale + sum(t for _, _, t in outer.values())) / (nu + len(x) + D + K + 1)
    torch.testing.assert_close(tied["precision"].inverse(), wanted, rtol=1e-7, atol=1e-7)


def test_a_prior_keeps_a_component_from_a_collapse() -> None:
    x = torch.cat([Draws(6).normal(60, 2), 5 + torch.zeros(3, 2).double()])
    fit = EM().fit(bayesian_gaussian_mixture(2, weak_prior(x)), x, seed=0)
    assert fit.converged, str(fit)


def test_priors_on_counts_and_codes_are_rows_like_the_average_one() -> None:
    z, size = truth(), 3.0
    (n,), (b,), (y,) = (CASES[name][1] for name in ("poisson", "bernoulli", "classes"))
    fits = [
        EM().fit(poisson_mixture(3, weak_prior(n, size)), n, z),
        EM().fit(bernoulli_mixture(3, weak_prior(b, size)), b, z),
        EM().fit(latent_class(3, CATEGORIES, weak_category_prior(y, CATEGORIES, size)), y, z),
    ]
    one_hot = [torch.nn.functional.one_hot(y[:, j].long()).double() for j in range(5)]
    means = [n.mean(0), b.mean(0), *(t.mean(0) for t in one_hot)]
    for k in range(3):
        own = [n[z == k], b[z == k], *(t[z == k] for t in one_hot)]
        wanted = [(t.sum(0) + m) / (len(t) + 1) for t, m in zip(own, means, strict=True)]
        found = [fits[0].params["rate"][k], fits[1].params["probs"][k]]
        found += [fits[2].params[f"probs_{j}"][k] for j in range(5)]
        for a, wish in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, wish, rtol=1e-9, atol=1e-12)


def test_a_weak_prior_leaves_rows_with_nan_out() -> None:
    x = Draws(7).normal(50, 3)
    holed = torch.cat([x, real([[np.nan, 1e9, 0.0]])])
    for own, wanted in zip(weak_prior(holed), weak_prior(x), strict=True):
        torch.testing.assert_close(own, wanted)
    torch.testing.assert_close(weak_prior(x).covariance, torch.as_tensor(np.cov(x.numpy().T)))
    assert weak_prior(x[:, :1]).covariance.shape == (1, 1)
    (shares,) = weak_category_prior(real([[0.0], [2.0], [np.nan], [2.0]]), (4,)).proportions
    torch.testing.assert_close(shares, real([1.0, 0.0, 2.0, 0.0]) / 3)


def test_a_program_with_a_prior_reads_blocks() -> None:
    n = CASES["poisson"][1][0]
    program = poisson_mixture(3, weak_prior(n))
    parts = EM().fit(program, blocks(lambda: iter(n.split(100))), init=fitted("poisson prior"))
    assert parts.log_joint == pytest.approx(fitted("poisson prior").log_joint, rel=1e-9)


# ---------------------------------------------------------------------------------------
# Noise


def noise_under_a_mask(covariance: str, x: Tensor, low: Tensor, high: Tensor) -> None:
    """Two Gaussians and a uniform noise, each a site of its own."""
    weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_zeros(2, 2))
    start = NOISE_SPREADS[covariance].to(x)
    matrix = covariance in ("full", "tied")
    own = constraints.positive_definite if matrix else constraints.positive
    spread = pyro.param("covariance" if matrix else "scale", start, constraint=own)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        k = z.clamp(max=1)
        with poutine.mask(mask=z < 2):
            if matrix:
                each = spread if covariance == "tied" else spread[k]
                emission = dist.MultivariateNormal(loc[k], each)
            else:
                each = spread[k] if covariance == "diagonal" else spread[k].unsqueeze(-1)
                emission = dist.Normal(loc[k], each).to_event(1)
            pyro.sample("x", emission, obs=x)
        with poutine.mask(mask=z == 2):
            pyro.sample("noise", dist.Uniform(low, high).to_event(1), obs=x)


NOISE_SPREADS = {
    "full": torch.eye(2, dtype=torch.float64).repeat(2, 1, 1),
    "tied": torch.eye(2, dtype=torch.float64),
    "diagonal": torch.ones(2, 2, dtype=torch.float64),
    "spherical": torch.ones(2, dtype=torch.float64),
}


@pytest.mark.parametrize("covariance", NOISE_SPREADS)
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_noise_is_uniform(shift: float, covariance: Any) -> None:
    d = Draws(8)
    x = torch.cat([clusters(d, truth(2)), 30 * d.uniform(80, 2) - 10]) + shift
    low, high = x.amin(0) - 1e-9, x.amax(0) + 1e-9
    volume = float((high - low).prod())
    start = {
        "weights": real([0.4, 0.4, 0.2]),
        "loc": real([[0.0, 0.0], [5.0, 5.0]]) + shift,
        "covariance" if covariance in ("full", "tied") else "scale": NOISE_SPREADS[covariance],
    }
    fits = [
        EXACT.fit(gaussian_mixture_with_noise(2, volume, covariance), x, init=start),
        EXACT.fit(partial(noise_under_a_mask, covariance), x, low, high, init=start),
    ]
    assert fits[0].converged
    assert "mixture kernel" in fits[0].explain()
    assert fits[0].log_likelihood == pytest.approx(fits[1].log_likelihood, rel=1e-11)
    for name, value in fits[1].params.items():
        torch.testing.assert_close(fits[0].params[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_many_columns_has_the_density_of_its_volume(dtype: torch.dtype) -> None:
    x = Draws(9).normal(60, 30)
    program = gaussian_mixture_with_noise(1, 1e30, "diagonal")
    params = {
        "weights": real([1e-300, 1.0]),
        "loc": real([[0.0] * 30]),
        "scale": real([[1.0] * 30]),
    }
    fit = EM(max_iter=1, dtype=dtype).fit(program, x, torch.ones(60).long(), init=params)
    value = fit.history[0].log_joint
    assert value == pytest.approx(
        -60 * 30 * np.log(10.0), rel=1e-5 if dtype == torch.float32 else 1e-12
    )


def test_the_volume_of_a_box() -> None:
    x = real([[0.0, -1.0], [2.0, 3.0], [1.0, 0.0], [np.nan, 50.0]])
    assert box_volume(x[:3]) == pytest.approx(8.0)
    assert box_sides(x) == [2.0, 51.0]  # what is seen of a row lies inside
    assert box_volume(x.numpy()) == pytest.approx(102.0)
    with pytest.raises(ValueError, match="columns of positive length"):
        box_sides(x[:1])


# ---------------------------------------------------------------------------------------
# Hidden Markov models


@every_chain
def test_padding_and_one_sequence(name: str) -> None:
    program, (x,), _ = CHAINS[name]
    x, params = x[:6], chain_fitted(name).params
    lengths = torch.tensor([3, 12, 5, 2, 7, 12])
    padded = x.clone()
    padded[torch.arange(12) >= lengths.unsqueeze(-1)] = 1.0
    ragged = float(pyroem.log_joint(program, params, padded, lengths))
    alone = [
        float(pyroem.log_joint(program, params, s[:t])) for s, t in zip(x, lengths, strict=True)
    ]
    assert ragged == pytest.approx(sum(alone), rel=1e-11)


@pytest.mark.parametrize("name", ["full", "diagonal", "poisson"])
def test_hmmlearn_gives_the_same_likelihood(name: str) -> None:
    p, (x,) = chain_fitted(name).params, CHAINS[name][1]
    peer = hmm.PoissonHMM(3) if name == "poisson" else hmm.GaussianHMM(3, name[:4])
    peer.startprob_, peer.transmat_ = p["initial"].numpy(), p["transition"].numpy()
    peer.n_features = 2
    if name == "poisson":
        peer.lambdas_ = p["rate"].numpy()
    else:
        peer.covariance_type = "full" if name == "full" else "diag"
        peer.means_ = p["loc"].numpy()
        peer.covars_ = p["covariance"].numpy() if name == "full" else p["scale"].numpy() ** 2
    theirs = peer.score(x.reshape(-1, 2).numpy(), [12] * 40)
    assert chain_fitted(name).log_likelihood == pytest.approx(theirs, rel=1e-9)


def test_one_state_is_no_chain() -> None:
    _, (x,), _ = CHAINS["full"]
    fit = EM().fit(hidden_markov(1), x)
    rows = x.reshape(-1, 2)
    torch.testing.assert_close(fit.params["loc"][0], rows.mean(0))
    torch.testing.assert_close(fit.params["covariance"][0], torch.cov(rows.T, correction=0))
    one = EM().fit(hidden_markov(1), x[0])
    torch.testing.assert_close(one.params["loc"][0], x[0].mean(0))


# ---------------------------------------------------------------------------------------
# Codes and errors


def test_codes_may_be_integers_or_floats() -> None:
    program, (y,), _ = CASES["classes"]
    params = fitted("classes").params
    for cast in (y.long(), y.float(), y.int()):
        fit = EM(max_iter=2).fit(program, cast, init=params)
        assert fit.history[0].log_joint == pytest.approx(fitted("classes").log_joint, rel=1e-10)


X, Y, PRIOR = torch.zeros(4, 2), torch.zeros(4), Prior(torch.zeros(2), torch.eye(2), 1.0)
LABELS = torch.zeros(4, dtype=torch.long)
MISTAKES: dict[str, Callable[[], object]] = {
    r"components >= 1; got 0": lambda: poisson_mixture(0),
    r"components >= 1; got -1": lambda: student_t_mixture(-1),
    r"covariance in .*; got 'round'": lambda: student_t_mixture(2, "round"),  # type: ignore[arg-type]
    r"df > 0, or None .*; got 0": lambda: student_t_mixture(2, df=0),
    r"categories >= 1; got 0": lambda: latent_class(2, (2, 0)),
    r"a prior on \(2, 3\) categories; got one on \(2,\)": lambda: latent_class(
        2, (2, 3), weak_category_prior(X[:, :1], (2,))
    ),
    r"a kind in .*; got 'text'": lambda: mixed_mixture(2, ["text"]),
    r"a number of categories >= 1; got 0": lambda: mixed_mixture(2, [0]),
    r"a kind for each column; got none": lambda: mixed_mixture(2, []),
    r"family in .*; got 'gamma'": lambda: mixture_of_regressions(2, "gamma"),  # type: ignore[arg-type]
    r"a volume, or lengths of sides, positive and finite; got 0": lambda: (
        gaussian_mixture_with_noise(2, 0.0)
    ),
    r"shrinkage > 0; got 0": lambda: bayesian_gaussian_mixture(2, PRIOR, shrinkage=0.0),
    r"a prior with a positive definite covariance": lambda: bayesian_gaussian_mixture(
        2, weak_prior(X)
    ),
    r"degrees > 1 for 2 columns; got 1": lambda: bayesian_gaussian_mixture(2, PRIOR, degrees=1.0),
    r"states >= 1; got 0": lambda: hidden_markov(0),
    r"emission in .*; got 'gamma'": lambda: hidden_markov(2, "gamma"),  # type: ignore[arg-type]
    r"categories with emission 'categorical'": lambda: hidden_markov(2, "poisson", categories=3),
    r"categorical', and only then; got None": lambda: hidden_markov(2, "categorical"),
    r"size > 0; got 0": lambda: weak_prior(X, size=0.0),
    r"two rows without NaN; got 1": lambda: weak_prior(X[:1]),
    r"x of shape \[N, D\]; got \[4\]": lambda: poisson_mixture(2)(Y),
    r"x of shape \[N, 3\]; got \[4, 2\]": lambda: latent_class(2, (2, 2, 2))(X),
    r"x of shape \[N, 1\]; got \[4, 2\]": lambda: mixed_mixture(2, ["poisson"])(X),
    r"y of shape \[4\]; got \[4, 2\]": lambda: mixture_of_regressions(2)(X, X),
    r"size with counts only": lambda: mixture_of_regressions(2)(X, Y, None, Y),
    r"exposure of shape \[4\]; got \[3\]": lambda: poisson_mixture(2)(X, exposure=Y[:3]),
    r"labels of shape \[4\]; got \[3\]": lambda: bernoulli_mixture(2)(X, LABELS[:3]),
    r"labels in -1, ..., 1; got 0 to 2": lambda: bernoulli_mixture(2)(X, torch.arange(4) % 3),
    r"labels in -1, ..., 1; got -2 to -2": lambda: bernoulli_mixture(2)(X, LABELS - 2),
    r"labels that are integers; got torch.float32": lambda: bernoulli_mixture(2)(X, Y),
    r"x of shape \[S, T, D\] or \[T, D\]; got \[4\]": lambda: hidden_markov(2)(Y),
    r"lengths with x of shape \[S, T, D\] only": lambda: hidden_markov(2)(X, LABELS),
    r"lengths of shape \[1\]; got \[4\]": lambda: hidden_markov(2)(X[None], LABELS),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message: str) -> None:
    with pyro.get_param_store().scope(), pytest.raises(ValueError, match=message):
        MISTAKES[message]()
