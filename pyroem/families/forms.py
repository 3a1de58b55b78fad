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
    conjugate
        Prior distribution type to its coefficients (a function of the distribution).
    domain
        The supports on which the mode is the maximiser: ``"scalar"`` (the kernel is unimodal, so
        any interval will do: the mode is clipped to it), or names of constraints.
    """

    name: str
    kernel: str
    mode: Callable[..., Tensor]
    coefficient_dims: tuple[int, ...]
    event_dim: int = 0
    conjugate: dict[type, Callable[[Any], Coefficients]] = field(default_factory=dict)
    domain: tuple[str, ...] = ("scalar",)


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


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


LOCATION = Form(
    "location",
    "b t - a t^2 / 2",
    _ratio,
    (0, 0),
    conjugate={dist.Normal: lambda p: (p.loc / p.scale**2, p.scale**-2)},
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
)
LOG_RATE = Form("log rate", "a t - b exp(t)", lambda a, b: (a / b).log(), (0, 0))
INVERSE_RATE = Form(
    "inverse rate",
    "-a log t - b / t",
    lambda a, b: b / a,
    (0, 0),
    conjugate={dist.InverseGamma: lambda p: (p.concentration + 1, p.rate)},
)
SCALE = Form("scale", "-a log t - b / t^2", lambda a, b: (2 * b / a).sqrt(), (0, 0))
LOG_SCALE = Form("log scale", "-a t - b exp(-2 t)", lambda a, b: (2 * b / a).log() / 2, (0, 0))
PROBABILITY = Form(
    "probability",
    "a log t + b log(1 - t)",
    lambda a, b: a / (a + b),
    (0, 0),
    conjugate={dist.Beta: lambda p: (p.concentration1 - 1, p.concentration0 - 1)},
)
LOGIT = Form("logit", "a t - (a + b) log(1 + exp(t))", lambda a, b: (a / b).log(), (0, 0))
SIMPLEX = Form(
    "simplex",
    "sum_k a_k log t_k",
    lambda a: a.clamp(min=0) / a.clamp(min=0).sum(-1, keepdim=True),
    (1,),
    event_dim=1,
    conjugate={dist.Dirichlet: lambda p: (p.concentration - 1,)},
    domain=("simplex", "positive_vector"),
)
LOGITS = Form(
    "logits",
    "sum_k a_k t_k - (sum_k a_k) log(sum_k exp(t_k))",
    lambda a: (a / a.sum(-1, keepdim=True)).log(),
    (1,),
    event_dim=1,
    domain=("real_vector",),
)
COVARIANCE = Form(
    "covariance",
    "-(a log det T + tr(B T^-1)) / 2",
    lambda a, b: b / a[..., None, None],
    (0, 2),
    event_dim=2,
    domain=("positive_definite",),
)
PRECISION = Form(
    "precision matrix",
    "(a log det T - tr(B T)) / 2",
    lambda a, b: inverse(b / a[..., None, None]),
    (0, 2),
    event_dim=2,
    domain=("positive_definite",),
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
DIRECTION = Form(
    "direction", "a cos t + b sin t", lambda a, b: torch.atan2(b, a), (0, 0), domain=("circle",)
)
DISPERSION = Form("dispersion", "b t - a log I0(t)", _dispersion, (0, 0))


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
