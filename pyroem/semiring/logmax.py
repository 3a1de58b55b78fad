"""``max(.)``: the most probable joint assignment. Its gradient marks the arg max."""

from __future__ import annotations

from pyro.ops.einsum.util import Tensordot
from torch import Tensor

from pyroem.semiring import contract, transpose

__all__ = ["einsum", "maximum", "tensordot", "transpose"]


def maximum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``max(x, dims)``; one of several equal maxima gets the whole gradient."""
    flat = x.flatten(min(dims))  # the reduced dims stand last
    return flat.max(-1).values


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Max-plus einsum."""
    return contract(equation, operands, maximum)


tensordot = Tensordot(einsum)
