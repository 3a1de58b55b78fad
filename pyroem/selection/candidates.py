"""What a selection returns: every candidate with its criteria, and the one that is chosen."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyroem.errors import ModelError
from pyroem.fit import Fit
from pyroem.loop import Status
from pyroem.text import aligned

CRITERIA = ("bic", "aic", "icl", "caic", "sabic", "cv")
WIDTH = 96  # characters of a printed table; more settings continue below
FEW = 6  # missing candidates that are named there
TOP = 3  # candidates that are listed below the table


@dataclass(frozen=True, eq=False)
class Candidate:
    """One program of a selection, fitted.

    With ``L`` the log-likelihood and ``n`` the (weighted) rows, as ``Fit.bic`` counts them:

        aic   = -2 L + 2 df                      caic  = -2 L + df (log n + 1)
        bic   = -2 L + df log n                  sabic = -2 L + df log((n + 2) / 24)
        icl   = bic + 2 H, with H the posterior entropy of the assignments

    Of these the smaller is the better. (mclust prints ``2 L - df log n``: the same number with the
    other sign; and its icl has in place of ``H`` the sum of ``-log`` of every row's largest
    probability.) ``cv`` is the log-likelihood of held-out rows, of which the larger is the better;
    None where it was not asked for, or not reached. ``n_iter`` are the iterations of the run that
    led here (the fit that gave its start had its own), ``seconds`` those of all fits of the
    program. ``counts`` says whether the fit ended well, so that it can be chosen.

    Source: Schwarz (1978); Bozdogan (1987), for caic; Sclove (1987), for sabic; Biernacki, Celeux
    and Govaert (2000), for icl; Smyth (2000), for cv.
    """

    components: int
    settings: Mapping[str, Any]
    log_likelihood: float
    df: int
    bic: float
    aic: float
    icl: float
    caic: float
    sabic: float
    cv: float | None
    n_iter: int
    seconds: float
    status: Status
    counts: bool
    fit: Fit

    @property
    def label(self) -> str:
        """The components and the settings, in words."""
        return label_of(self.components, self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: numbers that are not finite become None, other objects text."""
        numbers = ("log_likelihood", "df", *CRITERIA, "n_iter", "seconds")
        return {
            "components": self.components,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            **{name: _plain(getattr(self, name)) for name in numbers},
            "status": self.status.value,
            "counts": self.counts,
        }


def criteria_of(fit: Fit) -> dict[str, float]:
    """All information criteria of a fit; NaN where its log-likelihood is not finite."""
    if not math.isfinite(fit.log_likelihood):
        return dict.fromkeys((name for name in CRITERIA if name != "cv"), math.nan)
    deviance, rows = -2 * fit.log_likelihood, fit.problem.rows
    return {
        "bic": fit.bic(),
        "aic": fit.aic(),
        "icl": fit.icl(),
        "caic": deviance + fit.df * (math.log(rows) + 1),
        "sabic": deviance + fit.df * math.log((rows + 2) / 24),
    }


def label_of(components: int, settings: Mapping[str, Any]) -> str:
    """``components 3, covariance VVI``."""
    return ", ".join([f"components {components}", *(f"{n} {v}" for n, v in settings.items())])


def cost(candidate: Candidate, criterion: str) -> float:
    """The criterion as a number of which the smaller is the better; infinite if it has none."""
    value = getattr(candidate, criterion)
    if value is None or math.isnan(value):
        return math.inf
    return -float(value) if criterion == "cv" else float(value)


def best_of(rows: Sequence[Candidate], criterion: str) -> Candidate | None:
    """The candidate to choose; None where no fit ended well. Of equals the first."""
    able = [row for row in rows if row.counts and math.isfinite(cost(row, criterion))]
    return min(able, key=lambda row: cost(row, criterion), default=None)


@dataclass(frozen=True, eq=False)
class Selection:
    """All candidates, and the best of them by a criterion.

    Attributes:
    ----------
    rows
        One :class:`Candidate` for each program, by components, then by settings.
    criterion
        The name of the criterion that chose.
    best
        The chosen candidate; None where no fit ended well. Only fits that ended well are chosen:
        the others stand in the table with their status.
    missing
        The candidates that an interrupt kept from being fitted (or from being cross-validated).
    notes
        What a reader of the table should know.
    """

    rows: tuple[Candidate, ...]
    criterion: str
    best: Candidate | None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best_fit(self) -> Fit:
        """The fit of the best candidate.

        Raises:
        ------
        ModelError
            Where no fit ended well.
        """
        if self.best is None:
            ends = sorted({str(row.status) for row in self.rows})
            raise ModelError(
                "best_fit: expected at least one fit that ended well, but all"
                f" {len(self.rows)} ended as: {', '.join(ends)}."
            )
        return self.best.fit

    def to_dict(self) -> dict[str, Any]:
        """Plain values that can be written as JSON."""
        best = self.best
        return {
            "criterion": self.criterion,
            "best": None if best is None else self.rows.index(best),
            "rows": [row.to_dict() for row in self.rows],
            "missing": list(self.missing),
            "notes": list(self.notes),
        }

    def to_pandas(self) -> Any:
        """A data frame with a line for each candidate. Needs pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas.") from None
        lines = []
        for row in self.rows:
            line = row.to_dict()
            settings = line.pop("settings")
            lines.append({"components": line.pop("components"), **settings, **line})
        return pandas.DataFrame(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw the criterion against the components, a line for each of the settings."""
        from pyroem.plot import selection

        return selection(self, ax)

    def __str__(self) -> str:
        columns = list(dict.fromkeys(_column(row) for row in self.rows))
        if len(columns) > 1 and len(self.rows[0].settings) == 1:
            lines = [self._title(), "", *self._matrix(columns), "", *self._table(self._ranked())]
        else:
            lines = [self._title(), "", *self._table(self.rows)]
        lines += ["", *self._remarks()] if self._remarks() else []
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _title(self) -> str:
        better = "larger" if self.criterion == "cv" else "smaller"
        name = "held-out log-likelihood" if self.criterion == "cv" else self.criterion.upper()
        chosen = "none (no fit ended well)" if self.best is None else self.best.label
        return f"{name} ({better} is better); best: {chosen}"

    def _ranked(self) -> list[Candidate]:
        able = [row for row in self.rows if row.counts]
        return sorted(able, key=lambda row: cost(row, self.criterion))[:TOP]

    def _matrix(self, columns: Sequence[str]) -> list[str]:
        """Components down, settings across; ``*`` at the best, ``NA`` where a fit ended badly."""
        found = {(row.components, _column(row)): row for row in self.rows}
        sizes = sorted({row.components for row in self.rows})
        cells = {key: self._cell(row) for key, row in found.items()}
        width = max(len(text) for text in (*cells.values(), *columns)) + 1
        per_block = max(1, (WIDTH - 4) // width)
        lines = list[str]()
        for first in range(0, len(columns), per_block):
            part = columns[first : first + per_block]
            lines += [""] if lines else []
            lines.append("    " + "".join(c.rjust(width - 1) + " " for c in part).rstrip())
            for k in sizes:
                row = "".join(cells.get((k, c), " ").rjust(width) for c in part)
                lines.append(f"{k:<4d}{row}".rstrip())
        return lines

    def _cell(self, row: Candidate) -> str:
        value = getattr(row, self.criterion)
        if not row.counts or value is None or not math.isfinite(value):
            return "NA "
        return f"{value:.2f}" + ("*" if row is self.best else " ")

    def _table(self, rows: Sequence[Candidate]) -> list[str]:
        names = list(self.rows[0].settings) if self.rows else []
        criteria = [c for c in CRITERIA if c != "cv" or self.criterion == "cv"]
        table = [
            ["", "components", *names, "log_likelihood", "df", *criteria, "n_iter", "s", "status"]
        ]
        for row in rows:
            values = [getattr(row, c) for c in criteria]
            table.append(
                [
                    "*" if row is self.best else "",
                    str(row.components),
                    *(str(row.settings[n]) for n in names),
                    f"{row.log_likelihood:.3f}",
                    str(row.df),
                    *("-" if v is None else f"{v:.2f}" for v in values),
                    str(row.n_iter),
                    f"{row.seconds:.2f}",
                    str(row.status) + ("" if row.counts else " (not counted)"),
                ]
            )
        return aligned(table, {0, len(table[0]) - 1, *range(2, 2 + len(names))})

    def _remarks(self) -> list[str]:
        lines = []
        bad = [row for row in self.rows if not row.counts and row.label not in self.missing]
        if bad:
            named = "; ".join(f"{row.label}: {row.status}" for row in bad)
            lines.append(f"not counted: {named}")
        lowest = math.inf if self.best is None else cost(self.best, self.criterion)
        ahead = [
            row
            for row in bad
            if row.status is Status.MAX_ITER and cost(row, self.criterion) < lowest
        ]
        if ahead:
            named = "; ".join(row.label for row in ahead)
            lines.append(f"would be better, but ran out of iterations (raise max_iter): {named}")
        if self.missing:
            more = len(self.missing) - FEW
            named = "; ".join(self.missing[:FEW]) + (f"; and {more} more" if more > 0 else "")
            lines.append(f"interrupted; missing: {named}")
        return [*lines, *self.notes]


def _column(row: Candidate) -> str:
    return ", ".join(str(value) for value in row.settings.values())


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value)
