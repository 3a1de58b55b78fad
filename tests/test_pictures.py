"""Pictures of fits, and what they draw: densities by state, paths, transitions, a whole report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, MAP, SVI, DataError, Fit, ModelError, SettingError, datasets, plot
from pyroem._pyro import isolated
from pyroem.components import sites
from pyroem.models import gaussian_mixture, student_t_mixture

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BY_NAME = {p.name: p for p in PROBLEMS}
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
DOUBLE: Any = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def at(name: str, steps: int = 1) -> Fit:
    """A fit of a problem that has hardly moved from its own point."""
    problem = BY_NAME[name]
    return EM(max_iter=steps).fit(problem.model, *problem.data, init=problem.params)


def blobs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator, **DOUBLE)
    return torch.cat([x[:120], 0.5 * x[120:] + torch.tensor([4.0, 1.0], **DOUBLE)])


def data(line: Any) -> tuple[list[float], list[float]]:
    return list(line.get_xdata()), list(line.get_ydata())


def drawn(ax: Any) -> str:
    """What the page of paper says: it must be possible to draw it."""
    ax.figure.draw_without_rendering()
    texts = [text.get_text() for text in ax.figure.findobj(matplotlib.text.Text)]
    return " ".join(texts)


# ---------------------------------------------------------------------------------------
# Components: one observation, state by state


@every_problem
def test_weights_are_the_posterior_and_densities_integrate_to_one(problem: Any) -> None:
    fit = at(problem.name)
    structure = fit.problem.structure
    for site in sites(structure):
        found = fit.components(site)
        n, k = found.weights.shape
        assert found.values.shape[0] == n and k == len(found.labels)
        seen = (~found.values.isnan()).any(1)
        torch.testing.assert_close(found.weights.sum(1), seen.double())
        values, _ = found.column(0)
        if found.discrete:
            support = torch.arange(0.0, max(60.0, float(values.max()) * 3), **DOUBLE)
            parts = found.density(support)
            total = None if parts is None else parts.sum()
        else:
            low, high = float(values.min()), float(values.max())
            reach = 12 * (high - low)
            ends = (1e-9 if low > 0 else low - reach, high + reach)
            ends = (-math.pi, math.pi) if problem.name == "von_mises_mixture" else ends
            grid = torch.linspace(*ends, 4_001 if found.varies else 40_001, **DOUBLE)
            if low > 0:  # densities may be steep at zero
                near = torch.logspace(-9, math.log10(low), 2_000, **DOUBLE)
                grid = torch.cat([grid, near]).unique()
            parts = found.density(grid)
            total = None if parts is None else torch.trapezoid(parts.sum(0), grid)
        assert total is not None and parts is not None
        assert float(total) == pytest.approx(1, abs=5e-3)
        # Of each state its share: what the states' own parts integrate to.
        if not found.discrete:
            shares = torch.trapezoid(parts, grid)
            torch.testing.assert_close(shares, found.shares, atol=5e-3, rtol=0)
        assert (found.shares.sum() - 1).abs() < 1e-9


@pytest.mark.parametrize("name", ["gaussian_mixture", "student_t_mixture", "weibull_mixture"])
def test_density_is_that_of_new_rows(name: str) -> None:
    """Far from the maximum, too."""
    problem, fit = BY_NAME[name], at(name)
    x = problem.data[0]
    grid = torch.linspace(float(x.min()), float(x.max()), 50, **DOUBLE)
    parts = fit.components().density(grid)
    assert parts is not None
    wanted = fit.log_prob(grid).exp()
    torch.testing.assert_close(parts.sum(0), wanted)


def test_density_of_the_plane_and_moments() -> None:
    x = blobs()
    fit = EM(max_iter=3).fit(gaussian_mixture(2), x, init="random")
    found = fit.components("x")
    points = x[:30] + 0.1
    torch.testing.assert_close(found.joint_density(points), fit.log_prob(points).exp())
    means, covariances = found.moments
    torch.testing.assert_close(means, fit.params["loc"])
    torch.testing.assert_close(covariances, fit.params["covariance"])


def test_rows_of_a_regression_have_their_own_distributions() -> None:
    fit = at("linear_regressions")
    found = fit.components()
    assert found.varies
    x, y = (t.double() for t in BY_NAME["linear_regressions"].data)
    p = fit.params
    w = p["weights"]
    centre = (x @ p["beta"].T) if p["beta"].shape[1] == x.shape[1] else None
    assert centre is not None
    grid = torch.linspace(float(y.min()), float(y.max()), 7, **DOUBLE)
    parts = torch.distributions.Normal(centre, p["scale"]).log_prob(grid[:, None, None]).exp()
    parts_found = found.density(grid)
    assert parts_found is not None
    torch.testing.assert_close(parts_found, (parts * w).mean(1).T)


def test_row_weights_count() -> None:
    x, weights = blobs()[:, :1], torch.tensor([2.0, 0.0] * 100, **DOUBLE)
    model = gaussian_mixture(2)
    weighted = EM(max_iter=3).fit(model, x, weights=weights, init="random").components()
    repeated = EM(max_iter=3).fit(model, x[::2].repeat(2, 1), init="random")
    again = EM(max_iter=1, fixed=["loc", "weights", "covariance"]).fit(
        model, x, weights=weights, init=repeated
    )
    torch.testing.assert_close(again.components().shares, repeated.components().shares)
    assert weighted.column(0)[1].sum() == 200


def test_missing_values_are_not_drawn() -> None:
    x = blobs()
    x[::3, 1] = torch.nan
    found = EM(max_iter=5).fit(gaussian_mixture(2), x).components()
    assert int(found.values.isnan().sum()) == 67
    assert len(found.column(1)[0]) == 133
    found.values[:, 1] = torch.nan
    with pytest.raises(DataError, match="nothing is seen of column 1"):
        found.column(1)


def test_components_name_what_they_lack() -> None:
    fit = at("gaussian_and_poisson")
    with pytest.raises(SettingError, match=r"site: expected one of .*'n'.*none was named"):
        fit.components()
    with pytest.raises(SettingError, match="got 'y'"):
        fit.components("y")
    with pytest.raises(SettingError, match="columns 0 to 0, got 3"):
        plot.density(fit, "x", 3)
    with pytest.raises(SettingError, match="'x' has one column"):
        plot.contours(fit, "x", (0, 1))


# ---------------------------------------------------------------------------------------
# Pictures


@every_problem
def test_every_problem_can_be_drawn(problem: Any) -> None:
    fit = at(problem.name)
    for site in list(sites(fit.problem.structure))[:2]:
        found = fit.components(site)
        ax = plot.density(fit, site)
        words = drawn(ax)
        assert found.column_name(0) in words
        if len(found.labels) <= 6:
            assert all(label in words for label in found.labels)
        drawn(plot.responsibilities(fit, site))
        if found.values.shape[1] >= 2 and not found.discrete:
            drawn(plot.contours(fit, site))
    if len(fit.problem.structure.factor_sites) <= 12:
        words = drawn(plot.program(fit))
        assert all(name in words for name in fit.params)
    plt.close("all")


def test_lines_are_the_components() -> None:
    fit = EM().fit(gaussian_mixture(2), blobs()[:, :1])
    ax = plot.density(fit)
    lines = {str(line.get_label()): line for line in ax.lines}
    x, total = (torch.as_tensor(v) for v in lines["mixture"].get_data())
    parts = fit.components().density(x)
    assert parts is not None
    torch.testing.assert_close(total, parts.sum(0))
    label = next(name for name in lines if name.startswith("z = 1"))
    torch.testing.assert_close(torch.as_tensor(lines[label].get_ydata()), parts[1])
    assert "KDE" in lines and "KDE" not in drawn(plot.density(fit, kde=False))
    patch: Any = ax.patches[0]
    bars = patch.get_data()
    assert float((bars.values * (bars.edges[1:] - bars.edges[:-1])).sum()) == pytest.approx(1)


def test_all_rows_count_and_large_data_are_told() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12_000, 1, generator=generator, **DOUBLE)
    x[:200] += 8  # rare
    fit = EM().fit(gaussian_mixture(2), x)
    found = fit.components()
    assert len(found.values) == found.rows == 12_000
    torch.testing.assert_close(found.shares, fit.params["weights"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyroem.fit.MOST_NUMBERS", 1000)
        some = fit.components()
        assert some.rows == 12_000 > len(some.values)
        assert f"{len(some.values):,} of 12,000 rows" in drawn(plot.density(fit))
    torch.testing.assert_close(some.shares, fit.params["weights"])


def test_a_gate_makes_dots() -> None:
    """Where the rows' states differ in their probabilities, there is no curve over x."""

    def model(x: Tensor, c: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(1.0))
        loc = pyro.param("loc", torch.tensor([0.0, 2.0]))
        with pyro.plate("rows", len(x)):
            logits = torch.stack([torch.zeros_like(c), slope * c], -1)
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    x, c = blobs().T
    fit = EM(max_iter=3).fit(model, x, c)
    assert fit.components().varying_shares and not fit.components().varies
    ax = plot.responsibilities(fit)
    dots = torch.as_tensor(ax.collections[1].get_offsets())
    torch.testing.assert_close(dots[:, 1], fit.responsibilities()[:, 1])


def test_narrow_components_have_their_height_and_points_are_told() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, generator=generator, **DOUBLE)
    x = torch.cat([50 * noise[:300], 0.03 * noise[300:400] + 20.25, 0.03 * noise[400:] - 60])
    start = {"weights": [0.6, 0.2, 0.2], "loc": [[0.0], [20.25], [-60.0]]}
    init = {n: torch.tensor(v) for n, v in start.items()}
    init["covariance"] = torch.tensor([2500.0, 1e-3, 1e-3]).reshape(3, 1, 1)
    fit = EM().fit(gaussian_mixture(3), x.unsqueeze(-1), init=init)
    peak = fit.params["weights"] / (2 * math.pi * fit.params["covariance"][:, 0, 0]).sqrt()
    lines = [line for line in plot.density(fit).lines if str(line.get_label()).startswith("z")]
    highest = torch.tensor([max(data(line)[1]) for line in lines], **DOUBLE)
    torch.testing.assert_close(highest, peak, rtol=1e-3, atol=0)

    x[:100] = 4.1234
    init["loc"][1], init["covariance"][1] = 4.1234, 1e-6
    fit = EM(floor=0.0, max_iter=30).fit(gaussian_mixture(3), x.unsqueeze(-1), init=init)
    words = drawn(plot.density(fit))
    assert not fit.converged and "z = 1" in words and "a point" in words
    for rows in (torch.ones(30, 1), torch.ones(1, 1)):
        one = EM(max_iter=3).fit(gaussian_mixture(1), rows)
        drawn(plot.density(one)), drawn(plot.responsibilities(one))


@pytest.mark.parametrize(
    "name", ["dirichlet_mixture", "multinomial_mixture", "dirichlet_multinomial_mixture"]
)
def test_shares_of_a_whole_have_their_covariances(name: str) -> None:
    fit = at(name)
    means, covariances = fit.components().moments
    for k, base in enumerate(of_each_state(fit)):
        with pyro.validation_enabled(False), torch.random.fork_rng():
            torch.manual_seed(0)
            draws = base.sample((100_000,)).double()
        error = 5 * (draws.var(0) / len(draws)).sqrt()
        assert bool(((draws.mean(0) - means[k]).abs() < error).all())
        spread = draws.std(0)[:, None] * draws.std(0)
        assert float(((draws.T.cov() - covariances[k]) / spread).abs().max()) < 0.03


def of_each_state(fit: Fit) -> list[Any]:
    """The distribution of the first row in every state, built by hand."""
    p, name = fit.params, fit.problem.structure.observations[0]
    node = fit.problem.structure.program.run(p).nodes[name]
    base = node["fn"].base_dist if hasattr(node["fn"], "base_dist") else node["fn"]
    if isinstance(base, dist.Dirichlet):
        return [dist.Dirichlet(a) for a in p["alpha"]]
    n = int(node["value"][0].sum())
    if isinstance(base, dist.DirichletMultinomial):
        return [dist.DirichletMultinomial(a, n) for a in p["alpha"]]
    return [dist.Multinomial(n, probs=q) for q in p["probs"]]


def test_every_category_has_its_mark() -> None:
    probs = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    probs = probs / probs.sum(1, keepdim=True)

    def model(x: Tensor) -> None:
        own = pyro.param(
            "probs", probs / probs.sum(1, keepdim=True), constraint=constraints.simplex
        )
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Categorical(own[z]), obs=x)

    fit = EM(max_iter=2).fit(model, torch.arange(300) % 30)
    line = plot.density(fit).lines[0]
    assert line.get_markevery() is None and len(data(line)[0]) == 30


def test_looks_of_many_states_differ() -> None:
    looks = [plot.style.look_of(k) for k in range(49)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 49


def test_rows_without_weight_are_not_drawn() -> None:
    x, weights = blobs(), torch.tensor([1.0, 0.0] * 100, **DOUBLE)
    fit = EM(max_iter=5).fit(gaussian_mixture(2), x, weights=weights)
    for ax in (plot.contours(fit), plot.responsibilities(fit)):
        assert sum(len(torch.as_tensor(c.get_offsets())) for c in ax.collections[:2]) in (100, 200)
    dots = torch.cat([torch.as_tensor(c.get_offsets()) for c in plot.contours(fit).collections[:2]])
    assert {tuple(p) for p in dots.tolist()} <= {tuple(p) for p in x[::2].tolist()}


def test_names_that_begin_with_a_line_are_in_the_legend() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("_loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("_z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("_x", dist.Normal(loc[z], 1.0), obs=x)

    fit = EM(max_iter=2).fit(model, blobs()[:, 0])
    assert "_z = 1" in drawn(plot.density(fit)) and "_loc" in drawn(plot.program(fit))


def test_responsibilities_are_bayes_rule() -> None:
    x = blobs()[:, :1]
    fit = EM(max_iter=2).fit(gaussian_mixture(2), x, init="random")
    line = plot.responsibilities(fit).lines[0]
    at_x, share = (torch.as_tensor(v) for v in line.get_data())
    torch.testing.assert_close(share, fit.responsibilities(at_x.unsqueeze(-1))[:, 0])


def test_far_tails_leave_room() -> None:
    x = torch.cat([blobs()[:, 0], torch.tensor([4000.0, -900.0], **DOUBLE)]).unsqueeze(-1)
    ax = plot.density(EM(max_iter=50).fit(student_t_mixture(2), x))
    assert ax.get_xlim()[1] < 50
    assert "1.0% of the data beyond" in drawn(ax)


def test_pairs_of_columns() -> None:
    x = torch.cat([blobs(), blobs().flip(1)], 1)
    fit = EM(max_iter=20).fit(gaussian_mixture(2), x)
    axes = plot.pairs(fit)
    assert axes.shape == (4, 4)
    assert axes[3, 0].get_xlabel() == "x[0]" and axes[3, 0].get_ylabel() == "x[3]"
    assert plot.pairs(fit, columns=[1, 3]).shape == (2, 2)
    with pytest.raises(SettingError, match="two columns or more, got 1"):
        plot.pairs(fit, columns=[1])
    given = plt.subplots(2, 2)[1]
    assert plot.pairs(fit, columns=[0, 1], axes=given) is given


def test_ellipse_is_where_the_distance_is_one() -> None:
    fit = EM().fit(gaussian_mixture(2), blobs())
    label = f"z = 0 ({float(fit.components().shares[0]):.0%})"
    line = next(x for x in plot.contours(fit).lines if x.get_label() == label)
    away = torch.tensor(line.get_xydata()) - fit.params["loc"][0]
    inverse = fit.params["covariance"][0].inverse()
    distance = (away @ inverse * away).sum(-1)
    torch.testing.assert_close(distance, torch.ones_like(distance))


def test_transitions_and_decoded_sequences() -> None:
    fit = at("chain_sequences", 20)
    matrix = fit.transitions()["z"]
    torch.testing.assert_close(matrix, fit.params["transition"])
    words = drawn(plot.transitions(fit))
    assert all(f"{p:.0%}" in words for p in matrix.flatten().tolist() if p > 0.1)
    ax = plot.decoded(fit, 2)
    points = {str(c.get_label()): torch.as_tensor(c.get_offsets()) for c in ax.collections}
    path, x = fit.predict()[2], BY_NAME["chain_sequences"].data[0][2].double()
    for k in path.unique().tolist():
        steps = (path == k).nonzero().reshape(-1)
        wanted = torch.stack([steps.double(), x[steps]], 1)
        torch.testing.assert_close(points[f"z = {k}"].double(), wanted)
    with pytest.raises(SettingError, match="expected 0 to 59, got 60"):
        plot.decoded(fit, 60)
    with pytest.raises(ModelError, match="not read as a chain"):
        plot.transitions(at("gaussian_mixture"))


def test_ragged_sequences_end_where_they_end() -> None:
    fit = at("chain_ragged")
    ends = (fit.components().values.reshape(-1) * 0 == 0).sum()
    assert 0 < int(ends) < fit.components().values.numel()
    lengths = {len(data(plot.decoded(fit, i).lines[0])[0]) for i in range(4)}
    assert len(lengths) > 1


@pytest.mark.parametrize(
    "name", ["chain_several", "chains_side_by_side", "chain_mixture_emissions"]
)
def test_chains_of_all_kinds_are_drawn(name: str) -> None:
    fit = at(name)
    for chain in fit.transitions():
        drawn(plot.transitions(fit, chain))
    for site in sites(fit.problem.structure):
        drawn(plot.decoded(fit, 0, site))


def test_many_states_are_a_matrix() -> None:
    class Stand:
        def transitions(self) -> dict[str, Tensor]:
            return {"z": torch.full((9, 9), 1 / 9, **DOUBLE)}

    fit: Any = Stand()
    ax = plot.transitions(fit)
    assert len(ax.images) == 1 and "11" in drawn(ax)


def test_history_has_the_values() -> None:
    x = blobs()
    fits = {"EM": EM().fit(gaussian_mixture(2), x), "L-BFGS": MAP().fit(gaussian_mixture(2), x)}
    left, right = plot.history(fits)
    assert data(left.lines[0])[1][-1] == fits["EM"].history[-1].log_joint
    assert data(right.lines[1])[0] == [r.seconds for r in fits["L-BFGS"].history]
    assert left.get_ylabel() == "log-likelihood"
    assert drawn(plot.history(fits["EM"])[0])


def test_curves_profiles_and_surfaces_with_paths() -> None:
    x = blobs()[:, :1]
    fit = EM().fit(gaussian_mixture(2), x)
    curve, profile = fit.curve("loc[0, 0]", points=15), fit.profile("loc[0, 0]", points=7)
    ax = plot.likelihood(curve, profile)
    lines = {str(line.get_label()): data(line)[1] for line in ax.lines}
    assert lines["profile"] == profile.log_joint.tolist()
    assert lines["the rest held"] == curve.log_joint.tolist()
    assert "95% interval" in drawn(ax)
    with pytest.raises(ValueError, match=r"of one parameter; got loc\[1, 0\], loc\[0, 0\]"):
        plot.likelihood(fit.curve("loc[1, 0]", points=5), profile)
    surface = fit.surface("loc[0, 0]", "loc[1, 0]", points=9)
    with pytest.raises(ValueError, match="'EM' kept no path"):
        plot.surface(surface, {"EM": fit})
    path = EM(keep_path=True).fit(gaussian_mixture(2), x, init="random")
    way = next(x for x in plot.surface(surface, {"EM": path}).lines if x.get_label() == "EM")
    wanted = [[float(p["loc"][0, 0]), float(p["loc"][1, 0])] for p in path.path]
    torch.testing.assert_close(torch.tensor(way.get_xydata()), torch.tensor(wanted, **DOUBLE))


def test_program_shows_who_depends_on_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = at("hierarchical_means")
    words = drawn(plot.program(fit))
    assert all(name in words for name in ("mean", "spread", "loc", "var", "rate", "z", "x"))
    fit = at("chain_mixture_emissions")
    both = drawn(plot.program(fit)).split()
    assert both.count("z") == 1 and both.count("x") == 1
    monkeypatch.setattr("pyroem.plot.programs.MOST_NODES", 2)
    with pytest.raises(ValueError, match="at most 2 nodes"):
        plot.program(fit)


def test_given_axes_are_drawn_on() -> None:
    fit = EM().fit(gaussian_mixture(2), blobs())
    axes = plt.subplots(2, 3)[1].ravel()
    assert plot.density(fit, ax=axes[0]) is axes[0]
    assert plot.contours(fit, ax=axes[1]) is axes[1]
    assert plot.responsibilities(fit, ax=axes[2]) is axes[2]
    assert plot.program(fit, ax=axes[3]) is axes[3]
    assert plot.likelihood(fit.curve("loc[0, 0]", points=5), ax=axes[4]) is axes[4]
    assert not axes[0].figure.legends


def test_pictures_leave_random_state_and_store_alone() -> None:
    fit = EM().fit(gaussian_mixture(2), blobs())
    pyro.clear_param_store()
    state = torch.get_rng_state()
    plot.density(fit), plot.contours(fit), plot.program(fit)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())


# ---------------------------------------------------------------------------------------
# The path


@pytest.mark.parametrize("solver", [EM, MAP, SVI])
def test_path_has_every_iteration(solver: Any) -> None:
    x, model = blobs(), gaussian_mixture(2)
    plain = solver(max_iter=7).fit(model, x, init="random", restarts=2)
    fit = solver(max_iter=7, keep_path=True).fit(model, x, init="random", restarts=2)
    assert not plain.path and len(fit.path) == fit.n_iter + 1
    for record, params in zip(fit.history, fit.path, strict=True):
        if solver is not SVI:
            value = float(pyroem.log_joint(model, params, x))
            assert value == pytest.approx(record.log_joint, abs=1e-8)
    torch.testing.assert_close(fit.params["loc"], plain.params["loc"])


def test_path_is_kept_across_an_interruption(tmp_path: Path) -> None:
    x, model = blobs(), gaussian_mixture(3)
    solver = EM(keep_path=True, tol=0, param_tol=0, max_iter=30)
    whole = solver.fit(model, x, init="random")
    path = tmp_path / "course"
    EM(keep_path=True, tol=0, param_tol=0, max_iter=10).fit(
        model, x, init="random", checkpoint=path, checkpoint_every=0
    )
    rest = solver.fit(model, x, init="random", checkpoint=path, checkpoint_every=0)
    assert len(rest.path) == len(whole.path) == 31
    assert all(torch.equal(a["loc"], b["loc"]) for a, b in zip(rest.path, whole.path, strict=True))


# ---------------------------------------------------------------------------------------
# The report


@pytest.mark.parametrize(
    "name", ["gaussian_mixture", "chain_sequences", "latent_class", "linear_regressions"]
)
def test_report_is_one_page_by_itself(name: str, tmp_path: Path) -> None:
    fit = at(name, 20)
    page = fit.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"(src|href)=[\"'](?!data:)", page) and "http" not in page
    assert page.count("<img") == page.count("data:image/png;base64,") >= 3
    assert "Not drawn" not in page
    assert f"{fit.log_likelihood:.6f}" in page and f"{fit.bic():.4f}" in page
    assert "rate of convergence is" in page and "std. error" in page
    assert "How EM updates each parameter" in page
    assert not plt.get_fignums()


def test_report_says_what_it_lacks(tmp_path: Path) -> None:
    x, _ = torch.cat([blobs(), blobs()], 1), None
    collapsed = torch.cat([x, x[:1].repeat(40, 1)])
    fit = EM(max_iter=60, floor=0.0).fit(gaussian_mixture(6), collapsed, init="random")
    page = fit.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "status bad" in page and "standard errors were left out" in page
    categories = EM(max_iter=5).fit(
        BY_NAME["multinomial_mixture"].model,
        *BY_NAME["multinomial_mixture"].data,
        init=BY_NAME["multinomial_mixture"].params,
    )
    assert categories.report(tmp_path / "more.html").exists()


def test_report_of_labelled_rows_draws_what_was_fitted(tmp_path: Path) -> None:
    x = blobs()
    labels = torch.full((200,), -1)
    labels[:10], labels[-10:] = 0, 1
    fit = EM().fit(gaussian_mixture(2), x, labels)
    page = fit.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Given, without parameters: label" in page and "label[0]" not in page


def test_report_of_many_parameters_has_them_all(tmp_path: Path) -> None:
    x = torch.cat([blobs()] * 4, 1) + 0.1 * torch.randn(200, 8, **DOUBLE)
    fit = EM(max_iter=5).fit(gaussian_mixture(2), x)
    page = fit.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<details>" in page and str(fit.params["loc"][1, 3].item()) in page


def test_report_of_restarts_counts_the_optima(tmp_path: Path) -> None:
    _, x = datasets.load("faithful")
    fit = EM().fit(gaussian_mixture(3), x, init="random", restarts=6)
    page = fit.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"6 starts ended in {len(fit.basins)} distinct optima" in page


def test_report_is_refused_before_any_work(tmp_path: Path) -> None:
    fit = at("gaussian_mixture")
    with pytest.raises(SettingError, match="cannot write"):
        fit.report(tmp_path / "missing" / "report.html")
    with pytest.raises(SettingError, match="cannot write"):
        fit.report(tmp_path)


def test_names_are_words_on_the_page(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("a<b> $\\x$", torch.tensor([-1.0, 1.0]))
        scale = pyro.param("s", torch.ones(()), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x<i>$", dist.Normal(loc[z], scale), obs=x)

    fit = EM(max_iter=10).fit(model, blobs()[:, 0])
    page = fit.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b> " not in page.split("</style>")[1].replace("<b>", "", 1) and "&lt;i&gt;" in page


def test_render_model_is_pyros(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def render(model: Any, args: Any, kwargs: Any, filename: Any, **settings: Any) -> str:
        seen.update(settings, args=args, filename=filename)
        return "graph"

    monkeypatch.setattr(pyro, "render_model", render)
    fit = EM(max_iter=1).fit(gaussian_mixture(2), blobs())
    assert plot.render_model(fit, "graph.pdf", render_params=False) == "graph"
    assert seen["render_distributions"] and not seen["render_params"]
    assert seen["filename"] == Path("graph.pdf") and torch.equal(seen["args"][0], blobs())


def test_components_under_the_fits_own_precision() -> None:
    fit = EM(dtype=torch.float32, max_iter=5).fit(gaussian_mixture(2), blobs())
    with isolated(torch.float64):
        found = fit.components()
    grid = torch.linspace(-30, 30, 6001, **DOUBLE)
    parts = found.density(grid)
    assert parts is not None
    assert float(torch.trapezoid(parts.sum(0), grid)) == pytest.approx(1, abs=1e-3)
    drawn(plot.contours(fit))


def test_known_states_are_certain_and_the_others_speak_of_themselves() -> None:
    x = blobs()[:, 0]
    labels = torch.cat([torch.zeros(120), torch.ones(80)]).long()
    known = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.6

    def model(x: Tensor, labels: Tensor, known: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([0.0, 1.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), obs=labels, obs_mask=known)
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    fit = EM(max_iter=3).fit(model, x, labels, known)
    found = fit.components()
    assert found.labels == ("z = 0", "z = 1")
    torch.testing.assert_close(found.weights, fit.responsibilities())
    torch.testing.assert_close(found.moments[0][:, 0], fit.params["loc"])
    grid = torch.linspace(-3, 6, 20, **DOUBLE)
    parts = dist.Normal(fit.params["loc"], 1.0).log_prob(grid[:, None]).exp().T
    torch.testing.assert_close(found.density(grid), fit.params["weights"][:, None] * parts)
    drawn(plot.responsibilities(fit))
