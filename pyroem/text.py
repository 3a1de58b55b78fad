"""Tables and names as text, and results as what JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def aligned(table: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table, whose columns in ``left`` are flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def in_markdown(table: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table in GitHub's Markdown, its first row the head."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    rule = ["---" if i in left else "---:" for i in range(len(table[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def label(name: str, index: Iterable[int]) -> str:
    """The name of an element: ``loc[0, 1]``; that of a single number is the parameter's."""
    inside = ", ".join(map(str, index))
    return f"{name}[{inside}]" if inside else name


def plain(value: Any) -> Any:
    """For JSON: tensors and arrays become lists, numbers that are not finite become null."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
