"""Families on the positive half-line, the unit interval, the simplex and the circle, and geometric
counts. Notation: ``w`` = total weight, ``s`` = expected statistics.
"""

from __future__ import annotations

import math

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions.von_mises import _log_modified_bessel_fn as log_bessel
from torch.nn.functional import logsigmoid

from pyroem.families import forms
from pyroem.families.coordinates import probabilities, rates, scales
from pyroem.families.family import Arguments, Coordinate, Family, Statistics, flat, register_family
from pyroem.families.generic import free
from pyroem.families.standard import (
    multivariate_location,
    multivariate_log_density,
    multivariate_natural,
    packed_products,
)

LOG_2PI, LOG_HALF_PI = math.log(2 * math.pi), math.log(0.5 * math.pi)

# Gamma: T(x) = (x, log x); InverseGamma is the same in 1 / x.


def _gamma_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    shape, rate = args["concentration"], args["rate"]
    return shape * s[1] - rate * s[0] - w * (torch.lgamma(shape) - shape * rate.log())


def _gamma_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    shape, rate = args["concentration"], args["rate"]
    return (-rate, shape), torch.lgamma(shape) - shape * rate.log()


def _gamma_rate(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return w * args["concentration"], s[0]


def _gamma_shape(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return torch.broadcast_tensors(s[1] + w * args["rate"].log(), w)


def _gamma_profile(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    """With the rate at its maximiser ``w shape / s[0]``."""
    return torch.broadcast_tensors(s[1] + w * (w / s[0]).log(), w)


_GAMMA = (
    Coordinate(
        "concentration",
        "concentration",
        forms.SHAPE,
        _gamma_shape,
        profile=Coordinate("concentration", "concentration", forms.PROFILE_SHAPE, _gamma_profile),
    ),
    *rates(_gamma_rate, "scale"),
)

register_family(
    dist.Gamma,
    Family(
        lambda d: {"concentration": d.concentration, "rate": d.rate},
        lambda d, x: (x, x.log()),
        _gamma_log_density,
        natural=_gamma_natural,
        base_measure=lambda d, x: -x.log(),
        event_dims=(0, 0),
        coordinates=_GAMMA,
    ),
)
register_family(
    dist.InverseGamma,
    Family(
        lambda d: {"concentration": d.concentration, "rate": d.rate},
        lambda d, x: (x.reciprocal(), -x.log()),
        _gamma_log_density,
        natural=_gamma_natural,
        base_measure=lambda d, x: -x.log(),
        event_dims=(0, 0),
        coordinates=_GAMMA,
    ),
)


# HalfNormal: T(x) = x^2.


def _half_scale(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return torch.broadcast_tensors(w, 0.5 * s[0])


register_family(
    dist.HalfNormal,
    Family(
        lambda d: {"scale": d.scale},
        lambda d, x: (x**2,),
        lambda args, s, w: (
            -0.5 * s[0] / args["scale"] ** 2 - w * (args["scale"].log() + 0.5 * LOG_HALF_PI)
        ),
        natural=lambda args: (
            (-0.5 * args["scale"] ** -2,),
            args["scale"].log() + 0.5 * LOG_HALF_PI,
        ),
        base_measure=flat,
        coordinates=scales(_half_scale),
    ),
)


# Beta: T(x) = (log x, log(1 - x)). Dirichlet: T(x) = log x.


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _beta_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    a, b = args["concentration1"], args["concentration0"]
    return a * s[0] + b * s[1] - w * _log_beta(a, b)


def _beta_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    a, b = args["concentration1"], args["concentration0"]
    return tuple(torch.broadcast_tensors(a, b)), _log_beta(a, b)


register_family(
    dist.Beta,
    Family(
        lambda d: {"concentration1": d.concentration1, "concentration0": d.concentration0},
        lambda d, x: (x.log(), torch.log1p(-x)),
        _beta_log_density,
        natural=_beta_natural,
        base_measure=lambda d, x: -x.log() - torch.log1p(-x),
        event_dims=(0, 0),
        coordinates=(free("concentration1"), free("concentration0")),
    ),
)


def _log_dirichlet(concentration: Tensor) -> Tensor:
    return torch.lgamma(concentration).sum(-1) - torch.lgamma(concentration.sum(-1))


register_family(
    dist.Dirichlet,
    Family(
        lambda d: {"concentration": d.concentration},
        lambda d, x: (x.log(),),
        lambda args, s, w: (
            (args["concentration"] * s[0]).sum(-1) - w * _log_dirichlet(args["concentration"])
        ),
        natural=lambda args: (
            (args["concentration"],),
            _log_dirichlet(args["concentration"]),
        ),
        base_measure=lambda d, x: -x.log().sum(-1),
        event_dims=(1,),
        argument_dims={"concentration": 1},
        coordinates=(free("concentration", 1),),
    ),
)


# VonMises: T(x) = (cos x, sin x). Its normaliser is torch's own, good to 1e-7.


def _circular_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    loc, k = args["loc"], args["concentration"]
    along = s[0] * loc.cos() + s[1] * loc.sin()
    return k * along - w * (LOG_2PI + log_bessel(k, order=0))


def _circular_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    loc, k = args["loc"], args["concentration"]
    return (k * loc.cos(), k * loc.sin()), LOG_2PI + log_bessel(k, order=0) + 0 * loc


def _direction(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return s[0] * args["concentration"], s[1] * args["concentration"]


def _dispersion(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    along = s[0] * args["loc"].cos() + s[1] * args["loc"].sin()
    return torch.broadcast_tensors(along, w)


register_family(
    dist.VonMises,
    Family(
        lambda d: {"loc": d.loc, "concentration": d.concentration},
        lambda d, x: (x.cos(), x.sin()),
        _circular_log_density,
        natural=_circular_natural,
        base_measure=flat,
        event_dims=(0, 0),
        leading="loc",
        coordinates=(
            Coordinate("loc", "loc", forms.DIRECTION, _direction),
            Coordinate("concentration", "concentration", forms.DISPERSION, _dispersion),
        ),
    ),
)


# Geometric: T(x) = x failures before the one success.


def _trials(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return torch.broadcast_tensors(w, s[0])


register_family(
    dist.Geometric,
    Family(
        lambda d: {"logits": d.logits},
        lambda d, x: (x,),
        lambda args, s, w: w * logsigmoid(args["logits"]) + s[0] * logsigmoid(-args["logits"]),
        natural=lambda args: ((logsigmoid(-args["logits"]),), -logsigmoid(args["logits"])),
        base_measure=flat,
        coordinates=probabilities(_trials),
    ),
)


# Laplace: the rows themselves. The location is a weighted median.


def _absolute(s: Statistics, w: Tensor, args: Arguments) -> Tensor:
    return (s[0] - w * args["loc"]).abs()


def _laplace_location(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return s[0] / args["scale"], w / args["scale"]


def _laplace_scale(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return torch.broadcast_tensors(w, _absolute(s, w, args))


register_family(
    dist.Laplace,
    Family(
        lambda d: {"loc": d.loc, "scale": d.scale},
        lambda d, x: (x,),
        lambda args, s, w: -_absolute(s, w, args) / args["scale"] - w * (2 * args["scale"]).log(),
        leading="loc",
        by_row=True,
        coordinates=(
            Coordinate("loc", "loc", forms.MEDIAN, _laplace_location),
            Coordinate("scale", "scale", forms.INVERSE_RATE, _laplace_scale),
            Coordinate(
                "rate", "scale", forms.RATE, _laplace_scale, torch.reciprocal, torch.reciprocal
            ),
        ),
    ),
)


# LowRankMultivariateNormal: T(x) = (x, x x'), with covariance W W' + diag(d).


def _low_rank(args: Arguments) -> Arguments:
    factor, diagonal = args["cov_factor"], args["cov_diag"]
    covariance = factor @ factor.mT + torch.diag_embed(diagonal)
    return {"loc": args["loc"], "scale_tril": torch.linalg.cholesky(covariance)}


def _factor_location(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return multivariate_location(s, w, _low_rank(args))


register_family(
    dist.LowRankMultivariateNormal,
    Family(
        lambda d: {
            "loc": d.loc,
            "cov_factor": d._unbroadcasted_cov_factor,
            "cov_diag": d._unbroadcasted_cov_diag,
        },
        lambda d, x: (x, x.unsqueeze(-1) * x.unsqueeze(-2)),
        lambda args, s, w: multivariate_log_density(_low_rank(args), s, w),
        natural=lambda args: multivariate_natural(_low_rank(args)),
        base_measure=flat,
        packed=packed_products,
        event_dims=(1, 2),
        argument_dims={"loc": 1, "cov_factor": 2, "cov_diag": 1},
        location="loc",
        variance=lambda args: args["cov_diag"],
        coordinates=(
            Coordinate("loc", "loc", forms.VECTOR_LOCATION, _factor_location),
            free("cov_factor", 2),
            free("cov_diag", 1),
        ),
    ),
)
