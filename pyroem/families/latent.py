"""Families with a latent variable of their own: Student's t as a mixture of Gaussians of all
scales, and zero inflation. Their expected statistics are those at the current arguments: an E-step
within the E-step. Notation: ``w`` = total weight, ``s`` = expected statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyroem.families import forms
from pyroem.families.coordinates import covariances, probabilities, scales
from pyroem.families.family import Arguments, Coordinate, Family, Statistics, register_family
from pyroem.families.standard import scatter

LOG_2PI = math.log(2 * math.pi)

# Student's t: x | u ~ Normal(loc, scale / sqrt(u)), u ~ Gamma(df / 2, df / 2), so that
# u | x ~ Gamma((df + 1) / 2, (df + distance) / 2). T(x) = (u x, u x^2, u, log u), expected.
# Source: Lange, Little and Taylor (1989).


def _weights(df: Tensor, distance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``E u`` and ``E log u``."""
    shape, rate = (df + size) / 2, (df + distance) / 2
    return shape / rate, torch.digamma(shape) - rate.log()


def _gamma_part(df: Tensor, u: Tensor, log_u: Tensor, w: Tensor) -> Tensor:
    half = df / 2
    return half * (log_u - u) - log_u + w * (half * half.log() - torch.lgamma(half))


def _df(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return torch.broadcast_tensors(s[3] - s[2] + w, w)


_DF = Coordinate("df", "df", forms.DEGREES, _df)


def _t_latent(d: Any, args: Arguments, x: Tensor) -> Statistics:
    u, log_u = _weights(args["df"], ((x - args["loc"]) / args["scale"]) ** 2, 1)
    return u * x, u * x**2, u, log_u


def _t_squares(args: Arguments, s: Statistics) -> Tensor:
    return s[1] - 2 * args["loc"] * s[0] + args["loc"] ** 2 * s[2]


def _t_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    scale = args["scale"]
    gaussian = 0.5 * s[3] - 0.5 * _t_squares(args, s) / scale**2
    return gaussian - w * (scale.log() + 0.5 * LOG_2PI) + _gamma_part(args["df"], s[2], s[3], w)


def _t_location(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    precision = args["scale"] ** -2
    return precision * s[0], precision * s[2]


def _t_scale(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return torch.broadcast_tensors(w, 0.5 * _t_squares(args, s))


register_family(
    dist.StudentT,
    Family(
        lambda d: {"df": d.df, "loc": d.loc, "scale": d.scale},
        lambda d, x: _t_latent(d, {"df": d.df, "loc": d.loc, "scale": d.scale}, x),
        _t_log_density,
        event_dims=(0, 0, 0, 0),
        location="loc",
        variance=lambda args: args["scale"] ** 2,
        latent=_t_latent,
        coordinates=(
            Coordinate("loc", "loc", forms.LOCATION, _t_location),
            *scales(_t_scale),
            _DF,
        ),
    ),
)


# MultivariateStudentT: T(x) = (u x, u x x', u, log u), expected.


def _vector_arguments(d: Any) -> Arguments:
    return {"df": d.df, "loc": d.loc, "scale_tril": d._unbroadcasted_scale_tril}


def _vector_latent(d: Any, args: Arguments, x: Tensor) -> Statistics:
    away = (x - args["loc"]).unsqueeze(-1)
    tril = args["scale_tril"]
    shape = torch.broadcast_shapes(away.shape[:-2], tril.shape[:-2])
    size = x.shape[-1]
    tril, away = tril.expand((*shape, size, size)), away.expand((*shape, size, 1))
    half = torch.linalg.solve_triangular(tril, away, upper=False).squeeze(-1)
    u, log_u = _weights(args["df"], (half**2).sum(-1), size)
    ux = u.unsqueeze(-1) * x
    return ux, ux.unsqueeze(-1) * x.unsqueeze(-2), u, log_u


def _vector_scatter(args: Arguments, s: Statistics) -> Tensor:
    return scatter(args["loc"], s[0], s[1], s[2])


def _vector_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    tril, size = args["scale_tril"], s[0].shape[-1]
    precision = torch.cholesky_inverse(tril)
    quadratic = (precision * _vector_scatter(args, s)).sum((-1, -2))
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    gaussian = 0.5 * size * s[3] - 0.5 * quadratic - w * (log_det + 0.5 * LOG_2PI * size)
    return gaussian + _gamma_part(args["df"], s[2], s[3], w)


def _vector_location(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    precision = torch.cholesky_inverse(args["scale_tril"])
    b = (precision @ s[0].unsqueeze(-1)).squeeze(-1)
    return b, precision * s[2][..., None, None]


def _vector_scale(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    found = _vector_scatter(args, s)
    return w.expand(found.shape[:-2]), found


register_family(
    dist.MultivariateStudentT,
    Family(
        _vector_arguments,
        lambda d, x: _vector_latent(d, _vector_arguments(d), x),
        _vector_log_density,
        event_dims=(1, 2, 0, 0),
        argument_dims={"loc": 1, "scale_tril": 2},
        location="loc",
        variance=lambda args: args["scale_tril"].diagonal(dim1=-2, dim2=-1) ** 2,
        latent=_vector_latent,
        coordinates=(
            Coordinate("loc", "loc", forms.VECTOR_LOCATION, _vector_location),
            *covariances(_vector_scale),
            _DF,
        ),
    ),
)


# Zero inflation: r = 1 where a zero is one of the extra zeros.
# T(x) = (r, (1 - r) T_0(x)), expected, with T_0 the statistics of the distribution inside.


def inflated(base: Family) -> Family | None:
    """The family of a zero-inflated distribution, from that of the distribution inside."""
    if base.latent is not None or base.by_row or base.location is not None:
        return None

    def arguments(d: Any) -> Arguments:
        return {"gate_logits": d.gate_logits, **base.arguments(d.base_dist)}

    def latent(d: Any, args: Arguments, x: Tensor) -> Statistics:
        zero = d.base_dist.log_prob(torch.zeros((), dtype=x.dtype))
        r = torch.where(x == 0, torch.sigmoid(d.gate_logits - zero), 0.0)
        rest = 1 - r
        inside = zip(base.statistics(d.base_dist, x), base.event_dims, strict=True)
        return r, *(rest.reshape(rest.shape + (1,) * e) * t for t, e in inside)

    def log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
        gate = args["gate_logits"]
        gated = s[0] * logsigmoid(gate) + (w - s[0]) * logsigmoid(-gate)
        return gated + base.log_density(args, s[1:], w - s[0])

    def zeros(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
        return s[0], (w - s[0]).clamp(min=0)

    def inside(coordinate: Coordinate) -> Coordinate:
        return Coordinate(
            coordinate.name,
            coordinate.argument,
            coordinate.form,
            lambda s, w, args: coordinate.coefficients(s[1:], w - s[0], args),
            coordinate.forward,
            coordinate.inverse,
            coordinate.canonical,
            coordinate.clip,
        )

    return Family(
        arguments,
        lambda d, x: latent(d, arguments(d), x),
        log_density,
        event_dims=(0, *base.event_dims),
        argument_dims=base.argument_dims,
        latent=latent,
        given=lambda d, x: base.statistics(d.base_dist, x),
        coordinates=(
            *probabilities(zeros, "gate", "gate_logits"),
            *(inside(c) for c in base.coordinates),
        ),
    )
