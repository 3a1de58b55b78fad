"""What the bootstrap of a fit found: replicates, standard errors, percentile intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroem.errors import SettingError
from pyroem.structure import Params
from pyroem.text import aligned


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """The replicates of a fit, and how certain its parameters are by them.

    Attributes:
    ----------
    method
        ``"weighted"`` or ``"parametric"``.
    estimates
        The fit's own parameters, by name.
    params
        Those of the replicates that count: ``kept`` of them in the first dim, the states named as
        those of the fit.
    log_joint
        The objective of each of these, on its own data.
    labels
        A name for each element of the parameters.
    ambiguous
        How many are left out because it cannot be told which of their states are which.
    failed
        How many are left out because their fit did not converge.
    missing
        How many an interrupt kept from being made.
    message
        What was left out and why; empty where all is well.
    """

    method: str
    estimates: Params
    params: Params
    log_joint: Tensor
    labels: tuple[str, ...]
    ambiguous: int
    failed: int
    missing: int
    message: str

    @property
    def kept(self) -> int:
        """How many replicates count."""
        return len(self.log_joint)

    @property
    def refused(self) -> bool:
        """Whether too few replicates are left, or too many left out, to speak of any average."""
        return too_few(self.kept, self.ambiguous + self.failed)

    def _summary(self, of: Callable[[Tensor], Tensor]) -> Params:
        """A function of the replicates of each parameter; NaN where there is no average."""
        return {
            name: torch.full_like(self.estimates[name], math.nan) if self.refused else of(own)
            for name, own in self.params.items()
        }

    @property
    def standard_errors(self) -> Params:
        """The standard deviation over the replicates, by parameter."""
        return self._summary(lambda own: own.std(0))

    @property
    def bias(self) -> Params:
        """The mean over the replicates less the estimate, by parameter."""
        means = self._summary(lambda own: own.mean(0))
        return {name: mean - self.estimates[name] for name, mean in means.items()}

    @property
    def covariance(self) -> Tensor:
        """Of all elements (``labels``), over the replicates."""
        size = len(self.labels)
        if self.refused:
            return torch.full((size, size), math.nan, dtype=torch.float64)
        return torch.cat([own.reshape(self.kept, -1) for own in self.params.values()], 1).T.cov()

    def intervals(self, level: float = 0.95) -> dict[str, tuple[Tensor, Tensor]]:
        """Percentile intervals ``(low, high)`` by parameter: quantiles of the replicates."""
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
            raise SettingError(f"intervals: level must be between 0 and 1, got {level!r}.")

        def quantile(share: float) -> Params:
            return self._summary(lambda own: own.new_tensor(np.quantile(own, share, axis=0)))

        low, high = quantile(0.5 - level / 2), quantile(0.5 + level / 2)
        return {name: (low[name], high[name]) for name in low}

    def to_dict(self, level: float = 0.95) -> dict[str, Any]:
        """Plain numbers: for each element its estimate, bias, standard error and interval."""
        parts = (self.estimates, self.bias, self.standard_errors)
        intervals = self.intervals(level)
        columns = [
            torch.cat([own.reshape(-1) for own in part]).tolist()
            for part in (
                *([part[n] for n in self.estimates] for part in parts),
                *([intervals[n][i] for n in self.estimates] for i in (0, 1)),
            )
        ]
        keys = ("estimate", "bias", "standard_error", "low", "high")
        rows = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
        counts = {n: getattr(self, n) for n in ("kept", "ambiguous", "failed", "missing")}
        head = {"method": self.method, "level": level, **counts, "message": self.message}
        return {**head, "elements": dict(zip(self.labels, rows, strict=True))}

    def __str__(self) -> str:
        found = self.to_dict()["elements"]
        table = [["", "estimate", "bias", "std. error", "95% low", "95% high"]]
        table += [[label, *(f"{v:.6g}" for v in row.values())] for label, row in found.items()]
        head = f"{self.method.capitalize()} bootstrap, {self.kept} replicates"
        return "\n".join([head, *aligned(table), *([self.message] if self.message else [])])

    def __repr__(self) -> str:
        return f"<{self.method} bootstrap, {self.kept} replicates of {len(self.labels)} elements>"


def too_few(kept: int, out: int) -> bool:
    """Whether the ``kept`` replicates are no fair sample, ``out`` more being left out."""
    return kept < 2 or out > kept
