"""The command ``pyroem``: fit a Gaussian mixture to a table by several solvers, side by side."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

import pyroem
from pyroem import datasets, plot
from pyroem.errors import PyroemError
from pyroem.loop import Status
from pyroem.models.gaussian import COVARIANCES, gaussian_mixture

SOLVERS = {"em": "EM", "adam": "MAP (Adam)", "lbfgs": "MAP (L-BFGS)"}
TABLE = (
    "solver",
    "log-likelihood",
    "gap to best",
    "rel param diff",
    "iterations",
    "passes",
    "seconds",
    "status",
)
BAD_INPUT, INTERRUPTED = 2, 130


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line for the user."""


@dataclass(frozen=True)
class Data:
    """The rows to fit, ``values [N, D]``, and where they come from."""

    name: str
    columns: list[str]
    values: Tensor
    left_out: Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0 for success, 2 when the request is at fault, 130 when interrupted.
    """
    try:
        options = _parser().parse_args(argv)
        code: int = options.run(options)
    except (UsageError, PyroemError, OSError) as error:
        print(f"pyroem: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("pyroem: interrupted before there was a fit", file=sys.stderr)
        return INTERRUPTED
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pyroem", description="Closed-form EM, derived from Pyro programs.")
    parser.add_argument("--version", action="version", version=f"pyroem {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("datasets", help="list the data sets that ship with pyroem")
    listing.set_defaults(run=_datasets)

    compare = commands.add_parser(
        "compare",
        help="fit a Gaussian mixture by several solvers and compare them",
        description="Fit a Gaussian mixture by several solvers, from one start and on one "
        "objective, and put them side by side.",
    )
    compare.set_defaults(run=_compare)
    add = compare.add_argument
    add(
        "data",
        metavar="DATA",
        help="a CSV file with column names in its first line (comma, semicolon or tab between the"
        " cells), or the name of a data set (pyroem datasets)",
    )
    add("--components", type=_positive_int, required=True, metavar="K", help="how many")
    add(
        "--columns",
        type=_list,
        metavar="A,B",
        help="columns by name, or by position from 1 (default: all numeric columns)",
    )
    add("--covariance", choices=COVARIANCES, default="full", help="default: full")
    add(
        "--solvers",
        type=_solvers,
        default=list(SOLVERS),
        metavar="em,adam,lbfgs",
        help="which to compare (default: all)",
    )
    add("--seed", type=_whole, default=0, help="of the starting point (default: 0)")
    add(
        "--restarts",
        type=_positive_int,
        default=1,
        metavar="R",
        help="starting points; the best fit of each solver counts (default: 1)",
    )
    add(
        "--max-iter",
        type=_positive_int,
        metavar="N",
        help="most iterations of every solver (default: EM 1000, gradient solvers 5000)",
    )
    add(
        "--tol",
        type=_positive_float,
        metavar="T",
        help="stop when the objective changes by less, in nats a row (default: 1e-8)",
    )
    picture = compare.add_mutually_exclusive_group()
    picture.add_argument(
        "--output", type=Path, metavar="FILE", help="the picture (default: pyroem-DATA.png)"
    )
    picture.add_argument("--no-picture", action="store_true")
    add("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    add("--explain", action="store_true", help="say how each parameter is updated, and why")
    return parser


def _datasets(options: argparse.Namespace) -> int:
    for name in datasets.names():
        columns, values = datasets.load(name)
        print(f"{name}: {len(values)} rows, columns {', '.join(columns)}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    data = _load(options.data, options.columns)
    if len(data.values) < options.components:
        raise UsageError(
            f"expected at least {options.components} rows, one a component; "
            f"{data.name} has {len(data.values)}"
        )
    picture = None if options.no_picture else options.output or Path(f"pyroem-{data.name}.png")
    # A fit may take long: find out first whether its results can be written.
    _check_outputs(picture, options.json)

    print(f"{data.name}: {len(data.values)} rows, columns {', '.join(data.columns)}")
    for column, reason in data.left_out.items():
        print(f"  left out {column}: {reason}")
    print(
        f"Gaussian mixture, K = {options.components}, {options.covariance} covariance; "
        f"seed {options.seed}, restarts {options.restarts}\n"
    )
    compared = pyroem.compare(
        gaussian_mixture(options.components, options.covariance),
        data.values,
        solvers=_make_solvers(options),
        init="auto",
        seed=options.seed,
        restarts=options.restarts,
    )
    _print_table(TABLE, [_cells(row) for row in compared.rows])

    best = compared.best
    fit = compared.fits[best]
    weights, means, covariances = plot.mixture_moments(fit.params)
    sds = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    stopped = any(f.status is Status.INTERRUPTED for f in compared.fits.values())
    if stopped:
        print(f"Interrupted. Not run: {', '.join(compared.missing) or 'none'}.")
    for name, ended in compared.fits.items():
        if ended.message:
            print(f"{name}: {ended.status}: {ended.message}")
    healthy = (
        "The best fit" if fit.converged else f"The best fit, which did not end well ({fit.status}),"
    )
    print(f"\n{healthy} is that of {best}: BIC {fit.bic():.4f}.")
    _print_parameters(data.columns, weights, means, sds)
    if options.explain:
        _explain(compared.fits)
    if options.json is not None:
        result = {
            "data": {"name": data.name, "rows": len(data.values), "columns": data.columns},
            "model": {"components": options.components, "covariance": options.covariance},
            "seed": options.seed,
            "restarts": options.restarts,
            "best": {"solver": best, "weights": weights, "means": means, "sds": sds},
            "comparison": compared.to_dict(),
        }
        text = json.dumps(_plain(result), indent=2, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")
        print(f"\nResults written to {options.json}")
    if picture is not None:
        plot.report(compared, fit.params, data.values, data.columns).savefig(picture)
        print(f"\nPicture written to {picture}")
    return INTERRUPTED if stopped else 0


def _load(source: str, columns: list[str] | None) -> Data:
    """A shipped data set by its name, otherwise a file."""
    if source in datasets.names():
        return Data(source, *datasets.load(source, columns), left_out={})
    path = Path(source)
    if not path.exists():
        raise UsageError(
            f"no file {source!r}, and no data set of that name ({', '.join(datasets.names())})"
        )
    table = datasets.read_csv(path, columns)
    return Data(path.stem, *table, left_out=datasets.left_out(path) if columns is None else {})


def _make_solvers(options: argparse.Namespace) -> dict[str, Any]:
    given = {"max_iter": options.max_iter, "tol": options.tol}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings["progress"] = sys.stderr.isatty()
    makers = {
        "em": lambda: pyroem.EM(**settings),
        "adam": lambda: pyroem.MAP(optimizer="adam", **settings),
        "lbfgs": lambda: pyroem.MAP(optimizer="lbfgs", **settings),
    }
    return {SOLVERS[name]: makers[name]() for name in options.solvers}


def _check_outputs(picture: Path | None, results: Path | None) -> None:
    for path in (picture, results):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise UsageError(f"cannot write {path}: it is a folder")
    if picture is None:
        return
    if find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib: pip install 'pyroem[plot]', or --no-picture")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if picture.suffix.lower().removeprefix(".") not in kinds:
        raise UsageError(f"cannot write {picture}: expected the ending {', '.join(kinds)}")


def _cells(row: Any) -> list[str]:
    return [
        row.name,
        f"{row.log_likelihood:.6f}",
        f"{row.gap:.1e}",
        "-" if row.parameter_difference is None else f"{row.parameter_difference:.1e}",
        str(row.iterations),
        str(row.passes),
        f"{row.seconds:.3f}",
        str(row.status),
    ]


def _print_parameters(columns: Sequence[str], weights: Tensor, means: Tensor, sds: Tensor) -> None:
    """One column a component; where they are many, one row."""
    header = ["", *(f"component {k}" for k in range(1, len(weights) + 1))]
    rows = [["weight", *(f"{weight:.4f}" for weight in weights.tolist())]]
    for column, mean, sd in zip(columns, means.T.tolist(), sds.T.tolist(), strict=True):
        rows.append([f"{column}, mean", *(f"{value:.6g}" for value in mean)])
        rows.append([f"{column}, sd", *(f"{value:.6g}" for value in sd)])
    if len(weights) > 8:
        header, *rows = map(list, zip(header, *rows, strict=True))
    _print_table(header, rows)


def _explain(fits: Mapping[str, Any]) -> None:
    for name, fit in fits.items():
        print(f"\nHow {name} updates the parameters:\n{fit.explain()}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are aligned to the right."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            print("  ".join(cells).rstrip())
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


def _plain(value: Any) -> Any:
    """For JSON: tensors become lists, numbers that are not finite become null."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _list(text: str) -> list[str]:
    """Split at commas; a name that holds one stands in double quotes."""
    return [cell.strip() for cell in next(csv.reader([text], skipinitialspace=True), [])]


def _solvers(text: str) -> list[str]:
    chosen = _list(text)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(SOLVERS):
        raise argparse.ArgumentTypeError(
            f"expected different solvers out of {','.join(SOLVERS)}; got {text!r}"
        )
    return chosen


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1; got {text!r}")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {text!r}")
    return number


def _version() -> str:
    try:
        return version("pyroem")
    except PackageNotFoundError:
        return "(not installed)"
