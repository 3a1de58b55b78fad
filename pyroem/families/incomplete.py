"""Multivariate normals and Student's t with missing elements: expected statistics of complete rows.

With ``o`` the elements seen of a row and ``m`` the others, at the current arguments

    E[x_m | x_o] = mu_m + B (x_o - mu_o),   Cov[x_m | x_o] = Sigma_mm - B Sigma_om,
    B = Sigma_mo Sigma_oo^-1

(of Student's t given the weight ``u`` of the row, and ``Cov / u``). What differs between rows that
show the same elements is linear in the statistics of these: sums over such rows will do.

Source: Dempster, Laird and Rubin (1977), section 4.1.2; Liu and Rubin (1995) for Student's t.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import seen_tril
from pyroem.families.family import Arguments, Family, Partial, Statistics, flat

LOG_2PI = math.log(2 * math.pi)


def incomplete(base: Family) -> Family | None:
    """The family of rows with missing elements, from that of complete rows."""
    if base.event_dims not in ((1, 2), (1, 2, 0, 0)):
        return None

    def arguments(d: Any) -> Arguments:
        return base.arguments(d.base_dist)

    student = base.latent is not None

    def latent(d: Any, args: Arguments, x: Tensor) -> Statistics:
        if student:
            return _student(d.seen, args, x)
        return _normal(d.seen, args, x)

    return replace(
        base,
        arguments=arguments,
        statistics=lambda d, x: latent(d, arguments(d), x),
        latent=latent,
        natural=None,
        base_measure=flat,
        given=lambda d, x: (d.seen.to(x),),
        partial=None if student else Partial(lambda d: d.seen, natural, complete),
    )


def _scatter(args: Arguments) -> Tensor:
    """``Sigma``, however it is given."""
    if "scale_tril" in args:
        return args["scale_tril"] @ args["scale_tril"].mT
    return args["cov_factor"] @ args["cov_factor"].mT + torch.diag_embed(args["cov_diag"])


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _inverse(scatter: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """``Sigma_oo^-1`` with zeros elsewhere, and ``log det Sigma_oo``."""
    tril = seen_tril(scatter, seen)
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(both, torch.cholesky_inverse(tril), 0.0), log_det


def _regression(scatter: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """``G`` with ``E[x | x_o] = mu + G (x - mu)``, whose columns of missing elements are zero, and
    the covariance of ``x`` given ``x_o``.
    """
    return _from_inverse(scatter, seen, _inverse(scatter, seen)[0])


def _from_inverse(scatter: Tensor, seen: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.eye(seen.shape[-1], dtype=scatter.dtype, device=scatter.device)
    product = scatter @ inverse
    gain = torch.where(seen.unsqueeze(-1), one, product)
    neither = ~(seen.unsqueeze(-1) | seen.unsqueeze(-2))
    rest = torch.where(neither, scatter - product @ scatter, 0.0)
    return gain, rest


def _expected(seen: Tensor, args: Arguments, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row completed, and the covariance of what is missing."""
    gain, rest = _regression(_scatter(args), seen)
    loc = args["loc"]
    away = torch.where(seen, x - loc, 0.0)
    return loc + (gain @ away.unsqueeze(-1)).squeeze(-1), rest


def _normal(seen: Tensor, args: Arguments, x: Tensor) -> Statistics:
    filled, rest = _expected(seen, args, x)
    return filled, _outer(filled, filled) + rest


def _student(seen: Tensor, args: Arguments, x: Tensor) -> Statistics:
    filled, rest = _expected(seen, args, x)
    shape, rate = _posterior_of_weight(seen, args, x)
    u = shape / rate
    first = u.unsqueeze(-1) * filled
    second = first.unsqueeze(-1) * filled.unsqueeze(-2) + rest
    return first, second, u, torch.digamma(shape) - rate.log()


def _posterior_of_weight(seen: Tensor, args: Arguments, x: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and rate of the gamma distribution of a row's weight ``u``."""
    inverse, _ = _inverse(_scatter(args), seen)
    away = torch.where(seen, x - args["loc"], 0.0).unsqueeze(-1)
    distance = (away.mT @ inverse @ away).squeeze(-1).squeeze(-1)
    return (args["df"] + seen.sum(-1)) / 2, (args["df"] + distance) / 2


def natural(args: Arguments, seen: Tensor) -> tuple[Statistics, Tensor]:
    """Natural parameters and log-normaliser of what is seen; zero for the statistics of the rest.

    ``args`` are those of states and ``seen [P, D]`` the patterns, which get a dim of their own
    after that of the states.
    """
    loc = args["loc"].unsqueeze(-2)
    inverse, log_det = _inverse(_scatter(args).unsqueeze(-3), seen)
    first = (inverse @ loc.unsqueeze(-1)).squeeze(-1)
    count = seen.sum(-1).to(loc)
    normaliser = 0.5 * ((loc * first).sum(-1) + count * LOG_2PI + log_det)
    return (first, -0.5 * inverse), normaliser


def complete(
    args: Arguments, seen: Tensor, eta: Statistics, s: Statistics, w: Tensor
) -> Statistics:
    """Expected statistics of complete rows from those of rows with the patterns ``seen``.

    ``eta`` are the natural parameters. ``s`` and ``w`` have the states, then the patterns; the
    result is the sum over these.
    """
    gain, rest = _from_inverse(_scatter(args).unsqueeze(-3), seen, -2 * eta[1])
    loc = args["loc"].unsqueeze(-2)
    shift = loc - (gain @ loc.unsqueeze(-1)).squeeze(-1)
    moved = (gain @ s[0].unsqueeze(-1)).squeeze(-1)
    cross = _outer(moved, shift)
    inner = gain @ s[1] @ gain.mT + cross + cross.mT
    second = inner + w[..., None, None] * (_outer(shift, shift) + rest)
    first = moved + w.unsqueeze(-1) * shift
    return first.sum(-2), second.sum(-3)


def conditional(base: Any, seen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a normal or Student's t completed by their conditional means, and the (scale's)
    covariance of what is missing.
    """
    return _expected(seen, {"loc": base.loc, "scale_tril": base.scale_tril}, x)


def conditional_draw(base: Any, seen: Tensor, x: Tensor) -> Tensor:
    """Rows with what is missing drawn from its distribution given what is seen."""
    filled, rest = conditional(base, seen, x)
    noise = torch.randn(filled.shape, dtype=filled.dtype)
    if hasattr(base, "df"):
        args = {"df": base.df, "loc": base.loc, "scale_tril": base.scale_tril}
        shape, rate = _posterior_of_weight(seen, args, x)
        weight = torch._standard_gamma(shape.expand(filled.shape[:-1]).contiguous()) / rate
        noise = noise / weight.sqrt().unsqueeze(-1)
    tril = seen_tril(rest, ~seen)
    drawn = (tril @ noise.unsqueeze(-1)).squeeze(-1)
    return torch.where(seen, filled, filled + drawn)
