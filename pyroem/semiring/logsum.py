"""``log(sum(exp(.)))``: the marginal likelihood. Differentiable to any order."""

from __future__ import annotations

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor

from pyroem.semiring import contract, transpose

__all__ = ["einsum", "logsumexp", "tensordot", "transpose"]


def logsumexp(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``log(sum(exp(x), dims))``; where every term is ``-inf`` the gradient is 0 and not NaN."""
    peak = x.detach().amax(dims, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    total = (x - peak).exp().sum(dims)
    peak = peak.reshape(total.shape)
    possible = total != 0  # a NaN stays a NaN
    log_total = torch.where(possible, total, torch.ones_like(total)).log() + peak
    return torch.where(possible, log_total, torch.full_like(log_total, -torch.inf))


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Log-sum-exp einsum."""
    return contract(equation, operands, logsumexp)


tensordot = Tensordot(einsum)
