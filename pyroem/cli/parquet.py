"""Parquet files, as tables of cells and for rows of results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyroem.cli.failures import UsageError
from pyroem.datasets import Sheet
from pyroem.errors import DataError

NEEDED = "needs pyarrow: pip install 'pyroem[parquet]'"


def check_installed(what: str) -> None:
    """Raise a `UsageError` where pyarrow lacks."""
    if find_spec("pyarrow") is None:
        raise UsageError(f"{what} {NEEDED}")


def sheet(path: Path) -> Sheet:
    """The cells of a parquet file; null and NaN are missing values.

    Raises:
        UsageError: pyarrow is not installed.
        DataError: the file is no parquet file, or has no rows, or a name twice.
        OSError: the file cannot be read.
    """
    check_installed(f"{path}: a parquet file")
    from pyarrow import ArrowException, parquet

    with path.open("rb") as file:
        try:
            table = parquet.read_table(file)
        except ArrowException as error:
            raise DataError(f"{path}: expected a parquet file; {error}.") from None
    header = [name.strip() for name in table.column_names]
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"{path}: expected each column name once; got {', '.join(repeated)} again.")
    if not table.num_rows:
        raise DataError(f"{path}: expected rows; there are none.")
    columns = [_cells(column) for column in table.columns]
    return _Columns(str(path), header, columns, [str(field.type) for field in table.schema])


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    """Columns of equal length by name; None becomes null."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), str(path))


def _cells(column: Any) -> list[Any]:
    """Python values; None where one is missing."""
    return [None if isinstance(v, float) and math.isnan(v) else v for v in column.to_pylist()]


@dataclass(frozen=True)
class _Columns(Sheet):
    columns: list[list[Any]]
    types: list[str]

    def place(self, row: int) -> str:
        return f"row {row + 1}"

    def _bad_cells(self, index: int) -> list[tuple[int, Any]]:
        """``(row, value)`` for each cell that is neither missing nor a finite number."""
        pairs = enumerate(self.columns[index])
        return [(n, v) for n, v in pairs if v is not None and not _is_number(v)]

    def numbers(self, index: int) -> list[float]:
        if bad := self._bad_cells(index):
            row, value = bad[0]
            raise DataError(
                f"{self.source}, column {self.title(index)!r} (of type {self.types[index]}),"
                f" {self.place(row)}: expected a finite number; got {value!r}."
            )
        return [math.nan if v is None else float(v) for v in self.columns[index]]

    def texts(self, index: int) -> list[str | None]:
        values = self.columns[index]
        if wrong := [v for v in values if not isinstance(v, str | int | float | None)]:
            raise DataError(
                f"{self.source}, column {self.title(index)!r} (of type {self.types[index]}):"
                f" expected text or finite numbers; got {wrong[0]!r}."
            )
        return [None if v is None else str(v) for v in values]

    def is_numeric(self, index: int) -> bool:
        return not self._bad_cells(index)

    def reason_to_leave_out(self, index: int) -> str | None:
        if not self.header[index]:
            return "it has no name"
        if all(v is None for v in self.columns[index]):
            return "it is empty"
        if any(_is_number(v) for v in self.columns[index]):
            return None  # a column with numbers: a bad cell in it is an error
        return f"it is of type {self.types[index]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and math.isfinite(value)
