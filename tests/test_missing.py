"""Missing values: NaN in an observation, in the user's own programs and in the ready-made ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, MAP, DataError, Fit, ModelError, SettingError, blocks, datasets
from pyroem.models import box_sides, gaussian_mixture_with_noise, mixture_of_regressions
from pyroem.models.gaussian import gaussian_mixture
from pyroem.problem import pose

NAN = float("nan")


def with_holes(x: Tensor, share: float = 0.15, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(x.shape, generator=generator) < share, NAN, x)


def three_groups(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(3, (rows,), generator=generator)
    loc = 4 * torch.randn(3, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return loc[z] + torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix


# ---------------------------------------------------------------------------------------
# One normal: the classical EM


def observed_log_likelihood(x: Tensor, loc: Tensor, cov: Tensor) -> float:
    """Row by row, from the elements that are seen."""
    total = 0.0
    for row in x:
        o = (~row.isnan()).nonzero().reshape(-1)
        if len(o):
            part = dist.MultivariateNormal(loc[o], cov[o][:, o])
            total += float(part.log_prob(row[o]))
    return total


@pytest.mark.parametrize("engine", ["kernel", "trace"])
def test_one_normal_is_at_the_maximum_of_the_observed_likelihood(engine: str) -> None:
    x = with_holes(three_groups(80, 3), 0.25)
    x[5] = NAN  # nothing seen at all
    fit = EM(tol=1e-12, engine=engine).fit(gaussian_mixture(1), x)
    loc, cov = fit.params["loc"][0], fit.params["covariance"][0]
    assert fit.log_likelihood == pytest.approx(observed_log_likelihood(x, loc, cov), abs=1e-9)
    tril = torch.linalg.cholesky(cov)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        step = 1e-3 * torch.randn(3, generator=generator, dtype=torch.float64)
        turn = 1e-3 * torch.randn(3, 3, generator=generator, dtype=torch.float64).tril()
        near = tril + turn
        moved = observed_log_likelihood(x, loc + step, near @ near.mT)
        assert moved <= fit.log_likelihood
    assert "Missing:" in fit.explain() and "values of 'x' (NaN)" in fit.explain()


def test_airquality() -> None:
    """The reference maximised the observed likelihood directly, by another program."""
    _, x = datasets.load("airquality", ["Ozone", "Solar.R", "Wind", "Temp"])
    fit = EM(tol=1e-13, param_tol=1e-9).fit(gaussian_mixture(1), x)
    assert fit.converged
    assert fit.log_likelihood == pytest.approx(-2326.6973827983365, abs=1e-7)
    mean = [41.871173019597926, 184.846806249845, 9.957516339869281, 77.88235294117646]
    assert fit.params["loc"][0].tolist() == pytest.approx(mean, rel=1e-6)
    first = [1044.0186430644785, 942.5298418132426, -64.63592769369905, 209.56350282618126]
    assert fit.params["covariance"][0, 0].tolist() == pytest.approx(first, rel=1e-6)
    assert fit.problem.df == 14
    assert "Missing: 44 of the 612 values of 'x' (NaN)" in fit.explain()


def test_one_iteration_is_that_of_the_textbook() -> None:
    """Little and Rubin (2002), section 11.2: conditional means, and the covariance's correction."""
    x = with_holes(three_groups(40, 3), 0.3, seed=1)
    loc = torch.tensor([0.5, -1.0, 0.2]).double()
    mix = torch.tensor([[2.0, 0.0, 0.0], [0.7, 1.5, 0.0], [-0.4, 0.3, 1.1]]).double()
    cov = mix @ mix.mT
    first, second = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for row in x:
        seen = ~row.isnan()
        o, m = seen.nonzero().reshape(-1), (~seen).nonzero().reshape(-1)
        filled, rest = row.clone(), torch.zeros(3, 3).double()
        gain = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
        filled[m] = loc[m] + gain @ (row[o] - loc[o])
        rest[m[:, None], m] = cov[m][:, m] - gain @ cov[o][:, m]
        first += filled
        second += torch.outer(filled, filled) + rest
    mean = first / len(x)
    start = {"weights": [1.0], "loc": loc.reshape(1, 3), "covariance": cov.reshape(1, 3, 3)}
    fit = EM(max_iter=1).fit(gaussian_mixture(1), x, init=start)
    torch.testing.assert_close(fit.params["loc"][0], mean, rtol=1e-10, atol=1e-10)
    expected = second / len(x) - torch.outer(mean, mean)
    torch.testing.assert_close(fit.params["covariance"][0], expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------
# Mixtures


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical", "VEV", "EVI"])
def test_em_and_map_meet(covariance: str) -> None:
    x = with_holes(three_groups(80, 2))
    em = EM(tol=1e-11).fit(gaussian_mixture(2, covariance), x)
    gradient = MAP().fit(gaussian_mixture(2, covariance), x, init=em.params)
    assert em.converged
    assert gradient.log_joint == pytest.approx(em.log_joint, abs=1e-5)


def test_kernel_and_trace_give_the_same_rows() -> None:
    x = with_holes(three_groups(200, 3))
    program = gaussian_mixture(3)
    fit = EM().fit(program, x)
    assert "mixture kernel" in fit.explain()
    fixed = EM(engine="trace", fixed=("weights", "loc", "covariance"), max_iter=1)
    again = fixed.fit(program, x, init=fit.params)
    assert again.log_likelihood == pytest.approx(fit.log_likelihood, abs=1e-8)
    for own, other in (
        (fit.responsibilities(), again.responsibilities()),
        (fit.log_prob(), again.log_prob()),
        (fit.responsibilities(x[:9]), again.responsibilities()[:9]),
        (fit.log_prob(x[:9]), again.log_prob()[:9]),
    ):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    assert torch.equal(fit.predict(), again.predict())
    assert fit.icl() - fit.bic() == pytest.approx(again.icl() - again.bic())


def test_rows_weigh_as_often_as_they_stand() -> None:
    x = with_holes(three_groups(120, 3))
    weights = torch.ones(120)
    weights[:30], weights[30:40] = 2.0, 0.0
    program, start = gaussian_mixture(2), EM(max_iter=2).fit(gaussian_mixture(2), x)
    a = EM(max_iter=5).fit(program, x, weights=weights, init=start)
    b = EM(max_iter=5).fit(program, torch.cat([x[:30], x[:30], x[40:]]), init=start)
    for name in a.params:
        torch.testing.assert_close(a.params[name], b.params[name], rtol=1e-9, atol=1e-9)


def test_blocks_and_large_data_are_the_same_fit() -> None:
    x = with_holes(three_groups(20_000, 2), 0.1)
    x[:, 1] = torch.where(torch.arange(20_000) == 11_111, NAN, three_groups(20_000, 2)[:, 1])
    start = EM(max_iter=3).fit(gaussian_mixture(3), x[:500])
    whole = EM(max_iter=4).fit(gaussian_mixture(3), x, init=start.params)
    parts = EM(max_iter=4).fit(gaussian_mixture(3), blocks(x.numpy()), init=start.params)
    assert whole.problem.smaller is not None  # read on a sample
    # The second column's only hole is beyond the rows that blocks are read on.
    assert parts.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-9)


def test_a_hole_that_the_sample_did_not_have() -> None:
    x = three_groups(30_000, 2)
    x[29_000, 0] = NAN
    fit = EM(max_iter=2).fit(gaussian_mixture(2), x)
    assert "Missing: 1 of" in fit.explain()
    with pytest.raises(DataError, match=r"Block .*missing values at site 'x'.*the sample had none"):
        EM(max_iter=2).fit(gaussian_mixture(2), blocks(x.numpy()))


def test_new_rows_with_and_without_holes() -> None:
    complete, holes = three_groups(300, 2), with_holes(three_groups(300, 2, seed=1))
    for seen in (complete, holes):
        fit = EM().fit(gaussian_mixture(2), seen)
        for new in (complete, holes):
            own = EM(fixed=tuple(fit.params), max_iter=1).fit(
                gaussian_mixture(2), new, init=fit.params
            )
            assert float(fit.log_prob(new).sum()) == pytest.approx(own.log_likelihood, abs=1e-8)
            assert fit.predict(new).shape == (300,)


# ---------------------------------------------------------------------------------------
# Programs of the user's own


def weights_of(k: int) -> Tensor:
    return pyro.param("weights", torch.ones(k) / k, constraint=constraints.simplex)


def positive(name: str, shape: tuple[int, ...]) -> Tensor:
    return pyro.param(name, lambda: 0.5 + torch.rand(shape), constraint=constraints.positive)


def poissons(hide: Callable[[Any, Tensor], Any], x: Tensor) -> None:
    weights, rate = weights_of(2), positive("rate", (2, x.shape[1]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        fn, value = hide(dist.Poisson(rate[z]), x)
        pyro.sample("x", fn.to_event(1), obs=value)


def gammas(hide: Callable[[Any, Tensor], Any], x: Tensor) -> None:
    weights, shape, rate = weights_of(2), positive("shape", (2, 2)), positive("rate", (2, 2))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        fn, value = hide(dist.Gamma(shape[z], rate[z]), x)
        pyro.sample("x", fn.to_event(1), obs=value)


def categories(hide: Callable[[Any, Tensor], Any], x: Tensor) -> None:
    weights = weights_of(2)
    probs = pyro.param(
        "probs",
        lambda: dist.Dirichlet(torch.ones(2, x.shape[1], 3)).sample(),
        constraint=constraints.simplex,
    )
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        for j in range(x.shape[1]):
            fn, value = hide(dist.Categorical(probs[z, j]), x[:, j])
            pyro.sample(f"x_{j}", fn, obs=value)


def regressions(hide: Callable[[Any, Tensor], Any], x: Tensor) -> None:
    """The response is missing in some rows; the first column is a covariate."""
    weights, scale = weights_of(2), positive("scale", (2,))
    beta = pyro.param("beta", lambda: torch.randn(2, 2))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        mean = beta[z, 0] + beta[z, 1] * x[:, 0]
        fn, value = hide(dist.Normal(mean, scale[z]), x[:, 1])
        pyro.sample("y", fn, obs=value)


def plain(fn: Any, value: Tensor) -> Any:
    return fn, value


def masked(fn: Any, value: Tensor) -> Any:
    seen = ~value.isnan()
    return fn.mask(seen), torch.where(seen, value, 1.0)


def counts(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rate = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, 2.0, 9.0)
    return torch.poisson(rate.expand(rows, 3), generator=generator).double()


USERS = {
    "poissons": (poissons, with_holes(counts(100))),
    "gammas": (gammas, with_holes(counts(100)[:, :2] + 0.5)),
    "categories": (categories, with_holes(counts(100) % 3)),
    "regressions": (
        regressions,
        torch.cat([three_groups(90, 1), with_holes(three_groups(90, 1, seed=4))], 1),
    ),
}


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("engine", ["auto", "trace"])
def test_a_missing_cell_is_a_masked_one(name: str, engine: str) -> None:
    program, x = USERS[name]
    missing = EM(engine=engine, max_iter=25).fit(
        lambda x: program(plain, x), x, init="random", seed=1
    )
    by_hand = EM(engine=engine, max_iter=25).fit(
        lambda x: program(masked, x), x, init=missing.params
    )
    first = EM(engine=engine, max_iter=25).fit(lambda x: program(plain, x), x, init=missing.params)
    assert first.log_joint == pytest.approx(by_hand.log_joint, abs=1e-8)
    for key in first.params:
        torch.testing.assert_close(first.params[key], by_hand.params[key], rtol=1e-7, atol=1e-9)
    start = EM(max_iter=3).fit(lambda x: program(plain, x), x)
    assert np.isfinite(start.log_joint)


def students(x: Tensor) -> None:
    weights, df = weights_of(2), positive("df", (2,))
    loc = pyro.param("loc", lambda: torch.randn(2, 3))
    eye = torch.eye(3).repeat(2, 1, 1)
    tril = pyro.param("tril", eye, constraint=constraints.lower_cholesky)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateStudentT(df[z], loc[z], tril[z]), obs=x)


def test_students_t_with_missing_elements() -> None:
    """The margin of some elements is a Student's t with the same degrees of freedom."""
    x = with_holes(three_groups(60, 3))
    fit = EM(max_iter=15).fit(students, x, init="kmeans")
    history = [record.log_joint for record in fit.history]
    assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(history))
    total = torch.zeros(()).double()
    for row in x:
        o = (~row.isnan()).nonzero().reshape(-1)
        if not len(o):
            continue
        parts = []
        for k in range(2):
            cov = fit.params["tril"][k] @ fit.params["tril"][k].mT
            tril = torch.linalg.cholesky(cov[o][:, o])
            part = dist.MultivariateStudentT(fit.params["df"][k], fit.params["loc"][k][o], tril)
            parts.append(fit.params["weights"][k].log() + part.log_prob(row[o]))
        total = total + torch.logsumexp(torch.stack(parts), 0)
    assert fit.log_likelihood == pytest.approx(float(total), abs=1e-8)


def factor_analysers(x: Tensor) -> None:
    weights = weights_of(2)
    loc = pyro.param("loc", lambda: torch.randn(2, 4))
    factor = pyro.param("factor", lambda: torch.randn(2, 4, 1))
    noise = positive("noise", (4,))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.LowRankMultivariateNormal(loc[z], factor[z], noise), obs=x)


def test_factor_analysers_with_missing_elements() -> None:
    x = with_holes(three_groups(60, 4))
    fit = EM(max_iter=5).fit(factor_analysers, x, init="kmeans")
    history = [record.log_joint for record in fit.history]
    assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(history))
    factor = fit.params["factor"]
    cov = factor @ factor.mT + torch.diag(fit.params["noise"])
    total = torch.stack(
        [
            fit.params["weights"][k].log()
            + torch.tensor(
                [observed_log_likelihood(row[None], fit.params["loc"][k], cov[k]) for row in x],
                dtype=torch.float64,
            )
            for k in range(2)
        ]
    )
    assert fit.log_likelihood == pytest.approx(float(total.logsumexp(0).sum()), abs=1e-8)


def chain(x: Tensor) -> None:
    """A hidden Markov model whose emissions are vectors."""
    start = pyro.param("start", torch.ones(2) / 2, constraint=constraints.simplex)
    table = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    transition = pyro.param("transition", table, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([[-1.0, 0.0], [1.0, 1.0]]))
    cov = pyro.param("cov", torch.eye(2).repeat(2, 1, 1), constraint=constraints.positive_definite)
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else transition[z]))
            pyro.sample(f"x_{t}", dist.MultivariateNormal(loc[z], cov[z]), obs=x[:, t])


def unrolled_by_hand(x: Tensor, params: dict[str, Tensor]) -> float:
    """The forward recursion with each step's margin."""
    total = 0.0
    for sequence in x:
        log_alpha = params["start"].log()
        for t, row in enumerate(sequence):
            o = (~row.isnan()).nonzero().reshape(-1)
            if t:
                log_alpha = torch.logsumexp(log_alpha[:, None] + params["transition"].log(), 0)
            if len(o):
                parts = [
                    dist.MultivariateNormal(
                        params["loc"][k][o], params["cov"][k][o][:, o]
                    ).log_prob(row[o])
                    for k in range(2)
                ]
                log_alpha = log_alpha + torch.stack(parts)
        total += float(torch.logsumexp(log_alpha, 0))
    return total


@pytest.mark.parametrize("holes_at_the_first_step", [True, False])
def test_sequences_with_missing_elements(holes_at_the_first_step: bool) -> None:
    x = with_holes(three_groups(5 * 40, 2).reshape(5, 40, 2))
    if not holes_at_the_first_step:
        x[:, 0] = 0.3
    x[2, 7] = NAN
    fit = EM(max_iter=30).fit(chain, x)
    assert fit.log_likelihood == pytest.approx(unrolled_by_hand(x, fit.params), abs=1e-8)
    history = [record.log_joint for record in fit.history]
    assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(history))
    assert fit.predict().shape == (5, 40)
    assert fit.problem.structure.chains
    short = x[:2, :11]
    value = float(fit.log_prob(short).sum())
    assert value == pytest.approx(unrolled_by_hand(short, fit.params), abs=1e-8)


def test_a_mask_beside_missing_values() -> None:
    """Where the program masks a row, what is missing in it does not matter."""
    x = with_holes(three_groups(100, 2))
    keep = torch.arange(100) < 80

    def model(x: Tensor) -> None:
        with poutine.mask(mask=keep[: len(x)]):
            gaussian_mixture(2)(x)

    def cut(x: Tensor) -> None:
        gaussian_mixture(2)(x)

    start = EM(max_iter=3).fit(cut, x[:80])
    solver = EM(tol=1e-14, param_tol=1e-9, max_iter=5000)
    a = solver.fit(model, x, init=start.params)
    b = solver.fit(cut, x[:80], init=start.params)
    assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-6)
    torch.testing.assert_close(a.params["loc"], b.params["loc"], rtol=1e-5, atol=1e-5)


def test_saving_and_loading(tmp_path: Any) -> None:
    x = with_holes(three_groups(60, 2))
    fit = EM(max_iter=5).fit(gaussian_mixture(2), x)
    fit.save(tmp_path / "fit.pt")
    back = Fit.load(tmp_path / "fit.pt", gaussian_mixture(2), x)
    assert back.log_likelihood == pytest.approx(fit.log_likelihood)
    torch.testing.assert_close(back.responsibilities(), fit.responsibilities())


# ---------------------------------------------------------------------------------------
# What cannot be


def test_nothing_seen() -> None:
    x = three_groups(20, 2)
    with pytest.raises(DataError, match="every value is missing"):
        EM().fit(gaussian_mixture(2, "diagonal"), torch.full_like(x, NAN))
    x[:, 1] = NAN
    with pytest.raises(DataError, match="Site 'x': every value of column 1 is missing"):
        EM().fit(gaussian_mixture(2), x)


def test_an_event_that_is_missing_in_part() -> None:
    def model(x: Tensor) -> None:
        concentration = positive("concentration", (2, 3))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights_of(2)))
            pyro.sample("x", dist.Dirichlet(concentration[z]), obs=x)

    x = dist.Dirichlet(torch.ones(30, 3).double()).sample()
    x[4] = NAN
    fit = EM(max_iter=3).fit(model, x)
    assert "Missing: 3 of the 90 values" in fit.explain()
    x[7, 1] = NAN
    with pytest.raises(DataError, match=r"Dirichlet at index .7,. is missing in part"):
        EM().fit(model, x)


def test_infinity_is_not_missing() -> None:
    x = three_groups(20, 2)
    x[3, 1] = float("inf")
    with pytest.raises(DataError, match=r"finite data, or NaN for a missing value, got inf at"):
        EM().fit(gaussian_mixture(2), x)


def test_a_missing_covariate_is_an_error() -> None:
    program, x = USERS["regressions"]
    x = x.clone()
    x[int((~x[:, 1].isnan()).nonzero()[0]), 0] = NAN
    with pytest.raises(DataError, match="covariate"):
        EM().fit(lambda x: program(plain, x), x)


def test_the_rows_of_a_sample_count_what_is_missing() -> None:
    x = with_holes(three_groups(40, 2))
    missing = (pose(gaussian_mixture(2), (x,), {}).structure.program.missing or {})["x"]
    assert missing.cells == int(x.isnan().sum()) and missing.total == 80


# ---------------------------------------------------------------------------------------
# Imputation


def by_hand(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Conditional means of a mixture of normals, row by row."""
    filled = x.clone()
    for n, row in enumerate(x):
        o, m = (~row.isnan()).nonzero().reshape(-1), row.isnan().nonzero().reshape(-1)
        logs, means = [], []
        for w, loc, cov in zip(params["weights"], params["loc"], params["covariance"], strict=True):
            part = dist.MultivariateNormal(loc[o], cov[o][:, o])
            logs.append(w.log() + (part.log_prob(row[o]) if len(o) else 0.0))
            gain = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
            means.append(loc[m] + gain @ (row[o] - loc[o]))
        filled[n, m] = torch.stack(logs).softmax(0) @ torch.stack(means)
    return filled


def test_imputed_means_are_those_by_hand() -> None:
    x = with_holes(three_groups(60, 3), 0.3)
    x[7] = NAN
    fit = EM(max_iter=20).fit(gaussian_mixture(2), x)
    torch.testing.assert_close(fit.impute(), by_hand(x, fit.params), rtol=1e-9, atol=1e-9)
    new = with_holes(three_groups(15, 3, seed=5), 0.3)
    torch.testing.assert_close(fit.impute(new), by_hand(new, fit.params), rtol=1e-9, atol=1e-9)
    assert fit.impute(new).shape == new.shape


def test_draws_have_the_conditional_mean_and_spread() -> None:
    x = with_holes(three_groups(30, 3), 0.3)
    fit = EM(max_iter=20).fit(gaussian_mixture(1), x)
    drawn = fit.impute(draws=1000, seed=1)
    gone = x.isnan()
    assert drawn.shape == (1000, 30, 3)
    assert torch.equal(drawn[17][~gone], x[~gone])
    mean, cov = fit.impute(), fit.params["covariance"][0]
    errors = (drawn.mean(0) - mean)[gone] / (cov.diagonal().sqrt().expand(30, 3)[gone] / 1000**0.5)
    assert float(errors.abs().max()) < 5
    for row in range(30):
        o, m = (~gone[row]).nonzero().reshape(-1), gone[row].nonzero().reshape(-1)
        if not len(m):
            continue
        rest = cov[m][:, m] - cov[m][:, o] @ torch.linalg.inv(cov[o][:, o]) @ cov[o][:, m]
        found = drawn[:, row][:, m].var(0)
        torch.testing.assert_close(found, rest.diagonal(), rtol=0.3, atol=0)
    again = fit.impute(draws=3, seed=1)
    assert torch.equal(again, fit.impute(draws=3, seed=1))


def test_draws_come_from_one_component_each() -> None:
    """Two columns that are far apart in pairs: draws never mix the groups."""
    generator = torch.Generator().manual_seed(0)
    z = torch.arange(200) % 2
    x = (20.0 * z.unsqueeze(1) + torch.randn(200, 3, generator=generator)).double()
    x[:50, :2] = NAN
    fit = EM().fit(gaussian_mixture(2, "diagonal"), x)
    x[0] = NAN
    drawn = fit.impute(x, draws=200)[:, 0]
    low = drawn < 10
    assert (low.all(1) | (~low).all(1)).all()
    assert 60 < int(low[:, 0].sum()) < 140


def test_imputation_of_several_kinds() -> None:
    x = with_holes(counts(80) % 3, 0.2)
    fit = EM(max_iter=20).fit(lambda x: categories(plain, x), x)
    filled = fit.impute()
    probs, r = fit.params["probs"], fit.responsibilities()
    for j in range(3):
        gone = x[:, j].isnan()
        best = (r @ probs[:, j]).argmax(1)
        assert torch.equal(filled[f"x_{j}"][gone], best[gone].double())
        assert torch.equal(filled[f"x_{j}"][~gone], x[:, j][~gone])
    drawn = fit.impute(draws=5)["x_0"]
    assert drawn.shape == (5, 80) and set(drawn.unique().tolist()) <= {0.0, 1.0, 2.0}
    y = with_holes(counts(80))
    rates = EM(max_iter=20).fit(lambda x: poissons(plain, x), y)
    expected = rates.responsibilities() @ rates.params["rate"]
    gone = y.isnan()
    torch.testing.assert_close(rates.impute()[gone], expected[gone])


def test_imputation_in_sequences() -> None:
    x = with_holes(three_groups(4 * 30, 2).reshape(4, 30, 2))
    x[:, 0] = torch.where(x[:, 0].isnan(), 0.3, x[:, 0])
    fit = EM(max_iter=20).fit(chain, x)
    filled = fit.impute()
    assert filled.shape == x.shape
    assert torch.equal(filled[~x.isnan()], x[~x.isnan()])
    r, loc, cov = fit.responsibilities(), fit.params["loc"], fit.params["cov"]
    for s, t in (x.isnan().sum(-1) == 1).nonzero().tolist()[:10]:
        m = int(x[s, t].isnan().nonzero())
        o = 1 - m
        means = loc[:, m] + cov[:, m, o] / cov[:, o, o] * (x[s, t, o] - loc[:, o])
        assert float(filled[s, t, m]) == pytest.approx(float(r[s, t] @ means))
    with pytest.raises(ModelError, match="no draws for a chain"):
        fit.impute(draws=2)


def test_nothing_to_impute() -> None:
    fit = EM(max_iter=2).fit(gaussian_mixture(2), three_groups(50, 2))
    with pytest.raises(ModelError, match="no value is missing"):
        fit.impute()
    with pytest.raises(SettingError, match="draws must be a positive integer"):
        fit.impute(draws=0)


# ---------------------------------------------------------------------------------------
# Where the data lie does not matter


@pytest.mark.parametrize("covariance", ["EEE", "VVV"])
def test_data_far_from_zero(covariance: str) -> None:
    """The optimum of data with holes is that of the same data around zero, from any start."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, 400)
    x = np.array([[2000.0, 300.0], [2020.0, 310.0]])[z] + rng.normal(size=(400, 2))
    x[rng.random(x.shape) < 0.2] = NAN
    wanted = EM().fit(gaussian_mixture(2, covariance), x - np.nanmean(x, 0)).log_likelihood
    assert wanted > -1140
    for init in ("auto", "kmeans", {"z": z}):
        fit = EM().fit(gaussian_mixture(2, covariance), x, init=init)
        assert fit.converged
        assert fit.log_likelihood == pytest.approx(wanted, abs=1e-3)


def test_columns_of_unlike_scales() -> None:
    x = with_holes(three_groups(200, 3), 0.2)
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    fit = EM().fit(gaussian_mixture(3), x * scales + 1e5 * scales)
    shift = float((scales.log() * (~x.isnan()).sum(0)).sum())
    wanted = EM().fit(gaussian_mixture(3), x).log_likelihood
    assert fit.log_likelihood + shift == pytest.approx(wanted, abs=1e-2)


def test_masked_arrays() -> None:
    """What numpy masks is missing."""
    x = three_groups(120, 2).numpy()
    holes = np.random.default_rng(0).random(x.shape) < 0.1
    masked = np.ma.MaskedArray(np.where(holes, -999.0, x), holes)
    a = EM().fit(gaussian_mixture(3), masked)
    b = EM().fit(gaussian_mixture(3), np.where(holes, NAN, x))
    assert a.log_likelihood == b.log_likelihood


def test_trials_that_differ_by_row() -> None:
    """No missing count is refused for what stands in for it."""
    rng = np.random.default_rng(1)
    x = np.column_stack([np.ones(200), rng.normal(size=200)])
    trials = rng.integers(1, 15, 200)
    y = rng.binomial(trials, 1 / (1 + np.exp(-x @ [0.3, 1.0]))).astype(float)
    y[0], trials[0] = 14, 14  # the first that is seen is too large for most rows
    gone = np.arange(200) % 5 == 2
    y[gone] = NAN
    for program in (
        mixture_of_regressions(1, "binomial", intercept=False),
        overdispersed,
    ):
        a = EM().fit(program, x, y, size=trials)
        b = EM().fit(program, x[~gone], y[~gone], size=trials[~gone])
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-6)
    y[3] = 20.0
    with pytest.raises(
        DataError, match=r"must lie in IntegerInterval\(lower_bound=0, upper_bound="
    ):
        EM().fit(overdispersed, x, y, size=trials)


def overdispersed(x: Tensor, y: Tensor, size: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.5), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.BetaBinomial(a, b, size.to(y)), obs=y)


def test_no_mean_no_expectation() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.0, 8.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Cauchy(loc[z], 1.0), obs=x)

    x = torch.cat([torch.linspace(-2, 2, 30), torch.linspace(6, 10, 30)]).double()
    x[5] = NAN
    with pytest.raises(ModelError, match="Cauchy has no mean; use draws"):
        EM().fit(model, x).impute()


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_noise_of_columns_that_are_seen(covariance: str) -> None:
    """The density of the noise is that over the columns seen, whatever their units."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=(90, 2)), rng.normal(size=(90, 2)) + 6, rng.uniform(-15, 15, (20, 2))]
    )
    x[::4, 0] = NAN
    fit = EM().fit(gaussian_mixture_with_noise(2, box_sides(x), covariance), x)
    params = {n: v.numpy() for n, v in fit.params.items()}
    sides = np.array(box_sides(x))
    total = 0.0
    for row in x:
        o = ~np.isnan(row)
        density = params["weights"][2] / sides[o].prod()
        for k in range(2):
            if covariance in ("full", "tied"):
                cov = params["covariance"]
                cov = cov[k] if covariance == "full" else cov
            else:
                scale = params["scale"][k] * np.ones(2)
                cov = np.diag(scale**2)
            own = stats.multivariate_normal(params["loc"][k][o], cov[np.ix_(o, o)])
            density += params["weights"][k] * own.pdf(row[o])
        total += np.log(density)
    assert fit.log_likelihood == pytest.approx(total, rel=1e-9)
    if covariance != "spherical":
        scaled = x * [1, 1e6]
        again = EM().fit(gaussian_mixture_with_noise(2, box_sides(scaled), covariance), scaled)
        shift = np.log(1e6) * len(x)
        assert again.log_likelihood + shift == pytest.approx(fit.log_likelihood, abs=1e-3)
    with pytest.raises(ModelError, match=r"box_sides\(x\), as values are missing"):
        EM().fit(gaussian_mixture_with_noise(2, 900.0, covariance), x)
