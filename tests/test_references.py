"""Other programs, and optima that they found, agree."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hmmlearn import hmm
from problems import PROBLEMS, poisson_mixture
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, init_to_value
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import poisson
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, MAP, datasets
from pyroem.models import gaussian_mixture

Shape = Literal["full", "tied", "diagonal", "spherical"]
SHAPES: tuple[Shape, ...] = ("full", "tied", "diagonal", "spherical")


def exactly(n: int) -> EM:
    """EM that makes ``n`` iterations, whatever happens."""
    return EM(tol=0, param_tol=0, max_iter=n, floor=0)


def equal(found: Tensor, wanted: Any, tolerance: float) -> None:
    wanted = torch.as_tensor(np.asarray(wanted), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------
# scikit-learn


def precisions(covariance: Shape, spread: Tensor) -> Any:
    if covariance in ("full", "tied"):
        return torch.linalg.inv(spread).numpy()
    return (spread**-2).numpy()


def real(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture_start(covariance: Shape) -> dict[str, Tensor]:
    spreads = {
        "full": real([[[1.0, 0.2], [0.2, 2.0]], [[2.0, 0.0], [0.0, 1.0]]]),
        "tied": real([[1.5, 0.3], [0.3, 1.0]]),
        "diagonal": real([[1.0, 2.0], [1.5, 0.7]]),
        "spherical": real([1.0, 1.6]),
    }
    return {
        "weights": real([0.4, 0.6]),
        "loc": real([[-1.0, 0.5], [1.0, 0.0]]),
        "covariance" if covariance in ("full", "tied") else "scale": spreads[covariance],
    }


@pytest.mark.parametrize("iterations", [1, 5, 20])
@pytest.mark.parametrize("covariance", SHAPES)
def test_scikit_learn(covariance: Shape, iterations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    x[:120] = 0.8 * x[:120] + torch.tensor([3.0, 1.0])
    start = mixture_start(covariance)
    spread = start.get("covariance", start.get("scale"))
    assert spread is not None
    theirs = GaussianMixture(
        2,
        covariance_type={"diagonal": "diag"}.get(covariance, covariance),
        tol=0,
        reg_covar=0,
        max_iter=iterations,
        weights_init=start["weights"].numpy(),
        means_init=start["loc"].numpy(),
        precisions_init=precisions(covariance, spread),
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as asked
        theirs.fit(x.numpy())
    fit = exactly(iterations).fit(gaussian_mixture(2, covariance), x, init=start)
    assert fit.n_iter == iterations
    equal(fit.params["weights"], theirs.weights_, 1e-8)
    equal(fit.params["loc"], theirs.means_, 1e-8)
    if "covariance" in start:
        equal(fit.params["covariance"], theirs.covariances_, 1e-8)
    else:
        equal(fit.params["scale"] ** 2, theirs.covariances_, 1e-8)
    assert fit.log_likelihood == pytest.approx(theirs.score(x.numpy()) * len(x), rel=1e-10)
    equal(fit.responsibilities(), theirs.predict_proba(x.numpy()), 1e-8)
    assert fit.df == theirs._n_parameters()
    assert fit.bic() == pytest.approx(theirs.bic(x.numpy()), rel=1e-10)
    assert fit.aic() == pytest.approx(theirs.aic(x.numpy()), rel=1e-10)


# ---------------------------------------------------------------------------------------
# hmmlearn


INITIAL = torch.tensor([0.6, 0.4], dtype=torch.float64)
TRANSITION = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)


def chain(x: Tensor, k: int = 2) -> tuple[Any, Any]:
    uniform = torch.full((k,), 1 / k, dtype=torch.float64)
    initial = pyro.param("initial", uniform, constraint=constraints.simplex)
    transition = pyro.param("transition", uniform.repeat(k, 1), constraint=constraints.simplex)
    return initial, transition


def gaussian_hmm(x: Tensor) -> None:
    initial, transition = chain(x)
    loc = pyro.param("loc", x.new_zeros(2))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    z: Any = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], scale[z]), obs=x[t])


def categorical_hmm(y: Tensor) -> None:
    initial, transition = chain(y)
    probs = pyro.param("probs", torch.ones(2, 3) / 3, constraint=constraints.simplex)
    z: Any = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Categorical(probs[z]), obs=y[t])


def poisson_hmm(n: Tensor, k: int = 2) -> None:
    initial, transition = chain(n, k)
    rate = pyro.param("rate", torch.ones(k), constraint=constraints.positive)
    z: Any = None
    for t in pyro.markov(range(len(n))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"n_{t}", dist.Poisson(rate[z]), obs=n[t])


def hmm_data(steps: int) -> tuple[Tensor, Tensor]:
    """States that stay for a while, and noise."""
    generator = torch.Generator().manual_seed(0)
    states = (torch.arange(steps) // 5) % 2
    return states, torch.randn(steps, generator=generator, dtype=torch.float64)


def fitted(theirs: Any, x: Tensor) -> Any:
    theirs.startprob_, theirs.transmat_ = INITIAL.numpy(), TRANSITION.numpy()
    return theirs.fit(x.numpy().reshape(len(x), 1))


def same_chain(fit: pyroem.Fit, theirs: Any, x: Tensor) -> None:
    equal(fit.params["initial"], theirs.startprob_, 1e-7)
    equal(fit.params["transition"], theirs.transmat_, 1e-7)
    column = x.numpy().reshape(len(x), 1)
    assert fit.log_likelihood == pytest.approx(theirs.score(column), rel=1e-8)
    equal(fit.responsibilities(), theirs.predict_proba(column), 1e-7)
    assert fit.predict().tolist() == theirs.predict(column).tolist()


ITERATIONS = pytest.mark.parametrize("iterations", [1, 6])


@ITERATIONS
def test_hmmlearn_gaussian(iterations: int) -> None:
    states, noise = hmm_data(24)
    x = 2.5 * states + noise
    theirs = hmm.GaussianHMM(
        2, "diag", min_covar=0, covars_prior=0, covars_weight=1, init_params="",
        n_iter=iterations, tol=-np.inf,
    )  # fmt: skip
    theirs.means_, theirs.covars_ = np.array([[0.5], [2.0]]), np.array([[1.5], [1.0]])
    fitted(theirs, x)
    init = {
        "initial": INITIAL,
        "transition": TRANSITION,
        "loc": [0.5, 2.0],
        "scale": [1.5**0.5, 1.0],
    }
    fit = exactly(iterations).fit(gaussian_hmm, x, init=init)
    same_chain(fit, theirs, x)
    equal(fit.params["loc"], theirs.means_[:, 0], 1e-7)
    equal(fit.params["scale"] ** 2, theirs.covars_[:, 0, 0], 1e-7)


@ITERATIONS
def test_hmmlearn_categorical(iterations: int) -> None:
    states, noise = hmm_data(24)
    y = (states + (noise > 0.8).long()).clamp(max=2)
    theirs = hmm.CategoricalHMM(2, init_params="", n_iter=iterations, tol=-np.inf)
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)
    theirs.emissionprob_, theirs.n_features = probs.numpy(), 3
    fitted(theirs, y)
    init = {"initial": INITIAL, "transition": TRANSITION, "probs": probs}
    fit = exactly(iterations).fit(categorical_hmm, y, init=init)
    same_chain(fit, theirs, y)
    equal(fit.params["probs"], theirs.emissionprob_, 1e-7)


@ITERATIONS
def test_hmmlearn_poisson(iterations: int) -> None:
    states, noise = hmm_data(24)
    n = (2 + 5 * states + 1.5 * noise).round().clamp(min=0).long()
    theirs = hmm.PoissonHMM(2, init_params="", n_iter=iterations, tol=-np.inf)
    theirs.lambdas_ = np.array([[2.0], [5.0]])
    fitted(theirs, n)
    init = {"initial": INITIAL, "transition": TRANSITION, "rate": [2.0, 5.0]}
    fit = exactly(iterations).fit(poisson_hmm, n.double(), init=init)
    same_chain(fit, theirs, n)
    equal(fit.params["rate"], theirs.lambdas_[:, 0], 1e-7)


# ---------------------------------------------------------------------------------------
# Pyro's own gradient inference, and scipy


def test_pyro_svi_with_a_delta_guide_finds_the_same_mode() -> None:
    problem = next(p for p in PROBLEMS if p.name == "poisson_mixture")
    (n,) = problem.data
    em = EM(tol=1e-12, param_tol=1e-8).fit(poisson_mixture, n, init=problem.params)
    by_gradient = MAP(tol=1e-12, param_tol=1e-8).fit(poisson_mixture, n, init=problem.params)
    assert by_gradient.log_joint == pytest.approx(em.log_joint, abs=1e-6)
    guide = AutoDelta(
        poutine.block(poisson_mixture, hide=["z"]), init_loc_fn=init_to_value(values=problem.params)
    )
    steps = 900
    optimiser = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.002 ** (1 / steps), "clip_norm": 1e9})
    svi = SVI(config_enumerate(poisson_mixture), guide, optimiser, TraceEnum_ELBO())
    for _ in range(steps):
        loss = svi.step(n)
    assert -loss == pytest.approx(em.log_joint, abs=1e-4)
    with torch.no_grad():
        mode = guide(n)
    for name in ("weights", "rate"):
        torch.testing.assert_close(mode[name], em.params[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(by_gradient.params[name], em.params[name], rtol=1e-4, atol=1e-4)


def flat_poisson_mixture(n: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 8.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Poisson(rate[z]), obs=n)


def test_scipy_on_the_marginal_likelihood() -> None:
    rng = np.random.default_rng(0)
    counts = np.concatenate([rng.poisson(2.0, 150), rng.poisson(9.0, 100)])

    def loss(raw: np.ndarray) -> float:
        log_w = np.array([-np.log1p(np.exp(-raw[0])), -np.log1p(np.exp(raw[0]))])
        terms = log_w + poisson.logpmf(counts[:, None], np.exp(raw[1:]))
        return -float(logsumexp(terms, axis=1).sum())

    best = minimize(
        loss, [0.0, 0.0, 2.0], method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000},
    )  # fmt: skip
    for solver in (EM(tol=1e-13, param_tol=1e-9), MAP(tol=1e-13, param_tol=1e-9)):
        fit = solver.fit(flat_poisson_mixture, counts.astype(float))
        assert fit.log_likelihood == pytest.approx(-best.fun, abs=1e-7)
        equal(fit.params["rate"], np.exp(best.x[1:]), 1e-5)
        equal(fit.params["weights"][0], 1 / (1 + np.exp(-best.x[0])), 1e-5)


# ---------------------------------------------------------------------------------------
# Old Faithful: the best optima known (mclust, flexmix and scikit-learn)

# log-likelihood, weights, means, covariances (one for each component that has its own)
FAITHFUL: dict[tuple[int, Shape], tuple[float, Any, Any, Any]] = {
    (2, "full"): (
        -1130.2639601847418,
        [0.355872857, 0.644127143],
        [[2.03638845, 54.4785164], [4.28966197, 79.9681152]],
        [
            [[0.0691676726, 0.435167624], [0.435167624, 33.6972821]],
            [[0.169968436, 0.940609319], [0.940609319, 36.0462113]],
        ],
    ),
    (2, "tied"): (
        -1140.186759437082,
        [0.359247849, 0.640752151],
        [[2.04619509, 54.5965139], [4.29603225, 80.0362177]],
        [[0.1327766, 0.751517077], [0.751517077, 35.1705447]],
    ),
    (2, "diagonal"): (
        -1147.8063525378107,
        [0.356516736, 0.643483264],
        [[2.03791567, 54.4929537], [4.29107049, 79.9856215]],
        [[0.0703367505, 33.7558463], [0.16815112, 35.7733512]],
    ),
    (2, "spherical"): (
        -1709.5292821774183,
        [0.367050582, 0.632949418],
        [[2.09767573, 54.7428937], [4.29391341, 80.2649412]],
        [17.3517345, 15.9988288],
    ),
    (3, "full"): (
        -1119.2139705937507,
        [0.332770262, 0.0903567068, 0.576873031],
        [[1.99664727, 54.3828941], [3.5682841, 70.2623035], [4.33533848, 80.5227078]],
        [
            [[0.0439025097, 0.34404502], [0.34404502, 33.7411365]],
            [[0.553603024, 7.84960335], [7.84960335, 134.879927]],
            [[0.135931624, 0.358095003], [0.358095003, 28.5862758]],
        ],
    ),
    (3, "tied"): (
        -1126.3159278234043,
        [0.356378116, 0.168605606, 0.475016278],
        [[2.03761473, 54.4912849], [3.79775803, 77.4688595], [4.46573853, 80.8727514]],
        [[0.0779754438, 0.470158243], [0.470158243, 33.6720391]],
    ),
    (3, "diagonal"): (
        -1127.0075191937296,
        [0.312039669, 0.0684653689, 0.619494962],
        [[1.97737929, 53.4646233], [2.80108487, 63.5927283], [4.32446616, 80.4850385]],
        [[0.0380177309, 26.6153266], [0.291108696, 25.1856918], [0.142579452, 30.1634952]],
    ),
    (3, "spherical"): (
        -1637.434417998613,
        [0.371478192, 0.307606207, 0.320915601],
        [[2.10858295, 54.8922898], [4.23069119, 75.8831937], [4.37218892, 84.6441519]],
        [18.0863516, 4.75946418, 7.00925687],
    ),
}


@pytest.mark.parametrize(("components", "covariance"), FAITHFUL, ids=str)
def test_faithful(components: int, covariance: Shape) -> None:
    log_likelihood, weights, means, spreads = FAITHFUL[components, covariance]
    _, x = datasets.load("faithful")
    model = gaussian_mixture(components, covariance)
    fit = EM(tol=1e-13, param_tol=1e-8, max_iter=20_000).fit(model, x)
    assert fit.converged, str(fit)
    assert fit.log_likelihood == pytest.approx(log_likelihood, abs=1e-6)
    order = fit.params["loc"][:, 0].argsort()
    equal(fit.params["weights"][order], weights, 1e-4)
    equal(fit.params["loc"][order], means, 1e-4)
    if covariance == "tied":
        equal(fit.params["covariance"], spreads, 1e-4)
    elif covariance == "full":
        equal(fit.params["covariance"][order], spreads, 1e-4)
    else:
        equal(fit.params["scale"][order] ** 2, spreads, 1e-4)


# ---------------------------------------------------------------------------------------
# Earthquakes: hidden Markov models fitted by direct maximisation (Zucchini, MacDonald, Langrock)


def earthquakes() -> Tensor:
    _, table = datasets.load("earthquakes", ["count"])
    assert len(table) == 107
    return table[:, 0]


@pytest.mark.parametrize(
    ("k", "log_likelihood", "rates"),
    [
        (2, -341.8787010117187, [15.420761902642896, 26.01823563785099]),
        (3, -328.5274833802021, [13.133761639437108, 19.713164120033348, 29.70972332225533]),
    ],
)
def test_earthquakes(k: int, log_likelihood: float, rates: list[float]) -> None:
    def model(n: Tensor) -> None:
        poisson_hmm(n, k)

    init = {
        "initial": torch.full((k,), 1 / k),
        "transition": (0.2 / k) * torch.ones(k, k) + 0.8 * torch.eye(k),
        "rate": torch.linspace(13, 30, k),
    }
    fit = EM(tol=1e-10, param_tol=1e-4, max_iter=300).fit(model, earthquakes(), init=init)
    assert fit.log_likelihood == pytest.approx(log_likelihood, abs=1e-5)
    equal(fit.params["rate"], rates, 1e-3)


def stationary_hmm(n: Tensor) -> None:
    """The chain starts from where it settles, which the transition matrix tells."""
    transition = pyro.param(
        "transition",
        torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64),
        constraint=constraints.simplex,
    )
    rate = pyro.param("rate", torch.tensor([15.0, 25.0]), constraint=constraints.positive)
    system = torch.eye(2, dtype=torch.float64) - transition + 1
    initial = torch.linalg.solve(system.mT, torch.ones(2, dtype=torch.float64))
    z: Any = None
    for t in pyro.markov(range(len(n))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"n_{t}", dist.Poisson(rate[z]), obs=n[t])


@pytest.mark.parametrize("solver", [EM, MAP])
def test_stationary_earthquakes(solver: Any) -> None:
    fit = solver(tol=1e-9).fit(stationary_hmm, earthquakes())
    assert fit.converged, str(fit)
    assert fit.log_likelihood == pytest.approx(-342.3182667880576, abs=1e-4)
    report = fit.explain()
    line = next(row for row in report.splitlines() if row.startswith("  transition ("))
    assert "closed form:" not in line and "numerically" in line
    equal(fit.params["rate"], [15.472276987628563, 26.125438511639167], 2e-3)
    wanted = [[0.9340406386539679, 0.06595936134603197], [0.12850914840697383, 0.8714908515930261]]
    equal(fit.params["transition"], wanted, 2e-3)
