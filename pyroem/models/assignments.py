"""What the ready-made programs share: rows, weights, assignments that are partly known."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

Program = Callable[..., None]
"""What the functions of this package return: a Pyro program of the data, which can be pickled."""

IMPOSSIBLE = -1e30
"""The logit of a label that a component does not have.

It takes the place of minus infinity, which times a count of zero would not be zero. In both
precisions its probability is zero, and it outweighs whatever the observations say.
"""


def check_count(name: str, count: int) -> int:
    """``count`` itself; raises ``ValueError`` unless it is at least one."""
    if count < 1:
        raise ValueError(f"Expected {name} >= 1; got {count}.")
    return count


def check_choice(name: str, choice: str, choices: tuple[str, ...]) -> str:
    """``choice`` itself; raises ``ValueError`` unless it is one of ``choices``."""
    if choice not in choices:
        raise ValueError(f"Expected {name} in {choices}; got {choice!r}.")
    return choice


def rows(x: Any, columns: int | None = None) -> torch.Tensor:
    """The rows ``x [N, D]`` as real numbers (which can hold a NaN), integers being cast.

    Arrays and data frames are taken too, for functions that are called with the data itself. Raises
    ``ValueError`` where ``x`` has another number of dimensions, or of ``columns``.
    """
    if not isinstance(x, torch.Tensor):
        x = torch.as_tensor(x.to_numpy(copy=True) if hasattr(x, "to_numpy") else x)
    if x.ndim != 2 or columns not in (None, x.shape[-1]):
        wanted = f"[N, {'D' if columns is None else columns}]"
        raise ValueError(f"Expected x of shape {wanted}; got {list(x.shape)}.")
    real: torch.Tensor = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return real


def beside(name: str, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``values [N]``; raises ``ValueError`` unless there is one for each row of ``x``."""
    if values.shape != x.shape[:1]:
        raise ValueError(f"Expected {name} of shape {[len(x)]}; got {list(values.shape)}.")
    return values


def equal_weights(x: torch.Tensor, components: int) -> torch.Tensor:
    """The parameter ``weights [K]`` on the simplex; at the start all are equal."""
    start = lambda: x.new_ones(components) / components  # noqa: E731
    return pyro.param("weights", start, constraint=constraints.simplex)


def assignment(
    distribution: dist.TorchDistribution, x: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """The assignment ``z`` of each row of ``x``; to be called in the plate ``rows``.

        z_n ~ distribution,   label_n | z_n = k ~ delta_k   (for the rows with a label)

    ``distribution`` is categorical, with K components. ``labels [N]`` are integers: the component
    of a row, or -1 where it is not known. A label is an observation of the assignment: one draw
    from its component's point mass, or none, so that all rows stand in one site without a mask,
    whatever labels a block of them has. Raises ``ValueError`` on labels outside of -1, ..., K - 1.
    """
    z = pyro.sample("z", distribution)
    if labels is None:
        return z
    K = distribution.probs.shape[-1]
    if beside("labels", labels, x).is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"Expected labels that are integers; got {labels.dtype}.")
    if bool(((labels < -1) | (labels >= K)).any()):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"Expected labels in -1, ..., {K - 1}; got {low} to {high}.")
    table = x.new_full((K, K), IMPOSSIBLE).fill_diagonal_(0.0)
    shown = (labels.unsqueeze(-1) == torch.arange(K, device=labels.device)).to(x)
    pyro.sample("label", dist.Multinomial(1, logits=table[z]), obs=shown)
    return z
