"""Chains whose observations are exponential families: their log-probabilities as matrix products.

What a state says of the rows of a step is ``E Phi`` and the expected statistics are ``Phi R'``, as
for a mixture (:mod:`~pyroem.estep.kernel`), with forward-backward between the two. The program does
not run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyroem.estep.chain import Potentials, lengths, sequence_weights, shape_of
from pyroem.estep.columns import Scratch
from pyroem.estep.kernel import (
    CACHE,
    IMPOSSIBLE,
    Coefficients,
    Rows,
    Totals,
    coefficients,
    home,
    log_joint_states,
)
from pyroem.estep.mixture import Assigned, Group, Mixture, assigned_of, no_product, observed_of
from pyroem.estep.scan import Chains, places, smooth
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Run
from pyroem.statistics import SiteStatistics
from pyroem.structure import Chain, Params, Structure


@dataclass(frozen=True)
class Part:
    """The observations of a chain in its first step, or in all others.

    The group's first assignment is the chain's, the rest those inside the steps.
    """

    mixture: Mixture
    state: Assigned

    @property
    def group(self) -> Group:
        """The chain's states and those inside a step."""
        return self.mixture.groups[0]


@dataclass(frozen=True)
class ChainParts:
    """A chain as the kernel knows it."""

    chain: Chain
    opening: Part
    following: Part


def chain_parts(structure: Structure, plan: Plan) -> tuple[ChainParts, ...] | str:
    """The chains of a program for the kernel, or the reason why the program has to run."""
    run, found = plan.reading.traces[0], []
    for name in run.factors:
        if name not in structure.chained:
            return f"site '{name}' hangs on no chain"
        reason = no_product(structure, plan, name)
        if reason:
            return reason
    for chain in structure.chains:
        for name in chain.following:
            if name != chain.step and chain.first in run.names(run.factors[name].dims):
                return f"site '{name}' depends on the state before too"
            if not {chain.steps, *chain.plates} <= set(structure.plates[name]):
                return f"site '{name}' does not stand in the chain's plates"
        first = _part(structure, plan, chain.first, chain.opening, (chain.first,))
        later = _part(structure, plan, chain.step, chain.following, (chain.first, chain.step))
        found.append(ChainParts(chain, first, later))
    return tuple(found)


def _part(
    structure: Structure, plan: Plan, state: str, sites: tuple[str, ...], axes: tuple[str, ...]
) -> Part:
    inner = tuple(z for z in structure.assignments if z in sites and z != state)
    names = (state, *inner)
    sizes = tuple(structure.assignments[z] for z in names)
    assigned = tuple(assigned_of(structure, plan, z, names) for z in inner)
    seen = [name for name in sites if name in structure.observations]
    group = Group(names, sizes, assigned, observed_of(structure, plan, seen, names))
    return Part(Mixture(plan, (group,), (), 1.0), assigned_of(structure, plan, state, axes))


class ChainRows:
    """The data of one chain: the rows of the first step, and those of all others (step by step).

    ``shape`` is that of the sequences' plates; ``ends`` are the steps after the first that each
    sequence has, -1 where nothing of it is seen. The rows are those of the sequences by falling
    length (``order``) for as long as they go on, if they are ``packed``.
    """

    def __init__(
        self,
        parts: ChainParts,
        nodes: Mapping[str, Any],
        shape: tuple[int, ...],
        ends: Tensor,
        weights: Tensor,
        cache: int = CACHE,
        packed: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        count, steps = len(ends), parts.chain.length - 1
        self.chain, self.shape, self.cache, self.parts = parts.chain, shape, cache, parts
        self.order = torch.argsort(ends, descending=True, stable=True)
        if not packed or bool((ends == steps).all()):
            self.order = torch.arange(count)
        self.ends, self.weights = ends[self.order], weights[self.order]
        lasting = self.ends if packed else torch.full_like(ends, steps)
        counts = (torch.arange(steps).unsqueeze(-1) < lasting).sum(-1)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.step, sequence = places(self.offsets)
        self.sequence = self.order[sequence]
        index = self.step * count + self.sequence
        whole = len(index) == steps * count and bool((self.order == torch.arange(count)).all())
        by_row = weights[self.sequence]
        opening = None if whole else self.order
        self.opening, self.first = self._rows(parts.opening, nodes, self.weights, opening)
        self.following, self.later = (
            self._rows(parts.following, nodes, by_row, None if whole else index)
            if len(index)
            else (None, parts.following)
        )
        self.scratch = Scratch()

    def _rows(
        self, part: Part, nodes: Mapping[str, Any], weights: Tensor, index: Tensor | None
    ) -> tuple[Rows | None, Part]:
        """The rows, and the part; without masks where nothing of the rows is masked."""
        if not part.group.observed:
            return None, part
        weights = weights.to(part.group.zero.dtype)
        cache = 4 * self.cache  # the statistics of rows in two plates are kept anyway
        unmasked = _unmasked(part.mixture)
        rows = Rows(part.mixture, nodes, weights, cache, self.device, index, unmasked)
        return rows, replace(part, mixture=rows.mixture)

    def weighted(self, weights: Tensor) -> ChainRows:
        """The same sequences under other weights."""
        own = copy.copy(self)
        own.weights = weights[self.order]
        if self.opening is not None:
            own.opening = self.opening.weighted(own.weights)
        if self.following is not None:
            own.following = self.following.weighted(weights[self.sequence])
        return own

    def spread(self, x: Tensor, first: bool, unseen: Tensor) -> Tensor:
        """Rows as steps by sequences; ``unseen`` is the row of a sequence that has ended."""
        steps = 1 if first else self.chain.length - 1
        result = unseen.expand((steps, len(self.ends), *x.shape[1:])).clone()
        if first:
            result[0, self.order] = x
        else:
            result[self.step, self.sequence] = x
        return result

    @property
    def work(self) -> float:
        """About how many multiplications a pass takes."""
        rows = len(self.ends) + len(self.step)
        features = 0 if self.following is None else self.following.features
        return float(rows * self.later.group.num_states * (features + 4))

    @property
    def measure(self) -> float:
        """The weighted sum of the base measure."""
        both = (self.opening, self.following)
        return sum(float(rows.measure) for rows in both if rows is not None)


def _unmasked(mixture: Mixture) -> Mixture:
    """The mixture with its observations as they are where nothing is masked."""
    groups = []
    for group in mixture.groups:
        observed = tuple(
            (axes, tuple(replace(x, site=replace(x.site, mask=None)) for x in layouts))
            for axes, layouts in group.observed
        )
        groups.append(replace(group, observed=observed))
    return replace(mixture, groups=tuple(groups))


@dataclass(frozen=True)
class Sequences:
    """Sequences that are in memory: the rows of every chain; ``total`` is what they weigh."""

    rows: tuple[ChainRows, ...]
    total: float

    def parts(self, size: int) -> Iterator[Sequences]:
        """All of them: sequences are not cut."""
        yield self

    def weighted(self, structure: Structure, row_weights: Tensor) -> Sequences:
        """The same sequences under other row weights."""
        rows = (
            own.weighted(sequence_weights(structure, own.chain, own.shape, row_weights))
            for own in self.rows
        )
        return Sequences(tuple(rows), float(row_weights.sum()))


def sequences_of(
    structure: Structure,
    parts: Iterable[ChainParts],
    nodes: Mapping[str, Any],
    row_weights: Tensor | None = None,
    cache: int = CACHE,
    packed: bool = True,
    device: torch.device | None = None,
) -> Sequences:
    """The sequences that a program's sites hold."""
    rows = []
    for own in parts:
        (chain,) = (c for c in structure.chains if c.name == own.chain.name)
        shape, ends = shape_of(nodes, chain), lengths(structure, nodes, chain)
        weights = sequence_weights(structure, chain, shape, row_weights)
        own = replace(own, chain=chain)
        rows.append(ChainRows(own, nodes, shape, ends, weights, cache, packed, device))
    total = structure.num_rows if row_weights is None else float(row_weights.sum())
    return Sequences(tuple(rows), float(total))


def seen(
    part: Part, rows: Rows | None, found: Coefficients, count: int, scratch: Scratch
) -> Tensor:
    """The log-probabilities of what was seen in ``count`` rows, by state; what is inside summed."""
    group, k = part.group, part.group.sizes[0]
    base = found.base[0]
    out = scratch.empty((id(part), "seen"), (count, k), base)
    if rows is None:
        out[:] = base.reshape(k, -1).logsumexp(1)
        return out
    own = Scratch()
    for start, stop in rows.blocks():
        phi = rows.phi(0, start, stop, own)
        into = own.empty("joint", (len(base), stop - start), base)
        joint = log_joint_states(group, base, found.natural[0], phi, stop - start, into)
        if len(group.sizes) > 1:
            joint = joint.reshape(k, -1, stop - start).logsumexp(1)
        out[start:stop] = joint.T
    return out


def add_statistics(
    part: Part,
    rows: Rows | None,
    found: Coefficients | None,
    states: Tensor,
    dtype: torch.dtype,
    given: Tensor | None = None,
) -> dict[str, SiteStatistics]:
    """The expected statistics of what was seen, from the posterior of the states (rows, states).

    The assignments inside a step have their posterior at the parameters ``found``, or are ``given``
    (their joint states by rows, or by one for all).
    """
    group, totals, own = part.group, Totals(), Scratch()
    k, inner = group.sizes[0], len(group.sizes) > 1
    if rows is None:
        if inner:
            joint = found.base[0].reshape(k, -1).softmax(1) if found else _even(group)
            joint = joint.to(states.device)
            totals.add(group, (states.sum(0).unsqueeze(1) * joint).reshape(-1, 1).to(dtype), [])
            home(states.new_zeros(()), [totals])
        return totals.statistics(group, dtype) if inner else {}
    for start, stop in rows.blocks():
        phi, posterior = rows.phi(0, start, stop, own), states[start:stop].T.to(dtype)
        if inner:
            if given is not None:
                share = given[:, start:stop] if given.shape[1] > 1 else given
            elif found is not None:
                base, natural = found.base[0], found.natural[0]
                joint = log_joint_states(group, base, natural, phi, stop - start)
                joint = joint.reshape(k, -1, stop - start)
                share = (joint - joint.logsumexp(1, keepdim=True)).exp_()
            else:
                share = _even(group)[0].unsqueeze(1)
            share = share.to(posterior.device)
            posterior = (share * posterior.unsqueeze(1)).reshape(-1, stop - start)
        totals.add(group, posterior, phi)
    home(states.new_zeros(()), [totals])
    return totals.statistics(group, dtype)


def _even(group: Group) -> Tensor:
    k = group.sizes[0]
    return group.zero.new_full((k, group.num_states // k), k / group.num_states)


def expect_chain(rows: ChainRows, params: Params) -> tuple[Tensor, dict[str, SiteStatistics]]:
    """The E-step of one chain: the weighted log-likelihood, and the statistics of its sites."""
    count, dtype = len(rows.ends), rows.first.state.site.dtype
    found = [
        coefficients(part.mixture, params, own is None or own.cached is not None).to(rows.device)
        for part, own in ((rows.first, rows.opening), (rows.later, rows.following))
    ]
    chains = log_chains(rows, params, found)
    active = (rows.weights * (rows.ends >= 0)).to(rows.device)
    smoothed = smooth(chains, active)
    value = (smoothed.log_likelihood * active).sum().cpu() + rows.measure
    first, later = smoothed.states[:count], smoothed.states[count:]
    return value, {
        **_of_states(rows, first, smoothed.pairs[0, 0], dtype),
        **add_statistics(rows.first, rows.opening, found[0], first, dtype),
        **add_statistics(rows.later, rows.following, found[1], later, dtype),
    }


def _of_states(
    rows: ChainRows, first: Tensor, pairs: Tensor, dtype: torch.dtype
) -> dict[str, SiteStatistics]:
    """The statistics of the chain's own sites."""
    later, first, pairs = rows.later.state, first.sum(0).cpu(), pairs.cpu()
    counts = pairs if later.dims[0] >= 0 else pairs.sum(0, keepdim=True)
    return {
        rows.chain.first: rows.first.state.expected(first.to(dtype)),
        rows.chain.step: later.expected(counts.to(dtype)),
    }


def expect_chain_given(
    rows: ChainRows, evidence: Mapping[str, Tensor], importance: Tensor
) -> dict[str, SiteStatistics]:
    """The statistics where the probabilities of each assignment are given by themselves.

    ``evidence`` has the rows of an assignment (steps, sequences), then its states; where it has
    nothing of one, its states are equally likely. ``importance`` weighs the sequences.
    """
    chain, k = rows.chain, rows.chain.num_states
    count, dtype = len(rows.ends), rows.first.state.site.dtype
    weights = torch.empty_like(rows.weights)
    weights[rows.order] = rows.weights * (rows.ends >= 0)
    weights = weights * importance
    states = []
    for z, steps in ((chain.first, 1), (chain.step, chain.length - 1)):
        even = weights.new_full((steps, count, k), 1 / k)
        own = evidence[z].to(weights).reshape(steps, count, k) if z in evidence else even
        states.append(own)
    both, at = torch.cat(states), (rows.step, rows.sequence)
    after = both[at[0] + 1, at[1]] * weights[at[1]].unsqueeze(-1)
    pairs = both[at].T @ after
    first = (both[0] * weights.unsqueeze(-1))[rows.order].to(rows.device)
    after = after.to(rows.device)
    index = rows.step * count + rows.sequence
    given = (_given(rows.first, evidence, rows.order), _given(rows.later, evidence, index))
    return {
        **_of_states(rows, first, pairs, dtype),
        **add_statistics(rows.first, rows.opening, None, first, dtype, given[0]),
        **add_statistics(rows.later, rows.following, None, after, dtype, given[1]),
    }


def _given(part: Part, evidence: Mapping[str, Tensor], index: Tensor) -> Tensor | None:
    """The evidence of the assignments inside a step: their joint states by rows."""
    total: Tensor | None = None
    for name, size in zip(part.group.names[1:], part.group.sizes[1:], strict=True):
        own = part.group.zero.new_full((1, size), 1 / size)
        if name in evidence:
            own = evidence[name].to(own).reshape(-1, size)[index]
        total = own if total is None else (total.unsqueeze(2) * own.unsqueeze(1)).flatten(1)
    return None if total is None else total.T


def log_chains(rows: ChainRows, params: Params, found: list[Coefficients]) -> Chains:
    """The log-probabilities of a chain at ``params``, without the base measure."""
    k, (first, pair) = rows.chain.num_states, _of_chain(rows, params)
    first, pair = first.to(rows.device), pair.to(rows.device)
    start = first + seen(rows.first, rows.opening, found[0], len(rows.ends), rows.scratch)
    emit = seen(rows.later, rows.following, found[1], len(rows.step), rows.scratch)
    matrix = pair.double().reshape(1, 1, k, k)
    ends, offsets = rows.ends.clamp(min=0).to(rows.device), rows.offsets.to(rows.device)
    return Chains(start.double(), matrix, emit.double(), ends, offsets)


def _of_chain(rows: ChainRows, params: Params) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the first state, and of each state after each."""
    run, k = Run(rows.first.mixture.plan, params), rows.chain.num_states
    first, pair = (
        part.state.log_prior(run.centred(part.state.site)).reshape(-1, k)
        for part in (rows.first, rows.later)
    )
    return first, pair.expand(k, k)


def potentials_of(rows: ChainRows, params: Params, best: bool = False) -> Potentials:
    """A chain's log-probabilities at ``params``; ``best`` has what is inside a step at its best."""
    k, (prior, pair) = rows.chain.num_states, _of_chain(rows, params)
    shape, rank = rows.shape, len(rows.shape)
    tables, inner = [], []
    for part, whole, own, first in (
        (rows.first, rows.parts.opening, rows.opening, True),
        (rows.later, rows.parts.following, rows.following, False),
    ):
        count = len(rows.ends) if first else len(rows.step)
        unseen = _joint(whole, None, params, 1, best)
        table, joint = _joint(part, own, params, count, best)
        spread = rows.spread(table, first, unseen[0])
        tables.append(spread.reshape((len(spread), *shape, k)))
        if joint is not None and unseen[1] is not None:
            joint = rows.spread(joint, first, unseen[1])
            joint = joint.reshape((len(joint), *shape, 1, *joint.shape[2:]))
        inner.append(joint)
    return Potentials(
        rows.chain,
        shape,
        prior.reshape((1,) * rank + (k,)) + tables[0][0],
        tables[0][0],
        pair.reshape((1,) * (rank + 1) + (k, k)),
        tables[1],
        torch.empty_like(rows.ends).scatter_(0, rows.order, rows.ends),
        (inner[0], inner[1]),
        (rows.first.group.names[1:], rows.later.group.names[1:]),
    )


def _joint(
    part: Part, rows: Rows | None, params: Params, count: int, best: bool
) -> tuple[Tensor, Tensor | None]:
    """The log-probabilities of rows by state, and by what is inside the step too."""
    group = part.group
    found = coefficients(part.mixture, params, rows is None or rows.cached is not None)
    if rows is None:
        joint = found.base[0].expand(-1, count)
    else:
        found, blocks = found.to(rows.device), []
        for start, stop in rows.blocks():
            phi = rows.phi(0, start, stop, Scratch())
            own = log_joint_states(group, found.base[0], found.natural[0], phi, stop - start)
            blocks.append((own + rows.measure_of(start, stop)).cpu())
        joint = torch.cat(blocks, 1)
    joint = torch.where(joint < IMPOSSIBLE, -torch.inf, joint)
    x = joint.reshape((*group.sizes, -1)).movedim(-1, 0)
    if len(group.sizes) == 1:
        return x, None
    dims = list(range(2, x.dim()))
    return x.amax(dims) if best else x.logsumexp(dims), x
