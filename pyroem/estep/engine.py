"""Engines: what computes the E-step and the objective of a problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyroem._pyro import Enumerated
from pyroem.estep.chain import (
    Found,
    Potentials,
    chain_weights,
    join,
    sequence_weights,
    weights_given,
)
from pyroem.estep.emissions import ChainRows, expect_chain, expect_chain_given, potentials_of
from pyroem.estep.kernel import IMPOSSIBLE, Rows, expect
from pyroem.estep.mixture import Mixture
from pyroem.estep.trace import collect, expectation
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Expected, Run
from pyroem.mstep.update import expected_sum
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
class ChainEngine:
    """Forward-backward over chains.

    Where the observations are matrix products (:mod:`pyroem.estep.emissions`) ``rows`` holds them;
    else the program runs once for all steps in each pass (:mod:`pyroem.estep.chain`), for
    ``reason``. ``ends`` are the steps after the first of every chain's sequences.
    """

    structure: Structure
    plan: Plan
    row_weights: Tensor | None
    ends: Mapping[str, Tensor]
    rows: tuple[ChainRows, ...] = ()
    reason: str = ""

    @property
    def description(self) -> str:
        """What it does and why it was chosen."""
        chains = ", ".join(
            f"'{c.name}' of {c.num_states} states and {c.length} steps"
            for c in self.structure.chains
        )
        how = "matrix products in blocks of rows"
        if not self.rows:
            how = f"the program runs once for all steps in each pass: {self.reason}"
        return f"chain kernel (forward-backward over {chains}; {how})"

    @property
    def work(self) -> float:
        """About how many multiplications a pass over the data takes."""
        if self.rows:
            return sum(rows.work for rows in self.rows)
        factors = self.plan.reading.traces[0].factors.values()
        states = max(chain.num_states for chain in self.structure.chains)
        return 10.0 * states * max(f.tensor.numel() for f in factors)

    def expect(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        with torch.no_grad():
            if self.rows:
                return self._products(params), log_prior(self.plan, params)
            run = self.structure.enumerate(params)
            prior = self.structure.log_prior(run)
            found = self.found(run)
            return collect(self.plan, run, found.log_likelihood, found.weights), prior

    def potentials(self, params: Params, best: bool = False) -> list[Potentials]:
        """The log-probabilities of every chain; ``best`` has what is inside a step at its best."""
        with torch.no_grad():
            if self.rows:
                return [potentials_of(rows, params, best) for rows in self.rows]
            run = self.structure.enumerate(params)
            return list(join(self.structure, run, run.tensors(), best))

    def found(self, run: Enumerated) -> Found:
        """The E-step on a run of the program."""
        return chain_weights(self.structure, run, run.tensors(), self.ends, self.row_weights)

    def _products(self, params: Params) -> Expected:
        value, statistics = torch.zeros((), dtype=torch.float64), {}
        scale = float(self.plan.reading.traces[0].scale)
        for rows in self.rows:
            own, found = expect_chain(rows, params)
            value = value + own
            statistics.update(found)
        if scale != 1.0:
            statistics = {name: s.scaled(scale) for name, s in statistics.items()}
            value = value * scale
        value = torch.where(value < IMPOSSIBLE, -torch.inf, value)
        return Expected(value.to(self.structure.program.dtype), statistics, {})

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable once (Fisher's identity)."""
        if self.rows:
            fixed = {name: value.detach() for name, value in params.items()}
            with torch.no_grad():
                expected = self._products(fixed)
            return surrogate(self.plan, params, expected), log_prior(self.plan, params)
        run = self.structure.enumerate(params)
        with torch.no_grad():
            found = self.found(run)
        value = found.log_likelihood.to(self.structure.program.dtype)
        if torch.is_grad_enabled() and any(v.requires_grad for v in params.values()):
            q = torch.zeros((), dtype=value.dtype)
            for name, weights in found.weights.items():
                q = q + expected_sum(weights, run.factors[name].tensor)
            value = value + (q - q.detach())
        return value, self.structure.log_prior(run)

    def expect_given(
        self, params: Params, evidence: Mapping[str, Tensor], importance: Tensor | None
    ) -> Expected:
        """Expected statistics where the probabilities of the assignments are given.

        ``importance`` weighs the rows, on top of their own weights.
        """
        zero = torch.zeros((), dtype=self.structure.program.dtype)
        with torch.no_grad():
            if self.rows:
                statistics = {}
                for rows in self.rows:
                    own = sequence_weights(self.structure, rows.parts.chain, rows.shape, importance)
                    statistics.update(expect_chain_given(rows, evidence, own))
                return Expected(zero, statistics, {})
            weights = self.row_weights
            if importance is not None:
                weights = importance if weights is None else weights * importance
            run = self.plan.reading.traces[0]
            given = weights_given(self.structure, run, evidence, weights)
            return collect(self.plan, run, zero, given, Run(self.plan, params))


def log_prior(plan: Plan, params: Params) -> Tensor:
    """The sum of the parameters' log prior densities."""
    run = Run(plan, params)
    total = torch.zeros((), dtype=plan.structure.program.dtype)
    for name, parameter in plan.structure.parameters.items():
        if parameter.has_prior:
            total = total + run.log_prior(name)
    return total


def surrogate(plan: Plan, params: Params, expected: Expected) -> Tensor:
    """The log-likelihood of an E-step at ``params``, differentiable once.

    By Fisher's identity its gradient is that of ``Q(. | params)``: a function of the expected
    statistics, whose cost does not depend on the rows.
    """
    value = expected.log_likelihood
    if torch.is_grad_enabled() and any(v.requires_grad for v in params.values()):
        run = Run(plan, params)
        q = torch.zeros((), dtype=value.dtype)
        for name, statistics in expected.statistics.items():
            site = plan.reading.sites[name]
            q = q + site.expected_log_density(run.arguments(site), statistics)
        value = value + (q - q.detach())
    return value


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
            found = expect(self.mixture, self.chunks, params)
            return found, log_prior(self.mixture.plan, params)

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable once."""
        fixed, plan = {name: value.detach() for name, value in params.items()}, self.mixture.plan
        with torch.no_grad():
            expected = expect(self.mixture, self.chunks, fixed)
        return surrogate(plan, params, expected), log_prior(plan, params)
