"""The families of components: their estimators, and how their parameters are shown."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from pyroem.cli.failures import UsageError
from pyroem.cli.tables import Table
from pyroem.models.gaussian import COVARIANCES, NAMED

GAUSSIAN = tuple(dict.fromkeys((*NAMED, "diag", *COVARIANCES)))
SIMPLE = ("full", "tied", "diag", "diagonal", "spherical")
WITH_COVARIANCE = {"gaussian": GAUSSIAN, "student-t": SIMPLE}
WITH_PRIOR = ("gaussian", "poisson", "bernoulli", "categorical")
PRIOR_COVARIANCES = (*SIMPLE, "VVV", "EEE", "VVI", "VII")

Lines = list[tuple[str, list[str]]]


def check_estimators(command: str) -> None:
    """Raise a `UsageError` where scikit-learn lacks."""
    if find_spec("sklearn") is None:
        raise UsageError(
            f"pyroem {command} needs scikit-learn: pip install 'pyroem[sklearn]'"
            " (pyroem compare works without)"
        )


def check_family(options: Namespace) -> None:
    """Raise a `UsageError` where an option does not suit the family."""
    family, needed = options.family, {"regression": ("response", "response_family")}
    for name in ("response", "response_family", "kinds"):
        given = getattr(options, name, None)
        owner = "mixed" if name == "kinds" else "regression"
        if given and family != owner:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option}: expected with family {owner} only; got family {family}")
    if family in needed and options.response is None:
        raise UsageError("--response: family regression needs the column that it explains")
    if getattr(options, "prior", None) is not None and family not in WITH_PRIOR:
        raise UsageError(
            f"--prior: expected with the families {', '.join(WITH_PRIOR)}; got family {family}"
        )


def check_covariance(family: str, covariance: str | None, prior: str | None = None) -> None:
    """Raise a `UsageError` where a family has no such covariance."""
    if covariance is None:
        return
    if family not in WITH_COVARIANCE:
        known = " and ".join(WITH_COVARIANCE)
        raise UsageError(f"--covariance: expected with families {known}; got family {family}")
    if covariance not in (able := WITH_COVARIANCE[family]):
        raise UsageError(
            f"--covariance: family {family} expects one of {', '.join(able)}; got {covariance!r}"
        )
    if prior is not None and covariance not in PRIOR_COVARIANCES:
        raise UsageError(
            f"--prior: expected with a covariance of {', '.join(SIMPLE)}; got {covariance!r}"
        )


def make(options: Namespace, components: int, covariance: str | None, table: Table) -> Any:
    """The estimator of a request, unfitted."""
    from pyroem import estimators

    own: dict[str, Any] = {
        "n_components": components,
        "tol": options.tol,
        "max_iter": options.max_iter,
        "n_init": options.restarts,
        "random_state": options.seed,
        "solver": getattr(options, "solver", "em"),
    }
    if options.family in WITH_PRIOR:
        own["prior"] = getattr(options, "prior", None)
    if options.family == "gaussian":
        # Nothing is added to variances: the maximum is that of the program, as in compare.
        return estimators.GaussianMixture(
            covariance_type=covariance or "full", reg_covar=0.0, **own
        )
    if options.family == "student-t":
        name = "diag" if covariance == "diagonal" else covariance or "full"
        return estimators.StudentTMixture(covariance_type=name, **own)
    if options.family == "poisson":
        return estimators.PoissonMixture(**own)
    if options.family == "bernoulli":
        return estimators.BernoulliMixture(binarize=None, **own)
    if options.family == "categorical":
        return estimators.LatentClass(**own)
    if options.family == "mixed":
        return estimators.MixedMixture(kinds=list(table.kinds), **own)
    return estimators.MixtureOfRegressions(family=options.response_family or "gaussian", **own)


def component_lines(model: Any, columns: Sequence[str]) -> Lines:
    """What a fitted model says of its components: a title and a value for each component."""
    lines = [("weight", [f"{w:.4f}" for w in model.weights_])]
    return lines + _LINES[type(model).__name__](model, columns)


def component_values(model: Any, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The same in numbers, a dict for each component."""
    found: list[dict[str, Any]] = []
    for k, weight in enumerate(model.weights_):
        own = _VALUES[type(model).__name__](model, k, columns)
        found.append({"component": k + 1, "weight": weight, **own})
    return found


def covariances(model: Any) -> Any:
    """The covariances (of a Student t mixture: squared scales) of all components ``[K, D, D]``."""
    t = type(model).__name__ == "StudentTMixture"
    stored = model.scales_ if t else model.covariances_
    K, D = (model.locations_ if t else model.means_).shape
    one = np.eye(D)
    if stored.shape == (K,) and _form(model) == "spherical":
        return stored[:, None, None] * one
    if _form(model) == "diag":
        return stored[:, :, None] * one
    return np.broadcast_to(stored, (K, D, D))


def _form(model: Any) -> str:
    from pyroem.estimators.shapes import Shape

    return Shape(model.covariance_type, False).form


def category_name(category: Any) -> str:
    """A category as the user wrote it: whole numbers without a point."""
    return f"{category:g}" if isinstance(category, float | np.floating) else str(category)


def _numbers(values: Any) -> list[str]:
    return [f"{value:.6g}" for value in values]


def _by_column(columns: Sequence[str], **tables: Any) -> Lines:
    """For each column one line for each of its parameters, tables of components by columns."""
    return [
        (f"{column}, {name}", _numbers(table[:, j]))
        for j, column in enumerate(columns)
        for name, table in tables.items()
    ]


def _sds(model: Any) -> Any:
    return np.sqrt(np.diagonal(covariances(model), axis1=-2, axis2=-1))


def _gaussian(model: Any, columns: Sequence[str]) -> Lines:
    return _by_column(columns, mean=model.means_, sd=_sds(model))


def _student_t(model: Any, columns: Sequence[str]) -> Lines:
    lines = [("degrees of freedom", _numbers(model.df_))]
    return lines + _by_column(columns, location=model.locations_, scale=_sds(model))


def _poisson(model: Any, columns: Sequence[str]) -> Lines:
    return _by_column(columns, rate=model.rates_)


def _bernoulli(model: Any, columns: Sequence[str]) -> Lines:
    return [(f"{column} = 1", _shares(model.probs_[:, j])) for j, column in enumerate(columns)]


def _shares(values: Any) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _categories(column: str, categories: Any, table: Any) -> Lines:
    return [
        (f"{column} = {category_name(category)}", _shares(table[:, c]))
        for c, category in enumerate(categories)
    ]


def _categorical(model: Any, columns: Sequence[str]) -> Lines:
    triples = zip(columns, model.categories_, model.probs_, strict=True)
    return [line for triple in triples for line in _categories(*triple)]


def _mixed(model: Any, columns: Sequence[str]) -> Lines:
    lines: Lines = []
    own = zip(columns, model.kinds_, model.tables_, code_names(model), strict=True)
    for column, kind, table, categories in own:
        if kind == "gaussian":
            lines += _by_column([column], mean=table[:, :1], sd=table[:, 1:])
        elif kind == "poisson":
            lines += _by_column([column], rate=table)
        elif kind == "bernoulli":
            lines.append((f"{column} = 1", _shares(table[:, 0])))
        else:
            lines += _categories(column, categories, table)
    return lines


def code_names(model: Any) -> list[Any]:
    """For each column of a mixed model what its codes stand for; None for numbers."""
    given = getattr(model, "categories_", [None] * len(model.kinds_))
    return [
        list(map(float, range(kind))) if isinstance(kind, int) and own is None else own
        for kind, own in zip(model.kinds_, given, strict=True)
    ]


def _regression(model: Any, columns: Sequence[str]) -> Lines:
    lines = [("intercept", _numbers(model.intercept_))]
    lines += [(f"times {c}", _numbers(model.coef_[:, j])) for j, c in enumerate(columns)]
    return lines + ([("sd", _numbers(model.scale_))] if model.family == "gaussian" else [])


def _of_columns(columns: Sequence[str], values: Any) -> dict[str, Any]:
    return dict(zip(columns, values, strict=True))


def _gaussian_values(model: Any, k: int, columns: Sequence[str]) -> dict[str, Any]:
    return {
        "mean": _of_columns(columns, model.means_[k]),
        "sd": _of_columns(columns, _sds(model)[k]),
        "covariance": covariances(model)[k],
    }


def _student_t_values(model: Any, k: int, columns: Sequence[str]) -> dict[str, Any]:
    return {
        "df": model.df_[k],
        "location": _of_columns(columns, model.locations_[k]),
        "scale": _of_columns(columns, _sds(model)[k]),
        "squared_scale": covariances(model)[k],
    }


def _mixed_values(model: Any, k: int, columns: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = zip(columns, model.kinds_, model.tables_, code_names(model), strict=True)
    for column, kind, table, categories in own:
        if kind == "gaussian":
            found[column] = {"mean": table[k, 0], "sd": table[k, 1]}
        elif isinstance(kind, str):
            found[column] = {"rate" if kind == "poisson" else "probability": table[k, 0]}
        else:
            found[column] = _of_columns([category_name(c) for c in categories], table[k])
    return {"columns": found}


def _categorical_values(model: Any, k: int, columns: Sequence[str]) -> dict[str, Any]:
    names = [[category_name(c) for c in own] for own in model.categories_]
    tables = zip(names, model.probs_, strict=True)
    return {"probabilities": _of_columns(columns, [_of_columns(n, t[k]) for n, t in tables])}


def _regression_values(model: Any, k: int, columns: Sequence[str]) -> dict[str, Any]:
    scale = {"sd": model.scale_[k]} if model.family == "gaussian" else {}
    own = {"intercept": model.intercept_[k], "coefficients": _of_columns(columns, model.coef_[k])}
    return {**own, **scale}


_LINES: dict[str, Any] = {
    "GaussianMixture": _gaussian,
    "StudentTMixture": _student_t,
    "PoissonMixture": _poisson,
    "BernoulliMixture": _bernoulli,
    "LatentClass": _categorical,
    "MixedMixture": _mixed,
    "MixtureOfRegressions": _regression,
}
_VALUES: dict[str, Any] = {
    "GaussianMixture": _gaussian_values,
    "StudentTMixture": _student_t_values,
    "PoissonMixture": lambda m, k, c: {"rate": _of_columns(c, m.rates_[k])},
    "BernoulliMixture": lambda m, k, c: {"probability": _of_columns(c, m.probs_[k])},
    "LatentClass": _categorical_values,
    "MixedMixture": _mixed_values,
    "MixtureOfRegressions": _regression_values,
}
