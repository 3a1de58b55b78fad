"""One thread for small tensors: handing them to several takes longer than the work itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

SMALL = 1_500_000  # multiplications in a pass over the data


@contextlib.contextmanager
def threads_for(work: float) -> Iterator[None]:
    """Compute in one thread if ``work`` (multiplications in a pass) is little."""
    before = torch.get_num_threads()
    if work > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
