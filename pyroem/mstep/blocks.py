"""One parameter's entry in the plan: its rung, the reason, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from pyroem.constraints import SharedConstraint
from pyroem.families import Coordinate
from pyroem.families.forms import Form
from pyroem.mstep.sites import SiteModel


class Rung(Enum):
    """How a parameter is updated in the M-step."""

    CLOSED_FORM = "closed form"
    REGRESSION = "regression"
    ON_STATISTICS = "on statistics"
    ON_ROWS = "on rows"
    GRADIENT = "gradient"
    FIXED = "fixed"


@dataclass(frozen=True)
class Use:
    """A place where a parameter's blocks stand as an argument of a site: ``factor t + offset``.

    With ``multiple``, the factor depends on other parameters: it is what the coordinate is now,
    divided by ``t``.
    """

    site: SiteModel
    coordinate: Coordinate
    cells: Tensor
    factor: Tensor | None = None
    offset: Tensor | None = None
    multiple: bool = False


@dataclass(frozen=True)
class Block:
    """One parameter's entry in the plan.

    ``partners`` are parameters that follow it freely: if they are updated too, it takes its
    ``profiled`` form, which has them at their maximisers. An ``ordered`` one increases along its
    last dim; in a ``shared`` one all blocks have something in common, and one maximiser.
    """

    name: str
    rung: Rung
    reason: str
    form: Form | None = None
    uses: tuple[Use, ...] = ()
    lower: float = -torch.inf
    upper: float = torch.inf
    partners: frozenset[str] = frozenset()
    ordered: bool = False
    shared: SharedConstraint | None = None

    @cached_property
    def profiled(self) -> Block:
        """The block with the partners at their maximisers."""
        (use,) = self.uses
        profile = use.coordinate.profile
        assert profile is not None
        return replace(self, form=profile.form, uses=(replace(use, coordinate=profile),))

    @cached_property
    def alone(self) -> bool:
        """Whether it stands in one place, every element once and in order."""
        if len(self.uses) != 1 or (
            self.uses[0].factor is not None
            or self.uses[0].offset is not None
            or self.uses[0].multiple
        ):
            return False
        cells = self.uses[0].cells.reshape(-1)
        return torch.equal(cells, torch.arange(len(cells)).to(cells))
