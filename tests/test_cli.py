"""The command line: what it passes on, what it prints, and how it refuses."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pyroem
from pyroem import EM, cli
from pyroem.cli import families, fitting, outputs, parquet, pictures
from pyroem.cli.program import make_parser
from pyroem.errors import SettingError
from pyroem.estimators import GaussianMixture, load
from pyroem.loop import State
from pyroem.models import gaussian_mixture

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
        ("adjust", "invalid choice: 'adjust'"),
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
    monkeypatch.setattr(outputs, "find_spec", lambda name: None)
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


# ---------------------------------------------------------------------------------------
# fit, predict, select

HEADER = ["colour", "size", "count", "yes", "height", "x", "y", "known", "times", "name"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty rows from two groups, with columns of all kinds; one colour and one height lack."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(60):
        k = n % 2
        rows.append(
            [
                "" if n == 3 else "red" if rng.random() < (0.9, 0.2)[k] else "blue",
                (1, 2)[int(rng.random() < (0.2, 0.9)[k])],
                rng.poisson((2, 12)[k]),
                int(rng.random() < (0.9, 0.15)[k]),
                "NA" if n == 5 else round(rng.normal((0, 5)[k], 1), 4),
                x := round(rng.uniform(0, 10), 4),
                round((1 + 2 * x, 20 - x)[k] + rng.normal(0, 0.5), 4),
                2 - k if n < 10 else "",
                1 + n % 3 % 2,
                f"row {n}",
            ]
        )
    path = tmp_path_factory.mktemp("data") / "mixed.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


def columns_of(text: str) -> dict[str, list[str]]:
    """A CSV text by its columns."""
    header, *rows = csv.reader(io.StringIO(text))
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def strictly(text: str) -> Any:
    """JSON, without the words for numbers that it has not."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def words(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that were printed, with single blanks."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_fit_prints_the_maximum_and_writes_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The optimum that R's mclust finds: log-likelihood -1130.26396, BIC 2322.19174."""
    model, picture = tmp_path / "model.json", tmp_path / "mixture.png"
    arguments = ["fit", "faithful", "--components", "2", "--explain"]
    assert cli.main([*arguments, "--output", str(model), "--plot", str(picture)]) == 0
    lines = words(capsys)
    assert "weight 0.3559 0.6441" in lines
    assert "waiting, sd 5.80494 6.00385" in lines
    assert any(line.startswith("log-likelihood -1130.2640, BIC 2322.1917, AIC") for line in lines)
    assert "Free parameters (df): 11" in lines
    assert any("closed form: covariance kernel" in line for line in lines)
    assert picture.stat().st_size > 0
    assert load(model).means_[0] == pytest.approx([2.03639, 54.47852], abs=1e-3)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical", "VEV", "EEI", "EII"])
def test_predict_says_what_the_fit_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, covariance: str
) -> None:
    model = str(tmp_path / "model.json")
    arguments = ["--components", "2", "--covariance", covariance, "--init", "kmeans"]
    assert cli.main(["fit", "faithful", *arguments, "--output", model]) == 0
    capsys.readouterr()
    assert cli.main(["predict", model, "faithful", "--probabilities", "--scores"]) == 0
    found = columns_of(capsys.readouterr().out)
    x = torch.as_tensor(pyroem.datasets.load("faithful")[1])
    program = gaussian_mixture(2, {"diag": "diagonal"}.get(covariance, covariance))
    fit = EM().fit(program, x, init="kmeans")
    order = fit.params["loc"][:, 0].argsort()
    assert found["row"] == [str(n) for n in range(1, 273)]
    place = order.argsort()[fit.predict(x)] + 1
    assert found["component"] == [str(k) for k in place.tolist()]
    first = [float(p) for p in found["probability_1"]]
    assert first == pytest.approx(fit.responsibilities(x)[:, order[0]].numpy(), abs=1e-9)
    log_density = [float(v) for v in found["log_density"]]
    assert log_density == pytest.approx(fit.log_prob(x).numpy(), abs=1e-8)


def test_missing_values_are_told_and_filled_in(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, rows, picture = (str(tmp_path / n) for n in ("m.json", "rows.csv", "p.png"))
    columns = "Ozone,Wind,Temp"
    arguments = ["--components", "2", "--columns", columns, "--max-iter", "3", "--init", "kmeans"]
    code = cli.main(["fit", "airquality", *arguments, "--output", model, "--plot", picture])
    assert code == 3
    lines = words(capsys)
    assert "Missing: 37 of 459 values" in lines
    assert any(line.startswith("Status: max iter, after 3 iterations.") for line in lines)
    note = "(the first 2 of 3 columns; 116 of 153 rows, the others lack a value)"
    assert f"Picture written to {picture} {note}" in lines
    assert cli.main(["predict", model, "airquality", "--impute", "--output", rows]) == 0
    assert capsys.readouterr().out == f"153 rows written to {rows}\n"
    found = columns_of(Path(rows).read_text())
    values = pyroem.datasets.load("airquality", columns.split(","))[1].numpy()
    estimator = load(model)
    del estimator.feature_names_in_
    expected = estimator.impute(values)
    for j, name in enumerate(columns.split(",")):
        assert [float(cell) for cell in found[name]] == pytest.approx(expected[:, j])


FAMILIES = {
    "student-t": "--columns height,x --covariance diag",
    "poisson": "--columns count --prior weak",
    "bernoulli": "--columns yes --prior weak",
    "categorical": "--columns colour,size,yes",
    "mixed": "--columns colour,count,yes,height --kinds count=poisson",
    "regression": "--columns x --response y",
}
SHOWN = {
    "student-t": ("degrees of freedom", "height, location", "x, scale"),
    "poisson": ("count, rate",),
    "bernoulli": ("yes = 1",),
    "categorical": ("colour = blue", "colour = red", "size = 1", "size = 2", "yes = 0"),
    "mixed": ("colour = red", "count, rate", "yes = 1", "height, mean", "height, sd"),
    "regression": ("intercept", "times x", "sd"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mixed: Path, family: str
) -> None:
    model = str(tmp_path / "model.json")
    arguments = ["--components", "2", "--family", family, *FAMILIES[family].split()]
    arguments += ["--init", "kmeans", "--max-iter", "50"]
    code = cli.main(["fit", str(mixed), *arguments, "--output", model])
    assert code in (0, 3)
    lines = words(capsys)
    for title in ("weight", *SHOWN[family]):
        assert sum(line.startswith(f"{title} ") for line in lines) == 1, title
    assert cli.main(["fit", str(mixed), *arguments, "--json"]) == code
    result = strictly(capsys.readouterr().out)
    assert result["fit"]["converged"] == (code == 0)
    assert [c["component"] for c in result["components"]] == [1, 2]
    assert sum(c["weight"] for c in result["components"]) == pytest.approx(1)
    strictly(Path(model).read_text())
    assert cli.main(["predict", model, str(mixed), "--probabilities", "--scores"]) == 0
    found = columns_of(capsys.readouterr().out)
    total = sum(float(v) for v in found["log_density"])
    assert total == pytest.approx(result["fit"]["log_likelihood"], abs=1e-6)
    likely = [1 + (float(p) < 0.5) for p in found["probability_1"]]
    assert found["component"] == [str(k) for k in likely]


@pytest.mark.parametrize("family", ["categorical", "mixed"])
def test_text_is_filled_in_and_unknown_text_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mixed: Path, family: str
) -> None:
    model, other = str(tmp_path / "model.json"), tmp_path / "other.csv"
    arguments = ["--components", "2", "--family", family, "--columns", "colour,yes,size"]
    arguments += ["--init", "kmeans", "--kinds", "size=categorical"][
        : 4 if family == "mixed" else 2
    ]
    assert cli.main(["fit", str(mixed), *arguments, "--output", model]) == 0
    # The same columns in another order, and beside others.
    other.write_text("size,z,yes,colour\n2,0,1,red\n2,0,0,green\n1,0,,blue\n")
    capsys.readouterr()
    assert cli.main(["predict", model, str(other), "--impute"]) == 0
    captured = capsys.readouterr()
    found = columns_of(captured.out)
    assert found["colour"][0] == "red" and found["colour"][2] == "blue"
    assert found["colour"][1] in ("red", "blue") and 0 <= float(found["yes"][2]) <= 1
    assert found["size"] == ["2", "2", "1"]
    assert "column 'colour': 1 values were not in the fit, such as 'green'" in captured.err
    assert captured.err.count("\n") == 1


def test_known_components_keep_their_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mixed: Path
) -> None:
    """Those of the file are the other way round than the order of the first column."""
    model, picture = str(tmp_path / "model.json"), str(tmp_path / "p.png")
    arguments = ["fit", str(mixed), "--components", "2", "--columns", "height", "--plot", picture]
    assert cli.main([*arguments, "--labels", "known", "--output", model]) == 0
    assert "Known components: 10 of 60 rows, from column known" in words(capsys)
    labelled = load(model).means_[:, 0]
    assert labelled == pytest.approx([5, 0], abs=0.5)
    assert cli.main([*arguments, "--output", model]) == 0
    assert load(model).means_[:, 0] == pytest.approx(labelled[::-1], abs=0.2)


def test_a_picture_has_the_numbers_of_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its looks are in the order of the first column, whatever the numbers are."""
    texts: list[str] = []

    def look(figure: Figure, path: Path) -> None:
        texts.extend(t.get_text() for legend in figure.legends for t in legend.get_texts())

    monkeypatch.setattr(Figure, "savefig", look)
    values = np.array([[4.0, 80.0], [2.0, np.nan], [2.0, 55.0]])
    pictures.draw_mixture(PARAMS, values, ["a", "b"], tmp_path / "p.png")
    assert texts == ["k = 2 (40%)", "k = 1 (60%)"]
    assert pictures.shown(values) == " (2 of 3 rows, the others lack a value)"


def test_components_that_are_all_known_are_not_moved(tmp_path: Path) -> None:
    path, model = tmp_path / "rows.csv", tmp_path / "model.json"
    path.write_text("x,known\n0,2\n1,2\n5,1\n7,1\n8,2\n")
    arguments = ["fit", str(path), "--components", "2", "--labels", "known", "--output", str(model)]
    assert cli.main(arguments) == 0
    assert load(model).means_[:, 0] == pytest.approx([6, 3])
    assert load(model).weights_ == pytest.approx([0.4, 0.6])


def test_a_weight_of_two_is_the_row_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(0, 1, 15), rng.normal(6, 1, 15)])
    weights = np.arange(30) % 3
    pairs = list(zip(x.tolist(), weights.tolist(), strict=True))
    (tmp_path / "a.csv").write_text("x,w\n" + "".join(f"{v!r},{w}\n" for v, w in pairs))
    (tmp_path / "b.csv").write_text("x\n" + "".join(f"{v!r}\n" * w for v, w in pairs))
    for name, more in (("a", ["--weights", "w"]), ("b", [])):
        arguments = ["fit", str(tmp_path / f"{name}.csv"), "--components", "2", *more]
        assert cli.main([*arguments, "--output", str(tmp_path / f"{name}.json")]) == 0
    one, two = (load(tmp_path / f"{name}.json") for name in "ab")
    assert one.means_ == pytest.approx(two.means_, abs=1e-4)
    assert one.weights_ == pytest.approx(two.weights_, abs=1e-4)


@pytest.mark.parametrize("more", [["--solver", "map"], ["--init", "thorough"], ["--prior", "weak"]])
def test_solver_start_and_prior(capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    """The optimum of Zucchini, MacDonald and Langrock (2016), Hidden Markov Models, section 1.2."""
    arguments = ["fit", "earthquakes", "--components", "2", "--columns", "count", "--json"]
    assert cli.main([*arguments, "--family", "poisson", *more]) == 0
    result = strictly(capsys.readouterr().out)
    rates = [component["rate"]["count"] for component in result["components"]]
    if "--prior" in more:
        assert result["fit"]["log_prior"] != 0 and result["fit"]["log_likelihood"] < -360.369
    else:
        assert result["fit"]["log_likelihood"] == pytest.approx(-360.369, abs=1e-3)
        assert rates == pytest.approx([15.778, 26.841], abs=2e-3)


def test_parquet(capsys: pytest.CaptureFixture[str], tmp_path: Path, mixed: Path) -> None:
    """A table as parquet gives what it gives as CSV; rows of results are read back."""
    cells = columns_of(mixed.read_text())
    table: dict[str, list[Any]] = {
        "colour": [c or None for c in cells["colour"]],
        "height": [None if c == "NA" else float(c) for c in cells["height"]],
        "yes": [bool(int(c)) for c in cells["yes"]],
        "x": [math.nan if n == 7 else float(c) for n, c in enumerate(cells["x"])],
    }
    source, model, rows = (tmp_path / n for n in ("t.parquet", "m.json", "rows.parquet"))
    parquet.write(source, table)
    arguments = ["--components", "2", "--init", "kmeans", "--json"]
    results = []
    for path in (source, mixed):
        options = ["--family", "mixed", "--columns", "colour,height,yes", *arguments]
        assert cli.main(["fit", str(path), *options]) == 0
        results.append(strictly(capsys.readouterr().out))
    assert results[0]["components"] == results[1]["components"]
    assert results[0]["data"]["missing"] == results[1]["data"]["missing"] == 2

    options = [*arguments[:-1], "--covariance", "spherical", "--output", str(model)]
    assert cli.main(["fit", str(source), *options]) == 0
    lines = words(capsys)
    assert "t: 60 rows, columns height, yes, x" in lines and "Missing: 2 of 180 values" in lines
    assert "left out colour: it is of type string" in lines
    assert cli.main(["predict", str(model), str(source), "--impute", "--output", str(rows)]) == 0
    found = parquet.sheet(rows)
    assert found.header == ["row", "component", "height", "yes", "x"]
    assert not any(math.isnan(v) for v in found.numbers(4))
    assert found.numbers(3) == [float(v) for v in table["yes"]]


def test_parquet_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.parquet"
    path.write_text("x\n1\n")
    assert "expected a parquet file" in error(capsys, "fit", str(path), "--components", "1")
    parquet.write(path, {"x": [1.0, math.inf], "t": ["a", "b"]})
    message = error(capsys, "fit", str(path), "--components", "1")
    assert "column 'x' (of type double), row 2: expected a finite number; got inf" in message
    message = error(capsys, "fit", str(path), "--components", "1", "--columns", "t")
    assert "column 't' (of type string), row 1: expected a finite number; got 'a'" in message
    monkeypatch.setattr(parquet, "find_spec", lambda name: None)
    message = error(capsys, "fit", str(path), "--components", "1")
    assert "needs pyarrow: pip install 'pyroem[parquet]'" in message


def test_select(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """mclust's BIC, with the other sign: EEE with 3 components, 2314.3 (VVV with 2: 2322.2)."""
    model, picture = tmp_path / "best.json", tmp_path / "bic.png"
    arguments = ["select", "faithful", "--components", "2-3", "--covariance", "EEE,VVV"]
    assert cli.main([*arguments, "--output", str(model), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "best: components 3, covariance EEE" in out and "2314.3" in out
    assert picture.stat().st_size > 0
    best = load(model)
    assert isinstance(best, GaussianMixture) and best.covariance_type == "EEE"
    x = pyroem.datasets.load("faithful")[1].numpy()
    assert list(best.feature_names_in_) == ["eruptions", "waiting"]
    del best.feature_names_in_
    assert best.bic(x) == pytest.approx(2314.30, abs=0.02)
    assert (np.diff(best.means_[:, 0]) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_select_among_families(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mixed: Path, family: str
) -> None:
    more = FAMILIES[family].replace("--prior weak", "").split()
    sizes = [1] if family == "student-t" else [1, 2]  # the search for its start takes seconds
    model = str(tmp_path / "model.json")
    arguments = ["select", str(mixed), "--family", family, *more]
    arguments += ["--components", ",".join(map(str, sizes))]
    code = cli.main([*arguments, "--criterion", "aic", "--json", "--output", model])
    assert code == 0
    result = strictly(capsys.readouterr().out)
    rows = result["selection"]["rows"]
    assert [row["components"] for row in rows] == sizes
    best = result["best"]
    assert best["fit"]["aic"] == min(row["aic"] for row in rows if row["counts"])
    assert cli.main(["predict", model, str(mixed), "--scores"]) == 0
    total = sum(float(v) for v in columns_of(capsys.readouterr().out)["log_density"])
    assert total == pytest.approx(best["fit"]["log_likelihood"], abs=1e-6)


def test_select_without_a_good_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "model.json"
    arguments = ["select", "faithful", "--components", "2", "--max-iter", "1"]
    assert cli.main([*arguments, "--output", str(model)]) == 3
    assert "Nothing is written: no fit ended well." in words(capsys)
    assert not model.exists()


def test_all_covariances(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["select", "earthquakes", "--columns", "count", "--components", "1", "--json"]
    for more, count in ((["--covariance", "all"], 2), (["--family", "poisson"], 1)):
        assert cli.main([*arguments, *more]) == 0
        assert len(strictly(capsys.readouterr().out)["selection"]["rows"]) == count


@dataclass(frozen=True, kw_only=True)
class Impatient(EM):
    """EM whose user presses Ctrl-C in the fourth iteration."""

    def step(self, problem: Any, state: State) -> State:
        if state.passes == 4:
            raise KeyboardInterrupt
        return super().step(problem, state)


def test_an_interrupted_fit_is_printed_and_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fitting, "solver_of", lambda options: Impatient())
    model = tmp_path / "model.json"
    arguments = ["--components", "2", "--init", "kmeans", "--output", str(model)]
    assert cli.main(["fit", "faithful", *arguments]) == 130
    assert any(line.startswith("Status: interrupted, after 3") for line in words(capsys))
    assert load(model).status_ == "interrupted"


def test_an_interrupt_before_there_is_a_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "fit", stop)
    assert cli.main(["fit", "faithful", "--components", "2"]) == 130
    assert capsys.readouterr().err == "pyroem: interrupted before there was a fit\n"


def test_a_collapsed_fit_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, model = tmp_path / "rows.csv", tmp_path / "model.json"
    path.write_text("x\n1\n1\n1\n1\n5\n5.5\n4\n")
    arguments = ["fit", str(path), "--components", "2", "--output", str(model)]
    assert cli.main(arguments) == 3
    assert any(line.startswith("Status: degenerate, after") for line in words(capsys))
    strictly(model.read_text())


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "faithful", "--components", "2", "--init", "kmeans"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*arguments, "--progress"]) == 0
    assert "iteration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit faithful", "--components"),
        ("fit absent.csv --components 2", "DATA: no file 'absent.csv'"),
        ("fit faithful --components 300", "--components: expected at least 300 rows"),
        ("fit faithful --components 2 --family round", "invalid choice: 'round'"),
        ("fit faithful --components 2 --covariance round", "--covariance: family gaussian expects"),
        (
            "fit faithful --components 2 --family poisson --covariance full",
            "--covariance: expected",
        ),
        ("fit faithful --components 2 --family student-t --covariance VEV", "family student-t"),
        ("fit faithful --components 2 --covariance VEV --prior weak", "--prior: expected with a"),
        ("fit faithful --components 2 --family mixed --prior weak", "--prior: expected with the"),
        ("fit faithful --components 2 --family regression", "--response: family regression needs"),
        ("fit faithful --components 2 --response waiting", "--response: expected with family"),
        ("fit faithful --components 2 --kinds waiting=poisson", "--kinds: expected with family"),
        ("fit bad.csv --components 2 --family mixed --kinds y=odd", "COLUMN=KIND"),
        ("fit bad.csv --components 2 --family mixed --columns y --kinds x=poisson", "--kinds: 'x'"),
        ("fit faithful --components 2 --family poisson", "column 'eruptions', line 2: family"),
        ("fit faithful --components 2 --family categorical", "text or whole numbers; got 3.6"),
        ("fit faithful --components 2 --family bernoulli --columns waiting", "expects 0 and 1"),
        (
            "fit faithful --components 2 --family poisson --plot a.png",
            "--plot: expected with family",
        ),
        ("fit faithful --components 2 --plot a.xyz", "--plot: cannot write a.xyz: expected"),
        ("fit faithful --components 2 --output no/m.json", "--output: cannot write no/m.json"),
        ("fit faithful --components 2 --output .", "--output: cannot write .: it is a folder"),
        ("fit faithful --components 2 --output a.png --plot a.png", "another file than that of"),
        ("fit bad.csv --components 2 --output bad.csv", "another file than that of DATA"),
        ("fit bad.csv --components 2 --columns x", "bad.csv, column 'x', line 3: expected"),
        ("fit bad.csv --components 2 --columns y --weights y", "'y' is the column of --weights"),
        ("fit bad.csv --components 2 --columns y --weights u", "'u' goes from -1 to 2"),
        ("fit bad.csv --components 2 --columns y --weights v", "line 3: expected a number; it is"),
        (
            "fit bad.csv --components 2 --columns y --labels u",
            "--labels: bad.csv, column 'u', line",
        ),
        ("fit bad.csv --components 2 --columns y --labels v", "up to 2; got 4"),
        ("fit bad.csv --components 2 --columns empty,y", "'empty' has none"),
        ("fit bad.csv --components 1 --family regression --columns v --response y", "a value is"),
        ("fit bad.csv --components 2 --columns y --weights u --labels u", "another column than"),
        ("select faithful --components 4-2", "expected whole numbers from 1 such as 1-9"),
        ("select faithful --components 0-2", "got '0-2'"),
        ("select faithful --covariance VVV,odd", "--covariance: family gaussian expects one of"),
        ("select faithful --criterion r2", "invalid choice: 'r2'"),
        ("select bad.csv --columns y", "--components: expected at least 9 rows"),
        ("predict absent.json faithful", "absent.json: No such file"),
        ("predict bad.csv faithful", "MODEL.json: expected a file that pyroem fit wrote"),
        ("predict bad.csv faithful --output rows.txt", "expected the ending .csv or .parquet"),
        ("predict bad.csv faithful --output bad.csv", "another file than that of"),
    ],
)
def test_refusals_of_the_models_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: str,
    message: str,
) -> None:
    def no_fit(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a fit was made")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "fit", no_fit)
    monkeypatch.setattr(pyroem, "select", no_fit)
    Path("bad.csv").write_text("x,y,u,v,empty\n1,2,-1,4,\nq,3,2,,\n2,4,1,1,\n")
    assert message in error(capsys, *arguments.split())
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_columns_are_matched_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mixed: Path
) -> None:
    model = str(tmp_path / "model.json")
    arguments = ["fit", str(mixed), "--columns", "x", "--init", "kmeans", "--output", model]
    assert cli.main([*arguments, "--components", "1"]) == 0
    capsys.readouterr()
    message = error(capsys, "predict", model, "faithful")
    assert "lacks the model's column x; it has eruptions, waiting" in message
    more = ["--components", "1", "--family", "regression", "--response", "7"]
    assert cli.main([*arguments, *more]) == 0
    (tmp_path / "new.csv").write_text("x\n1\n2\n")
    capsys.readouterr()
    assert cli.main(["predict", model, str(tmp_path / "new.csv")]) == 0
    found = columns_of(capsys.readouterr().out)
    slope, intercept = load(model).coef_[0, 0], load(model).intercept_[0]
    predicted = [float(v) for v in found["predicted"]]
    assert predicted == pytest.approx([intercept + slope, intercept + 2 * slope])
    assert "--scores: expected the response, column 'y'" in error(
        capsys, "predict", model, str(tmp_path / "new.csv"), "--scores"
    )
    assert "--impute: expected a model of rows" in error(
        capsys, "predict", model, str(mixed), "--impute"
    )
    estimator = GaussianMixture(1).fit(np.arange(6.0).reshape(3, 2))
    estimator.save(model)
    assert "has no names of columns" in error(capsys, "predict", model, "faithful")


@pytest.mark.parametrize("command", ["fit", "select", "predict"])
def test_absence_of_scikit_learn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(families, "find_spec", lambda name: None)
    arguments = {"fit": "faithful --components 2", "select": "faithful", "predict": "m faithful"}
    message = error(capsys, command, *arguments[command].split())
    assert f"pyroem {command} needs scikit-learn: pip install 'pyroem[sklearn]'" in message


def test_compare_works_without_scikit_learn() -> None:
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from pyroem.cli import main\n"
        "more = ['--components', '1', '--solvers', 'em', '--no-picture']\n"
        "more += ['--columns', 'Ozone', '--covariance', 'diag']\n"
        "assert main(['compare', 'airquality', *more]) == 0\n"
        "assert main(['fit', 'faithful', '--components', '2']) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Missing: 37 of 153 values" in done.stdout


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers by the names of their commands."""
    actions = make_parser()._subparsers._group_actions  # type: ignore[union-attr]
    return dict(actions[0].choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", commands())
def test_help_fits_a_terminal_and_tells_of_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert f"  pyroem {command}" in text and "exit codes:" in text
    _, _, rest = text.partition("\n\n")
    for action in commands()[command]._actions:
        assert action.help and action.help != argparse.SUPPRESS
        for name in action.option_strings[-1:] or [str(action.metavar)]:
            assert name in rest, name


def test_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for code in ("  0  ", "  2  ", "  3  ", "  130  "):
        assert code in text
    assert all(f"    {name} " in text for name in commands())


@pytest.mark.parametrize("components, code", [("2", 0), ("200", 3)])
def test_a_reader_that_has_seen_enough(components: str, code: int, tmp_path: Path) -> None:
    """What a pipe no longer takes is lost; the model is written, the exit code is the fit's."""
    model = tmp_path / "model.json"
    command = f"{sys.executable} -m pyroem fit faithful --components {components} --output {model}"
    done = subprocess.run(
        ["bash", "-c", f"{command} --explain | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [str(code)]
    assert "Traceback" not in done.stderr
    assert model.exists() or code
