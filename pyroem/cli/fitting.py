"""From a table to a fitted estimator, and a warning as one line.

The fit is made by pyroem's own solvers, with all of their starts; the estimator takes it over as it
takes over the fits that it makes itself.
"""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyroem.cli.failures import FitError, UsageError, one_line
from pyroem.cli.tables import Table
from pyroem.em import EM
from pyroem.fit import Fit
from pyroem.gradient import MAP
from pyroem.solver import Solver

FIRST = ("loc", "rate", "probs", "probs_0", "coefficients", "weights")
MATRICES = ("covariance", "precision", "scale_tril")


def solver_of(options: Namespace) -> Solver:
    """The solver of a request."""
    shown = options.progress or sys.stderr.isatty()
    settings: dict[str, Any] = {
        "tol": options.tol,
        "max_iter": options.max_iter,
        "progress": shown,
    }
    if getattr(options, "solver", "em") == "map":
        return MAP(**settings)
    if options.family == "student-t":
        # Light tails: the degrees of freedom run off, along a likelihood that hardly changes.
        return EM(accelerate="anderson", param_tol=sys.float_info.max, **settings)
    return EM(**settings)


def counted(table: Table) -> Table:
    """The rows that count: those of a positive weight."""
    if table.weights is None or (table.weights > 0).all():
        return table
    keep = table.weights > 0
    return replace(
        table,
        values=table.values[keep],
        weights=table.weights[keep],
        response=None if table.response is None else table.response[keep],
        labels=None if table.labels is None else table.labels[keep],
    )


def check_rows(table: Table, components: int) -> None:
    """Raise a `UsageError` where there are fewer rows than components, or too large a label."""
    rows = len(counted(table).values)
    if rows < components:
        raise UsageError(
            f"--components: expected at least {components} rows, one a component; {table.name} has"
            f" {rows}"
        )
    if table.labels is not None and table.labels.max() >= components:
        raise UsageError(
            f"--labels: expected numbers of components up to {components}; got"
            f" {table.labels.max() + 1}"
        )


def prepare(estimator: Any, table: Table) -> tuple[Any, tuple[Any, ...]]:
    """The estimator's program and what it is called with; it learns what the data hold.

    Raises:
        UsageError: the estimator refuses settings or data.
    """
    rows = counted(table)
    try:
        program, args, _ = estimator.prepare(rows.values, rows.response, rows.weights)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    return program, args if rows.labels is None else (*args, torch.as_tensor(rows.labels))


def fit(estimator: Any, table: Table, options: Namespace) -> Fit:
    """Fit the estimator; the `Fit` that it holds."""
    program, args = prepare(estimator, table)
    solved = solver_of(options).fit(
        program,
        *args,
        init=options.init,
        restarts=options.restarts,
        seed=options.seed,
        weights=counted(table).weights,
    )
    return adopt(estimator, solved, table)


def adopt(estimator: Any, solved: Fit, table: Table) -> Fit:
    """Give the estimator a fit of its program, and the names of the columns; the fit in order.

    Components without labels have no order of their own: they are put in that of `in_order`, unless
    the fit has a message, which may name some of them.

    Raises:
        FitError: the fit has parameters that are no mixture, such as a singular covariance.
    """
    from sklearn.exceptions import ConvergenceWarning

    named = table.labels is not None or bool(solved.message)
    found = solved if named else in_order(solved)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the command tells the status
            estimator.adopt(found)
    except ValueError as error:
        raise FitError(f"the fit ended as {found.status}: {one_line(error)}") from error
    estimator.feature_names_in_ = np.array(table.columns, dtype=object)
    if table.response_name is not None:
        estimator.response_name_ = table.response_name
    if table.categories:
        estimator.categories_ = list(table.categories)
    return found


def in_order(found: Fit) -> Fit:
    """The fit with its components ordered by the first column.

    By its mean, rate or probability (that of the first category), in regressions by the intercept;
    where that is nothing of these, by their weights.
    Matrices ``[D, D]``, and scales that all components share, have no component's place.
    """
    params = found.params
    K = len(params["weights"])
    first = next(params[name] for name in FIRST if name in params)
    order = first.reshape(K, -1)[:, 0].argsort(stable=True)

    def ordered(name: str, value: torch.Tensor) -> torch.Tensor:
        shared = value.dim() == 0 or len(value) != K or (name in MATRICES and value.dim() == 2)
        return value if shared else value[order]

    return replace(found, params={name: ordered(name, v) for name, v in params.items()})


def picture_params(model: Any) -> dict[str, torch.Tensor]:
    """A Gaussian mixture as `pyroem.plot` takes it."""
    from pyroem.cli.families import covariances

    own = {"weights": model.weights_, "loc": model.means_, "covariance": covariances(model)}
    return {name: torch.as_tensor(np.array(value)) for name, value in own.items()}


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Warnings go to stderr, each as one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        finally:
            for text in dict.fromkeys(one_line(Warning(str(w.message))) for w in caught):
                print(f"pyroem: warning: {text}", file=sys.stderr)
