"""The maximisers of ``-sum_k (n_k log det Sigma_k + tr(W_k Sigma_k^-1)) / 2`` under each structure.

``n`` are weights, ``w`` scatter matrices, ``s`` sums of squares. A component without any weight
takes the volume and shape that the others have together.

Source: Celeux and Govaert (1995); Flury and Gautschi (1986) for common orientations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SWEEPS = 500
SINGULAR = 1e-14  # relative to the largest eigenvalue of all scatters
SETTLED = 1e-13  # relative change of an inner iteration that has converged


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


def _vei(n: Tensor, s: Tensor, old: Tensor | None) -> Tensor:
    def shape(volumes: Tensor) -> Tensor:
        return (s / volumes).sum(0, keepdim=True) / n.sum(0, keepdim=True)

    def step(volumes: Tensor) -> Tensor:
        found = (s / shape(volumes)).sum(1, keepdim=True) / n.sum(1, keepdim=True)
        return torch.where(n.sum(1, keepdim=True) > 0, found, volumes)

    volumes = torch.ones_like(n[:, :1]) if old is None else _geometric(old)
    volumes = _alternate(step, volumes)
    return volumes * shape(volumes)


def _evi(n: Tensor, s: Tensor, old: Tensor | None) -> Tensor:
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


def of_full_rank(n: Tensor, w: Tensor) -> Tensor:
    """Scatters whose eigenvalues rounding has not made zero: a component on its way to collapse
    goes on, until its variances are at their floor.
    """
    w = 0.5 * (w + w.mT)
    values, axes = torch.linalg.eigh(w)
    least = SINGULAR * values.max()
    low = (values[:, 0] < least) & (n > 0)
    return torch.where(low[:, None, None], turned(axes, values.clamp(min=least)), w)


def determinant_root(w: Tensor) -> Tensor:
    """``det(W)^(1/D)`` of each matrix, with dims of size one for its rows and columns."""
    sign, value = torch.linalg.slogdet(w)
    value = torch.where(sign > 0, value, -math.inf)
    return (value / w.shape[-1]).exp()[..., None, None]


def _vee(n: Tensor, w: Tensor, old: Tensor | None) -> Tensor:
    def common(volumes: Tensor) -> Tensor:
        total = (w / volumes[:, None, None]).sum(0)
        return total / determinant_root(total)

    def step(volumes: Tensor) -> Tensor:
        traces = torch.linalg.solve(common(volumes), w).diagonal(dim1=-2, dim2=-1).sum(-1)
        return torch.where(n > 0, traces / (w.shape[-1] * n), volumes)

    volumes = torch.ones_like(n) if old is None else determinant_root(old).reshape(-1)
    volumes = _alternate(step, volumes)
    return volumes[:, None, None] * common(volumes)


def _evv(n: Tensor, w: Tensor, old: Tensor | None) -> Tensor:
    size = torch.where((n > 0)[:, None, None], determinant_root(w), 0.0)
    volume = size.sum() / n.sum()
    pooled = w.sum(0)
    own = w / size.clamp(min=1e-300)
    return volume * torch.where(size > 0, own, pooled / determinant_root(pooled))


def _eev(n: Tensor, w: Tensor, old: Tensor | None) -> Tensor:
    values, axes = torch.linalg.eigh(w)
    return turned(axes, (values.sum(0) / n.sum()).expand_as(values))


def _vev(n: Tensor, w: Tensor, old: Tensor | None) -> Tensor:
    values, axes = torch.linalg.eigh(w)
    values = values.clamp(min=0)
    before = None if old is None else torch.linalg.eigvalsh(old)
    diagonal = _vei(n[:, None].expand_as(values), values, before)
    return turned(axes, diagonal)


def _eve(n: Tensor, w: Tensor, old: Tensor | None) -> Tensor:
    axes, diagonal = _rotated(n, w, old, lambda d: np.exp(np.log(d).mean(1)))
    return turned(axes, _evi(n[:, None].expand_as(diagonal), diagonal, None))


def _vve(n: Tensor, w: Tensor, old: Tensor | None) -> Tensor:
    axes, diagonal = _rotated(n, w, old, lambda d: np.array(n.tolist()))
    pooled = diagonal.sum(0) / n.sum()
    own = diagonal / n[:, None]
    return turned(axes, torch.where((n > 0)[:, None], own, pooled))


Solver = Callable[[Tensor, Tensor, Tensor | None], Tensor]
VARIANCE_SOLVERS: dict[str, Solver] = {"VEI": _vei, "EVI": _evi}
MATRIX_SOLVERS: dict[str, Solver] = {
    "VEE": _vee,
    "EVV": _evv,
    "EEV": _eev,
    "VEV": _vev,
    "EVE": _eve,
    "VVE": _vve,
}


def turned(axes: Tensor, values: Tensor) -> Tensor:
    """``U diag(values) U'``."""
    return (axes * values.unsqueeze(-2)) @ axes.mT


def common_axes(matrices: Tensor) -> Tensor:
    """The axes of matrices that share them; of others, some that lie near."""
    weights = 1 + 0.37 * torch.arange(len(matrices)).to(matrices)  # sums without ties
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    axes: Tensor = torch.linalg.eigh((matrices * (weights / traces)[:, None, None]).sum(0))[1]
    return axes


def _rotated(
    n: Tensor, w: Tensor, old: Tensor | None, scales: Callable[[NDArray], NDArray]
) -> tuple[Tensor, Tensor]:
    """Common axes, and the diagonals of ``U' W_k U``.

    Rotations in one plane after another, by the angle that minimises ``sum_k c_k tr(U' W_k U
    diag_k^-1)`` with ``c_k`` from ``scales``; the diagonals are then those of the turned matrices.
    """
    start = torch.linalg.eigh(w.sum(0))[1] if old is None else common_axes(old)
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
