"""``pyroem compare``: a Gaussian mixture by several solvers, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyroem
from pyroem import plot
from pyroem.cli import pictures, tables
from pyroem.cli.failures import ENDED_BADLY, INTERRUPTED, SUCCESS, UsageError
from pyroem.cli.families import GAUSSIAN
from pyroem.cli.options import (
    add_command,
    add_progress,
    add_table,
    names,
    positive_float,
    positive_int,
    whole,
)
from pyroem.cli.outputs import (
    as_json,
    check_files,
    check_picture,
    print_components,
    print_table,
    print_table_heading,
)
from pyroem.comparison import difference
from pyroem.loop import Status
from pyroem.models.gaussian import gaussian_mixture

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
TEXT = """
Fit a Gaussian mixture by several solvers, from one start and on one objective,
and put them side by side. Prints a table of the solvers and the components of
the best fit, and draws the mixture and how fast each solver came there.

example, with a data set that ships with pyroem:
  pyroem compare faithful --components 2

words:
  em              closed-form EM
  adam, lbfgs     gradient ascent on the same objective (MAP)
  gap to best     how far a solver's objective stays below the best one
  rel param diff  how far its parameters are from those of the best one
  passes          how often it went through the data
"""


def add(commands: Any) -> None:
    """The command and its options."""
    parser = add_command(
        commands, "compare", "fit a Gaussian mixture by several solvers and compare them", TEXT, run
    )
    add_table(parser, "all numeric columns")
    mixture = parser.add_argument_group("the mixture")
    mixture.add_argument(
        "--components",
        type=positive_int,
        required=True,
        metavar="K",
        help="how many components (required)",
    )
    mixture.add_argument(
        "--covariance",
        choices=GAUSSIAN,
        default="full",
        metavar="NAME",
        help="the shape of the components: full (the default), tied, diag, spherical,"
        " tied-diagonal, tied-spherical, or one of mclust's names EII, VII, EEI, VEI, EVI, VVI,"
        " EEE, VEE, EVE, VVE, EEV, VEV, EVV, VVV",
    )
    search = parser.add_argument_group("solvers, start and end")
    search.add_argument(
        "--solvers",
        type=_solvers,
        default=list(SOLVERS),
        metavar="em,adam,lbfgs",
        help="which to compare (default: all)",
    )
    search.add_argument(
        "--seed", type=whole, default=0, metavar="S", help="of the starting point (default: 0)"
    )
    search.add_argument(
        "--restarts",
        type=positive_int,
        default=1,
        metavar="R",
        help="starting points; the best fit of each solver counts (default: 1)",
    )
    search.add_argument(
        "--max-iter",
        type=positive_int,
        metavar="N",
        help="most iterations of every solver (default: EM 1000, gradient solvers 5000)",
    )
    search.add_argument(
        "--tol",
        type=positive_float,
        metavar="T",
        help="stop when the objective changes by less, in nats a row (default: 1e-8)",
    )
    results = parser.add_argument_group("results")
    picture = results.add_mutually_exclusive_group()
    picture.add_argument(
        "--output", type=Path, metavar="FILE", help="the picture (default: pyroem-DATA.png)"
    )
    picture.add_argument("--no-picture", action="store_true", help="draw none")
    results.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    results.add_argument(
        "--explain", action="store_true", help="say how each parameter is updated, and why"
    )
    add_progress(results)


def run(options: argparse.Namespace) -> int:
    """Fit, print, write; the exit code."""
    # A fit may take long: find out first whether its results can be written.
    check_files({"--json": options.json, "--output": options.output}, options.data)
    table = tables.read(options.data, "gaussian", options.columns)
    picture = None if options.no_picture else options.output or Path(f"pyroem-{table.name}.png")
    check_files({"--json": options.json, "--output": picture}, options.data)
    check_picture("--output", picture, instead=", or --no-picture")
    if len(table.values) < options.components:
        raise UsageError(
            f"--components: expected at least {options.components} rows, one a component; "
            f"{table.name} has {len(table.values)}"
        )
    print_table_heading(table)
    print(
        f"Gaussian mixture, K = {options.components}, {options.covariance} covariance; "
        f"seed {options.seed}, restarts {options.restarts}\n",
        flush=True,
    )
    covariance = {"diag": "diagonal"}.get(options.covariance, options.covariance)
    compared = pyroem.compare(
        gaussian_mixture(options.components, covariance),
        torch.as_tensor(table.values),
        solvers=_make_solvers(options),
        init="auto",
        seed=options.seed,
        restarts=options.restarts,
    )
    print_table(TABLE, [_cells(row) for row in compared.rows])

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
    print_components(_lines(table.columns, weights, means, sds))
    if options.explain:
        for name, own in compared.fits.items():
            print(f"\nHow {name} updates the parameters:\n{own.explain()}")
    if options.json is not None:
        result = {
            "data": {"name": table.name, "rows": len(table.values), "columns": table.columns},
            "model": {"components": options.components, "covariance": options.covariance},
            "seed": options.seed,
            "restarts": options.restarts,
            "best": {"solver": best, "weights": weights, "means": means, "sds": sds},
            "comparison": compared.to_dict(),
        }
        options.json.write_text(as_json(result) + "\n", encoding="utf-8")
        print(f"\nResults written to {options.json}")
    if picture is not None:
        rows = torch.as_tensor(pictures.complete(table.values))
        plot.report(compared, fit.params, rows, table.columns).savefig(picture)
        print(f"\nPicture written to {picture}{pictures.shown(table.values)}")
    if stopped:
        return INTERRUPTED
    return SUCCESS if fit.converged else ENDED_BADLY


def _make_solvers(options: argparse.Namespace) -> dict[str, Any]:
    given = {"max_iter": options.max_iter, "tol": options.tol}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings["progress"] = options.progress or sys.stderr.isatty()
    makers = {
        "em": lambda: pyroem.EM(**settings),
        "adam": lambda: pyroem.MAP(optimizer="adam", **settings),
        "lbfgs": lambda: pyroem.MAP(optimizer="lbfgs", **settings),
    }
    return {SOLVERS[name]: makers[name]() for name in options.solvers}


def _cells(row: Any) -> list[str]:
    return [
        row.name,
        f"{row.log_likelihood:.6f}",
        f"{row.gap:.1e}",
        "-" if row.parameter_difference is None else difference(row.parameter_difference),
        str(row.iterations),
        str(row.passes),
        f"{row.seconds:.3f}",
        str(row.status),
    ]


def _lines(
    columns: Sequence[str], weights: Tensor, means: Tensor, sds: Tensor
) -> list[tuple[str, list[str]]]:
    """A title and a value for each component."""
    lines = [("weight", [f"{weight:.4f}" for weight in weights.tolist()])]
    for column, mean, sd in zip(columns, means.T.tolist(), sds.T.tolist(), strict=True):
        lines.append((f"{column}, mean", [f"{value:.6g}" for value in mean]))
        lines.append((f"{column}, sd", [f"{value:.6g}" for value in sd]))
    return lines


def _solvers(text: str) -> list[str]:
    chosen = names(text)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(SOLVERS):
        raise argparse.ArgumentTypeError(
            f"expected different solvers out of {','.join(SOLVERS)}; got {text!r}"
        )
    return chosen
