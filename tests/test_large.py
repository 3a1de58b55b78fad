"""Large data: the program is read on a sample of its rows, the fit uses all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import pyroem
import pyroem.batch
from pyroem import EM, MAP
from pyroem._pyro import isolated
from pyroem.estep.engine import MixtureEngine, TraceEngine
from pyroem.families import forms
from pyroem.problem import LARGE, pose
from pyroem.structure import Params

N = LARGE + 100


def simulated(rows: int = N, features: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    z = torch.arange(rows) % 3
    centres = torch.tensor([[-3.0, 0.0], [0.0, 3.0], [3.0, -1.0]], dtype=torch.float64)
    noise = torch.randn((rows, 2), generator=generator, dtype=torch.float64)
    return (centres[z] + noise)[:, :features]


def mixture(x: Tensor, states: int = 3) -> None:
    size = x.shape[-1]
    weights = pyro.param("weights", torch.ones(states) / states, constraint=constraints.simplex)
    start = torch.linspace(-1, 1, states)[:, None] * torch.ones(size)
    loc = pyro.param("loc", start)
    scale = pyro.param("scale", torch.ones(states, size), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def standardised(x: Tensor) -> None:
    mixture((x - x.mean(0)) / x.std(0))


def scaled_by_the_data(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(x.mean(0), x.std(0)).expand([3, 2]).to_event(2))
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)


def started_at_the_data(x: Tensor) -> None:
    loc = pyro.param("loc", x[:3] + x.mean(0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)


def of_fixed_size(x: Tensor) -> None:
    loc = pyro.param("loc", torch.randn(3, 2))
    with pyro.plate("rows", N):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)


def rare_covariate(x: Tensor) -> None:
    """An argument that differs in one row only."""
    loc = pyro.param("loc", torch.randn(3, 2))
    shift = torch.zeros(len(x), 1)
    shift[x[:, 0] == x[:, 0].max()] = 5.0
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(loc[z] + shift, 1.0).to_event(1), obs=x)


def masked(x: Tensor) -> None:
    loc = pyro.param("loc", torch.randn(3, 2))
    seen = ~x.isnan()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(loc[z], 1.0).mask(seen).to_event(1), obs=x)


def counts(n: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(n)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("n", dist.Poisson(rate[z]), obs=n)


def tempered(x: Tensor) -> None:
    """A scale that depends on the number of rows."""
    with poutine.scale(scale=500 / len(x)):
        mixture(x)


def plated_parameters(x: Tensor) -> None:
    """Parameters in plates of their own, and a mask."""
    with pyro.plate("states", 3, dim=-2), pyro.plate("kinds", 2, dim=-1):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(loc[z, 0], 1.0).mask(x[:, 0] > -4), obs=x[:, 0])


def with_holes() -> Tensor:
    x = simulated()
    x[::7, 0] = torch.nan
    return x


X = simulated()
CASES: list[tuple[Callable[..., None], Tensor, bool]] = [
    (mixture, X, True),
    (standardised, X, False),
    (scaled_by_the_data, X, False),
    (started_at_the_data, X, True),
    (of_fixed_size, X, False),
    (rare_covariate, X, False),
    (masked, with_holes(), True),
    (tempered, X, False),
    (plated_parameters, X, True),
    (counts, X[:, 0].abs().round(), True),
]


@pytest.mark.parametrize(("model", "x", "sampled"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_reading_a_sample_changes_nothing(
    model: Callable[..., None], x: Tensor, sampled: bool, weighted: bool
) -> None:
    weights = torch.arange(N, dtype=torch.float64) % 3 if weighted else None
    large = pose(model, (x,), {}, weights=weights)
    assert (large.smaller is not None) == sampled
    trace = pose(model, (x,), {}, weights=weights, engine="trace")
    assert isinstance(trace.engine, TraceEngine)
    assert large.structure.num_rows == trace.structure.num_rows == N
    assert large.rows == trace.rows
    with isolated(torch.float64, 0), torch.no_grad():
        params = {n: p.value for n, p in large.structure.parameters.items()}
        for name, parameter in trace.structure.parameters.items():
            if not parameter.random:
                torch.testing.assert_close(params[name], parameter.value)
        for _ in range(3):
            found, wanted = (problem.e_step(params)[0] for problem in (large, trace))
            torch.testing.assert_close(
                found.log_likelihood, wanted.log_likelihood, rtol=1e-10, atol=1e-8
            )
            steps = [p.m_step(params, e) for p, e in ((large, found), (trace, wanted))]
            for name in params:
                torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-8, atol=1e-8)
            params = steps[0]


@pytest.mark.parametrize("solver", [EM(), MAP()], ids=lambda s: s.name)
def test_a_fit_of_large_data(solver: Any) -> None:
    fit = solver.fit(mixture, X)
    assert fit.converged, fit.explain()
    assert "mixture kernel" in fit.explain()
    trace = EM(engine="trace").fit(mixture, X, init=fit)
    assert trace.log_joint == pytest.approx(fit.log_joint, rel=1e-8)
    close(fit.params, trace.params, 2e-3 if solver.name == "MAP" else 1e-3)


def close(a: Params, b: Params, tolerance: float) -> None:
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def test_what_a_fit_says_of_rows_is_the_same_with_either_engine() -> None:
    fit = EM().fit(mixture, X)
    assert isinstance(fit.problem.engine, MixtureEngine)
    trace = EM(engine="trace", max_iter=1).fit(mixture, X, init=fit)
    params = trace.params
    fit = EM(max_iter=1).fit(mixture, X, init=fit)
    close(fit.params, params, 1e-9)
    for data in ((), (X[:50],), (X[:1],)):
        torch.testing.assert_close(fit.responsibilities(*data), trace.responsibilities(*data))
        torch.testing.assert_close(fit.predict(*data), trace.predict(*data))
        torch.testing.assert_close(fit.log_prob(*data), trace.log_prob(*data))
        torch.testing.assert_close(
            fit.posterior(*data)["z"].probs, trace.posterior(*data)["z"].probs
        )
    assert fit.icl() == pytest.approx(trace.icl(), rel=1e-10)
    assert fit.bic() == pytest.approx(trace.bic(), rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 1e6, -1e9])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_data_of_any_place_and_scale(shift: float, scale: float) -> None:
    x = simulated(600)
    plain = EM().fit(mixture, x, init="kmeans")
    moved = EM().fit(mixture, scale * (x + shift), init="kmeans")
    assert moved.status == plain.status
    order = plain.params["loc"][:, 0].argsort(), moved.params["loc"][:, 0].argsort()
    found = moved.params["loc"][order[1]] / scale - shift
    tolerance = 1e-4 + 1e-12 * abs(shift)
    torch.testing.assert_close(found, plain.params["loc"][order[0]], rtol=0, atol=tolerance)


def test_one_row_one_state_and_many_states() -> None:
    one = pyroem.EM().fit(mixture, X[:1], 1)
    torch.testing.assert_close(one.params["loc"][0], X[0])
    single = pyroem.EM().fit(mixture, X[:500], 1)
    torch.testing.assert_close(single.params["loc"][0], X[:500].mean(0))
    problem = pose(mixture, (X, 200), {})
    trace = pose(mixture, (X, 200), {}, engine="trace")
    with isolated(torch.float64, 0), torch.no_grad():
        params = {n: p.value for n, p in problem.structure.parameters.items()}
        found, wanted = (p.e_step(params)[0].log_likelihood for p in (problem, trace))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)


def student(x: Tensor) -> None:
    """A program without a kernel."""
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.StudentT(4.0, loc[z], 1.0), obs=x)


def test_many_columns_and_several_threads() -> None:
    """Modes of batches of large matrices: some linear algebra goes wrong with several threads."""
    x = torch.randn((3, 200, 160), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scatter, counts, sums = x.mT @ x, torch.full((3,), 200.0, dtype=torch.float64), x.sum(1)
    tasks = [
        (forms.VECTOR_LOCATION, sums),
        (forms.COVARIANCE, counts),
        (forms.PRECISION, counts),
        (forms.SCALE_TRIL, counts),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = [form.mode(first, scatter) for form, first in tasks]
    finally:
        torch.set_num_threads(before)
    for (form, first), own in zip(tasks, found, strict=True):
        alone = [form.mode(first[k], scatter[k]) for k in range(3)]
        torch.testing.assert_close(own, torch.stack(alone))
    torch.testing.assert_close((scatter @ found[0].unsqueeze(-1)).squeeze(-1), sums)


def test_a_kernel_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        pyroem.SettingError, match="the statistics of site 'x' depend on its parameters"
    ):
        EM(engine="kernel").fit(student, X[:50, 0])
    with pytest.raises(pyroem.SettingError, match="engine must be one of auto, kernel, trace"):
        EM(engine="fast")
    fit = EM(max_iter=2).fit(student, X[:50, 0])
    assert "no kernel: the statistics of site 'x' depend on its parameters" in fit.explain()


# ---------------------------------------------------------------------------------------
# Restarts as one batch


@pytest.mark.parametrize("init", ["kmeans", "random"])
def test_restarts_in_a_batch_end_where_single_runs_end(init: str) -> None:
    x = simulated(400)
    together = EM().fit(mixture, x, init=init, restarts=6)
    alone = [EM().fit(mixture, x, init=init, seed=seed) for seed in range(6)]
    assert len(together.restarts) == 6
    assert together.log_joint == pytest.approx(max(r.log_joint for r in together.restarts))
    for restart, fit in zip(together.restarts, alone, strict=True):
        assert restart.log_joint == pytest.approx(fit.log_joint, rel=1e-7)
    best = max(alone, key=lambda fit: fit.log_joint)
    assert together.n_iter == len(together.history) - 1
    order = [fit.params["loc"][:, 0].argsort() for fit in (together, best)]
    torch.testing.assert_close(
        together.params["loc"][order[0]], best.params["loc"][order[1]], rtol=1e-3, atol=1e-3
    )


def test_a_run_that_collapses_leaves_the_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((60, 2), generator=generator, dtype=torch.float64)
    x[:4] = 4.0  # four equal rows: a component of its own has no variance
    fit = EM(max_iter=300).fit(mixture, x, init="random", restarts=16)
    ends = {r.status for r in fit.restarts}
    assert pyroem.Status.DEGENERATE in ends
    if ends - {pyroem.Status.DEGENERATE}:
        assert fit.status is not pyroem.Status.DEGENERATE


def test_an_interrupt_keeps_all_runs_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, inner = 0, pyroem.batch.Batch.e_step

    def impatient(self: Any, params: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return inner(self, params)

    monkeypatch.setattr(pyroem.batch.Batch, "e_step", impatient)
    fit = EM().fit(mixture, simulated(300), init="kmeans", restarts=5)
    assert fit.status is pyroem.Status.INTERRUPTED and fit.n_iter == 2
    assert len(fit.restarts) == 5
    assert fit.log_joint == pytest.approx(max(r.log_joint for r in fit.restarts))
