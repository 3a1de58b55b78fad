"""The bootstrap: replicates as one batch, states matched, what is left out, what is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from torch import Tensor
from torch.distributions import constraints

from pyroem import (
    EM,
    MAP,
    Bootstrap,
    DataError,
    ModelError,
    SettingError,
    blocks,
    bootstrap,
    compare,
)
from pyroem.batch import Batch, no_batch, stack
from pyroem.bootstrap import dirichlet
from pyroem.estep.engine import MixtureEngine, TraceEngine
from pyroem.estep.stacked import selected
from pyroem.fit import Fit
from pyroem.matching import match, paired, parameter_difference
from pyroem.models import (
    gaussian_mixture,
    hidden_markov,
    latent_class,
    mixture_of_regressions,
    poisson_mixture,
)
from pyroem.mstep.update import QUICK
from pyroem.problem import pose
from pyroem.progress import Progress
from pyroem.redrawn import redrawn
from pyroem.selection.replicates import places_of, replicate
from pyroem.together import iterate_together

BY_NAME = {p.name: p for p in PROBLEMS}


class OneByOne(EM):
    """EM whose runs do not go as one batch."""

    def together(self, problem: Any) -> bool:
        return False


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(fit: Fit, count: int, seed: int = 0) -> Tensor:
    structure = fit.problem.structure
    ones = torch.ones(structure.unit_shape, dtype=structure.program.dtype)
    return dirichlet(ones, count, np.random.default_rng(seed))


def two_normals(rows: int = 1500, gap: float = 8.0, seed: int = 0) -> Tensor:
    x = torch.randn(rows, generator=generator(seed), dtype=torch.float64)
    first = rows * 2 // 5
    return torch.cat([x[:first], gap + 1.5 * x[first:]])


def normals(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 6.0]))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def with_priors(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 3.0)))
    loc = pyro.sample("loc", dist.Normal(4.0, 2.0).expand([2]).to_event(1))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def one_normal(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


# ---------------------------------------------------------------------------------------
# Row weights of each copy's own

# fmt: off
KINDS = [
    "gaussian_mixture", "full_gaussian", "missing_in_vectors", "missing_in_columns", "masked_rows",
    "masked_entries", "grouped_rows", "nested_assignments", "two_assignments_sum",
    "latent_class_plates", "poisson_exposure", "zero_inflated_mixture", "binomial_assignment",
    "multinomial_mixture", "linear_regressions", "weibull_mixture", "gaussian_and_poisson",
    "hierarchical_assignment", "chain_sequences", "chain_ragged", "chain_mixture_emissions",
    "chain_covariates",
]
# fmt: on


@pytest.mark.parametrize("name", KINDS)
def test_other_weights_are_those_of_a_program_read_under_them(name: str) -> None:
    """Of the problem, and of every copy of a batch."""
    known = BY_NAME[name]
    plain = pose(known.model, known.data, {})
    params = plain.structure.values(known.params)
    shape = (3, *plain.structure.unit_shape)
    weights = 3 * torch.rand(shape, generator=generator(1), dtype=torch.float64)
    weights[1] = weights[1].round()
    wanted = []
    for own in weights:
        posed = pose(known.model, known.data, {}, weights=own)
        wanted.append(posed.e_step(params))
        found = plain.weighted(own)
        assert found.rows == posed.rows
        same(found.e_step(params)[0], wanted[-1][0])
        assert float(sum(found.log_joint(params))) == pytest.approx(
            float(sum(posed.log_joint(params))), rel=1e-12
        )
    if no_batch(plain):
        return
    batch = Batch(plain, 3, weights.reshape(3, -1))
    expected, values = batch.e_step(stack([params] * 3))
    for i, (own, log_prior) in enumerate(wanted):
        assert float(values[i]) == pytest.approx(float(own.log_likelihood + log_prior), rel=1e-12)
        for site, statistics in own.statistics.items():
            copied = expected.statistics[site]
            for a, b in zip(copied.values, statistics.values, strict=True):
                torch.testing.assert_close(a[i].expand(b.shape), b, rtol=1e-10, atol=1e-10)


def same(found: Any, wanted: Any) -> None:
    assert float(found.log_likelihood) == pytest.approx(float(wanted.log_likelihood), rel=1e-12)
    for site, statistics in wanted.statistics.items():
        for a, b in zip(found.statistics[site].values, statistics.values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for site, weight in wanted.weights.items():
        torch.testing.assert_close(found.weights[site], weight, rtol=1e-12, atol=1e-12)


def test_the_copies_are_served_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that falls with the number of copies; what they find does not depend on it."""
    known = BY_NAME["full_gaussian"]
    plain = pose(known.model, known.data, {})
    params = stack([plain.structure.values(known.params)] * 2)
    weights = torch.rand(2, plain.structure.num_rows, generator=generator(), dtype=torch.float64)
    whole = Batch(plain, 2, weights).e_step(params)
    again = Batch(plain, 2, weights)
    for own in again.chunks:
        own.size = 7
    parts = again.e_step(params)
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-12, atol=0)
    monkeypatch.setattr("pyroem.estep.kernel.BLOCK", 70_000)
    assert isinstance(plain.engine, MixtureEngine)
    (rows,) = plain.engine.chunks
    numbers = [rows.weighted(torch.ones(n, rows.num_rows)).size * n for n in (10, 100)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02)


def test_integer_weights_are_rows_repeated() -> None:
    x = two_normals(60)
    fit = EM().fit(normals, x)
    weights = torch.randint(0, 4, (3, len(x)), generator=generator(), dtype=torch.float64)
    points, rule = [fit.params] * 3, EM(tol=1e-13, param_tol=1e-9).rule
    found = iterate_together(fit.problem, points, rule, Progress("", False), weights=weights)
    for own, run in zip(weights, found, strict=True):
        repeated = x.repeat_interleave(own.long())
        wanted = EM(tol=1e-13, param_tol=1e-9, floor=0).fit(normals, repeated, init=fit)
        assert run.state.log_joint == pytest.approx(wanted.log_joint, rel=1e-10)
        for name, value in wanted.params.items():
            torch.testing.assert_close(run.state.params[name], value, rtol=1e-7, atol=1e-9)


def test_the_weights_are_dirichlet() -> None:
    shares = torch.tensor([[1.0, 2.0], [0.0, 5.0]], dtype=torch.float64)
    drawn = dirichlet(shares, 40_000, np.random.default_rng(0))
    assert drawn.shape == (40_000, 2, 2)
    torch.testing.assert_close(drawn.sum((1, 2)), torch.full((40_000,), 8.0).double())
    # the moments of a Dirichlet vector times the sum s of its parameters a
    torch.testing.assert_close(drawn.mean(0), shares, rtol=0.02, atol=0)
    variance = shares * (8 - shares) / 9
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.04, atol=0)


# ---------------------------------------------------------------------------------------
# Data of each copy's own

# fmt: off
DRAWN = [
    "gaussian_mixture", "full_gaussian", "tied_gaussian", "diagonal_gaussian", "shared_mean",
    "missing_in_columns", "masked_rows", "masked_entries", "grouped_rows", "latent_class_plates",
    "negative_binomial_mixture", "multinomial_mixture", "log_normal_mixture", "von_mises_mixture",
    "categorical_logits", "binomial_assignment", "bernoulli_where", "two_assignments_table",
    "hierarchical_assignment", "gaussian_and_poisson", "mixed_columns", "gaussian_inverse_gamma",
]
# fmt: on


def drawn_from(fit: Fit, count: int) -> list[Any]:
    places = places_of(fit.problem)
    return [replicate(fit, places, seed) for seed in range(count)]


@pytest.mark.parametrize("name", DRAWN)
def test_other_data_is_that_of_a_program_read_with_it(name: str) -> None:
    """Of the problem, and of every copy of a batch, in blocks of rows."""
    known = BY_NAME[name]
    fit = EM(max_iter=1).fit(known.model, *known.data, init=known.params)
    data, anew = drawn_from(fit, 3), redrawn(fit.problem)
    assert not no_batch(fit.problem)
    assert anew is not None
    posed = anew.problems(data)
    assert posed is not None
    points = [fit.problem.structure.values(known.params)]
    wanted = []
    for own, (args, kwargs) in zip(posed[0], data, strict=True):
        read = pose(known.model, args, kwargs)
        wanted.append(read.e_step(points[-1]))
        assert float(sum(own.log_joint(points[-1]))) == pytest.approx(
            float(sum(read.log_joint(points[-1]))), rel=1e-12
        )
        points.append(read.m_step(points[-1], wanted[-1][0], effort=QUICK))
        # the statistics are around centres of their own: what they lead to is the same
        close(own.m_step(points[-2], own.e_step(points[-2])[0], effort=QUICK), points[-1])
        traced = TraceEngine(own.structure, own.plan, None).expect(points[-2])
        log_likelihood = float(wanted[-1][0].log_likelihood)
        assert float(traced[0].log_likelihood) == pytest.approx(log_likelihood, rel=1e-12)
    batch = Batch(fit.problem, 3, rows=posed[1])
    for size in (posed[1].size, 7):
        posed[1].size = size
        expected, values = batch.e_step(stack(points[:3]))
        for value, (statistics, log_prior) in zip(values.tolist(), wanted, strict=True):
            log_joint = float(statistics.log_likelihood + log_prior)
            assert value == pytest.approx(log_joint, rel=1e-12)
        found = batch.m_step(stack(points[:3]), expected)
        close(found, stack(points[1:]))


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_fewer_copies_are_those_that_go_on() -> None:
    known = BY_NAME["full_gaussian"]
    fit = EM(max_iter=1).fit(known.model, *known.data, init=known.params)
    anew, params = redrawn(fit.problem), stack([fit.params] * 3)
    assert anew is not None
    posed = anew.problems(drawn_from(fit, 3))
    assert posed is not None
    index = torch.tensor([0, 2])
    values = Batch(fit.problem, 3, rows=posed[1]).e_step(params)[1]
    fewer = Batch(fit.problem, 2, rows=selected(posed[1], index))
    torch.testing.assert_close(fewer.e_step(stack([fit.params] * 2))[1], values[index])


def scaled_by_data(x: Tensor) -> None:
    normals_with(x, dist.Normal, x.std())


def prior_by_data(x: Tensor) -> None:
    normals_with(x, dist.Normal, prior=dist.Normal(x.mean(), 1.0))


def bound_by_data(x: Tensor) -> None:
    normals_with(x, dist.Normal, constraint=constraints.greater_than(float(x.min()) - 50))


def masked_by_data(x: Tensor) -> None:
    normals_with(x, lambda loc, scale: dist.Normal(loc, scale).mask(x < x.max()))


def normals_with(
    x: Tensor,
    kind: Any,
    scale: Any = None,
    prior: Any = None,
    constraint: Any = constraints.real,
) -> None:
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    start = torch.tensor([0.0, 6.0])
    if prior is None:
        loc = pyro.param("loc", start, constraint=constraint)
    else:
        loc = pyro.sample("loc", prior.expand([2]).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", kind(loc[z], torch.ones(()) if scale is None else scale), obs=x)


# ---------------------------------------------------------------------------------------
# Replicates


def _sequences() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = torch.zeros(40, 12, dtype=torch.long)
        z[:, 0] = torch.rand(40) < 0.5
        for t in range(1, 12):
            z[:, t] = torch.where(torch.rand(40) < 0.2, 1 - z[:, t - 1], z[:, t - 1])
        return 5.0 * z + torch.randn(40, 12)


def _regressions() -> tuple[Tensor, Tensor]:
    u = torch.rand(120, generator=generator(), dtype=torch.float64)
    noise = 0.2 * torch.randn(120, generator=generator(1), dtype=torch.float64)
    features = torch.stack([torch.ones(120, dtype=torch.float64), u], 1)
    y = torch.where(torch.arange(120) < 50, 1 + 2 * u, 6 - 3 * u) + noise
    return features, y


def _answers() -> Tensor:
    probs = torch.tensor([[0.9, 0.8, 0.9, 0.85, 0.9], [0.1, 0.2, 0.1, 0.15, 0.2]])
    z = (torch.arange(150) >= 60).long()
    return torch.bernoulli(probs[z], generator=generator(2))


def _counts() -> Tensor:
    rate = torch.where(torch.arange(100) < 40, 3.0, 30.0)
    return torch.poisson(rate, generator=generator(3)).unsqueeze(-1)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], EM, bool]] = {
    "gaussian": (gaussian_mixture(2), (two_normals(90).unsqueeze(-1),), EM(), True),
    "priors": (with_priors, (two_normals(90),), EM(), True),
    "poisson": (poisson_mixture(2), (_counts(),), EM(), True),
    "latent class": (latent_class(2, [2] * 5), (_answers(),), EM(), True),
    "fixed": (normals, (two_normals(90),), EM(fixed=("scale",)), True),
    "held": (normals, (two_normals(90),), EM(fixed={"loc": [True, False]}), False),
    "trace": (normals, (two_normals(90),), EM(engine="trace"), False),
    "sequences": (hidden_markov(2), (_sequences().unsqueeze(-1),), EM(), False),
    "regressions": (mixture_of_regressions(2), _regressions(), EM(), False),
}


@pytest.mark.parametrize("case", CASES)
def test_replicates_are_fits_under_row_weights(case: str) -> None:
    """In a batch where that can be; one by one elsewhere."""
    model, data, solver, together = CASES[case]
    fit = solver.fit(model, *data)
    assert fit.converged
    assert EM().together(fit.problem) == together
    found = bootstrap(fit, 3, seed=5)
    assert (found.kept, found.ambiguous, found.failed, found.missing) == (3, 0, 0, 0), found
    assert found.message == ""
    for i, own in enumerate(weights_of(fit, 3, seed=5)):
        wanted = solver.fit(model, *data, init=fit, weights=own)
        assert float(found.log_joint[i]) == pytest.approx(wanted.log_joint, rel=1e-8)
        for name, value in found.params.items():
            torch.testing.assert_close(value[i], wanted.params[name], rtol=1e-8, atol=1e-8)
    assert set(found.params) == set(fit.problem.free)
    if case == "held":
        assert float(found.standard_errors["loc"][0]) == 0 < float(found.standard_errors["loc"][1])


def test_a_batch_is_one_by_one() -> None:
    fit = EM().fit(gaussian_mixture(2), two_normals(200).unsqueeze(-1))
    for method in ("weighted", "parametric"):
        own = [bootstrap(fit, 60, method=method, solver=how) for how in (EM(), OneByOne())]
        assert own[0].kept == own[1].kept == 60  # more than one batch
        for name, value in own[0].params.items():
            torch.testing.assert_close(value, own[1].params[name], rtol=1e-8, atol=1e-8)


def trials(n: Tensor, k: Tensor) -> None:
    """Successes of a known number of trials, another in each row."""
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    probs = pyro.param("probs", torch.tensor([0.2, 0.7]), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(k)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("k", dist.Binomial(n, probs[z]), obs=k)


def _trials() -> tuple[Tensor, Tensor]:
    n = torch.randint(5, 30, (100,), generator=generator(4)).double()
    probs = torch.where(torch.arange(100) < 40, 0.15, 0.75).double()
    return n, torch.binomial(n, probs, generator=generator(5))


def _plane() -> Tensor:
    x = torch.randn(120, 2, generator=generator(6), dtype=torch.float64)
    x[:, 1] += 0.5 * x[:, 0]
    x[50:] += 7.0
    return x


def _holes() -> Tensor:
    x = _plane()
    x[::7, 0], x[3::11, 1] = math.nan, math.nan
    return x


PARAMETRIC: dict[str, tuple[Callable[..., Any], tuple[Any, ...], EM, bool]] = {
    **CASES,
    "full": (gaussian_mixture(2), (_plane(),), EM(), True),
    "tied": (gaussian_mixture(2, "tied"), (_plane(),), EM(), True),
    "diagonal": (gaussian_mixture(2, "diagonal"), (_plane(),), EM(), True),
    "single precision": (gaussian_mixture(2), (_plane(),), EM(dtype=torch.float32), True),
    "missing cells": (gaussian_mixture(2, "diagonal"), (_holes(),), EM(), True),
    "missing in vectors": (gaussian_mixture(2), (_holes(),), EM(), False),
    "trials": (trials, _trials(), EM(), True),
    "items": (
        BY_NAME["latent_class_plates"].model,
        BY_NAME["latent_class_plates"].data,
        EM(),
        True,
    ),
    "groups": (BY_NAME["grouped_rows"].model, BY_NAME["grouped_rows"].data, EM(), True),
    "two": (
        BY_NAME["gaussian_and_poisson"].model,
        BY_NAME["gaussian_and_poisson"].data,
        EM(),
        True,
    ),
    "scaled by data": (scaled_by_data, (two_normals(90),), EM(), False),
    "prior by data": (prior_by_data, (two_normals(90),), EM(), False),
    "bound by data": (bound_by_data, (two_normals(90),), EM(), False),
    "masked by data": (masked_by_data, (two_normals(90),), EM(), False),
}


@pytest.mark.parametrize("case", PARAMETRIC)
def test_replicates_are_fits_to_drawn_data(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch where that can be; one by one elsewhere. Either way the program is the judge."""
    model, data, solver, together = PARAMETRIC[case]
    fit = solver.fit(model, *data)
    assert fit.converged
    read, one_by_one = list[int](), bootstrap.__globals__["_posed"]

    def again(*own: Any) -> Any:
        read.append(1)
        return one_by_one(*own)

    monkeypatch.setitem(bootstrap.__globals__, "_posed", again)
    found = bootstrap(fit, 3, method="parametric", seed=5)
    assert len(read) == (0 if together else 3)
    assert found.kept == 3, found.message
    seeds = torch.randint(2**31, (3,), generator=generator(5)).tolist()
    ends = []
    for own in seeds:
        args, kwargs = replicate(fit, places_of(fit.problem), own)
        ends.append(solver.fit(model, *args, init=fit, **kwargs))
    assert all(end.converged for end in ends)
    tolerance = 1e-8 if solver.dtype is torch.float64 else 1e-3
    for i, wanted in enumerate(ends):
        assert float(found.log_joint[i]) == pytest.approx(wanted.log_joint, rel=tolerance)
        own = match(wanted, fit)
        for name, value in found.params.items():
            torch.testing.assert_close(value[i], own[name], rtol=tolerance, atol=tolerance)


def test_drawn_data_in_batches_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is no larger than memory allows; what is found does not depend on it."""
    fit = EM().fit(gaussian_mixture(2), _plane())
    whole = bootstrap(fit, 7, method="parametric")
    anew, sizes = redrawn(fit.problem), list[int]()
    assert anew is not None
    monkeypatch.setitem(bootstrap.__globals__, "NUMBERS", 3 * anew.numbers)

    def seen(problem: Any, points: Any, *rest: Any, **kwargs: Any) -> Any:
        sizes.append(len(points))
        return iterate_together(problem, points, *rest, **kwargs)

    monkeypatch.setitem(bootstrap.__globals__, "iterate_together", seen)
    found = bootstrap(fit, 7, method="parametric")
    assert sizes == [3, 3, 1]
    close(found.params, whole.params)


def test_what_was_read_in_part_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large data is read on a sample of its rows, and kept in another way."""
    monkeypatch.setattr("pyroem.problem.LARGE", 60)
    monkeypatch.setattr("pyroem.problem.SAMPLE", 110)
    fit = EM().fit(normals, two_normals(120))
    assert fit.problem.smaller is not None
    assert redrawn(fit.problem) is None
    assert bootstrap(fit, 2, method="parametric").kept == 2


def test_a_wrong_draw_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that the program cannot have observed is an error, in a batch too."""
    fit = EM().fit(gaussian_mixture(2), _plane())

    def broken(*own: Any) -> Any:
        (x,), kwargs = replicate(*own)
        x[3, 1] = math.inf
        return (x,), kwargs

    monkeypatch.setitem(bootstrap.__globals__, "replicate", broken)
    with pytest.raises(DataError, match=r"finite data.* got inf at index \(3, 1\)"):
        bootstrap(fit, 2, method="parametric")


def test_one_normal_by_hand() -> None:
    """Weighted means and variances; under weights of the fit's own, too."""
    x = 3 * torch.randn(50, generator=generator(), dtype=torch.float64) + 10
    given = torch.randint(0, 3, (50,), generator=generator(1), dtype=torch.float64)
    for own in (None, given):
        fit = EM().fit(one_normal, x, weights=own)
        found = bootstrap(fit, 6, seed=2)
        shares = torch.ones_like(x) if own is None else own
        weights = dirichlet(shares, 6, np.random.default_rng(2))
        share = weights / weights.sum(1, keepdim=True)
        mean = share @ x
        spread = (share * (x - mean[:, None]) ** 2).sum(1).sqrt()
        torch.testing.assert_close(found.params["loc"], mean)
        torch.testing.assert_close(found.params["scale"], spread)
        # what the table says is by numpy
        values = mean.numpy()
        assert float(found.standard_errors["loc"]) == pytest.approx(values.std(ddof=1))
        assert float(found.bias["loc"]) == pytest.approx(values.mean() - float(fit.params["loc"]))
        low, high = found.intervals(0.8)["loc"]
        assert [float(low), float(high)] == pytest.approx(np.quantile(values, [0.1, 0.9]).tolist())
        both = np.cov(np.stack([values, spread.numpy()]))
        np.testing.assert_allclose(found.covariance, both, rtol=1e-10)


@pytest.mark.parametrize("method", ["weighted", "parametric"])
def test_standard_errors_are_near_those_of_the_information(method: str) -> None:
    """Many rows, clear components: 200 replicates know a standard error to 5 per cent."""
    fit = EM().fit(normals, two_normals())
    found, wanted = bootstrap(fit, 200, method=method, seed=1), fit.uncertainty()
    assert found.kept == 200
    assert found.labels == wanted.labels
    for name, value in wanted.standard_errors.items():
        torch.testing.assert_close(found.standard_errors[name], value, rtol=0.2, atol=0)
        for a, b in zip(found.intervals()[name], wanted.intervals()[name], strict=True):
            assert a.shape == b.shape
            assert bool(((a - b).abs() < 0.8 * value).all())
        assert bool((found.bias[name].abs() < 0.35 * value).all())


def test_drawn_data_keeps_what_is_missing_and_what_is_fixed() -> None:
    x = two_normals(80)
    x[::9] = math.nan
    fit = EM(fixed={"loc": [True, False]}).fit(normals, x)
    found = bootstrap(fit, 3, method="parametric")
    assert found.kept == 3
    assert bool((found.params["loc"][:, 0] == fit.params["loc"][0]).all())
    assert len(found.params["loc"][:, 1].unique()) == 3
    (drawn,), _ = replicate(fit, places_of(fit.problem), 0)
    assert torch.equal(drawn.isnan(), x.isnan())
    assert not bool((drawn == x).any())


def test_a_long_chain_is_drawn_anew() -> None:
    x = _sequences().reshape(-1, 1)
    fit = EM().fit(hidden_markov(2), x)
    with pytest.raises(ModelError, match="method='parametric'"):
        bootstrap(fit, 2)
    found = bootstrap(fit, 3, method="parametric")
    assert found.kept == 3
    assert bool((found.standard_errors["loc"] < 1).all())


def test_the_same_seed_gives_the_same() -> None:
    fit = EM().fit(normals, two_normals(90))
    for method in ("weighted", "parametric"):
        one, same, other = (bootstrap(fit, 4, method=method, seed=s) for s in (1, 1, 2))
        assert torch.equal(one.params["loc"], same.params["loc"])
        assert not torch.equal(one.params["loc"], other.params["loc"])
        longer = bootstrap(fit, 7, method=method, seed=1)
        torch.testing.assert_close(longer.log_joint[:4], one.log_joint)


def test_another_solver() -> None:
    fit = EM().fit(normals, two_normals(90))
    solver = MAP(tol=1e-12, param_tol=1e-8)
    one, other = bootstrap(fit, 2, solver=solver), bootstrap(fit, 2)
    torch.testing.assert_close(one.params["loc"], other.params["loc"], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------
# Which state is which


def test_states_are_paired() -> None:
    hard = torch.eye(3).double()[torch.tensor([0] * 50 + [1] * 40 + [2] * 3)]
    order, clear = paired(hard, hard[:, [2, 0, 1]])
    assert order.tolist() == [1, 2, 0]
    assert bool(clear.all())  # the few rows of the third state are its own all the same
    soft = torch.tensor([[0.55, 0.45], [0.5, 0.5], [0.42, 0.58]]).double()
    order, clear = paired(soft, soft.flip(1))
    assert order.tolist() == [1, 0]
    assert bool(clear.all())  # they overlap, but the two agree on how


def test_pairings_that_could_as_well_be_others() -> None:
    eye = torch.eye(3).double()
    a = eye[torch.tensor([0] * 20 + [1] * 20 + [2] * 20)]
    # one state of the fit is split, the other two are one
    split = eye[torch.tensor([0] * 10 + [1] * 10 + [2] * 40)]
    order, clear = paired(a, split)
    assert clear.tolist() == [False, False, False]
    # each state is half of one and half of the next: turned round it fits as well
    turned = eye[torch.tensor(([0] * 10 + [1] * 10) + ([1] * 10 + [2] * 10) + [2] * 10 + [0] * 10)]
    assert not bool(paired(a, turned)[1].any())
    # only two of them are in question
    order, clear = paired(a, eye[torch.tensor(([0] * 10 + [1] * 10) * 2 + [2] * 20)])
    assert clear.tolist() == [False, False, True]
    assert int(order[2]) == 2
    # states that are the same, or that are not numbers
    even = torch.full((60, 3), 1 / 3).double()
    assert not bool(paired(a, even)[1].any())
    assert not bool(paired(a, even * math.nan)[1].any())


def test_ambiguous_replicates_are_left_out() -> None:
    """Components that overlap: in some replicates they cut the rows another way."""
    x = two_normals(120, gap=1.2, seed=3)
    fit = EM(max_iter=20_000, tol=1e-10).fit(normals, x)
    found = bootstrap(fit, 30, solver=EM(max_iter=20_000))
    assert found.ambiguous > 0
    assert found.kept + found.ambiguous + found.failed == 30
    assert f"{found.ambiguous} of 30 replicates left out: it is ambiguous" in found.message
    # those that count agree with the fit on which is which, by the formula of the posterior
    own = contrast(x, {n: v[None] for n, v in fit.params.items()})[0]
    others = contrast(x, found.params)
    assert bool((others @ own >= 0.2 * others.norm(dim=1) * own.norm()).all())


def contrast(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """``p(z = 0 | x) - p(z = 1 | x)``: replicates by rows."""
    own = {n: v.unsqueeze(1) for n, v in params.items()}
    joint = own["weights"].log() + dist.Normal(own["loc"], own["scale"]).log_prob(x[:, None])
    first, second = joint.softmax(-1).unbind(-1)
    return first - second


def test_states_that_are_alike_have_no_standard_errors() -> None:
    x = two_normals(80, gap=0.0)
    params = {"weights": torch.ones(2) / 2, "loc": torch.ones(2), "scale": torch.ones(2)}
    fit = EM().fit(normals, x, init=params)
    assert not fit.converged
    found = bootstrap(fit, 4)
    assert found.refused
    assert found.kept == 0
    assert "The fit itself ended as symmetric." in found.message
    assert "Too few are left" in found.message
    assert all(bool(v.isnan().all()) for v in found.standard_errors.values())
    assert all(bool(low.isnan().all()) for low, _ in found.intervals().values())
    assert bool(found.covariance.isnan().all())
    assert "nan" in str(found)


def test_replicates_that_did_not_converge_are_left_out() -> None:
    fit = EM().fit(normals, two_normals(90, gap=3.0))
    found = bootstrap(fit, 4, solver=EM(max_iter=1))
    assert (found.kept, found.failed) == (0, 4)
    assert "4 of 4 replicates left out: they did not converge (4 max iter)." in found.message
    assert found.refused


def test_collapsed_replicates_are_left_out() -> None:
    """Two rows of a component: under some weights it is one row, whose variance runs to zero."""
    x = torch.cat([two_normals(40, gap=0.0), torch.tensor([30.0, 31.0]).double()])
    fit = EM(floor=1e-3).fit(normals, x)
    assert fit.converged
    found = bootstrap(fit, 40)
    assert 0 < found.failed < 20
    assert f"({found.failed} degenerate)" in found.message
    assert found.kept == 40 - found.failed
    assert bool((found.params["scale"][:, 1] > 0.02).all())


def test_logits_are_compared_up_to_a_constant() -> None:
    """Of parameters of which only differences count, these are what scatters."""
    known = BY_NAME["categorical_logits"]
    fit = EM().fit(known.model, *known.data)
    (name,) = (n for n in fit.params if n != "weights")
    found = bootstrap(fit, 4)
    total = found.params[name].logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        found.estimates[name].logsumexp(-1), torch.zeros_like(total[0]), rtol=0, atol=1e-9
    )


# ---------------------------------------------------------------------------------------
# The comparison says so, too


def test_a_comparison_says_what_is_ambiguous() -> None:
    x = two_normals(90)
    good = EM().fit(normals, x)
    alike = {"weights": torch.ones(2) / 2, "loc": torch.ones(2), "scale": torch.ones(2)}
    bad = EM().fit(normals, x, init=alike)
    swapped = EM().fit(normals, x, init={n: v.flip(0) for n, v in good.params.items()})
    assert parameter_difference(swapped, good) < 1e-6
    torch.testing.assert_close(match(swapped, good)["loc"], good.params["loc"], rtol=1e-4, atol=0)
    assert math.isnan(parameter_difference(bad, good))
    table = compare(normals, x, init=alike, solvers={"EM": EM(), "again": EM(max_iter=1)})
    (row,) = (row for row in table.rows if row.name != table.best)
    assert math.isnan(row.parameter_difference)
    assert "ambiguous" in str(table)
    rows = {row["name"]: row for row in json.loads(table.to_json())["rows"]}
    assert rows[row.name]["parameter_difference"] is None
    study = compare(normals, x, init=alike, seeds=2, solvers={"EM": EM(), "again": EM(max_iter=1)})
    assert sum(own.ambiguous for own in study.rows) == 3  # all but the best of all itself
    assert "ambiguous" in str(study)
    none = next(own for own in study.rows if own.ambiguous == 2)
    found = {own["name"]: own for own in json.loads(study.to_json())["rows"]}
    assert found[none.name]["parameter_difference"] == [None, None, None]


# ---------------------------------------------------------------------------------------
# What is told


def test_the_table() -> None:
    fit = EM().fit(normals, two_normals(90))
    found = bootstrap(fit, 5)
    head, columns, *lines = str(found).splitlines()
    assert head == "Weighted bootstrap, 5 replicates"
    assert columns.split("  ")[-1].strip() == "95% high"
    assert [line.split()[0] for line in lines] == list(found.labels)
    assert len({len(line) for line in (columns, *lines)}) == 1
    values = found.to_dict(0.9)
    assert values["elements"]["loc[1]"]["low"] == float(found.intervals(0.9)["loc"][0][1])
    assert values["elements"]["loc[1]"]["bias"] == float(found.bias["loc"][1])
    assert json.loads(json.dumps(values)) == values
    assert (values["kept"], values["missing"], values["message"]) == (5, 0, "")
    with pytest.raises(SettingError, match="level"):
        found.intervals(1.0)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroem.progress.SELDOM", 0.0)
    monkeypatch.setattr("pyroem.progress.OFTEN", 0.0)
    fit = EM().fit(normals, two_normals(90, gap=3.0))
    bootstrap(fit, 2)
    assert capsys.readouterr().err == ""
    bootstrap(fit, 2, progress=True)
    assert "bootstrap, replicates 1 to 2 of 2: iteration" in capsys.readouterr().err
    bootstrap(fit, 2, method="parametric", progress=True)
    assert "bootstrap, replicates 1 to 2 of 2: iteration" in capsys.readouterr().err
    bootstrap(fit, 2, method="parametric", solver=OneByOne(), progress=True)
    assert "bootstrap: replicate 2 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["weighted", "parametric"])
def test_an_interrupt_returns_the_replicates_so_far(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = EM().fit(normals, two_normals(90))
    whole = bootstrap(fit, 6, method=method, solver=OneByOne())
    solve, calls = OneByOne.solve, []

    def third(self: Any, *args: Any) -> Fit:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, *args)

    monkeypatch.setattr(OneByOne, "solve", third)
    found = bootstrap(fit, 6, method=method, solver=OneByOne())
    assert (found.kept, found.missing) == (2, 4)
    assert found.message == "Interrupted: 4 replicates were not made."
    torch.testing.assert_close(found.params["loc"], whole.params["loc"][:2])


@pytest.mark.parametrize("method", ["weighted", "parametric"])
def test_an_interrupted_batch_does_not_count(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = EM().fit(normals, two_normals(90, gap=3.0))
    monkeypatch.setitem(bootstrap.__globals__, "MOST", 3)
    steps = []

    def pause() -> None:
        steps.append(1)
        if len(steps) == limit:
            raise KeyboardInterrupt

    limit = 10**9
    monkeypatch.setattr("pyroem.together.pause_point", pause)
    bootstrap(fit, 3, method=method)
    limit = len(steps) + 2  # in the second batch
    steps.clear()
    found = bootstrap(fit, 9, method=method)
    assert (found.kept, found.missing) == (3, 6)
    assert "Interrupted: 6 replicates were not made." in found.message


def test_errors() -> None:
    x = two_normals(90)
    fit = EM().fit(normals, x)
    for wrong in ({"replicates": 1}, {"replicates": True}, {"seed": -1}, {"seed": 0.5}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            bootstrap(fit, **wrong)
    with pytest.raises(SettingError, match=r"method: expected one of weighted, parametric"):
        bootstrap(fit, method="residual")
    with pytest.raises(SettingError, match=r"solver: expected one such as EM\(\), got str"):
        bootstrap(fit, solver="EM")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="expected a Fit, got function"):
        bootstrap(normals)  # type: ignore[arg-type]
    weighted = EM().fit(normals, x, weights=torch.rand(len(x), generator=generator()))
    with pytest.raises(ModelError, match="row weights"):
        bootstrap(weighted, method="parametric")
    nothing = EM(fixed=("weights", "loc", "scale")).fit(normals, x)
    with pytest.raises(ModelError, match="every parameter is fixed"):
        bootstrap(nothing)
    streamed = EM().fit(normals, blocks(lambda: iter(x.split(30))))
    with pytest.raises(ModelError, match="bootstrap: data in blocks"):
        bootstrap(streamed)


def test_observations_that_are_computed_cannot_be_drawn() -> None:
    def logarithms(x: Tensor) -> None:
        normals(x.log())

    fit = EM().fit(logarithms, two_normals(90).exp())
    with pytest.raises(SettingError, match="bootstrap: expected every observation to be a part"):
        bootstrap(fit, 2, method="parametric")
    assert isinstance(bootstrap(fit, 2), Bootstrap)
