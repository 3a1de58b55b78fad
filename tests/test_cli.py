"""The command line: what it passes on, what it prints, and how it refuses."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pyroem
from pyroem import cli
from pyroem.errors import SettingError

PARAMS = {
    "weights": torch.tensor([0.6, 0.4], dtype=torch.float64),
    "loc": torch.tensor([[4.3, 80.0], [2.0, 54.5]], dtype=torch.float64),
    "covariance": torch.diag_embed(torch.tensor([[0.16, 36.0], [0.09, 25.0]]).double()),
}


class Core:
    """Stands in for the solvers: remembers what it was asked for, and answers at once."""

    def __init__(self) -> None:
        self.settings: dict[str, dict[str, Any]] = {}
        self.request: dict[str, Any] = {}

    def em(self, **settings: Any) -> str:
        self.settings["em"] = settings
        return "em"

    def gradient(self, **settings: Any) -> str:
        self.settings[settings["optimizer"]] = settings
        return settings["optimizer"]

    def compare(self, model: Any, x: torch.Tensor, **request: Any) -> SimpleNamespace:
        self.request = {"model": model, "x": x, **request}
        history = [
            SimpleNamespace(iteration=i, log_joint=-4.0 / (i + 1), seconds=i) for i in (0, 1)
        ]
        fit = SimpleNamespace(
            params=PARAMS,
            history=history,
            status="converged",
            converged=True,
            message="",
            bic=lambda: 12.5,
            explain=lambda: "weights: closed form",
        )
        rows = [
            SimpleNamespace(
                name=name,
                log_likelihood=-2.0,
                gap=0.0,
                iterations=1,
                passes=2,
                seconds=0.5,
                status="CONVERGED",
                parameter_difference=None if name == "EM" else 1.25e-7,
            )
            for name in request["solvers"]
        ]
        return SimpleNamespace(
            rows=rows,
            fits={row.name: fit for row in rows},
            best=rows[0].name,
            to_dict=lambda: {"gap": math.inf, "loc": PARAMS["loc"]},
        )


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Core:
    stand_in = Core()
    replaced = {"EM": stand_in.em, "MAP": stand_in.gradient, "compare": stand_in.compare}
    for name, replacement in replaced.items():
        monkeypatch.setattr(pyroem, name, replacement, raising=False)
    monkeypatch.chdir(tmp_path)
    return stand_in


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command refuses with."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pyroem: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_defaults(core: Core, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["compare", "faithful", "--components", "2"]) == 0
    assert core.request["solvers"] == {
        "EM": "em",
        "MAP (Adam)": "adam",
        "MAP (L-BFGS)": "lbfgs",
    }
    assert core.settings["em"] == {"progress": False}
    assert core.settings["adam"] == {"optimizer": "adam", "progress": False}
    assert {key: core.request[key] for key in ("init", "seed", "restarts")} == {
        "init": "auto",
        "seed": 0,
        "restarts": 1,
    }
    assert core.request["x"].shape == (272, 2)
    assert (tmp_path / "pyroem-faithful.png").stat().st_size > 0
    out = capsys.readouterr().out
    assert "faithful: 272 rows, columns eruptions, waiting" in out
    assert "BIC 12.5000" in out
    assert "1.2e-07" in out
    assert "Picture written to pyroem-faithful.png" in out


def test_parameters_are_printed_in_the_order_of_the_first_column(
    core: Core, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["compare", "faithful", "--components", "2", "--no-picture"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "weight 0.4000 0.6000" in lines
    assert "eruptions, mean 2 4.3" in lines
    assert "waiting, sd 5 6" in lines


def test_settings_are_passed_on(core: Core) -> None:
    options = "--solvers lbfgs,em --seed 3 --restarts 4 --max-iter 7 --tol 1e-5 --no-picture"
    assert cli.main(["compare", "faithful", "--components", "2", *options.split()]) == 0
    assert list(core.request["solvers"]) == ["MAP (L-BFGS)", "EM"]
    given = {"max_iter": 7, "tol": 1e-5, "progress": False}
    assert core.settings["em"] == given
    assert core.settings["lbfgs"] == {"optimizer": "lbfgs", **given}
    assert (core.request["seed"], core.request["restarts"]) == (3, 4)


def test_csv_file_and_columns(
    core: Core, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.csv").write_text('"x, cm",y,z\n1,2,a\n3,4,b\n')
    arguments = ["compare", "mine.csv", "--components", "2", "--no-picture"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "mine: 2 rows, columns x, cm, y" in out
    assert "left out z: line 2: 'a' is not a number" in out
    assert cli.main([*arguments, "--columns", '2,"x, cm"']) == 0
    assert core.request["x"].tolist() == [[2, 1], [4, 3]]
    assert "left out" not in capsys.readouterr().out


def test_no_picture(core: Core, tmp_path: Path) -> None:
    cli.main(["compare", "faithful", "--components", "2", "--no-picture"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_picture_of_the_kind_asked_for(core: Core, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"picture.{ending}"
    cli.main(["compare", "faithful", "--components", "2", "--output", str(path)])
    assert path.stat().st_size > 0


def test_json_is_strict(core: Core, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    cli.main(["compare", "faithful", "--components", "2", "--no-picture", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["data"] == {"name": "faithful", "rows": 272, "columns": ["eruptions", "waiting"]}
    assert result["best"]["solver"] == "EM"
    assert result["best"]["weights"] == [0.4, 0.6]
    assert result["comparison"] == {"gap": None, "loc": PARAMS["loc"].tolist()}


def test_explain(core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "faithful", "--components", "2", "--no-picture", "--solvers", "em"]
    cli.main(arguments)
    assert "closed form" not in capsys.readouterr().out
    cli.main([*arguments, "--explain"])
    assert "How EM updates the parameters:\nweights: closed form" in capsys.readouterr().out


def test_table_on_a_terminal(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for width in ("120", "40"):
        terminal = Terminal()
        monkeypatch.setenv("COLUMNS", width)
        monkeypatch.setattr(sys, "stdout", terminal)
        assert cli.main(["compare", "faithful", "--components", "2", "--no-picture"]) == 0
        assert "EM" in terminal.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "COMMAND"),
        ("fit", "invalid choice: 'fit'"),
        ("compare faithful", "--components"),
        ("compare faithful --components 0", "expected a whole number from 1; got '0'"),
        ("compare faithful --components two", "got 'two'"),
        ("compare faithful --components 2 --covariance round", "invalid choice: 'round'"),
        ("compare faithful --components 2 --solvers em,newton", "got 'em,newton'"),
        ("compare faithful --components 2 --solvers em,em", "different solvers"),
        ("compare faithful --components 2 --tol 0", "expected a positive number; got '0'"),
        ("compare faithful --components 2 --tol nan", "expected a positive number"),
        ("compare faithful --components 2 --max-iter -3", "expected a whole number"),
        ("compare faithful --components 2 --restarts 1.5", "expected a whole number"),
        ("compare faithful --components 2 --no-picture --output a.png", "not allowed with"),
        ("compare faithful --components 2 --output a.xyz", "cannot write a.xyz: expected"),
        ("compare faithful --components 2 --output picture", "cannot write picture: expected"),
        ("compare faithful --components 2 --output no/a.png", "there is no folder no"),
        ("compare faithful --components 2 --json no/a.json", "there is no folder no"),
        ("compare faithful --components 2 --json .", "it is a folder"),
        ("compare faithful --components 2 --columns waitin", "Did you mean 'waiting'?"),
        ("compare faithful --components 2 --columns 3", "expected a column from 1 to 2; got 3"),
        ("compare faithful --components 273", "expected at least 273 rows"),
        ("compare absent.csv --components 2", "no file 'absent.csv', and no data set"),
        ("compare . --components 2", ".: Is a directory"),
        ("compare bad.csv --components 2 --columns x", "bad.csv, column 'x', line 3: expected"),
    ],
)
def test_refusals_are_one_line(
    core: Core,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: str,
    message: str,
) -> None:
    (tmp_path / "bad.csv").write_text("x,y\n1,2\nq,3\n")
    assert message in error(capsys, *arguments.split())
    assert not core.request


def test_errors_of_the_core_are_one_line(
    core: Core, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SettingError("restarts: expected\n  fewer.")

    monkeypatch.setattr(pyroem, "compare", refuse)
    assert cli.main(["compare", "faithful", "--components", "2", "--no-picture"]) == 2
    assert capsys.readouterr().err == "pyroem: error: restarts: expected fewer.\n"


def test_absence_of_matplotlib_is_said_before_the_fit(
    core: Core, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    message = error(capsys, "compare", "faithful", "--components", "2")
    assert "pip install 'pyroem[plot]', or --no-picture" in message
    assert not core.request


def test_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["datasets"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "airquality: 153 rows, columns Ozone, Solar.R, Wind, Temp, Month, Day",
        "earthquakes: 107 rows, columns year, count",
        "faithful: 272 rows, columns eruptions, waiting",
    ]


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_python_m_pyroem(option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyroem", option], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pyroem " if option == "--version" else "usage: pyroem")


def test_faithful_with_the_real_solvers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The optimum that R's mclust finds: log-likelihood -1130.26396, BIC 2322.19174."""
    picture, results = tmp_path / "faithful.png", tmp_path / "faithful.json"
    arguments = ["compare", "faithful", "--components", "2", "--explain"]
    assert cli.main([*arguments, "--output", str(picture), "--json", str(results)]) == 0
    out = capsys.readouterr().out
    assert "-1130.263960" in out
    assert "BIC 2322.1917" in out
    assert picture.stat().st_size > 0
    best = json.loads(results.read_text())["best"]
    assert best["weights"] == pytest.approx([0.35587, 0.64413], abs=1e-4)
    assert best["means"][0] == pytest.approx([2.03639, 54.47852], abs=1e-3)
    assert best["sds"][1] == pytest.approx([0.16996843**0.5, 36.04621**0.5], abs=1e-3)
