"""Loops over time that are read as one step: which they are, and the chains in them.

The sites of the first step and those of all others (in one plate of steps) make a chain where the
assignment of a step depends on that of the step before, and on no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pyroem._pyro import (
    Brief,
    Enumerated,
    Jump,
    Loop,
    LoopError,
    Loops,
    Program,
    Reader,
    Site,
    Values,
    Whole,
    align,
    enumerated,
    is_deterministic,
    is_plate_site,
    plate_frames,
    step_of,
)
from pyroem.structure import Chain, Parameter, quoted

FIRST = 24  # steps of a loop that are compared with those that ran as one
ALMOST = 1e-8


def loops_as_one(loops: Sequence[Loop], nesting: int, some: int | None = None) -> Loops:
    """The loops of a program, to be run for all steps at once, or for about ``some`` of each.

    Raises:
    ------
    LoopError
        Where one of them cannot.
    """
    for loop in loops:
        if loop.reason:
            raise LoopError(loop.reason)
        if loop.length < 2:
            raise LoopError("it has one step only")
    lengths = tuple(loop.length for loop in loops)
    steps = torch.arange(1, max(3, *lengths))
    if some is not None and len(steps) > some:
        generator = torch.Generator().manual_seed(0)
        parts = [torch.arange(1, FIRST)]
        for length in sorted(set(lengths)):
            drawn = torch.randint(1, max(length, 2), (some,), generator=generator)
            parts += [drawn, torch.tensor([max(length - 1, 1)])]
        steps = torch.cat(parts).unique()
    return Loops(lengths, -1 - nesting, steps)


@dataclass(frozen=True)
class _Sites:
    """The factor sites of one loop, in its first step and in the others."""

    opening: list[str]
    following: list[str]


def find_chains(run: Enumerated, assignments: Iterable[str], loops: Loops) -> tuple[Chain, ...]:
    """The chains of a program whose loops ran for all steps at once.

    Raises:
    ------
    LoopError
        Where its sites are more than chains.
    """
    assignments = set(assignments)
    symbols = {s: z for z, s in run.states.items()}
    touched = {n: {symbols[d] for d in f.dims if d in symbols} for n, f in run.factors.items()}
    nodes, chains = run.trace.nodes, list[Chain]()
    sites = [_Sites([], []) for _ in loops.lengths]
    for name in run.factors:
        at = step_of(nodes[name])
        if at is None:
            if touched[name] or name in assignments:
                what = f"depends on {quoted(sorted(touched[name] - {name}))}"
                what = "is an assignment" if name in assignments else what
                raise LoopError(f"site '{name}', outside the loop, {what}")
            continue
        own = sites[at[0]]
        (own.following if at[1] else own.opening).append(name)
    for number, own in enumerate(sites):
        for name in (*own.opening, *own.following):
            foreign = touched[name] - {*own.opening, *own.following}
            if foreign:
                raise LoopError(f"site '{name}' depends on {quoted(foreign)}, outside its loop")
        chains += _chains_of(run, own, touched, loops, number)
    return tuple(_named_apart(chains))


def _named_apart(chains: list[Chain]) -> Iterator[Chain]:
    """The chains, under their full names where the short ones are not theirs alone."""
    names = [chain.name for chain in chains]
    for chain in chains:
        own = chain.name if names.count(chain.name) == 1 else chain.first
        yield replace(chain, name=own)


def _chains_of(
    run: Enumerated, sites: _Sites, touched: Mapping[str, set[str]], loops: Loops, number: int
) -> list[Chain]:
    first = [n for n in sites.opening if n in run.states]
    later = [n for n in sites.following if n in run.states]
    pairs = pairs_by_name(first, later)
    if not len(pairs) == len(first) == len(later):
        raise LoopError(
            f"its first step has assignments {quoted(first) or 'none'}, the next {quoted(later)}"
        )
    if not pairs:
        raise LoopError("it has no assignment")
    first, later = [a for a, _ in pairs], [b for _, b in pairs]
    place = {name: i for names in (first, later) for i, name in enumerate(names)}
    groups: list[set[int]] = [{i} for i in range(len(first))]
    for name in (*sites.opening, *sites.following):
        linked = {place[z] for z in touched[name]}
        together = [g for g in groups if g & linked]
        if len(together) > 1:
            groups = [g for g in groups if not g & linked] + [set().union(*together)]
    past = {place[z] for name in sites.following for z in touched[name] if z in first}
    chains, nodes = [], run.trace.nodes
    for group in groups:
        roots = [i for i in sorted(group) if i in past]
        if len(roots) > 1:
            both = quoted(first[i] for i in roots)
            raise LoopError(f"{both} are carried from step to step together")
        # Without a dependence on the step before, the steps are independent: a simple chain.
        root = roots[0] if roots else min(group)
        a, b = first[root], later[root]
        steps = loops.plate(number).name
        plates = [tuple(p for p in _plates(nodes[z]) if p != steps) for z in (a, b)]
        names = {first[i] for i in group} | {later[i] for i in group}
        for z in names:
            if tuple(p for p in _plates(nodes[z]) if p != steps) != plates[0]:
                raise LoopError(f"'{z}' does not stand in the plates of '{a}'")
        if touched[b] - {a, b} or touched[a] - {a}:
            other = quoted(sorted((touched[b] | touched[a]) - {a, b}))
            raise LoopError(f"'{b}' depends on {other} too")
        values = [nodes[z]["value"].reshape(-1) for z in (a, b)]
        if not torch.equal(*values):
            raise LoopError(f"'{a}' and '{b}' have different states")
        chains.append(
            Chain(
                stem(a, b),
                a,
                b,
                _states(run, a),
                loops.lengths[number],
                steps,
                plates[0],
                tuple(n for n in sites.opening if touched[n] & names),
                tuple(n for n in sites.following if touched[n] & names),
                tuple((first[i], later[i]) for i in sorted(group) if i != root),
                bool(roots),
            )
        )
    if not chains:
        raise LoopError("it has no assignment")
    return chains


def _plates(site: Site) -> tuple[str, ...]:
    frames = sorted(plate_frames(site), key=lambda f: f.dim or 0)
    return tuple(f.name for f in frames if f.vectorized)


def _states(run: Enumerated, z: str) -> int:
    site = run.trace.nodes[z]
    dim = site["infer"]["_enumerate_dim"] - site["fn"].event_dim
    return int(site["value"].shape[dim])


def stem(a: str, b: str) -> str:
    """What the names of the two steps have in common: ``z`` of ``z_0`` and ``z_1``."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    first = same.index(False) if False in same else len(same)
    last = 0
    while last < min(len(a), len(b)) - first and a[len(a) - 1 - last] == b[len(b) - 1 - last]:
        last += 1
    before, after = a[:first], a[len(a) - last :] if last else ""
    while before and not before[-1].isalnum():
        before = before[:-1]
    while not before and after and not after[0].isalnum():
        after = after[1:]
    return before + after or a


def pairs_by_name(first: Sequence[str], later: Sequence[str]) -> list[tuple[str, str]]:
    """The sites of the first step with those of the next, that are called ``1`` instead of ``0``.

    Where names do not tell, their order does. What has no partner is left out.
    """
    found = {}
    for a in first:
        places = [i for i, letter in enumerate(a) if letter == "0"]
        named = [b for b in (a[:i] + "1" + a[i + 1 :] for i in places) if b in later]
        if named:
            found[a] = named[0]
    rest = ([a for a in first if a not in found], [b for b in later if b not in found.values()])
    if len(rest[0]) == len(rest[1]):
        found.update(zip(*rest, strict=True))
    return [(a, found[a]) for a in first if a in found]


def check_steps(
    program: Program,
    loops: Sequence[Loop],
    as_one: Loops,
    run: Enumerated,
    point: Values,
    parameters: Mapping[str, Parameter],
    nesting: int,
) -> None:
    """Compare the steps that ran as one with the program's own, one after the other.

    Of a loop by ``pyroem.markov`` the first few are compared, of one by ``pyro.markov`` all.

    Raises:
    ------
    LoopError
        Naming what differs.
    """
    stated = all(loop.stated for loop in loops)
    own = _one_by_one(program, point, parameters, nesting, Brief(FIRST) if stated else Whole())
    ours, theirs = _by_step(run), _by_step(own)
    for name in own.factors:
        outside = name in run.factors and step_of(own.trace.nodes[name]) is None
        if outside and not torch.equal(own.factors[name].tensor, run.factors[name].tensor):
            raise LoopError(f"site '{name}', outside the loop, depends on what the loop made")
    keys = _places(own), _places(run)
    plates = [as_one.plate(loop).name for loop in range(len(loops))]
    for (loop, step), names in theirs.items():
        partners = ours.get((loop, min(step, 1)), [])
        if len(partners) != len(names):
            raise LoopError(f"step {step} has sites {quoted(names)}, not {quoted(partners)}")
        for name, partner in zip(names, partners, strict=True):
            if not _agree(own, name, keys[0], run, partner, keys[1], step, plates[loop]):
                carried = (
                    "; what passes from step to step must be the state only (take an earlier"
                    " observation from the data: x[t - 1])"
                )
                raise LoopError(
                    f"site '{name}' is not what '{partner}', run for all steps at once, says of"
                    f" step {step}{carried if step > 1 else ''}"
                )
    if stated:
        _check_late(program, as_one, run, point, parameters, nesting, ours)


def _check_late(
    program: Program,
    as_one: Loops,
    run: Enumerated,
    point: Values,
    parameters: Mapping[str, Parameter],
    nesting: int,
    ours: Mapping[tuple[int, int], list[str]],
) -> None:
    """Some steps further on, each right after the first: only the state passes between them."""
    places, longest = _places(run), max(as_one.lengths)
    steps = as_one.steps[as_one.steps < longest]
    for index in {len(steps) - 1, len(steps) // 2, len(steps) // 3}:
        step = int(steps[index])
        own = _one_by_one(program, point, parameters, nesting, Jump(step))
        own_places = _places(own)
        for (loop, at), names in _by_step(own).items():
            if at != 1 or as_one.lengths[loop] <= step:
                continue
            plate = as_one.plate(loop).name
            for name, partner in zip(names, ours[loop, at], strict=True):
                if not _agree(own, name, own_places, run, partner, places, 1, plate, index):
                    raise LoopError(
                        f"site '{name}' is not what '{partner}', run for all steps at once, says of"
                        f" step {step}"
                    )


def _by_step(run: Enumerated) -> dict[tuple[int, int], list[str]]:
    """The factor sites of each loop's steps."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in run.factors:
        at = step_of(run.trace.nodes[name])
        if at is not None:
            found.setdefault(at, []).append(name)
    return found


def _one_by_one(
    program: Program,
    point: Values,
    parameters: Mapping[str, Parameter],
    nesting: int,
    reader: Reader,
) -> Enumerated:
    trace, _ = program.run_and_see(point, reader=reader)
    names = set()
    for name, site in trace.nodes.items():
        if name in parameters or (site["type"] == "sample" and is_plate_site(site)):
            continue
        if site["type"] == "param":
            raise LoopError(f"parameter '{name}' belongs to some steps only")
        if site["type"] == "sample" and not is_deterministic(site):
            names.add(name)
    return enumerated(program, point, nesting, frozenset(names), reader)


_Places = Mapping[str, tuple[int, int]]  # of an assignment its step, and its number there


def _places(run: Enumerated) -> _Places:
    counts: dict[tuple[int, int] | None, int] = {}
    found = {}
    for name in run.states:
        at = step_of(run.trace.nodes[name])
        counts[at] = counts.get(at, -1) + 1
        if at is not None:
            found[name] = at[1], counts[at]
    return found


def _agree(
    own: Enumerated,
    name: str,
    own_places: _Places,
    run: Enumerated,
    partner: str,
    places: _Places,
    step: int,
    steps: str,
    index: int | None = None,
) -> bool:
    """Whether two factors say the same; ``step`` is where the first one stands.

    ``index`` is its place among the steps that ran as one, if it is not the ``step`` itself.
    """
    a, b = own.factors[name], run.factors[partner]
    keys_a = [_key(own_places, n, step) for n in own.names(a.dims)]
    keys_b = [_key(places, n, min(step, 1)) for n in run.names(b.dims)]
    tensor = b.tensor
    if steps in keys_b:
        tensor = tensor.select(keys_b.index(steps), step - 1 if index is None else index)
        keys_b.remove(steps)
    keys = sorted({*keys_a, *keys_b})
    letters = {key: chr(97 + i) for i, key in enumerate(keys)}
    dims = "".join(letters[key] for key in keys)
    left, right = torch.broadcast_tensors(
        align(a.tensor, "".join(letters[key] for key in keys_a), dims),
        align(tensor, "".join(letters[key] for key in keys_b), dims),
    )
    return torch.allclose(left, right, rtol=ALMOST, atol=ALMOST, equal_nan=True)


def _key(places: _Places, name: str, step: int) -> str:
    """What a dim of a factor stands for: a plate, or an assignment of some steps before."""
    if name not in places:
        return name
    at, number = places[name]
    return f"{step - at} before, {number}"
