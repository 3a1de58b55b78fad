"""``pyroem select``: how many components, and of which shape."""

from __future__ import annotations

import argparse
from typing import Any

import pyroem
from pyroem.cli import families, fitting, pictures, tables
from pyroem.cli.failures import ENDED_BADLY, INTERRUPTED, SUCCESS
from pyroem.cli.fit import data_of, fit_of, model_of, print_heading, print_status, say
from pyroem.cli.options import (
    add_command,
    add_family,
    add_results,
    add_roles,
    add_search,
    add_table,
    names,
    sizes,
)
from pyroem.cli.outputs import as_json, check_files, check_picture, print_components
from pyroem.cli.tables import Table
from pyroem.models.gaussian import COVARIANCES, NAMED
from pyroem.selection import Candidate, Selection
from pyroem.selection.candidates import CRITERIA

MCLUST = tuple(name for name in COVARIANCES if name not in NAMED)
TEXT = """
Fit mixtures with several numbers of components, and of several shapes, and
choose the best by a criterion. Prints a table of all, and the components of
the best, which --output writes to a file for pyroem predict.

example, with a data set that ships with pyroem:
  pyroem select faithful --components 1-4 --covariance EEE,VVV --plot bic.png

words:
  bic, aic, icl, caic, sabic
        criteria that weigh the log-likelihood against the number of free
        parameters (df): smaller is better. (mclust prints BIC with the other
        sign.) bic is the usual choice; icl prefers components that are apart
  cv    the log-likelihood of rows that were held out (5 folds): larger is
        better; it takes five more fits of every candidate
"""


def add(commands: Any) -> None:
    """The command and its options."""
    parser = add_command(commands, "select", "choose the number of components", TEXT, run)
    add_roles(add_table(parser))
    mixture = add_family(parser)
    mixture.add_argument(
        "--components",
        type=sizes,
        default=list(range(1, 10)),
        metavar="1-9",
        help="the numbers of components to try, such as 1-9 or 2,3,5 (default: 1-9)",
    )
    mixture.add_argument(
        "--covariance",
        type=names,
        metavar="A,B",
        help="family gaussian or student-t: the shapes to try (see pyroem fit), or all: mclust's"
        " fourteen; of student-t full, tied, diag and spherical (default: full)",
    )
    mixture.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="bic",
        help="what chooses (default: bic)",
    )
    add_search(parser, "starting points of every candidate, of which the best fit is kept")
    add_results(parser, "draw the criterion against the number of components (.png, .pdf, ...)")


def run(options: argparse.Namespace) -> int:
    """Fit all candidates, print, write; the exit code."""
    families.check_estimators("select")
    families.check_family(options)
    check_picture("--plot", options.plot)
    check_files({"--output": options.output, "--plot": options.plot}, options.data)
    roles = {"response": options.response, "weights": options.weights}
    table = tables.read(
        options.data, options.family, options.columns, options.kinds, roles, options.response_family
    )
    shapes = covariances_of(options, len(table.columns))
    fitting.check_rows(table, max(options.components))
    if not options.json:
        print_heading(table, options)
        print(flush=True)
    found = search(options, table, shapes)
    best = found.best
    model = None if best is None else model_of_best(options, table, best)
    if options.json:
        print(as_json(results_of(options, table, found, model)))
    else:
        print(found)
        if best is not None and model is not None:
            print(f"\nThe best: {best.label}")
            print_components(families.component_lines(model, table.columns))
            print_status(best.fit)
    if model is None and (options.output or options.plot):
        say(options, "\nNothing is written: no fit ended well.")
    if options.output is not None and model is not None:
        model.save(options.output)
        say(options, f"\nModel written to {options.output}")
    if options.plot is not None and model is not None:
        pictures.draw_selection(found, options.plot)
        say(options, f"\nPicture written to {options.plot}")
    if found.missing:
        return INTERRUPTED
    return ENDED_BADLY if best is None else SUCCESS


def covariances_of(options: argparse.Namespace, columns: int) -> list[str] | None:
    """The covariances to try; ``all`` of one column are a shared variance and one for each."""
    given = options.covariance
    if given is None:
        return ["full"] if options.family in families.WITH_COVARIANCE else None
    if given == ["all"] and options.family == "gaussian":
        return list(MCLUST) if columns > 1 else ["EII", "VII"]
    if given == ["all"] and options.family == "student-t":
        return ["full", "tied", "diag", "spherical"]
    for name in given:
        families.check_covariance(options.family, name)
    return list(given)


def search(options: argparse.Namespace, table: Table, shapes: list[str] | None) -> Selection:
    """Fit all candidates."""

    def program(components: int, covariance: str | None = None) -> Any:
        estimator = families.make(options, components, covariance, table)
        return fitting.prepare(estimator, table)[0]

    _, args = fitting.prepare(families.make(options, 1, None, table), table)
    return pyroem.select(
        program,
        *args,
        components=options.components,
        covariance=shapes,
        criterion=options.criterion,
        solver=fitting.solver_of(options),
        weights=fitting.counted(table).weights,
        seed=options.seed,
        restarts=options.restarts,
    )


def model_of_best(options: argparse.Namespace, table: Table, best: Candidate) -> Any:
    """The estimator that holds the best fit."""
    covariance = best.settings.get("covariance")
    model = families.make(options, best.components, covariance, table)
    fitting.prepare(model, table)
    fitting.adopt(model, best.fit, table)
    return model


def results_of(
    options: argparse.Namespace, table: Table, found: Selection, model: Any
) -> dict[str, Any]:
    """Everything that is printed, as plain values by name."""
    best = found.best
    return {
        "data": data_of(table),
        "model": model_of(options),
        "selection": found.to_dict(),
        "best": None
        if best is None
        else {
            "components": best.components,
            "settings": dict(best.settings),
            "fit": fit_of(best.fit),
            "parameters": families.component_values(model, table.columns),
        },
    }
