"""Forward-backward over chains: the posterior of every state and of every pair of neighbours.

With ``a_t(k) = log p(state k at t, all seen up to t)`` and ``b_t(k) = log p(all seen after t |
state k at t)``, the posterior of a state is ``softmax(a_t + b_t)`` and that of a pair
``a_t(i) + A_t(i, j) + e_{t+1}(j) + b_{t+1}(j)``, normalised.

Compiled with numba on the processor, where it is installed. Otherwise in torch: a long chain is cut
into blocks of about the square root of its length; the transfer matrices of all blocks are found
side by side, then (by the same way, recursively) the states at the blocks' ends, then all within
the blocks. No loop runs over more than a few hundred steps.

Source: Rabiner (1989); Saerkkae and Garcia-Fernandez (2021) for the parallel scan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

compiled: Any
try:
    from pyroem.estep import compiled
except ImportError:  # numba is an extra
    compiled = None

TINY = 1e-200
STRICT = 1e-100  # of the entries of a transition matrix: below, what is lost may matter
LOOP = 128  # steps that torch takes one by one


@dataclass(frozen=True)
class Chains:
    """Log-probabilities of ``N`` sequences with ``K`` states and up to ``T + 1`` steps.

    ``start`` (N, K) is of the first step; ``pair`` (T or 1, N or 1, K, K) of a step's state after
    that before; ``emit`` (T, N, K) of what was seen at a step. Sequence ``n`` has ``ends[n]`` steps
    after the first. With ``offsets`` (T + 1) the sequences stand by falling length, and ``emit``
    has rows only for those that go on: those of step ``t + 1`` from ``offsets[t]`` on.
    """

    start: Tensor
    pair: Tensor
    emit: Tensor
    ends: Tensor
    offsets: Tensor | None = None


@dataclass(frozen=True)
class Smoothed:
    """Posteriors: of states (T + 1, N, K), of pairs (summed where ``pair`` has one), times weights.

    With offsets, those of the states are the N rows of the first step and then those of ``emit``.
    ``log_likelihood`` (N) is not weighted.
    """

    log_likelihood: Tensor
    states: Tensor
    pairs: Tensor


def smooth(chains: Chains, weights: Tensor, fast: bool = True) -> Smoothed:
    """Forward-backward, linear in the number of steps."""
    if fast and compiled is not None and chains.emit.device.type == "cpu":
        return _compiled(chains, weights)
    if chains.offsets is None:
        return _in_torch(chains, weights)
    step, sequence = places(chains.offsets)
    found = _in_torch(_dense(chains, step, sequence), weights)
    return replace(found, states=torch.cat([found.states[0], found.states[step + 1, sequence]]))


def places(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The step (after the first) and the sequence of each row."""
    counts = offsets.diff()
    step = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    row = torch.arange(int(offsets[-1]), device=counts.device)
    return step, row - offsets[:-1].repeat_interleave(counts)


def _dense(chains: Chains, step: Tensor, sequence: Tensor) -> Chains:
    """The same with a row for every step of every sequence."""
    assert chains.offsets is not None
    shape = (len(chains.offsets) - 1, len(chains.start), chains.emit.shape[-1])
    emit = chains.emit.new_zeros(shape)
    emit[step, sequence] = chains.emit
    return Chains(chains.start, chains.pair, emit, chains.ends)


def best_path(chains: Chains, fast: bool = True) -> Tensor:
    """The most probable states of every sequence (T + 1, N): Viterbi's algorithm."""
    steps, sequences, states = chains.emit.shape
    start, pair, emit = (x.contiguous().cpu() for x in (chains.start, chains.pair, chains.emit))
    path = torch.zeros((steps + 1, sequences), dtype=torch.int64)
    if fast and compiled is not None:
        came = torch.empty((steps, states), dtype=torch.int64)
        ends = chains.ends.cpu().contiguous()
        numbers = [x.numpy() for x in (start, pair, emit, ends, path, came)]
        compiled.best_path(*numbers)
        return path
    now, origins = start, []
    active = torch.arange(steps).unsqueeze(-1) < chains.ends.cpu()
    for t in range(steps):
        values = now.unsqueeze(-1) + pair[t if pair.shape[0] > 1 else 0]
        found, origin = values.max(-2)
        stay = ~active[t].unsqueeze(-1)
        now = torch.where(stay, now, found + emit[t])
        origins.append(torch.where(stay, torch.arange(states), origin))
    state = now.argmax(-1)
    path[steps] = state
    for t in reversed(range(steps)):
        state = origins[t].gather(-1, state.unsqueeze(-1)).squeeze(-1)
        path[t] = state
    return path


def _compiled(chains: Chains, weights: Tensor) -> Smoothed:
    own = chains.start, chains.pair, chains.emit
    start, pair, emit = (x.double().contiguous() for x in own)
    (sequences, states), dense = start.shape, chains.offsets is None
    offsets = chains.offsets
    if offsets is None:
        offsets = torch.arange(len(emit) + 1) * sequences
        emit = emit.reshape(-1, states)
    matrix, shift = _scaled(pair)
    top, first = _finite(emit.amax(-1)), _finite(start.amax(-1))
    likelihood = (emit - top.unsqueeze(-1)).exp_()
    strict = bool((matrix < STRICT).any())
    rows = sequences + len(emit)
    ahead = torch.empty((rows, states), dtype=torch.float64)
    scale = torch.empty(rows, dtype=torch.float64)
    lost = torch.zeros(sequences, dtype=torch.bool)
    ends, w = chains.ends.contiguous(), weights.to(torch.float64).contiguous()
    xi = torch.zeros_like(pair)
    numbers = [x.numpy() for x in (matrix, likelihood, offsets, ends)]
    opening = (start - first.unsqueeze(-1)).exp().numpy()
    compiled.quick_forward(opening, *numbers, strict, ahead.numpy(), scale.numpy(), lost.numpy())
    if strict:
        compiled.overflown(*numbers, scale.numpy(), lost.numpy())
    compiled.quick_backward(
        *numbers, w.numpy(), scale.numpy(), ahead.numpy(), xi.numpy(), lost.numpy()
    )
    value = first.clone()
    compiled.add_lowered(*(x.numpy() for x in (scale, top, shift[..., 0, 0], offsets, ends, value)))
    if lost.any():
        step, sequence = places(offsets)
        index = lost.nonzero().reshape(-1)
        whole = _dense(replace(chains, emit=emit, offsets=offsets), step, sequence)
        few = Chains(
            start[index],
            pair if pair.shape[1] == 1 else pair[:, index].contiguous(),
            whole.emit[:, index].contiguous(),
            ends[index],
        )
        careful = _careful(few, w[index])
        value[index], ahead[index] = careful.log_likelihood, careful.states[0]
        number = torch.full((sequences,), -1).scatter_(0, index, torch.arange(len(index)))
        mine = number[sequence] >= 0
        ahead[sequences:][mine] = careful.states[step[mine] + 1, number[sequence[mine]]]
        if pair.shape[1] == 1:
            xi += careful.pairs
        else:
            xi[:, index] = careful.pairs
    return Smoothed(value, ahead.reshape(-1, sequences, states) if dense else ahead, xi)


def _careful(chains: Chains, weights: Tensor) -> Smoothed:
    matrix, shift = _scaled(chains.pair)
    steps, sequences, states = chains.emit.shape
    ahead = torch.empty((steps + 1, sequences, states), dtype=torch.float64)
    xi = torch.zeros_like(chains.pair)
    shift = shift[..., 0, 0]
    numbers = [x.numpy() for x in (chains.pair, matrix, shift, chains.emit, chains.ends)]
    value = compiled.forward(chains.start.numpy(), *numbers, ahead.numpy())
    compiled.backward(*numbers, weights.numpy(), ahead.numpy(), xi.numpy())
    return Smoothed(torch.from_numpy(value), ahead, xi)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _scaled(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Transition matrices, each up to a factor, and the logarithms of the factors."""
    shift = _finite(pair.amax((-1, -2), keepdim=True))
    return (pair - shift).exp(), shift


# ---------------------------------------------------------------------------------------
# In torch, for any device


def recursions(chains: Chains) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``a_t`` and ``b_t``, ``e_{t+1} + b_{t+1}`` (each up to a number a step), log-likelihoods."""
    start, pair, emit = chains.start, chains.pair, chains.emit
    steps = emit.shape[0]
    active = torch.arange(steps, device=emit.device).unsqueeze(-1) < chains.ends
    seen = torch.where(active.unsqueeze(-1), emit, 0.0)
    ahead, grown = _sweep(start, pair, seen, active)
    value = grown.sum(0) + ahead[-1].logsumexp(-1)
    if not steps:
        return ahead, torch.zeros_like(ahead), seen, value
    # From the end: what was seen at t + 1 and after, given the state there.
    later = torch.cat([seen.flip(0)[1:], torch.zeros_like(seen[:1])])
    behind, _ = _sweep(seen[-1], pair.flip(0).mT, later, active.flip(0))
    from_next = behind[:-1].flip(0)
    matrix, shift = _scaled(pair)
    back = _advance(from_next.unsqueeze(-2), pair.mT, matrix.mT, shift).squeeze(-2)
    back = torch.where(active.unsqueeze(-1), back, 0.0)
    return ahead, torch.cat([back, torch.zeros_like(seen[:1])]), from_next, value


def filtering(chains: Chains) -> tuple[Tensor, Tensor]:
    """``a_t`` (up to a number for each step), and the log-likelihoods, of whole sequences."""
    active = torch.ones(chains.emit.shape[:2], dtype=torch.bool, device=chains.emit.device)
    ahead, grown = _sweep(chains.start, chains.pair, chains.emit, active)
    return ahead, grown.sum(0) + ahead[-1].logsumexp(-1)


def predicted(ahead: Tensor, chains: Chains) -> Tensor:
    """``log p(state at t | seen before t)``, from ``a_t`` of the steps before; not of the first."""
    before = ahead[:-1].log_softmax(-1)
    matrix, shift = _scaled(chains.pair)
    return _advance(before.unsqueeze(-2), chains.pair, matrix, shift).squeeze(-2).log_softmax(-1)


def draw_paths(start: Tensor, pair: Tensor, steps: int) -> Tensor:
    """States of chains (T + 1, N), drawn step by step."""
    sequences = len(start)
    uniform = torch.rand((steps + 1, sequences), dtype=torch.float64)
    first, later = start.softmax(-1).cumsum(-1), pair.softmax(-1).cumsum(-1).contiguous()
    path = torch.zeros((steps + 1, sequences), dtype=torch.int64)
    if compiled is not None:
        compiled.draw_paths(*(x.numpy() for x in (first.contiguous(), later, uniform, path)))
        return path
    most = pair.shape[-1] - 1
    path[0] = (first < uniform[0].unsqueeze(-1)).sum(-1).clamp(max=most)
    for t in range(steps):
        rows = later[t if later.shape[0] > 1 else 0].expand(sequences, -1, -1)
        row = rows[torch.arange(sequences), path[t]]
        path[t + 1] = (row < uniform[t + 1].unsqueeze(-1)).sum(-1).clamp(max=most)
    return path


def _in_torch(chains: Chains, weights: Tensor) -> Smoothed:
    ahead, behind, from_next, value = recursions(chains)
    steps = len(ahead) - 1
    states = _normalised(ahead + behind) * weights[:, None]
    if not steps:
        return Smoothed(value, states, torch.zeros_like(chains.pair))
    active = torch.arange(steps, device=states.device).unsqueeze(-1) < chains.ends
    states[1:] = torch.where(active.unsqueeze(-1), states[1:], 0.0)
    w = torch.where(active, weights, 0.0)
    return Smoothed(value, states, _pairs(ahead[:-1], chains.pair, from_next, w))


def _normalised(x: Tensor) -> Tensor:
    return torch.nan_to_num((x - _finite(x.logsumexp(-1, keepdim=True))).exp(), nan=0.0)


def _pairs(ahead: Tensor, pair: Tensor, behind: Tensor, weights: Tensor) -> Tensor:
    """The weighted posteriors of pairs; their sum over what ``pair`` does not differ along."""
    matrix, _ = _scaled(pair)
    p = (ahead - _finite(ahead.amax(-1, keepdim=True))).exp()
    q = (behind - _finite(behind.amax(-1, keepdim=True))).exp()
    reached = (p.unsqueeze(-2) @ matrix).squeeze(-2)
    total = (reached * q).sum(-1)
    low = (total < TINY) & (weights > 0)
    share = torch.where(low, 0.0, weights / total.clamp(min=TINY))
    p = p * share.unsqueeze(-1)
    by_step, by_sequence = pair.shape[0] > 1, pair.shape[1] > 1
    t, n = "t" if by_step else "", "n" if by_sequence else ""
    xi = torch.einsum(f"tni,tnj->{t}{n}ij", p, q).reshape(pair.shape) * matrix
    if low.any():
        exact = ahead.unsqueeze(-1) + pair + behind.unsqueeze(-2)
        own = _normalised(exact.flatten(2)).reshape(exact.shape)
        own = own * torch.where(low, weights, 0.0)[..., None, None]
        away = [d for d, kept in ((0, by_step), (1, by_sequence)) if not kept]
        xi = xi + (own.sum(away, keepdim=True) if away else own)
    return xi


def _advance(values: Tensor, pair: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """``logsumexp_i(values_i + pair_ij)`` for rows of values: a product of matrices."""
    top = _finite(values.amax(-1, keepdim=True))
    total = (values - top).exp() @ matrix
    found = total.log() + top + shift
    low = total < TINY
    if low.any():
        found = torch.where(low, _logsumexp(values.unsqueeze(-1) + pair.unsqueeze(-3)), found)
    return found


def _logsumexp(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.logsumexp(-2), nan=-torch.inf) if x.isnan().any() else x.logsumexp(-2)


def _sweep(start: Tensor, pair: Tensor, emit: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The values after every step (from the start on), and by how much they were lowered.

    A step is ``values -> logsumexp(values + pair) + emit``, and ``values + emit`` where it is not
    ``active``.
    """
    steps, sequences, states = emit.shape
    if steps <= LOOP or sequences * states >= 32 * steps:
        return _loop(start.unsqueeze(-2), pair, emit.unsqueeze(-2), active)
    length = math.isqrt(steps) + 1
    count = -(-steps // length)
    pad = count * length - steps

    def cut(x: Tensor, filling: float) -> Tensor:
        if x.shape[0] == 1 and steps > 1:
            return x.unsqueeze(0)
        rest = x.new_full((pad, *x.shape[1:]), filling)
        return torch.cat([x, rest]).reshape(count, length, *x.shape[1:]).movedim(1, 0)

    # Blocks are taken for sequences: their number comes before that of the sequences.
    pairs, emits, actives = cut(pair, 0.0), cut(emit, 0.0), cut(active, 0)
    identity = torch.full((states, states), -torch.inf).to(emit).fill_diagonal_(0.0)
    rows = identity.expand(count, sequences, states, states)
    ends = _last(rows, pairs, emits.unsqueeze(-2), actives)
    borders, _ = _sweep(
        start, ends, emit.new_zeros((count, sequences, states)), active.new_ones(count, sequences)
    )
    inside, grown = _loop(borders[:-1].unsqueeze(-2), pairs, emits.unsqueeze(-2), actives)
    first = inside[0, 0]
    after = inside[1:].movedim(0, 1).reshape(count * length, sequences, states)[:steps]
    lowered = grown[1:].movedim(0, 1).reshape(count * length, sequences)[:steps]
    top = _finite(start.amax(-1))
    return torch.cat([first.unsqueeze(0), after]), torch.cat([top.unsqueeze(0), lowered])


def _steps(
    values: Tensor, pair: Tensor, emit: Tensor, active: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of values (..., rows, states) after each step, and by how much they were lowered."""
    matrix, shift = _scaled(pair)
    for t in range(emit.shape[0]):
        at = t if pair.shape[0] > 1 else 0
        new = _advance(values, pair[at], matrix[at], shift[at])
        values = torch.where(active[t][..., None, None], new, values) + emit[t]
        top = _finite(values.amax(-1, keepdim=True))
        values = values - top
        yield values, top


def _loop(values: Tensor, pair: Tensor, emit: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The steps one after the other, for rows of values (..., 1, states)."""
    top = _finite(values.amax(-1, keepdim=True))
    first = values - top
    found, lowered = zip((first, top), *_steps(first, pair, emit, active), strict=True)
    return torch.stack(found).squeeze(-2), torch.stack(lowered).squeeze(-1).squeeze(-1)


def _last(values: Tensor, pair: Tensor, emit: Tensor, active: Tensor) -> Tensor:
    """The transfer matrices of blocks: what rows of values become, less one number for each block.

    Rows differ in how far they were lowered, so that cannot be left out.
    """
    found, lowered = zip(*_steps(values, pair, emit, active), strict=True)
    values = found[-1] + torch.stack(lowered).sum(0)
    return values - _finite(values.amax((-1, -2), keepdim=True))
