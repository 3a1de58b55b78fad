"""Hidden Markov models: an iteration against hmmlearn, and how its time grows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers, programs
from benchmarks.harness import (
    THREADS,
    Run,
    assert_equal,
    exactly,
    interleave,
    run_pyroem,
    scaled,
    show,
    spread,
    versus,
)
from pyroem import EM
from pyroem.estep import scan

pytestmark = pytest.mark.benchmark


@contextmanager
def in_torch() -> Iterator[None]:
    """Forward-backward as where numba is not installed."""
    compiled, scan.compiled = scan.compiled, None
    try:
        yield
    finally:
        scan.compiled = compiled


def run_in_torch(em: EM, program: Any, x: Tensor, **options: Any) -> Run:
    with in_torch():
        return run_pyroem(em, program, x, **options)


@pytest.mark.parametrize("peer", ["scaling", "log", "pyroem without numba"])
def test_one_long_sequence(peer: str) -> None:
    steps, d, k, times = scaled(100_000), 4, 8, 6
    x, start = programs.chain_rows(steps, d, k)
    program = programs.gaussian_chain(k)

    def theirs() -> Run:
        if peer.startswith("pyroem"):
            return run_in_torch(exactly(times), program, x, init=start)
        return peers.hmmlearn_chain(x, None, start, times, peer)

    ours, others = interleave(lambda: run_pyroem(exactly(times), program, x, init=start), theirs)
    assert_equal(ours[0], others[0])
    name = peer if peer.startswith("pyroem") else f'hmmlearn, "{peer}"'
    versus("one long sequence, iteration", f"T={steps:,} D={d} K={k}", name, ours, others)


def test_many_sequences() -> None:
    count, d, k, times = scaled(10_000), 4, 8, 4
    lengths = torch.randint(10, 201, (count,), generator=torch.Generator().manual_seed(1))
    rows, start = programs.chain_rows(int(lengths.sum()), d, k)
    x = torch.nn.utils.rnn.pad_sequence(list(rows.split(lengths.tolist())), batch_first=True)
    program = programs.ragged_chains(k)
    ours, theirs = interleave(
        lambda: run_pyroem(exactly(times), program, x, lengths, init=start),
        lambda: peers.hmmlearn_chain(rows, lengths, start, times, "scaling"),
    )
    assert_equal(ours[0], theirs[0])
    size = f"{count:,} of 10 to 200 steps, D={d} K={k}"
    versus("many sequences, iteration", size, 'hmmlearn, "scaling"', ours, theirs)


def test_growth() -> None:
    for steps, d, k in (
        (10_000, 4, 8),
        (100_000, 4, 8),
        (1_000_000, 4, 8),
        (100_000, 4, 2),
        (100_000, 4, 16),
        (100_000, 4, 32),
        (100_000, 32, 8),
    ):
        x, start = programs.chain_rows(scaled(steps), d, k)
        program, em = programs.gaussian_chain(k), exactly(3)
        fast, slow = interleave(
            lambda x=x, p=program, s=start, em=em: run_pyroem(em, p, x, init=s),  # type: ignore[misc]
            lambda x=x, p=program, s=start, em=em: run_in_torch(em, p, x, init=s),  # type: ignore[misc]
        )
        show(
            {
                "size": f"T={scaled(steps):,} D={d} K={k}",
                "an iteration": spread([run.lap for run in fast]),
                "without numba": spread([run.lap for run in slow]),
                "the whole call less 3 iterations": spread([r.whole - 3 * r.lap for r in fast]),
                "load": f"{os.getloadavg()[0]:.1f}",
            }
        )


def test_threads() -> None:
    """An unrolled loop of small tensors must not wait for threads."""
    x, start = programs.chain_rows(200, 1, 2)
    em = EM(tol=0, param_tol=0, max_iter=3, engine="trace")
    for threads in (1, THREADS):
        torch.set_num_threads(threads)
        (runs,) = interleave(lambda: run_pyroem(em, programs.gaussian_chain(2), x, init=start))
        row = {"unrolled, T=200": spread([run.lap for run in runs]), "threads": str(threads)}
        show(row)
    torch.set_num_threads(THREADS)
