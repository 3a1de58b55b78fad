"""Chains: the factors of one step for all, joined by forward-backward.

Of every chain the factors of the first step and those of all others are added up, the assignments
inside a step (a mixture component, say) summed out, and the posteriors of states and of pairs of
neighbours handed back to the factors: what ``d log Z / d F`` is of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import Enumerated, align, unwrap
from pyroem.estep.scan import Chains, Smoothed, smooth
from pyroem.estep.trace import factor_weights
from pyroem.structure import Chain, Structure, base_mask


@dataclass(frozen=True)
class _Part:
    """A factor with its dims in order: steps, sequences, the state before, the state, others.

    ``inner`` are the assignments of the step itself, ``rest`` plates inside a sequence.
    """

    name: str
    dims: str
    steps: str
    plates: str
    before: str
    state: str
    inner: str
    rest: str

    @cached_property
    def order(self) -> str:
        """All dims that the factor may have."""
        return self.steps + self.plates + self.before + self.state + self.inner + self.rest

    @property
    def pairwise(self) -> bool:
        """Whether the factor depends on the state before."""
        return self.before in self.dims

    def spread(self, packed: Tensor) -> Tensor:
        """The factor as a tensor that broadcasts over ``order``, the plates inside summed."""
        x = align(packed, self.dims, self.order)
        count = len(self.rest)
        return x.sum(list(range(x.dim() - count, x.dim()))) if count else x

    def gather(self, weights: Tensor, packed: Tensor) -> Tensor:
        """Posterior weights over ``order`` (without the plates inside) as the factor has its dims.

        Where the factor has one element for many, their weights are added.
        """
        shape = align(packed, self.dims, self.order).shape
        kept = shape[: len(shape) - len(self.rest)]
        away = [i for i, n in enumerate(kept) if n == 1 and weights.shape[i] > 1]
        total = weights.sum(away, keepdim=True) if away else weights
        total = total.expand(kept).reshape(kept + (1,) * len(self.rest)).expand(shape)
        present = "".join(d for d in self.order if d in self.dims)
        sizes = [n for d, n in zip(self.order, shape, strict=True) if d in self.dims]
        return total.reshape(sizes).permute([present.index(d) for d in self.dims])


@dataclass(frozen=True)
class Potentials:
    """One chain's log-probabilities: steps (if they differ), plates of sequences, states.

    ``start`` is of the first step, ``opened`` that part of it which is of what was seen; ``pair``
    of a state after the one before; ``emit`` of what was seen at the other steps. ``ends`` are the
    steps after the first up to the last that shows anything (-1: none does). The assignments
    inside a step are summed out there; ``inner`` is with them (steps, plates, the state before, the
    state, they), in the first step and in the others, in the order of ``names``.
    """

    chain: Chain
    shape: tuple[int, ...]
    start: Tensor
    opened: Tensor
    pair: Tensor
    emit: Tensor
    ends: Tensor
    inner: tuple[Tensor | None, Tensor | None] = (None, None)
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def count(self) -> int:
        """The number of sequences."""
        return int(torch.Size(self.shape).numel())

    def chains(self, ends: Tensor | None = None) -> Chains:
        """As forward-backward takes them: the plates of sequences as one dim.

        ``ends`` are the steps after the first of each sequence; all of them if it is not given.
        """
        if ends is None:
            ends = torch.full((self.count,), self.chain.length - 1)
        k, count = self.chain.num_states, self.count
        steps = self.chain.length - 1
        start = self.start.expand((*self.shape, k)).reshape(count, k)
        emit = self.emit.expand((steps, *self.shape, k)).reshape(steps, count, k)
        pair = self.pair
        own = pair.shape[1:-2]
        if any(n > 1 for n in own):
            pair = pair.expand((pair.shape[0], *self.shape, k, k))
        pair = pair.reshape(pair.shape[0], -1, k, k)
        start, pair, emit = (x.detach().double() for x in (start, pair, emit))
        return Chains(start, pair, emit, ends)


@dataclass(frozen=True)
class Joined(Potentials):
    """The potentials that factors of a run add up to, and where each factor went."""

    opening: tuple[_Part, ...] = ()
    following: tuple[_Part, ...] = ()


def join(
    structure: Structure, run: Enumerated, tensors: Mapping[str, Tensor], best: bool = False
) -> Iterator[Joined]:
    """The log-probabilities of every chain of a program.

    The assignments inside a step are summed out, or (``best``) put at their most likely states.
    """
    for chain in structure.chains:
        opening = tuple(_part(run, chain, name, first=True) for name in chain.opening)
        following = tuple(_part(run, chain, name, first=False) for name in chain.following)
        first, first_inner = _added(opening, tensors, best)
        later = [p for p in following if not p.pairwise]
        pairs = [p for p in following if p.pairwise]
        inner_pairs = any(p.inner and any(d in p.dims for d in p.inner) for p in pairs)
        if inner_pairs:  # what is summed out hangs on both states
            later, pairs = [], list(following)
        emit, emit_inner = _added(tuple(later), tensors, best)
        pair, pair_inner = _added(tuple(pairs), tensors, best)
        k, rank = chain.num_states, len(chain.plates)
        sizes = run.sizes(chain.step)
        shape = tuple(sizes[p] for p in chain.plates)
        ones = (1,) * rank
        others = tuple(p for p in opening if p.name != chain.first)
        start = first.reshape(first.shape[1 : 1 + rank] + first.shape[2 + rank :])
        opened, _ = _added(others, tensors, best)
        opened = opened.reshape(opened.shape[1 : 1 + rank] + opened.shape[2 + rank :])
        if not later:
            emit = pair.new_zeros((1, *ones, 1, k))
        if not pairs:
            pair = emit.new_zeros((1, *ones, k, k))
        emit = emit.squeeze(1 + rank)
        pair = pair.expand((*pair.shape[:-2], k, k))
        inner = pair_inner if inner_pairs else emit_inner
        inners = (first_inner, inner)
        names = tuple(
            tuple(n for n in sites if n in run.states and n != own)
            for sites, own in ((chain.opening, chain.first), (chain.following, chain.step))
        )
        yield Joined(
            chain,
            shape,
            start,
            opened,
            pair,
            emit,
            lengths(structure, run.trace.nodes, chain),
            inners,
            (names[0], names[1]),
            opening,
            following,
        )


def _part(run: Enumerated, chain: Chain, name: str, first: bool) -> _Part:
    factor = run.factors[name]
    state = run.states[chain.first if first else chain.step]
    # In the first step there is no state before: a symbol that no factor has.
    before = "\0" if first else run.states[chain.first]
    steps = "\1" if first else run.plates[chain.steps]
    plates = "".join(run.plates[p] for p in chain.plates)
    names = chain.opening if first else chain.following
    inner = "".join(run.states[n] for n in names if n in run.states and run.states[n] != state)
    known = steps + plates + before + state + inner
    rest = "".join(d for d in factor.dims if d not in known)
    return _Part(name, factor.dims, steps, plates, before, state, inner, rest)


def _added(
    parts: tuple[_Part, ...], tensors: Mapping[str, Tensor], best: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of factors over steps, plates, state before and state; and with what is inside."""
    if not parts:
        return torch.zeros(()), None
    total = torch.zeros(())
    for part in parts:
        total = total + part.spread(tensors[part.name])
    count = len(parts[0].inner)
    if not count:
        return total, None
    dims = list(range(total.dim() - count, total.dim()))
    return total.amax(dims) if best else torch.logsumexp(total, dims), total


def lengths(structure: Structure, nodes: Mapping[str, Any], chain: Chain) -> Tensor:
    """How many steps after the first each sequence has: up to the last that shows anything.

    What comes later sums to one. Of a sequence of which nothing is seen, -1.
    """
    shape = shape_of(nodes, chain)
    seen = torch.zeros((chain.length, *shape), dtype=torch.bool)
    for names, at in ((chain.opening, slice(0, 1)), (chain.following, slice(1, None))):
        for name in names:
            if name in structure.observations:
                seen[at] |= _seen(nodes[name], chain, at.start == 0)
    flat = seen.reshape(chain.length, -1)
    number = torch.arange(chain.length).unsqueeze(-1)
    return torch.where(flat, number, -1).amax(0)


def shape_of(nodes: Mapping[str, Any], chain: Chain) -> tuple[int, ...]:
    """The sizes of the plates of a chain's sequences."""
    sizes = {f.name: int(f.size) for f in nodes[chain.first]["cond_indep_stack"] if f.vectorized}
    return tuple(sizes[p] for p in chain.plates)


def _seen(node: Any, chain: Chain, first: bool) -> Tensor:
    """Whether anything of an observation is not masked: steps, then the chain's plates."""
    mask = base_mask(node)
    rank = 1 + len(chain.plates)
    if mask is None:
        return torch.ones((1,) * rank, dtype=torch.bool)
    frames = {f.name: f.dim for f in node["cond_indep_stack"] if f.vectorized}
    wanted = [frames[p] for p in ((*chain.plates,) if first else (chain.steps, *chain.plates))]
    declared = unwrap(node["fn"])[1]
    width = max([mask.dim(), *(declared - d for d in wanted)])
    mask = mask.reshape((1,) * (width - mask.dim()) + tuple(mask.shape))
    at = [width - declared + d for d in wanted]
    others = [i for i in range(width) if i not in at]
    found = mask.permute([*at, *others])
    found = found.flatten(len(at)).any(-1) if others else found
    return found.unsqueeze(0) if first else found


def chain_weights(
    structure: Structure,
    run: Enumerated,
    tensors: Mapping[str, Tensor],
    ends: Mapping[str, Tensor],
    row_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-likelihood and its derivative by every factor (packed)."""
    tensors = {name: t.detach() for name, t in tensors.items()}
    value, weights = torch.zeros((), dtype=torch.float64), dict[str, Tensor]()
    for joined in join(structure, run, tensors):
        chain = joined.chain
        own = sequence_weights(structure, chain, joined.shape, row_weights)
        seen = ends[chain.name]
        smoothed = smooth(joined.chains(seen.clamp(min=0)), own * (seen >= 0))
        value = value + (smoothed.log_likelihood * own * (seen >= 0)).sum()
        weights.update(_handed_back(joined, tensors, smoothed))
    for name, factor in run.factors.items():
        if name not in weights:
            weights[name], part = alone(run, structure, name, tensors[name], row_weights)
            value = value + part
        weights[name] = (weights[name] * run.scale).to(factor.tensor.dtype)
    return value * run.scale, weights


def site_weights(
    structure: Structure,
    run: Enumerated,
    row_weights: Tensor | None = None,
    instead: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-likelihood and the posterior weights of every factor, with chains or without.

    ``instead`` are factors in the place of some of the run's own.
    """
    tensors = {**run.tensors(), **(instead or {})}
    if not structure.chains:
        return factor_weights(run, tensors, row_weights=row_weights, unit=structure.unit)
    ends = {chain.name: lengths(structure, run.trace.nodes, chain) for chain in structure.chains}
    return chain_weights(structure, run, tensors, ends, row_weights)


def weights_given(
    structure: Structure,
    run: Enumerated,
    evidence: Mapping[str, Tensor],
    row_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weights of all factors where each assignment's probabilities are given by themselves.

    ``evidence`` has the plates of an assignment, then its states; where it has nothing of an
    assignment, its states are equally likely.
    """
    zeros = {name: torch.zeros_like(f.tensor) for name, f in run.factors.items()}
    weights = {}
    for joined in join(structure, run, zeros):
        chain, k = joined.chain, joined.chain.num_states
        own = sequence_weights(structure, chain, joined.shape, row_weights)
        parts = []
        for z, steps in ((chain.first, 1), (chain.step, chain.length - 1)):
            shape = (steps, own.numel(), k)
            even = torch.full(shape, 1 / k, dtype=own.dtype)
            parts.append(evidence[z].double().reshape(shape) if z in evidence else even)
        states = torch.cat(parts)
        after = states[1:] * own[:, None]
        by_step, by_sequence = joined.pair.shape[0] > 1, any(n > 1 for n in joined.pair.shape[1:-2])
        left = ("t" if by_step else "") + ("n" if by_sequence else "")
        pairs = torch.einsum(f"tni,tnj->{left}ij", states[:-1], after)
        pairs = pairs.reshape(
            chain.length - 1 if by_step else 1, own.numel() if by_sequence else 1, k, k
        )
        sides = zip(joined.inner, (joined.opening, joined.following), strict=True)
        first, later = (
            None if x is None else _log_evidence(run, parts, x, evidence) for x, parts in sides
        )
        joined = replace(joined, inner=(first, later))
        smoothed = Smoothed(torch.zeros_like(own), states * own[:, None], pairs)
        weights.update(_handed_back(joined, zeros, smoothed))
    for name, factor in run.factors.items():
        if name not in weights:
            weights[name], _ = alone(run, structure, name, zeros[name], row_weights)
        weights[name] = (weights[name] * run.scale).to(factor.tensor.dtype)
    return weights


def _log_evidence(
    run: Enumerated, parts: tuple[_Part, ...], inner: Tensor, evidence: Mapping[str, Tensor]
) -> Tensor:
    """What is given of the assignments inside a step, as they are summed out."""
    part, total = parts[0], torch.zeros_like(inner)
    for name, symbol in run.states.items():
        if symbol in part.inner and name in evidence:
            dims = (part.steps if part.steps in run.plates.values() else "") + part.plates + symbol
            wanted = part.order.removesuffix(part.rest)
            total = total + align(evidence[name].log(), dims, wanted)
    return total


def sequence_weights(
    structure: Structure, chain: Chain, shape: tuple[int, ...], row_weights: Tensor | None
) -> Tensor:
    """The row weights of each sequence of a chain."""
    count = int(torch.Size(shape).numel())
    if row_weights is None or not set(structure.unit) <= set(chain.plates):
        return torch.ones(count, dtype=torch.float64)
    order = [structure.unit.index(p) for p in chain.plates if p in structure.unit]
    own = row_weights.double().permute(order)
    sizes = iter(own.shape)
    own = own.reshape([next(sizes) if p in structure.unit else 1 for p in chain.plates])
    return own.expand(shape).reshape(count)


def alone(
    run: Enumerated,
    structure: Structure,
    name: str,
    tensor: Tensor,
    row_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weights of a factor that hangs on no chain, and what it adds to the log-likelihood."""
    factor, sizes = run.factors[name], run.sizes(name)
    weights, weighed = torch.ones_like(tensor), set[str]()
    unit = [run.plates[p] for p in structure.unit]
    if row_weights is not None and unit and set(unit) <= factor.ordinal:
        absent = [i for i, d in enumerate(unit) if d not in factor.dims]
        own = row_weights.sum(absent) if absent else row_weights
        weights = weights * align(own, "".join(d for d in unit if d in factor.dims), factor.dims)
        weighed = set(unit)
    for plate, symbol in run.plates.items():
        if symbol in factor.ordinal and symbol not in factor.dims and symbol not in weighed:
            weights = weights * sizes[plate]
    return weights, (weights * tensor).sum()


def _handed_back(
    joined: Joined, tensors: Mapping[str, Tensor], smoothed: Smoothed
) -> dict[str, Tensor]:
    """The posteriors as the weights of the factors that they came from."""
    chain, shape = joined.chain, joined.shape
    k, ones = chain.num_states, (1,) * len(shape)
    first = smoothed.states[0].reshape((1, *shape, 1, k))
    later = smoothed.states[1:].reshape((chain.length - 1, *shape, 1, k))
    pairs = smoothed.pairs
    whole = pairs.shape[1] > 1
    pairs = pairs.reshape((pairs.shape[0], *(shape if whole else ones), k, k))
    weights = {}
    for parts, inner, single in (
        (joined.opening, joined.inner[0], first),
        (joined.following, joined.inner[1], later),
    ):
        for part in parts:
            pairwise = part.pairwise
            own = pairs if pairwise else single
            if inner is not None:
                own = _with_inner(part, inner, pairs, single, pairwise)
            weights[part.name] = part.gather(own, tensors[part.name])
    return weights


def _with_inner(
    part: _Part, inner: Tensor, pairs: Tensor, single: Tensor, pairwise: bool
) -> Tensor:
    """Weights over the assignments inside the step too: their posterior given the state(s)."""
    count = len(part.inner)
    dims = list(range(inner.dim() - count, inner.dim()))
    total = torch.logsumexp(inner, dims, keepdim=True)
    given = torch.nan_to_num((inner - total).exp(), nan=0.0).double()
    on_pairs = inner.shape[inner.dim() - count - 2] > 1
    outer = pairs if on_pairs or pairwise else single
    outer = outer.reshape((*outer.shape, *(1,) * count))
    if pairwise and not on_pairs:
        return outer  # this factor has nothing of what is inside
    return outer * given
