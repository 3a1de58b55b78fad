"""Other devices and floating types: the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_large import X, mixture, simulated, student
from test_laws import CHAINS, KERNEL, posed_by_name

from pyroem import EM, MAP, SettingError, blocks
from pyroem._pyro import isolated
from pyroem.estep import scan
from pyroem.estep.engine import ChainEngine
from pyroem.problem import pose

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


PRODUCTS = [p for p in CHAINS if isinstance(posed_by_name(p.name).engine, ChainEngine)]


@cuda
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("problem", [*KERNEL, *PRODUCTS], ids=repr)
def test_the_device_gives_the_same_statistics(problem: Any, weighted: bool) -> None:
    shape = pose(problem.model, problem.data, {}).structure.unit_shape
    weights = torch.rand(shape, dtype=torch.float64) if weighted and shape else None
    home, away = (
        pose(problem.model, problem.data, {}, weights=weights, device=device)
        for device in (None, torch.device("cuda"))
    )
    with isolated(torch.float64, 0):
        a, b = (p.e_step(problem.params)[0] for p in (home, away))
    torch.testing.assert_close(a.log_likelihood, b.log_likelihood, rtol=1e-11, atol=1e-9)
    for name, site in a.statistics.items():
        other = b.statistics[name]
        for x, y in zip((site.weight, *site.values), (other.weight, *other.values), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-9)


@cuda
@pytest.mark.parametrize("solver", [EM, MAP])
def test_the_device_gives_the_same_fit(solver: Any) -> None:
    home, away = (solver(device=device).fit(mixture, X) for device in (None, "cuda"))
    assert away.status is home.status
    assert away.log_joint == pytest.approx(home.log_joint, rel=1e-9)
    torch.testing.assert_close(away.responsibilities(), home.responsibilities())
    streamed = solver(device="cuda").fit(mixture, blocks(X, rows=1000))
    assert streamed.log_joint == pytest.approx(home.log_joint, rel=1e-8)
    given = solver(device="cuda").fit(mixture, X.cuda())
    assert given.log_joint == pytest.approx(home.log_joint, rel=1e-9)
    many = EM(device="cuda").fit(mixture, X, init="kmeans", restarts=3)
    assert many.log_joint == pytest.approx(home.log_joint, rel=1e-6)


@pytest.mark.parametrize("problem", PRODUCTS, ids=repr)
def test_chains_in_torch(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device computes, on the processor: forward-backward without numba."""
    target = pose(problem.model, problem.data, {})
    with isolated(torch.float64, 0):
        wanted = target.e_step(problem.params)[0]
        monkeypatch.setattr(scan, "compiled", None)
        found = target.e_step(problem.params)[0]
    torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood)
    for name, site in wanted.statistics.items():
        own = found.statistics[name]
        for x, y in zip((site.weight, *site.values), (own.weight, *own.values), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-9)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(SettingError, match="device 'nowhere' cannot be used"):
        EM(device="nowhere").fit(mixture, simulated(50))
    fit = EM(device="cpu", max_iter=2).fit(mixture, simulated(50))
    assert fit.n_iter == 2


@cuda
def test_a_device_needs_the_kernel() -> None:
    with pytest.raises(SettingError, match="needs a program with a kernel"):
        EM(device="cuda").fit(student, X[:100, 0])


@pytest.mark.parametrize("problem", KERNEL, ids=repr)
def test_single_precision(problem: Any) -> None:
    """The objective in float32 agrees with that in float64 as far as float32 can tell."""
    params32 = {n: v.float() for n, v in problem.params.items()}
    single = pose(problem.model, problem.data, {}, dtype=torch.float32)
    double = pose(problem.model, problem.data, {})
    with isolated(torch.float32, 0):
        a = single.e_step(params32)[0]
    with isolated(torch.float64, 0):
        b = double.e_step({n: v.double() for n, v in params32.items()})[0]
    terms = max(abs(float(b.log_likelihood)), double.rows)  # which may cancel
    assert float(a.log_likelihood) == pytest.approx(float(b.log_likelihood), abs=3e-6 * terms)
    for name, site in b.statistics.items():
        other = a.statistics[name]
        assert other.weight.dtype == torch.float32
        size = 1e-5 * float(site.weight.sum())
        for x, y in zip((other.weight, *other.values), (site.weight, *site.values), strict=True):
            x, y = torch.broadcast_tensors(x.double(), y)
            torch.testing.assert_close(x, y, rtol=1e-5, atol=size)


def test_many_rows_in_single_precision() -> None:
    """Sums over many rows lose nothing, because they are made in double precision."""
    x = simulated(60_000) + 100.0
    double, single = (
        EM(dtype=dtype, max_iter=10).fit(mixture, x, init="kmeans")
        for dtype in (torch.float64, torch.float32)
    )
    assert single.params["loc"].dtype == torch.float32
    assert single.log_likelihood == pytest.approx(double.log_likelihood, rel=1e-5)
    for name, value in double.params.items():
        torch.testing.assert_close(single.params[name].double(), value, rtol=1e-3, atol=1e-3)
