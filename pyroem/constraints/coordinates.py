"""Unconstrained coordinates of the structures, for gradients.

They have the shape of the value: logarithms of what scales on the diagonal, of which the volume is
the mean and the shape the rest; below it the orientation, by Cayley's rotations, or the rest of a
triangular factor. What is equal is the mean of all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform, constraints, transform_to

from pyroem.constraints.maximisers import common_axes, determinant_root, turned
from pyroem.constraints.shared import SharedConstraint, covariances, variances


def _parts(letters: str, raw: Tensor) -> Tensor:
    """Logarithms ``[..., K, D]`` with equal volumes or shapes made equal."""
    volume = raw.mean(-1, keepdim=True)
    shape = raw - volume
    if letters[0] == "E":
        volume = volume.mean(-2, keepdim=True)
    if letters[1] == "E":
        shape = shape.mean(-2, keepdim=True)
    return (volume + shape).expand(raw.shape)


class Coordinates(Transform):
    """From unconstrained coordinates to a structure."""

    bijective = False

    def __init__(self, structure: SharedConstraint) -> None:
        super().__init__()
        self.structure = structure
        self.domain = constraints.independent(constraints.real, structure.event_dim)
        self.codomain = structure

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.structure == self.structure

    def __hash__(self) -> int:
        return hash(self.structure)

    def _call(self, raw: Tensor) -> Tensor:
        name = self.structure.name
        if self.structure.event_dim == 2:
            return _parts(name, raw).exp()
        logs = _parts(name, raw.diagonal(dim1=-2, dim2=-1))
        below = raw.tril(-1)
        if name[2] == "E":
            below = below.mean(-3, keepdim=True)
        if name in ("VEE", "EVV"):
            size = logs.mean(-1, keepdim=True)
            factor = below + torch.diag_embed((0.5 * (logs - size)).exp())
            return size.exp().unsqueeze(-1) * (factor @ factor.mT)
        return turned(_rotation(below).expand((*logs.shape, raw.shape[-1])), logs.exp())

    def _inverse(self, value: Tensor) -> Tensor:
        name = self.structure.name
        if self.structure.event_dim == 2:
            return value.log()
        if name in ("VEE", "EVV"):
            size = determinant_root(value)
            factor = torch.linalg.cholesky(value / size)
            logs = size.squeeze(-1).log() + 2 * factor.diagonal(dim1=-2, dim2=-1).log()
            return factor.tril(-1) + torch.diag_embed(logs)
        flat = value.reshape((-1, *value.shape[-3:]))
        found = torch.stack([self._inverse_of_one(x) for x in flat])
        return found.reshape(value.shape)

    def _inverse_of_one(self, value: Tensor) -> Tensor:
        if self.structure.name[2] == "E":
            axes = common_axes(value).expand_as(value)
        else:
            axes = torch.linalg.eigh(value)[1]
        logs = (axes.mT @ value @ axes).diagonal(dim1=-2, dim2=-1).log()
        below = torch.stack([_skew(u) for u in axes])
        return below.tril(-1) + torch.diag_embed(logs)


def _rotation(below: Tensor) -> Tensor:
    """``(I - S)(I + S)^-1`` of the skew-symmetric ``S`` with this lower triangle."""
    skew = below - below.mT
    one = torch.eye(below.shape[-1], dtype=below.dtype, device=below.device)
    return torch.linalg.solve(one + skew, one - skew)


def _skew(axes: Tensor) -> Tensor:
    """The lower triangle of ``S`` of an orthogonal matrix, whose columns may change their signs.

    They are chosen, as elimination goes, such that no pivot of ``I + U`` is smaller than one.
    """
    size = len(axes)
    one = torch.eye(size, dtype=axes.dtype, device=axes.device)
    rest, signs = axes.clone(), torch.ones_like(axes[0])
    # Column j of U becomes sign_j U_j; eliminating I + U needs the part below only.
    for j in range(size):
        pivot = rest[j, j]
        signs[j] = 1.0 if float(pivot) >= 0 else -1.0
        column = signs[j] * rest[:, j]
        lead = 1 + column[j]
        rest = rest - torch.outer(column, rest[j]) / lead
    axes = axes * signs
    return torch.linalg.solve(one + axes, one - axes).tril(-1)


for _kind in (variances, covariances):
    transform_to.register(_kind, Coordinates)
