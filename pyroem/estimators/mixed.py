"""Mixtures for columns of different kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyroem.estimators import densities
from pyroem.estimators.base import Params
from pyroem.estimators.increments import Increments
from pyroem.models.assignments import Program
from pyroem.models.mixed import KINDS, mixed_mixture


class MixedMixture(Increments):
    """A mixture for columns of different kinds, independent given the component.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ the distribution of kinds[j]

    for ``X (n_samples, n_features)`` of numbers; NaN is a missing value.

    Parameters
    ----------
    kinds
        For each column ``"gaussian"``, ``"poisson"``, ``"bernoulli"``, or a number C of categories,
        whose values are 0, ..., C - 1. One such word stands for all columns. ``"auto"`` is for data
        frames, whose types say it: floats are gaussian, booleans bernoulli, pandas' categories
        (numbers from 0) categories; whole numbers could be anything and are refused. Of a data
        frame the kinds may also be a dict by column.
    {settings}

    Attributes:
    ----------
    weights_
        ``(n_components,)``.
    kinds_
        The kind of each column.
    tables_
        For each column its parameters, one row for each component: mean and standard deviation,
        rate, probability, or the probabilities of the categories.
    {attributes}
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        kinds: Any = "gaussian",
        solver: str = "em",
        init: Any = "auto",
        tol: float = 1e-8,
        max_iter: int = 1000,
        n_init: int = 1,
        fixed: Any = (),
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            n_components,
            solver=solver,
            init=init,
            tol=tol,
            max_iter=max_iter,
            n_init=n_init,
            fixed=fixed,
            random_state=random_state,
            warm_start=warm_start,
            verbose=verbose,
        )
        self.kinds = kinds

    def _read(self, X: Any, reset: bool = False) -> NDArray:
        types = getattr(X, "dtypes", None)
        try:
            values = super()._read(X, reset)
        except ValueError as error:
            text = text_columns(X)
            if not text:
                raise
            raise ValueError(
                f"X: expected numbers; columns {text} hold text. Give codes 0, 1, ..., such as"
                " X[column].astype('category').cat.codes."
            ) from error
        if reset:
            self.kinds_ = self._kinds(values.shape[1], types)
        for j, kind in enumerate(self.kinds_):
            check_column(values[:, j], kind, j)
        return values

    def _kinds(self, columns: int, types: Any) -> list[Any]:
        kinds = self.kinds
        if isinstance(kinds, str) and kinds == "auto":
            if types is None:
                raise ValueError(
                    "kinds='auto': expected a data frame; give a kind for each column."
                )
            return [kind_of(dtype, name) for name, dtype in dict(types).items()]
        if isinstance(kinds, Mapping):
            names = list(getattr(self, "feature_names_in_", []))
            if set(names) != set(kinds):
                raise ValueError(
                    f"kinds: expected a kind for each of the columns {names}; got some for"
                    f" {list(kinds)}."
                )
            kinds = [kinds[name] for name in names]
        one = isinstance(kinds, str | int | np.integer)
        found = [kinds] * columns if one else list(kinds)
        if len(found) != columns:
            raise ValueError(f"kinds: expected one for each column, {columns}; got {len(found)}.")
        for kind in found:
            if kind not in KINDS and (isinstance(kind, str | bool) or not kind >= 1):
                raise ValueError(
                    f"kinds: expected {', '.join(KINDS)} or a number of categories; got {kind!r}."
                )
        return [kind if isinstance(kind, str) else int(kind) for kind in found]

    def _make_program(self) -> Program:
        return mixed_mixture(int(self.n_components), self.kinds_)

    def _columns(self) -> dict[Any, list[int]]:
        """The columns of each kind, as the program has them."""
        found: dict[Any, list[int]] = {}
        for j, kind in enumerate(self.kinds_):
            found.setdefault(kind, []).append(j)
        return found

    def _sites(self) -> dict[str, list[int]]:
        found = self._columns()
        return {k if isinstance(k, str) else f"categorical_{k}": own for k, own in found.items()}

    def _take(self, params: Params, dtype: Any) -> None:
        self.weights_ = params["weights"].astype(dtype)
        tables: list[Any] = [None] * len(self.kinds_)
        for kind, columns in self._columns().items():
            for i, j in enumerate(columns):
                if kind == "gaussian":
                    table = np.stack([params["loc"][:, i], params["scale"][:, i]], 1)
                elif isinstance(kind, str):
                    table = params["rate" if kind == "poisson" else "probs"][:, i, None]
                else:
                    table = params[f"probs_{kind}"][:, i]
                tables[j] = np.ascontiguousarray(table.astype(dtype))
        self.tables_ = tables

    def _give(self) -> Params:
        weights = self.weights_.astype(np.float64)
        found = {"weights": weights / weights.sum()}
        for kind, columns in self._columns().items():
            table = np.stack([self.tables_[j] for j in columns], 1).astype(np.float64)
            if kind == "gaussian":
                found["loc"], found["scale"] = table[..., 0], table[..., 1]
            elif isinstance(kind, str):
                found["rate" if kind == "poisson" else "probs"] = table[..., 0]
            else:
                found[f"probs_{kind}"] = table / table.sum(-1, keepdims=True)
        return {n: np.ascontiguousarray(v) for n, v in found.items()}

    def _log_density(self, X: NDArray) -> NDArray:
        total = np.zeros((len(X), len(self.weights_)))
        for kind, columns in self._columns().items():
            own, tables = X[:, columns], [self.tables_[j] for j in columns]
            if kind == "gaussian":
                loc, scale = (np.stack([t[:, i] for t in tables], 1) for i in (0, 1))
                total += densities.gaussian(own, loc, 1 / scale, "diag")
            elif isinstance(kind, str):
                density = densities.poisson if kind == "poisson" else densities.bernoulli
                total += density(own, np.concatenate(tables, 1))
            else:
                total += densities.categorical(own, tables)
        return total

    def _draw(self, rng: np.random.RandomState, k: int, n: int) -> NDArray:
        columns = []
        for kind, table in zip(self.kinds_, self.tables_, strict=True):
            own = table[k].astype(np.float64)
            if kind == "gaussian":
                columns.append(rng.normal(own[0], own[1], n))
            elif kind == "poisson":
                columns.append(rng.poisson(own[0], n).astype(np.float64))
            elif kind == "bernoulli":
                columns.append((rng.uniform(size=n) < own[0]).astype(np.float64))
            else:
                share = own / own.sum()
                columns.append(rng.choice(len(own), size=n, p=share).astype(np.float64))
        return np.stack(columns, 1)


def text_columns(X: Any) -> list[Any]:
    """The columns of a data frame whose cells, or whose categories, are text."""
    found = []
    for name, dtype in dict(getattr(X, "dtypes", {})).items():
        own = getattr(getattr(dtype, "categories", None), "dtype", dtype)
        if getattr(own, "kind", "O") not in "biuf":
            found.append(name)
    return found


def kind_of(dtype: Any, name: Any) -> str | int:
    """The kind that the type of a data frame's column says."""
    if getattr(dtype, "categories", None) is not None:
        return len(dtype.categories)
    kind = getattr(dtype, "kind", "")
    if kind in "fb" and kind:
        return "gaussian" if kind == "f" else "bernoulli"
    raise ValueError(
        f"kinds='auto': column {name!r} has type {dtype}, which may be counts, categories or"
        " measurements. Give a kind for each column."
    )


def check_column(column: NDArray, kind: str | int, j: int) -> None:
    """Raise ``ValueError`` where a column holds what its kind cannot."""
    seen = column[~np.isnan(column)]
    if kind == "gaussian":
        return
    limits: Sequence[float] = (0, np.inf) if kind == "poisson" else (0, 1)
    limits = limits if isinstance(kind, str) else (0, kind - 1)
    wrong = seen[(seen != np.floor(seen)) | (seen < limits[0]) | (seen > limits[1])]
    if len(wrong):
        wanted = "counts" if kind == "poisson" else f"whole numbers from 0 to {limits[1]}"
        raise ValueError(f"X: column {j} is {kind!r}: expected {wanted}; got {wrong[0]}.")
