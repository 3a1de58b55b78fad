"""Rows of the arguments that a program is called with: their number, and a sample of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

A_FEW = 8  # rows
MOST_VALUES = 64


def leading_sizes(data: Any) -> list[int]:
    """The first dim of every tensor in ``data`` (nested arguments)."""
    return [x.shape[0] for x in tree_leaves(data) if isinstance(x, Tensor) and x.dim()]


def leading_size(data: Any) -> int:
    """The largest first dim of any tensor in ``data``: the likely rows."""
    return max(leading_sizes(data), default=0)


def has_rows(x: Any, rows: int) -> bool:
    """Whether ``x`` is a tensor whose first dim is ``rows``."""
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows


def take(data: Any, index: Tensor, rows: int) -> Any:
    """``data`` with the rows ``index`` of every tensor whose first dim is ``rows``."""

    def cut(x: Any) -> Any:
        return x[index.to(x.device)] if has_rows(x, rows) else x

    return tree_map(cut, data)


def sample_rows(rows: int, size: int, weights: Tensor | None = None, data: Any = None) -> Tensor:
    """``size`` row numbers drawn without replacement, in order; of rows that weigh something.

    Among them are a few for each column of ``data`` in which something is missing, and for each
    rare value of integers (the labels of a few rows).
    """
    generator = torch.Generator().manual_seed(0)
    if weights is None:
        chosen = _chosen(rows, size, generator)
    else:
        weighing = (weights.cpu() > 0).nonzero().reshape(-1)
        chosen = weighing[_chosen(len(weighing), size, generator)]
    wanted = telling_rows(data, rows)
    if not len(wanted):
        return chosen
    rest = chosen[~torch.isin(chosen, wanted)]
    keep = torch.randperm(len(rest), generator=generator)[: max(0, len(chosen) - len(wanted))]
    return torch.cat([wanted, rest[keep]]).sort().values


def telling_rows(data: Any, rows: int) -> Tensor:
    """Some rows with what is rare: a few for each column with missing values, or of few values."""
    found = [torch.arange(0)]
    for x in tree_leaves(data):
        if has_rows(x, rows) and not x.is_floating_point() and x.numel() == rows:
            found += _of_each_value(x.reshape(-1).cpu())
        elif has_rows(x, rows) and x.is_floating_point() and not bool(x.sum().isfinite()):
            gone = x.isnan().reshape(rows, -1)
            for column in gone.T[gone.any(0)]:
                found.append(column.nonzero().reshape(-1)[:A_FEW].cpu())
    return torch.cat(found).unique()


def _chosen(rows: int, size: int, generator: torch.Generator) -> Tensor:
    if rows < 10 * size:
        return torch.randperm(rows, generator=generator)[:size].sort().values
    drawn = torch.randint(rows, (2 * size,), generator=generator).unique()  # more than enough
    return drawn[torch.randperm(len(drawn), generator=generator)[:size]].sort().values


def _of_each_value(x: Tensor) -> list[Tensor]:
    """A few rows of each value, where the values are few."""
    low, high = int(x.min()), int(x.max())
    if high - low >= MOST_VALUES:
        return []
    counts = torch.bincount((x - low).long(), minlength=high - low + 1)
    rare = ((counts > 0) & (counts < len(x) // 20)).nonzero().reshape(-1) + low
    return [(x == value).nonzero().reshape(-1)[:A_FEW] for value in rare.tolist()]
