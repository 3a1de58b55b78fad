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
        if bool((w > 0).all()):
            x = s[0] / w.reshape(w.shape + (1,) * event_dim)
            return w * kind(**{n: args[n] for n in names}).log_prob(x)
        # Rows that do not count may hold anything: another row's value may not suit their arguments
        # (a number of trials, say).
        split = {n: args[n].dim() - e for n, e in zip(names, dims, strict=True)}
        shape = torch.broadcast_shapes(w.shape, *(args[n].shape[:at] for n, at in split.items()))
        w = w.expand(shape)
        keep = w > 0
        shown = {n: args[n].expand(shape + args[n].shape[at:])[keep] for n, at in split.items()}
        x = s[0].expand(shape + s[0].shape[s[0].dim() - event_dim :])[keep]
        count = w[keep]
        x = x / count.reshape(count.shape + (1,) * event_dim)
        found = count * kind(**shown).log_prob(x)
        return torch.zeros_like(w).index_put((keep,), found)

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
