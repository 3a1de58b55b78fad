"""The program ``pyroem``: its commands, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO, cast

from pyroem import datasets
from pyroem.cli import compare, fit, predict, select
from pyroem.cli.failures import (
    AT_FAULT,
    ENDED_BADLY,
    EXIT_CODES,
    INTERRUPTED,
    SUCCESS,
    FitError,
    UsageError,
    one_line,
)
from pyroem.cli.fitting import warnings_in_a_line
from pyroem.cli.options import Parser, add_command
from pyroem.errors import PyroemError

TEXT = """Mixtures for tables: find groups of rows, each with a distribution of its own,
by EM. "pyroem COMMAND --help" explains a command."""
EPILOG = """a first session, with a data set that ships with pyroem:
  pyroem datasets
  pyroem select faithful --components 1-4
  pyroem fit faithful --components 2 --output model.json --plot mixture.png
  pyroem predict model.json faithful --probabilities

"""
LISTING = """
List the data sets that ship with pyroem. Their names can stand in the place of
a file, wherever a command takes DATA.

example:
  pyroem datasets
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (`pyroem.cli.failures`)."""
    try:
        options = make_parser().parse_args(argv)
        with warnings_in_a_line(), to_a_closing_pipe():
            code: int = options.run(options)
            sys.stdout.flush()
    except (UsageError, PyroemError, OSError) as error:
        print(f"pyroem: error: {one_line(error)}", file=sys.stderr)
        return AT_FAULT
    except FitError as error:
        print(f"pyroem: {one_line(error)}", file=sys.stderr)
        return ENDED_BADLY
    except KeyboardInterrupt:
        print("pyroem: interrupted before there was a fit", file=sys.stderr)
        return INTERRUPTED
    return code


@contextmanager
def to_a_closing_pipe() -> Iterator[None]:
    """Go on where the reader of a pipe has seen enough (``pyroem fit ... --output F | head -3``).

    What else is printed is lost; files are written, and the exit code is that of the command.
    """
    before = sys.stdout
    sys.stdout = cast(TextIO, _Output(before))
    try:
        yield
    finally:
        sys.stdout = before


class _Output:
    """Standard output that does not mind when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._close()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._close()

    def _close(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="pyroem",
        description=TEXT,
        epilog=EPILOG + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pyroem {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    fit.add(commands)
    select.add(commands)
    predict.add(commands)
    compare.add(commands)
    add_command(commands, "datasets", "list the data sets that ship with pyroem", LISTING, _list)
    return parser


def _list(options: argparse.Namespace) -> int:
    for name in datasets.names():
        columns, values = datasets.load(name)
        print(f"{name}: {len(values)} rows, columns {', '.join(columns)}")
    return SUCCESS


def _version() -> str:
    try:
        return version("pyroem")
    except PackageNotFoundError:
        return "(not installed)"
