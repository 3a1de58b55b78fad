"""Kernels of one parameter whose maximiser is known.

As a function of one parameter (the others held fixed), the expected log-joint of an exponential
family is a kernel such as ``a log(t) - b t``. Kernels of one form add by adding their
coefficients: over rows, over tied components, over sites, and with a conjugate prior, which is a
kernel of the same form. The M-step is then the form's ``mode``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

Coefficients = tuple[Tensor, ...]


@dataclass(frozen=True)
class Form:
    """A kernel, its maximiser, and the priors that are kernels of the same form.

    Attributes:
    ----------
    name, kernel
        What ``explain()`` calls it, and the kernel as a formula in ``t``.
    event_dim
        The number of dims of one parameter block (0 scalar, 1 vector, 2 matrix).
    coefficient_dims
        The number of event dims of each coefficient.
    mode
        Coefficients to maximiser, block by block; not finite where the coefficients are all zero.
    mode_beside
        ``(old, held, *coefficients) -> maximisers`` where some elements of each block stay as they
        are; needed where an element's optimum depends on the others of its block.
    mode_of_cells
        In place of ``mode``, for a kernel that does not add: ``(index, count, *coefficients) ->
        maximisers`` from the coefficients of every cell, with the number of its block.
    conjugate
        Prior distribution type to its coefficients (a function of the distribution).
    domain
        The supports on which the mode is the maximiser: ``"scalar"`` (the kernel is unimodal, so
        any interval will do: the mode is clipped to it), or names of constraints.
    expansion
        ``(t, *coefficients) -> (kernel, slope, curvature)`` for regressions: the first derivative
        by ``t``, and the negative of the second or its expectation, which is not negative.
    longest
        The longest step of a search in ``t``, from where the expansion says little further out.
    stretched
        ``(factor, *coefficients) -> coefficients`` of the kernel as a function of ``t / factor``.
    shifted
        ``(offset, *coefficients) -> coefficients`` of the kernel as a function of ``t - offset``.
    """

    name: str
    kernel: str
    mode: Callable[..., Tensor]
    coefficient_dims: tuple[int, ...]
    event_dim: int = 0
    conjugate: dict[type, Callable[[Any], Coefficients]] = field(default_factory=dict)
    domain: tuple[str, ...] = ("scalar",)
    expansion: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    longest: float = torch.inf
    stretched: Callable[..., Coefficients] | None = None
    shifted: Callable[..., Coefficients] | None = None
    mode_of_cells: Callable[..., Tensor] | None = None
    mode_beside: Callable[..., Tensor] | None = None

    @property
    def known(self) -> bool:
        """Whether there is a closed form."""
        return self.mode is not _unknown or self.mode_of_cells is not None


def _unknown(*coefficients: Tensor) -> Tensor:
    raise NotImplementedError


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return a / b


def _solve(b: Tensor, a: Tensor) -> Tensor:
    """``A^-1 b``; NaN where ``A`` is not positive definite.

    Not by LU factors: from 150 columns on torch gets batches of them wrong, or hangs, where it has
    several threads and MKL (2.5 to 2.13 at least: github.com/pytorch/pytorch/issues/141358).
    """
    column = b.unsqueeze(-1)
    solution = _guarded(a, lambda m: torch.cholesky_solve(column, torch.linalg.cholesky(m)))
    return solution.squeeze(-1)


def _solve_beside(old: Tensor, held: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """``A_ff^-1 (b_f - A_fh t_h)`` for the free elements of each vector."""
    kept = torch.where(held, old, 0.0)
    rest = b - (a @ kept.unsqueeze(-1)).squeeze(-1)
    free = ~held
    both = free.unsqueeze(-1) & free.unsqueeze(-2)
    inside = torch.where(both, a, torch.diag_embed(held.to(a)))
    return torch.where(held, old, _solve(torch.where(held, 0.0, rest), inside))


def _simplex_beside(old: Tensor, held: Tensor, a: Tensor) -> Tensor:
    left = 1 - torch.where(held, old, 0.0).sum(-1, keepdim=True)
    a = torch.where(held, 0.0, a.clamp(min=0))
    return torch.where(held, old, a * (left / a.sum(-1, keepdim=True)))


def _logits_beside(old: Tensor, held: Tensor, a: Tensor) -> Tensor:
    """The free categories have their shares, and those that are held theirs together."""
    outside = torch.where(held, a, 0.0).sum(-1, keepdim=True)
    level = torch.where(held, old, -torch.inf).logsumexp(-1, keepdim=True)
    level = torch.where(held.any(-1, keepdim=True), level - outside.log(), 0.0)
    return torch.where(held, old, a.log() + level)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _vector_expansion(t: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    along = (a @ t.unsqueeze(-1)).squeeze(-1)
    return (b * t - 0.5 * along * t).sum(-1), b - along, a


LOCATION = Form(
    "location",
    "b t - a t^2 / 2",
    _ratio,
    (0, 0),
    conjugate={dist.Normal: lambda p: (p.loc / p.scale**2, p.scale**-2)},
    expansion=lambda t, b, a: (b * t - 0.5 * a * t**2, b - a * t, a),
    stretched=lambda c, b, a: (c * b, c**2 * a),
    shifted=lambda o, b, a: (b - a * o, a),
)
VECTOR_LOCATION = Form(
    "vector location",
    "b't - t'A t / 2",
    _solve,
    (1, 2),
    event_dim=1,
    conjugate={
        dist.MultivariateNormal: lambda p: (
            (p.precision_matrix @ p.loc.unsqueeze(-1)).squeeze(-1),
            p.precision_matrix,
        ),
        dist.Normal: lambda p: (p.loc / p.scale**2, torch.diag_embed(p.scale**-2)),
    },
    domain=("real_vector",),
    expansion=_vector_expansion,
    mode_beside=_solve_beside,
)
RATE = Form(
    "rate",
    "a log t - b t",
    _ratio,
    (0, 0),
    conjugate={
        dist.Gamma: lambda p: (p.concentration - 1, p.rate),
        dist.Exponential: lambda p: (_zeros(p.rate), p.rate),
        dist.Chi2: lambda p: (p.df / 2 - 1, torch.full_like(p.df, 0.5)),
    },
    expansion=lambda t, a, b: (torch.xlogy(a, t) - b * t, a / t - b, a / t**2),
    stretched=lambda c, a, b: (a, c * b),
)
LOG_RATE = Form(
    "log rate",
    "a t - b exp(t)",
    lambda a, b: (a / b).log(),
    (0, 0),
    expansion=lambda t, a, b: (a * t - b * t.exp(), a - b * t.exp(), b * t.exp()),
    longest=3.0,
    shifted=lambda o, a, b: (a, b * o.exp()),
)
INVERSE_RATE = Form(
    "inverse rate",
    "-a log t - b / t",
    lambda a, b: b / a,
    (0, 0),
    conjugate={dist.InverseGamma: lambda p: (p.concentration + 1, p.rate)},
    expansion=lambda t, a, b: (-a * t.log() - b / t, b / t**2 - a / t, a / t**2),
    stretched=lambda c, a, b: (a, b / c),
)
SCALE = Form(
    "scale",
    "-a log t - b / t^2",
    lambda a, b: (2 * b / a).sqrt(),
    (0, 0),
    expansion=lambda t, a, b: (-a * t.log() - b / t**2, 2 * b / t**3 - a / t, 2 * a / t**2),
    stretched=lambda c, a, b: (a, b / c**2),
)
LOG_SCALE = Form(
    "log scale",
    "-a t - b exp(-2 t)",
    lambda a, b: (2 * b / a).log() / 2,
    (0, 0),
    expansion=lambda t, a, b: (
        -a * t - b * (-2 * t).exp(),
        2 * b * (-2 * t).exp() - a,
        4 * b * (-2 * t).exp(),
    ),
    longest=3.0,
    shifted=lambda o, a, b: (a, b * (-2 * o).exp()),
)
PROBABILITY = Form(
    "probability",
    "a log t + b log(1 - t)",
    lambda a, b: a / (a + b),
    (0, 0),
    conjugate={dist.Beta: lambda p: (p.concentration1 - 1, p.concentration0 - 1)},
    expansion=lambda t, a, b: (
        torch.xlogy(a, t) + torch.xlogy(b, 1 - t),
        a / t - b / (1 - t),
        a / t**2 + b / (1 - t) ** 2,
    ),
)
LOGIT = Form(
    "logit",
    "a t - (a + b) log(1 + exp(t))",
    lambda a, b: (a / b).log(),
    (0, 0),
    expansion=lambda t, a, b: (
        a * logsigmoid(t) + b * logsigmoid(-t),
        a * torch.sigmoid(-t) - b * torch.sigmoid(t),
        (a + b) * torch.sigmoid(t) * torch.sigmoid(-t),
    ),
    longest=3.0,
)
SIMPLEX = Form(
    "simplex",
    "sum_k a_k log t_k",
    lambda a: a.clamp(min=0) / a.clamp(min=0).sum(-1, keepdim=True),
    (1,),
    event_dim=1,
    conjugate={dist.Dirichlet: lambda p: (p.concentration - 1,)},
    domain=("simplex", "positive_vector"),
    mode_beside=_simplex_beside,
)


def _logits_expansion(t: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, p = a.sum(-1, keepdim=True), t.softmax(-1)
    value = (a * t.log_softmax(-1)).sum(-1)
    spread = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return value, a - total * p, total.unsqueeze(-1) * spread


LOGITS = Form(
    "logits",
    "sum_k a_k t_k - (sum_k a_k) log(sum_k exp(t_k))",
    lambda a: (a / a.sum(-1, keepdim=True)).log(),
    (1,),
    event_dim=1,
    domain=("real_vector",),
    expansion=_logits_expansion,
    longest=3.0,
    mode_beside=_logits_beside,
)
COVARIANCE = Form(
    "covariance",
    "-(a log det T + tr(B T^-1)) / 2",
    lambda a, b: b / a[..., None, None],
    (0, 2),
    event_dim=2,
    domain=("positive_definite",),
    stretched=lambda c, a, b: (a, b / c[..., None, None]),
)
PRECISION = Form(
    "precision matrix",
    "(a log det T - tr(B T)) / 2",
    lambda a, b: inverse(b / a[..., None, None]),
    (0, 2),
    event_dim=2,
    conjugate={dist.Wishart: lambda p: (p.df - p.event_shape[-1] - 1, p.precision_matrix)},
    domain=("positive_definite",),
    stretched=lambda c, a, b: (a, b * c[..., None, None]),
)
SCALE_TRIL = Form(
    "Cholesky factor",
    "-(a log det TT' + tr(B (TT')^-1)) / 2",
    lambda a, b: cholesky(b / a[..., None, None]),
    (0, 2),
    event_dim=2,
    domain=("lower_cholesky",),
)


def _inverse_digamma(y: Tensor) -> Tensor:
    """Newton's method from Minka's start (Estimating a Dirichlet distribution, 2000)."""
    t = torch.where(y >= -2.22, y.exp() + 0.5, -1 / (y - torch.digamma(torch.ones_like(y))))
    for _ in range(6):
        t = t - (torch.digamma(t) - y) / torch.polygamma(1, t)
    return t


def _profile_shape(b: Tensor, a: Tensor) -> Tensor:
    """The root of ``log t - digamma(t) = -b / a``: Newton's method in ``1 / t`` (Minka, 2002)."""
    gap = -b / a
    t = (3 - gap + ((gap - 3) ** 2 + 24 * gap).sqrt()) / (12 * gap)
    for _ in range(6):
        slope = t**2 * (1 / t - torch.polygamma(1, t))
        t = 1 / (1 / t + (t.log() - torch.digamma(t) - gap) / slope)
    return t


def _dispersion(b: Tensor, a: Tensor) -> Tensor:
    """The root of ``I1(t) / I0(t) = b / a``: Newton's method; 0 where ``b`` is not positive."""
    r = (b / a).clamp(0, 1)
    t = r * (2 - r**2) / (1 - r**2)  # Banerjee et al. (2005)
    for _ in range(8):
        ratio = torch.special.i1e(t) / torch.special.i0e(t)
        slope = 1 - ratio**2 - torch.where(t > 0, ratio / t, 0.5)
        t = (t - (ratio - r) / slope).clamp(min=0)
    return t


SHAPE = Form(
    "shape",
    "b t - a log Gamma(t)",
    lambda b, a: _inverse_digamma(b / a),
    (0, 0),
)
PROFILE_SHAPE = Form(
    "profile of the shape",
    "b t - a (log Gamma(t) - t log t + t)",
    _profile_shape,
    (0, 0),
)
DEGREES = Form(
    "degrees of freedom",
    "b t / 2 - a (log Gamma(t / 2) - t log(t / 2) / 2 + t / 2)",
    lambda b, a: 2 * _profile_shape(b, a),
    (0, 0),
)
FREE = tuple(Form("free", "unknown", _unknown, (), event_dim=e) for e in range(3))
DIRECTION = Form(
    "direction", "a cos t + b sin t", lambda a, b: torch.atan2(b, a), (0, 0), domain=("circle",)
)
DISPERSION = Form("dispersion", "b t - a log I0(t)", _dispersion, (0, 0))


def _weighted_median(index: Tensor, count: int, b: Tensor, a: Tensor) -> Tensor:
    """For each block the smallest ``t = b / a`` below which half of the sum of ``a`` lies."""
    index, b, a = index[a > 0], b[a > 0], a[a > 0]
    points = b / a
    order = points.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    index, points, a = index[order], points[order], a[order]
    ends = torch.bincount(index, minlength=count).cumsum(0)
    before = torch.cat([a.new_zeros(1), a.cumsum(0)])
    low = before[torch.cat([ends.new_zeros(1), ends[:-1]])]
    half = (low + before[ends]) / 2
    at = torch.searchsorted(before[1:].contiguous(), half.contiguous()).clamp(max=len(points) - 1)
    full = ends > torch.cat([ends.new_zeros(1), ends[:-1]])
    return torch.where(full, points[torch.minimum(at, (ends - 1).clamp(min=0))], torch.nan)


MEDIAN = Form(
    "median",
    "-sum_n |a_n t - b_n|",
    _unknown,
    (0, 0),
    conjugate={dist.Laplace: lambda p: (p.loc / p.scale, 1 / p.scale)},
    mode_of_cells=_weighted_median,
)


def _definite(x: Tensor) -> Tensor:
    """Whether each matrix is finite and positive definite."""
    finite = x.isfinite().all(-1).all(-1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    _, info = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], x, eye))
    return finite & (info == 0)


def _guarded(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    good = _definite(x)[..., None, None]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.where(good, f(torch.where(good, x, eye)), torch.nan)


def inverse(x: Tensor) -> Tensor:
    """The inverse of symmetric positive definite matrices; NaN where they are not."""
    return _guarded(x, lambda m: torch.cholesky_inverse(torch.linalg.cholesky(m)))


def cholesky(x: Tensor) -> Tensor:
    """The Cholesky factor; NaN where a matrix is not positive definite."""
    return _guarded(x, torch.linalg.cholesky)


def clip_through(
    t: Tensor, floor: Tensor, to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """Clip the covariance ``to(t)``; where nothing is low, ``t`` itself is returned."""
    covariance = to(t)
    clipped = clip_eigenvalues(covariance, floor)
    changed = (clipped != covariance).any(-1).any(-1)[..., None, None]
    return torch.where(changed, back(clipped), t)


def clip_eigenvalues(covariance: Tensor, floor: Tensor) -> Tensor:
    """Raise the eigenvalues of ``D^-1/2 covariance D^-1/2``, ``D = diag(floor)``, to at least one.

    This is the maximiser of the covariance kernel among the matrices that exceed ``D``
    (blocks ``... D D`` and ``... D``); matrices that exceed it already are returned as they are.
    """
    finite = covariance.isfinite().all(-1).all(-1)[..., None, None]
    root = floor.sqrt()
    scaled = covariance / (root.unsqueeze(-1) * root.unsqueeze(-2))
    eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, scaled, eye))
    low = (values < 1).any(-1)[..., None, None]
    lifted = (vectors * values.clamp(min=1).unsqueeze(-2)) @ vectors.mT
    return torch.where(low & finite, lifted * (root.unsqueeze(-1) * root.unsqueeze(-2)), covariance)
