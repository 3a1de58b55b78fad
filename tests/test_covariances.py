"""Covariances that components share in part: mclust's parametrisations."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyroem import EM, MAP, SettingError, datasets
from pyroem.constraints import DIAGONALS, MATRICES, SharedConstraint, covariances, variances
from pyroem.loop import Status
from pyroem.models.gaussian import COVARIANCES, gaussian_mixture

K, D = 3, 4

# Free parameters of the covariances, by Celeux and Govaert (1995), table 1.
COUNTS = {
    "EII": 1,
    "VII": K,
    "EEI": D,
    "VEI": K + D - 1,
    "EVI": 1 + K * (D - 1),
    "VVI": K * D,
    "EEE": D * (D + 1) // 2,
    "VEE": K + D * (D + 1) // 2 - 1,
    "EVE": 1 + K * (D - 1) + D * (D - 1) // 2,
    "VVE": K * D + D * (D - 1) // 2,
    "EEV": D + K * D * (D - 1) // 2,
    "VEV": K + D - 1 + K * D * (D - 1) // 2,
    "EVV": 1 + K * (D * (D + 1) // 2 - 1),
    "VVV": K * D * (D + 1) // 2,
}


def structure(name: str) -> SharedConstraint:
    return variances(name) if name in DIAGONALS else covariances(name)


def raw_of(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (K, D) if name in DIAGONALS else (K, D, D)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def statistics(name: str) -> tuple[Tensor, Tensor]:
    """Weights and scatters that lie in no structure."""
    generator = torch.Generator().manual_seed(1)
    if name in DIAGONALS:
        weights = 20 + 20 * torch.rand(K, D, generator=generator, dtype=torch.float64)
        return weights, 1 + 90 * torch.rand(K, D, generator=generator, dtype=torch.float64)
    x = torch.randn(K, D, 40, generator=generator, dtype=torch.float64)
    scatter = x @ x.mT * torch.tensor([1.0, 3.0, 0.4]).double()[:, None, None]
    return torch.tensor([40.0, 30.0, 60.0]).double(), scatter


def kernel(n: Tensor, w: Tensor, value: Tensor) -> Tensor:
    if w.dim() == 2:
        return -0.5 * (n * value.log() + w / value).sum()
    log_det = torch.linalg.slogdet(value)[1]
    traces = torch.linalg.solve(value, w).diagonal(dim1=-2, dim2=-1).sum(-1)
    return -0.5 * (n * log_det + traces).sum()


every_structure = pytest.mark.parametrize("name", [*MATRICES, *DIAGONALS])


@every_structure
def test_coordinates_lead_into_the_structure_and_back(name: str) -> None:
    shared = structure(name)
    transform = transform_to(shared)
    for seed in range(5):
        value = transform(raw_of(name, seed))
        assert shared.check(value).all()
        torch.testing.assert_close(transform(transform.inv(value)), value, rtol=1e-8, atol=1e-10)
    away = torch.rand(K, D, dtype=torch.float64)
    away = away if name in DIAGONALS else torch.diag_embed(away)
    assert not shared.check(value + away).any()
    assert not shared.check(-value).any()


@every_structure
def test_the_number_of_free_parameters_is_the_rank_of_the_coordinates(name: str) -> None:
    shared, raw = structure(name), raw_of(name, 0)
    jacobian = torch.autograd.functional.jacobian(transform_to(shared), raw)
    rank = torch.linalg.matrix_rank(jacobian.reshape(raw.numel(), raw.numel()))
    assert shared.dimension(tuple(raw.shape)) == COUNTS[name] == int(rank)


@every_structure
def test_the_maximiser_is_that_of_a_numerical_search(name: str) -> None:
    shared = structure(name)
    transform = transform_to(shared)
    n, w = statistics(name)
    found = shared.maximise(n, w)
    assert shared.check(found).all()
    best, reached = float(kernel(n, w, found)), []
    for seed in range(4):
        raw = raw_of(name, seed).requires_grad_()
        search = torch.optim.LBFGS(
            [raw], max_iter=1000, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def loss(search: Any = search, raw: Tensor = raw) -> Tensor:
            search.zero_grad()
            value = -kernel(n, w, transform(raw))
            value.backward()
            return value

        search.step(loss)
        reached.append(float(kernel(n, w, transform(raw)).detach()))
    assert max(reached) == pytest.approx(best, abs=1e-5)


@every_structure
def test_what_lies_in_the_structure_is_its_own_maximiser(name: str) -> None:
    value = transform_to(structure(name))(raw_of(name, 3))
    torch.testing.assert_close(structure(name).project(value), value, rtol=1e-8, atol=1e-10)


@every_structure
def test_a_component_without_weight_leaves_the_others_alone(name: str) -> None:
    n, w = statistics(name)
    if name in DIAGONALS:
        n = n[:, :1].expand(K, D)
    n, w = n.clone(), w.clone()
    n[1], w[1] = 0.0, 0.0
    found = structure(name).maximise(n, w)
    assert found.isfinite().all()
    alone = structure(name).maximise(n[[0, 2]], w[[0, 2]])
    torch.testing.assert_close(found[[0, 2]], alone, rtol=1e-7, atol=1e-9)


def test_names_that_are_no_structure() -> None:
    with pytest.raises(ValueError, match=r"covariances: expected one of VEE, .*; got 'VVV'"):
        covariances("VVV")
    with pytest.raises(ValueError, match="variances: expected one of VEI, EVI; got 'VEV'"):
        variances("VEV")
    assert covariances("VEV") == covariances("VEV") != covariances("VEE")


@pytest.mark.parametrize("name", COUNTS)
def test_degrees_of_freedom_of_the_fourteen(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, D, generator=generator, dtype=torch.float64)
    fit = EM(max_iter=1).fit(gaussian_mixture(K, name), x, init="kmeans")
    assert fit.problem.df == COUNTS[name] + K * D + K - 1
    assert "mixture kernel" in fit.explain()


def test_mclusts_choice_on_old_faithful() -> None:
    """mclust chooses EEE with 3 components: BIC -2314.316, by its sign."""
    _, x = datasets.load("faithful")
    found = {}
    for name in ("EEE", "VVE", "EVE", "VEE", "VVV", "EEI"):
        for k in (2, 3):
            fit = EM().fit(gaussian_mixture(k, name), x)
            assert fit.status is Status.CONVERGED, (name, k, fit)
            found[name, k] = -fit.bic()
    best = max(found, key=lambda pair: found[pair])
    assert best == ("EEE", 3)
    assert found[best] == pytest.approx(-2314.31629566578, abs=0.03)
    assert found["EEE", 3] >= -2314.31629566578


@pytest.mark.parametrize("name", ["VEE", "EVV", "EEV", "VEV", "EVE", "VVE", "VEI", "EVI"])
def test_em_and_map_find_one_optimum(name: str) -> None:
    _, x = datasets.load("faithful")
    em = EM().fit(gaussian_mixture(2, name), x)
    gradient = MAP().fit(gaussian_mixture(2, name), x, init=em.params)
    assert gradient.log_joint == pytest.approx(em.log_joint, abs=1e-4)


def test_nested_structures_rise() -> None:
    _, x = datasets.load("faithful")
    fits = {name: EM().fit(gaussian_mixture(2, name), x).log_likelihood for name in COVARIANCES}
    for lower, higher in (
        ("EII", "VII"),
        ("VII", "VEI"),
        ("VEI", "VVI"),
        ("VVI", "VVE"),
        ("EEE", "VEE"),
        ("VEE", "VVE"),
        ("EVE", "VVE"),
        ("EEV", "VEV"),
        ("VEV", "VVV"),
        ("EVV", "VVV"),
        ("VVE", "VVV"),
    ):
        assert fits[lower] <= fits[higher] + 1e-6
    assert fits["full"] == pytest.approx(fits["VVV"])


def emissions(x: Tensor) -> None:
    """A program of the user's own: three groups, whose covariances have one shape."""
    weights = pyro.param("weights", x.new_ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(3, 3).to(x))
    one = torch.eye(3).to(x).repeat(3, 1, 1)
    cov = pyro.param("cov", one, constraint=covariances("EEV"))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(loc[z], cov[z]), obs=x)


def test_a_structure_in_a_users_own_program() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([3.0, 1.0, 0.3]).double()
    x[100:200] = x[100:200].flip(1) + 6
    x[200:] = x[200:].roll(1, 1) - 6
    fit = EM().fit(emissions, x, restarts=3)
    assert fit.converged
    assert "EEV: one formula" in fit.explain()
    values = torch.linalg.eigvalsh(fit.params["cov"])
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=0)
    assert values[0].sqrt().tolist() == pytest.approx([0.3, 1.0, 3.0], rel=0.1)
    weights = torch.ones(300)
    weights[:50] = 2
    twice = torch.cat([x, x[:50]])
    a = EM().fit(emissions, x, weights=weights, init=fit)
    b = EM().fit(emissions, twice, init=fit)
    assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-6)


def test_parts_of_a_structure_cannot_be_held() -> None:
    _, x = datasets.load("faithful")
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0] = True
    with pytest.raises(SettingError, match="covariance"):
        EM(fixed={"covariance": mask}).fit(gaussian_mixture(2, "VEV"), x)


def test_a_component_on_a_plane_is_a_collapse() -> None:
    """Rows that lie on a plane: their covariance has the others' volume, but no width."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, generator=generator, dtype=torch.float64)
    x[:40] += 8
    x[:40, 2] = 8.0
    labels = (torch.arange(120) >= 40).long()
    fit = EM().fit(gaussian_mixture(2, "EVV"), x, init={"z": labels})
    assert fit.status is Status.DEGENERATE, fit
