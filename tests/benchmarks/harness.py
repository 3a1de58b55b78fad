"""Timing side by side, and tables. Nothing here asserts a time."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.programs import Params
from pyroem import EM

THREADS = 2
SCALE = float(os.environ.get("PYROEM_BENCHMARK_SCALE", "1"))
REPEATS = int(os.environ.get("PYROEM_BENCHMARK_REPEATS", "5"))


class Run(NamedTuple):
    """One run of one side: seconds of an iteration and of the whole call, and where it ended."""

    lap: float
    whole: float
    iterations: int
    params: Params
    value: float  # the log-likelihood a row


def scaled(rows: int) -> int:
    """A number of rows under ``PYROEM_BENCHMARK_SCALE``."""
    return max(int(rows * SCALE), min(rows, 1000))


def lap(stamps: Iterable[float]) -> float:
    """The median time between two stamps."""
    return float(np.median(np.diff(list(stamps))))


def exactly(n: int) -> EM:
    """EM that makes ``n`` iterations, whatever happens."""
    return EM(tol=0, param_tol=0, max_iter=n)


def run_pyroem(em: EM, program: Any, x: Tensor, *more: Tensor, **options: Any) -> Run:
    """One fit. Its history is stamped after each iteration and leaves the reading out."""
    clock = time.perf_counter()
    fit = em.fit(program, x, *more, **options)
    whole, value = time.perf_counter() - clock, fit.log_likelihood / len(x)
    return Run(lap(r.seconds for r in fit.history), whole, fit.n_iter, dict(fit.params), value)


def interleave(*sides: Callable[[], Run]) -> list[list[Run]]:
    """The runs of each side. They take turns, so that a slow moment of the machine hits all.

    A first round warms caches and thread pools up and is not counted.
    """
    rounds = []
    for _ in range(REPEATS + 1):
        gc.collect()
        rounds.append([side() for side in sides])
    return [list(runs) for runs in zip(*rounds[1:], strict=True)]


def assert_equal(ours: Run, theirs: Run) -> None:
    """As many iterations led to the same point: what makes the times comparable."""
    assert ours.iterations == theirs.iterations
    assert ours.params.keys() == theirs.params.keys()
    for name, value in ours.params.items():
        torch.testing.assert_close(value, theirs.params[name], rtol=1e-6, atol=1e-8)


def versus(
    name: str, size: str, peer: str, ours: list[Run], theirs: list[Run], field: str = "lap"
) -> None:
    """Print a row: both sides' times, and their ratio pair by pair; below 1 pyroem is faster."""
    a, b = ([float(getattr(run, field)) for run in runs] for runs in (ours, theirs))
    show(
        {
            "benchmark": name,
            "size": size,
            "peer": peer,
            "pyroem": spread(a),
            "peer's time": spread(b),
            "ratio": ratio(a, b),
            "iterations": f"{ours[0].iterations} / {theirs[0].iterations}",
            "log-likelihood/row": f"{ours[0].value:.7f} / {theirs[0].value:.7f}",
            "pyroem's whole call": spread([run.whole for run in ours]),
            "load": f"{os.getloadavg()[0]:.1f}",
        }
    )


def seconds(value: float) -> str:
    """A time for people."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def spread(values: list[float], write: Callable[[float], str] = seconds) -> str:
    """The median and the range."""
    if not values:
        return "–"
    return f"{write(median(values))} [{write(min(values))}–{write(max(values))}]"


def ratio(a: list[float], b: list[float]) -> str:
    """The spread of the ratios of what was measured in turns."""
    return spread([x / y for x, y in zip(a, b, strict=False)], "{:.3g}".format)


_shown: list[str] = []


def show(row: Mapping[str, str]) -> None:
    """Print one row of a Markdown table, with a head where the columns are new."""
    if _shown != list(row):
        _shown[:] = row
        print("\n\n| " + " | ".join(row) + " |\n|" + " --- |" * len(row), end="")
    print("\n| " + " | ".join(row.values()) + " |", end="", flush=True)


def machine() -> str:
    """What the numbers depend on."""
    torch.set_num_threads(THREADS)
    cpu, square = Path("/proc/cpuinfo"), torch.rand(2500, 2500, dtype=torch.float64)
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":")[1] for line in lines if line.startswith("model name")), " a CPU")
    sides: dict[str, Any] = {"torch": square, "numpy": square.numpy()}
    rates, versions = {name: 0.0 for name in sides}, []
    for name, matrix in sides.items():
        for _ in range(4):
            clock = time.perf_counter()
            matrix @ matrix
            rates[name] = max(rates[name], 2 * 2.5**3 / (time.perf_counter() - clock))
    for package in (
        "torch",
        "pyro-ppl",
        "numpy",
        "scikit-learn",
        "hmmlearn",
        "numba",
        "pomegranate",
        "stepmix",
    ):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    policy, load = os.environ.get("OMP_WAIT_POLICY", "unset"), os.getloadavg()[0]
    return f"""Machine:{model}, {os.cpu_count()} cores, {THREADS} threads; load {load:.1f}
dgemm, Gflop/s: {", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())}
OMP_WAIT_POLICY: {policy}; {", ".join(versions)}
Scale {SCALE:g}, {REPEATS} repeats: median [least–most]"""
