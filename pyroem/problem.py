"""A problem: a program with its data, read and planned. What every solver is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroem.errors import DataError, SettingError
from pyroem.estep.trace import expectation
from pyroem.mstep.plan import Plan, Rung, make_plan
from pyroem.mstep.scales import variance_floors
from pyroem.mstep.update import THOROUGH, Expected, m_step
from pyroem.reading import read
from pyroem.structure import Params, Structure
from pyroem.symmetry import StateGroup, state_groups


@dataclass(frozen=True)
class Problem:
    """Everything that a solver needs: structure, plan, row weights, variance floors, states."""

    structure: Structure
    plan: Plan
    row_weights: Tensor | None
    floors: dict[str, Tensor]
    floor: float
    groups: tuple[StateGroup, ...]

    @property
    def rows(self) -> float:
        """The number of rows, weighted."""
        if self.row_weights is None:
            return float(self.structure.num_rows)
        return max(float(self.row_weights.sum()), 1e-300)

    @property
    def free(self) -> list[str]:
        """The parameters that are not fixed."""
        return [b.name for b in self.plan.blocks.values() if b.rung is not Rung.FIXED]

    def e_step(
        self, params: Params, extra_weights: Tensor | None = None
    ) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        weights = self.row_weights
        if extra_weights is not None:
            weights = extra_weights if weights is None else weights * extra_weights
        return expectation(self.structure, self.plan, params, weights)

    def m_step(
        self,
        params: Params,
        expected: Expected,
        only: frozenset[str] | None = None,
        effort: tuple[int, int] = THOROUGH,
    ) -> Params:
        """New parameters from expected statistics."""
        return m_step(self.plan, params, expected, self.floors, only, effort)

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable."""
        trace = self.structure.enumerate(params)
        value = trace.log_likelihood(
            trace.tensors(), weights=self.row_weights, unit=self.structure.unit
        )
        return value, self.structure.log_prior(trace)

    def clip(self, params: Params, factor: float = 1.0) -> Params:
        """``params`` with every variance above ``factor`` times its floor."""
        result = dict(params)
        for name, floor in self.floors.items():
            clip = self.plan.blocks[name].uses[0].coordinate.clip
            assert clip is not None
            result[name] = clip(params[name], floor * factor)
        return result


def pose(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    fixed: Iterable[str] = (),
    floor: float = 0.0,
    weights: Any = None,
) -> Problem:
    """Read a program with its data and plan its M-step."""
    with torch.inference_mode(False):
        structure = read(model, args, kwargs, dtype=dtype)
        plan = make_plan(structure, fixed)
        row_weights = None if weights is None else check_weights(weights, structure)
        floors = variance_floors(structure, plan.blocks, floor)
        groups = tuple(state_groups(structure, plan))
    return Problem(structure, plan, row_weights, floors, floor, groups)


def check_weights(weights: Any, structure: Structure) -> Tensor:
    """Row weights as a tensor over the rows' plates."""
    if not structure.unit:
        raise SettingError("weights: the program has no plate of independent rows to weigh.")
    try:
        tensor = torch.as_tensor(weights).to(structure.program.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"weights: expected numbers of shape {structure.unit_shape}, got {weights!r:.80}."
        ) from error
    if tuple(tensor.shape) != structure.unit_shape:
        plates = ", ".join(f"'{p}'" for p in structure.unit)
        raise DataError(
            f"weights: expected shape {structure.unit_shape} (plate {plates}),"
            f" got {tuple(tensor.shape)}."
        )
    bad = ~(tensor.isfinite() & (tensor >= 0))
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"weights: expected finite numbers that are not negative, got {tensor[index].item()} at"
            f" index {index} ({int(bad.sum())} such)."
        )
    if not (tensor > 0).any():
        raise DataError("weights: expected at least one row with a positive weight.")
    return tensor
