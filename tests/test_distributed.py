"""Fits over several processes: the same fit everywhere, that of all rows; and no process waits
forever for another.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_large import masked, mixture, simulated, standardised
from torch import Tensor, distributed
from torch.distributions import constraints

import pyroem
from pyroem import EM, MAP, Fit, Status, StepwiseEM, blocks
from pyroem.estep.engine import MixtureEngine
from pyroem.problem import LARGE, Problem
from pyroem.shards import shares

X = simulated(700)
X[:, 0] += 100.0
MANY = simulated(LARGE + 1000)
HOLES = X.clone()
HOLES[::5, 1] = torch.nan
WEIGHTS = torch.arange(700, dtype=torch.float64) % 4
INIT: dict[str, Any] = {
    "weights": [0.3, 0.3, 0.4],
    "loc": [[98.0, 0.0], [100.0, 2.0], [102.0, 0.0]],
    "scale": [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
}
FAR = {**INIT, "loc": [[-2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]}
STILL: dict[str, Any] = {"tol": 1e-12, "param_tol": 1e-7}


def with_priors(x: Tensor, shift: Tensor) -> None:
    """Priors, a second argument without rows, and a site outside the rows."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    loc = pyro.sample("loc", dist.Normal(100.0, 50.0).expand([3]).to_event(1))
    rate = pyro.param("rate", torch.tensor(0.2), constraint=constraints.positive)
    pyro.sample("once", dist.Exponential(rate), obs=shift[0])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def student(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.StudentT(4.0, loc[z], 1.0), obs=x)


def cut(x: Any, rank: int, world: int) -> Any:
    """The rows of a process: uneven shares; the second of three has none."""
    bounds: dict[int, list[float]] = {1: [0, 1], 2: [0, 0.7, 1], 3: [0, 0.6, 0.6, 1]}
    return x[slice(*(int(b * len(x)) for b in bounds[world][rank : rank + 2]))]


Own = Callable[[Any], Any]


def all_but_one(own: Own) -> Tensor:
    """Many rows, of which the last process has one and the first the others."""
    places = own(torch.arange(10)).tolist()
    first, last = 0 in places, 9 in places
    return MANY[slice(0 if first else -1 if last else len(MANY), None if last else -1)]


def sequences(x: Tensor, lengths: Tensor) -> None:
    """Hidden Markov models of sequences of unequal lengths."""
    transition = pyro.param(
        "transition", torch.tensor([[0.7, 0.3], [0.3, 0.7]]), constraint=constraints.simplex
    )
    loc = pyro.param("loc", torch.tensor([98.0, 103.0]))
    with pyro.plate("sequences", len(x)):
        z: Any = 0
        for t in pyroem.markov(x.shape[1]):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
                pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[:, t])


RAGGED = X[:, 0].reshape(70, 10)
LENGTHS = torch.arange(70) % 9 + 2


def drifting(x: Tensor, scale: float) -> None:
    """A program with a constant, which the processes may have computed from their own rows."""
    loc = pyro.param("loc", torch.tensor([98.0, 103.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(loc[z], scale), obs=x)


PRIOR_INIT = {"weights": [0.3, 0.3, 0.4], "loc": [98.0, 100.0, 103.0], "rate": 0.3}
SHIFT = torch.tensor([4.0, 0.0, 0.0])
# Each fits the rows that ``own`` gives it; further settings say whether it is over processes.
FITS: dict[str, Callable[..., Fit]] = {
    "em": lambda own, **s: EM(**STILL).fit(mixture, own(X), init=INIT, **s),
    "auto": lambda own, **s: EM().fit(mixture, own(X), **s),
    "weights": lambda own, **s: EM().fit(mixture, own(X), init=INIT, weights=own(WEIGHTS), **s),
    "blocks": lambda own, **s: EM().fit(mixture, blocks(own(X), rows=64), init=INIT, **s),
    "weighted blocks": lambda own, **s: EM().fit(
        mixture, blocks(own(X), rows=64), init=INIT, weights=own(WEIGHTS), **s
    ),
    "function": lambda own, **s: EM().fit(
        mixture, blocks(lambda: iter(own(X).split(100) if len(own(X)) else [])), init=INIT, **s
    ),
    "masked": lambda own, **s: EM().fit(masked, own(HOLES), init={"loc": INIT["loc"]}, **s),
    "anderson": lambda own, **s: EM(accelerate="anderson").fit(mixture, own(X), init=INIT, **s),
    "map": lambda own, **s: MAP().fit(mixture, own(X), init=INIT, **s),
    "adam": lambda own, **s: MAP("adam", max_iter=60).fit(mixture, own(X), init=INIT, **s),
    "priors": lambda own, **s: EM().fit(with_priors, own(X)[:, 0], SHIFT, init=PRIOR_INIT, **s),
    "prior map": lambda own, **s: MAP().fit(
        with_priors, own(X)[:, 0], shift=SHIFT, init=PRIOR_INIT, **s
    ),
    "restarts": lambda own, **s: EM(max_iter=30).fit(
        mixture, own(X), init="random", restarts=3, **s
    ),
    "large": lambda own, **s: EM().fit(mixture, own(MANY), init=FAR, **s),
    "one row": lambda own, **s: EM().fit(mixture, all_but_one(own), init=FAR, **s),
    "large auto": lambda own, **s: EM().fit(mixture, own(MANY), **s),
    "sequences": lambda own, **s: EM(max_iter=20).fit(
        sequences, own(RAGGED), own(LENGTHS), weights=own(WEIGHTS[:70]), **s
    ),
    "sequences in blocks": lambda own, **s: EM(max_iter=20).fit(
        sequences, blocks((own(RAGGED), own(LENGTHS)), rows=20), **s
    ),
    "single precision": lambda own, **s: EM(dtype=torch.float32).fit(
        mixture, own(X), init=INIT, **s
    ),
}
# The search is on another sample; restarts alone go as one batch.
NOT_EQUAL = {"large auto", "restarts"}


def summary(fit: Fit) -> dict[str, Any]:
    return {
        "params": fit.params,
        "log_likelihood": fit.log_likelihood,
        "log_prior": fit.log_prior,
        "status": fit.status,
        "message": fit.message,
        "history": [r.log_joint for r in fit.history],
        "restarts": [(r.log_joint, r.status) for r in fit.restarts],
        "rows": (fit.problem.rows, fit.problem.structure.num_rows),
        "bic": fit.bic(),
    }


def of_rows(fit: Fit) -> dict[str, Tensor]:
    """What a fit says of its own rows."""
    return {
        "responsibilities": fit.responsibilities(),
        "predict": fit.predict(),
        "log_prob": fit.log_prob(),
        "probs": fit.posterior()["z"].probs,
    }


def count_down(calls: int, then: Callable[[], None], inner: Callable[..., Any]) -> Any:
    """``inner``, which at one of its calls does something else first."""
    left = calls

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            then()
        return inner(*args, **kwargs)

    return counting


def refuse() -> None:
    raise RuntimeError("no more")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def leave() -> None:
    os._exit(3)


def failing(
    rank: int, own: Own, owner: Any, name: str, then: Callable[[], None], group: Any = True
) -> Fit:
    """A fit of whose processes the last gets into trouble at a call of ``owner.name``."""
    inner, here = getattr(owner, name), rank == distributed.get_world_size() - 1
    if here:
        setattr(owner, name, count_down(4, then, inner))
    try:
        return EM(**STILL).fit(mixture, own(X), init=INIT, distributed=group)
    finally:
        setattr(owner, name, inner)


def spoilt(rank: int, x: Tensor) -> Tensor:
    x = x.clone()
    if rank == 0:
        x[3, 1] = torch.inf
    return x


def bad(rank: int, own: Own) -> dict[str, Callable[[], Any]]:
    """Calls that cannot work, in one process or in all."""
    last = rank == distributed.get_world_size() - 1
    extra = torch.ones(5) * rank
    return {
        "no kernel": lambda: EM().fit(student, own(X)[:, 0], distributed=True),
        "trace": lambda: EM(engine="trace").fit(mixture, own(X), distributed=True),
        "infinite": lambda: EM().fit(mixture, spoilt(rank, own(X)), init=INIT, distributed=True),
        "late infinite": lambda: EM().fit(
            mixture, blocks(spoilt(rank, own(MANY)), rows=500), init=FAR, distributed=True
        ),
        "standardised": lambda: EM().fit(standardised, own(X), distributed=True),
        "settings": lambda: EM(max_iter=5 + last).fit(mixture, own(X), distributed=True),
        "seed": lambda: EM().fit(mixture, own(X), seed=int(last), distributed=True),
        "programs": lambda: EM().fit(mixture, own(X), 2 + last, distributed=True),
        "constants": lambda: EM().fit(drifting, own(X)[:, 0], 1.0 + last, distributed=True),
        "values": lambda: EM().fit(
            mixture, own(X), init={**INIT, "weights": [0.3, 0.4, 0.3 + last]}, distributed=True
        ),
        "columns": lambda: EM().fit(mixture, own(X)[:, : 1 + last], distributed=True),
        "not rows": lambda: EM().fit(with_priors, own(X)[:, 0], extra, distributed=True),
        "short weights": lambda: EM().fit(
            mixture, own(X), weights=own(WEIGHTS)[: 400 if last else None][1:], distributed=True
        ),
        "no weight": lambda: EM().fit(mixture, own(X), weights=0 * own(WEIGHTS), distributed=True),
        "no rows": lambda: EM().fit(mixture, X[:0], distributed=True),
        "stepwise": lambda: StepwiseEM().fit(mixture, own(X), distributed=True),
        "init": lambda: EM().fit(mixture, own(X), init="k-means", distributed=True),
        "group": lambda: EM().fit(mixture, own(X), distributed="world"),
        "e-step": lambda: failing(rank, own, MixtureEngine, "expect", refuse),
        "m-step": lambda: failing(rank, own, Problem, "m_step", refuse),
    }


def session(rank: int, world: int, out: Path) -> None:
    """All that is asked of processes that stay alive."""

    def own(x: Any) -> Any:
        return cut(x, rank, world)

    found: dict[str, Any] = {}
    for name, fit in FITS.items():
        done = fit(own, distributed=True)
        found[name] = summary(done)
        if name == "em":
            found["of rows"] = of_rows(done)
            found["explain"] = done.explain()
            with pytest.raises(pyroem.SettingError, match="icl: the rows are spread"):
                done.icl()
    for name, call in bad(rank, own).items():
        try:
            call()
            found[name] = "no error"
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    found["interrupted"] = summary(failing(rank, own, Problem, "m_step", interrupt))
    found["after all that"] = summary(FITS["em"](own, distributed=True))
    pair = distributed.new_group([0, world - 1])
    if rank in (0, world - 1):
        half = slice(0, 300) if rank == 0 else slice(300, None)
        done = EM(**STILL).fit(mixture, X[half], init=INIT, distributed=pair)
        found["group of two"] = summary(done)
    else:
        found["group of two"] = None
        with pytest.raises(pyroem.SettingError):
            EM().fit(mixture, X, init=INIT, distributed=pair)
    (out / f"{rank}.pickle").write_bytes(pickle.dumps(found))


def losing(rank: int, world: int, out: Path) -> None:
    """The last process is gone, or does not answer, in the middle of the fit."""
    then = leave if (out / "leave").exists() else lambda: time.sleep(100)
    group = distributed.new_group(timeout=datetime.timedelta(seconds=5))
    clock = time.monotonic()
    try:
        failing(rank, lambda x: cut(x, rank, world), MixtureEngine, "expect", then, group)
        told = ""
    except pyroem.PyroemError as error:
        told = str(error)
    (out / f"{rank}.pickle").write_bytes(pickle.dumps((told, time.monotonic() - clock)))


def process(
    what: Callable[[int, int, Path], None],
    rank: int,
    world: int,
    port: int,
    out: Path,
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    pyro.set_rng_seed(rank)  # what the processes have drawn before must not matter
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    what(rank, world, out)
    if what is session:
        distributed.destroy_process_group()
    os._exit(0)  # a broken group need not be taken down in order


def run(what: Callable[[int, int, Path], None], world: int, out: Path) -> list[Any]:
    """Run ``what`` in ``world`` processes; what each of them found, or None where it is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pyro", "pyroem", "pytest"])
    processes = [
        context.Process(target=process, args=(what, rank, world, port, out))
        for rank in range(world)
    ]
    for p in processes:
        p.start()
    for p in processes[: None if what is session else -1]:
        p.join(120)
    for p in processes:
        if p.is_alive():
            p.kill()
    paths = [out / f"{rank}.pickle" for rank in range(world)]
    return [pickle.loads(p.read_bytes()) if p.exists() else None for p in paths]


Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = run(session, request.param, tmp_path_factory.mktemp("ranks"))
    assert all(f is not None for f in found), "a process ended early; its output says why"
    return found


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


ALONE: dict[str, Fit] = {}


def alone(name: str) -> Fit:
    if name not in ALONE:
        ALONE[name] = FITS[name](lambda x: x)
    return ALONE[name]


def same_fit(found: dict[str, Any], fit: Fit, tolerance: float) -> None:
    wanted = summary(fit)
    for key in ("log_likelihood", "log_prior", "bic"):
        assert found[key] == pytest.approx(wanted[key], rel=tolerance, abs=1e-12), key
    for key in ("status", "rows"):
        assert found[key] == wanted[key], key
    assert found["history"] == pytest.approx(wanted["history"], rel=tolerance)
    for name, value in wanted["params"].items():
        torch.testing.assert_close(found["params"][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FITS)
def test_all_processes_end_with_the_fit_of_all_rows(results: Results, name: str) -> None:
    for other in results[1:]:
        assert identical(results[0][name], other[name])
    if name in NOT_EQUAL:
        assert results[0][name]["log_likelihood"] == pytest.approx(
            alone(name).log_likelihood, rel=1e-6
        )
    else:
        same_fit(results[0][name], alone(name), 1e-4 if name == "single precision" else 1e-10)


def test_what_a_fit_says_of_rows_concerns_those_of_its_process(results: Results) -> None:
    wanted = of_rows(alone("em"))
    for rank, found in enumerate(results):
        for key, value in found["of rows"].items():
            torch.testing.assert_close(value, cut(wanted[key], rank, len(results)))
    assert "700 rows" in results[0]["explain"]
    held = len(cut(X, 0, len(results)))
    assert f"over {len(results)} processes, this one with {held} rows" in results[0]["explain"]


ERRORS = {
    "no kernel": ("ModelError", "the statistics of site 'x' depend on its parameters"),
    "trace": ("SettingError", "several processes needs the kernel"),
    "infinite": ("DataError", "got inf at index (3, 1)"),
    "late infinite": ("DataError", "expected finite data"),
    "standardised": ("ModelError", "makes something else of the rows of this process"),
    "settings": ("SettingError", "max_iter is 5 in process 0 and 6 in process"),
    "seed": ("SettingError", "seed is 0 in process 0 and 1 in process"),
    "programs": ("ModelError", "The processes run different programs"),
    "constants": ("ModelError", "on the same rows their log-joints are"),
    "values": ("SettingError", "init is 'values"),
    "columns": ("DataError", "but for the number of rows they must be the same"),
    "not rows": ("DataError", "does not hold rows, but differs between processes"),
    "short weights": ("DataError", "weights: expected shape"),
    "no weight": ("DataError", "no row with a positive weight"),
    "no rows": ("DataError", "hold no rows"),
    "stepwise": ("ModelError", "Stepwise EM does not run over several processes"),
    "init": ("SettingError", "init: expected one of"),
    "group": ("SettingError", "expected True"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_work_ends_all_processes(results: Results, name: str) -> None:
    kind, text = ERRORS[name]
    for found in results:
        assert found[name][0] == kind, found[name]
        assert text in found[name][1], found[name]


@pytest.mark.parametrize("name", ["e-step", "m-step"])
def test_a_process_that_fails_tells_the_others(results: Results, name: str) -> None:
    last = len(results) - 1
    for found in results[:-1]:
        text = f"In process {last} of {last + 1}: RuntimeError: no more"
        assert found[name] == ("PyroemError", text)
    assert results[-1][name] == ("RuntimeError", "no more")


def test_an_interrupt_of_one_process_ends_all_alike(results: Results) -> None:
    first = results[0]["interrupted"]
    assert first["status"] is Status.INTERRUPTED and 2 < len(first["history"]) < 10
    assert all(identical(first, found["interrupted"]) for found in results)


def test_the_group_is_of_use_after_failures(results: Results) -> None:
    for found in results:
        assert identical(found["after all that"], found["em"])


def test_a_group_of_some_processes(results: Results) -> None:
    for found in results:
        if found["group of two"] is not None:
            same_fit(found["group of two"], alone("em"), 1e-10)


@pytest.mark.parametrize("how", ["leave", "sleep"])
def test_a_process_that_is_gone_or_silent_ends_the_others(how: str, tmp_path: Path) -> None:
    (tmp_path / how).touch()
    found = run(losing, 3, tmp_path)
    for told, seconds in found[:2]:
        assert "has lost another process of the fit" in told and seconds < 30


def test_without_a_process_group() -> None:
    with pytest.raises(pyroem.SettingError, match="there is no process group"):
        EM().fit(mixture, X, distributed=True)
    with pytest.raises(pyroem.SettingError, match="expected True"):
        EM().fit(mixture, X, distributed="all")


def test_a_sample_is_shared_in_proportion() -> None:
    assert shares(10, [5, 0, 5]) == [5, 0, 5]
    assert shares(100, [5, 0, 6]) == [5, 0, 6]
    for size in (1, 7, 2003):
        found = shares(size, [1, 4000, 0, 333, 2])
        assert sum(found) == size
        assert all(f <= n for f, n in zip(found, [1, 4000, 0, 333, 2], strict=True))
