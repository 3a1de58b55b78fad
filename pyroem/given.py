"""Guesses of assignments that the user gives to start from: state numbers, or probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroem.clustering import rows_shape
from pyroem.errors import SettingError
from pyroem.estep import decode
from pyroem.estep.engine import MixtureEngine
from pyroem.guesses import Evidence, from_evidence, pooled_point
from pyroem.problem import Problem
from pyroem.sequences import public_names
from pyroem.structure import Params, Structure


def assignments(structure: Structure) -> dict[str, int]:
    """The assignments that a start can be given for, by their public names, and their states."""
    own = dict(structure.assignments)
    names = public_names(structure)
    for chain in structure.chains:
        for first, later in decode.partners(chain):
            own[names[first]] = own.pop(first)
            own.pop(later)
    return own


def around(
    problem: Problem, params: Params, given: Mapping[str, Any], rest: frozenset[str]
) -> Params:
    """One M-step of the parameters ``rest`` under the guessed assignments, from ``params``.

    Raises:
    ------
    SettingError
        For values that are no states or probabilities of the rows.
    """
    engine = problem.engine
    if problem.streamed or (problem.smaller is not None and not isinstance(engine, MixtureEngine)):
        raise SettingError(
            "init: assignments can be given for rows in memory only, in one process; give values"
            " of parameters instead."
        )
    evidence: Evidence = {}
    for name, value in given.items():
        evidence.update(_evidence(problem, name, value))
    pooled = pooled_point(problem, params, rest)
    return problem.clip(from_evidence(problem, pooled, evidence, None, rest))


def _evidence(problem: Problem, name: str, value: Any) -> Evidence:
    structure = problem.structure
    names = public_names(structure)
    for chain in structure.chains:
        for first, later in decode.partners(chain):
            if names[first] == name:
                shape = (*rows_shape(problem, first), chain.length)
                states = structure.assignments[first]
                found = _probabilities(name, value, shape, states, structure)
                by_step = found.movedim(len(chain.plates), 0)
                return {first: by_step[0], later: by_step[1:]}
    # A problem that was read on a sample has one plate, of all rows.
    shape = rows_shape(problem, name) if problem.smaller is None else structure.unit_shape
    return {name: _probabilities(name, value, shape, structure.assignments[name], structure)}


def _probabilities(
    name: str, value: Any, shape: tuple[int, ...], states: int, structure: Structure
) -> Tensor:
    """State numbers as certainties; probabilities, normalised."""
    dtype = structure.program.dtype
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"init: '{name}': expected a tensor, got {value!r:.80}.") from error
    wanted = f"states from 0 to {states - 1} of shape {shape}, or probabilities of shape"
    wanted += f" {(*shape, states)}"
    if tuple(found.shape) == shape and not found.is_floating_point():
        if bool(((found < 0) | (found >= states)).any()):
            raise SettingError(
                f"init: '{name}': expected {wanted}, got {int(found.min())} to {int(found.max())}."
            )
        return torch.nn.functional.one_hot(found.long(), states).to(dtype)
    if tuple(found.shape) != (*shape, states) or not found.is_floating_point():
        raise SettingError(
            f"init: '{name}': expected {wanted}, got {found.dtype} of shape {tuple(found.shape)}."
        )
    found = found.to(dtype)
    total = found.sum(-1, keepdim=True)
    if not bool((found >= 0).all()) or not bool((total > 0).all() & total.isfinite().all()):
        raise SettingError(
            f"init: '{name}': expected probabilities (numbers that are not negative), got"
            f" {float(found.min()):g} to {float(found.max()):g}."
        )
    return found / total
