"""Components of other kinds: uniform noise, point masses, mixtures inside one site."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, MAP

GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(200, generator=GENERATOR, dtype=torch.float64)
X[:120] = 0.5 * X[:120] + 4
X[-20:] = torch.linspace(-9.0, 9.0, 20, dtype=torch.float64)
LOW, HIGH = -10.0, 10.0
START = {
    "weights": torch.tensor([0.4, 0.4, 0.2]),
    "loc": torch.tensor([-1.0, 3.0]),
    "scale": torch.ones(2),
}


def noise_by_masks(x: Tensor) -> None:
    """Two Gaussians and uniform noise, each a site under a mask."""
    weights = pyro.param("weights", START["weights"], constraint=constraints.simplex)
    loc = pyro.param("loc", START["loc"])
    scale = pyro.param("scale", START["scale"], constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        own = z.clamp(max=1)
        with poutine.mask(mask=z < 2):
            pyro.sample("x", dist.Normal(loc[own], scale[own]), obs=x)
        with poutine.mask(mask=z == 2):
            pyro.sample("noise", dist.Uniform(LOW, HIGH), obs=x)


def noise_by_masked_mixture(x: Tensor) -> None:
    """The same as one site."""
    weights = pyro.param("weights", START["weights"], constraint=constraints.simplex)
    loc = pyro.param("loc", START["loc"])
    scale = pyro.param("scale", START["scale"], constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        own = z.clamp(max=1)
        gaussian, noise = dist.Normal(loc[own], scale[own]), dist.Uniform(LOW, HIGH)
        pyro.sample("x", dist.MaskedMixture(z == 2, gaussian, noise), obs=x)


def test_a_component_of_uniform_noise() -> None:
    fit = EM(tol=1e-12).fit(noise_by_masks, X)
    assert fit.converged and "numerically" not in fit.explain()
    w, m, s = (fit.params[n].numpy() for n in ("weights", "loc", "scale"))
    x = X.numpy()
    # One EM iteration by hand leaves the fit where it is.
    density = np.stack(
        [w[k] * np.exp(-0.5 * ((x - m[k]) / s[k]) ** 2) / s[k] / np.sqrt(2 * np.pi) for k in (0, 1)]
        + [np.full_like(x, w[2] / (HIGH - LOW))]
    )
    assert fit.log_likelihood == pytest.approx(np.log(density.sum(0)).sum(), rel=1e-10)
    r = density / density.sum(0)
    np.testing.assert_allclose(r.mean(1), w, atol=1e-5)
    np.testing.assert_allclose((r[:2] @ x) / r[:2].sum(1), m, atol=1e-5)
    again = EM(tol=1e-12).fit(noise_by_masked_mixture, X)
    assert again.log_likelihood == pytest.approx(fit.log_likelihood, abs=1e-6)


def test_a_point_mass() -> None:
    n = torch.poisson(torch.full((150,), 3.0), generator=GENERATOR).double()
    n[::3] = 0

    def by_masks(n: Tensor) -> None:
        gate = pyro.param("gate", torch.tensor(0.3), constraint=constraints.unit_interval)
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(n)):
            extra = pyro.sample("extra", dist.Bernoulli(gate))
            with poutine.mask(mask=extra == 1):
                pyro.sample("zero", dist.Delta(torch.tensor(0.0)), obs=n)
            with poutine.mask(mask=extra == 0):
                pyro.sample("n", dist.Poisson(rate), obs=n)

    def in_one_site(n: Tensor) -> None:
        gate = pyro.param("gate", torch.tensor(0.3), constraint=constraints.unit_interval)
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(n)):
            pyro.sample("n", dist.ZeroInflatedPoisson(rate, gate=gate), obs=n)

    fits = [EM(tol=1e-13, param_tol=1e-9).fit(p, n) for p in (by_masks, in_one_site)]
    for fit in fits:
        assert fit.converged and "numerically" not in fit.explain()
        assert fit.log_likelihood == pytest.approx(fits[0].log_likelihood, rel=1e-12)
        assert float(fit.params["gate"]) == pytest.approx(float(fits[0].params["gate"]), abs=1e-7)


def test_a_mixture_inside_one_site() -> None:
    def inside(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        loc = pyro.param("loc", START["loc"])
        scale = pyro.param("scale", START["scale"], constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            parts = dist.Normal(loc, scale)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)

    def outside(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        loc = pyro.param("loc", START["loc"])
        scale = pyro.param("scale", START["scale"], constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    wanted = EM(tol=1e-12).fit(outside, X)
    for solver in (EM(tol=1e-12), MAP(tol=1e-12)):
        fit = solver.fit(inside, X)
        assert fit.converged and fit.df == wanted.df == 5
        assert fit.log_likelihood == pytest.approx(wanted.log_likelihood, abs=1e-6)
    assert "generalised EM" in EM().fit(inside, X).explain()
