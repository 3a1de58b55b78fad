"""What several commands share: groups of options, and what their values may be."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any, NoReturn

from pyroem.cli.failures import EXIT_CODES, UsageError

DATA = """a CSV file with column names in its first line (comma, semicolon or
tab between the cells; an empty cell or NA is a missing value), a .parquet
file, or the name of a data set that ships with pyroem (pyroem datasets)"""
FAMILIES = (
    "gaussian",
    "student-t",
    "poisson",
    "bernoulli",
    "categorical",
    "mixed",
    "regression",
)


class Parser(argparse.ArgumentParser):
    """A parser that raises where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError`."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_command(commands: Any, name: str, summary: str, text: str, run: Any) -> Parser:
    """A command with a one-line summary and a text that stands as it is written."""
    description, _, rest = text.strip("\n").partition("\n\nexample")
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=(f"example{rest}\n\n" if rest else "") + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_table(parser: argparse.ArgumentParser, default: str = "all that suit the family") -> Any:
    """The table and its columns."""
    parser.add_argument("data", metavar="DATA", help=DATA)
    group = parser.add_argument_group("columns")
    group.add_argument(
        "--columns",
        type=names,
        metavar="A,B",
        help=f"the columns to use, by name or by position from 1 (default: {default}); a name that"
        " holds a comma stands in double quotes",
    )
    return group


def add_roles(group: Any) -> None:
    """Columns that are not part of the mixture's rows."""
    group.add_argument(
        "--response",
        metavar="COLUMN",
        help="what a regression explains by the other columns (family regression only)",
    )
    group.add_argument(
        "--weights",
        metavar="COLUMN",
        help="how often each row counts: a number from 0; 2 is the row twice",
    )


def add_family(parser: argparse.ArgumentParser) -> Any:
    """The family of the components."""
    group = parser.add_argument_group("the mixture")
    group.add_argument(
        "--family",
        choices=FAMILIES,
        default="gaussian",
        metavar="FAMILY",
        help="what each component is: gaussian (measurements), student-t (measurements with"
        " outliers), poisson (counts), bernoulli (0 or 1), categorical (text or whole numbers:"
        " latent classes), mixed (columns of different kinds), regression (lines, see"
        " --response); default: gaussian",
    )
    group.add_argument(
        "--kinds",
        type=kinds,
        default={},
        metavar="A=KIND,...",
        help="family mixed: the kind of a column, gaussian, poisson, bernoulli or categorical"
        " (default: text is categorical, 0 and 1 bernoulli, other numbers gaussian)",
    )
    group.add_argument(
        "--response-family",
        choices=("gaussian", "poisson", "binomial"),
        help="family regression: what the response is: a measurement (the default), a count, or"
        " 0 and 1",
    )
    return group


def add_search(parser: argparse.ArgumentParser, restarts: str) -> Any:
    """Where a fit starts and when it stops."""
    group = parser.add_argument_group("start and end of the fit")
    group.add_argument(
        "--seed", type=whole, default=0, metavar="S", help="of all that is random (default: 0)"
    )
    group.add_argument(
        "--restarts", type=positive_int, default=1, metavar="R", help=f"{restarts} (default: 1)"
    )
    group.add_argument(
        "--max-iter",
        type=positive_int,
        default=1000,
        metavar="N",
        help="the most iterations of a fit (default: 1000)",
    )
    group.add_argument(
        "--tol",
        type=positive_float,
        default=1e-8,
        metavar="T",
        help="stop when the log-likelihood changes by less, in nats a row (default: 1e-8)",
    )
    return group


def add_results(parser: argparse.ArgumentParser, picture: str) -> Any:
    """What is written, and where."""
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output",
        type=Path,
        metavar="MODEL.json",
        help="write the model to a file, for pyroem predict and for pyroem.estimators.load",
    )
    group.add_argument("--plot", type=Path, metavar="PICTURE", help=picture)
    group.add_argument(
        "--json",
        action="store_true",
        help="print the results as JSON in place of tables",
    )
    add_progress(group)
    return group


def add_progress(group: Any) -> None:
    """Whether to say how far a fit is."""
    group.add_argument(
        "--progress",
        action="store_true",
        help="say on stderr how far the fit is, also where that is no terminal",
    )


def names(text: str) -> list[str]:
    """Split at commas; a name that holds one stands in double quotes."""
    return [cell.strip() for cell in next(csv.reader([text], skipinitialspace=True), [])]


def kinds(text: str) -> dict[str, str]:
    """``A=poisson,B=gaussian`` as a dict."""
    found: dict[str, str] = {}
    for part in names(text):
        name, sign, kind = part.rpartition("=")
        if not sign or kind not in ("gaussian", "poisson", "bernoulli", "categorical"):
            raise argparse.ArgumentTypeError(
                "expected COLUMN=KIND with KIND gaussian, poisson, bernoulli or categorical;"
                f" got {part!r}"
            )
        found[name] = kind
    return found


def sizes(text: str) -> list[int]:
    """``1-4,6`` as ``[1, 2, 3, 4, 6]``."""
    found: list[int] = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-")]
        able = len(ends) in (1, 2) and all(e.isdecimal() and int(e) >= 1 for e in ends)
        if not able or int(ends[0]) > int(ends[-1]):
            raise argparse.ArgumentTypeError(
                f"expected whole numbers from 1 such as 1-9 or 2,3,5; got {text!r}"
            )
        found.extend(range(int(ends[0]), int(ends[-1]) + 1))
    return sorted(set(found))


def positive_int(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1; got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {text!r}")
    return number
