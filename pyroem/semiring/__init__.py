"""Log-space semirings in which Pyro contracts the factors of an enumerated trace.

Each module is an ``opt_einsum`` backend: :mod:`~pyroem.semiring.logsum` sums the assignments
out, :mod:`~pyroem.semiring.logmax` maximises over them. Multiplication is addition of logarithms,
done before the reduction, so that factors which pull in opposite directions by any number of
nats do not underflow.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Reduction = Callable[[Tensor, tuple[int, ...]], Tensor]


def contract(equation: str, operands: tuple[Tensor, ...], reduce: Reduction) -> Tensor:
    """Add ``operands``, aligned as ``equation`` says, and ``reduce`` the dims it leaves out."""
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    summed = "".join(sorted(set("".join(terms)) - set(output)))
    order = output + summed
    total: Tensor | None = None
    for dims, operand in zip(terms, operands, strict=True):
        present = [d for d in order if d in dims]
        aligned = operand.permute([dims.index(d) for d in present])
        sizes = iter(aligned.shape)
        aligned = aligned.reshape([next(sizes) if d in dims else 1 for d in order])
        total = aligned if total is None else total + aligned
    assert total is not None
    if not summed:
        return total
    return reduce(total, tuple(range(len(output), len(order))))


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute the dims of ``a``."""
    return a.permute(axes)
