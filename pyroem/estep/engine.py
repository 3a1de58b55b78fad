"""Engines: what computes the E-step and the objective of a problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from pyroem._pyro import Enumerated
from pyroem.errors import ModelError
from pyroem.estep.chain import (
    Potentials,
    chain_weights,
    join,
    sequence_weights,
    weights_given,
)
from pyroem.estep.emissions import (
    ChainParts,
    Sequences,
    expect_chain,
    expect_chain_given,
    potentials_of,
)
from pyroem.estep.kernel import IMPOSSIBLE, Rows, expect
from pyroem.estep.mixture import Mixture
from pyroem.estep.trace import collect, expectation
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Expected, Run
from pyroem.mstep.update import expected_sum
from pyroem.statistics import SiteStatistics
from pyroem.structure import Chain, Params, Structure


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


class Chained(Engine, Protocol):
    """An engine of chains."""

    structure: Structure
    plan: Plan

    def potentials(self, params: Params, best: bool = False) -> list[Potentials]:
        """The log-probabilities of every chain; ``best`` has what is inside a step at its best."""
        ...

    def expect_given(
        self, params: Params, evidence: Mapping[str, Tensor], importance: Tensor | None
    ) -> Expected:
        """Expected statistics where the probabilities of the assignments are given.

        ``importance`` weighs the rows, on top of their own weights.
        """
        ...


def _told(chains: Iterable[Chain]) -> str:
    return ", ".join(f"'{c.name}' of {c.num_states} states and {c.length} steps" for c in chains)


@dataclass(frozen=True)
class ChainTraceEngine:
    """Forward-backward over the factors of a run for all steps (:mod:`pyroem.estep.chain`).

    ``ends`` are the steps after the first of every chain's sequences.
    """

    structure: Structure
    plan: Plan
    row_weights: Tensor | None
    ends: Mapping[str, Tensor]
    reason: str

    @property
    def description(self) -> str:
        """What it does and why it was chosen."""
        return (
            f"chain kernel (forward-backward over {_told(self.structure.chains)}; in each pass the"
            f" program runs once for all steps: {self.reason})"
        )

    @property
    def work(self) -> float:
        """About how many multiplications a pass over the data takes."""
        factors = self.plan.reading.traces[0].factors.values()
        states = max(chain.num_states for chain in self.structure.chains)
        return 10.0 * states * max(f.tensor.numel() for f in factors)

    def expect(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        with torch.no_grad():
            run = self.structure.enumerate(params)
            prior = self.structure.log_prior(run)
            value, weights = self._weights(run)
            return collect(self.plan, run, value, weights), prior

    def _weights(self, run: Enumerated) -> tuple[Tensor, dict[str, Tensor]]:
        return chain_weights(self.structure, run, run.tensors(), self.ends, self.row_weights)

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable once (Fisher's identity)."""
        run = self.structure.enumerate(params)
        with torch.no_grad():
            value, found = self._weights(run)
        value = value.to(self.structure.program.dtype)
        if torch.is_grad_enabled() and any(v.requires_grad for v in params.values()):
            q = torch.zeros((), dtype=value.dtype)
            for name, weights in found.items():
                q = q + expected_sum(weights, run.factors[name].tensor)
            value = value + (q - q.detach())
        return value, self.structure.log_prior(run)

    def potentials(self, params: Params, best: bool = False) -> list[Potentials]:
        """The log-probabilities of every chain; ``best`` has what is inside a step at its best."""
        with torch.no_grad():
            run = self.structure.enumerate(params)
            return list(join(self.structure, run, run.tensors(), best))

    def expect_given(
        self, params: Params, evidence: Mapping[str, Tensor], importance: Tensor | None
    ) -> Expected:
        """Expected statistics where the probabilities of the assignments are given."""
        weights = self.row_weights
        if importance is not None:
            weights = importance if weights is None else weights * importance
        with torch.no_grad():
            run = self.plan.reading.traces[0]
            given = weights_given(self.structure, run, evidence, weights)
            zero = torch.zeros((), dtype=self.structure.program.dtype)
            return collect(self.plan, run, zero, given, Run(self.plan, params))


@dataclass(frozen=True)
class ChainEngine:
    """Forward-backward between matrix products (:mod:`pyroem.estep.emissions`)."""

    structure: Structure
    plan: Plan
    parts: tuple[ChainParts, ...]
    chunks: Iterable[Sequences]

    @property
    def description(self) -> str:
        """What it does and why it was chosen."""
        where = "" if isinstance(self.chunks, list) else ", data read in blocks"
        return (
            f"chain kernel (forward-backward over {_told(self.structure.chains)}; matrix products"
            f" in blocks of rows{where})"
        )

    @property
    def work(self) -> float:
        """About how many multiplications a pass over the data takes."""
        if not isinstance(self.chunks, list):
            return math.inf
        return sum(rows.work for chunk in self.chunks for rows in chunk.rows)

    def expect(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        with torch.no_grad():
            return self.over(self.chunks, params), log_prior(self.plan, params)

    def over(self, chunks: Iterable[Sequences], params: Params) -> Expected:
        """The E-step on some sequences."""
        value = torch.zeros((), dtype=torch.float64)
        total: dict[str, SiteStatistics] = {}
        scale = float(self.plan.reading.traces[0].scale)
        for chunk in chunks:
            for rows in chunk.rows:
                own, found = expect_chain(rows, params)
                value = value + own
                for name, site in found.items():
                    total[name] = total[name] + site if name in total else site
        if scale != 1.0:
            total = {name: s.scaled(scale) for name, s in total.items()}
            value = value * scale
        value = torch.where(value < IMPOSSIBLE, -torch.inf, value)
        return Expected(value.to(self.structure.program.dtype), total, {})

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable once."""
        fixed = {name: value.detach() for name, value in params.items()}
        with torch.no_grad():
            expected = self.over(self.chunks, fixed)
        return surrogate(self.plan, params, expected), log_prior(self.plan, params)

    def potentials(self, params: Params, best: bool = False) -> list[Potentials]:
        """The log-probabilities of every chain; ``best`` has what is inside a step at its best."""
        if not isinstance(self.chunks, list):
            raise ModelError(
                "The data of the fit is in blocks. Give the sequences that you ask about."
            )
        with torch.no_grad():
            return [potentials_of(rows, params, best) for c in self.chunks for rows in c.rows]

    def expect_given(
        self, params: Params, evidence: Mapping[str, Tensor], importance: Tensor | None
    ) -> Expected:
        """Expected statistics where the probabilities of the assignments are given."""
        (chunk,), statistics = self.chunks, dict[str, SiteStatistics]()
        with torch.no_grad():
            for rows in chunk.rows:
                own = sequence_weights(self.structure, rows.chain, rows.shape, importance)
                statistics.update(expect_chain_given(rows, evidence, own))
        return Expected(torch.zeros((), dtype=self.structure.program.dtype), statistics, {})


def is_chained(engine: Engine) -> TypeGuard[Chained]:
    """Whether an engine is one of chains."""
    return isinstance(engine, ChainEngine | ChainTraceEngine)


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
    def plan(self) -> Plan:
        """How the parameters are updated."""
        return self.mixture.plan

    def over(self, chunks: Iterable[Rows], params: Params) -> Expected:
        """The E-step on some rows."""
        return expect(self.mixture, chunks, params)

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
