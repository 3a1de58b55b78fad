"""Observations of which some cells are missing: they are summed out, or integrated, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

VECTORS = (
    dist.MultivariateNormal,
    dist.LowRankMultivariateNormal,
    dist.MultivariateStudentT,
)


@dataclass(frozen=True)
class Missing:
    """What is missing of an observation: ``cells`` out of ``total``.

    ``filler`` is an event that stands in; its value does not matter.
    """

    filler: Tensor
    cells: int
    total: int


class Incomplete(TorchDistribution):
    """A multivariate normal or Student's t of which each row shows the elements ``seen`` only.

    The density is that of these: with ``o`` the elements seen, of ``Normal(loc_o, Sigma_oo)``.
    A row without any has density one.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as in torch

    def __init__(self, base_dist: Any, seen: Tensor, validate_args: bool | None = None) -> None:
        self.base_dist, self.seen = base_dist, seen
        batch = torch.broadcast_shapes(base_dist.batch_shape, seen.shape[:-1])
        super().__init__(batch, base_dist.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of all elements."""
        return self.base_dist.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Incomplete:
        """With more rows."""
        seen = self.seen.expand(torch.Size(batch_shape) + self.seen.shape[-1:])
        return Incomplete(self.base_dist.expand(batch_shape), seen)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Complete rows."""
        base = self.base_dist.expand(self.batch_shape)
        drawn: Tensor = base.sample(sample_shape)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of the elements seen."""
        base = self.base_dist
        scatter = base.scale_tril @ base.scale_tril.mT
        tril = seen_tril(scatter, self.seen)
        away = torch.where(self.seen, value - base.loc, 0.0).unsqueeze(-1)
        shape = torch.broadcast_shapes(tril.shape[:-2], away.shape[:-2])
        size = away.shape[-2]
        half = torch.linalg.solve_triangular(
            tril.expand((*shape, size, size)), away.expand((*shape, size, 1)), upper=False
        )
        distance = half.square().sum((-1, -2))
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        count = self.seen.sum(-1).to(distance)
        if isinstance(base, dist.MultivariateStudentT):
            df = base.df
            found = torch.lgamma((df + count) / 2) - torch.lgamma(df / 2) - log_det
            found = found - 0.5 * count * (df * torch.pi).log()
            found = found - 0.5 * (df + count) * torch.log1p(distance / df)
            return torch.where(count > 0, found, 0.0)
        return -0.5 * (distance + count * torch.log(torch.tensor(2 * torch.pi).to(count))) - log_det


def seen_tril(scatter: Tensor, seen: Tensor) -> Tensor:
    """The Cholesky factor of the seen block of a matrix, with ones on the diagonal elsewhere."""
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    return torch.linalg.cholesky(torch.where(both, scatter, torch.diag_embed((~seen).to(scatter))))


def hide(fn: Any, seen: Tensor) -> Any:
    """The distribution without the cells that are not ``seen`` (which has the shape of the data).

    Where an event is a vector that is neither normal nor Student's, it is seen whole or not at all.
    """
    if isinstance(fn, pyro.distributions.MaskedDistribution):
        return hide(fn.base_dist, seen).mask(fn._mask)
    if isinstance(fn, torch.distributions.Independent):
        return hide(fn.base_dist, seen).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, VECTORS):
        return Incomplete(fn, seen)
    for _ in fn.event_shape:
        seen = seen.all(-1)
    return fn.mask(seen)
