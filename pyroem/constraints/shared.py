"""Constraints that components share: covariance matrices parted into volume, shape and orientation.

    Sigma_k = volume_k * U_k diag(shape_k) U_k',    det(shape_k) = 1,    U_k orthogonal

Each of the three is equal for all components (E), free for each (V), or the identity (I); in this
order the letters name a structure: ``"VEV"`` has volumes and orientations of their own and one
shape. A structure knows its own maximiser, so that the M-step has a closed form, or a stated inner
iteration, wherever the covariances of a program stand under it.

Source: Banfield and Raftery (1993); Celeux and Govaert (1995).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroem.constraints.maximisers import (
    MATRIX_SOLVERS,
    VARIANCE_SOLVERS,
    of_full_rank,
)

_IN_TURN = "volumes and the common shape in turn until they settle"
_HOW = {name: _IN_TURN for name in ("VEI", "VEE", "VEV")} | {
    name: "the common orientation by Jacobi rotations until they settle" for name in ("EVE", "VVE")
}
ALIKE = 1e-6  # relative distance from a structure that a value may have
MATRICES = tuple(MATRIX_SOLVERS)
DIAGONALS = tuple(VARIANCE_SOLVERS)


class SharedConstraint(constraints.Constraint):
    """What the constraints of this module have in common: ``name`` and the size of an event."""

    names: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(
                f"{type(self).__name__}: expected one of {', '.join(self.names)}; got {name!r}."
            )
        self.name = name

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.name == getattr(other, "name", None)

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def how(self) -> str:
        """How its maximiser is found, for ``explain()``."""
        return _HOW.get(self.name, "one formula")

    @property
    def iterates(self) -> bool:
        """Whether its maximiser is an inner iteration."""
        return self.name in _HOW

    def dimension(self, shape: tuple[int, ...]) -> int:
        """The number of free parameters of one event."""
        raise NotImplementedError

    def maximise(self, weights: Tensor, scatters: Tensor, old: Tensor | None = None) -> Tensor:
        """The maximiser of ``-sum_k (n_k log det Sigma_k + tr(W_k Sigma_k^-1)) / 2``."""
        raise NotImplementedError

    def project(self, value: Tensor) -> Tensor:
        """The nearest value of the structure: the fit to rows with these covariances."""
        raise NotImplementedError

    def check(self, value: Tensor) -> Tensor:
        """Whether each event lies in the structure, up to a millionth of its size."""
        flat = value.reshape((-1, *value.shape[value.dim() - self.event_dim :]))
        found = [self._check_one(x) for x in flat]
        return torch.tensor(found).reshape(value.shape[: value.dim() - self.event_dim])

    def _check_one(self, x: Tensor) -> bool:
        if not self._positive(x):
            return False
        return bool((self.project(x) - x).abs().max() <= ALIKE * x.abs().max())

    def _positive(self, x: Tensor) -> bool:
        raise NotImplementedError


class variances(SharedConstraint):  # noqa: N801 - constraints are written like functions
    """Variances ``[K, D]`` (components, columns): ``"VEI"`` or ``"EVI"``.

    ``VEI`` is ``volume_k shape_d``; in ``EVI`` the variances of all components have one product.
    """

    names = DIAGONALS
    event_dim = 2

    def dimension(self, shape: tuple[int, ...]) -> int:
        """The number of free parameters of one event."""
        k, d = shape[-2:]
        return k + d - 1 if self.name == "VEI" else k * (d - 1) + 1

    def maximise(self, weights: Tensor, scatters: Tensor, old: Tensor | None = None) -> Tensor:
        """From ``n [K, D]`` and the sums of squares ``[K, D]``; ``old`` is where to begin."""
        return VARIANCE_SOLVERS[self.name](weights, scatters, old)

    def project(self, value: Tensor) -> Tensor:
        """The fit to rows with these variances."""
        return self.maximise(torch.ones_like(value), value)

    def _positive(self, x: Tensor) -> bool:
        return bool((x > 0).all())


class covariances(SharedConstraint):  # noqa: N801
    """Covariance matrices ``[K, D, D]`` of K components, of one of the six structures that are
    neither free, nor equal, nor diagonal: ``VEE, EVV, EEV, VEV, EVE, VVE``.

    ``EVV`` and ``EEV`` have a closed form. In ``VEE`` and ``VEV`` volumes and the common shape are
    updated in turn until they settle; in ``EVE`` and ``VVE`` the common orientation by Jacobi
    rotations, each at its optimum (Flury and Gautschi, 1986), with volumes and shapes at their
    own.
    """

    names = MATRICES
    event_dim = 3

    def dimension(self, shape: tuple[int, ...]) -> int:
        """The number of free parameters of one event."""
        k, d = shape[-3], shape[-1]
        volume, form, turn = (k if letter == "V" else 1 for letter in self.name)
        return volume + form * (d - 1) + turn * d * (d - 1) // 2

    def maximise(self, weights: Tensor, scatters: Tensor, old: Tensor | None = None) -> Tensor:
        """From ``n [K]`` and the scatter matrices ``W [K, D, D]``; ``old`` is where to begin."""
        found = MATRIX_SOLVERS[self.name](weights, of_full_rank(weights, scatters), old)
        return 0.5 * (found + found.mT)

    def project(self, value: Tensor) -> Tensor:
        """The fit to rows with these covariances."""
        return self.maximise(value.new_ones(value.shape[-3]), value, value)

    def _positive(self, x: Tensor) -> bool:
        return bool((torch.linalg.cholesky_ex(x).info == 0).all()) and torch.allclose(x, x.mT)


def structure_of(constraint: object) -> SharedConstraint | None:
    """The constraint, if it is one of this module."""
    return constraint if isinstance(constraint, SharedConstraint) else None
