"""A fit that was broken off ends where one without a break ends, to the last bit."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from torch import Tensor
from torch.distributions import constraints

import pyroem
import pyroem.batch
import pyroem.checkpoint
import pyroem.loop
import pyroem.progress
import pyroem.starts
import pyroem.stored
import pyroem.together
from pyroem import EM, MAP, Fit, SettingError, Status, StepwiseEM
from pyroem.loop import State
from pyroem.progress import Pace, Progress, Trend, duration, fitted

BY_NAME = {p.name: p for p in PROBLEMS}
GAUSSIAN = BY_NAME["gaussian_mixture"]


def data(rows: int = 120) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    return noise + 2.2 * (torch.arange(rows) % 2)


def pair(x: Tensor, kind: Any = dist.Normal) -> None:
    """Two states that overlap, and starts that have to be sought."""
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", kind(loc[z], scale[z]), obs=x)


def two_assignments(x: Tensor) -> None:
    """A plain start that tells the states apart."""
    loc = pyro.param("loc", torch.tensor([-1.0, 3.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Let fits be interrupted after so many iterations (of all runs together); None: never."""
    left: list[int | None] = [None]

    def pause() -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    def arm(after: int | None) -> None:
        left[0] = after

    for module in (pyroem.loop, pyroem.together):
        monkeypatch.setattr(module, "pause_point", pause)
    return arm


def assert_same(a: Fit, b: Fit) -> None:
    """To the last bit, apart from the seconds."""
    assert a.params.keys() == b.params.keys()
    for name in a.params:
        assert torch.equal(a.params[name], b.params[name]), name
    assert (a.log_likelihood, a.log_prior) == (b.log_likelihood, b.log_prior)
    assert [(r.iteration, r.log_joint, r.passes) for r in a.history] == [
        (r.iteration, r.log_joint, r.passes) for r in b.history
    ]
    assert (a.status, a.message, a.restarts) == (b.status, b.message, b.restarts)
    how = re.compile(r" \(\d+\.\d s\)")  # the search says how long it took
    assert how.sub("", a.start) == how.sub("", b.start)
    for old, new in zip(b.history, b.history[1:], strict=False):
        assert new.seconds >= old.seconds


SEQUENTIAL: dict[str, Any] = {"engine": "trace", "max_iter": 30}
CASES: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "em": (EM(max_iter=60), {"init": "kmeans"}, (1, 20, 59)),
    "squarem": (EM(accelerate="squarem"), {"init": "kmeans"}, (1, 2, 5, 6)),
    "anderson": (EM(accelerate="anderson"), {"init": "kmeans"}, (1, 3, 6, 7)),
    "float32": (EM(dtype=torch.float32), {"init": "kmeans"}, (3,)),
    "lbfgs": (MAP(), {"init": "kmeans"}, (1, 2, 7)),
    "adam": (MAP("adam", max_iter=80), {"init": "kmeans"}, (1, 51)),
    "sgd": (MAP(torch.optim.SGD, lr=0.1, max_iter=30), {"init": "kmeans"}, (9,)),
    "pyro": (
        MAP(
            pyro.optim.ExponentialLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.95}
            ),
            max_iter=30,
        ),
        {"init": "kmeans"},
        (11,),
    ),
    "batch": (EM(max_iter=90), {"init": "random", "restarts": 4, "seed": 3}, (1, 20, 60)),
    "restarts": (EM(**SEQUENTIAL), {"init": "kmeans", "restarts": 3}, (10, 45, 80)),
    "map restarts": (MAP(max_iter=20), {"init": "random", "restarts": 2}, (5, 25)),
    "auto": (EM(max_iter=25), {}, (1, 12)),
    "auto restarts": (EM(max_iter=25), {"restarts": 3}, (12,)),
    "trace": (EM(**SEQUENTIAL), {"init": "kmeans"}, (7,)),
    "weights": (EM(max_iter=20), {"init": "kmeans", "weights": torch.arange(120) % 3}, (4,)),
    "stepwise": (StepwiseEM(max_iter=6, batch=30), {"init": "kmeans"}, (1, 3)),
    "fixed": (MAP(fixed={"scale", "weights"}), {"init": "kmeans"}, (2,)),
}


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(
    name: str, cut: Callable[[int | None], None], tmp_path: Path
) -> None:
    solver, settings, places = CASES[name]
    x = data()
    whole = solver.fit(pair, x, **settings)
    for place in places:
        path = tmp_path / f"{place}.pt"
        cut(place)
        broken = solver.fit(pair, x, **settings, checkpoint=path)
        assert broken.status is Status.INTERRUPTED
        cut(place + 1 if "restarts" in settings else 3)  # broken off again
        solver.fit(pair, x, **settings, checkpoint=path)
        cut(None)
        assert_same(whole, solver.fit(pair, x, **settings, checkpoint=path))
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        cut(1)  # a finished fit takes no step
        assert_same(whole, solver.fit(pair, x, **settings, checkpoint=path))
        cut(None)


@pytest.mark.parametrize(
    "name",
    [
        "gaussian_inverse_gamma",
        "categorical_logits",
        "chain",
        "shared_mean",
        "bernoulli_blend",
        "global_assignment",
    ],
)
@pytest.mark.parametrize("solver", [EM(max_iter=12), MAP(max_iter=12)])
def test_other_programs(
    name: str, solver: Any, cut: Callable[[int | None], None], tmp_path: Path
) -> None:
    problem = BY_NAME[name]
    whole = solver.fit(problem.model, *problem.data, init=problem.params)
    cut(min(4, max(1, whole.n_iter - 1)))
    settings: dict[str, Any] = {"init": problem.params, "checkpoint": tmp_path / "c"}
    solver.fit(problem.model, *problem.data, **settings)
    cut(None)
    assert_same(whole, solver.fit(problem.model, *problem.data, **settings))


@pytest.mark.parametrize("solver", [EM(max_iter=12), StepwiseEM(max_iter=4, batch=100)])
def test_data_in_blocks(solver: Any, cut: Callable[[int | None], None], tmp_path: Path) -> None:
    source = pyroem.blocks(data(600), rows=200)
    whole = solver.fit(pair, source, init="kmeans")
    cut(2)
    broken = solver.fit(pair, source, init="kmeans", checkpoint=tmp_path / "c")
    assert broken.status is Status.INTERRUPTED and broken.n_iter == 2
    cut(None)
    assert_same(whole, solver.fit(pair, source, init="kmeans", checkpoint=tmp_path / "c"))


class Hurry:
    """Whether the two below break off in the middle of a step."""

    on = False


class Impatient(EM):
    def step(self, problem: Any, state: State) -> State:
        after = super().step(problem, state)
        if Hurry.on and after.passes == 5:
            raise KeyboardInterrupt
        return after


class Descent(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if Hurry.on and self.state[self.param_groups[0]["params"][0]]["step"] == 4:
            raise KeyboardInterrupt  # the leaves have moved, the objective is not known


@pytest.mark.parametrize("solver", [Impatient(max_iter=9), MAP(Descent, max_iter=9)])
@pytest.mark.parametrize("every", [0, 60])
def test_an_interrupt_within_a_step(
    solver: Any, every: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"init": "kmeans", "checkpoint": tmp_path / "c", "checkpoint_every": every}
    whole = solver.fit(pair, data(), init="kmeans")
    monkeypatch.setattr(Hurry, "on", True)
    broken = solver.fit(pair, data(), **settings)
    assert broken.status is Status.INTERRUPTED and broken.n_iter == 3
    monkeypatch.setattr(Hurry, "on", False)
    assert_same(whole, solver.fit(pair, data(), **settings))


@pytest.mark.parametrize("name", ["em", "restarts", "batch", "lbfgs"])
def test_more_iterations(name: str, tmp_path: Path) -> None:
    solver, settings, _ = CASES[name]
    short, path = replace(solver, max_iter=5), tmp_path / "c"
    first = short.fit(pair, data(), **settings, checkpoint=path)
    assert first.status is Status.MAX_ITER
    long = replace(solver, max_iter=12)
    assert_same(
        long.fit(pair, data(), **settings), long.fit(pair, data(), **settings, checkpoint=path)
    )
    with pytest.raises(SettingError, match="has made 12 iterations, but max_iter is 5"):
        short.fit(pair, data(), **settings, checkpoint=path)


def test_the_search_for_starts_is_not_repeated(
    cut: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    solver = EM(max_iter=20, engine="trace")
    searches: list[int] = []
    inner = pyroem.starts.race

    def count(*args: Any) -> Any:
        searches.append(1)
        return inner(*args)

    monkeypatch.setattr(pyroem.starts, "race", count)
    whole = solver.fit(pair, data(60))
    assert len(searches) == 1
    cut(5)
    solver.fit(pair, data(60), checkpoint=tmp_path / "c")
    assert len(searches) == 2
    cut(None)
    assert_same(whole, solver.fit(pair, data(60), checkpoint=tmp_path / "c"))
    assert len(searches) == 2


def test_starts_in_reserve_are_stored(
    cut: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = pyroem.solver.judge

    def judge(problem: Any, solver: Any, start: Any, outcome: Any) -> Any:
        judged = inner(problem, solver, start, outcome)
        if outcome.status is Status.MAX_ITER and "reserved" not in start.how:
            return replace(judged, status=Status.DEGENERATE)
        return judged

    monkeypatch.setattr(pyroem.solver, "judge", judge)
    solver = EM(max_iter=5)
    whole = solver.fit(two_assignments, data(60))
    assert len(whole.restarts) > 2
    cut(2 * 5 + 2)
    broken = solver.fit(two_assignments, data(60), checkpoint=tmp_path / "c")
    assert len(broken.restarts) == 3
    monkeypatch.setattr(pyroem.starts, "race", lambda *a: pytest.fail("searched again"))
    cut(None)
    assert_same(whole, solver.fit(two_assignments, data(60), checkpoint=tmp_path / "c"))


def test_an_interrupted_search_leaves_nothing_to_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = EM(max_iter=8).fit(pair, data())
    inner = pyroem.batch.Batch.e_step
    calls = []

    def impatient(self: Any, params: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(self, params)

    monkeypatch.setattr(pyroem.batch.Batch, "e_step", impatient)
    fit = EM(max_iter=8).fit(pair, data(), checkpoint=tmp_path / "c")
    assert fit.status is Status.INTERRUPTED and not list(tmp_path.iterdir())
    assert_same(whole, EM(max_iter=8).fit(pair, data(), checkpoint=tmp_path / "c"))


# ---------------------------------------------------------------------------------------
# Ctrl-C itself


@pytest.mark.parametrize("name", ["em", "anderson", "lbfgs", "adam", "batch", "restarts", "blocks"])
def test_ctrl_c(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    solver, settings, _ = CASES.get(name, CASES["em"])
    x: Any = pyroem.blocks(data(), rows=50) if name == "blocks" else data()
    whole = solver.fit(pair, x, **settings)
    inner, calls = pyroem.checkpoint.Journal.save, []

    def press(self: Any, always: bool = False) -> None:
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        inner(self, always)

    monkeypatch.setattr(pyroem.checkpoint.Journal, "save", press)
    broken = solver.fit(pair, x, **settings, checkpoint=tmp_path / "c")
    assert broken.status is Status.INTERRUPTED and broken.n_iter == 4
    assert broken.log_joint == pytest.approx(broken.history[-1].log_joint)
    assert_same(whole, solver.fit(pair, x, **settings, checkpoint=tmp_path / "c"))


# ---------------------------------------------------------------------------------------
# The file


def test_a_killed_process(tmp_path: Path) -> None:
    """Killed in the middle of a write; what was written before it counts."""
    path = tmp_path / "c"
    script = f"""
        import os, signal, torch
        import pyroem.checkpoint
        from pyroem import EM
        from test_checkpoint import data, pair
        torch.set_num_threads(1)
        inner, calls = os.replace, []
        def replace(*args):
            calls.append(1)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            inner(*args)
        os.replace = replace
        EM(max_iter=30).fit(pair, data(), checkpoint={str(path)!r}, checkpoint_every=0)
    """
    folder = [str(Path(__file__).parent), str(Path(pyroem.__file__).parent.parent)]
    search = os.pathsep.join([*folder, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env)
    assert done.returncode == -signal.SIGKILL
    assert {p.name for p in tmp_path.iterdir()} == {"c", ".c.new"}
    stored = pyroem.stored.read(path)
    assert stored is not None and len(stored["runs"][0][0]["history"]) == 7
    back = EM(max_iter=30).fit(pair, data(), checkpoint=path)
    assert_same(EM(max_iter=30).fit(pair, data()), back)
    assert {p.name for p in tmp_path.iterdir()} == {"c"}


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file(
    broken: str, cut: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, solver = tmp_path / "c", EM(max_iter=20)
    cut(5)
    solver.fit(pair, data(), init="kmeans", checkpoint=path)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    cut(3)
    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.warns(RuntimeWarning, match="could not be written.*No space left"):
            fit = solver.fit(pair, data(), init="kmeans", checkpoint=path)
    assert fit.n_iter == 8  # the fit itself goes on
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c"]
    cut(None)
    whole = solver.fit(pair, data(), init="kmeans")
    assert_same(whole, solver.fit(pair, data(), init="kmeans", checkpoint=path))


def test_how_often_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writes: list[int] = []
    inner = pyroem.checkpoint.write

    def count(*args: Any) -> None:
        writes.append(1)
        inner(*args)

    monkeypatch.setattr(pyroem.checkpoint, "write", count)
    EM(max_iter=9).fit(pair, data(), init="kmeans", checkpoint=tmp_path / "a")
    assert len(writes) == 2  # where it starts, and where it ends
    EM(max_iter=9).fit(pair, data(), init="kmeans", checkpoint=tmp_path / "b", checkpoint_every=0)
    assert len(writes) >= 2 + 10
    del writes[:]
    EM(max_iter=9).fit(pair, data(), init="kmeans")
    assert not writes


def test_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    MAP(max_iter=3).fit(pair, data(), init="kmeans", checkpoint=tmp_path / "c")
    content = torch.load(tmp_path / "c", weights_only=True)
    assert {"format", "fit", "starts", "runs", "batch", "point", "rng"} == set(content)


other = partial(pair, kind=dist.Laplace)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"solver": MAP(max_iter=9)}, "the solver was EM, is MAP"),
        ({"solver": EM(max_iter=9, tol=1e-3)}, "tol was 1e-08, is 0.001"),
        ({"solver": EM(max_iter=9, accelerate="squarem")}, "accelerate was None, is squarem"),
        ({"solver": EM(max_iter=9, fixed="loc")}, r"fixed was \(\), is \(loc\)"),
        ({"solver": EM(max_iter=4)}, "has made 9 iterations, but max_iter is 4"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"restarts": 2}, "restarts was 1, is 2"),
        ({"init": "random"}, "init was kmeans, is random"),
        ({"init": {"loc": [0.0, 1.0]}}, r"init was kmeans, is values \("),
        ({"x": data(60)}, "the number of rows was 120, is 60"),
        ({"x": data() + 1e-3}, "its log_joint was -.*but the program with the data given has -"),
        ({"model": other}, "its log_joint was"),
        ({"model": GAUSSIAN.model}, r"the parameters was .* is .*the assignments was \{z: 2\}"),
        ({"weights": torch.full((120,), 2.0)}, "the weight of all rows was 120, is 240"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_fit(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"model": pair, "x": data(), "solver": EM(max_iter=9), "init": "kmeans"}
    path = tmp_path / "c"

    def fit(solver: Any, model: Any, x: Any, **settings: Any) -> Fit:
        result: Fit = solver.fit(model, x, checkpoint=path, **settings)
        return result

    fit(**given)
    before = path.read_bytes()
    with pytest.raises(SettingError, match=f"checkpoint .*{words}"):
        fit(**{**given, **changed})
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "flipped", "fit", "format", "parts"])
def test_a_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    path, solver = tmp_path / "c", EM(max_iter=9)
    fit = solver.fit(pair, data(), init="kmeans", checkpoint=path)
    content, words = bytearray(path.read_bytes()), "damaged one"
    if damage == "fit":
        fit.save(path)
    elif damage in ("format", "parts"):
        plain = torch.load(path, weights_only=True)
        plain["format" if damage == "format" else "runs"] = 99
        torch.save(plain, path)
        words = "in format 99 by another version" if damage == "format" else "damaged"
    else:
        content[content.index(b"scale") if damage == "flipped" else 0] ^= 1
        kept = {"text": b"x,y\n1,2\n", "empty": b"", "cut": bytes(content[: len(content) // 2])}
        path.write_bytes(kept.get(damage, bytes(content)))
    with pytest.raises(SettingError, match=words):
        solver.fit(pair, data(), init="kmeans", checkpoint=path)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"checkpoint": True}, "the path of a file, got True"),
        ({"checkpoint": False}, "the path of a file, got False"),
        ({"checkpoint": 3}, "the path of a file, got 3"),
        ({"checkpoint": ""}, "the path of a file"),
        ({"checkpoint": "."}, "is a folder"),
        ({"checkpoint": "nowhere/c"}, "no folder nowhere"),
        ({"checkpoint": "c", "checkpoint_every": -1}, "checkpoint_every"),
        ({"checkpoint": "c", "checkpoint_every": True}, "checkpoint_every"),
        ({"checkpoint": "c", "checkpoint_every": "60"}, "checkpoint_every"),
    ],
)
def test_wrong_settings(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def never(x: Tensor) -> None:
        pytest.fail("the program ran")

    with pytest.raises(SettingError, match=words):
        EM().fit(never, data(), **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Path, *args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SettingError, match="cannot be written: Permission denied"):
        EM().fit(pair, data(), checkpoint=tmp_path / "c")


def test_several_processes_have_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pyroem.solver, "ranks_of", lambda distributed: object())
    with pytest.raises(SettingError, match="several processes"):
        EM().fit(pair, data(), checkpoint=tmp_path / "c", distributed=True)


def test_a_memory_that_cannot_be_written(tmp_path: Path) -> None:
    class Own(EM):
        def begin(self, problem: Any, params: Any) -> State:
            return replace(super().begin(problem, params), memory=lambda: None)

    with pytest.raises(SettingError, match="holds a function cannot be written"):
        Own().fit(pair, data(), init="kmeans", checkpoint=tmp_path / "c")


# ---------------------------------------------------------------------------------------
# The line of progress


def written() -> str:
    """What went to stderr, which a test replaced."""
    stream: Any = sys.stderr
    text: str = stream.getvalue()
    return text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress goes by."""
    now = [0.0]
    monkeypatch.setattr(pyroem.progress.time, "monotonic", lambda: now[0])
    return now


def run(progress: Progress, clock: list[float], steps: int, pause: float, ratio: float) -> None:
    for i in range(1, steps + 1):
        clock[0] += pause
        if progress.due():
            change = ratio ** (2 * i)
            progress.iteration(i, (1e-8, 1e-5, 1000), -5.0, change, ratio**i, pause * i)


@pytest.mark.parametrize("width", [30, 60, 200])
def test_the_line_in_a_terminal(
    width: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress("EM", True)
    run(progress, clock, 100, 0.03, 0.99)
    progress.end("converged after 100 iterations")
    progress.close()
    text = written()
    assert text.startswith("\r") and text.endswith("\n") and text.count("\n") == 1
    lines = text[1:-1].split("\r")
    assert 20 < len(lines) <= 31  # three seconds, at most ten a second
    assert all(len(line) < width for line in lines)
    assert lines[0].startswith("EM iteration 1/1000"[: width - 1])
    if width == 200:
        assert all(part in lines[-2] for part in ("[#", "log_joint -5.0", "change/row", " s left"))
    assert lines[-1].startswith("EM converged after 100 iterat"[: width - 1])


def test_lines_in_a_log(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress("EM", True)
    run(progress, clock, 1000, 0.031, 0.999)
    progress.end("ran out")
    progress.close()
    text = written()
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 5 and lines[-1] == "EM ran out"  # at 0, 10, 20, 30 s, and the end
    assert "left" not in lines[0] and "~" in lines[1]


def test_a_line_keeps_what_matters() -> None:
    parts = [(0, "EM iteration 3/9"), (5, "[##]"), (2, "log_joint -1"), (1, "~2 s left")]
    assert fitted(parts, 80) == "EM iteration 3/9  [##]  log_joint -1  ~2 s left"
    assert fitted(parts, 44) == "EM iteration 3/9  log_joint -1  ~2 s left"
    assert fitted(parts, 30) == "EM iteration 3/9  ~2 s left"
    assert fitted(parts, 10) == "EM iterati"


def test_the_time_left() -> None:
    pace = Pace()
    ratio, n = 0.97, 40
    for i in range(1, n + 1):
        pace.add(i, 0.5 * i, ratio ** (2 * i), ratio**i)
    more = pace.iterations(1e-8, 1e-5)
    assert more == pytest.approx(378 - n, abs=2)  # 0.97^378 = 1e-5
    assert pace.left(more, 1000) == "~3 min left"
    assert pace.left(more, 20) == "~10 s left, to max_iter"
    assert pace.iterations(0.1, 0.5) == 0 and pace.left(0, 1000) == "~0 s left"
    assert pace.left(pace.iterations(0, 1e-5), 20) == "at most 10 s left"  # tol=0 is never met
    flat = Trend()
    for i in range(30):
        flat.add(i, 1.0 + 0.1 * (i % 2))
        flat.add(i, float("nan"))
    assert flat.iterations(1e-8) > 1e3
    assert Pace().left(5, 5) == "" and Trend().iterations(1.0) == float("inf")
    assert [duration(s) for s in (3.2, 125.0, 5400.0)] == ["3 s", "2 min", "1.5 h"]


def test_the_estimate_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway through, the iterations that EM still makes are known within a factor of two."""
    seen: dict[int, float] = {}
    inner = Pace.iterations

    def note(self: Pace, tol: float, param_tol: float) -> float:
        seen[self.clock[-1][0]] = inner(self, tol, param_tol)
        return seen[self.clock[-1][0]]

    monkeypatch.setattr(Pace, "iterations", note)
    monkeypatch.setattr(pyroem.progress, "OFTEN", -1.0)
    monkeypatch.setattr(pyroem.progress, "SELDOM", -1.0)
    fit = EM(progress=True).fit(pair, data(), init="kmeans")
    assert fit.converged and fit.n_iter > 60
    half = fit.n_iter // 2
    assert 0.5 < seen[half] / half < 2


@pytest.mark.parametrize(
    "solver, settings",
    [
        (EM(max_iter=5, progress=True), {}),
        (EM(max_iter=5, progress=True), {"init": "random", "restarts": 3}),
        (MAP(max_iter=5, progress=True), {"init": "random", "restarts": 2}),
    ],
)
def test_every_kind_of_fit_says_something(
    solver: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyroem.progress, "OFTEN", -1.0)
    monkeypatch.setattr(pyroem.progress, "SELDOM", -1.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    solver.fit(pair, data(), **settings)
    text = written()
    assert "iteration 5/5" in text and "max iter after 5 iterations" in text
    if not settings:
        assert "guess" in text
    if solver.name == "EM" and settings:
        assert "3 starts: iteration 2/5" in text and "of 3 runs go on" in text
    if solver.name == "MAP":
        assert "MAP start 2 iteration" in text and "~" not in text
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    replace(solver, progress=False).fit(pair, data(), **settings)
    assert not written()


def test_a_closed_terminal_ends_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Terminal()
    closed.isatty = lambda: True  # type: ignore[method-assign]
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert EM(max_iter=3, progress=True).fit(pair, data(), init="kmeans").n_iter == 3
