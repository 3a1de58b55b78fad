"""The families that pyroem ships. Notation: ``w`` = total weight, ``s`` = expected statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions.utils import logits_to_probs, probs_to_logits
from torch.nn.functional import logsigmoid

from pyroem.families import forms
from pyroem.families.coordinates import covariances, probabilities, rates, scales
from pyroem.families.family import Arguments, Coordinate, Family, Statistics, flat, register_family

LOG_2PI = math.log(2 * math.pi)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)


# Normal: T(x) = (x, x^2).


def _normal_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    loc, scale = args["loc"], args["scale"]
    return -0.5 * _squares(args, s, w) / scale**2 - w * (scale.log() + 0.5 * LOG_2PI) + 0 * loc


def _normal_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    loc, precision = args["loc"], args["scale"] ** -2
    first = loc * precision
    normaliser = 0.5 * (loc * first + LOG_2PI) + args["scale"].log()
    return (first, -0.5 * precision), normaliser


def _squares(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    """``sum_n w_n (x_n - loc)^2``, kept from going negative by rounding."""
    loc = args["loc"]
    return torch.addcmul(s[1], loc, torch.sub(loc * w, s[0], alpha=2)).clamp(min=0)


def _scale_coefficients(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    squares = _squares(args, s, w)
    return w.expand_as(squares), 0.5 * squares


def _normal_location(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    precision = args["scale"] ** -2
    return s[0] * precision, w * precision


register_family(
    dist.Normal,
    Family(
        lambda d: {"loc": d.loc, "scale": d.scale},
        lambda d, x: (x, x**2),
        _normal_log_density,
        natural=_normal_natural,
        base_measure=flat,
        packed=lambda d, x, empty: (x, torch.square(x, out=empty(x.shape))),
        event_dims=(0, 0),
        location="loc",
        variance=lambda args: args["scale"] ** 2,
        coordinates=(
            Coordinate("loc", "loc", forms.LOCATION, _normal_location),
            *scales(_scale_coefficients),
        ),
    ),
)


# MultivariateNormal: T(x) = (x, x x').


def scatter(loc: Tensor, first: Tensor, second: Tensor, w: Tensor) -> Tensor:
    """``sum_n w_n (x_n - loc)(x_n - loc)'`` from the sums of ``w``, ``w x`` and ``w x x'``."""
    cross = _outer(first, loc)
    result = second - cross - cross.mT + _outer(loc, loc) * w[..., None, None]
    return 0.5 * (result + result.mT)


def multivariate_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    """The expected log-density of a multivariate normal."""
    tril = args["scale_tril"]
    around = scatter(args["loc"], s[0], s[1], w)
    shape = torch.broadcast_shapes(tril.shape, around.shape)
    tril, around = tril.expand(shape), around.expand(shape)
    half = torch.linalg.solve_triangular(tril, around, upper=False)
    distance = torch.linalg.solve_triangular(tril, half.mT, upper=False)
    quadratic = distance.diagonal(dim1=-2, dim2=-1).sum(-1)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * quadratic - w * (log_det + 0.5 * LOG_2PI * tril.shape[-1])


def multivariate_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    """Its natural parameters and log-normaliser."""
    tril = args["scale_tril"]
    precision = torch.cholesky_inverse(tril)
    first = (precision @ args["loc"].unsqueeze(-1)).squeeze(-1)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    distance = (args["loc"] * first).sum(-1)
    normaliser = 0.5 * (distance + LOG_2PI * tril.shape[-1]) + log_det
    return (first, -0.5 * precision), normaliser


def _lower_products(x: Tensor, empty: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """``x_i x_j`` for ``i >= j``, row by row; rows of data stay contiguous in memory."""
    columns = x.movedim(-1, 0)
    size = columns.shape[0]
    result = empty((size * (size + 1) // 2, *columns.shape[1:]))
    at = 0
    for i in range(size):
        torch.mul(columns[i], columns[: i + 1], out=result[at : at + i + 1])
        at += i + 1
    return result.movedim(0, -1)


def packed_products(
    d: object, x: Tensor, empty: Callable[[Sequence[int]], Tensor]
) -> tuple[Tensor, Tensor]:
    """``x`` and the lower triangle of ``x x'``."""
    return x, _lower_products(x, empty)


def multivariate_location(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    """The kernel of a mean vector."""
    precision = torch.cholesky_inverse(args["scale_tril"])
    b = (precision @ s[0].unsqueeze(-1)).squeeze(-1)
    return b, precision * w[..., None, None]


def _covariance_coefficients(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    around = scatter(args["loc"], s[0], s[1], w)
    return w.expand(around.shape[:-2]), around


register_family(
    dist.MultivariateNormal,
    Family(
        lambda d: {"loc": d.loc, "scale_tril": d._unbroadcasted_scale_tril},
        lambda d, x: (x, _outer(x, x)),
        multivariate_log_density,
        natural=multivariate_natural,
        base_measure=flat,
        packed=packed_products,
        event_dims=(1, 2),
        argument_dims={"loc": 1, "scale_tril": 2},
        location="loc",
        variance=lambda args: args["scale_tril"].diagonal(dim1=-2, dim2=-1) ** 2,
        coordinates=(
            Coordinate("loc", "loc", forms.VECTOR_LOCATION, multivariate_location),
            *covariances(_covariance_coefficients),
        ),
    ),
)


# Bernoulli: T(x) = x. Binomial: T(x) = (x, n - x), for n may differ by row. NegativeBinomial with a
# given number r of failures: T(x) = (x, r).


def _outcomes(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    """Successes and failures."""
    return s[0], (w - s[0]).clamp(min=0) if len(s) == 1 else s[1]


_SUCCESS = probabilities(_outcomes)


def _binary_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    logits = args["logits"]
    successes, failures = (s[0], w - s[0]) if len(s) == 1 else s
    return successes * logsigmoid(logits) + failures * logsigmoid(-logits) + 0 * w


def _bernoulli_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    return (args["logits"],), -logsigmoid(-args["logits"])


def _binomial_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    logits = args["logits"]
    return (logsigmoid(logits), logsigmoid(-logits)), torch.zeros_like(logits)


def _choose(d: dist.Binomial, x: Tensor) -> Tensor:
    n = d.total_count
    return torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)


register_family(
    dist.Bernoulli,
    Family(
        lambda d: {"logits": d.logits},
        lambda d, x: (x,),
        _binary_log_density,
        natural=_bernoulli_natural,
        base_measure=flat,
        event_dims=(0,),
        coordinates=_SUCCESS,
    ),
)
register_family(
    dist.Binomial,
    Family(
        lambda d: {"logits": d.logits},
        lambda d, x: (x, d.total_count - x),
        _binary_log_density,
        natural=_binomial_natural,
        base_measure=_choose,
        event_dims=(0, 0),
        coordinates=_SUCCESS,
    ),
)


def _waits(d: dist.NegativeBinomial, x: Tensor) -> Tensor:
    r = d.total_count
    return torch.lgamma(x + r) - torch.lgamma(x + 1) - torch.lgamma(r)


register_family(
    dist.NegativeBinomial,
    Family(
        lambda d: {"logits": d.logits},
        lambda d, x: (x, d.total_count.to(x)),
        _binary_log_density,
        natural=_binomial_natural,
        base_measure=_waits,
        event_dims=(0, 0),
        coordinates=_SUCCESS,
    ),
)


# Categorical, OneHotCategorical, Multinomial: T(x) = counts of each category.


def _count_coefficients(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor]:
    return (s[0],)


def _count_log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
    return (s[0] * args["logits"]).sum(-1) + 0 * w


def _count_natural(args: Arguments) -> tuple[Statistics, Tensor]:
    logits = args["logits"]
    return (logits,), torch.zeros_like(logits[..., 0])


def _arrangements(d: dist.Multinomial, x: Tensor) -> Tensor:
    return torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)


_CATEGORIES = (
    Coordinate(
        "probs",
        "logits",
        forms.SIMPLEX,
        _count_coefficients,
        logits_to_probs,
        probs_to_logits,
        canonical=lambda p: p / p.sum(-1, keepdim=True),
    ),
    Coordinate(
        "logits",
        "logits",
        forms.LOGITS,
        _count_coefficients,
        canonical=lambda t: t - t.logsumexp(-1, keepdim=True),
    ),
)


def _one_hot(d: dist.Categorical, x: Tensor) -> Statistics:
    states = torch.arange(d.logits.shape[-1], device=x.device)
    return ((x.unsqueeze(-1) == states).to(d.logits.dtype),)


for _class, _statistics, _measure in (
    (dist.Categorical, _one_hot, flat),
    (dist.OneHotCategorical, lambda d, x: (x,), flat),
    (dist.Multinomial, lambda d, x: (x,), _arrangements),
):
    register_family(
        _class,
        Family(
            lambda d: {"logits": d.logits},
            _statistics,
            _count_log_density,
            natural=_count_natural,
            base_measure=_measure,
            event_dims=(1,),
            argument_dims={"logits": 1},
            coordinates=_CATEGORIES,
        ),
    )


# Poisson and Exponential: a log(rate) - b rate, with the roles of weight and data exchanged.


def _poisson_coefficients(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return s[0], w


def _exponential_coefficients(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    return w, s[0]


register_family(
    dist.Poisson,
    Family(
        lambda d: {"rate": d.rate},
        lambda d, x: (x,),
        lambda args, s, w: torch.xlogy(s[0], args["rate"]) - w * args["rate"],
        natural=lambda args: ((args["rate"].log(),), args["rate"]),
        base_measure=lambda d, x: -torch.lgamma(x + 1),
        coordinates=rates(_poisson_coefficients),
    ),
)
register_family(
    dist.Exponential,
    Family(
        lambda d: {"rate": d.rate},
        lambda d, x: (x,),
        lambda args, s, w: torch.xlogy(w, args["rate"]) - s[0] * args["rate"],
        natural=lambda args: ((-args["rate"],), -args["rate"].log()),
        base_measure=flat,
        coordinates=rates(_exponential_coefficients, "mean"),
    ),
)
