"""``pyroem fit``: one mixture for one table."""

from __future__ import annotations

import argparse
from typing import Any

from pyroem.cli import families, fitting, pictures, tables
from pyroem.cli.failures import code_of
from pyroem.cli.options import (
    add_command,
    add_family,
    add_results,
    add_roles,
    add_search,
    add_table,
    positive_int,
)
from pyroem.cli.outputs import as_json, check_files, print_components, print_table_heading
from pyroem.cli.tables import Table
from pyroem.fit import Fit

TEXT = """
Fit a mixture to a table: rows that come from K groups (components), each with
a distribution of its own. Prints the components and how well they fit, and
writes the model to a file, with which pyroem predict tells the component of
each row.

example, with a data set that ships with pyroem:
  pyroem fit faithful --components 2 --output model.json --plot mixture.png

words:
  weight          the share of the rows that come from a component
  log-likelihood  how probable the data are under the mixture: larger is better
  BIC, AIC, ICL   the same, less a price for each free parameter: smaller is
                  better (ICL: for components that are apart)
  missing values  are taken into account exactly: a row counts with the values
                  that it has
"""


def add(commands: Any) -> None:
    """The command and its options."""
    parser = add_command(commands, "fit", "fit a mixture to a table", TEXT, run)
    columns = add_table(parser)
    add_roles(columns)
    columns.add_argument(
        "--labels",
        metavar="COLUMN",
        help="the number of each row's component, from 1, where it is known; empty elsewhere",
    )
    mixture = add_family(parser)
    mixture.add_argument(
        "--components",
        type=positive_int,
        required=True,
        metavar="K",
        help="how many components (required; pyroem select chooses)",
    )
    mixture.add_argument(
        "--covariance",
        metavar="NAME",
        help="family gaussian or student-t: the shape of the components, full (ellipses of any"
        " shape; the default), tied (all alike), diag (along the axes) or spherical (round);"
        " gaussian also tied-diagonal, tied-spherical, and mclust's names EII, VII, EEI, VEI, EVI,"
        " VVI, EEE, VEE, EVE, VVE, EEV, VEV, EVV, VVV",
    )
    mixture.add_argument(
        "--prior",
        choices=("weak",),
        help="a prior that counts as about one row and keeps components from collapsing"
        " (families gaussian, poisson, bernoulli, categorical)",
    )
    search = add_search(parser, "starting points, of which the best fit is kept")
    search.add_argument(
        "--init",
        choices=("auto", "thorough", "kmeans", "ward", "random"),
        default="auto",
        help="where to start: auto (the best of many guesses, after short runs), thorough (more"
        " guesses, and components split and merged), kmeans, ward (hierarchical clusters),"
        " random; default: auto",
    )
    search.add_argument(
        "--solver",
        choices=("em", "map"),
        default="em",
        help="em (closed-form EM) or map (gradient ascent by L-BFGS, on the same objective);"
        " default: em",
    )
    results = add_results(
        parser,
        "draw the rows and the components, family gaussian only: one column, or the first two"
        " (.png, .pdf, .svg, ...)",
    )
    results.add_argument(
        "--explain", action="store_true", help="say how each parameter is updated, and why"
    )


def run(options: argparse.Namespace) -> int:
    """Fit, print, write; the exit code."""
    families.check_estimators("fit")
    families.check_family(options)
    families.check_covariance(options.family, options.covariance, options.prior)
    pictures.check_mixture_picture(options.family, options.plot)
    check_files({"--output": options.output, "--plot": options.plot}, options.data)
    roles = {"response": options.response, "weights": options.weights, "labels": options.labels}
    table = tables.read(
        options.data, options.family, options.columns, options.kinds, roles, options.response_family
    )
    fitting.check_rows(table, options.components)
    model = families.make(options, options.components, options.covariance, table)
    if not options.json:
        print_heading(table, options)
        print(f"{describe(options)}\n", flush=True)
    fit = fitting.fit(model, table, options)
    if options.json:
        print(as_json(results_of(model, fit, table, options)))
    else:
        print_fit(model, fit, table, options)
    if options.output is not None:
        model.save(options.output)
        say(options, f"\nModel written to {options.output}")
    if options.plot is not None:
        params = fitting.picture_params(model)
        pictures.draw_mixture(params, table.values, table.columns, options.plot)
        say(options, f"\nPicture written to {options.plot}{pictures.shown(table.values)}")
    return code_of(fit.status)


def print_heading(table: Table, options: argparse.Namespace) -> None:
    """The data: rows, columns, what was left out, what is missing."""
    print_table_heading(table)
    rows = len(table.values)
    if table.kinds:
        pairs = zip(table.columns, table.kinds, strict=True)
        words = [f"{c} {k if isinstance(k, str) else f'categorical ({k})'}" for c, k in pairs]
        print(f"Kinds: {', '.join(words)}")
    if table.labels is not None:
        known = int((table.labels >= 0).sum())
        print(f"Known components: {known} of {rows} rows, from column {options.labels}")
    if table.weights is not None:
        print(f"Weights: column {options.weights}, {table.weights.sum():g} in all")


def say(options: argparse.Namespace, text: str) -> None:
    """Print a text, unless the standard output is JSON."""
    if not options.json:
        print(text)


def describe(options: argparse.Namespace) -> str:
    """The mixture and the settings of its fit, in a line."""
    what = f"{options.family} mixture, K = {options.components}"
    if options.family in families.WITH_COVARIANCE:
        what += f", {options.covariance or 'full'} covariance"
    if options.family == "regression":
        what += f", {options.response_family or 'gaussian'} response {options.response}"
    if options.prior is not None:
        what += f", {options.prior} prior"
    return (
        f"{what[0].upper()}{what[1:]}; {options.solver}, start {options.init},"
        f" seed {options.seed}, restarts {options.restarts}"
    )


def print_fit(model: Any, fit: Fit, table: Table, options: argparse.Namespace) -> None:
    """The table of components, and how well they fit."""
    print_components(families.component_lines(model, table.columns))
    numbers = {"log-likelihood": fit.log_likelihood}
    if options.prior is not None:
        numbers["log-prior"] = fit.log_prior
    numbers |= {"BIC": fit.bic(), "AIC": fit.aic(), "ICL": fit.icl()}
    print("\n" + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    print(f"Free parameters (df): {fit.df}")
    print_status(fit)
    if options.explain:
        print(f"\n{fit.explain()}")


def print_status(fit: Fit) -> None:
    """How a fit ended, and what that means where it is not well."""
    ended = f"Status: {fit.status}, after {fit.n_iter} iterations."
    if not fit.converged:
        ended += f" {fit.status.explanation}"
    note = " (there components count from 0)" if "[" in fit.message else ""
    print(f"{ended} {fit.message}".rstrip() + note)


def results_of(model: Any, fit: Fit, table: Table, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as plain values by name."""
    found = {
        "data": data_of(table),
        "model": model_of(options),
        "fit": fit_of(fit),
        "components": families.component_values(model, table.columns),
    }
    return {**found, "explain": fit.explain()} if options.explain else found


def data_of(table: Table) -> dict[str, Any]:
    """The data in words."""
    return {
        "name": table.name,
        "rows": len(table.values),
        "columns": table.columns,
        "missing": table.missing,
        "left_out": table.left_out,
    }


def model_of(options: argparse.Namespace) -> dict[str, Any]:
    """The request in words."""
    own = ["family", "components", "covariance", "prior", "response", "response_family", "labels"]
    own += ["weights", "solver", "init", "seed", "restarts", "max_iter", "tol"]
    return {name: value for name in own if (value := getattr(options, name, None)) is not None}


def fit_of(fit: Fit) -> dict[str, Any]:
    """How a fit ended, and its criteria."""
    return {
        "status": fit.status.value,
        "converged": fit.converged,
        "message": fit.message,
        "iterations": fit.n_iter,
        "log_likelihood": fit.log_likelihood,
        "log_prior": fit.log_prior,
        "df": fit.df,
        "bic": fit.bic(),
        "aic": fit.aic(),
        "icl": fit.icl(),
    }
