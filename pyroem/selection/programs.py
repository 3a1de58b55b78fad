"""The programs of a selection: what a factory makes of components and settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pyroem._pyro import as_data
from pyroem.blocks import is_source
from pyroem.errors import PyroemError, SettingError
from pyroem.interrupt import pause_point
from pyroem.problem import Problem
from pyroem.selection.candidates import label_of
from pyroem.solver import Solver


@dataclass(frozen=True, eq=False)
class Posed:
    """A program of the grid with its data, read and planned."""

    components: int
    settings: Mapping[str, Any]
    model: Callable[..., Any]
    problem: Problem

    @property
    def label(self) -> str:
        """The components and the settings, in words."""
        return label_of(self.components, self.settings)


def check_components(components: Any) -> tuple[int, ...]:
    """The numbers of components in order, each once."""
    wanted = "components: expected one positive integer or more"
    if isinstance(components, int) and not isinstance(components, bool):
        components = (components,)
    if isinstance(components, str) or not isinstance(components, Iterable):
        raise SettingError(f"{wanted}, got {components!r}.")
    found = list(components)
    if not found or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in found):
        raise SettingError(f"{wanted}, got {found!r}.")
    return tuple(sorted(set(found)))


def check_grid(covariance: Any, grid: Any) -> dict[str, tuple[Any, ...]]:
    """The settings by keyword, each a tuple of values to try."""
    if grid is not None and not isinstance(grid, Mapping):
        raise SettingError(
            f"grid: expected a dict of keywords to lists of settings, got {type(grid).__name__}."
        )
    lists = {} if covariance is None else {"covariance": covariance}
    for name, values in (grid or {}).items():
        if name in lists or name == "components":
            raise SettingError(f"grid: '{name}' is an argument of its own; leave it out of grid.")
        lists[name] = values
    for name, values in lists.items():
        where = name if name == "covariance" else f"grid: '{name}'"
        if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
            raise SettingError(f"{where}: expected a list of settings, got {values!r}.")
    found = {name: tuple(values) for name, values in lists.items()}
    for name, chosen in found.items():
        where = name if name == "covariance" else f"grid: '{name}'"
        if not chosen:
            raise SettingError(f"{where}: expected at least one setting, got none.")
        repeated = [v for i, v in enumerate(chosen) if v in chosen[:i]]
        if repeated:
            raise SettingError(f"{where}: expected each setting once, got {repeated[0]!r} twice.")
    return found


def make_program(
    model_factory: Any, components: int, settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """The program that the factory makes.

    Raises:
    ------
    SettingError
        Where it cannot be called with these arguments, refuses them, or gives no program.
    """
    if not callable(model_factory):
        raise SettingError(
            "model_factory: expected a function of the number of components that returns a"
            f" program, got {type(model_factory).__name__}."
        )
    label = label_of(components, settings)
    try:
        inspect.signature(model_factory).bind(components, **settings)
    except TypeError as error:
        wanted = ", ".join(["components", *(f"{name}=..." for name in settings)])
        raise SettingError(
            f"model_factory: expected a function that can be called as f({wanted}): {error}."
        ) from error
    try:
        model = model_factory(components, **settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingError(
            f"model_factory refuses {label}: {error} (If it is a program itself, give the function"
            " that makes it: gaussian_mixture, not gaussian_mixture(2).)"
        ) from error
    if not callable(model):
        raise SettingError(
            f"model_factory: expected a program (a function of the data) for {label}, got"
            f" {type(model).__name__}."
        )
    program: Callable[..., Any] = model
    return program


def pose_all(
    model_factory: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    components: Iterable[int],
    grid: Mapping[str, tuple[Any, ...]],
    solver: Solver,
    weights: Any,
) -> list[Posed]:
    """Every program of the grid, read with its data: by components, then by settings."""
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    wanted = [(k, s, make_program(model_factory, k, s)) for k in components for s in settings]
    posed = []
    for k, chosen, model in wanted:
        pause_point()
        try:
            problem = solver.pose(model, args, kwargs, weights)
            solver.check(problem)
        except PyroemError as error:
            raise type(error)(f"{label_of(k, chosen)}: {error}") from error
        posed.append(Posed(k, chosen, model, problem))
    return posed


def cast_once(args: tuple[Any, ...], kwargs: Mapping[str, Any], solver: Solver) -> Any:
    """The data as the programs get it, so that they share one copy."""
    if args and is_source(args[0]):
        return args, dict(kwargs)
    return as_data(args, solver.dtype), as_data(dict(kwargs), solver.dtype)


def check_common(solver: Any, restarts: Any, seed: Any) -> None:
    """Raise where a setting of the fits is none."""
    if not isinstance(solver, Solver):
        raise SettingError(
            f"solver: expected a solver such as EM() or MAP(), got {type(solver).__name__}."
        )
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 1:
        raise SettingError(f"restarts: expected a positive integer, got {restarts!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SettingError(f"seed: expected an integer from 0 to 2**32 - 1, got {seed!r}.")
