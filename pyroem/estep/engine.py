"""Engines: what computes the E-step and the objective of a problem."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyroem.estep.kernel import Rows, expect
from pyroem.estep.mixture import Mixture
from pyroem.estep.trace import expectation
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Expected, Run
from pyroem.structure import Params, Structure


class Engine(Protocol):
    """The E-step of a problem and its objective."""

    @property
    def description(self) -> str:
        """What it does and why it was chosen, for ``explain()``."""
        ...

    @property
    def work(self) -> float:
        """About how many multiplications a pass over the data takes."""
        ...

    def expect(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        ...

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable (once, at least)."""
        ...


@dataclass(frozen=True)
class TraceEngine:
    """One enumerated Pyro trace for each pass over the data; for every program."""

    structure: Structure
    plan: Plan
    row_weights: Tensor | None
    reason: str = ""

    @property
    def description(self) -> str:
        """What it does and why it was chosen."""
        why = f"; no kernel: {self.reason}" if self.reason else ""
        return f"trace (one enumerated Pyro trace for each pass over the data{why})"

    @property
    def work(self) -> float:
        """About how many multiplications a pass over the data takes."""
        factors = self.plan.reading.traces[0].factors.values()
        return 10.0 * max(f.tensor.numel() for f in factors)

    def expect(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        return expectation(self.structure, self.plan, params, self.row_weights)

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable to any order."""
        trace = self.structure.enumerate(params)
        value = trace.log_likelihood(
            trace.tensors(), weights=self.row_weights, unit=self.structure.unit
        )
        return value, self.structure.log_prior(trace)


@dataclass(frozen=True)
class MixtureEngine:
    """Blocked matrix products over the statistics of the rows (:mod:`pyroem.estep.mixture`)."""

    mixture: Mixture
    chunks: Iterable[Rows]

    @property
    def description(self) -> str:
        """What it does and why it was chosen."""
        states = " + ".join(str(group.num_states) for group in self.mixture.groups)
        return f"mixture kernel (independent rows, {states} joint states; {self._where})"

    @property
    def work(self) -> float:
        """About how many multiplications a pass over the data takes."""
        if not isinstance(self.chunks, list):
            return math.inf
        rows = self.chunks[0]
        return float(rows.num_rows * rows.features * self.mixture.num_states)

    @property
    def _where(self) -> str:
        if not isinstance(self.chunks, list):
            return "data read in blocks, matrix products in blocks of rows"
        device = self.chunks[0].device if self.chunks else torch.device("cpu")
        place = "" if device.type == "cpu" else f" on {device}"
        return f"matrix products in blocks of rows{place}"

    def expect(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        with torch.no_grad():
            return expect(self.mixture, self.chunks, params), self.log_prior(params)

    def log_prior(self, params: Params) -> Tensor:
        """The sum of the parameters' log prior densities."""
        structure, run = self.mixture.plan.structure, Run(self.mixture.plan, params)
        total = torch.zeros((), dtype=structure.program.dtype)
        for name, parameter in structure.parameters.items():
            if parameter.has_prior:
                total = total + run.log_prior(name)
        return total

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable once."""
        fixed = {name: value.detach() for name, value in params.items()}
        with torch.no_grad():
            expected = expect(self.mixture, self.chunks, fixed)
        return self.surrogate(params, expected), self.log_prior(params)

    def surrogate(self, params: Params, expected: Expected) -> Tensor:
        """The log-likelihood of an E-step at ``params``, differentiable once.

        By Fisher's identity its gradient is that of ``Q(. | params)``: a function of the expected
        statistics, whose cost does not depend on the rows.
        """
        value = expected.log_likelihood
        if torch.is_grad_enabled() and any(v.requires_grad for v in params.values()):
            run = Run(self.mixture.plan, params)
            q = torch.zeros((), dtype=value.dtype)
            for name, statistics in expected.statistics.items():
                site = self.mixture.plan.reading.sites[name]
                q = q + site.expected_log_density(run.arguments(site), statistics)
            value = value + (q - q.detach())
        return value
