"""Small data sets that ship with the package, and a strict reader for CSV files.

A table is a pair: the names of its columns, and its values as a float64 tensor ``[N, D]``.
An empty cell, NA and the like are missing values: NaN. Nothing else is guessed silently: a cell
that is neither missing nor a finite number is an error that names it.
"""

from __future__ import annotations

import csv
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import torch

from pyroem.errors import DataError

DELIMITERS = (",", ";", "\t")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})

Column = str | int
Category = str | float | None
Table = tuple[list[str], torch.Tensor]


def names() -> list[str]:
    """The data sets that ship with the package."""
    return sorted(
        entry.name.removesuffix(".csv")
        for entry in files("pyroem").joinpath("data").iterdir()
        if entry.name.endswith(".csv")
    )


def load(name: str, columns: Sequence[Column] | None = None) -> Table:
    """A data set that ships with the package, by name.

    Raises:
        DataError: no data set has that name, or it has no such column.
    """
    return _table(shipped(name), columns)


def shipped(name: str) -> Sheet:
    """The cells of a data set that ships with the package.

    Raises:
        DataError: no data set has that name.
    """
    if name not in names():
        raise DataError(
            f"Expected one of the data sets {', '.join(names())}; got {name!r}."
            + _suggestion(name, names())
        )
    text = files("pyroem").joinpath("data").joinpath(f"{name}.csv").read_text(encoding="utf-8")
    return _parse(text, name)


def read_csv(path: str | Path, columns: Sequence[Column] | None = None) -> Table:
    """The numeric columns of a CSV file, or exactly the chosen ones.

    The file is UTF-8 text whose first line names the columns; cells are separated by commas,
    semicolons or tabs. ``columns`` are names, or positions counted from 1. Without them, the
    columns that have a number are taken; `left_out` tells of the others.

    Raises:
        DataError: the file is no such table, or a chosen cell is neither missing nor a finite
            number.
        OSError: the file cannot be read.
    """
    return _table(sheet(path), columns)


def left_out(path: str | Path) -> dict[str, str]:
    """The columns that ``read_csv(path)`` does not take, each with the reason."""
    cells = sheet(path)
    reasons = ((cells.title(i), cells.reason_to_leave_out(i)) for i in range(len(cells.header)))
    return {title: reason for title, reason in reasons if reason is not None}


@dataclass(frozen=True)
class Sheet(ABC):
    """Named columns of cells, of which each can be asked for as numbers or as categories."""

    source: str
    header: list[str]

    def title(self, index: int) -> str:
        """The name of a column, or its position where it has none."""
        return self.header[index] or f"column {index + 1}"

    def find(self, column: Column) -> int:
        """The index of a column, by name or by position counted from 1.

        Raises:
            DataError: there is no such column.
        """
        if column and column in self.header:
            return self.header.index(str(column))
        if isinstance(column, int) or column.isdecimal():
            if not 1 <= int(column) <= len(self.header):
                raise DataError(
                    f"{self.source}: expected a column from 1 to {len(self.header)}; got {column}."
                )
            return int(column) - 1
        known = [self.title(i) for i in range(len(self.header))]
        raise DataError(
            f"{self.source}: expected one of the columns {', '.join(known)}; got {column!r}."
            + _suggestion(column, known)
        )

    @abstractmethod
    def place(self, row: int) -> str:
        """Where a row stands: ``line 3``."""

    @abstractmethod
    def numbers(self, index: int) -> list[float]:
        """A column as numbers, NaN where one is missing.

        Raises:
            DataError: a cell is neither missing nor a finite number.
        """

    @abstractmethod
    def texts(self, index: int) -> list[str | None]:
        """A column as text, as it stands; None where it is missing.

        Raises:
            DataError: the column holds what is neither text nor a number.
        """

    @abstractmethod
    def is_numeric(self, index: int) -> bool:
        """Whether every cell of a column is missing or a finite number."""

    def categories(self, index: int) -> Sequence[Category]:
        """A column as numbers where every cell is one, else as text; None where one is missing."""
        if not self.is_numeric(index):
            return self.texts(index)
        return [None if math.isnan(number) else number for number in self.numbers(index)]

    @abstractmethod
    def reason_to_leave_out(self, index: int) -> str | None:
        """Why a column is not taken where all columns of numbers are asked for; None if it is."""


@dataclass(frozen=True)
class _Text(Sheet):
    """The cells of a file as text, with the line on which each row starts."""

    rows: list[list[str]]
    lines: list[int]

    def place(self, row: int) -> str:
        return f"line {self.lines[row]}"

    def bad_cells(self, index: int) -> list[tuple[int, str, str]]:
        """``(line, text, problem)`` for each cell that is neither missing nor a finite number."""
        located = zip(self.lines, self._cells(index), strict=True)
        return [
            (line, cell, problem)
            for line, cell in located
            if (problem := _problem(cell)) and not _missing(cell)
        ]

    def _cells(self, index: int) -> list[str]:
        return [row[index].strip() for row in self.rows]

    def reason_to_leave_out(self, index: int) -> str | None:
        if not self.header[index]:
            return "it has no name"
        bad, cells = self.bad_cells(index), self._cells(index)
        if any(_problem(cell) is None for cell in cells):
            return None  # a column with numbers: a bad cell in it is an error
        return f"line {bad[0][0]}: {bad[0][1]!r} is {bad[0][2]}" if bad else "it is empty"

    def numbers(self, index: int) -> list[float]:
        if bad := self.bad_cells(index):
            line, text, problem = bad[0]
            more = f" ({len(bad) - 1} more in this column)" if len(bad) > 1 else ""
            if "," in text:
                more += "; write decimal numbers with a point"
            raise DataError(
                f"{self.source}, column {self.title(index)!r}, line {line}: "
                f"expected a finite number; got {text!r}, which is {problem}{more}."
            )
        return [math.nan if _missing(cell) else float(cell) for cell in self._cells(index)]

    def texts(self, index: int) -> list[str | None]:
        return [None if _missing(cell) else cell for cell in self._cells(index)]

    def is_numeric(self, index: int) -> bool:
        return not self.bad_cells(index)


def _table(sheet: Sheet, columns: Sequence[Column] | None) -> Table:
    if isinstance(columns, str):
        raise DataError(f"Expected a list of columns; got the text {columns!r}.")
    if columns is None:
        reasons = [sheet.reason_to_leave_out(i) for i in range(len(sheet.header))]
        chosen = [i for i, reason in enumerate(reasons) if reason is None]
        if not chosen:
            told = "; ".join(f"{sheet.title(i)} ({reason})" for i, reason in enumerate(reasons))
            raise DataError(f"{sheet.source}: expected a numeric column; got none: {told}.")
    else:
        chosen = [sheet.find(column) for column in columns]
        if not chosen or len(set(chosen)) < len(chosen):
            raise DataError(f"columns: expected different ones, at least one; got {list(columns)}.")
    values = torch.tensor([sheet.numbers(i) for i in chosen], dtype=torch.float64)
    return [sheet.title(i) for i in chosen], values.T.contiguous()


def sheet(path: str | Path) -> Sheet:
    """The cells of a CSV file; see `read_csv`.

    Raises:
        DataError: the file is no such table.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text; byte {error.start} is not.") from None
    return _parse(text, str(path))


def _parse(text: str, source: str) -> Sheet:
    """Split a text into header and rows, and check that they fit each other."""
    try:
        records = _records(text, _delimiter(text))
    except csv.Error as error:
        raise DataError(f"{source}: expected a CSV file; {error}.") from None
    if not records:
        raise DataError(f"{source}: expected a line of column names; the file is empty.")
    (_, first), *rest = records
    header = [name.strip() for name in first]
    named = [name for name in header if name]
    if not any(_problem(name) for name in header):
        raise DataError(
            f"{source}: expected column names in the first line; got numbers: {', '.join(header)}."
            " Add a line of names at the top."
        )
    if repeated := sorted({name for name in named if named.count(name) > 1}):
        raise DataError(
            f"{source}: expected each column name once; got {', '.join(repeated)} repeatedly."
        )
    if not rest:
        raise DataError(f"{source}: expected rows below the column names; there are none.")
    if ragged := [(line, len(row)) for line, row in rest if len(row) != len(header)]:
        line, width = ragged[0]
        more = f" ({len(ragged) - 1} more such rows)" if len(ragged) > 1 else ""
        raise DataError(
            f"{source}, line {line}: expected {len(header)} cells, as in the first line; "
            f"got {width}{more}."
        )
    return _Text(source, header, [row for _, row in rest], [line for line, _ in rest])


def _records(text: str, delimiter: str, limit: int | None = None) -> list[tuple[int, list[str]]]:
    """``(line, cells)`` of each record; blank lines are skipped.

    In a table of one column, a blank line between rows is a missing cell and is kept.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    blanks: list[tuple[int, list[str]]] = []
    line = 1
    for cells in reader:
        if len(cells) <= 1 and not "".join(cells).strip():
            blanks.append((line, [""]))
        else:
            if records and len(records[0][1]) == 1:
                records.extend(blanks)
            blanks = []
            records.append((line, cells))
        line = reader.line_num + 1
        if limit is not None and len(records) >= limit:
            break
    return records


def _delimiter(text: str) -> str:
    """The candidate that splits the header into most cells, and the next row into as many."""

    def score(delimiter: str) -> tuple[bool, int]:
        try:
            widths = [len(cells) for _, cells in _records(text, delimiter, limit=2)]
        except csv.Error:
            return False, 0
        header = widths[0] if widths else 0
        return header > 1 and len(set(widths)) == 1, header

    return max(DELIMITERS, key=score)


def _missing(text: str) -> bool:
    return text.lower() in MISSING


def _problem(text: str) -> str | None:
    """Why a cell is not a finite number, or None if it is one."""
    if _missing(text):
        return "missing"
    try:
        number = float(text)
    except ValueError:
        return "not a number"
    if "_" in text:
        return "not a number"
    return None if math.isfinite(number) else "not finite"


def _suggestion(name: str, known: Sequence[str]) -> str:
    lowered = {candidate.lower(): candidate for candidate in known}
    close = get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""
