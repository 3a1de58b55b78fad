"""The ways in which programs write a scale, a rate, a probability or a covariance matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions.utils import probs_to_logits

from pyroem.families import forms
from pyroem.families.family import Arguments, Coordinate, Statistics

Coefficients = Callable[[Statistics, Tensor, Arguments], tuple[Tensor, Tensor]]


def scales(coefficients: Coefficients) -> tuple[Coordinate, ...]:
    """``scale`` and its variance, precision and logarithm; ``coefficients`` are the scale's."""

    def half(s: Statistics, w: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
        weight, half_squares = coefficients(s, w, args)
        return 0.5 * weight, half_squares

    return (
        Coordinate(
            "scale",
            "scale",
            forms.SCALE,
            coefficients,
            clip=lambda t, floor: torch.maximum(t, floor.sqrt()),
        ),
        Coordinate(
            "variance",
            "scale",
            forms.INVERSE_RATE,
            half,
            lambda scale: scale**2,
            lambda variance: variance.sqrt(),
            clip=torch.maximum,
        ),
        Coordinate(
            "precision",
            "scale",
            forms.RATE,
            half,
            lambda scale: scale**-2,
            lambda precision: precision.rsqrt(),
            clip=lambda t, floor: torch.minimum(t, 1 / floor),
        ),
        Coordinate(
            "log scale",
            "scale",
            forms.LOG_SCALE,
            coefficients,
            torch.log,
            torch.exp,
            clip=lambda t, floor: torch.maximum(t, floor.log() / 2),
        ),
    )


def rates(coefficients: Coefficients, inverse: str | None = None) -> tuple[Coordinate, ...]:
    """``rate`` and its logarithm, and what its ``inverse`` is called where there is one."""
    found = [Coordinate("rate", "rate", forms.RATE, coefficients)]
    if inverse is not None:
        there, back = torch.reciprocal, torch.reciprocal
        found.append(Coordinate(inverse, "rate", forms.INVERSE_RATE, coefficients, there, back))
    log_rate = Coordinate("log rate", "rate", forms.LOG_RATE, coefficients, torch.log, torch.exp)
    return *found, log_rate


def probabilities(
    coefficients: Coefficients, name: str = "probs", logits: str = "logits"
) -> tuple[Coordinate, ...]:
    """The probability of a success and its logit."""
    return (
        Coordinate(
            name,
            logits,
            forms.PROBABILITY,
            coefficients,
            torch.sigmoid,
            lambda p: probs_to_logits(p, is_binary=True),
        ),
        Coordinate(logits, logits, forms.LOGIT, coefficients),
    )


def covariances(coefficients: Coefficients) -> tuple[Coordinate, ...]:
    """``covariance_matrix``, its Cholesky factor ``scale_tril`` and its inverse."""
    return (
        Coordinate(
            "covariance_matrix",
            "scale_tril",
            forms.COVARIANCE,
            coefficients,
            lambda tril: tril @ tril.mT,
            forms.cholesky,
            clip=forms.clip_eigenvalues,
        ),
        Coordinate(
            "scale_tril",
            "scale_tril",
            forms.SCALE_TRIL,
            coefficients,
            clip=lambda t, floor: forms.clip_through(t, floor, lambda m: m @ m.mT, forms.cholesky),
        ),
        Coordinate(
            "precision_matrix",
            "scale_tril",
            forms.PRECISION,
            coefficients,
            torch.cholesky_inverse,
            lambda p: forms.cholesky(forms.inverse(p)),
            clip=lambda t, floor: forms.clip_through(t, floor, forms.inverse, forms.inverse),
        ),
    )
