"""Constraints that components share: covariance matrices parted into volume, shape and orientation.

    Sigma_k = volume_k * U_k diag(shape_k) U_k',    det(shape_k) = 1,    U_k orthogonal

Each of the three is equal for all components (E), free for each (V), or the identity (I); in this
order the letters name a structure: ``"VEV"`` has volumes and orientations of their own and one
shape. A structure knows its own maximiser, so that the M-step has a closed form, or a stated inner
iteration, wherever the covariances of a program stand under it.

Source: Banfield and Raftery (1993); Celeux and Govaert (1995).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Transform, constraints, transform_to

SWEEPS = 500
SINGULAR = 1e-14  # relative to the largest eigenvalue of all scatters
SETTLED = 1e-13  # relative change of an inner iteration that has converged
_IN_TURN = "volumes and the common shape in turn until they settle"
_HOW = {name: _IN_TURN for name in ("VEI", "VEE", "VEV")} | {
    name: "the common orientation by Jacobi rotations until they settle" for name in ("EVE", "VVE")
}
ALIKE = 1e-6  # relative distance from a structure that a value may have
MATRICES = ("VEE", "EVV", "EEV", "VEV", "EVE", "VVE")
DIAGONALS = ("VEI", "EVI")


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
        """From ``n [K, D]`` and the sums of squares ``[K, D]``."""
        solve = _vei if self.name == "VEI" else _evi
        return solve(weights, scatters)

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
        turns = None
        if old is not None and self.name in ("EVE", "VVE"):
            turns = _common_axes(old)
        found = _SOLVERS[self.name](weights, _of_full_rank(weights, scatters), turns)
        return 0.5 * (found + found.mT)

    def project(self, value: Tensor) -> Tensor:
        """The fit to rows with these covariances."""
        return self.maximise(value.new_ones(value.shape[-3]), value, value)

    def _positive(self, x: Tensor) -> bool:
        return bool((torch.linalg.cholesky_ex(x).info == 0).all()) and torch.allclose(x, x.mT)


def structure_of(constraint: object) -> SharedConstraint | None:
    """The constraint, if it is one of this module."""
    return constraint if isinstance(constraint, SharedConstraint) else None


# Maximisers. ``n`` are weights, ``w`` scatters, sums of squares or matrices; a component without
# any weight takes the volume and shape that the others have together.


def _geometric(x: Tensor) -> Tensor:
    """The geometric mean over the last dim."""
    return x.log().mean(-1, keepdim=True).exp()


def _alternate(step: Callable[[Tensor], Tensor], volumes: Tensor) -> Tensor:
    """Volumes from volumes until they settle, up to a common factor."""
    for _ in range(SWEEPS):
        before, volumes = volumes, step(volumes)
        ratio = (volumes / before).log()
        if not bool((ratio - ratio.mean()).abs().max() > SETTLED):
            break
    return volumes


def _vei(n: Tensor, s: Tensor) -> Tensor:
    def shape(volumes: Tensor) -> Tensor:
        return (s / volumes).sum(0, keepdim=True) / n.sum(0, keepdim=True)

    def step(volumes: Tensor) -> Tensor:
        found = (s / shape(volumes)).sum(1, keepdim=True) / n.sum(1, keepdim=True)
        return torch.where(n.sum(1, keepdim=True) > 0, found, volumes)

    volumes = _alternate(step, torch.ones_like(n[:, :1]))
    return volumes * shape(volumes)


def _evi(n: Tensor, s: Tensor) -> Tensor:
    """``v_kd = s_kd / (n_kd - m_k)`` with ``m_k`` such that all products over d are equal.

    Where the weights of a component are the same in all columns, its shape is that of ``s_k``;
    with missing values they differ, and ``m_k`` and the common product are found in turn.
    """
    alive = (n > 0).all(1, keepdim=True)
    size = torch.where(alive, _geometric(torch.where(alive, s, 1.0)), 0.0)
    each = n.mean(1, keepdim=True)
    volume = size.sum() / each.sum()
    found = torch.where(alive, s / size.clamp(min=1e-300), 1.0) * volume
    if bool((n == each).all()):
        return found
    for _ in range(SWEEPS):
        m = _multipliers(n, s, volume)
        found = torch.where(alive, s / (n - m), volume)
        grown = ((s / found * volume).sum() / n.sum()).detach()
        if bool((grown / volume - 1).abs() <= SETTLED):
            break
        volume = grown
    return found


def _multipliers(n: Tensor, s: Tensor, volume: Tensor) -> Tensor:
    """``m_k < min_d n_kd`` at which ``prod_d s_kd / (n_kd - m_k) = volume^D``.

    By Newton's method in ``u = log(min_d n_kd - m_k)``: the logarithm of the product is convex in
    it, with a slope from 1 to D.
    """
    target = (s.clamp(min=1e-300).log() - volume.log()).sum(1, keepdim=True)
    least = n.amin(1, keepdim=True)
    u = target / n.shape[1]
    for _ in range(SWEEPS):
        rest = n - least + u.exp()
        step = (rest.log().sum(1, keepdim=True) - target) / (u.exp() / rest).sum(1, keepdim=True)
        u = u - step
        if not bool(step.abs().max() > SETTLED):
            break
    return least - u.exp()


def _of_full_rank(n: Tensor, w: Tensor) -> Tensor:
    """Scatters whose eigenvalues rounding has not made zero: a component on its way to collapse
    goes on, until its variances are at their floor.
    """
    w = 0.5 * (w + w.mT)
    values, axes = torch.linalg.eigh(w)
    least = SINGULAR * values.max()
    low = (values[:, 0] < least) & (n > 0)
    return torch.where(low[:, None, None], _turned(axes, values.clamp(min=least)), w)


def _determinant_root(w: Tensor) -> Tensor:
    """``det(W)^(1/D)`` of each matrix, with dims of size one for its rows and columns."""
    sign, value = torch.linalg.slogdet(w)
    value = torch.where(sign > 0, value, -math.inf)
    return (value / w.shape[-1]).exp()[..., None, None]


def _vee(n: Tensor, w: Tensor, turns: Tensor | None) -> Tensor:
    def common(volumes: Tensor) -> Tensor:
        total = (w / volumes[:, None, None]).sum(0)
        return total / _determinant_root(total)

    def step(volumes: Tensor) -> Tensor:
        traces = torch.linalg.solve(common(volumes), w).diagonal(dim1=-2, dim2=-1).sum(-1)
        return torch.where(n > 0, traces / (w.shape[-1] * n), volumes)

    volumes = _alternate(step, torch.ones_like(n))
    return volumes[:, None, None] * common(volumes)


def _evv(n: Tensor, w: Tensor, turns: Tensor | None) -> Tensor:
    size = torch.where((n > 0)[:, None, None], _determinant_root(w), 0.0)
    volume = size.sum() / n.sum()
    pooled = w.sum(0)
    own = w / size.clamp(min=1e-300)
    return volume * torch.where(size > 0, own, pooled / _determinant_root(pooled))


def _eev(n: Tensor, w: Tensor, turns: Tensor | None) -> Tensor:
    values, axes = torch.linalg.eigh(w)
    return _turned(axes, (values.sum(0) / n.sum()).expand_as(values))


def _vev(n: Tensor, w: Tensor, turns: Tensor | None) -> Tensor:
    values, axes = torch.linalg.eigh(w)
    values = values.clamp(min=0)
    diagonal = _vei(n[:, None].expand_as(values), values)
    return _turned(axes, diagonal)


def _eve(n: Tensor, w: Tensor, turns: Tensor | None) -> Tensor:
    axes, diagonal = _rotated(n, w, turns, lambda d: np.exp(np.log(d).mean(1)))
    return _turned(axes, _evi(n[:, None].expand_as(diagonal), diagonal))


def _vve(n: Tensor, w: Tensor, turns: Tensor | None) -> Tensor:
    axes, diagonal = _rotated(n, w, turns, lambda d: np.array(n.tolist()))
    pooled = diagonal.sum(0) / n.sum()
    own = diagonal / n[:, None]
    return _turned(axes, torch.where((n > 0)[:, None], own, pooled))


_SOLVERS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "VEE": _vee,
    "EVV": _evv,
    "EEV": _eev,
    "VEV": _vev,
    "EVE": _eve,
    "VVE": _vve,
}


def _turned(axes: Tensor, values: Tensor) -> Tensor:
    return (axes * values.unsqueeze(-2)) @ axes.mT


def _common_axes(matrices: Tensor) -> Tensor:
    """The axes of matrices that share them; of others, some that lie near."""
    weights = 1 + 0.37 * torch.arange(len(matrices)).to(matrices)  # sums without ties
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    axes: Tensor = torch.linalg.eigh((matrices * (weights / traces)[:, None, None]).sum(0))[1]
    return axes


def _rotated(
    n: Tensor, w: Tensor, turns: Tensor | None, scales: Callable[[NDArray], NDArray]
) -> tuple[Tensor, Tensor]:
    """Common axes, and the diagonals of ``U' W_k U``.

    Rotations in one plane after another, by the angle that minimises ``sum_k c_k tr(U' W_k U
    diag_k^-1)`` with ``c_k`` from ``scales``; the diagonals are then those of the turned matrices.
    """
    start = torch.linalg.eigh(w.sum(0))[1] if turns is None else turns
    # Thousands of tiny steps: numpy takes a fifth of the time of torch.
    axes = np.array(start.tolist())
    m = axes.T @ np.array(w.tolist()) @ axes
    size = m.shape[-1]
    for _ in range(SWEEPS):
        largest = 0.0
        for i in range(size):
            for j in range(i + 1, size):
                diagonal = np.maximum(np.diagonal(m, axis1=1, axis2=2), 1e-300)
                c_k = scales(diagonal)
                gap = c_k / diagonal[:, i] - c_k / diagonal[:, j]
                across = 0.5 * float((m[:, i, i] - m[:, j, j]) @ gap)
                along = float(m[:, i, j] @ gap)
                if not math.hypot(across, along) > 0:
                    continue
                angle = 0.5 * math.atan2(-along, -across)
                largest = max(largest, abs(angle))
                c, s = math.cos(angle), math.sin(angle)
                turn = np.array([[c, -s], [s, c]])
                axes[:, [i, j]] = axes[:, [i, j]] @ turn
                m[:, :, [i, j]] = m[:, :, [i, j]] @ turn
                m[:, [i, j], :] = turn.T @ m[:, [i, j], :]
        if largest < 1e-9:
            break
    return torch.tensor(axes).to(w), torch.tensor(np.diagonal(m, axis1=1, axis2=2).copy()).to(w)


# The unconstrained coordinates have the shape of the value: logarithms of what scales on the
# diagonal, of which the volume is the mean and the shape the rest; below it the orientation, by
# Cayley's rotations, or the rest of a triangular factor. What is equal is the mean of all.


def _parts(letters: str, raw: Tensor) -> Tensor:
    """Logarithms ``[..., K, D]`` with equal volumes or shapes made equal."""
    volume = raw.mean(-1, keepdim=True)
    shape = raw - volume
    if letters[0] == "E":
        volume = volume.mean(-2, keepdim=True)
    if letters[1] == "E":
        shape = shape.mean(-2, keepdim=True)
    return (volume + shape).expand(raw.shape)


class _Coordinates(Transform):
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
        return _turned(_rotation(below).expand((*logs.shape, raw.shape[-1])), logs.exp())

    def _inverse(self, value: Tensor) -> Tensor:
        name = self.structure.name
        if self.structure.event_dim == 2:
            return value.log()
        if name in ("VEE", "EVV"):
            size = _determinant_root(value)
            factor = torch.linalg.cholesky(value / size)
            logs = size.squeeze(-1).log() + 2 * factor.diagonal(dim1=-2, dim2=-1).log()
            return factor.tril(-1) + torch.diag_embed(logs)
        flat = value.reshape((-1, *value.shape[-3:]))
        found = torch.stack([self._inverse_of_one(x) for x in flat])
        return found.reshape(value.shape)

    def _inverse_of_one(self, value: Tensor) -> Tensor:
        if self.structure.name[2] == "E":
            axes = _common_axes(value).expand_as(value)
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


def _of(structure: SharedConstraint) -> Transform:
    return _Coordinates(structure)


for _kind in (variances, covariances):
    transform_to.register(_kind, _of)
