"""Model selection: criteria, shared starts, cross-validation, and the likelihood-ratio test."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from draws import Draws
from test_fit import Interrupted
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, MAP, DataError, ModelError, SettingError, datasets, likelihood_ratio_test
from pyroem import select as selected
from pyroem.loop import Status
from pyroem.models.gaussian import gaussian_mixture
from pyroem.selection.folds import make_folds
from pyroem.selection.replicates import places_of, replicate
from pyroem.selection.shared import responsibilities, split, start_from, value_at

FOURTEEN = ["EII", "VII", "EEI", "VEI", "EVI", "VVI", "EEE"]
FOURTEEN += ["VEE", "EVE", "VVE", "EEV", "VEV", "EVV", "VVV"]
Model = Callable[..., Any]


def poissons(components: int) -> Model:
    def model(x: Tensor) -> None:
        simplex, positive = constraints.simplex, constraints.positive
        weights = pyro.param("weights", torch.ones(components) / components, constraint=simplex)
        rate = pyro.param("rate", torch.ones(components), constraint=positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Poisson(rate[z]), obs=x)

    return model


def normals(components: int, shared: bool = False, df: float | None = None) -> Model:
    def model(x: Tensor) -> None:
        k = components
        weights = pyro.param("weights", torch.ones(k) / k, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.zeros(k))
        shape = () if shared else (k,)
        scale = pyro.param("scale", torch.ones(shape), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            own = scale if shared else scale[z]
            fn = dist.Normal(loc[z], own) if df is None else dist.StudentT(df, loc[z], own)
            pyro.sample("x", fn, obs=x)

    return model


def regressions(components: int) -> Model:
    def model(x: Tensor, *, y: Tensor) -> None:
        k = components
        weights = pyro.param("weights", torch.ones(k) / k, constraint=constraints.simplex)
        beta = pyro.param("beta", torch.zeros(k, 2))
        scale = pyro.param("scale", torch.ones(k), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            mean = beta[z][..., 0] + beta[z][..., 1] * x
            pyro.sample("y", dist.Normal(mean, scale[z]), obs=y)

    return model


def hidden_markov(components: int) -> Model:
    def model(x: Tensor) -> None:
        k = components
        initial = pyro.param("initial", torch.ones(k) / k, constraint=constraints.simplex)
        moves = pyro.param("moves", torch.ones(k, k) / k, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.zeros(k))
        with pyro.plate("sequences", len(x)):
            z = None
            for t in pyroem.markov(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else moves[z]))
                pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[:, t])

    return model


def counts(rows: int = 150) -> Tensor:
    """Counts around 2 and around 15."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.tensor([2.0, 15.0])[torch.randint(2, (rows,), generator=generator)]
    return torch.poisson(rate, generator=generator)


def lines(rows: int = 120) -> tuple[Tensor, Tensor]:
    """Rows of two straight lines that cross."""
    draw = Draws(1)
    x = 4 * draw.uniform(rows)
    y = torch.where(draw.uniform(rows) < 0.5, 1 + 2 * x, 8 - 2 * x) + 0.3 * draw.normal(rows)
    return x, y


def sequences(rows: int = 16, steps: int = 12) -> Tensor:
    """Sequences that stay at 0 or at 4 for some time."""
    draw = Draws(2)
    z = (draw.uniform(rows, steps) < 0.15).long().cumsum(1) % 2
    return 4.0 * z + draw.normal(rows, steps)


def faithful() -> Tensor:
    return datasets.load("faithful")[1]


@pytest.fixture(scope="module")
def table() -> pyroem.Selection:
    solver = EM(accelerate="squarem")
    return selected(
        gaussian_mixture, faithful(), covariance=FOURTEEN, components=range(1, 5), solver=solver
    )


# ---------------------------------------------------------------------------------------
# Criteria


def test_criteria_are_their_formulas(table: pyroem.Selection) -> None:
    n = len(faithful())
    for row in table.rows:
        deviance = -2 * row.log_likelihood
        assert row.df == row.fit.df and row.log_likelihood == row.fit.log_likelihood
        assert row.aic == pytest.approx(deviance + 2 * row.df, rel=1e-12)
        assert row.bic == pytest.approx(deviance + row.df * math.log(n), rel=1e-12)
        assert row.caic == pytest.approx(deviance + row.df * (math.log(n) + 1), rel=1e-12)
        assert row.sabic == pytest.approx(deviance + row.df * math.log((n + 2) / 24), rel=1e-12)
        r = row.fit.responsibilities()
        entropy = -float(torch.xlogy(r, r).sum())
        assert row.icl == pytest.approx(row.bic + 2 * entropy, rel=1e-9)
        assert row.cv is None
    known = {("VVV", 3): 17, ("EEE", 3): 11, ("VII", 4): 15, ("EEI", 1): 4}
    found = {(row.settings["covariance"], row.components): row.df for row in table.rows}
    assert {key: found[key] for key in known} == known


def test_mclusts_choice_on_old_faithful(table: pyroem.Selection) -> None:
    """mclust chooses EEE with 3 components: BIC -2314.316, by its sign."""
    best = table.best
    assert best is not None and (best.settings["covariance"], best.components) == ("EEE", 3)
    assert best.bic == pytest.approx(2314.31629566578, abs=0.03)
    assert best.bic <= 2314.31629566578
    assert table.best_fit is best.fit
    order = [(row.components, row.settings["covariance"]) for row in table.rows]
    assert order == [(k, name) for k in range(1, 5) for name in FOURTEEN]


def test_mclusts_choice_on_iris() -> None:
    """mclust chooses VEV with 2 components: BIC -561.7285; with 3 it has -562.5514."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x = sklearn.load_iris().data
    found = selected(
        gaussian_mixture, x, covariance=["EEE", "VVI", "EEV", "VEV", "VVV"], components=[1, 2, 3]
    )
    best = found.best
    assert best is not None and (best.settings["covariance"], best.components) == ("VEV", 2)
    assert best.bic == pytest.approx(561.7285, abs=0.01)
    other = next(r for r in found.rows if r.settings["covariance"] == "VEV" and r.components == 3)
    assert other.bic == pytest.approx(562.5514, abs=0.01)


NESTED = [
    ("EII", "VII"),
    ("EII", "EEI"),
    ("VII", "VEI"),
    ("EEI", "VEI"),
    ("EEI", "EVI"),
    ("VEI", "VVI"),
    ("EVI", "VVI"),
    ("EEI", "EEE"),
    ("VEI", "VEE"),
    ("EVI", "EVE"),
    ("VVI", "VVE"),
    ("EEE", "VEE"),
    ("EEE", "EVE"),
    ("EEE", "EEV"),
    ("VEE", "VVE"),
    ("EVE", "VVE"),
    ("VEE", "VEV"),
    ("EEV", "VEV"),
    ("EEV", "EVV"),
    ("EVE", "EVV"),
    ("VVE", "VVV"),
    ("VEV", "VVV"),
    ("EVV", "VVV"),
]


def test_nested_fits_are_in_order(table: pyroem.Selection) -> None:
    found = {(row.settings["covariance"], row.components): row for row in table.rows}
    assert all(row.counts for row in table.rows)
    for k in range(1, 5):
        for lower, higher in NESTED:
            gap = found[higher, k].log_likelihood - found[lower, k].log_likelihood
            assert gap > -1e-3, (lower, higher, k, gap)
    for name in FOURTEEN:
        for k in range(1, 4):
            gap = found[name, k + 1].log_likelihood - found[name, k].log_likelihood
            assert gap > -1e-3, (name, k, gap)


def test_a_poor_fit_is_lifted_by_those_it_contains(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose search finds nothing good gets the start of one that it contains."""
    search = pyroem.selection.search
    inner, x = search.starts, faithful()

    def poor(problem: Any, init: Any, count: int, seed: int) -> Any:
        if init == "auto" and problem.structure.parameters["covariance"].shape[0] == 3:
            init = {
                "loc": torch.full((3, 2), 60.0) + torch.eye(3, 2),
                "weights": [0.98, 0.01, 0.01],
            }
        return inner(problem, init, count, seed)

    monkeypatch.setattr(search, "starts", poor)
    found = selected(
        gaussian_mixture, x, components=[2, 3], covariance=["EEE", "VVV"], solver=EM(max_iter=300)
    )
    level = {(r.settings["covariance"], r.components): r.log_likelihood for r in found.rows}
    assert level["VVV", 3] >= level["EEE", 3] - 1e-3
    assert level["VVV", 3] >= level["VVV", 2] - 1e-3
    assert level["EEE", 3] >= level["EEE", 2] - 1e-3


# ---------------------------------------------------------------------------------------
# Programs of the user's own


def test_a_mixture_of_poissons() -> None:
    found = selected(poissons, counts(), components=[3, 1, 2, 2])
    assert [row.components for row in found.rows] == [1, 2, 3]
    assert [row.df for row in found.rows] == [1, 3, 5]
    assert found.best is found.rows[1]
    assert found.rows[0].log_likelihood < found.rows[1].log_likelihood
    assert found.rows[0].settings == {}
    assert EM().fit(poissons(2), counts()).bic() == pytest.approx(found.rows[1].bic, abs=1e-4)


def test_regressions_with_covariates_and_keyword_data() -> None:
    x, y = lines()
    found = selected(regressions, x, y=y, components=[1, 2])
    assert found.best is found.rows[1] and found.rows[1].df == 7
    slopes = found.best_fit.params["beta"][:, 1].sort().values
    assert slopes.tolist() == pytest.approx([-2, 2], abs=0.2)


def test_hidden_markov_models_have_sequences_as_rows() -> None:
    x = sequences()
    found = selected(hidden_markov, x, components=[1, 2], criterion="cv", folds=2)
    assert found.best is found.rows[1]
    row = found.rows[1]
    assert row.bic == pytest.approx(-2 * row.log_likelihood + 5 * math.log(16), rel=1e-12)
    total = 0.0
    for part in make_folds(16, 2, 0):
        rest = torch.ones(16, dtype=torch.bool)
        rest[part] = False
        total += float(EM().fit(hidden_markov(2), x[rest]).log_prob(x[part]).sum())
    assert row.cv == pytest.approx(total, rel=1e-9)


def test_further_settings_and_map() -> None:
    draw = Draws(3)
    x = torch.cat([draw.normal(60), 8 + draw.normal(60)])
    grid: dict[str, list[Any]] = {"df": [4.0, None], "shared": [True, False]}
    found = selected(normals, x, components=[1, 2], grid=grid, solver=MAP())
    assert len(found.rows) == 8 and found.best is not None and found.best.components == 2
    assert found.rows[0].settings == {"df": 4.0, "shared": True}
    text = str(found)
    assert "df" in text and "shared" in text and "components 2" in text


def test_restarts() -> None:
    x = faithful()
    found = selected(
        gaussian_mixture, x, components=[3], covariance=["EEE", "VEE", "VVV"], restarts=3
    )
    assert [len(row.fit.restarts) > 0 for row in found.rows] == [True] * 3
    assert found.rows[0].log_likelihood == pytest.approx(-1126.3162, abs=1e-3)


# ---------------------------------------------------------------------------------------
# Starts from one another


def test_a_split_keeps_the_responsibilities_and_moves_the_halves_apart() -> None:
    x = faithful()
    fit = EM().fit(gaussian_mixture(2), x)
    r = responsibilities(fit)["z"]
    for share in (1.0, 0.1):
        cut = split(r, 1, (x,), 0, share)
        assert cut.shape == (len(x), 3)
        torch.testing.assert_close(cut[:, 1] + cut[:, 2], r[:, 1])
        torch.testing.assert_close(cut[:, 0], r[:, 0])
    cut = split(r, 1, (x,), 0)
    assert set(torch.unique(cut[:, 1] / r[:, 1]).tolist()) == {0.0, 1.0}
    # The halves lie apart along the principal axis of the standardised rows of the state.
    scaled = (x - x.mean(0)) / x.std(0)
    own = r[:, 1]
    centre = (own @ scaled) / own.sum()
    gaps = scaled - centre
    axis = torch.linalg.eigh(gaps.T @ (own[:, None] * gaps)).eigenvectors[:, -1]
    sides = (gaps @ axis > 0) == (cut[:, 1] > cut[:, 2])
    sure = (gaps @ axis).abs() > 1e-3
    assert sides[sure].all() or not sides[sure].any()


def test_a_faint_split_starts_where_the_smaller_fit_is() -> None:
    x = faithful()
    fit = EM().fit(gaussian_mixture(2), x)
    large = EM().fit(gaussian_mixture(3), x, init="kmeans").problem
    found = []
    for share in (0.1, 0.01):
        cut = split(responsibilities(fit)["z"], 0, (x,), 0, share)
        start = start_from(large, {"z": cut}, "")
        assert start is not None
        found.append(fit.log_joint - value_at(large, start))
    assert abs(found[1]) < 0.02 and abs(found[1]) < abs(found[0]) / 50  # of second order


def test_one_step_from_the_responsibilities_of_a_contained_program_loses_nothing() -> None:
    x = faithful()
    for lower, higher in (("EEE", "VEE"), ("VEI", "VVI"), ("EEV", "VVV")):
        fit = EM().fit(gaussian_mixture(3, lower), x)
        problem = EM().fit(gaussian_mixture(3, higher), x, init="kmeans").problem
        start = start_from(problem, responsibilities(fit), "")
        assert start is not None
        assert value_at(problem, start) >= fit.log_joint - 1e-6


# ---------------------------------------------------------------------------------------
# Rows: cross-validation, weights, missing values


def by_hand(model: Model, x: Tensor, folds: int, seed: int, weights: Tensor | None = None) -> float:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for i in range(folds):
        test = order[i::folds].sort().values
        train = torch.ones(len(x), dtype=torch.bool)
        train[test] = False
        own = None if weights is None else weights[train]
        fit = EM().fit(model, x[train], weights=own, seed=seed)
        found = fit.log_prob(x[test])
        total += float(found.sum() if weights is None else found @ weights[test])
    return total


def test_cross_validation_is_the_loop_by_hand() -> None:
    x = faithful()
    names = ["EEE", "VVV"]
    found = selected(
        gaussian_mixture, x, components=[1, 2], covariance=names, criterion="cv", folds=3, seed=4
    )
    for row in found.rows:
        model = gaussian_mixture(row.components, row.settings["covariance"])
        assert row.cv == pytest.approx(by_hand(model, x, 3, 4), rel=1e-10)
    assert found.best is max(found.rows, key=lambda row: row.cv or -math.inf)
    assert "larger is better" in str(found)


def test_folds_are_a_partition() -> None:
    parts = make_folds(23, 5, 1)
    assert sorted(torch.cat(parts).tolist()) == list(range(23))
    assert {len(p) for p in parts} == {4, 5}
    assert all(torch.equal(a, b) for a, b in zip(parts, make_folds(23, 5, 1), strict=True))
    assert not torch.equal(parts[0], make_folds(23, 5, 2)[0])


def test_weights_count_rows_twice() -> None:
    x = counts(80)
    weights = torch.ones(80, dtype=torch.float64)
    weights[:30] = 2
    weights[70:] = 0
    alone = selected(poissons, torch.cat([x[:70], x[:30]]), components=[1, 2])
    weighed = selected(poissons, x, components=[1, 2], weights=weights)
    for a, b in zip(alone.rows, weighed.rows, strict=True):
        for name in ("log_likelihood", "bic", "aic", "icl", "caic", "sabic"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-3)
    held = selected(poissons, x, components=[2], weights=weights, criterion="cv", folds=3)
    assert held.rows[0].cv == pytest.approx(by_hand(poissons(2), x, 3, 0, weights), rel=1e-10)


def test_missing_values() -> None:
    x = faithful().clone()
    x[::7, 0] = torch.nan
    x[3::11, 1] = torch.nan
    found = selected(gaussian_mixture, x, components=[1, 2], covariance=["EEE", "VVV"])
    assert all(row.counts for row in found.rows)
    assert found.best is not None and found.best.components == 2
    one = [row.log_likelihood for row in found.rows if row.components == 1]
    assert one[0] == pytest.approx(one[1], abs=1e-6)


def test_blocks_share_no_starts_and_cannot_be_cut() -> None:
    x = faithful()
    parts = pyroem.blocks(lambda: (x[i::3] for i in range(3)))
    found = selected(gaussian_mixture, parts, components=[1, 2], covariance=["EEE", "VEE", "VVV"])
    assert "data in blocks: the fits share no starts" in str(found)
    assert not any("responsibilities" in row.fit.start for row in found.rows)
    whole = selected(gaussian_mixture, x, components=[1, 2], covariance=["EEE", "VEE", "VVV"])
    for a, b in zip(found.rows, whole.rows, strict=True):
        assert a.bic == pytest.approx(b.bic, abs=1e-3)
    with pytest.raises(SettingError, match="criterion='cv': expected rows in memory, got data in"):
        selected(gaussian_mixture, parts, components=[1], criterion="cv")
    with pytest.raises(SettingError, match="expected rows in memory, got data in blocks"):
        likelihood_ratio_test(gaussian_mixture, parts, components=1)


# ---------------------------------------------------------------------------------------
# What ends badly, and interrupts


def test_fits_that_end_badly_are_not_chosen() -> None:
    x = torch.cat([Draws(0).normal(40), torch.full((10,), 5.0, dtype=torch.float64)])
    found = selected(normals, x, components=[1, 2], solver=EM(floor=1e-6))
    collapsed = found.rows[1]
    assert collapsed.status is Status.DEGENERATE and not collapsed.counts
    assert collapsed.bic < found.rows[0].bic and found.best is found.rows[0]
    assert "not counted: components 2: degenerate" in str(found)
    cut = selected(gaussian_mixture, faithful(), components=[3], solver=EM(max_iter=2))
    assert cut.best is None and "raise max_iter" in str(cut)
    with pytest.raises(ModelError, match=r"best_fit: expected at least one fit .* max iter"):
        _ = cut.best_fit


class Impatient(Interrupted):
    """Plain EM, interrupted once the program has three states."""

    def step(self, problem: Any, state: Any) -> Any:
        if max(problem.structure.assignments.values()) == 3:
            return super().step(problem, state)
        return EM.step(self, problem, state)


def test_an_interrupt_keeps_what_is_there() -> None:
    found = selected(
        gaussian_mixture,
        faithful(),
        components=[1, 2, 3, 4],
        covariance=["EEE", "VVV"],
        solver=Impatient(),
    )
    whole = [row for row in found.rows if row.components < 3]
    assert len(whole) == 4 and all(row.counts for row in whole)
    assert found.best in whole
    assert "components 4, covariance VVV" in found.missing
    assert "components 3, covariance EEE" in found.missing
    assert "components 2, covariance EEE" not in found.missing
    assert "interrupted; missing: components 3" in str(found)
    assert found.to_dict()["missing"] == list(found.missing)


def test_an_interrupt_before_the_first_fit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pyroem.selection.programs, "pause_point", pressed)
    with pytest.raises(KeyboardInterrupt):
        selected(poissons, counts(), components=[1])


def test_progress_says_which_fit(capsys: pytest.CaptureFixture[str]) -> None:
    selected(poissons, counts(40), components=[1, 2], progress=True)
    captured = capsys.readouterr()
    assert "fit 1 of 2: components 1" in captured.err and not captured.out
    selected(poissons, counts(40), components=[1])
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------------------------
# Tables and pictures


def test_the_table_is_readable(table: pyroem.Selection) -> None:
    text = str(table)
    assert "BIC (smaller is better); best: components 3, covariance EEE" in text
    assert "2314.30*" in text and all(name in text for name in FOURTEEN)
    assert max(map(len, text.splitlines())) < 130
    assert repr(table) == text


def test_plain_values(table: pyroem.Selection) -> None:
    plain = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert len(plain["rows"]) == 56 and plain["rows"][plain["best"]]["bic"] < 2314.317
    assert plain["rows"][0]["settings"] == {"covariance": "EII"}


def test_a_data_frame(table: pyroem.Selection) -> None:
    pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert len(frame) == 56 and list(frame.columns[:2]) == ["components", "covariance"]
    assert frame["bic"].min() == table.best.bic if table.best else False


def test_a_picture(table: pyroem.Selection) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = table.plot()
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert set(FOURTEEN) <= set(lines)
    assert table.best is not None
    for name in ("EEE", "VVV"):
        x, y = lines[name].get_data()
        own = [row.bic for row in table.rows if row.settings["covariance"] == name]
        assert list(x) == [1, 2, 3, 4]
        assert list(y) == pytest.approx([value - table.best.bic for value in own])
    (legend,) = ax.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == FOURTEEN
    looks = {
        (ln.get_color(), ln.get_linestyle(), ln.get_markerfacecolor()) for ln in lines.values()
    }
    assert len(looks) == len(lines)
    ax.figure.canvas.draw()
    assert legend.get_window_extent().y1 <= ax.get_window_extent().y0
    plt.close(ax.figure)
    _, own_axes = plt.subplots()
    assert table.plot(own_axes) is own_axes
    plt.close("all")


# ---------------------------------------------------------------------------------------
# The likelihood-ratio test


def test_p_is_small_below_the_truth_and_large_at_it() -> None:
    x, solver = counts(60), EM(accelerate="squarem")
    below = likelihood_ratio_test(poissons, x, components=1, replicates=19, seed=1, solver=solver)
    assert below.p_value == pytest.approx(1 / 20)
    assert below.statistic > 10 * max(below.replicates)
    at = likelihood_ratio_test(poissons, x, components=2, replicates=9, seed=1, solver=solver)
    assert at.p_value > 0.1
    assert len(at.replicates) == 9 and min(at.replicates) > -1e-4
    above = sum(value >= at.statistic for value in at.replicates)
    assert at.p_value == pytest.approx((1 + above) / 10)
    assert at.statistic == pytest.approx(
        2 * (at.alternative.log_likelihood - at.null.log_likelihood)
    )
    again = likelihood_ratio_test(poissons, x, components=2, replicates=3, seed=1, solver=solver)
    assert again.replicates == at.replicates[:3]


def test_components_until_the_test_accepts() -> None:
    x = counts(80)
    solver = EM(accelerate="squarem")
    found = likelihood_ratio_test(poissons, x, replicates=4, level=0.25, seed=2, solver=solver)
    assert [test.components for test in found.previous] == [1] and found.components == 2
    assert found.previous[0].p_value == pytest.approx(0.2) and found.p_value > 0.25
    text = str(found)
    assert "1 against 2" in text and "2 against 3" in text


def test_replicates_keep_covariates_and_missing_cells() -> None:
    x, y = lines(40)
    fit = EM().fit(regressions(2), x, y=y)
    args, kwargs = replicate(fit, places_of(fit.problem), 3)
    assert torch.equal(args[0], x) and kwargs["y"].shape == y.shape
    assert not torch.equal(kwargs["y"], y)
    torch.testing.assert_close(kwargs["y"], fit.sample(seed=3)["y"])
    rows = faithful().clone()
    rows[::5, 1] = torch.nan
    fit = EM().fit(gaussian_mixture(2), rows)
    (drawn,), _ = replicate(fit, places_of(fit.problem), 0)
    assert torch.equal(drawn.isnan(), rows.isnan()) and drawn.shape == rows.shape
    test = likelihood_ratio_test(regressions, x, y=y, components=1, replicates=2)
    assert test.p_value == pytest.approx(1 / 3)


def test_replicates_of_sequences_and_of_columns() -> None:
    x = sequences(6, 8)
    fit = EM().fit(hidden_markov(2), x)
    (drawn,), _ = replicate(fit, places_of(fit.problem), 5)
    torch.testing.assert_close(drawn, fit.sample(seed=5)["x"])

    def columns(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        loc, rate = pyro.param("loc", torch.zeros(2)), torch.tensor([1.0, 5.0])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("a", dist.Normal(loc[z], 1.0), obs=x[:, 2])
            pyro.sample("b", dist.Poisson(rate[z]), obs=x[:, 0])

    draw = Draws(0)
    table = torch.stack([torch.arange(30) % 4, draw.normal(30), draw.normal(30)], 1)
    fit = EM().fit(columns, table)
    (drawn,), _ = replicate(fit, places_of(fit.problem), 1)
    own = fit.sample(seed=1)
    torch.testing.assert_close(drawn[:, 2], own["a"])
    torch.testing.assert_close(drawn[:, 0], own["b"])
    assert torch.equal(drawn[:, 1], table[:, 1])


def test_there_is_no_test_of_a_collapsed_fit() -> None:
    x = torch.cat([Draws(0).normal(40), torch.full((10,), 5.0, dtype=torch.float64)])
    test = likelihood_ratio_test(normals, x, components=1, replicates=2, solver=EM(floor=1e-6))
    assert math.isnan(test.p_value) and math.isnan(test.statistic) and test.missing == 2
    assert "no test: the fit with 2 components ended as degenerate" in str(test)
    both = likelihood_ratio_test(normals, x, replicates=2, solver=EM(floor=1e-6))
    assert both.components == 1 and both.previous == ()


def test_an_interrupted_test_keeps_its_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pyroem.selection.likelihood_ratio
    inner, calls = module._statistic, []

    def impatient(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(module, "_statistic", impatient)
    test = likelihood_ratio_test(poissons, counts(60), components=1, replicates=9)
    assert test.interrupted and len(test.replicates) == 2 and test.missing == 7
    assert test.p_value == pytest.approx(1 / 3)
    assert "missing: 7 replicates" in str(test)


# ---------------------------------------------------------------------------------------
# Errors


def no_fits(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a fit was made")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"components": []}, "components: expected one positive integer or more, got \\[\\]"),
        ({"components": [0, 1]}, "components: expected .* got \\[0, 1\\]"),
        ({"components": "12"}, "components: expected .* got '12'"),
        ({"components": [True]}, "components: expected .* got \\[True\\]"),
        ({"covariance": "VVV"}, "covariance: expected a list of settings, got 'VVV'"),
        ({"covariance": []}, "covariance: expected at least one setting"),
        ({"covariance": ["EEE", "EEE"]}, "covariance: expected each setting once, got 'EEE' twice"),
        (
            {"covariance": ["XXX"]},
            "model_factory refuses components 1, covariance XXX: .*got 'XXX'",
        ),
        ({"grid": {"df": [1]}}, "model_factory: expected a function that can be called as f.*df"),
        ({"grid": {"components": [1]}}, "grid: 'components' is an argument of its own"),
        ({"grid": [1]}, "grid: expected a dict of keywords to lists of settings, got list"),
        ({"criterion": "dic"}, "criterion: expected one of bic, aic.* got 'dic'"),
        ({"solver": "EM"}, "solver: expected a solver such as EM\\(\\) or MAP\\(\\), got str"),
        ({"seed": -1}, "seed: expected an integer .* got -1"),
        ({"restarts": 0}, "restarts: expected a positive integer, got 0"),
        ({"criterion": "cv", "folds": 1}, "folds: expected an integer from 2 to 272 .* got 1"),
        ({"criterion": "cv", "folds": 300}, "folds: expected an integer from 2 to 272 .* got 300"),
    ],
)
def test_errors_come_before_any_fit(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pyroem.solver.Solver, "solve", no_fits)
    with pytest.raises(SettingError, match=message):
        selected(gaussian_mixture, faithful(), **{"components": [1], **arguments})


def test_errors_of_programs_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyroem.solver.Solver, "solve", no_fits)
    x = counts(20)
    with pytest.raises(SettingError, match="model_factory: expected a function of the number"):
        selected(3, x)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"model_factory: expected a program .* got int"):
        selected(lambda k: k, x)
    with pytest.raises(DataError, match="components 1: weights: expected shape"):
        selected(poissons, x, components=[1], weights=torch.ones(3))

    def closed(components: int) -> Model:
        inner = poissons(components)
        return lambda rows: inner(x)

    with pytest.raises(SettingError, match=r"criterion='cv': expected \d+ rows of a program"):
        selected(closed, x, components=[2], criterion="cv")
    with pytest.raises(SettingError, match=r"criterion='cv': expected data with 20 rows"):
        selected(closed, torch.ones(7), components=[2], criterion="cv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"components": 0}, "components: expected a positive integer, got 0"),
        ({"replicates": 0}, "replicates: expected a positive integer, got 0"),
        ({"level": 2}, "level: expected a number between 0 and 1, got 2"),
        ({"most": "x"}, "most: expected a positive integer, got 'x'"),
    ],
)
def test_errors_of_the_test(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pyroem.solver.Solver, "solve", no_fits)
    with pytest.raises(SettingError, match=message):
        likelihood_ratio_test(poissons, counts(20), **arguments)


def test_observations_that_are_computed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyroem.solver.Solver, "solve", no_fits)

    def logs(components: int) -> Model:
        inner = normals(components)
        return lambda x: inner((1 + x).log())

    with pytest.raises(SettingError, match=r"expected every observation .* got 'x', which is comp"):
        likelihood_ratio_test(logs, counts(20), components=1)


def test_a_partial_factory_takes_settings() -> None:
    factory = partial(gaussian_mixture, covariance="EEI")
    found = selected(factory, faithful(), components=[1, 2])
    assert [row.df for row in found.rows] == [4, 7]


def test_replicates_are_fitted_with_the_care_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One normal against two: the statistics of drawn data are those of fits of their own."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    drawn, sample = [], pyroem.Fit.sample

    def spy(self: pyroem.Fit, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = sample(self, *args, **kwargs)
        drawn.append(found["x"])
        return found

    monkeypatch.setattr(pyroem.Fit, "sample", spy)
    test = likelihood_ratio_test(gaussian_mixture, x, components=1, replicates=8)
    own = [2 * (EM().fit(gaussian_mixture(2), y).log_likelihood - at_one(y)) for y in drawn[:8]]
    short = [a - b for a, b in zip(own, test.replicates, strict=True) if a > b + 0.01]
    assert len(short) <= 1
    assert sum(test.replicates) >= sum(own) - 4


def at_one(x: Tensor) -> float:
    return EM().fit(gaussian_mixture(1), x).log_likelihood


def test_a_program_in_place_of_its_maker() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(SettingError, match="give the function that makes it"):
        selected(cast(Any, gaussian_mixture(2)), x)
