"""The rows of a request: which columns of DATA there are, what they hold, what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyroem import datasets
from pyroem.cli import parquet
from pyroem.cli.failures import UsageError
from pyroem.datasets import Category, Sheet
from pyroem.errors import DataError

NUMBERS = ("gaussian", "student-t", "poisson", "bernoulli", "regression")


@dataclass(frozen=True)
class Table:
    """The rows to fit.

    ``values [N, D]`` are floats with NaN where one is missing; for the family categorical they are
    objects, with None. ``kinds`` (family mixed) are those of the columns; ``categories`` has for
    each column what its codes 0, 1, ... stand for, or None.
    """

    name: str
    columns: list[str]
    values: NDArray[Any]
    left_out: Mapping[str, str] = field(default_factory=dict)
    kinds: list[Any] = field(default_factory=list)
    categories: list[NDArray[Any] | None] = field(default_factory=list)
    response: NDArray[Any] | None = None
    response_name: str | None = None
    weights: NDArray[Any] | None = None
    labels: NDArray[Any] | None = None

    @property
    def missing(self) -> int:
        """The number of values that are missing."""
        return int(is_missing(self.values).sum())


def is_missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value is None or NaN."""
    if values.dtype == object:
        return np.array([[v is None for v in row] for row in values], dtype=bool)
    return np.isnan(values)


def open_sheet(source: str) -> tuple[str, Sheet]:
    """A shipped data set by its name, otherwise a file; and its name."""
    if source in datasets.names():
        return source, datasets.shipped(source)
    path = Path(source)
    if not path.exists():
        raise UsageError(
            f"DATA: no file {source!r}, and no data set of that name"
            f" ({', '.join(datasets.names())})"
        )
    is_parquet = path.suffix.lower() == ".parquet"
    return path.stem, parquet.sheet(path) if is_parquet else datasets.sheet(path)


def read(
    source: str,
    family: str,
    columns: Sequence[str] | None = None,
    kinds: Mapping[str, str] | None = None,
    roles: Mapping[str, str | None] | None = None,
    response_family: str | None = None,
) -> Table:
    """The columns of DATA that a family takes; ``roles`` name those that are something else.

    Raises:
        UsageError, DataError: a column lacks, or holds what the family cannot.
    """
    name, sheet = open_sheet(source)
    own = {role: sheet.find(column) for role, column in (roles or {}).items() if column is not None}
    for role, index in own.items():
        others = [r for r, i in own.items() if i == index and r != role]
        if others:
            raise UsageError(f"--{role}: expected another column than that of --{others[0]}")
    chosen, left_out = _choose(sheet, family, columns, own)
    titles = [sheet.title(i) for i in chosen]
    values, found_kinds, categories = _values(sheet, chosen, family, _by_index(sheet, kinds or {}))
    table = Table(
        name,
        titles,
        values,
        left_out,
        found_kinds,
        categories,
        response=_response(sheet, own.get("response"), response_family),
        response_name=sheet.title(own["response"]) if "response" in own else None,
        weights=_weights(sheet, own.get("weights")),
        labels=_labels(sheet, own.get("labels")),
    )
    gone = is_missing(values)
    for j in np.flatnonzero(gone.all(0)):
        raise UsageError(f"--columns: expected columns with values; {titles[j]!r} has none")
    if family == "regression" and gone.any():
        row, j = np.argwhere(gone)[0]
        raise UsageError(
            f"{sheet.source}, column {titles[j]!r}, {sheet.place(row)}: a value is missing, which"
            " a regression cannot have in the columns that explain"
        )
    return table


def _choose(
    sheet: Sheet, family: str, columns: Sequence[str] | None, roles: Mapping[str, int]
) -> tuple[list[int], dict[str, str]]:
    """The indices of the columns, and why others were left out."""
    if columns is None:
        rest = [i for i in range(len(sheet.header)) if i not in roles.values()]
        reasons = {i: _reason(sheet, i, family) for i in rest}
        chosen = [i for i in rest if reasons[i] is None]
        left_out = {sheet.title(i): why for i, why in reasons.items() if why is not None}
        if not chosen:
            told = "; ".join(f"{title} ({why})" for title, why in left_out.items())
            raise UsageError(
                f"{sheet.source}: expected a column that suits family {family}; got"
                f" {told or 'none'}"
            )
        return chosen, left_out
    chosen = [sheet.find(column) for column in columns]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(
            f"--columns: expected different ones, at least one; got {','.join(columns)}"
        )
    for role, index in roles.items():
        if index in chosen:
            raise UsageError(f"--columns: {sheet.title(index)!r} is the column of --{role} already")
    return chosen, {}


def _reason(sheet: Sheet, index: int, family: str) -> str | None:
    if family in NUMBERS:
        return sheet.reason_to_leave_out(index)
    if not sheet.header[index]:
        return "it has no name"
    try:
        cells = sheet.categories(index)
    except DataError:
        return "it holds neither text nor numbers"
    return "it is empty" if all(cell is None for cell in cells) else None


def _by_index(sheet: Sheet, kinds: Mapping[str, str]) -> dict[int, str]:
    return {sheet.find(name): kind for name, kind in kinds.items()}


def _values(
    sheet: Sheet, chosen: Sequence[int], family: str, kinds: Mapping[int, str]
) -> tuple[NDArray[Any], list[Any], list[NDArray[Any] | None]]:
    """The values, the kinds of mixed columns, and what the codes in these stand for."""
    if foreign := [i for i in kinds if i not in chosen]:
        raise UsageError(f"--kinds: {sheet.title(foreign[0])!r} is none of the columns in use")
    if family == "categorical":
        cells = [category_cells(sheet, i) for i in chosen]
        return as_objects(cells), [], []
    if family != "mixed":
        columns = [np.array(sheet.numbers(i)) for i in chosen]
        for i, column in zip(chosen, columns, strict=True):
            check_kind(sheet, i, column, family)
        return np.stack(columns, 1), [], []
    values, found, categories = list[NDArray[Any]](), list[Any](), list[NDArray[Any] | None]()
    for i in chosen:
        kind = kinds.get(i) or _kind_of(sheet, i)
        if kind != "categorical":
            values.append(np.array(sheet.numbers(i)))
            check_kind(sheet, i, values[-1], kind)
            found.append(kind)
            categories.append(None)
            continue
        own = category_cells(sheet, i)
        seen = sorted({cell for cell in own if cell is not None})
        values.append(codes(own, seen))
        found.append(max(len(seen), 1))
        categories.append(np.array(seen, dtype=object))
    return np.stack(values, 1), found, categories


def _kind_of(sheet: Sheet, index: int) -> str:
    if not sheet.is_numeric(index):
        return "categorical"
    seen = {number for number in sheet.numbers(index) if not math.isnan(number)}
    return "bernoulli" if seen <= {0.0, 1.0} else "gaussian"


def as_objects(columns: Sequence[Sequence[Any]]) -> NDArray[Any]:
    """Columns of cells of any kind as one array ``[N, D]``."""
    values = np.empty((len(columns[0]), len(columns)), dtype=object)
    for j, column in enumerate(columns):
        values[:, j] = column
    return values


def category_cells(sheet: Sheet, index: int) -> list[Category]:
    """A column as categories: text, or numbers, which must be whole."""
    cells = list(sheet.categories(index))
    for row, cell in enumerate(cells):
        if isinstance(cell, float) and not cell.is_integer():
            raise UsageError(
                f"{sheet.source}, column {sheet.title(index)!r}, {sheet.place(row)}: expected"
                f" categories, that is text or whole numbers; got {cell:g}"
            )
    return cells


def codes(cells: Sequence[Any], categories: Sequence[Any]) -> NDArray[Any]:
    """The place of each cell among the categories; NaN where it is None or none of them."""
    place = {category: float(code) for code, category in enumerate(categories)}
    return np.array([math.nan if cell is None else place.get(cell, math.nan) for cell in cells])


def check_kind(sheet: Sheet, index: int, column: NDArray[Any], kind: str | None) -> None:
    """Raise a `UsageError` that names the first cell that a kind cannot hold."""
    wanted: dict[str | None, tuple[str, Callable[[NDArray[Any]], NDArray[Any]]]] = {
        "poisson": ("counts: whole numbers from 0", lambda x: (x >= 0) & (x == np.floor(x))),
        "bernoulli": ("0 and 1", lambda x: (x == 0) | (x == 1)),
        "binomial": ("0 and 1", lambda x: (x == 0) | (x == 1)),
    }
    if kind not in wanted:
        return
    words, able = wanted[kind]
    bad = np.flatnonzero(~(np.isnan(column) | able(column)))
    if len(bad):
        raise UsageError(
            f"{sheet.source}, column {sheet.title(index)!r}, {sheet.place(int(bad[0]))}: family"
            f" {kind} expects {words}; got {column[bad[0]]:g}"
        )


def _role(sheet: Sheet, index: int, role: str) -> NDArray[Any]:
    column = np.array(sheet.numbers(index))
    gone = np.flatnonzero(np.isnan(column))
    if len(gone) and role != "labels":
        raise UsageError(
            f"--{role}: {sheet.source}, column {sheet.title(index)!r}, {sheet.place(int(gone[0]))}:"
            " expected a number; it is missing"
        )
    return column


def _response(sheet: Sheet, index: int | None, family: str | None) -> NDArray[Any] | None:
    if index is None:
        return None
    column = _role(sheet, index, "response")
    check_kind(sheet, index, column, family)
    return column


def _weights(sheet: Sheet, index: int | None) -> NDArray[Any] | None:
    if index is None:
        return None
    column = _role(sheet, index, "weights")
    if column.min() < 0 or not column.max() > 0:
        raise UsageError(
            f"--weights: expected numbers from 0, not all of them 0; column"
            f" {sheet.title(index)!r} goes from {column.min():g} to {column.max():g}"
        )
    return column


def _labels(sheet: Sheet, index: int | None) -> NDArray[Any] | None:
    """Components from 0; -1 where a cell is empty."""
    if index is None:
        return None
    column = _role(sheet, index, "labels")
    bad = np.flatnonzero(~(np.isnan(column) | ((column >= 1) & (column == np.floor(column)))))
    if len(bad):
        raise UsageError(
            f"--labels: {sheet.source}, column {sheet.title(index)!r},"
            f" {sheet.place(int(bad[0]))}: expected the number of a component, from 1, or an empty"
            f" cell; got {column[bad[0]]:g}"
        )
    return np.where(np.isnan(column), 0, column).astype(np.int64) - 1
