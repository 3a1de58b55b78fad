"""The table of problems that every law is tested on.

Each program is written as any Pyro user would write it, without a word for pyroem. Its data
are simulated by the program itself at one point, and ``params`` is another point nearby, so
that it is neither the truth nor an optimum. Adding a problem is one function and one row.

Hyperparameters are made from the data (``x.new_tensor``) because torch computes
``Gamma(2.0, 1.0).log_prob(x)`` in single precision even where ``x`` is in double.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from brute_force import SetValues
from draws import real
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import BoolTensor, Tensor
from torch.distributions import AffineTransform, SigmoidTransform, constraints, transform_to

from pyroem import models
from pyroem.constraints import covariances, variances

Axes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Symmetry:
    """States that can be renamed: permuting ``axes`` together changes no likelihood."""

    sites: tuple[str, ...]
    """The assignments whose states are renamed."""
    axes: Axes
    """(parameter, dim) pairs along which these states are laid out."""

    def permute(self, params: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        """The same model with its states renamed: new state ``k`` is old ``order[k]``."""
        renamed = dict(params)
        for name, dim in self.axes:
            renamed[name] = renamed[name].index_select(dim, order)
        return renamed


@dataclass(frozen=True)
class Problem:
    """One program with data and a point in its parameter space."""

    name: str
    model: Callable[..., Any]
    data: tuple[Tensor, ...]
    """Positional arguments of the program."""
    params: dict[str, Tensor]
    """A generic interior point (constrained values): every parameter, with a prior or not."""
    tiny: tuple[Tensor, ...] | None
    """Data cut down until all joint values of the assignments can be tried."""
    states: dict[str, int]
    """Number of states of each assignment (for ``data``)."""
    row_plate: str | None
    """The plate over which rows are independent; every tensor in ``data`` has them first."""
    symmetries: tuple[Symmetry, ...]
    """The ways in which states can be renamed."""
    smooth: bool = True
    """Whether its likelihood has a gradient everywhere."""
    by_hand: Callable[..., Any] | None = None
    """The same without missing values: what is missing is summed out by hand."""

    @property
    def oracle(self) -> Callable[..., Any]:
        """The program that Pyro can run as it stands."""
        return self.by_hand or self.model

    def __repr__(self) -> str:
        return self.name


# ---------------------------------------------------------------------------------------
# Missing values: NaN in the data; beside each program the same with its densities by hand


def missing_in_vectors(x: Tensor) -> None:
    """Multivariate normals with missing elements."""
    _vectors(x, lambda loc, cov: pyro.sample("x", dist.MultivariateNormal(loc, cov), obs=x))


def missing_in_vectors_by_hand(x: Tensor) -> None:
    """Each row's elements that are seen have a normal distribution of their own."""

    def density(loc: Tensor, cov: Tensor) -> None:
        rows = torch.broadcast_shapes(loc.shape[:-1], (len(x),))
        loc, cov = loc.expand((*rows, 3)), cov.expand((*rows, 3, 3))
        found = []
        for n in range(len(x)):
            o = (~x[n].isnan()).nonzero().reshape(-1)
            part = dist.MultivariateNormal(
                loc[..., n, :][..., o], cov[..., n, :, :][..., o, :][..., o]
            )
            found.append(part.log_prob(x[n][o]) if len(o) else loc[..., n, 0] * 0)
        pyro.factor("x", torch.stack(found, -1))

    _vectors(x, density)


def _vectors(x: Tensor, density: Callable[[Tensor, Tensor], object]) -> None:
    k, d = 2, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    one = torch.eye(d, dtype=x.dtype).repeat(k, 1, 1)
    cov = pyro.param("cov", one, constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        density(loc[z], cov[z])


def missing_in_columns(x: Tensor, y: Tensor) -> None:
    """Columns of two kinds with missing cells."""
    loc, scale, probs = _columns_of_two_kinds(x, y)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(pyro.param("weights")))
        pyro.sample("x", dist.Normal(loc[z], scale).to_event(1), obs=x)
        pyro.sample("y", dist.Bernoulli(probs[z]).to_event(1), obs=y)


def missing_in_columns_by_hand(x: Tensor, y: Tensor) -> None:
    """The cells that are missing are masked."""
    loc, scale, probs = _columns_of_two_kinds(x, y)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(pyro.param("weights")))
        normal = dist.Normal(loc[z], scale).mask(~x.isnan()).to_event(1)
        binary = dist.Bernoulli(probs[z]).mask(~y.isnan()).to_event(1)
        pyro.sample("x", normal, obs=x.nan_to_num())
        pyro.sample("y", binary, obs=y.nan_to_num())


def _columns_of_two_kinds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k = 2
    pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, x.shape[-1], dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(x.shape[-1]), constraint=constraints.positive)
    probs = pyro.param(
        "probs",
        lambda: 0.2 + 0.6 * torch.rand(k, y.shape[-1]).to(y),
        constraint=constraints.unit_interval,
    )
    return loc, scale, probs


# ---------------------------------------------------------------------------------------
# Gaussian mixtures


def gaussian_mixture(x: Tensor) -> None:
    """Univariate Gaussians, everything free."""
    weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 0.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(3), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def diagonal_gaussian(x: Tensor) -> None:
    """Gaussians with a diagonal covariance."""
    k, d = 3, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(k, d), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def full_gaussian(x: Tensor) -> None:
    """Gaussians with a covariance matrix each."""
    k, d = 2, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    cov = pyro.param(
        "cov", torch.eye(d, dtype=x.dtype).repeat(k, 1, 1), constraint=constraints.positive_definite
    )
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], covariance_matrix=cov[z]), obs=x)


def tied_gaussian(x: Tensor) -> None:
    """Gaussians that share one covariance matrix."""
    k, d = 3, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    cov = pyro.param("cov", torch.eye(d, dtype=x.dtype), constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], covariance_matrix=cov), obs=x)


def shared_shape(x: Tensor) -> None:
    """Gaussians whose covariances have one shape, with volumes and orientations of their own."""
    _structured(x, covariances("VEV"))


def shared_orientation(x: Tensor) -> None:
    """Gaussians whose covariances have one orientation."""
    _structured(x, covariances("VVE"))


def _structured(x: Tensor, structure: Any) -> None:
    k, d = 2, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    cov = pyro.param("cov", torch.eye(d, dtype=x.dtype).repeat(k, 1, 1), constraint=structure)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], covariance_matrix=cov[z]), obs=x)


def shared_volume(x: Tensor) -> None:
    """Gaussians with diagonal covariances of one volume."""
    k, d = 3, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    variance = pyro.param("variance", x.new_ones(k, d), constraint=variances("EVI"))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()).to_event(1), obs=x)


def cholesky_gaussian(x: Tensor) -> None:
    """Gaussians given by the Cholesky factors of their covariances."""
    k, d = 2, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    scale_tril = pyro.param(
        "scale_tril",
        torch.eye(d, dtype=x.dtype).repeat(k, 1, 1),
        constraint=constraints.lower_cholesky,
    )
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], scale_tril=scale_tril[z]), obs=x)


def precision_gaussian(x: Tensor) -> None:
    """Gaussians given by their precision matrices."""
    k, d = 2, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    precision = pyro.param(
        "precision",
        torch.eye(d, dtype=x.dtype).repeat(k, 1, 1),
        constraint=constraints.positive_definite,
    )
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], precision_matrix=precision[z]), obs=x)


def shared_mean(x: Tensor) -> None:
    """A scale mixture: one mean, a scale for each component."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor(0.0))
    scale = pyro.param("scale", x.new_tensor([0.5, 2.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc, scale[z]), obs=x)


class GaussianModule(PyroModule):
    """A Gaussian mixture as a module, with a prior on the means."""

    def __init__(self, k: int) -> None:
        super().__init__()
        zeros = torch.zeros(k, dtype=torch.float64)
        self.weights = PyroParam((zeros + 1) / k, constraint=constraints.simplex)
        self.scale = PyroParam(zeros + 1, constraint=constraints.positive)
        self.loc = PyroSample(dist.Normal(zeros, 5.0 * (zeros + 1)).to_event(1))

    def forward(self, x: Tensor) -> None:
        """The program."""
        weights: Any = self.weights
        loc: Any = self.loc
        scale: Any = self.scale
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


# ---------------------------------------------------------------------------------------
# Gaussian mixtures with priors


def gaussian_inverse_gamma(x: Tensor) -> None:
    """Independent Normal priors on means and InverseGamma priors on variances."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_full((3,), 2.0)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(x.new_tensor(0.0), x.new_tensor(5.0)))
        var = pyro.sample("var", dist.InverseGamma(x.new_tensor(2.0), x.new_tensor(1.0)))
    scale = var.sqrt()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def gaussian_conjugate(x: Tensor) -> None:
    """The jointly conjugate prior: the spread of a mean depends on its variance."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_full((2,), 2.0)))
    with pyro.plate("components", 2):
        var = pyro.sample("var", dist.InverseGamma(x.new_tensor(3.0), x.new_tensor(2.0)))
        loc = pyro.sample("loc", dist.Normal(x.new_tensor(0.0), (var / 0.1).sqrt()))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], var[z].sqrt()), obs=x)


def gaussian_gamma_precision(x: Tensor) -> None:
    """Gamma priors on precisions."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    with pyro.plate("components", 2):
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.0)))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], precision[z].rsqrt()), obs=x)


def gaussian_lognormal_scale(x: Tensor) -> None:
    """LogNormal priors on scales, which no family is conjugate to."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    with pyro.plate("components", 2):
        scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), x.new_tensor(0.5)))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def hierarchical_means(x: Tensor) -> None:
    """Means that are draws from a population, whose mean and variance are learned."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 10.0))
    spread = pyro.sample("spread", dist.InverseGamma(x.new_tensor(3.0), x.new_tensor(4.0)))
    rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(2.0)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(mean, spread.sqrt()))
        var = pyro.sample("var", dist.InverseGamma(x.new_tensor(2.0), rate))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(x.new_tensor([0.3, 0.3, 0.4])))
        pyro.sample("x", dist.Normal(loc[z], var[z].sqrt()), obs=x)


def normal_wishart(x: Tensor) -> None:
    """The jointly conjugate prior of a mean vector and a precision matrix."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    with pyro.plate("components", 2):
        wishart = dist.Wishart(x.new_tensor(5.0), torch.eye(2, dtype=x.dtype))
        precision = pyro.sample("precision", wishart)
        prior = dist.MultivariateNormal(x.new_zeros(2), precision_matrix=0.1 * precision)
        loc = pyro.sample("loc", prior)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], precision_matrix=precision[z]), obs=x)


# ---------------------------------------------------------------------------------------
# Other observations


def gaussian_and_poisson(x: Tensor, n: Tensor) -> None:
    """Two observations in each row, of different families."""
    weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 0.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(3), constraint=constraints.positive)
    rate = pyro.param("rate", x.new_tensor([1.0, 2.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)
        pyro.sample("n", dist.Poisson(rate[z]), obs=n)


def latent_class(x: Tensor) -> None:
    """Latent class analysis of binary items, with Beta and Dirichlet priors."""
    k, items = 3, x.shape[-1]
    weights = pyro.sample("weights", dist.Dirichlet(x.new_full((k,), 1.5)))
    probs = pyro.sample("probs", dist.Beta(x.new_full((k, items), 2.0), 2.0).to_event(2))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=x)


def latent_class_plates(x: Tensor) -> None:
    """The same with a plate of items inside the plate of rows."""
    k = 3
    rows = pyro.plate("rows", x.shape[0], dim=-2)
    items = pyro.plate("items", x.shape[1], dim=-1)
    weights = pyro.sample("weights", dist.Dirichlet(x.new_full((k,), 1.5)))
    with pyro.plate("classes", k, dim=-2), items:
        probs = pyro.sample("probs", dist.Beta(x.new_tensor(2.0), x.new_tensor(2.0)))
    with rows:
        z = pyro.sample("z", dist.Categorical(weights))
        with items as j:
            pyro.sample("x", dist.Bernoulli(probs[z, j]), obs=x)


def poisson_mixture(n: Tensor) -> None:
    """Poisson counts with Gamma and Dirichlet priors."""
    weights = pyro.sample("weights", dist.Dirichlet(n.new_full((3,), 2.0)))
    with pyro.plate("components", 3):
        rate = pyro.sample("rate", dist.Gamma(n.new_tensor(2.0), n.new_tensor(0.5)))
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Poisson(rate[z]), obs=n)


def poisson_exp_link(n: Tensor) -> None:
    """Poisson counts whose log-rates have a Normal prior."""
    weights = pyro.param("weights", torch.full((2,), 0.5).double(), constraint=constraints.simplex)
    prior = dist.Normal(n.new_zeros(2), n.new_ones(2)).to_event(1)
    log_rate = pyro.sample("log_rate", prior)
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Poisson(log_rate[z].exp()), obs=n)


def categorical_logits(y: Tensor) -> None:
    """Latent classes of items with four answers, given by logits."""
    k, items, answers = 2, y.shape[-1], 4
    half = torch.full((k,), 1 / k, dtype=torch.float64)
    weights = pyro.param("weights", half, constraint=constraints.simplex)
    logits = pyro.param("logits", lambda: torch.randn(k, items, answers, dtype=torch.float64))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Categorical(logits=logits[z]).to_event(1), obs=y)


def exponential_mixture(x: Tensor) -> None:
    """Waiting times."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    rate = pyro.param("rate", x.new_tensor([0.5, 2.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Exponential(rate[z]), obs=x)


def gamma_mixture(x: Tensor) -> None:
    """Shapes, whose maximum is found with the rates at theirs."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    shape = pyro.param("shape", x.new_tensor([1.0, 3.0]), constraint=constraints.positive)
    rate = pyro.param("rate", x.new_tensor([1.0, 1.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Gamma(shape[z], rate[z]), obs=x)


def gamma_shared_rate(x: Tensor) -> None:
    """One rate for all: shapes and rate are updated in turn."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    shape = pyro.param("shape", x.new_tensor([1.0, 3.0]), constraint=constraints.positive)
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Gamma(shape[z], 1 / scale), obs=x)


def inverse_gamma_mixture(x: Tensor) -> None:
    """One shape for all, a prior on the rates."""
    shape = pyro.param("shape", x.new_tensor(2.0), constraint=constraints.positive)
    rate = pyro.sample("rate", dist.Gamma(x.new_full((2,), 2.0), 0.5).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(x.new_tensor([0.4, 0.6])))
        pyro.sample("x", dist.InverseGamma(shape, rate[z]), obs=x)


def log_normal_mixture(x: Tensor) -> None:
    """Incomes."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([0.0, 2.0]))
    scale = pyro.param("scale", x.new_tensor([1.0, 0.5]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.LogNormal(loc[z], scale[z]), obs=x)


def transformed_gaussian(x: Tensor) -> None:
    """Gaussians seen through fixed transforms, several columns, some of them missing."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, x.shape[-1], dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(2, x.shape[-1]), constraint=constraints.positive)
    through = [AffineTransform(x.new_tensor(1.0), x.new_tensor([2.0, 0.5])), SigmoidTransform()]
    seen = x < 0.95
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        base = dist.TransformedDistribution(dist.Normal(loc[z], scale[z]), through)
        pyro.sample("x", base.mask(seen).to_event(1), obs=x)


def half_normal_mixture(x: Tensor) -> None:
    """Distances."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    scale = pyro.param("scale", x.new_tensor([0.5, 2.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.HalfNormal(scale[z]), obs=x)


def beta_mixture(x: Tensor) -> None:
    """Proportions: both arguments on the statistics."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    a = pyro.param("a", x.new_tensor([1.0, 3.0]), constraint=constraints.positive)
    b = pyro.param("b", x.new_tensor([2.0, 1.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Beta(a[z], b[z]), obs=x)


def dirichlet_mixture(x: Tensor) -> None:
    """Compositions."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    start = x.new_tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    alpha = pyro.param("alpha", start, constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Dirichlet(alpha[z]), obs=x)


def von_mises_mixture(x: Tensor) -> None:
    """Directions."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    k = pyro.param("k", x.new_tensor([1.0, 2.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.VonMises(loc[z], k[z]), obs=x)


def geometric_mixture(x: Tensor) -> None:
    """Failures before a success."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    probs = pyro.sample("probs", dist.Beta(x.new_full((2,), 2.0), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Geometric(probs[z]), obs=x)


def negative_binomial_mixture(x: Tensor) -> None:
    """Overdispersed counts, the number of failures given, and differing by column."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    start = x.new_tensor([[0.3, 0.4], [0.6, 0.5]])
    probs = pyro.param("probs", start, constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        count = dist.NegativeBinomial(x.new_tensor([3.0, 5.5]), probs[z])
        pyro.sample("x", count.to_event(1), obs=x)


def failures_by_state(x: Tensor) -> None:
    """The number of failures differs by state: statistics that no kernel has."""
    logits = pyro.param("logits", x.new_tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(x.new_tensor([0.4, 0.6])))
        failures = x.new_tensor([2.0, 7.0])[z]
        pyro.sample("x", dist.NegativeBinomial(failures, logits=logits[z]), obs=x)


def multinomial_mixture(n: Tensor) -> None:
    """Documents of twenty words."""
    k, words = 3, n.shape[-1]
    weights = pyro.param("weights", n.new_ones(k) / k, constraint=constraints.simplex)
    probs = pyro.param(
        "probs",
        lambda: torch.rand(k, words, dtype=n.dtype).softmax(-1),
        constraint=constraints.simplex,
    )
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Multinomial(20, probs[z]), obs=n)


def student_t_mixture(x: Tensor) -> None:
    """Heavy tails, the degrees of freedom estimated; far from the origin."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([100.0, 110.0]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    df = pyro.param("df", x.new_tensor(5.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.StudentT(df, loc[z], scale[z]), obs=x)


def multivariate_t_mixture(x: Tensor) -> None:
    """Heavy tails in two dimensions, with prior means."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(2, 2), 5.0).to_event(2))
    eye = torch.eye(2, dtype=x.dtype).repeat(2, 1, 1)
    tril = pyro.param("tril", eye, constraint=constraints.lower_cholesky)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateStudentT(x.new_tensor(4.0), loc[z], tril[z]), obs=x)


def laplace_mixture(x: Tensor) -> None:
    """Medians and absolute deviations."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Laplace(loc[z], scale[z]), obs=x)


def weibull_mixture(x: Tensor) -> None:
    """Lifetimes, whose statistics are the rows themselves."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    scale = pyro.param("scale", x.new_tensor([1.0, 5.0]), constraint=constraints.positive)
    shape = pyro.param("shape", x.new_tensor([1.0, 3.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Weibull(scale[z], shape[z]), obs=x)


def zero_inflated_mixture(x: Tensor) -> None:
    """Counts with more zeros than their distribution gives, several columns."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    rate = pyro.sample("rate", dist.Gamma(x.new_full((2, 2), 2.0), 0.5).to_event(2))
    gate = pyro.param("gate", x.new_tensor([0.3, 0.4]), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        count = dist.ZeroInflatedPoisson(rate[z], gate=gate[z].unsqueeze(-1))
        pyro.sample("x", count.to_event(1), obs=x)


def overdispersed_mixture(x: Tensor) -> None:
    """Counts whose number of failures is a parameter."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    size = pyro.param("size", x.new_tensor(2.0), constraint=constraints.positive)
    mean = pyro.param("mean", x.new_tensor([2.0, 12.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.NegativeBinomial(size, logits=(mean[z] / size).log()), obs=x)


def dirichlet_multinomial_mixture(x: Tensor) -> None:
    """Documents whose words come in bursts."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    start = x.new_tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    alpha = pyro.param("alpha", start, constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.DirichletMultinomial(alpha[z], 20), obs=x)


def factor_analysers(x: Tensor) -> None:
    """A covariance of low rank, plus a diagonal."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, x.shape[-1], dtype=x.dtype))
    factor = pyro.param("factor", lambda: torch.randn(2, x.shape[-1], 1, dtype=x.dtype))
    noise = pyro.param("noise", x.new_ones(x.shape[-1]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.LowRankMultivariateNormal(loc[z], factor[z], noise), obs=x)


def ordered_means(x: Tensor) -> None:
    """Means in order, by the constraint of their parameter."""
    weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    start = x.new_tensor([-1.0, 0.0, 1.0])
    loc = pyro.param("loc", start, constraint=dist.constraints.ordered_vector)
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


# ---------------------------------------------------------------------------------------
# Regressions


def linear_regressions(features: Tensor, y: Tensor) -> None:
    """A mixture of linear regressions."""
    k, p = 2, features.shape[-1]
    weights = pyro.param("weights", y.new_ones(k) / k, constraint=constraints.simplex)
    beta = pyro.param("beta", lambda: torch.randn(k, p, dtype=y.dtype))
    scale = pyro.param("scale", y.new_ones(k), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal((beta[z] * features).sum(-1), scale[z]), obs=y)


def poisson_regressions(features: Tensor, n: Tensor) -> None:
    """A mixture of Poisson regressions."""
    k, p = 2, features.shape[-1]
    weights = pyro.param("weights", n.new_ones(k) / k, constraint=constraints.simplex)
    beta = pyro.param("beta", lambda: torch.randn(k, p, dtype=n.dtype))
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Poisson((beta[z] * features).sum(-1).exp()), obs=n)


def logistic_regressions(features: Tensor, y: Tensor) -> None:
    """Shared slopes with a ridge prior, an intercept for each component."""
    weights = pyro.param("weights", y.new_ones(2) / 2, constraint=constraints.simplex)
    intercept = pyro.param("intercept", y.new_tensor([-1.0, 1.0]))
    slope = pyro.sample("slope", dist.Normal(y.new_zeros(2), 1.5).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Bernoulli(logits=intercept[z] + features @ slope), obs=y)


def binomial_regressions(features: Tensor, trials: Tensor, y: Tensor) -> None:
    """Numbers of trials that differ by row."""
    weights = pyro.param("weights", y.new_ones(2) / 2, constraint=constraints.simplex)
    beta = pyro.param("beta", lambda: torch.randn(2, features.shape[-1], dtype=y.dtype))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Binomial(trials, logits=(beta[z] * features).sum(-1)), obs=y)


def negative_binomial_regressions(features: Tensor, n: Tensor) -> None:
    """A log-linear mean: the logits of the rows are shifted by the given dispersion."""
    weights = pyro.param("weights", n.new_ones(2) / 2, constraint=constraints.simplex)
    beta = pyro.param("beta", lambda: torch.randn(2, features.shape[-1], dtype=n.dtype))
    size = n.new_tensor(3.0)
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        log_mean = (beta[z] * features).sum(-1)
        pyro.sample("n", dist.NegativeBinomial(size, logits=log_mean - size.log()), obs=n)


def gamma_regressions(features: Tensor, y: Tensor) -> None:
    """A log-linear mean, and a shape that stands in both arguments."""
    weights = pyro.param("weights", y.new_ones(2) / 2, constraint=constraints.simplex)
    beta = pyro.param("beta", lambda: torch.randn(2, features.shape[-1], dtype=y.dtype))
    shape = pyro.param("shape", y.new_tensor([2.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        mean = (beta[z] * features).sum(-1).exp()
        pyro.sample("y", dist.Gamma(shape[z], shape[z] / mean), obs=y)


def categorical_regressions(features: Tensor, y: Tensor) -> None:
    """Answers by multinomial logits, the first one the reference."""
    weights = pyro.param("weights", features.new_ones(2) / 2, constraint=constraints.simplex)
    prior = dist.Normal(features.new_zeros(2, features.shape[-1], 2), 2.0).to_event(3)
    beta = pyro.sample("beta", prior)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        eta = (beta[z] * features.unsqueeze(-1)).sum(-2)
        logits = torch.cat([torch.zeros_like(eta[..., :1]), eta], -1)
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def heteroscedastic_regressions(features: Tensor, y: Tensor) -> None:
    """The logarithm of the scale is linear too."""
    weights = pyro.param("weights", y.new_ones(2) / 2, constraint=constraints.simplex)
    beta = pyro.param("beta", lambda: torch.randn(2, features.shape[-1], dtype=y.dtype))
    gamma = pyro.param("gamma", y.new_zeros(features.shape[-1]))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        scale = (features @ gamma).exp()
        pyro.sample("y", dist.Normal((beta[z] * features).sum(-1), scale), obs=y)


def multivariate_regressions(features: Tensor, y: Tensor) -> None:
    """Two responses with a covariance matrix."""
    weights = pyro.param("weights", y.new_ones(2) / 2, constraint=constraints.simplex)
    shape = (2, y.shape[-1], features.shape[-1])
    beta = pyro.param("beta", lambda: torch.randn(shape, dtype=y.dtype))
    eye = torch.eye(y.shape[-1], dtype=y.dtype).repeat(2, 1, 1)
    cov = pyro.param("cov", eye, constraint=constraints.positive_definite)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        loc = (beta[z] @ features.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.MultivariateNormal(loc, cov[z]), obs=y)


def mixture_of_experts(features: Tensor, y: Tensor) -> None:
    """The weights depend on covariates through a softmax."""
    p = features.shape[-1]
    gate = pyro.param("gate", lambda: 0.1 * torch.randn(3, p, dtype=y.dtype))
    beta = pyro.param("beta", lambda: torch.randn(3, p, dtype=y.dtype))
    scale = pyro.param("scale", y.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(logits=features @ gate.T))
        pyro.sample("y", dist.Normal((beta[z] * features).sum(-1), scale), obs=y)


def poisson_exposure(exposure: Tensor, n: Tensor) -> None:
    """Rates times the time that each row was watched."""
    weights = pyro.param("weights", n.new_ones(2) / 2, constraint=constraints.simplex)
    rate = pyro.sample("rate", dist.Gamma(n.new_full((2,), 2.0), 0.5).to_event(1))
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Poisson(rate[z] * exposure), obs=n)


def base_rates(features: Tensor, n: Tensor) -> None:
    """A rate of each component times a log-linear factor that all share."""
    weights = pyro.param("weights", n.new_ones(2) / 2, constraint=constraints.simplex)
    rate = pyro.param("rate", n.new_tensor([1.0, 3.0]), constraint=constraints.positive)
    slope = pyro.param("slope", n.new_zeros(features.shape[-1]))
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("n", dist.Poisson(rate[z] * (features @ slope).exp()), obs=n)


# ---------------------------------------------------------------------------------------
# Links: functions of the parameters that do not vary along the rows


def sum_to_zero(x: Tensor) -> None:
    """A common mean and effects that sum to zero."""
    weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    mean = pyro.param("mean", x.new_tensor(0.0))
    effect = pyro.param("effect", x.new_tensor([-1.0, 0.1]))
    scale = pyro.param("scale", x.new_ones(3), constraint=constraints.positive)
    loc = pyro.deterministic("loc", mean + torch.cat([effect, -effect.sum(-1, keepdim=True)], -1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def cumulative_means(x: Tensor) -> None:
    """Means in order, by positive gaps; a softplus scale."""
    weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    first = pyro.param("first", x.new_tensor(-2.0))
    gaps = pyro.param("gaps", x.new_tensor([1.0, 1.0]), constraint=constraints.positive)
    raw = pyro.param("raw", x.new_zeros(3))
    loc = torch.cat([first.unsqueeze(-1), first.unsqueeze(-1) + gaps.cumsum(-1)], -1)
    scale = torch.nn.functional.softplus(raw)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


# ---------------------------------------------------------------------------------------
# Other assignments


def one_hot_assignment(x: Tensor) -> None:
    """An indicator vector that picks its mean by a matrix product."""
    k, d = 3, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(d), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(weights))
        pyro.sample("x", dist.Normal(z @ loc, scale).to_event(1), obs=x)


def bernoulli_where(x: Tensor) -> None:
    """Outliers: a wide and a narrow Gaussian about one centre."""
    prob = pyro.param("prob", x.new_tensor(0.1), constraint=constraints.unit_interval)
    loc = pyro.param("loc", x.new_tensor(0.0))
    narrow = pyro.param("narrow", x.new_tensor(1.0), constraint=constraints.positive)
    wide = pyro.param("wide", x.new_tensor(5.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        outlier = pyro.sample("outlier", dist.Bernoulli(prob))
        pyro.sample("x", dist.Normal(loc, torch.where(outlier.bool(), wide, narrow)), obs=x)


def bernoulli_blend(x: Tensor) -> None:
    """Two means blended by a binary assignment, with a Beta prior on its probability."""
    prob = pyro.sample("prob", dist.Beta(x.new_tensor(2.0), x.new_tensor(3.0)))
    low = pyro.param("low", x.new_tensor(-1.0))
    high = pyro.param("high", x.new_tensor(1.0))
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(prob))
        pyro.sample("x", dist.Normal(z * high + (1 - z) * low, scale), obs=x)


def binomial_assignment(x: Tensor) -> None:
    """A genotype: the number of copies of an allele picks the mean."""
    frequency = pyro.param("frequency", x.new_tensor(0.5), constraint=constraints.unit_interval)
    loc = pyro.param("loc", x.new_tensor([-1.0, 0.0, 1.0]))
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        copies = pyro.sample("copies", dist.Binomial(2, frequency))
        pyro.sample("x", dist.Normal(loc[copies.long()], scale), obs=x)


def two_assignments_table(x: Tensor) -> None:
    """Two independent assignments that pick a cell of a table."""
    rows = pyro.param("row_weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    columns = pyro.param("column_weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, 3, dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(3), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        row = pyro.sample("row", dist.Categorical(rows))
        column = pyro.sample("column", dist.Categorical(columns))
        pyro.sample("x", dist.Normal(loc[row, column], scale[column]), obs=x)


def two_assignments_sum(x: Tensor) -> None:
    """Two independent assignments whose effects add up."""
    first = pyro.param("first_weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    second = pyro.param("second_weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    a = pyro.param("a", x.new_tensor([-2.0, 2.0]))
    b = pyro.param("b", x.new_tensor([-0.5, 0.5]))
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z1 = pyro.sample("z1", dist.Categorical(first))
        z2 = pyro.sample("z2", dist.Categorical(second))
        pyro.sample("x", dist.Normal(a[z1] + b[z2], scale), obs=x)


def hierarchical_assignment(x: Tensor, y: Tensor) -> None:
    """One assignment sets the weights of another; each has an observation."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    table = pyro.param(
        "table",
        lambda: torch.rand(2, 3, dtype=x.dtype).softmax(-1),
        constraint=constraints.simplex,
    )
    prob = pyro.param("prob", x.new_tensor([0.3, 0.7]), constraint=constraints.unit_interval)
    loc = pyro.param("loc", x.new_tensor([-2.0, 0.0, 2.0]))
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z1 = pyro.sample("z1", dist.Categorical(weights))
        z2 = pyro.sample("z2", dist.Categorical(table[z1]))
        pyro.sample("x", dist.Normal(loc[z2], scale), obs=x)
        pyro.sample("y", dist.Bernoulli(prob[z1]), obs=y)


def grouped_rows(x: Tensor) -> None:
    """One assignment for each group of rows."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("groups", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("rows", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def nested_assignments(x: Tensor) -> None:
    """An assignment of each group, which sets the weights of one of each row in it."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    table = pyro.param(
        "table", x.new_tensor([[0.7, 0.3], [0.2, 0.8]]), constraint=constraints.simplex
    )
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("groups", x.shape[0], dim=-2):
        group = pyro.sample("group", dist.Categorical(weights))
        with pyro.plate("rows", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(table[group]))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def global_assignment(x: Tensor) -> None:
    """An assignment outside the plate that sets the weights of all rows at once."""
    regimes = pyro.sample("regimes", dist.Dirichlet(x.new_full((2,), 2.0)))
    prior = dist.Dirichlet(x.new_tensor([[30.0, 15.0], [15.0, 30.0]])).to_event(1)
    weights = pyro.sample("weights", prior)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    regime = pyro.sample("regime", dist.Categorical(regimes))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights[regime]))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


# ---------------------------------------------------------------------------------------
# Chains


def chain(x: Tensor) -> None:
    """A hidden Markov model of one sequence, with priors as there is little to learn from."""
    initial = pyro.sample("initial", dist.Dirichlet(x.new_full((2,), 2.0)))
    transition = pyro.sample("transition", dist.Dirichlet(x.new_full((2, 2), 2.0)).to_event(1))
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], scale), obs=x[t])


def chain_sequences(x: Tensor) -> None:
    """A hidden Markov model of a plate of sequences."""
    initial = pyro.param("initial", x.new_ones(3) / 3, constraint=constraints.simplex)
    transition = pyro.param(
        "transition",
        (2 * torch.eye(3, dtype=x.dtype)).softmax(-1),
        constraint=constraints.simplex,
    )
    loc = pyro.param("loc", x.new_tensor([-2.0, 0.0, 2.0]))
    scale = pyro.param("scale", x.new_ones(3), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[-1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], scale[z]), obs=x[:, t])


def chain_ragged(x: Tensor, lengths: Tensor) -> None:
    """Sequences of different lengths, padded and masked, that all start from state 0."""
    transition = pyro.param(
        "transition", x.new_tensor([[0.7, 0.3], [0.3, 0.7]]), constraint=constraints.simplex
    )
    rate = pyro.param("rate", x.new_tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        z: Any = 0
        for t in pyro.markov(range(x.shape[-1])):
            going: Any = t < lengths
            with poutine.mask(mask=going):
                z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
                pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[:, t])


def chain_second_order(x: Tensor) -> None:
    """Each state depends on the two before it; the first two are drawn by themselves."""
    initial = pyro.param("initial", x.new_ones(2) / 2, constraint=constraints.simplex)
    transition = pyro.param(
        "transition", x.new_full((2, 2, 2), 0.5), constraint=constraints.simplex
    )
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        before, last = None, None
        for t in pyro.markov(range(x.shape[-1]), history=2):
            probs = initial if before is None else transition[before, last]
            before, last = last, pyro.sample(f"z_{t}", dist.Categorical(probs))
            pyro.sample(f"x_{t}", dist.Normal(loc[last], scale[last]), obs=x[:, t])


def chain_mixture_emissions(x: Tensor) -> None:
    """A chain whose states are mixtures themselves."""
    initial = pyro.param("initial", x.new_ones(2) / 2, constraint=constraints.simplex)
    transition = pyro.param(
        "transition", x.new_tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=constraints.simplex
    )
    mixing = pyro.param("mixing", x.new_ones(2, 2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([[-3.0, -1.0], [1.0, 3.0]]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[-1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
            c = pyro.sample(f"c_{t}", dist.Categorical(mixing[z]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z, c], scale[z]), obs=x[:, t])


def chain_covariates(x: Tensor, u: Tensor) -> None:
    """Covariates move the transitions (through a softmax) and the locations."""
    initial = pyro.param("initial", x.new_ones(2) / 2, constraint=constraints.simplex)
    base = pyro.param("base", x.new_tensor([[1.0, 0.0], [0.0, 1.0]]))
    effect = pyro.param("effect", x.new_zeros(2, 2))
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    slope = pyro.param("slope", x.new_zeros(2))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[-1])):
            if z is None:
                z = pyro.sample(f"z_{t}", dist.Categorical(initial))
            else:
                logits = base[z] + effect[z] * u[:, t].unsqueeze(-1)
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits))
            pyro.sample(f"x_{t}", dist.Normal(loc[z] + slope[z] * u[:, t], scale[z]), obs=x[:, t])


def chain_autoregressive(x: Tensor) -> None:
    """What is seen depends on the state and on what was seen before."""
    transition = pyro.param(
        "transition", x.new_tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=constraints.simplex
    )
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    memory = pyro.param("memory", x.new_zeros(2))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        z: Any = 0
        for t in pyro.markov(range(x.shape[-1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            mean = loc[z] if t == 0 else loc[z] + memory[z] * x[:, t - 1]
            pyro.sample(f"x_{t}", dist.Normal(mean, scale[z]), obs=x[:, t])


def chain_by_edge(x: Tensor) -> None:
    """What is seen depends on the state and on the one before: on the transition itself."""
    transition = pyro.param(
        "transition", x.new_tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=constraints.simplex
    )
    rate = pyro.param(
        "rate", x.new_tensor([[1.0, 4.0], [8.0, 2.0]]), constraint=constraints.positive
    )
    with pyro.plate("sequences", len(x)):
        last: Any = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(x.shape[-1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[last]))
            pyro.sample(f"x_{t}", dist.Poisson(rate[last, z]), obs=x[:, t])
            last = z


def chain_stationary(x: Tensor) -> None:
    """The first state has the chain's stationary distribution."""
    transition = pyro.param(
        "transition", x.new_tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex
    )
    rate = pyro.param("rate", x.new_tensor([1.0, 4.0]), constraint=constraints.positive)
    ones = x.new_ones(2, 2)
    stationary = torch.linalg.solve((torch.eye(2).to(ones) - transition + ones).mT, ones[0])
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(stationary if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t])


def chain_several(x: Tensor, y: Tensor, seen: Tensor) -> None:
    """Two observations a step, a vector and a category; some of the vectors are missing."""
    initial = pyro.param("initial", x.new_ones(2) / 2, constraint=constraints.simplex)
    transition = pyro.sample(
        "transition", dist.Dirichlet(x.new_tensor([[4.0, 1], [1, 4]])).to_event(1)
    )
    loc = pyro.param("loc", x.new_tensor([[-1.0, 0.0], [1.0, 0.5]]))
    cov = pyro.param(
        "cov", torch.eye(2, dtype=x.dtype).repeat(2, 1, 1), constraint=constraints.positive_definite
    )
    probs = pyro.param("probs", x.new_ones(2, 3) / 3, constraint=constraints.simplex)
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
            with poutine.mask(mask=seen[:, t]):
                vector = dist.MultivariateNormal(loc[z], covariance_matrix=cov[z])
                pyro.sample(f"x_{t}", vector, obs=x[:, t])
            pyro.sample(f"y_{t}", dist.Categorical(probs[z]), obs=y[:, t])


def chain_panel(x: Tensor) -> None:
    """Several series that share one state, in a plate inside the steps."""
    stay = pyro.param("stay", x.new_tensor(0.7), constraint=constraints.unit_interval)
    rate = pyro.param("rate", x.new_tensor([1.0, 5.0]), constraint=constraints.positive)
    ways = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    series = pyro.plate("series", x.shape[-1])
    z = None
    for t in pyro.markov(range(len(x))):
        probs = x.new_tensor([0.5, 0.5]) if z is None else ways[z]
        z = pyro.sample(f"z_{t}", dist.Categorical(probs))
        with series:
            pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t])


def chains_side_by_side(x: Tensor, y: Tensor) -> None:
    """Two chains that know nothing of one another, in one loop."""
    ways = pyro.param(
        "ways", x.new_tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=constraints.simplex
    )
    turns = pyro.param(
        "turns", x.new_tensor([[0.6, 0.4], [0.2, 0.8]]), constraint=constraints.simplex
    )
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    rate = pyro.param("rate", x.new_tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        z: Any = 0
        w: Any = 0
        for t in pyro.markov(range(x.shape[-1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(ways[z]))
            w = pyro.sample(f"w_{t}", dist.Categorical(turns[w]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[:, t])
            pyro.sample(f"y_{t}", dist.Poisson(rate[w]), obs=y[:, t])


def chains_coupled(x: Tensor) -> None:
    """Two chains whose states add up (a factorial hidden Markov model)."""
    ways = pyro.param(
        "ways", x.new_tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=constraints.simplex
    )
    turns = pyro.param(
        "turns", x.new_tensor([[0.6, 0.4], [0.2, 0.8]]), constraint=constraints.simplex
    )
    loc = pyro.param("loc", x.new_tensor([[-2.0, 0.0], [1.0, 3.0]]))
    with pyro.plate("sequences", len(x)):
        z: Any = torch.zeros((), dtype=torch.long)
        w: Any = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(x.shape[-1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(ways[z]))
            w = pyro.sample(f"w_{t}", dist.Categorical(turns[w]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z, w], 1.0), obs=x[:, t])


# ---------------------------------------------------------------------------------------
# Masks


def masked_rows(x: Tensor, seen: BoolTensor) -> None:
    """Some rows were not observed: a mask around the observation."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        with poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def masked_entries(x: Tensor, seen: Tensor) -> None:
    """Some entries were not observed: a mask on the distribution, inside its event."""
    k, d = 2, x.shape[-1]
    weights = pyro.param("weights", x.new_ones(k) / k, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(k, d, dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(k, d), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).mask(seen).to_event(1), obs=x)


# ---------------------------------------------------------------------------------------
# The table


def _blank(*shape: int) -> Tensor:
    """A place for data that the program will simulate."""
    return torch.zeros(shape, dtype=torch.float64)


def _given(*shape: int, seed: int) -> Tensor:
    """Data that the program takes as given."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _simulate(
    model: Callable[..., Any], truth: dict[str, Tensor], data: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Draw the arguments ``x`` whose site is called "x", or "x_0", "x_1", ... if a sequence."""
    with SetValues(truth):
        nodes: Any = poutine.trace(poutine.uncondition(model)).get_trace(*data).nodes
    drawn = []
    function = model.forward if isinstance(model, PyroModule) else model
    for name, value in zip(inspect.signature(function).parameters, data):  # noqa: B905  (or defaults)
        steps = [nodes[f"{name}_{t}"]["value"] for t in range(99) if f"{name}_{t}" in nodes]
        if name in nodes:
            drawn.append(nodes[name]["value"])
        elif steps:  # they go where the place for them has its steps
            dims = range(value.dim())
            at = next(d for d in dims if value.select(d, 0).shape == steps[0].shape)
            drawn.append(torch.stack(steps, at))
        else:
            drawn.append(value)
    return tuple(drawn)


def _move(
    model: Callable[..., Any], truth: dict[str, Tensor], data: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """A point near the truth, by a random step in the unconstrained space."""
    nodes: Any = poutine.trace(model).get_trace(*data).nodes
    supports = pyro.get_param_store().get_state()["constraints"]
    moved = {}
    for name, value in truth.items():
        support = supports[name] if name in supports else nodes[name]["fn"].support
        transform = transform_to(support)
        free = transform.inv(value)
        moved[name] = transform(free + 0.3 * torch.randn_like(free))
    return moved


def _problem(
    model: Callable[..., Any],
    data: tuple[Tensor, ...],
    truth: dict[str, Any],
    tiny: int | tuple[int, int],
    states: dict[str, int],
    *symmetries: Axes | Symmetry,
    row_plate: str | None = "rows",
    name: str | None = None,
    by_hand: Callable[..., Any] | None = None,
    drawn: bool = True,
) -> Problem:
    """A row of the table. ``tiny`` is how many rows (and steps) to keep.

    Where the same program is given ``by_hand``, a fifth of the data is made missing; ``drawn`` is
    whether the program draws its data, else they are taken as they are.
    """
    values = {key: real(value) for key, value in truth.items()}
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(20)
        data = _simulate(model, values, data) if drawn else data
        params = _move(model, values, data)
        if by_hand is not None:
            data = tuple(torch.where(torch.rand(x.shape) < 0.2, torch.nan, x) for x in data)
    rows, steps = tiny if isinstance(tiny, tuple) else (tiny, None)
    cut = tuple(x[:rows] if steps is None or x.dim() < 2 else x[:rows, :steps] for x in data)
    renamings = tuple(
        s if isinstance(s, Symmetry) else Symmetry(tuple(states), s) for s in symmetries
    )
    return Problem(
        name or getattr(model, "__name__"),  # noqa: B009  (a callable need not have it)
        model,
        data,
        params,
        cut,
        states,
        row_plate,
        renamings,
        model is not laplace_mixture,
        by_hand,
    )


def _planted(columns: int, seed: int) -> Tensor:
    """Rows of two clusters, for programs that do not draw rows like the ones they are for."""
    x = _given(120, columns, seed=seed)
    return x + 2.0 * (torch.arange(120) % 2).unsqueeze(-1)


def _of_kinds(seed: int) -> Tensor:
    """A column of numbers, one of counts, a binary one and one of three categories."""
    x = _planted(4, seed)
    binary, codes = (x[:, 2] > 1).double(), x[:, 3].round().clamp(0, 2)
    return torch.stack([x[:, 0], x[:, 1].abs().round(), binary, codes], -1)


def _codes(seed: int) -> Tensor:
    """Columns of two, three and four categories, as floats."""
    x = _planted(3, seed)
    return torch.minimum(x.round().clamp(min=0), real([1.0, 2.0, 3.0]))


_WEIGHTS2 = [0.4, 0.6]
_WEIGHTS3 = [0.25, 0.35, 0.4]
_LOC22 = [[-1.5, 0.5], [1.5, -0.5]]
_LOC32 = [[-2.0, 0.0], [0.5, 2.0], [2.0, -1.0]]
_COV22 = [[[1.0, 0.5], [0.5, 1.5]], [[0.8, -0.3], [-0.3, 0.6]]]
_PROBS36 = [
    [0.85, 0.8, 0.75, 0.3, 0.2, 0.15],
    [0.2, 0.3, 0.25, 0.8, 0.85, 0.7],
    [0.2, 0.75, 0.3, 0.25, 0.8, 0.2],
]
_LOGITS = [
    [[1.0, 0.0, -0.5, -1.0], [0.5, 1.0, -1.0, 0.0], [-1.0, 0.0, 0.5, 1.0]],
    [[-1.0, 0.0, 0.5, 1.0], [-0.5, -1.0, 1.0, 0.5], [1.0, 0.5, 0.0, -1.0]],
]
_WORDS = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.2, 0.5, 0.2, 0.1]]
_SECOND_ORDER = [[[0.8, 0.2], [0.4, 0.6]], [[0.6, 0.4], [0.1, 0.9]]]
_CHAIN_AXES: Axes = (
    ("initial", 0),
    ("transition", 0),
    ("transition", 1),
    ("loc", 0),
    ("scale", 0),
)
_GAUSSIAN_AXES: Axes = (("weights", 0), ("loc", 0), ("scale", 0))

_PRIOR = models.Prior(real([0.5, 0.0]), real([[3.0, 0.5], [0.5, 1.0]]), 2.0)
_Q4 = real([0.3, 0.2, 0.2, 0.3])

PROBLEMS: list[Problem] = [
    _problem(
        gaussian_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS3, "loc": [-2.5, 0.0, 3.0], "scale": [0.8, 0.6, 1.2]},
        4,
        {"z": 3},
        _GAUSSIAN_AXES,
    ),
    _problem(
        missing_in_vectors,
        (_blank(120, 3),),
        {
            "weights": _WEIGHTS2,
            "loc": [[-1.5, 0.5, 1.0], [1.5, -0.5, 0.0]],
            "cov": [
                [[1.0, 0.5, 0.2], [0.5, 1.5, -0.4], [0.2, -0.4, 0.8]],
                [[0.8, -0.3, 0.1], [-0.3, 0.6, 0.0], [0.1, 0.0, 1.2]],
            ],
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("cov", 0)),
        by_hand=missing_in_vectors_by_hand,
    ),
    _problem(
        missing_in_columns,
        (_blank(120, 2), _blank(120, 3)),
        {
            "weights": _WEIGHTS2,
            "loc": _LOC22,
            "scale": [0.8, 1.2],
            "probs": [[0.8, 0.3, 0.6], [0.2, 0.7, 0.5]],
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("probs", 0)),
        by_hand=missing_in_columns_by_hand,
    ),
    _problem(
        diagonal_gaussian,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS3,
            "loc": _LOC32,
            "scale": [[0.7, 1.0], [1.0, 0.6], [0.8, 0.9]],
        },
        4,
        {"z": 3},
        _GAUSSIAN_AXES,
    ),
    _problem(
        full_gaussian,
        (_blank(120, 2),),
        {"weights": _WEIGHTS2, "loc": _LOC22, "cov": _COV22},
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("cov", 0)),
    ),
    _problem(
        tied_gaussian,
        (_blank(120, 2),),
        {"weights": _WEIGHTS3, "loc": _LOC32, "cov": _COV22[0]},
        4,
        {"z": 3},
        (("weights", 0), ("loc", 0)),
    ),
    _problem(
        shared_shape,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS2,
            "loc": _LOC22,
            "cov": covariances("VEV").project(real(_COV22)).tolist(),
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("cov", 0)),
    ),
    _problem(
        shared_orientation,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS2,
            "loc": _LOC22,
            "cov": covariances("VVE").project(real(_COV22)).tolist(),
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("cov", 0)),
    ),
    _problem(
        shared_volume,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS3,
            "loc": _LOC32,
            "variance": [[2.0, 0.5], [1.0, 1.0], [0.4, 2.5]],
        },
        4,
        {"z": 3},
        (("weights", 0), ("loc", 0), ("variance", 0)),
    ),
    _problem(
        cholesky_gaussian,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS2,
            "loc": _LOC22,
            "scale_tril": [[[1.0, 0.0], [0.5, 1.1]], [[0.9, 0.0], [-0.3, 0.7]]],
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("scale_tril", 0)),
    ),
    _problem(
        precision_gaussian,
        (_blank(120, 2),),
        {"weights": _WEIGHTS2, "loc": _LOC22, "precision": _COV22},
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("precision", 0)),
    ),
    _problem(
        shared_mean,
        (_blank(150),),
        {"weights": _WEIGHTS2, "loc": 0.5, "scale": [0.4, 2.5]},
        6,
        {"z": 2},
        (("weights", 0), ("scale", 0)),
    ),
    _problem(
        GaussianModule(2),
        (_blank(100),),
        {"weights": _WEIGHTS2, "loc": [-1.5, 1.5], "scale": [0.8, 1.1]},
        6,
        {"z": 2},
        _GAUSSIAN_AXES,
        name="gaussian_module",
    ),
    _problem(
        gaussian_inverse_gamma,
        (_blank(120),),
        {"weights": _WEIGHTS3, "loc": [-2.5, 0.0, 3.0], "var": [0.6, 0.4, 1.2]},
        4,
        {"z": 3},
        (("weights", 0), ("loc", 0), ("var", 0)),
    ),
    _problem(
        gaussian_conjugate,
        (_blank(100),),
        {"weights": _WEIGHTS2, "loc": [-1.5, 1.5], "var": [0.6, 1.2]},
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("var", 0)),
    ),
    _problem(
        gaussian_gamma_precision,
        (_blank(100),),
        {"weights": _WEIGHTS2, "loc": [-1.5, 1.5], "precision": [2.0, 1.0]},
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("precision", 0)),
    ),
    _problem(
        gaussian_lognormal_scale,
        (_blank(100),),
        {"weights": _WEIGHTS2, "loc": [-1.5, 1.5], "scale": [0.7, 1.2]},
        6,
        {"z": 2},
        _GAUSSIAN_AXES,
    ),
    _problem(
        gaussian_and_poisson,
        (_blank(120), _blank(120)),
        {
            "weights": _WEIGHTS3,
            "loc": [-1.5, 0.0, 2.0],
            "scale": [0.8, 1.0, 0.6],
            "rate": [1.0, 6.0, 2.5],
        },
        4,
        {"z": 3},
        (*_GAUSSIAN_AXES, ("rate", 0)),
    ),
    _problem(
        latent_class,
        (_blank(150, 6),),
        {"weights": _WEIGHTS3, "probs": _PROBS36},
        4,
        {"z": 3},
        (("weights", 0), ("probs", 0)),
    ),
    _problem(
        latent_class_plates,
        (_blank(150, 6),),
        {"weights": _WEIGHTS3, "probs": _PROBS36},
        4,
        {"z": 3},
        (("weights", 0), ("probs", 0)),
    ),
    _problem(
        poisson_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS3, "rate": [1.0, 5.0, 12.0]},
        4,
        {"z": 3},
        (("weights", 0), ("rate", 0)),
    ),
    _problem(
        poisson_exp_link,
        (_blank(120),),
        {"weights": _WEIGHTS2, "log_rate": [0.2, 1.8]},
        6,
        {"z": 2},
        (("weights", 0), ("log_rate", 0)),
    ),
    _problem(
        categorical_logits,
        (torch.zeros(150, 3, dtype=torch.long),),
        {"weights": _WEIGHTS2, "logits": _LOGITS},
        6,
        {"z": 2},
        (("weights", 0), ("logits", 0)),
    ),
    _problem(
        exponential_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "rate": [0.3, 3.0]},
        6,
        {"z": 2},
        (("weights", 0), ("rate", 0)),
    ),
    _problem(
        gamma_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "shape": [1.5, 6.0], "rate": [2.0, 1.0]},
        6,
        {"z": 2},
        (("weights", 0), ("shape", 0), ("rate", 0)),
    ),
    _problem(
        gamma_shared_rate,
        (_blank(150),),
        {"weights": _WEIGHTS2, "shape": [1.5, 6.0], "scale": 0.7},
        6,
        {"z": 2},
        (("weights", 0), ("shape", 0)),
    ),
    _problem(
        inverse_gamma_mixture,
        (_blank(150),),
        {"shape": 3.0, "rate": [1.0, 8.0]},
        6,
        {"z": 2},
    ),
    _problem(
        log_normal_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "loc": [0.0, 2.0], "scale": [0.5, 0.8]},
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("scale", 0)),
    ),
    _problem(
        transformed_gaussian,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS2,
            "loc": [[-1.0, 0.0], [0.5, 1.5]],
            "scale": [[0.4, 0.7], [0.5, 0.9]],
        },
        5,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("scale", 0)),
    ),
    _problem(
        half_normal_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "scale": [0.3, 3.0]},
        6,
        {"z": 2},
        (("weights", 0), ("scale", 0)),
    ),
    _problem(
        beta_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "a": [1.5, 6.0], "b": [5.0, 2.0]},
        6,
        {"z": 2},
        (("weights", 0), ("a", 0), ("b", 0)),
    ),
    _problem(
        dirichlet_mixture,
        (_blank(120, 3),),
        {"weights": _WEIGHTS2, "alpha": [[1.0, 2.0, 6.0], [5.0, 2.0, 1.5]]},
        5,
        {"z": 2},
        (("weights", 0), ("alpha", 0)),
    ),
    _problem(
        von_mises_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "loc": [-1.5, 1.0], "k": [2.0, 5.0]},
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("k", 0)),
    ),
    _problem(
        geometric_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "probs": [0.15, 0.7]},
        6,
        {"z": 2},
        (("weights", 0), ("probs", 0)),
    ),
    _problem(
        negative_binomial_mixture,
        (_blank(120, 2),),
        {"weights": _WEIGHTS2, "probs": [[0.2, 0.6], [0.7, 0.3]]},
        5,
        {"z": 2},
        (("weights", 0), ("probs", 0)),
    ),
    _problem(
        failures_by_state,
        (_blank(120),),
        {"logits": [-0.5, 0.8]},
        5,
        {"z": 2},
    ),
    _problem(
        multinomial_mixture,
        (_blank(80, 4),),
        {"weights": _WEIGHTS3, "probs": _WORDS},
        4,
        {"z": 3},
        (("weights", 0), ("probs", 0)),
    ),
    _problem(
        student_t_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "loc": [100.0, 107.0], "scale": [0.8, 1.2], "df": 4.0},
        6,
        {"z": 2},
        _GAUSSIAN_AXES,
    ),
    _problem(
        multivariate_t_mixture,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS2,
            "loc": [[-3.0, 0.5], [3.0, -0.5]],
            "tril": [[[1.0, 0.0], [0.5, 1.0]], [[0.8, 0.0], [-0.3, 0.7]]],
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("tril", 0)),
    ),
    _problem(
        laplace_mixture,
        (_blank(120),),
        {"weights": _WEIGHTS2, "loc": [-3.0, 3.0], "scale": [0.8, 1.2]},
        6,
        {"z": 2},
        _GAUSSIAN_AXES,
    ),
    _problem(
        weibull_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "scale": [1.0, 6.0], "shape": [1.5, 5.0]},
        6,
        {"z": 2},
        (("weights", 0), ("scale", 0), ("shape", 0)),
    ),
    _problem(
        zero_inflated_mixture,
        (_blank(150, 2),),
        {"weights": _WEIGHTS2, "rate": [[2.0, 9.0], [8.0, 3.0]], "gate": [0.3, 0.15]},
        6,
        {"z": 2},
        (("weights", 0), ("rate", 0), ("gate", 0)),
    ),
    _problem(
        overdispersed_mixture,
        (_blank(150),),
        {"weights": _WEIGHTS2, "size": 4.0, "mean": [2.0, 20.0]},
        6,
        {"z": 2},
        (("weights", 0), ("mean", 0)),
    ),
    _problem(
        dirichlet_multinomial_mixture,
        (_blank(120, 3),),
        {"weights": _WEIGHTS2, "alpha": [[2.0, 5.0, 8.0], [6.0, 3.0, 1.0]]},
        6,
        {"z": 2},
        (("weights", 0), ("alpha", 0)),
    ),
    _problem(
        factor_analysers,
        (_blank(150, 3),),
        {
            "weights": _WEIGHTS2,
            "loc": [[-3.0, 0.0, 2.0], [3.0, 1.0, 0.0]],
            "factor": [[[1.0], [1.5], [-1.0]], [[1.5], [-1.0], [0.8]]],
            "noise": [0.5, 0.8, 0.6],
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("factor", 0)),
    ),
    _problem(
        ordered_means,
        (_blank(120),),
        {"weights": _WEIGHTS3, "loc": [-3.0, 0.0, 3.0], "scale": 0.8},
        4,
        {"z": 3},
    ),
    _problem(
        linear_regressions,
        (_given(120, 2, seed=1), _blank(120)),
        {"weights": _WEIGHTS2, "beta": [[2.0, -1.0], [-1.0, 1.0]], "scale": [0.5, 0.8]},
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0), ("scale", 0)),
    ),
    _problem(
        poisson_regressions,
        (_given(150, 2, seed=2), _blank(150)),
        {"weights": _WEIGHTS2, "beta": [[1.0, -0.5], [-0.7, 0.8]]},
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0)),
    ),
    _problem(
        logistic_regressions,
        (_given(150, 2, seed=3), _blank(150)),
        {"weights": _WEIGHTS2, "intercept": [-1.5, 1.5], "slope": [2.0, -1.0]},
        6,
        {"z": 2},
        (("weights", 0), ("intercept", 0)),
    ),
    _problem(
        binomial_regressions,
        (_given(120, 2, seed=4), (torch.arange(120) % 5 + 8).double(), _blank(120)),
        {"weights": _WEIGHTS2, "beta": [[-1.0, 0.5], [1.0, -0.5]]},
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0)),
    ),
    _problem(
        negative_binomial_regressions,
        (_given(150, 2, seed=5), _blank(150)),
        {"weights": _WEIGHTS2, "beta": [[0.5, 1.0], [1.0, -0.8]]},
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0)),
    ),
    _problem(
        gamma_regressions,
        (_given(150, 2, seed=6), _blank(150)),
        {"weights": _WEIGHTS2, "beta": [[0.5, 1.0], [-0.5, -1.0]], "shape": [4.0, 8.0]},
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0), ("shape", 0)),
    ),
    _problem(
        categorical_regressions,
        (_given(150, 2, seed=7), _blank(150).long()),
        {
            "weights": _WEIGHTS2,
            "beta": [[[2.0, 0.0], [0.5, -1.0]], [[-2.0, 1.0], [0.0, 1.5]]],
        },
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0)),
    ),
    _problem(
        heteroscedastic_regressions,
        (_given(150, 2, seed=8), _blank(150)),
        {"weights": _WEIGHTS2, "beta": [[3.0, 1.0], [-3.0, 0.5]], "gamma": [0.4, -0.3]},
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0)),
    ),
    _problem(
        multivariate_regressions,
        (_given(120, 2, seed=9), _blank(120, 2)),
        {
            "weights": _WEIGHTS2,
            "beta": [[[2.0, 1.0], [0.0, 1.0]], [[-2.0, 0.5], [1.0, -1.0]]],
            "cov": _COV22,
        },
        6,
        {"z": 2},
        (("weights", 0), ("beta", 0), ("cov", 0)),
    ),
    _problem(
        mixture_of_experts,
        (_given(200, 2, seed=10), _blank(200)),
        {
            "gate": [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]],
            "beta": [[4.0, 0.0], [-3.0, 2.0], [0.0, -4.0]],
            "scale": 0.5,
        },
        4,
        {"z": 3},
        (("gate", 0), ("beta", 0)),
    ),
    _problem(
        poisson_exposure,
        ((torch.arange(120) % 7 + 1).double() / 2, _blank(120)),
        {"weights": _WEIGHTS2, "rate": [1.0, 4.0]},
        6,
        {"z": 2},
        (("weights", 0), ("rate", 0)),
    ),
    _problem(
        base_rates,
        (_given(150, 2, seed=11), _blank(150)),
        {"weights": _WEIGHTS2, "rate": [1.0, 6.0], "slope": [0.5, -0.3]},
        6,
        {"z": 2},
        (("weights", 0), ("rate", 0)),
    ),
    _problem(
        hierarchical_means,
        (_blank(120),),
        {
            "mean": 1.0,
            "spread": 4.0,
            "rate": 1.0,
            "loc": [-3.0, 0.5, 4.0],
            "var": [0.6, 0.8, 1.0],
        },
        4,
        {"z": 3},
    ),
    _problem(
        normal_wishart,
        (_blank(120, 2),),
        {
            "weights": _WEIGHTS2,
            "precision": [[[1.2, 0.3], [0.3, 0.8]], [[1.5, -0.4], [-0.4, 1.0]]],
            "loc": [[-2.0, 0.5], [2.0, -0.5]],
        },
        6,
        {"z": 2},
        (("weights", 0), ("precision", 0), ("loc", 0)),
    ),
    _problem(
        sum_to_zero,
        (_blank(120),),
        {
            "weights": _WEIGHTS3,
            "mean": 1.0,
            "effect": [-3.0, 0.5],
            "scale": [0.8, 0.6, 1.0],
        },
        4,
        {"z": 3},
    ),
    _problem(
        cumulative_means,
        (_blank(120),),
        {
            "weights": _WEIGHTS3,
            "first": -2.0,
            "gaps": [2.0, 3.0],
            "raw": [0.5, 0.1, 0.8],
        },
        4,
        {"z": 3},
    ),
    _problem(
        one_hot_assignment,
        (_blank(120, 2),),
        {"weights": _WEIGHTS3, "loc": _LOC32, "scale": [0.8, 1.1]},
        4,
        {"z": 3},
        (("weights", 0), ("loc", 0)),
    ),
    _problem(
        bernoulli_where,
        (_blank(150),),
        {"prob": 0.25, "loc": 0.5, "narrow": 0.6, "wide": 3.0},
        6,
        {"outlier": 2},
    ),
    _problem(
        bernoulli_blend,
        (_blank(120),),
        {"prob": 0.4, "low": -1.2, "high": 1.5, "scale": 0.8},
        6,
        {"z": 2},
    ),
    _problem(
        binomial_assignment,
        (_blank(120),),
        {"frequency": 0.4, "loc": [-2.0, 0.5, 2.0], "scale": 0.7},
        4,
        {"copies": 3},
    ),
    _problem(
        two_assignments_table,
        (_blank(150),),
        {
            "row_weights": _WEIGHTS2,
            "column_weights": _WEIGHTS3,
            "loc": [[-4.0, 0.0, 2.0], [-2.0, 4.0, 6.0]],
            "scale": [0.5, 0.8, 0.6],
        },
        3,
        {"row": 2, "column": 3},
        Symmetry(("row",), (("row_weights", 0), ("loc", 0))),
        Symmetry(("column",), (("column_weights", 0), ("loc", 1), ("scale", 0))),
    ),
    _problem(
        two_assignments_sum,
        (_blank(150),),
        {
            "first_weights": _WEIGHTS2,
            "second_weights": [0.7, 0.3],
            "a": [-3.0, 3.0],
            "b": [-1.0, 1.2],
            "scale": 0.6,
        },
        3,
        {"z1": 2, "z2": 2},
        Symmetry(("z1",), (("first_weights", 0), ("a", 0))),
        Symmetry(("z2",), (("second_weights", 0), ("b", 0))),
    ),
    _problem(
        hierarchical_assignment,
        (_blank(150), _blank(150)),
        {
            "weights": _WEIGHTS2,
            "table": [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]],
            "prob": [0.2, 0.9],
            "loc": [-2.0, 0.0, 2.5],
            "scale": 0.7,
        },
        3,
        {"z1": 2, "z2": 3},
        Symmetry(("z1",), (("weights", 0), ("table", 0), ("prob", 0))),
        Symmetry(("z2",), (("table", 1), ("loc", 0))),
    ),
    _problem(
        grouped_rows,
        (_blank(60, 3),),
        {"weights": _WEIGHTS2, "loc": [-0.8, 0.8], "scale": [0.8, 1.2]},
        6,
        {"z": 2},
        _GAUSSIAN_AXES,
        row_plate="groups",
    ),
    _problem(
        nested_assignments,
        (_blank(80, 6),),
        {
            "weights": _WEIGHTS2,
            "table": [[0.8, 0.2], [0.2, 0.8]],
            "loc": [-1.6, 1.6],
            "scale": [0.8, 1.0],
        },
        (2, 3),
        {"group": 2, "z": 2},
        Symmetry(("group",), (("weights", 0), ("table", 0))),
        Symmetry(("z",), (("table", 1), ("loc", 0), ("scale", 0))),
        row_plate="groups",
    ),
    _problem(
        global_assignment,
        (_blank(60),),
        {
            "regimes": _WEIGHTS2,
            "weights": [[0.6, 0.4], [0.4, 0.6]],
            "loc": [-1.0, 1.2],
            "scale": 0.8,
        },
        6,
        {"regime": 2, "z": 2},
        row_plate=None,
    ),
    _problem(
        chain,
        (_blank(12),),
        {
            "initial": _WEIGHTS2,
            "transition": [[0.8, 0.2], [0.3, 0.7]],
            "loc": [-1.0, 1.2],
            "scale": 0.9,
        },
        7,
        {f"z_{t}": 2 for t in range(12)},
        _CHAIN_AXES[:4],
        row_plate=None,
    ),
    _problem(
        chain_sequences,
        (_blank(60, 5),),
        {
            "initial": _WEIGHTS3,
            "transition": [[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]],
            "loc": [-2.5, 0.0, 3.0],
            "scale": [0.8, 0.7, 1.0],
        },
        (2, 2),
        {f"z_{t}": 3 for t in range(5)},
        _CHAIN_AXES,
        row_plate="sequences",
    ),
    _problem(
        chain_ragged,
        (_blank(80, 5), torch.arange(80) * 3 % 5 + 1),
        {"transition": [[0.7, 0.3], [0.2, 0.8]], "rate": [1.0, 5.0]},
        (2, 4),
        {f"z_{t}": 2 for t in range(5)},
        row_plate="sequences",
    ),
    _problem(
        chain_second_order,
        (_blank(60, 5),),
        {
            "initial": _WEIGHTS2,
            "transition": _SECOND_ORDER,
            "loc": [-1.0, 1.2],
            "scale": [0.8, 1.0],
        },
        (2, 4),
        {f"z_{t}": 2 for t in range(5)},
        (*_CHAIN_AXES, ("transition", 2)),
        row_plate="sequences",
    ),
    _problem(
        chain_mixture_emissions,
        (_blank(60, 4),),
        {
            "initial": _WEIGHTS2,
            "transition": [[0.8, 0.2], [0.3, 0.7]],
            "mixing": [[0.6, 0.4], [0.3, 0.7]],
            "loc": [[-3.0, -1.2], [1.0, 2.5]],
            "scale": [0.6, 0.8],
        },
        (2, 2),
        {f"{z}_{t}": 2 for t in range(4) for z in "zc"},
        row_plate="sequences",
    ),
    _problem(
        chain_covariates,
        (_blank(80, 4), torch.linspace(-1, 1, 320).reshape(4, 80).T.double()),
        {
            "initial": _WEIGHTS2,
            "base": [[0.9, -0.3], [-0.2, 0.8]],
            "effect": [[0.5, -0.4], [0.3, 0.1]],
            "loc": [-1.5, 1.5],
            "slope": [0.5, -0.7],
            "scale": [0.7, 0.9],
        },
        (2, 3),
        {f"z_{t}": 2 for t in range(4)},
        row_plate="sequences",
    ),
    _problem(
        chain_autoregressive,
        (_blank(80, 5),),
        {
            "transition": [[0.8, 0.2], [0.3, 0.7]],
            "loc": [-1.5, 1.5],
            "memory": [0.5, -0.3],
            "scale": [0.7, 0.9],
        },
        (2, 4),
        {f"z_{t}": 2 for t in range(5)},
        row_plate="sequences",
    ),
    _problem(
        chain_by_edge,
        (_blank(80, 4),),
        {"transition": [[0.7, 0.3], [0.2, 0.8]], "rate": [[1.0, 5.0], [9.0, 2.5]]},
        (2, 4),
        {f"z_{t}": 2 for t in range(4)},
        row_plate="sequences",
    ),
    _problem(
        chain_stationary,
        (_blank(14),),
        {"transition": [[0.7, 0.3], [0.2, 0.8]], "rate": [1.5, 6.0]},
        6,
        {f"z_{t}": 2 for t in range(14)},
        (("transition", 0), ("transition", 1), ("rate", 0)),
        row_plate=None,
    ),
    _problem(
        chain_several,
        (
            _blank(60, 3, 2),
            torch.zeros(60, 3, dtype=torch.long),
            torch.arange(180).reshape(60, 3) % 4 != 1,
        ),
        {
            "initial": _WEIGHTS2,
            "transition": [[0.7, 0.3], [0.2, 0.8]],
            "loc": _LOC22,
            "cov": [[[0.8, 0.2], [0.2, 0.5]], [[1.0, -0.3], [-0.3, 0.7]]],
            "probs": [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]],
        },
        (2, 3),
        {f"z_{t}": 2 for t in range(3)},
        row_plate="sequences",
    ),
    _problem(
        chain_panel,
        (_blank(10, 3),),
        {"stay": 0.75, "rate": [1.5, 5.0]},
        6,
        {f"z_{t}": 2 for t in range(10)},
        row_plate=None,
    ),
    _problem(
        chains_side_by_side,
        (_blank(60, 4), _blank(60, 4)),
        {
            "ways": [[0.7, 0.3], [0.2, 0.8]],
            "turns": [[0.6, 0.4], [0.3, 0.7]],
            "loc": [-1.5, 1.5],
            "rate": [1.0, 6.0],
        },
        (2, 2),
        {f"{z}_{t}": 2 for t in range(4) for z in "zw"},
        row_plate="sequences",
    ),
    _problem(
        chains_coupled,
        (_blank(60, 3),),
        {
            "ways": [[0.7, 0.3], [0.2, 0.8]],
            "turns": [[0.6, 0.4], [0.3, 0.7]],
            "loc": [[-5.0, -1.0], [2.0, 7.0]],
        },
        (2, 2),
        {f"{z}_{t}": 2 for t in range(3) for z in "zw"},
        row_plate="sequences",
    ),
    _problem(
        masked_rows,
        (_blank(120), torch.arange(120) % 3 != 1),
        {"weights": _WEIGHTS2, "loc": [-1.5, 1.5], "scale": [0.8, 1.1]},
        6,
        {"z": 2},
        _GAUSSIAN_AXES,
    ),
    _problem(
        masked_entries,
        (_blank(120, 2), torch.arange(240).reshape(120, 2) % 5 != 1),
        {"weights": _WEIGHTS2, "loc": _LOC22, "scale": [[0.8, 1.0], [1.1, 0.7]]},
        6,
        {"z": 2},
        _GAUSSIAN_AXES,
    ),
    _problem(
        models.poisson_mixture(2),
        (_blank(120, 2), (torch.arange(120) % 4 - 2).clamp(min=-1)),
        {"weights": _WEIGHTS2, "rate": [[2.0, 6.0], [5.0, 3.0]]},
        6,
        {"z": 2},
        name="labelled_mixture",
    ),
    _problem(
        models.student_t_mixture(2),
        (_blank(150, 2),),
        {
            "weights": _WEIGHTS2,
            "loc": [[-3.0, 0.5], [3.0, -0.5]],
            "scale_tril": [[[1.0, 0.0], [0.5, 1.0]], [[0.8, 0.0], [-0.3, 0.7]]],
            "df": [2.0, 3.0],
        },
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0), ("scale_tril", 0), ("df", 0)),
        name="student_t_full",
    ),
    _problem(
        models.student_t_mixture(2, "spherical"),
        (_blank(150, 2),),
        {
            "weights": _WEIGHTS2,
            "loc": [[-3.0, 0.5], [3.0, -0.5]],
            "scale": [0.8, 1.2],
            "df": [2.0, 3.0],
        },
        6,
        {"z": 2},
        (*_GAUSSIAN_AXES, ("df", 0)),
        name="student_t_spherical",
    ),
    _problem(
        models.zero_inflated_mixture(2),
        (_blank(150, 2),),
        {
            "weights": _WEIGHTS2,
            "rate": [[2.0, 9.0], [8.0, 3.0]],
            "gate": [[0.3, 0.15], [0.2, 0.4]],
        },
        6,
        {"z": 2},
        (("weights", 0), ("rate", 0), ("gate", 0)),
        name="zero_inflated_columns",
    ),
    _problem(
        models.latent_class(
            2, (2, 3, 4), models.CategoryPrior((real([0.5, 0.5]), real([0.3, 0.3, 0.4]), _Q4), 2.0)
        ),
        (_codes(16),),
        {
            "weights": _WEIGHTS2,
            "probs_0": [[0.8, 0.2], [0.3, 0.7]],
            "probs_1": [[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]],
            "probs_2": [[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.2, 0.5]],
        },
        6,
        {"z": 2},
        (("weights", 0), ("probs_0", 0), ("probs_1", 0), ("probs_2", 0)),
        name="latent_class_columns",
        drawn=False,
    ),
    _problem(
        models.mixed_mixture(2, ("gaussian", "poisson", "bernoulli", 3)),
        (_of_kinds(12),),
        {
            "weights": _WEIGHTS2,
            "loc": [[0.0], [2.0]],
            "scale": [[0.8], [1.2]],
            "rate": [[0.8], [2.0]],
            "probs": [[0.2], [0.8]],
            "probs_3": [[[0.6, 0.3, 0.1]], [[0.1, 0.2, 0.7]]],
        },
        6,
        {"z": 2},
        (*_GAUSSIAN_AXES, ("rate", 0), ("probs", 0), ("probs_3", 0)),
        name="mixed_columns",
        drawn=False,
    ),
    _problem(
        models.mixture_of_regressions(2, "poisson", intercept=True, concomitant=True),
        (_given(200, 1, seed=13), _blank(200)),
        {"gate": [[1.0, 0.5], [-1.0, -0.5]], "coefficients": [[2.0, 0.5], [0.0, -0.7]]},
        6,
        {"z": 2},
        (("gate", 0), ("coefficients", 0)),
        name="experts_counts",
    ),
    _problem(
        models.bayesian_gaussian_mixture(2, _PRIOR, "tied"),
        (_blank(120, 2),),
        {"weights": _WEIGHTS2, "precision": _COV22[0], "loc": _LOC22},
        6,
        {"z": 2},
        (("weights", 0), ("loc", 0)),
        name="bayesian_tied",
    ),
    _problem(
        models.bayesian_gaussian_mixture(2, _PRIOR, "spherical"),
        (_blank(120, 2),),
        {"weights": _WEIGHTS2, "variance": [0.8, 1.2], "loc": _LOC22},
        6,
        {"z": 2},
        (("weights", 0), ("variance", 0), ("loc", 0)),
        name="bayesian_spherical",
    ),
    _problem(
        models.hidden_markov(2, "categorical", categories=3),
        (_blank(80, 4, 2),),
        {
            "initial": _WEIGHTS2,
            "transition": [[0.8, 0.2], [0.3, 0.7]],
            "probs": [[[0.7, 0.2, 0.1], [0.6, 0.2, 0.2]], [[0.1, 0.3, 0.6], [0.2, 0.2, 0.6]]],
        },
        (2, 3),
        {f"z_{t}": 2 for t in range(4)},
        (("initial", 0), ("transition", 0), ("transition", 1), ("probs", 0)),
        row_plate="sequences",
        name="hidden_markov_categories",
    ),
]
