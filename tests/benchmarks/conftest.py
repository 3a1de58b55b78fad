"""Every benchmark runs on two threads and says on which machine."""

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_limits

from benchmarks.harness import THREADS, machine


@pytest.fixture(scope="session", autouse=True)
def announced() -> None:
    print(f"\n\n{machine()}")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS):
        yield
    torch.set_num_threads(before)
