"""Pictures are drawn from stand-ins: only what they read of a fit matters here."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor

from pyroem import plot

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def fit(gaps: list[float], pace: float = 0.01, best: float = -100.0) -> SimpleNamespace:
    history = [
        SimpleNamespace(iteration=i, log_joint=best - gap, seconds=pace * i, passes=i)
        for i, gap in enumerate(gaps)
    ]
    return SimpleNamespace(history=history)


def compared(**fits: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(fits=fits)


def lines(ax: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[arg-type]
        for line in ax.lines
    }


def params(K: int, D: int, covariance: str) -> dict[str, Tensor]:
    torch.manual_seed(K * 10 + D)
    loc = torch.randn(K, D, dtype=torch.float64)
    factor = 0.3 * torch.randn(K, D, D, dtype=torch.float64)
    full = factor @ factor.mT + 0.1 * torch.eye(D, dtype=torch.float64)
    spread = {
        "full": {"covariance": full},
        "tied": {"covariance": full[0]},
        "diagonal": {"scale": 0.5 + torch.rand(K, D, dtype=torch.float64)},
        "spherical": {"scale": 0.5 + torch.rand(K, dtype=torch.float64)},
    }[covariance]
    return {"weights": torch.full((K,), 1 / K, dtype=torch.float64), "loc": loc, **spread}


def test_gap_is_to_the_best_over_all_fits() -> None:
    by_iteration, by_seconds = plot.comparison(
        compared(EM=fit([10.0, 1.0, 0.0]), Adam=fit([10.0, 5.0, 2.5], pace=0.1))
    )
    drawn = lines(by_iteration)
    assert drawn["Adam"][0] == [0, 1, 2]
    assert drawn["Adam"][1] == pytest.approx([10, 5, 2.5])
    assert drawn["EM"][1] == pytest.approx([10, 1, 1e-10])
    assert lines(by_seconds)["Adam"][0] == pytest.approx([0, 0.1, 0.2])
    assert by_iteration.get_yscale() == "log"
    assert by_iteration.get_xlabel() == "iteration"
    assert by_seconds.get_xlabel() == "seconds"
    assert "1e-10" in by_iteration.get_ylabel()


def test_floor_is_never_below_the_rounding_of_the_log_joint() -> None:
    ax, _ = plot.comparison(compared(EM=fit([1.0, 0.0], best=-3e7)))
    assert lines(ax)["EM"][1][-1] == pytest.approx(1e-7)
    assert "1e-07" in ax.get_ylabel()


def test_records_that_are_not_finite_are_left_out_and_said() -> None:
    ax, _ = plot.comparison(
        compared(EM=fit([4.0, math.nan, 0.0]), Adam=fit([math.nan]), SVI=fit([math.inf, 2.0]))
    )
    drawn = lines(ax)
    assert drawn["EM"][0] == [0, 2]
    assert drawn["Adam (no finite value)"] == ([], [])
    assert drawn["SVI"][0] == [1]


def test_nothing_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite log-joint"):
        plot.comparison(compared(EM=fit([math.nan]), Adam=fit([])))


@pytest.mark.parametrize("count", [1, 2, 3000])
def test_any_length_of_history_is_drawn(tmp_path: Path, count: int) -> None:
    gaps = [100 * 0.99**i for i in range(count)]
    axes = plot.comparison(compared(EM=fit(gaps), Adam=fit(gaps, pace=0.0)))
    plt.savefig(tmp_path / "picture.png")
    assert axes[0].get_xlim()[0] == 0 or count == 1


def test_looks_differ_in_colour_and_in_line_or_marker() -> None:
    ax, _ = plot.comparison(compared(**{f"solver {i}": fit([2.0, 1.0]) for i in range(7)}))
    assert len({line.get_color() for line in ax.lines}) == 7
    assert len({line.get_marker() for line in ax.lines}) == 7


def test_legend_covers_no_line() -> None:
    axes = plot.comparison(compared(EM=fit([1.0, 0.1]), Adam=fit([1.0, 0.5])))
    figure: Any = axes[0].figure
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert all(not legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in axes)


def test_given_axes_are_drawn_on() -> None:
    figure, grid = plt.subplots(2, 2)
    assert plot.comparison(compared(EM=fit([1.0, 0.0])), grid[0])[1] is grid[0][1]
    assert (
        plot.fitted_mixture(params(2, 1, "full"), torch.rand(9, 1), ["a"], grid[1][0])
        is (grid[1][0])
    )
    assert not figure.legends


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
@pytest.mark.parametrize("D", [1, 2, 3])
def test_every_mixture_is_drawn(tmp_path: Path, covariance: str, D: int) -> None:
    x = torch.randn(50, D, dtype=torch.float64)
    ax = plot.fitted_mixture(params(3, D, covariance), x, ["a", "b", "c"][:D])
    plt.savefig(tmp_path / "picture.png")
    assert ax.get_xlabel() == "a"
    assert ax.get_ylabel() == ("density" if D == 1 else "b")
    assert ax.get_title(loc="right").startswith("first 2 of 3 columns") == (D == 3)
    assert sum("33%" in label for label in lines(ax)) == 3


def test_ellipse_is_where_the_distance_is_one() -> None:
    values = params(1, 2, "full")
    ax = plot.fitted_mixture(values, torch.randn(9, 2), ["a", "b"])
    outline = torch.tensor(lines(ax)["k = 1 (100%)"], dtype=torch.float64).T - values["loc"]
    distance = (outline @ values["covariance"][0].inverse() * outline).sum(-1)
    torch.testing.assert_close(distance, torch.ones_like(distance))


def test_densities_integrate_to_the_weights() -> None:
    values = params(2, 1, "spherical")
    x = torch.tensor([[-20.0], [20.0]])
    grid, total = lines(plot.fitted_mixture(values, x, ["a"]))["mixture"]
    assert torch.trapezoid(torch.tensor(total), torch.tensor(grid)) == pytest.approx(1, abs=1e-6)


def test_collapsed_component_does_not_stop_the_picture(tmp_path: Path) -> None:
    values = params(3, 2, "full")
    values["covariance"][0] = math.nan
    values["covariance"][1] = 0.0
    ax = plot.fitted_mixture(values, torch.randn(9, 2), ["a", "b"])
    plt.savefig(tmp_path / "picture.png")
    assert sum("not finite" in label for label in lines(ax)) == 1


@pytest.mark.parametrize("K", [12, 30])
def test_many_components_leave_room(tmp_path: Path, K: int) -> None:
    ax = plot.fitted_mixture(params(K, 2, "full"), torch.randn(9, 2), ["a", "b"])
    plt.savefig(tmp_path / "picture.png")
    assert ax.get_window_extent().height > 100


def test_columns_must_name_those_of_x() -> None:
    with pytest.raises(ValueError, match=r"shape \[N, 1\]; got \[9, 2\]"):
        plot.fitted_mixture(params(2, 2, "full"), torch.randn(9, 2), ["a"])


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_moments_are_ordered_and_of_full_shape(covariance: str) -> None:
    values = params(3, 2, covariance)
    weights, means, covariances = plot.mixture_moments(values)
    assert weights.shape == (3,)
    assert covariances.shape == (3, 2, 2)
    assert means[:, 0].tolist() == sorted(values["loc"][:, 0].tolist())
    if covariance == "spherical":
        order = values["loc"][:, 0].argsort()
        torch.testing.assert_close(covariances[:, 1, 1].sqrt(), values["scale"][order])


def test_names_are_no_formulas(tmp_path: Path) -> None:
    comparison = compared(**{"$\\frac$": fit([1.0, 0.0])})
    figure = plot.report(comparison, params(2, 2, "full"), torch.randn(9, 2), ["$\\x$", "b ($)"])
    figure.savefig(tmp_path / "picture.png")


def test_report_is_one_figure_of_three_panels(tmp_path: Path) -> None:
    values = params(2, 2, "tied")
    comparison = compared(EM=fit([1.0, 0.0]), Adam=fit([1.0, 0.5]))
    figure = plot.report(comparison, values, torch.randn(20, 2), ["a", "b"])
    figure.savefig(tmp_path / "picture.png")
    assert [ax.get_xlabel() for ax in figure.axes] == ["a", "iteration", "seconds"]
    assert not plt.get_fignums()


def test_style_of_the_user_is_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    plot.comparison(compared(EM=fit([1.0, 0.0])))
    assert dict(matplotlib.rcParams) == before


def test_absence_of_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'pyroem\[plot\]'"):
        plot.comparison(compared(EM=fit([1.0, 0.0])))
