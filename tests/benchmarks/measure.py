"""Time and memory of one side in a process of its own: ``python -m benchmarks.measure JSON``.

Memory is the most that was resident during the fit, beyond what was before it: beyond the
interpreter, the libraries and the data. (Not ``ru_maxrss``, which starts at the parent's.)
"""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import THREADS, assert_equal, exactly, run_pyroem
from benchmarks.peers import sklearn_mixture
from benchmarks.programs import full_gaussian, gaussian_rows


def bytes_of(key: str, file: str = "/proc/self/status") -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path(file).read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def fit(side: str, rows: int, columns: int, states: int, iterations: int) -> dict[str, Any]:
    x, start = gaussian_rows(rows, columns, states)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = bytes_of("VmRSS")
    if side == "pyroem":
        run = run_pyroem(exactly(iterations), full_gaussian(states), x, init=start)
    else:
        run = sklearn_mixture(x, states, start, tol=0, max_iter=iterations)
    peak = bytes_of("VmHWM") - before
    return {"lap": run.lap, "peak": peak, "data": x.numel() * x.element_size()}


def mapped(rows: int, columns: int, states: int, iterations: int) -> dict[str, Any]:
    """A fit of a file: copies of a part of the rows, so that the part alone must give the same."""
    part, start = gaussian_rows(min(rows, 1_000_000), columns, states)
    with tempfile.TemporaryDirectory() as folder:
        path, copies = Path(folder) / "rows.npy", rows // len(part)
        shape = (copies * len(part), columns)
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=shape)
        for i in range(copies):
            file[i * len(part) : (i + 1) * len(part)] = part.numpy()
        file.flush()
        del file, part
        Path("/proc/self/clear_refs").write_text("5")
        em = exactly(iterations)
        run = run_pyroem(em, full_gaussian(states), np.load(path, mmap_mode="r"), init=start)
        resident = bytes_of("VmHWM")
    part, _ = gaussian_rows(min(rows, 1_000_000), columns, states)
    assert_equal(run, run_pyroem(em, full_gaussian(states), part, init=start))
    return {"lap": run.lap, "resident": resident, "data": 8 * rows * columns}


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(THREADS)
    side = task.pop("side")
    if side == "file":
        print(json.dumps(mapped(**task)))
        return
    fit(side, **{**task, "rows": 1000})  # imports, thread pools and libraries' buffers
    # A fit that needs more than the machine has is to fail, not to drive others out.
    room = int(0.8 * bytes_of("MemAvailable", "/proc/meminfo"))
    limit = bytes_of("VmSize") + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        print(json.dumps(fit(side, **task)))
    except Exception as error:  # torch's own is a RuntimeError, which pyroem explains
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        print(json.dumps({"room": room}))


if __name__ == "__main__":
    main()
