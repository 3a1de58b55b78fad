"""Several solvers on one problem: one start, one objective, one clock."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.em import EM
from pyroem.errors import ModelError, SettingError
from pyroem.fit import Fit
from pyroem.gradient import MAP
from pyroem.interrupt import deferred, pressed
from pyroem.loop import Status, rank
from pyroem.problem import Problem
from pyroem.progress import Progress
from pyroem.solver import Solver
from pyroem.starts import starts
from pyroem.structure import Params
from pyroem.symmetry import permute


@dataclass(frozen=True)
class Row:
    """One solver's line in the table.

    ``gap`` is the best fit's objective less this one; ``parameter_difference`` the largest
    difference of any parameter's element to the best fit, states matched, as a fraction of that
    parameter's largest element.
    """

    name: str
    log_joint: float
    log_likelihood: float
    gap: float
    iterations: int
    passes: int
    seconds: float
    status: str
    converged: bool
    parameter_difference: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """The fits of several solvers from one start, and their table.

    Attributes:
    ----------
    rows
        One :class:`Row` a solver.
    fits
        Every solver's :class:`~pyroem.fit.Fit`, by name.
    best
        The name of the fit with the highest objective; a collapsed one only if all are.
    missing
        The solvers that an interrupt kept from running.
    """

    rows: list[Row]
    fits: dict[str, Fit]
    best: str
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: the rows, and every solver's history."""
        return {
            "best": self.best,
            "rows": [asdict(row) for row in self.rows],
            "history": {
                name: [record._asdict() for record in fit.history]
                for name, fit in self.fits.items()
            },
        }

    def plot(self, ax: Any = None) -> Any:
        """Draw the gap to the best objective against iterations and seconds (two axes)."""
        from pyroem.plot import comparison

        return comparison(self, ax)

    def _cells(self) -> list[list[str]]:
        table = [
            [
                "solver",
                "log_joint",
                "log_likelihood",
                "gap",
                "iterations",
                "passes",
                "seconds",
                "status",
                "rel param diff",
            ]
        ]
        for r in self.rows:
            table.append(
                [
                    r.name,
                    f"{r.log_joint:.6f}",
                    f"{r.log_likelihood:.6f}",
                    f"{r.gap:.1e}",
                    str(r.iterations),
                    str(r.passes),
                    f"{r.seconds:.3f}",
                    r.status,
                    f"{r.parameter_difference:.1e}",
                ]
            )
        return table

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        left = {0, 7}
        lines = [
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        if self.missing:
            lines.append(f"interrupted; not run: {', '.join(self.missing)}")
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        cell = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body
        )
        return f"<table><thead><tr>{cell}</tr></thead><tbody>{rows}</tbody></table>"


def default_solvers() -> dict[str, Solver]:
    """EM, and MAP with Adam and with L-BFGS."""
    return {"EM": EM(), "MAP (Adam)": MAP("adam"), "MAP (L-BFGS)": MAP("lbfgs")}


def compare(
    model: Callable[..., Any],
    *args: Any,
    solvers: Mapping[str, Solver] | None = None,
    init: Any = "auto",
    restarts: int = 1,
    seed: int = 0,
    weights: Any = None,
    **kwargs: Any,
) -> Comparison:
    """Fit one program with several solvers, each from the same start (or starts).

    Every fit is judged on the same ``log_joint``, in the highest precision that any of the solvers
    has. Seconds and passes are those of the iterations from the start on; reading the program and
    finding the start are shared and not counted. An interrupt (Ctrl-C) ends the comparison with the
    fits so far.

    Raises:
    ------
    SettingError
        Where ``solvers`` is not a mapping of names to solvers; else as ``Solver.fit``.
    """
    if solvers is not None and not isinstance(solvers, Mapping):
        raise SettingError(
            f"solvers: expected a dict of names to solvers, got {type(solvers).__name__}."
        )
    chosen = dict(default_solvers() if solvers is None else solvers)
    if not chosen:
        raise SettingError("solvers: expected at least one solver, got none.")
    for name, solver in chosen.items():
        if not isinstance(solver, Solver):
            raise SettingError(
                f"solvers: '{name}' must be a solver such as EM() or MAP(), got"
                f" {type(solver).__name__}."
            )
    problems: dict[Any, Problem] = {}
    fits: dict[str, Fit] = {}
    common = None
    with deferred():
        for name, solver in chosen.items():
            key = (solver.dtype, solver.fixed, solver.floor, solver.engine, str(solver.device))
            if key not in problems:
                problems[key] = solver.pose(model, args, kwargs, weights, init=init)
            problem = problems[key]
            solver.check(problem)
            with isolated(solver.dtype, seed):
                if common is None:
                    show = Progress("", any(s.progress for s in chosen.values()))
                    common = list(islice(starts(problem, init, restarts, seed, show), restarts))
                    show.close()
                own = [replace(s, params=_cast(s.params, solver.dtype)) for s in common]
                with suppress(ModelError, torch.linalg.LinAlgError):  # the run itself will say so
                    solver.begin(problem, own[0].params)  # what is made once is not on the clock
                fits[name] = solver.solve(problem, own, restarts)
            if fits[name].status is Status.INTERRUPTED or pressed():
                break
    widest = max(problems.values(), key=lambda p: torch.finfo(p.structure.program.dtype).bits)
    values = {name: _value(fit, widest) for name, fit in fits.items()}
    best = max(fits, key=lambda name: rank(fits[name].status, values[name][0]))
    rows = [
        _row(name, fit, fits[best], values[name], values[best][0]) for name, fit in fits.items()
    ]
    return Comparison(rows, fits, best, tuple(name for name in chosen if name not in fits))


def _cast(params: Params, dtype: torch.dtype) -> Params:
    return {name: value.to(dtype) for name, value in params.items()}


def _value(fit: Fit, problem: Problem) -> tuple[float, float]:
    """The log-joint and the log-likelihood, in the precision of ``problem``."""
    dtype = problem.structure.program.dtype
    if fit.problem.structure.program.dtype == dtype:
        return fit.log_joint, fit.log_likelihood
    with isolated(dtype, 0):
        log_likelihood, log_prior = problem.parts(_cast(fit.params, dtype))
    return log_likelihood + log_prior, log_likelihood


def _row(name: str, fit: Fit, best: Fit, value: tuple[float, float], highest: float) -> Row:
    last = fit.history[-1]
    return Row(
        name,
        *value,
        highest - value[0],
        fit.n_iter,
        last.passes,
        last.seconds,
        str(fit.status),
        fit.converged,
        parameter_difference(fit, best),
    )


def parameter_difference(fit: Fit, reference: Fit) -> float:
    """The largest relative difference of any parameter, after the states are matched.

    ``max |a - b| / max |b|`` over the elements of a parameter, the largest over the parameters.
    """
    if fit is reference:
        return 0.0
    own = _canonical(reference, reference.params)
    other = _canonical(reference, match(fit, reference))
    return max((_relative(other[n], own[n]) for n in own if own[n].numel()), default=0.0)


def _relative(value: Tensor, reference: Tensor) -> float:
    gap, size = float((value - reference).abs().max()), float(reference.abs().max())
    return gap / size if size > 0 else gap


def match(fit: Fit, reference: Fit) -> Params:
    """The parameters of ``fit``, its states renamed as those of ``reference``.

    States are paired to agree on as many rows as possible (the Hungarian algorithm on the overlap
    of the posteriors).
    """
    structure = reference.problem.sample.structure
    params = {n: v.to(reference.params[n].dtype) for n, v in fit.params.items()}
    with isolated(structure.program.dtype, 0):
        a = reference.problem.sample.marginals(reference.params)
        b = reference.problem.sample.marginals(params)
    for group in reference.problem.groups:
        k = group.num_states
        if group.movable < 2 or not (group.axes or group.complements):
            continue
        overlap = torch.zeros((k, k), dtype=structure.program.dtype)
        for z in group.assignments:
            overlap += a[z].reshape(-1, k).T @ b[z].reshape(-1, k)
        if not overlap.isfinite().all():
            continue
        order = torch.arange(k)
        free = overlap[: group.movable, : group.movable]
        order[: group.movable] = torch.as_tensor(linear_sum_assignment(free, maximize=True)[1])
        params = permute(params, group, order)
    return params


def _canonical(fit: Fit, params: Params) -> Params:
    """Parameters of which only ratios or differences count, normalised."""
    result = dict(params)
    for name, block in fit.problem.plan.blocks.items():
        if block.uses:
            result[name] = block.uses[0].coordinate.canonical(params[name])
    return result


__all__ = ["Comparison", "Row", "compare", "default_solvers", "match", "parameter_difference"]
