"""How time and memory grow, each measurement in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyroem
from benchmarks.harness import THREADS, scaled, seconds, show

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]
SIDES = ("pyroem", "scikit-learn")
AXES: dict[str, tuple[dict[str, int], list[int]]] = {
    "rows": ({"columns": 4, "states": 4}, [10_000, 30_000, 100_000, 300_000, 1_000_000]),
    "states": ({"rows": 50_000, "columns": 4}, [2, 4, 8, 16, 32, 64]),
    "columns": ({"rows": 20_000, "states": 4}, [2, 4, 8, 16, 32, 64]),
}


def measure(side: str, iterations: int, **sizes: int) -> dict[str, Any]:
    task = json.dumps({"side": side, "iterations": iterations, **sizes})
    places = [Path(__file__).parents[1], Path(pyroem.__file__).parents[1]]
    path = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS)}
    command = [sys.executable, "-m", "benchmarks.measure", task]
    environment = {**os.environ, **threads, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cells(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    row = {}
    for side, result in found.items():
        fits = "lap" in result
        row[f"{side}, iteration"] = seconds(result["lap"]) if fits else "–"
        row[f"{side}, peak beyond data"] = (
            f"{result['peak'] / 1e6:,.0f} MB" if fits else f"> {result['room'] / 1e6:,.0f} MB"
        )
    return row


@pytest.mark.parametrize(("columns", "states"), [(2, 3), (8, 16)])
def test_memory(columns: int, states: int) -> None:
    pytest.importorskip("sklearn")
    rows = scaled(5_000_000)
    found = {side: measure(side, 3, rows=rows, columns=columns, states=states) for side in SIDES}
    size = f"N={rows:,} D={columns} K={states}"
    show({"memory": size, "data": f"{rows * columns * 8 / 1e6:,.0f} MB", **cells(found)})


def test_file() -> None:
    rows = scaled(20_000_000)
    found = measure("file", 3, rows=rows, columns=8, states=4)
    show(
        {
            "a file": f"N={rows:,} D=8 K=4",
            "data": f"{found['data'] / 1e6:,.0f} MB",
            "pyroem, iteration": seconds(found["lap"]),
            "pyroem, most that is resident": f"{found['resident'] / 1e6:,.0f} MB",
        }
    )


@pytest.mark.parametrize("axis", AXES)
def test_growth(axis: str) -> None:
    pytest.importorskip("sklearn")
    others, values = AXES[axis]
    values = [scaled(v) for v in values] if axis == "rows" else values
    others = {name: scaled(v) if name == "rows" else v for name, v in others.items()}
    held = " ".join(f"{name}={value:,}" for name, value in others.items())
    found: list[dict[str, dict[str, Any]]] = []
    for value in values:
        found.append({side: measure(side, 5, **others, **{axis: value}) for side in SIDES})
        show({f"{axis} ({held})": f"{value:,}", **cells(found[-1])})
    slopes = {}
    for side in SIDES:
        for what, key in (("iteration", "lap"), ("peak beyond data", "peak")):
            points = [
                (v, r[side][key]) for v, r in zip(values, found, strict=True) if key in r[side]
            ]
            logs = np.log([(v, max(y, 1e-9)) for v, y in points[-3:]])
            slope = np.polyfit(logs[:, 0], logs[:, 1], 1)[0] if len(logs) > 1 else np.nan
            slopes[f"{side}, {what}"] = f"{slope:.2f}"
    show({f"{axis} ({held})": "slope of the largest three, log-log", **slopes})
