"""Cross-validation: the log-likelihood of rows that a fit has not seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroem.blocks import is_source
from pyroem.errors import DataError, PyroemError, SettingError
from pyroem.interrupt import pause_point, pressed
from pyroem.loop import Status
from pyroem.sampling import leading_sizes, take
from pyroem.selection.programs import Posed
from pyroem.solver import Solver

GOOD = (Status.CONVERGED, Status.MAX_ITER, Status.STALLED)  # a fold's fit that says something


def make_folds(rows: int, folds: int, seed: int) -> list[Tensor]:
    """The row numbers of each fold, in order: every row in one of them, at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    return [order[i::folds].sort().values for i in range(folds)]


def check_folds(posed: Posed, solver: Solver, data: Any, folds: Any, seed: int) -> list[Tensor]:
    """The folds, if the rows of the data can be cut.

    Raises:
    ------
    SettingError
        Where ``folds`` is no number of folds, or the program's rows are not those of its data.
    """
    args = data[0]
    structure = posed.problem.structure
    if args and is_source(args[0]):
        raise SettingError("criterion='cv': expected rows in memory, got data in blocks.")
    if len(structure.unit) != 1:
        raise SettingError(
            "criterion='cv': expected a program with one plate of independent rows to cut, got"
            f" {'plates ' + ', '.join(structure.unit) if structure.unit else 'none'}."
        )
    rows = structure.num_rows
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= rows:
        raise SettingError(
            f"folds: expected an integer from 2 to {rows} (the rows), got {folds!r}."
        )
    if rows not in leading_sizes(data):
        raise SettingError(
            f"criterion='cv': expected data with {rows} rows (plate '{structure.unit[0]}') in the"
            f" first dim, got first dims {sorted(set(leading_sizes(data)))}."
        )
    parts = make_folds(rows, folds, seed)
    index, weights = _others(parts, 0), posed.problem.row_weights
    if weights is not None and any(not weights[_others(parts, i)].sum() > 0 for i in range(folds)):
        raise DataError("weights: expected a positive weight outside of every fold, got none.")
    few = take(data, index, rows)
    try:
        problem = solver.pose(posed.model, few[0], few[1], None)
    except PyroemError as error:
        raise SettingError(
            f"criterion='cv': the program cannot run on some of its rows: {error}"
        ) from error
    if problem.structure.unit_shape != (len(index),):
        raise SettingError(
            f"criterion='cv': expected {len(index)} rows of a program that is given some of its"
            f" rows, got {problem.structure.num_rows}: its plate does not follow the data."
        )
    for name, parameter in structure.parameters.items():
        shape = problem.structure.parameters[name].shape
        if shape != parameter.shape:
            raise SettingError(
                f"criterion='cv': parameter '{name}' has shape {parameter.shape} on all rows, but"
                f" {shape} on some: it belongs to the rows."
            )
    return parts


def _others(parts: list[Tensor], i: int) -> Tensor:
    return torch.cat([part for j, part in enumerate(parts) if j != i]).sort().values


def held_out(
    posed: Posed, solver: Solver, data: Any, parts: list[Tensor], seed: int, restarts: int
) -> float:
    """The (weighted) log-likelihood of all rows, each by the fit to the other folds.

        cv = sum_i sum_{n in fold i} w_n log p(x_n | params fitted without fold i)

    The fits start as ``Solver.fit`` does, from the rows that they are given: nothing of the
    held-out rows gets into them. NaN where the fit to some folds collapses.
    """
    weights, rows = posed.problem.row_weights, posed.problem.structure.num_rows
    total = 0.0
    for i, part in enumerate(parts):
        pause_point()
        index = _others(parts, i)
        args, kwargs = take(data, index, rows)
        own = None if weights is None else weights[index]
        fit = solver.fit(posed.model, *args, weights=own, seed=seed, restarts=restarts, **kwargs)
        if fit.status is Status.INTERRUPTED or pressed():
            raise KeyboardInterrupt
        if fit.status not in GOOD:
            return math.nan
        args, kwargs = take(data, part, rows)
        found = fit.log_prob(*args, **kwargs)
        total += float((found if weights is None else found * weights[part]).sum())
    return total
