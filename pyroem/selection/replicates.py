"""Data sets like the observed one, drawn from a fit: where the observations stand in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyroem import sequences
from pyroem._pyro import isolated
from pyroem.errors import PyroemError, SettingError
from pyroem.fit import Fit
from pyroem.given import assignments
from pyroem.problem import Problem
from pyroem.structure import quoted

# By observation: the number of the tensor among the (nested) arguments, and the places of the
# observation's elements in the flat tensor.
Places = Mapping[str, tuple[int, Tensor]]


def places_of(problem: Problem, what: str = "likelihood_ratio_test") -> Places:
    """Where the observations of a program come from, for ``what``.

    Each tensor of the data is replaced by the numbers of its elements: an observation whose value
    then consists of such numbers is a part of that tensor. Of a chain it is the only tensor that
    has the shape of what is drawn.

    Raises:
    ------
    SettingError
        Where an observation is no part of one tensor (it is computed from the data, say), or two
        observations share elements.
    """
    structure = problem.structure
    if structure.imputed:
        raise SettingError(
            f"{what}: expected assignments that are unknown, got"
            f" {quoted(structure.imputed)} with some known values."
        )
    found = _of_chains(problem, what) if structure.chains else _of_rows(problem)
    lost = [name for name in structure.observations if name not in found]
    if structure.chains:
        lost = [name for name in lost if name not in structure.chained]
    if lost or not found:
        raise SettingError(
            f"{what}: expected every observation to be a part of one tensor of the"
            f" data, got {quoted(lost or structure.observations)}, which is computed, or whose"
            " tensor cannot be told."
        )
    for i in {i for i, _ in found.values()}:
        taken = torch.cat([index.reshape(-1) for j, index in found.values() if j == i])
        if len(taken.unique()) < len(taken):
            names = [name for name, (j, _) in found.items() if j == i]
            raise SettingError(
                f"{what}: expected observations that share no data, got"
                f" {quoted(names)} of one tensor's elements."
            )
    return found


def _of_rows(problem: Problem) -> Places:
    structure = problem.structure
    program = structure.program
    leaves, spec = tree_flatten((program.args, program.kwargs))
    params = {name: p.value for name, p in structure.parameters.items()}
    found = {}
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.numel() or leaf.dtype == torch.bool:
            continue
        numbers = torch.arange(1, leaf.numel() + 1).to(leaf.dtype).reshape(leaf.shape)
        args, kwargs = tree_unflatten([*leaves[:i], numbers, *leaves[i + 1 :]], spec)
        tagged = replace(program, args=args, kwargs=kwargs, fill={}, missing={})
        try:
            with isolated(program.dtype, 0), torch.no_grad():
                nodes = tagged.run(params).nodes
        except (PyroemError, RuntimeError, ValueError, IndexError):
            continue  # numbers of elements are no covariates that the program can work with
        for name in structure.observations:
            index = torch.as_tensor(nodes[name]["value"]).to(torch.float64) - 1
            whole = (index == index.round()) & (index >= 0) & (index < leaf.numel())
            if index.numel() and bool(whole.all()) and len(index.unique()) == index.numel():
                found[name] = (i, index.long())
    return found


def _of_chains(problem: Problem, what: str) -> Places:
    structure = problem.structure
    program = structure.program
    leaves = tree_flatten((program.args, program.kwargs))[0]
    params = {name: p.value for name, p in structure.parameters.items()}
    with isolated(program.dtype, 0), torch.no_grad():
        drawn = sequences.draw(structure, params)
    found = {}
    for name in drawn.keys() - assignments(structure).keys():
        like = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.shape == drawn[name].shape
        ]
        if len(like) != 1:
            raise SettingError(
                f"{what}: expected one tensor of shape {tuple(drawn[name].shape)}"
                f" that holds the observations '{name}', got {len(like)}."
            )
        found[name] = (like[0], torch.arange(drawn[name].numel()).reshape(drawn[name].shape))
    return found


def replicate(fit: Fit, places: Places, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the program, with observations drawn from the fit.

    What is missing (NaN) in the data is missing in the drawn data, too.
    """
    program = fit.problem.structure.program
    leaves, spec = tree_flatten((program.args, program.kwargs))
    drawn = fit.sample(seed=seed)
    for name, (i, index) in places.items():
        flat = leaves[i].clone().reshape(-1)
        own, at = drawn[name].expand(index.shape).reshape(-1).to(flat.dtype), index.reshape(-1)
        keep = flat[at].isnan() | own.isnan() if flat.is_floating_point() else torch.zeros(())
        flat[at] = torch.where(keep.bool(), flat[at], own)
        leaves[i] = flat.reshape(leaves[i].shape)
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs
