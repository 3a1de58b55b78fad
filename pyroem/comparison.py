"""The tables of a comparison: of several solvers from one start, and from many."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pyroem.errors import SettingError
from pyroem.fit import Fit
from pyroem.text import aligned, plain


@dataclass(frozen=True)
class Row:
    """One solver's line in the table.

    ``gap`` is the best fit's objective less this one; ``parameter_difference`` the largest
    difference of any parameter's element to the best fit, states matched, as a fraction of that
    parameter's largest element; NaN where it is ambiguous which states are which. ``elbo`` is the
    evidence lower bound of a variational fit.
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
    elbo: float | None = None


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

    def to_json(self, **kwargs: Any) -> str:
        """:meth:`to_dict` as JSON; numbers that are not finite become null."""
        return as_json(self.to_dict(), **kwargs)

    def to_pandas(self) -> Any:
        """The rows as a data frame. Needs pandas."""
        return as_frame([asdict(row) for row in self.rows])

    def _cells(self) -> list[list[str]]:
        elbo = any(row.elbo is not None for row in self.rows)
        head = ["solver", "log_joint", "log_likelihood", "gap", "iterations", "passes", "seconds"]
        table = [[*head, "status", "rel param diff", *(["elbo"] if elbo else [])]]
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
                    difference(r.parameter_difference),
                ]
            )
            if elbo:
                table[-1].append("" if r.elbo is None else f"{r.elbo:.3f}")
        return table

    def __str__(self) -> str:
        note = f"interrupted; not run: {', '.join(self.missing)}" if self.missing else ""
        return in_columns(self._cells(), {0, 7}, note)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return in_html(self._cells())


@dataclass(frozen=True)
class StudyRow:
    """One solver's line over all seeds: medians with their quartiles.

    ``best`` is the share of the runs that reached the best objective of all, ``converged`` that of
    those that ended well; ``gap``, ``iterations``, ``passes``, ``seconds`` and
    ``parameter_difference`` are ``(lower quartile, median, upper quartile)``; so are
    ``seconds_per_iteration`` and ``seconds_per_pass``. ``ambiguous`` runs, whose states cannot be
    told apart from the best fit's clearly, have no ``parameter_difference``: it is that of the
    others, NaN where there are none.
    """

    name: str
    runs: int
    best: float
    converged: float
    gap: tuple[float, float, float]
    iterations: tuple[float, float, float]
    passes: tuple[float, float, float]
    seconds: tuple[float, float, float]
    seconds_per_iteration: tuple[float, float, float]
    seconds_per_pass: tuple[float, float, float]
    parameter_difference: tuple[float, float, float]
    ambiguous: int = 0


@dataclass(frozen=True, eq=False)
class Study:
    """Comparisons of several solvers from many starts.

    Attributes:
    ----------
    rows
        One :class:`StudyRow` a solver.
    comparisons
        By seed.
    best
        The highest objective of a healthy fit, over all seeds and solvers; None where every seed
        has data of its own, so that each run is held against the best of its seed.
    near
        How close to it (in nats) counts as reaching it.
    """

    rows: list[StudyRow]
    comparisons: dict[int, Comparison]
    best: float | None
    near: float

    def gap(self, row: Row) -> float:
        """The best objective less that of a row of one of the comparisons."""
        return row.gap if self.best is None else self.best - row.log_joint

    def reached(self, row: Row) -> bool:
        """Whether a row of one of the comparisons reached the best objective.

        A collapse may lie above the best of the healthy fits: it has not reached it.
        """
        return abs(self.gap(row)) <= self.near

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: the rows, and every seed's comparison."""
        return {
            "best": self.best,
            "near": self.near,
            "rows": [asdict(row) for row in self.rows],
            "seeds": {seed: found.to_dict() for seed, found in self.comparisons.items()},
        }

    def to_json(self, **kwargs: Any) -> str:
        """:meth:`to_dict` as JSON; numbers that are not finite become null."""
        return as_json(self.to_dict(), **kwargs)

    def to_pandas(self) -> Any:
        """One line for each seed and solver, as a data frame. Needs pandas."""
        return as_frame(
            [
                {"seed": seed, **asdict(row), "gap_to_best": self.gap(row)}
                for seed, found in self.comparisons.items()
                for row in found.rows
            ]
        )

    def _cells(self) -> list[list[str]]:
        table = [
            ["solver", "best", "converged", "gap", "iterations", "passes", "seconds", "param diff"]
        ]
        for r in self.rows:
            spreads = [r.gap, r.iterations, r.passes, r.seconds]
            forms = ["{:.1e}", "{:.0f}", "{:.0f}", "{:.3f}"]
            if r.ambiguous < r.runs:
                spreads, forms = [*spreads, r.parameter_difference], [*forms, "{:.1e}"]
            cells = [
                f"{f.format(x[1])} [{f.format(x[0])}, {f.format(x[2])}]"
                for f, x in zip(forms, spreads, strict=True)
            ]
            if r.ambiguous == r.runs:
                cells.append("ambiguous")
            elif r.ambiguous:
                cells[-1] += f" ({r.ambiguous} ambiguous)"
            table.append([r.name, f"{r.best:.0%}", f"{r.converged:.0%}", *cells])
        return table

    def __str__(self) -> str:
        count = len(self.comparisons)
        best = "the best of its seed"
        if self.best is not None:
            best = f"{self.best:.6f}, the highest objective of all"
        note = f"{count} starts; median [quartiles]; best: within {self.near:g} nats of {best}"
        return in_columns(self._cells(), {0}, note)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return in_html(self._cells())


def difference(value: float) -> str:
    """A difference of parameters in a table; NaN is one that the states' match leaves open."""
    return "ambiguous" if math.isnan(value) else f"{value:.1e}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; infinite values count."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def as_json(found: Any, **kwargs: Any) -> str:
    """JSON, with null for numbers that are not finite."""
    return json.dumps(plain(found), **kwargs)


def as_frame(rows: list[dict[str, Any]]) -> Any:
    """A pandas data frame."""
    try:
        import pandas
    except ImportError as error:
        raise SettingError("to_pandas: pandas is not installed (pip install pandas).") from error
    return pandas.DataFrame(rows)


def in_columns(table: list[list[str]], left: set[int], note: str = "") -> str:
    """A table as text, its head ruled off; the columns in ``left`` are flush left."""
    head, *lines = aligned(table, left)
    rule = "-" * max(map(len, [head, *lines]))
    return "\n".join([head, rule, *lines, *([note] if note else [])])


def in_html(table: list[list[str]], note: str = "") -> str:
    """A table as HTML, with a note below."""
    head, *body = table
    cell = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body
    )
    below = "".join(f"<p>{html.escape(line)}</p>" for line in note.splitlines())
    return f"<table><thead><tr>{cell}</tr></thead><tbody>{rows}</tbody></table>{below}"
