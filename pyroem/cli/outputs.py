"""What is printed and written: tables, JSON, and the check that files can be written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyroem.cli.failures import UsageError
from pyroem.cli.tables import Table
from pyroem.text import aligned, plain

WIDE = 8  # components from which on a table has one row for each


def check_files(files: Mapping[str, Path | None], source: str = "") -> None:
    """Raise a `UsageError` unless each file (by the option that names it) can be written.

    A fit may take long: this is found out first. No two may be one file, and none the ``source``.
    """
    seen: dict[Path, str] = {Path(source).resolve(): "DATA"} if source else {}
    for option, path in files.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise UsageError(f"{option}: cannot write {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise UsageError(f"{option}: cannot write {path}: it is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{option}: cannot write {path}: permission denied")
        if (first := seen.setdefault(path.resolve(), option)) != option:
            raise UsageError(f"{option}: expected another file than that of {first}; got {path}")


def check_picture(option: str, picture: Path | None, instead: str = "") -> None:
    """Raise a `UsageError` unless a picture of that kind can be drawn."""
    if picture is None:
        return
    if find_spec("matplotlib") is None:
        raise UsageError(f"a picture needs matplotlib: pip install 'pyroem[plot]'{instead}")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if picture.suffix.lower().removeprefix(".") not in kinds:
        raise UsageError(
            f"{option}: cannot write {picture}: expected the ending {', '.join(kinds)}"
        )


def print_table_heading(table: Table) -> None:
    """The data: rows, columns, what was left out, what is missing."""
    rows, columns = table.values.shape
    print(f"{table.name}: {rows} rows, columns {', '.join(table.columns)}")
    for column, reason in table.left_out.items():
        print(f"  left out {column}: {reason}")
    if table.missing:
        print(f"Missing: {table.missing} of {rows * columns} values")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are aligned to the right."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        print("\n".join(aligned([header, *rows])))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, title in enumerate(header):
        table.add_column(Text(title), justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_components(rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """One column a component; where they are many, one row. ``rows`` start with their titles."""
    count = len(rows[0][1])
    header = ["", *(f"component {k}" for k in range(1, count + 1))]
    cells = [[title, *values] for title, values in rows]
    if count > WIDE:
        header, *cells = map(list, zip(header, *cells, strict=True))
    print_table(header, cells)


def as_json(value: Any) -> str:
    """A value as JSON that any reader takes."""
    return json.dumps(plain(value), indent=2, allow_nan=False)
