"""Estimators in a file: JSON that holds settings and fitted attributes, and runs nothing.

Numbers are written with all their digits, so what is loaded predicts the same to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT, VERSION = "pyroem.estimators", 1
KINDS = "biufUO"  # of arrays; those of objects hold numbers and strings


def write(path: str | Path, estimator: Any) -> None:
    """Write an estimator: its class, its settings, and its attributes that end in ``_``.

    Raises:
    ------
    ValueError
        For a setting or an attribute that is no number, string, array, list or dict of them.
    """
    values = {n: v for n, v in vars(estimator).items() if is_fitted_name(n)}
    settings = {n: encoded(n, v) for n, v in estimator.get_params(deep=False).items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "class": type(estimator).__name__,
        "settings": settings,
        "attributes": {n: encoded(n, v) for n, v in values.items()},
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: str | Path, classes: Mapping[str, type]) -> Any:
    """The estimator in a file, which must be of one of ``classes``.

    Raises:
    ------
    ValueError
        For a file that :func:`write` did not write, or that holds another class.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        header = content["format"], content["version"]
        name, settings, attributes = (content[k] for k in ("class", "settings", "attributes"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file that an estimator's save() wrote.") from error
    if header != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected {FORMAT}, version {VERSION}; got {header}.")
    if name not in classes:
        raise ValueError(f"{path}: expected one of {', '.join(classes)}; the file holds {name!r}.")
    wrong = [n for n in attributes if not is_fitted_name(n)]
    unknown = set(settings) - set(classes[name]().get_params(deep=False))
    if wrong or unknown:
        raise ValueError(f"{path}: {name} has no {sorted(unknown) + wrong}.")
    estimator = classes[name](**{n: decoded(v) for n, v in settings.items()})
    for attribute, value in attributes.items():
        setattr(estimator, attribute, decoded(value))
    return estimator


def is_fitted_name(name: str) -> bool:
    """Whether an attribute is one that a fit sets."""
    return name.isidentifier() and name.endswith("_") and not name.startswith("_")


def encoded(name: str, value: Any) -> Any:
    """A value as JSON; what JSON has no word for stands in a dict of one key."""
    if isinstance(value, np.generic):
        return encoded(name, value.item())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
        cells = [encoded(name, x) for x in value.ravel().tolist()]
        kind = value.dtype.str if value.dtype.kind != "O" else "O"
        return {"array": cells, "dtype": kind, "shape": list(value.shape)}
    if isinstance(value, list):
        return [encoded(name, x) for x in value]
    if isinstance(value, tuple):
        return {"tuple": [encoded(name, x) for x in value]}
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encoded(name, v) for k, v in value.items()}}
    raise ValueError(
        f"save: {name!r} cannot be written: expected numbers, strings, arrays, lists or dicts of"
        f" them; got {type(value).__name__}."
    )


def decoded(value: Any) -> Any:
    """The value that :func:`encoded` was given."""
    if isinstance(value, list):
        return [decoded(x) for x in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        kind, shape = str(value["dtype"]), value["shape"]
        if np.dtype(kind).kind not in KINDS:
            raise ValueError(f"load: expected an array of numbers or strings; got dtype {kind!r}.")
        array = np.empty(len(value["array"]), dtype=kind)
        array[:] = [decoded(x) for x in value["array"]]
        return array.reshape(shape)
    if "tuple" in value:
        return tuple(decoded(x) for x in value["tuple"])
    return {k: decoded(v) for k, v in value["dict"].items()}
