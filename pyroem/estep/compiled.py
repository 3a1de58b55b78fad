"""Forward-backward and Viterbi, compiled with numba: one pass over the steps, for all sequences.

Every array is in double precision, with the steps first: ``emit[t, n, k]`` is the log-probability
of what was observed at step ``t + 1``, ``pair[t or 0, n or 0, i, j]`` that of state ``j`` after
``i`` (``matrix`` is its exponential, up to ``exp(shift)``), ``start[n, k]`` that of the first
step. Sequence ``n`` has ``ends[n]`` steps after the first.

The quick pass works with probabilities, scaled to one at every step. What it loses below 1e-250
matters only where zeros of the transition matrix can make it the only way on; it says which
sequences those are (``lost``). The careful pass serves them: sums of exponentials relative to the
largest, with one exponential and one logarithm a state, and where such a sum all but vanishes it is
taken again, exactly.

Source: Rabiner (1989) for the scaled recursions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = Any  # numba compiles for the types that it is given
TINY = 1e-200  # of sums: what was lost of them below 1e-308 is nothing beside
LOST = 1e-250  # of probabilities
HUGE = 1e250
QUICK = {"reassoc", "contract", "nsz", "arcp"}


@njit(nogil=True, cache=True, error_model="numpy", fastmath=QUICK)
def quick_forward(
    start: Array,
    matrix: Array,
    likelihood: Array,
    offsets: Array,
    ends: Array,
    strict: bool,
    ahead: Array,
    scale: Array,
    lost: Array,
) -> None:  # pragma: no cover  (compiled)
    """``ahead``: the state's probabilities given all up to there; ``scale`` what they summed to.

    Rows stand step by step: those of the first step, and from ``offsets[t]`` after them on those of
    step ``t + 1``, one for each of the first sequences. ``likelihood`` is ``exp(emit)``, up to a
    factor; where the matrix has zeros (``strict``) it is watched what gets ``lost``.
    """
    sequences, states = start.shape
    by_step, by_sequence = matrix.shape[0] > 1, matrix.shape[1] > 1
    s = np.empty(states)
    for n in range(sequences):
        total = 0.0
        for k in range(states):
            total += start[n, k]
        for k in range(states):
            ahead[n, k] = start[n, k] / total
        scale[n] = total
        lost[n] = not total > LOST
    for t in range(len(offsets) - 1):
        first, last = offsets[t], sequences + offsets[t - 1] if t > 0 else 0
        for n in range(offsets[t + 1] - first):
            now, own = ahead[sequences + first + n], likelihood[first + n]
            if t >= ends[n]:
                scale[sequences + first + n] = 1.0
                continue
            a, before = matrix[t if by_step else 0, n if by_sequence else 0], ahead[last + n]
            for j in range(states):
                s[j] = 0.0
            for i in range(states):
                p = before[i]
                for j in range(states):
                    s[j] += p * a[i, j]
            total = 0.0
            for j in range(states):
                now[j] = s[j] * own[j]
                total += now[j]
            if not total > LOST:
                lost[n] = True
            if strict:
                for j in range(states):
                    if s[j] > 0 and now[j] < LOST * total:
                        lost[n] = True
            r = 1.0 / total
            for j in range(states):
                now[j] *= r
            scale[sequences + first + n] = total


@njit(nogil=True, cache=True, error_model="numpy", fastmath=QUICK)
def quick_backward(
    matrix: Array,
    likelihood: Array,
    offsets: Array,
    ends: Array,
    weights: Array,
    scale: Array,
    ahead: Array,
    xi: Array,
    lost: Array,
) -> None:  # pragma: no cover  (compiled)
    """Turn ``ahead`` into the posterior of each step's state, times the sequence's weight.

    The posteriors of pairs are added to ``xi``. Sequences that are ``lost`` are left alone.
    """
    sequences, states = len(ends), ahead.shape[1]
    by_step, by_sequence = matrix.shape[0] > 1, matrix.shape[1] > 1
    out_step, out_sequence = xi.shape[0] > 1, xi.shape[1] > 1
    behind = np.ones((sequences, states))
    u = np.empty(states)
    for t in range(len(offsets) - 2, -1, -1):
        first, last = offsets[t], sequences + offsets[t - 1] if t > 0 else 0
        for n in range(offsets[t + 1] - first):
            after = ahead[sequences + first + n]
            if t >= ends[n] or lost[n]:
                for j in range(states):
                    after[j] = 0.0
                continue
            a = matrix[t if by_step else 0, n if by_sequence else 0]
            here = xi[t if out_step else 0, n if out_sequence else 0]
            before, own = ahead[last + n], likelihood[first + n]
            back, w, r = behind[n], weights[n], 1.0 / scale[sequences + first + n]
            for j in range(states):
                after[j] *= back[j] * w
                u[j] = own[j] * back[j] * r
            for i in range(states):
                p, total = before[i] * w, 0.0
                for j in range(states):
                    v = a[i, j] * u[j]
                    total += v
                    here[i, j] += p * v
                back[i] = total
    for n in range(sequences):
        for k in range(states):
            ahead[n, k] *= behind[n, k] * weights[n]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=QUICK)
def overflown(
    matrix: Array, likelihood: Array, offsets: Array, ends: Array, scale: Array, lost: Array
) -> None:  # pragma: no cover  (compiled)
    """Which sequences a state that cannot be reached would overflow, behind it (``lost``)."""
    sequences, states = len(ends), likelihood.shape[1]
    by_step, by_sequence = matrix.shape[0] > 1, matrix.shape[1] > 1
    behind, u = np.ones((sequences, states)), np.empty(states)
    for t in range(len(offsets) - 2, -1, -1):
        first = offsets[t]
        for n in range(offsets[t + 1] - first):
            if t >= ends[n] or lost[n]:
                continue
            a = matrix[t if by_step else 0, n if by_sequence else 0]
            back, own, r = behind[n], likelihood[first + n], 1.0 / scale[sequences + first + n]
            for j in range(states):
                u[j] = own[j] * back[j] * r
            for i in range(states):
                total = 0.0
                for j in range(states):
                    total += a[i, j] * u[j]
                back[i] = total
                if not total < HUGE:
                    lost[n] = True


@njit(nogil=True, cache=True, error_model="numpy")
def add_lowered(
    scale: Array, top: Array, shift: Array, offsets: Array, ends: Array, value: Array
) -> None:  # pragma: no cover  (compiled)
    """Add to ``value[n]`` the logarithms of what the steps of a sequence were divided by."""
    sequences, lost = len(ends), np.zeros(len(ends))
    by_step, by_sequence = shift.shape[0] > 1, shift.shape[1] > 1
    for n in range(sequences):
        value[n] += np.log(scale[n])
    for t in range(len(offsets) - 1):
        first = offsets[t]
        for n in range(offsets[t + 1] - first):
            if t < ends[n]:
                own = np.log(scale[sequences + first + n]) + top[first + n]
                own += shift[t if by_step else 0, n if by_sequence else 0] - lost[n]
                # Kahan's sum: over a million steps the digits that are lost would show.
                grown = value[n] + own
                lost[n] = (grown - value[n]) - own if np.isfinite(grown) else 0.0
                value[n] = grown


@njit(nogil=True, cache=True, error_model="numpy")
def _scores(values: Array, out: Array) -> float:  # pragma: no cover  (compiled)
    """``exp(values - largest)`` into ``out``; returns the largest."""
    top = -np.inf
    for value in values:
        top = max(top, value)
    if top == -np.inf:
        out[:] = 0.0
        return top
    for k in range(len(values)):
        out[k] = np.exp(values[k] - top)
    return top


@njit(nogil=True, cache=True, error_model="numpy")
def _exactly(values: Array, edges: Array) -> float:  # pragma: no cover  (compiled)
    """``logsumexp(values + edges)``."""
    top = -np.inf
    for i in range(len(values)):
        top = max(top, values[i] + edges[i])
    if not top > -np.inf:
        return top
    total = 0.0
    for i in range(len(values)):
        total += np.exp(values[i] + edges[i] - top)
    return top + np.log(total)


@njit(nogil=True, cache=True, error_model="numpy")
def forward(
    start: Array, pair: Array, matrix: Array, shift: Array, emit: Array, ends: Array, ahead: Array
) -> Array:  # pragma: no cover  (compiled)
    """``ahead[t, n, :]``: log-probabilities of the state at ``t`` and all up to there, less the
    largest. Returns the log-likelihood of each sequence.
    """
    sequences, states = start.shape
    by_step, by_sequence = pair.shape[0] > 1, pair.shape[1] > 1
    total, lost = np.zeros(sequences), np.zeros(sequences)
    p, s = np.empty(states), np.empty(states)
    for n in range(sequences):
        top = -np.inf
        for k in range(states):
            top = max(top, start[n, k])
        total[n] = top
        for k in range(states):
            ahead[0, n, k] = start[n, k] - top if top > -np.inf else -np.inf
    longest = 0
    for n in range(sequences):
        longest = max(longest, ends[n])
    for t in range(longest):
        for n in range(sequences):
            if t >= ends[n]:
                continue
            m1, m2 = t if by_step else 0, n if by_sequence else 0
            before, now = ahead[t, n], ahead[t + 1, n]
            a, c = matrix[m1, m2], shift[m1, m2]
            for k in range(states):
                p[k] = np.exp(before[k])
                s[k] = 0.0
            for i in range(states):
                if p[i] > 0:
                    for j in range(states):
                        s[j] += p[i] * a[i, j]
            top = -np.inf
            for j in range(states):
                if s[j] > TINY:
                    now[j] = np.log(s[j]) + c + emit[t, n, j]
                else:
                    now[j] = _exactly(before, pair[m1, m2, :, j]) + emit[t, n, j]
                if np.isnan(now[j]):
                    top = np.nan
                top = max(top, now[j])
            # Kahan's sum: over a million steps the digits that are lost would show.
            step = top - lost[n]
            grown = total[n] + step
            lost[n] = (grown - total[n]) - step if np.isfinite(grown) else 0.0
            total[n] = grown
            for j in range(states):
                now[j] = now[j] - top if top > -np.inf else -np.inf
    for n in range(sequences):
        last, rest = ahead[ends[n], n], 0.0
        for k in range(states):
            rest += np.exp(last[k])
        total[n] = total[n] + np.log(rest) if total[n] > -np.inf else total[n]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def backward(
    pair: Array,
    matrix: Array,
    shift: Array,
    emit: Array,
    ends: Array,
    weights: Array,
    ahead: Array,
    xi: Array,
) -> None:  # pragma: no cover  (compiled)
    """Turn ``ahead`` into the posterior of each step's state, times the sequence's weight.

    The posteriors of pairs are added to ``xi``, which has the steps and the sequences or not.
    """
    sequences, states = ends.shape[0], emit.shape[2]
    by_step, by_sequence = pair.shape[0] > 1, pair.shape[1] > 1
    out_step, out_sequence = xi.shape[0] > 1, xi.shape[1] > 1
    behind = np.zeros((sequences, states))
    p, q, s, u = np.empty(states), np.empty(states), np.empty(states), np.empty(states)
    longest = ahead.shape[0] - 1
    for n in range(sequences):
        last = ahead[ends[n], n]
        total = 0.0
        for k in range(states):
            total += np.exp(last[k])
        for k in range(states):
            # Of the last step the posterior is known; of the others it follows from the next.
            s[k] = np.exp(last[k]) / total if total > 0 else 0.0
        for t in range(ends[n] + 1, longest + 1):
            ahead[t, n] = 0.0
        if ends[n] == 0:
            ahead[0, n] = s * weights[n]
    for t in range(longest - 1, -1, -1):
        for n in range(sequences):
            if t >= ends[n]:
                continue
            m1, m2 = t if by_step else 0, n if by_sequence else 0
            before, back = ahead[t, n], behind[n]
            a, c, w = matrix[m1, m2], shift[m1, m2], weights[n]
            for k in range(states):
                u[k] = emit[t, n, k] + back[k]
            high = _scores(u, q)
            total = 0.0
            for j in range(states):
                s[j] = 0.0
            for i in range(states):
                p[i] = np.exp(before[i])
                if p[i] > 0:
                    for j in range(states):
                        s[j] += p[i] * a[i, j]
            for j in range(states):
                s[j] *= q[j]
                total += s[j]
            here = xi[t if out_step else 0, n if out_sequence else 0]
            after = ahead[t + 1, n]
            if total > TINY:
                share = w / total
                for j in range(states):
                    after[j] = s[j] * share
                for i in range(states):
                    if p[i] > 0:
                        own = p[i] * share
                        for j in range(states):
                            here[i, j] += own * a[i, j] * q[j]
            else:
                exact = pair[m1, m2]
                top = -np.inf
                for j in range(states):
                    s[j] = _exactly(before, exact[:, j]) + u[j]
                    top = max(top, s[j])
                total = 0.0
                for j in range(states):
                    total += np.exp(s[j] - top)
                size = top + np.log(total)
                for j in range(states):
                    after[j] = w * np.exp(s[j] - size) if top > -np.inf else 0.0
                    for i in range(states):
                        if top > -np.inf:
                            here[i, j] += w * np.exp(before[i] + exact[i, j] + u[j] - size)
            largest = -np.inf
            for i in range(states):
                total = 0.0
                for j in range(states):
                    total += a[i, j] * q[j]
                if total > TINY:
                    back[i] = np.log(total) + c + high
                else:
                    back[i] = _exactly(u, pair[m1, m2, i])
                largest = max(largest, back[i])
            for i in range(states):
                back[i] = back[i] - largest if largest > -np.inf else -np.inf
            if t == 0:
                total, top = 0.0, -np.inf
                for k in range(states):
                    u[k] = before[k] + back[k]
                top = _scores(u, q)
                for k in range(states):
                    total += q[k]
                for k in range(states):
                    before[k] = w * q[k] / total if top > -np.inf else 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def best_path(
    start: Array, pair: Array, emit: Array, ends: Array, path: Array, came: Array
) -> None:  # pragma: no cover  (compiled)
    """The most probable states of each sequence into ``path[t, n]`` (Viterbi)."""
    sequences, states = start.shape
    by_step, by_sequence = pair.shape[0] > 1, pair.shape[1] > 1
    now, then = np.empty(states), np.empty(states)
    for n in range(sequences):
        now[:] = start[n]
        for t in range(ends[n]):
            edges = pair[t if by_step else 0, n if by_sequence else 0]
            for j in range(states):
                best, origin = -np.inf, 0
                for i in range(states):
                    value = now[i] + edges[i, j]
                    if value > best:
                        best, origin = value, i
                then[j], came[t, j] = best + emit[t, n, j], origin
            now[:] = then
        state = int(np.argmax(now))
        path[ends[n], n] = state
        for t in range(ends[n] - 1, -1, -1):
            state = came[t, state]
            path[t, n] = state


@njit(nogil=True, cache=True, error_model="numpy")
def draw_paths(
    first: Array, later: Array, uniform: Array, path: Array
) -> None:  # pragma: no cover  (compiled)
    """States into ``path[t, n]``, from cumulative probabilities and uniform draws."""
    steps, sequences = path.shape
    states = first.shape[1]
    by_step, by_sequence = later.shape[0] > 1, later.shape[1] > 1
    for t in range(steps):
        for n in range(sequences):
            state = 0
            if t == 0:
                while state < states - 1 and first[n, state] < uniform[t, n]:
                    state += 1
            else:
                row = later[t - 1 if by_step else 0, n if by_sequence else 0, path[t - 1, n]]
                while state < states - 1 and row[state] < uniform[t, n]:
                    state += 1
            path[t, n] = state
