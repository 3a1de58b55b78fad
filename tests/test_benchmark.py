"""Several solvers on several problems: what the table says is what the runs did."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyroem
from pyroem import EM, MAP, Benchmark, SettingError, compare, datasets
from pyroem.loop import State
from pyroem.models import gaussian_mixture, poisson_mixture, student_t_mixture
from pyroem.problem import Problem
from pyroem.structure import Params

FAITHFUL = datasets.load("faithful")[1]
SOLVERS = {"EM": EM(), "L-BFGS": MAP(), "cut short": EM(max_iter=2)}


def counts(seed: int) -> tuple[Any, Tensor]:
    """Fresh data for each seed."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.tensor([2.0, 9.0])[torch.randint(2, (100,), generator=generator)]
    return poisson_mixture(2), torch.poisson(rate, generator=generator).unsqueeze(-1)


PROBLEMS: dict[str, Any] = {"faithful": (gaussian_mixture(3), FAITHFUL), "counts": counts}


@pytest.fixture(scope="module")
def found() -> Benchmark:
    return pyroem.benchmark(PROBLEMS, SOLVERS, seeds=3)


def row_of(found: Benchmark, problem: str, solver: str) -> pyroem.BenchmarkRow:
    (row,) = [r for r in found.rows if (r.problem, r.solver) == (problem, solver)]
    return row


def test_a_row_for_each_problem_and_solver(found: Benchmark) -> None:
    pairs = [(row.problem, row.solver) for row in found.rows]
    assert pairs == [(p, s) for p in PROBLEMS for s in SOLVERS]
    assert not found.missing and all(row.error is None for row in found.rows)


def test_the_runs_are_those_of_a_comparison(found: Benchmark) -> None:
    model, x = PROBLEMS["faithful"]
    alone = compare(model, x, solvers=SOLVERS, seeds=3, init="random")
    study = found.studies["faithful"]
    assert study.best == alone.best
    for seed, comparison in alone.comparisons.items():
        for own, other in zip(study.comparisons[seed].rows, comparison.rows, strict=True):
            assert (own.name, own.log_joint, own.passes) == (
                other.name,
                other.log_joint,
                other.passes,
            )


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_sums_up_its_runs(found: Benchmark, problem: str, solver: str) -> None:
    row = row_of(found, problem, solver)
    comparisons = found.studies[problem].comparisons.values()
    runs = [r for c in comparisons for r in c.rows if r.name == solver]
    best = [max(r.log_joint for r in c.rows) for c in comparisons]
    if problem == "faithful":  # one data set: one optimum
        best = [max(best)] * 3
    gaps = [b - r.log_joint for b, r in zip(best, runs, strict=True)]
    assert row.runs == 3
    assert row.reached == sum(gap <= found.near for gap in gaps) / 3
    assert row.converged == sum(r.converged for r in runs) / 3
    assert row.gap is not None and row.gap[1] == pytest.approx(np.median(gaps), abs=1e-12)
    for name in ("iterations", "passes", "seconds"):
        expected = np.quantile([getattr(r, name) for r in runs], [0.25, 0.5, 0.75])
        assert getattr(row, name) == pytest.approx(expected)


def test_a_solver_that_does_not_get_there_is_not_called_fast(found: Benchmark) -> None:
    for problem in PROBLEMS:
        rows = [row for row in found.rows if row.problem == problem]
        short = row_of(found, problem, "cut short")
        medians = {r.solver: r.seconds[1] for r in rows if r.seconds is not None}
        assert short.reached == 0 and short.cost is None and short.ratio is None
        costs = {r.solver: medians[r.solver] / r.reached for r in rows if r.reached}
        assert "cut short" not in costs and len(costs) == 2
        for row in rows[:2]:
            assert row.cost == pytest.approx(costs[row.solver])
            assert row.ratio == pytest.approx(costs[row.solver] / min(costs.values()))
    lines = [line for line in str(found).splitlines() if "cut short" in line]
    assert len(lines) == 2 and all(line.endswith("never reached") for line in lines)
    assert found.to_markdown().count("| never reached |") == 2
    assert found.to_markdown(wide=True).count("| never (0/3) |") == 2


def test_a_collapse_has_not_reached_the_optimum() -> None:
    # Two components on a row that stands twice: its likelihood has no bound.
    x = torch.cat([torch.randn(40, 1), torch.full((2, 1), 9.0)]).double()
    narrow = {"weights": [0.9, 0.1], "loc": [[0.0], [9.0]], "covariance": [[[1.0]], [[0.01]]]}
    solvers = {"collapses": EM(), "held": EM(fixed=["covariance"])}
    found = pyroem.benchmark({"x": (gaussian_mixture(2), x)}, solvers, seeds=1, init=narrow)
    (comparison,) = found.studies["x"].comparisons.values()
    first, second = comparison.rows
    assert first.status == "degenerate" and first.log_joint > second.log_joint
    assert [row.reached for row in found.rows] == [0, 1]
    assert row_of(found, "x", "collapses").ratio is None


class Late(EM):
    """Cannot work on the seeds after the first."""

    calls = 0

    def check(self, problem: Problem) -> None:
        Late.calls += 1
        if Late.calls > 1:
            raise SettingError("too late")


def test_an_error_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Late, "calls", 0)
    solvers = {"a|b": EM(fixed=["nothing"]), "EM": EM(), "late": Late()}
    problems = {
        "counts": (poisson_mixture(2), counts(0)[1]),
        "none": (student_t_mixture(2), torch.ones(5, 1, 1)),
    }
    found = pyroem.benchmark(problems, solvers, seeds=2)
    first = row_of(found, "counts", "a|b")
    assert first.error is not None and "no parameter 'nothing'" in first.error
    assert first.runs == 0 and first.seconds is None and first.ratio is None
    assert row_of(found, "counts", "EM").runs == 2
    assert row_of(found, "counts", "EM").ratio == 1
    late = row_of(found, "counts", "late")
    assert (late.runs, late.error, late.ratio) == (1, "too late", None)
    # A problem on which none can work.
    assert list(found.studies) == ["counts"]
    for name in solvers:
        assert row_of(found, "none", name).error
    assert "counts, late: too late" in str(found)
    assert "| counts | a\\|b | error |" in found.to_markdown()
    read = json.loads(found.to_json())
    assert [row["error"] is None for row in read["rows"]] == [
        row.error is None for row in found.rows
    ]


@dataclass(frozen=True, kw_only=True)
class Interrupted(EM):
    """Ctrl-C is pressed in the third comparison."""

    begun: tuple[list[int], ...] = ([0],)

    def begin(self, problem: Problem, params: Params) -> State:
        self.begun[0][0] += 1
        if self.begun[0][0] == 6:  # begun twice a run: once before the clock starts
            signal.raise_signal(signal.SIGINT)
        return super().begin(problem, params)


def test_an_interrupt_keeps_what_is_there() -> None:
    solvers = {"EM": EM(), "interrupted": Interrupted(begun=([0],))}
    problems: dict[str, Any] = {"a": (poisson_mixture(2), counts(0)[1]), "b": counts}
    before = signal.getsignal(signal.SIGINT)
    found = pyroem.benchmark(problems, solvers, seeds=4)
    assert signal.getsignal(signal.SIGINT) is before
    assert found.missing == {"a": (2, 3), "b": (0, 1, 2, 3)}
    assert list(found.studies) == ["a"] and list(found.studies["a"].comparisons) == [0, 1]
    assert [(row.solver, row.runs) for row in found.rows] == [("EM", 2), ("interrupted", 2)]
    assert "interrupted; missing: a (seeds 2 to 3), b (seeds 0 to 3)" in str(found)
    assert json.loads(found.to_json())["missing"] == {"a": [2, 3], "b": [0, 1, 2, 3]}


def test_an_interrupt_before_there_is_anything() -> None:
    with pytest.raises(KeyboardInterrupt):
        pyroem.benchmark({"counts": counts}, {"x": Interrupted(begun=([4],))}, seeds=2)


def test_fresh_data_for_each_seed(found: Benchmark) -> None:
    study = found.studies["counts"]
    assert study.best is None
    for seed, comparison in study.comparisons.items():
        alone = EM().fit(*counts(seed), seed=seed, init="random")
        assert comparison.fits["EM"].log_joint == alone.log_joint
    assert "of the best of its seed" in str(study)


def test_all_of_it_as_json(found: Benchmark) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(found.to_json(), parse_constant=refuse)  # NaN, Infinity
    assert read["near"] == found.near and read["missing"] == {}
    for own, row in zip(read["rows"], found.rows, strict=True):
        assert own["problem"] == row.problem and own["ratio"] == row.ratio
        assert row.seconds is not None and own["seconds"] == list(row.seconds)
    assert len(read["runs"]) == 18
    frame = found.to_pandas()
    assert list(frame["solver"]) == [run["solver"] for run in read["runs"]]
    share = frame[frame.problem == "faithful"].groupby("solver")["reached"].mean()
    for name in SOLVERS:
        assert share[name] == row_of(found, "faithful", name).reached


def test_tables(found: Benchmark) -> None:
    lines = found.to_markdown(wide=True).splitlines()
    assert lines[0] == "| problem | EM | L-BFGS | cut short |"
    for problem, line in zip(PROBLEMS, lines[2:4], strict=True):
        rows = [row for row in found.rows if row.problem == problem]
        (fastest,) = [row.solver for row in rows if row.ratio == 1]
        bold = [i for i, cell in enumerate(line.split(" | ")) if cell.startswith("**")]
        assert [list(SOLVERS)[i - 1] for i in bold] == [fastest]
    assert found._repr_html_().count("<tr>") == 7
    assert repr(found) == str(found)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pyroem.benchmark({"counts": counts}, {"EM": EM()}, seeds=1, progress=True)
    captured = capsys.readouterr()
    assert captured.err.startswith("benchmark: counts, seed 0  0/1  [----") and not captured.out


def test_the_default_solvers() -> None:
    found = pyroem.benchmark({"counts": (poisson_mixture(2), counts(0)[1])}, seeds=1)
    assert len(found.rows) == 6
    assert all(row.reached == 1 for row in found.rows)


@pytest.mark.parametrize(
    "problems, settings, message",
    [
        ([], {}, "problems: expected a dict .*, got list"),
        ({}, {}, "problems: expected a dict .*, got {}"),
        ({"x": 3}, {}, "problems: 'x' must be a tuple .*, got int"),
        ({"x": (FAITHFUL,)}, {}, "problems: 'x' must be a tuple .*, got tuple"),
        ({"x": lambda seed: FAITHFUL}, {}, "got what its function returned: Tensor"),
        ({"x": gaussian_mixture(2)}, {}, "the function of 'x' failed for seed 0 .ValueError"),
        ({"x": counts}, {"seeds": 0}, "seeds: expected a positive integer, got 0"),
        ({"x": counts}, {"near": -1.0}, "near: expected a number of nats >= 0, got -1.0"),
        ({"x": counts}, {"solvers": {}}, "solvers: expected at least one"),
        ({"x": counts}, {"solvers": {"EM": EM}}, "'EM' must be a solver such as EM"),
    ],
)
def test_requests_at_fault(problems: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pyroem.benchmark(problems, **settings)
