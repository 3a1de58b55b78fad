"""``pyroem predict``: the components of rows, by a model in a file."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyroem.cli import families, parquet, tables
from pyroem.cli.failures import SUCCESS, UsageError, one_line
from pyroem.cli.options import DATA, add_command
from pyroem.cli.outputs import check_files
from pyroem.datasets import Sheet

TEXT = """
Tell the component of each row of a table, by a model that pyroem fit or
pyroem select wrote. Columns are matched by their names; others are ignored.
The result is a table with the row's number and its component, both from 1.

example, with a data set that ships with pyroem:
  pyroem fit faithful --components 2 --output model.json
  pyroem predict model.json faithful --probabilities --output rows.csv

words:
  probability   of a component, given what is seen of the row
  log density   how well a row suits the mixture: the lowest are outliers
  regression    where DATA has the response, components are told by it too;
                the column "predicted" is the mean of the response, for which
                it is not needed
"""


def add(commands: Any) -> None:
    """The command and its options."""
    parser = add_command(commands, "predict", "tell the component of each row", TEXT, run)
    parser.add_argument(
        "model", type=Path, metavar="MODEL.json", help="what pyroem fit --output wrote"
    )
    parser.add_argument("data", metavar="DATA", help=DATA)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output",
        type=Path,
        metavar="ROWS.csv",
        help="the file for the result, .csv or .parquet (default: CSV to the standard output)",
    )
    group.add_argument(
        "--probabilities",
        action="store_true",
        help="also the probability of every component: probability_1, probability_2, ...",
    )
    group.add_argument(
        "--scores", action="store_true", help="also the row's log density: log_density"
    )
    group.add_argument(
        "--impute",
        action="store_true",
        help="also the model's columns with missing values filled in: by what is expected there,"
        " given what is seen of the row (of categories the most probable)",
    )


def run(options: argparse.Namespace) -> int:
    """Predict and write; the exit code."""
    families.check_estimators("predict")
    if options.output is not None:
        if options.output.suffix.lower() not in (".csv", ".parquet"):
            raise UsageError(
                f"--output: cannot write {options.output}: expected the ending .csv or .parquet"
            )
        if options.output.suffix.lower() == ".parquet":
            parquet.check_installed(f"--output: {options.output}: a parquet file")
    check_files({"--output": options.output}, options.data)
    check_files({"--output": options.output}, str(options.model))
    model = load(options.model)
    _, sheet = tables.open_sheet(options.data)
    names = columns_of(model, options.model)
    if type(model).__name__ == "MixtureOfRegressions":
        found = regressed(model, names, sheet, options)
    else:
        found = assigned(model, names, sheet, options)
    rows = len(found["component"])
    write(options.output, {"row": np.arange(1, rows + 1), **found})
    if options.output is not None:
        print(f"{rows} rows written to {options.output}")
    return SUCCESS


def load(path: Path) -> Any:
    """The estimator in a file."""
    from pyroem import estimators

    try:
        return estimators.load(path)
    except ValueError as error:
        raise UsageError(
            f"MODEL.json: expected a file that pyroem fit wrote; {one_line(error)}"
        ) from error


def columns_of(model: Any, path: Path) -> list[str]:
    """The names of the model's columns."""
    given = getattr(model, "feature_names_in_", None)
    if given is None:
        raise UsageError(
            f"MODEL.json: {path} has no names of columns; expected a model that pyroem fit wrote,"
            " or that was fitted to a data frame"
        )
    del model.feature_names_in_  # the rows come as arrays, in the order of the names
    return [str(name) for name in given]


def indices(sheet: Sheet, names: list[str]) -> list[int]:
    """Where the model's columns are in DATA."""
    lacking = [name for name in names if name not in sheet.header]
    if lacking:
        raise UsageError(
            f"DATA: {sheet.source} lacks the model's column"
            f"{'s' * (len(lacking) > 1)} {', '.join(lacking)};"
            f" it has {', '.join(sheet.title(i) for i in range(len(sheet.header)))}"
        )
    return [sheet.header.index(name) for name in names]


def assigned(
    model: Any, names: list[str], sheet: Sheet, options: argparse.Namespace
) -> dict[str, Any]:
    """What a mixture says of the rows, by the names of the columns of the result."""
    values = values_of(model, sheet, indices(sheet, names))
    found: dict[str, Any] = {"component": model.predict(values) + 1}
    if options.probabilities:
        found |= probabilities(model.predict_proba(values))
    if options.scores:
        found["log_density"] = model.score_samples(values)
    if options.impute:
        if clash := [n for n in names if n in ("row", *found)]:
            raise UsageError(
                f"--impute: expected columns of other names than those of the result; got"
                f" {', '.join(clash)}"
            )
        found |= filled(model, names, values)
    return found


def values_of(model: Any, sheet: Sheet, chosen: list[int]) -> NDArray[Any]:
    """The rows as the model takes them; categories that it does not know are missing values."""
    kind = type(model).__name__
    if kind == "LatentClass":
        columns = zip(chosen, model.categories_, strict=True)
        return tables.as_objects([known(sheet, i, list(own)) for i, own in columns])
    codes = families.code_names(model) if kind == "MixedMixture" else [None] * len(chosen)
    family = {"PoissonMixture": "poisson", "BernoulliMixture": "bernoulli"}.get(kind)
    kinds = model.kinds_ if kind == "MixedMixture" else [family] * len(chosen)
    values = []
    for i, own, word in zip(chosen, codes, kinds, strict=True):
        if own is not None:
            values.append(tables.codes(known(sheet, i, list(own)), list(own)))
            continue
        values.append(np.array(sheet.numbers(i)))
        tables.check_kind(sheet, i, values[-1], word)
    return np.stack(values, 1)


def known(sheet: Sheet, index: int, categories: list[Any]) -> list[Any]:
    """A column as categories of the model; None where one is missing or unknown."""
    numeric = not any(isinstance(category, str) for category in categories)
    if numeric and sheet.is_numeric(index):
        cells: list[Any] = list(sheet.categories(index))
    else:
        cells = list(sheet.texts(index))
    foreign = [cell for cell in cells if cell is not None and cell not in categories]
    if foreign:
        words = ", ".join(families.category_name(c) for c in categories[:10])
        print(
            f"pyroem: warning: {sheet.source}, column {sheet.title(index)!r}: {len(foreign)} values"
            f" were not in the fit, such as {families.category_name(foreign[0])!r}, and count as"
            f" missing; expected {words}{', ...' * (len(categories) > 10)}",
            file=sys.stderr,
        )
    return [cell if cell in categories else None for cell in cells]


def probabilities(table: NDArray[Any]) -> dict[str, Any]:
    """One column for each component."""
    return {f"probability_{k}": column for k, column in enumerate(table.T, start=1)}


def filled(model: Any, names: list[str], values: NDArray[Any]) -> dict[str, Any]:
    """The rows with missing values filled in."""
    table = model.impute(values)
    found: dict[str, Any] = dict(zip(names, table.T, strict=True))
    if type(model).__name__ != "MixedMixture":
        return found
    for name, own in zip(names, families.code_names(model), strict=True):
        if own is not None:
            found[name] = [own[int(code)] for code in found[name]]
    return found


def regressed(
    model: Any, names: list[str], sheet: Sheet, options: argparse.Namespace
) -> dict[str, Any]:
    """What a mixture of regressions says of the rows."""
    if options.impute:
        raise UsageError("--impute: expected a model of rows; a regression fills in no values")
    chosen = indices(sheet, names)
    X = np.array([sheet.numbers(i) for i in chosen]).T
    response = getattr(model, "response_name_", None)
    y = None
    if response in sheet.header:
        index = sheet.header.index(response)
        y = np.array(sheet.numbers(index))
        tables.check_kind(sheet, index, y, model.family)
    for j, column in enumerate([*X.T] if y is None else [*X.T, y]):
        gone = np.flatnonzero(np.isnan(column))
        if len(gone):
            name = [*names, response][j]
            raise UsageError(
                f"{sheet.source}, column {name!r}, {sheet.place(int(gone[0]))}: expected a number;"
                " it is missing"
            )
    if options.scores and y is None:
        raise UsageError(f"--scores: expected the response, column {response!r}, in DATA")
    own = model.responsibilities(X, y)
    found: dict[str, Any] = {"component": own.argmax(1) + 1, "predicted": model.predict(X)}
    if options.probabilities:
        found |= probabilities(own)
    if options.scores:
        found["log_density"] = model.log_prob(X, y)
    return found


def write(path: Path | None, columns: dict[str, Any]) -> None:
    """Columns of equal length as CSV, or as a parquet file."""
    lists = {name: np.asarray(column).tolist() for name, column in columns.items()}
    if path is not None and path.suffix.lower() == ".parquet":
        parquet.write(path, lists)
        return
    rows = zip(*([cell_of(v) for v in column] for column in lists.values()), strict=True)
    if path is None:
        write_csv(sys.stdout, list(lists), rows)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        write_csv(file, list(lists), rows)


def write_csv(file: Any, header: list[str], rows: Any) -> None:
    """A header and rows, separated by commas."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)


def cell_of(value: Any) -> Any:
    """Numbers with all their digits, whole ones without a point; nothing where one is missing."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return value
