"""The objective as a function that can be differentiated to any order, and its coordinates.

Everything here runs on the enumerated trace of the whole program, whatever engine fitted it, so
that it is also a check of that engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to

from pyroem._pyro import Enumerated, isolated
from pyroem.errors import ModelError
from pyroem.estep.chain import Potentials, alone, join, sequence_weights
from pyroem.estep.decode import by_unit, log_likelihoods_outside
from pyroem.problem import Problem
from pyroem.semiring.logsum import logsumexp
from pyroem.structure import Parameter, Params, Structure
from pyroem.text import label

IMPOSSIBLE = -1e100  # in place of the logarithm of zero, whose differences would be NaN


@dataclass(frozen=True)
class Coordinates:
    """The free parameters as one vector ``u`` of unconstrained numbers.

    Where Pyro has a bijection (of a simplex: K - 1 numbers) it is taken, else ``transform_to``;
    directions of ``u`` along which no parameter moves are told by the Jacobian.
    """

    parameters: Mapping[str, Parameter]
    names: tuple[str, ...]
    values: Params

    @cached_property
    def _transforms(self) -> dict[str, Any]:
        found = {}
        for name in self.names:
            parameter = self.parameters[name]
            found[name] = transform_to(parameter.constraint)
            if parameter.held is None:
                with contextlib.suppress(NotImplementedError):
                    found[name] = biject_to(parameter.constraint)
        return found

    @cached_property
    def _parts(self) -> dict[str, Tensor]:
        raw = {n: self._transforms[n].inv(self.values[n].detach()) for n in self.names}
        return {
            n: torch.nan_to_num(v, nan=0.0, posinf=690.0, neginf=-690.0) for n, v in raw.items()
        }

    @cached_property
    def widths(self) -> dict[str, int]:
        """The number of coordinates of each parameter."""
        return {name: self._parts[name].numel() for name in self.names}

    @cached_property
    def vector(self) -> Tensor:
        """Where the values stand."""
        if not self.names:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([self._parts[n].reshape(-1) for n in self.names])

    def params(self, vector: Tensor) -> Params:
        """All parameters; those that are not free as they are."""
        result, at = dict(self.values), 0
        for name in self.names:
            raw = self._parts[name]
            part = vector[at : at + raw.numel()].reshape(raw.shape)
            at += raw.numel()
            value = self._transforms[name](part)
            parameter = self.parameters[name]
            result[name] = value if parameter.held is None else parameter.keep(value)
        return result

    def flat(self, params: Mapping[str, Tensor]) -> Tensor:
        """The elements of the free parameters in the constrained space, as one vector."""
        if not self.names:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([params[n].reshape(-1) for n in self.names])

    @cached_property
    def jacobian(self) -> Tensor:
        """``d flat(params) / d u``: elements by coordinates."""
        return torch.autograd.functional.jacobian(
            lambda u: self.flat(self.params(u)), self.vector, vectorize=False
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """A name for each element: ``loc[0, 1]``; that of a single number is the parameter's."""
        found: list[str] = []
        for name in self.names:
            found += [label(name, i) for i in product(*map(range, self.values[name].shape))]
        return tuple(found)


def coordinates(problem: Problem, params: Params) -> Coordinates:
    """Of the free parameters of a problem at ``params``."""
    return Coordinates(problem.structure.parameters, tuple(problem.free), params)


def check_in_memory(problem: Problem, what: str) -> None:
    """Raise where the data is not all here."""
    if problem.everywhere is not None:
        raise ModelError(f"{what}: the rows are spread over processes, which is not supported.")
    if problem.streamed:
        raise ModelError(f"{what}: data in blocks is not supported; give the rows in memory.")


def run(structure: Structure, params: Params) -> Enumerated:
    """The enumerated trace of the whole program."""
    with isolated(structure.program.dtype, 0):
        return structure.enumerate(params)


def log_joint(structure: Structure, params: Params, weights: Tensor | None) -> Tensor:
    """``log p(data | params) + log p(params)`` under row weights."""
    found = run(structure, params)
    total = log_likelihood(structure, found, found.tensors(), weights)
    return total + structure.log_prior(found)


def log_likelihood(
    structure: Structure,
    found: Enumerated,
    tensors: Mapping[str, Tensor],
    weights: Tensor | None = None,
) -> Tensor:
    """``log p(data)`` from the factors under row weights: differentiable to any order."""
    if not structure.chains:
        return found.log_likelihood(tensors, weights=weights, unit=structure.unit)
    total = torch.zeros((), dtype=structure.program.dtype)
    for own in join(structure, found, tensors):
        counted = sequence_weights(structure, own.chain, own.shape, weights)
        total = total + (forward(own).reshape(-1) * counted).sum()
    for name in found.factors:
        if name not in structure.chained:
            total = total + alone(found, structure, name, tensors[name], weights)[1]
    return total * found.scale


def by_rows(problem: Problem, found: Enumerated) -> Tensor | None:
    """The log-likelihood of each row; None where the rows are not independent."""
    structure, depends = problem.structure, problem.plan.reading.dependence
    outside = [n for n, plates in structure.plates.items() if set(structure.unit) - set(plates)]
    if any(depends.get(n) for n in outside) or not structure.unit:
        return None
    if not structure.chains:
        rows, independent = found.row_log_likelihood(found.tensors(), structure.unit)
        return rows.expand(structure.unit_shape) if independent else None
    if not all(set(structure.unit) <= set(chain.plates) for chain in structure.chains):
        return None
    total = torch.zeros((1,) * len(structure.unit), dtype=structure.program.dtype)
    for own in join(structure, found, found.tensors()):
        total = total + by_unit(structure, own.chain, forward(own))
    if not structure.factor_sites <= structure.chained:
        total = total + log_likelihoods_outside(structure, found)
    return (total * found.scale).expand(structure.unit_shape)


def forward(own: Potentials) -> Tensor:
    """The log-likelihood of each of a chain's sequences: differentiable to any order.

    The steps' matrices are multiplied pair by pair, so that the depth of the graph grows with the
    logarithm of the length: memory of order T K^3.
    """
    k, steps = own.chain.num_states, own.chain.length - 1
    start = own.start.expand((*own.shape, k)).clamp(min=IMPOSSIBLE)
    emit = own.emit.expand((steps, *own.shape, k)).unsqueeze(-2)
    product = (own.pair + emit).expand((steps, *own.shape, k, k)).clamp(min=IMPOSSIBLE)
    while len(product) > 1:
        even = len(product) // 2 * 2
        left, right = product[0:even:2], product[1:even:2]
        joined = logsumexp(left.unsqueeze(-1) + right.unsqueeze(-3), (left.dim() - 1,))
        product = torch.cat([joined, product[even:]])
    last = start.unsqueeze(-1) + product[0] if steps else start.unsqueeze(-1)
    return torch.logsumexp(last.flatten(-2), -1)
