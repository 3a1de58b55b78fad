"""Any distribution that can be built again from its arguments: its statistics are the rows.

It has no statistics of a fixed size (or none that is known), so the M-step is a search over the
weighted data itself, without another run of the program.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import is_dependent

from pyroem.families import forms
from pyroem.families.family import Arguments, Coordinate, Family, Statistics

_SAME = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix"),
    ("scale_tril", "precision_matrix"),
)


def generic(distribution: Any) -> Family | None:
    """The family of a distribution class of whatever kind; None where it cannot be rebuilt."""
    kind: Any = type(distribution)
    supports = getattr(kind, "arg_constraints", None)
    if not isinstance(supports, Mapping) or not supports:
        return None
    accepted = inspect.signature(kind).parameters
    names = [n for n in supports if n in accepted]
    if any(is_dependent(supports[n]) for n in names):
        return None  # of how many dims is not known
    for kept, dropped in _SAME:
        if kept in names and dropped in names:
            names.remove(dropped)
    values = [getattr(distribution, n, None) for n in names]
    if not names or not all(isinstance(v, (Tensor, Number)) for v in values):
        return None
    dims = tuple(int(getattr(supports[n], "event_dim", 0)) for n in names)
    return _family(kind, tuple(names), dims, len(distribution.event_shape))


@cache
def _family(kind: Any, names: tuple[str, ...], dims: tuple[int, ...], event_dim: int) -> Family:
    def arguments(d: Any) -> Arguments:
        return {n: torch.as_tensor(getattr(d, n)) for n in names}

    def log_density(args: Arguments, s: Statistics, w: Tensor) -> Tensor:
        x = of_rows(s[0], w, event_dim)
        return w * kind(**{n: args[n] for n in names}).log_prob(x)

    return Family(
        arguments,
        lambda d, x: (x,),
        log_density,
        event_dims=(event_dim,),
        argument_dims=dict(zip(names, dims, strict=True)),
        coordinates=tuple(free(n, e) for n, e in zip(names, dims, strict=True)),
        by_row=True,
    )


def free(name: str, event_dim: int = 0) -> Coordinate:
    """An argument without a closed form."""
    return Coordinate(name, name, forms.FREE[event_dim], lambda s, w, args: ())


def of_rows(weighted: Tensor, weight: Tensor, event_dim: int = 0) -> Tensor:
    """The data of each row from ``weight`` times it; some other row's where the weight is zero."""
    w = weight.reshape(weight.shape + (1,) * event_dim).expand_as(weighted)
    if bool((w > 0).all()):
        return weighted / w
    x = weighted / torch.where(w > 0, w, 1.0)
    flat = x.reshape((-1, *x.shape[x.dim() - event_dim :]))
    at = int(w.reshape((len(flat), -1))[:, 0].argmax())
    return torch.where(w > 0, x, flat[at])
