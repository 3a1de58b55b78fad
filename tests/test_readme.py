"""The README's tables say what is: each row names programs, and the rung of their parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from torch import Tensor

from pyroem import EM, ModelError
from pyroem.problem import pose

README = (Path(__file__).parents[1] / "README.md").read_text()
BY_NAME: dict[str, Any] = {p.name: (p.model, p.data) for p in PROBLEMS}
X = torch.linspace(-2.0, 2.0, 40, dtype=torch.float64)


NET = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


def neural_regressions(x: Tensor, y: Tensor) -> None:
    """A small network for the means."""
    pyro.module("net", NET)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        loc = NET(x.unsqueeze(-1))
        pyro.sample("y", dist.Normal(torch.where(z == 0, loc[:, 0], loc[:, 1]), 1.0), obs=y)


def probit_regression(x: Tensor, y: Tensor) -> None:
    """A link that no kernel has."""
    slope = pyro.param("slope", torch.tensor([0.3, -0.3]))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Bernoulli(torch.special.ndtr(slope[z] * x)), obs=y)


def mixture_in_one_site(x: Tensor) -> None:
    """A mixture without an assignment site."""
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        components = dist.Normal(loc, torch.ones(2))
        mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)
        pyro.sample("x", mixture, obs=x)


BY_NAME["neural_regressions"] = neural_regressions, (X, X**2)
BY_NAME["probit_regression"] = probit_regression, (X, (X > 0).double())
BY_NAME["mixture_in_one_site"] = mixture_in_one_site, (X,)


def rows(title: str) -> list[list[str]]:
    """The cells of a table of the README, by its heading row."""
    table = README.split(title)[1].split("\n\n")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


RUNGS = rows("| what | rung | for example |")


@pytest.mark.parametrize("row", RUNGS, ids=lambda row: row[2])
def test_the_rung_of_an_example_is_what_the_readme_says(row: list[str]) -> None:
    _, rung, example = row
    for name, parameter in re.findall(r"`(\w+)`: `([\w.$]+)`", example):
        model, data = BY_NAME[name]
        found = pose(model, data, {}).plan.blocks[parameter].rung
        assert found.value == rung, (name, parameter)


def test_every_rung_has_a_row() -> None:
    assert {row[1] for row in RUNGS} == {
        "closed form",
        "regression",
        "on statistics",
        "on rows",
        "gradient",
    }


def latent_of_each_row(x: Tensor) -> None:
    """A continuous latent variable of each row."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        height = pyro.sample("height", dist.Normal(z.double(), 1.0))
        pyro.sample("x", dist.Normal(height, 1.0), obs=x)


def infinite_support(x: Tensor) -> None:
    """An assignment with infinitely many states."""
    with pyro.plate("rows", len(x)):
        n = pyro.sample("n", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def subsampled(x: Tensor) -> None:
    """A plate that shows some of the rows."""
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x), subsample_size=10) as index:
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x[index])


def loop_over_rows(x: Tensor) -> None:
    """An assignment that is used as a Python number."""
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    for i, value in enumerate(x[:5]):
        z = pyro.sample(f"z_{i}", dist.Categorical(torch.ones(2)))
        pyro.sample(f"x_{i}", dist.Normal(loc[int(z)], 1.0), obs=value)


UNSUPPORTED: list[Callable[..., None]] = [
    latent_of_each_row,
    infinite_support,
    subsampled,
    loop_over_rows,
]


def test_what_is_not_supported_is_refused_and_told() -> None:
    told = {re.sub(r"`", "", example): what for what, example in rows("| not supported | for")}
    assert set(told) == {program.__name__ for program in UNSUPPORTED}
    for program in UNSUPPORTED:
        with pytest.raises(ModelError):
            EM().fit(program, X)


def test_the_first_example_runs_and_draws_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    code = README.split("## A first fit")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), names)
    assert names["fit"].converged
    picture = re.search(r"!\[.*\]\(examples/(.*)\)", README)
    assert picture and (tmp_path / picture[1]).stat().st_size > 1000
    assert (Path(__file__).parents[1] / "examples" / picture[1]).exists()


def test_every_example_is_in_the_table() -> None:
    named = set(re.findall(r"`(\w+\.py)`", README.split("## Examples")[1].split("## Limits")[0]))
    scripts = {path.name for path in (Path(__file__).parents[1] / "examples").glob("*.py")}
    assert named - {"problems.py", "test_laws.py"} == scripts
