"""Random numbers for tests, in double precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def real(values: Any) -> Tensor:
    """Numbers in double precision."""
    return torch.tensor(values, dtype=torch.float64)


class Draws:
    """Draws from one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)
