"""What a fitted chain says of sequences: decoding, filtering, forecasts, residuals, draws.

Results are laid out as the data is: the plates of the sequences, then the steps, then the rest. The
sites of the first step and of the others go by what their names have in common (``z_0, z_1, ...``
by ``z``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import COUNTED, Enumerated, arranged, plate_frames, unwrap
from pyroem.chains import pairs_by_name, stem
from pyroem.errors import ModelError, SettingError
from pyroem.estep import decode
from pyroem.estep.chain import Joined, Potentials, join
from pyroem.estep.scan import Chains, draw_paths, filtering, predicted, recursions
from pyroem.mstep.plan import Plan
from pyroem.mstep.sites import SiteModel
from pyroem.structure import Chain, Params, Structure, base_mask

MOST_COUNTS = 100_000  # values of a count whose probabilities are added up


@dataclass(frozen=True)
class Filtered:
    """The states of sequences given what was seen up to each step.

    Attributes:
    ----------
    probs
        For each chain ``p(state at t | seen up to t)``: plates, steps, states.
    log_prob
        The log-likelihood of what was seen, given what was seen before it: plates.
    last
        For each chain the probabilities at the last step of each sequence that shows anything: what
        :meth:`Fit.filter` goes on from. NaN for a sequence of which nothing has been seen.
    """

    probs: dict[str, Tensor]
    log_prob: Tensor
    last: dict[str, Tensor]


@dataclass(frozen=True)
class Forecast:
    """The steps after the end of sequences.

    Attributes:
    ----------
    states
        For each chain the probabilities of its states: plates, steps ahead, states.
    observations
        For each observation its predictive distribution (a mixture over the states), with the
        plates and the steps ahead as its batch.
    """

    states: dict[str, Tensor]
    observations: dict[str, Any]

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean of every observation, where it has one."""
        return {name: d.mean for name, d in self.observations.items()}


def public_names(structure: Structure) -> dict[str, str]:
    """What the sites of chains are called in results, by their names in the first step.

    What their names in the two steps have in common; their full names where that is not unique.
    """
    pairs = [pair for chain in structure.chains for pair in decode.partners(chain)]
    pairs += [(a, b) for c in structure.chains for _, a, b in _observed(structure, c) if a and b]
    short = {a: stem(a, b) for a, b in pairs}
    short.update({chain.first: chain.name for chain in structure.chains})
    names = list(short.values())
    return {a: name if names.count(name) == 1 else a for a, name in short.items()}


def named(structure: Structure, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :mod:`~pyroem.estep.decode` found, by the names of the chains, plates first."""
    names = public_names(structure)
    return {
        names[first]: found[later].movedim(0, len(chain.plates))
        for chain in structure.chains
        for first, later in decode.partners(chain)
    }


def _observed(structure: Structure, chain: Chain) -> Iterator[tuple[str, str | None, str | None]]:
    first = [n for n in chain.opening if n in structure.observations]
    later = [n for n in chain.following if n in structure.observations]
    # What is seen at the first step may hang on no state.
    alone = [n for n in structure.observations if n not in structure.chained]
    named = [a for a, _ in pairs_by_name([*first, *alone], later) if a in alone]
    pairs = pairs_by_name([*first, *named], later)
    for a, b in pairs:
        yield a, a, b
    for name in first:
        if name not in [a for a, _ in pairs]:
            yield name, name, None
    for name in later:
        if name not in [b for _, b in pairs]:
            yield name, None, name


def observed(structure: Structure, chain: Chain) -> Iterator[tuple[str, str | None, str | None]]:
    """The observations of a chain: their public name, in the first step and in the others.

    One of the two is None where only that step, or only the others, have it.
    """
    names = public_names(structure)
    for name, a, b in _observed(structure, chain):
        yield names.get(name, name), a, b


def filtered(
    structure: Structure,
    potentials: Iterable[Potentials],
    before: Mapping[str, Tensor] | None,
    overlap: bool,
) -> Filtered:
    """``p(state at t | seen up to t)``; ``before`` are those after the last step of the past.

    With ``overlap`` the first step is the last one of the past.
    """
    probs, last = dict[str, Tensor](), dict[str, Tensor]()
    total = torch.zeros((1,) * len(structure.unit), dtype=torch.float64)
    for joined in potentials:
        chain, chains = joined.chain, joined.chains()
        if before is not None:
            chains = _going_on(joined, chains, before, overlap)
        ahead, own = filtering(chains)
        found = ahead.softmax(-1)
        at = found[joined.ends.clamp(min=0), torch.arange(joined.count)]
        past = torch.full_like(at, torch.nan)
        if before is not None:
            past = before[chain.name].reshape(past.shape).to(past)
        at = torch.where((joined.ends < 0).unsqueeze(-1), past, at)
        last[chain.name] = at.reshape((*joined.shape, chain.num_states))
        found = found.reshape((-1, *joined.shape, chain.num_states))
        found = found[1:] if overlap else found
        probs[chain.name] = found.movedim(0, len(chain.plates))
        total = total + decode.by_unit(structure, chain, own.reshape(joined.shape))
    return Filtered(probs, total, last)


def varying_steps(plan: Plan) -> dict[str, str]:
    """The sites of chains whose distribution differs by step, or looks at the step before; how."""
    run, depends, sites = plan.reading.traces[0], plan.reading.dependence, plan.reading.sites
    found = {}
    for chain in plan.structure.chains:
        steps = run.plates[chain.steps]
        for name in chain.following:
            dims, site = run.factors[name].dims, sites.get(name)
            if name in run.states:
                if steps in dims:
                    found[name] = "differs by step"
            elif run.states[chain.first] in dims:
                found[name] = "depends on the state before too"
            elif site is not None and any(_along(site, run, chain)):
                found[name] = "differs by step"
        for _, a, b in _observed(plan.structure, chain):
            if a is None or b is None:
                found[a or b or ""] = "is not in every step"
            elif depends[a] != depends[b]:
                found.setdefault(b, "is not what it is in the first step")
    return found


def _along(site: SiteModel, run: Enumerated, chain: Chain) -> Iterator[bool]:
    """For each argument whether it differs by step."""
    dims = {f.name: f.dim for f in plate_frames(run.trace.nodes[site.name]) if f.vectorized}
    at = len(site.shape) - site.events + dims[chain.steps]
    for argument in site.arguments.values():
        yield at in argument.varies


def check_going_on(plan: Plan, overlap: bool) -> None:
    """Whether new data may begin anywhere but at the first step.

    Raises:
    ------
    SettingError
        Where the program says of its first step what it does not say of others.
    """
    if getattr(plan.reading.traces[0].trace, COUNTED, False):
        raise SettingError(
            "filter: the program computes with the number of the step (a season, a trend), which"
            " begins at 0 again in new data. Give the whole sequence."
        )
    varying = varying_steps(plan)
    if varying and not overlap:
        name, how = next(iter(varying.items()))
        raise SettingError(
            f"filter: site '{name}' {how}, so the first step of the new data does not tell how it"
            " follows from the past. Begin the new data with the last step seen, and give"
            " overlap=True."
        )


def _going_on(
    joined: Potentials, chains: Chains, before: Mapping[str, Tensor], overlap: bool
) -> Chains:
    name, k = joined.chain.name, joined.chain.num_states
    given = before.get(name)
    if given is None or given.numel() != chains.start.numel():
        size = "nothing" if given is None else f"a tensor of shape {tuple(given.shape)}"
        raise SettingError(
            f"filter: state has {size} for chain '{name}'; expected the probabilities of"
            f" {joined.count} sequence(s) in {k} states."
        )
    last = given.reshape(-1, k).to(chains.start).log()
    if overlap:
        return replace(chains, start=torch.where(last.isnan(), chains.start, last))
    moved = torch.logsumexp(last.unsqueeze(-1) + chains.pair[0], -2)
    seen = joined.opened.detach().double().expand((*joined.shape, k)).reshape(-1, k)
    return replace(chains, start=torch.where(last.isnan(), chains.start, moved + seen))


def forecast(
    structure: Structure,
    run: Enumerated,
    potentials: Iterable[Potentials],
    steps: int,
    varying: Mapping[str, str],
) -> Forecast:
    """The states and observations ``1, 2, ..., steps`` after the end of every sequence.

    ``varying`` are sites whose distribution differs by step.
    """
    for name, how in varying.items():
        raise ModelError(
            f"forecast: site '{name}' {how} (it has covariates, say). Append steps with masked"
            " observations to the data, and ask for the posterior."
        )
    states: dict[str, Tensor] = {}
    observations: dict[str, Any] = {}
    for joined in potentials:
        chain, chains = joined.chain, joined.chains()
        ahead, _ = filtering(chains)
        at, matrix = joined.ends.clamp(min=0), chains.pair[0].exp()
        last = ahead[at, torch.arange(joined.count)].softmax(-1)
        found, unbegun = [], (joined.ends < 0).unsqueeze(-1)
        for step in range(steps):
            new = (last.unsqueeze(-2) @ matrix).squeeze(-2)
            # Of a sequence of which nothing is seen the next step is the first.
            last = new if step else torch.where(unbegun, chains.start.softmax(-1), new)
            found.append(last)
        probs = torch.stack(found, 1).reshape((*joined.shape, steps, chain.num_states))
        states[chain.name] = probs
        for name, _, later in observed(structure, chain):
            if later is not None:
                observations[name] = _predictive(structure, run, joined, later, probs)
    return Forecast(states, observations)


def _predictive(
    structure: Structure, run: Enumerated, joined: Potentials, name: str, probs: Tensor
) -> Any:
    """The mixture over the states of one observation's distribution, with ``probs``."""
    chain, node = joined.chain, run.trace.nodes[name]
    inner = [n for n in chain.following if n in run.states and n != chain.step]
    if inner:
        raise ModelError(f"forecast: site '{name}' depends on '{inner[0]}' too; use sample().")
    frames = {f.name: f.dim for f in plate_frames(node) if f.vectorized}
    others = [p for p in structure.plates[name] if p not in (*chain.plates, chain.steps)]
    state = run.trace.nodes[chain.step]["infer"]["_enumerate_dim"]
    wanted = [*(frames[p] for p in chain.plates), frames[chain.steps]]
    wanted += [*(frames[p] for p in others), state]

    def arrange(x: Tensor, right: int) -> Tensor:
        moved, steps = _laid_out(x, right, wanted), len(chain.plates)
        if moved.shape[steps] > 1 and moved.stride(steps):
            raise ModelError(f"forecast: the distribution at site '{name}' differs by step.")
        moved = moved.narrow(steps, 0, 1)
        shape = [*moved.shape]
        shape[len(wanted) - 1] = chain.num_states
        return moved.expand(shape)

    component = arranged(node["fn"], arrange, name, masks=False)
    batch = (*probs.shape[:-1], *(run.sizes(name)[p] for p in others), chain.num_states)
    component = component.expand(torch.Size(batch))
    mixing = probs.reshape((*probs.shape[:-1], *(1,) * len(others), chain.num_states))
    return dist.MixtureSameFamily(dist.Categorical(mixing.expand(batch)), component)


def transitions(potentials: Iterable[Potentials]) -> dict[str, Tensor]:
    """The mean transition matrix of each chain, over its steps and sequences."""
    return {
        own.chain.name: own.pair.double().exp().flatten(0, -3).mean(0)
        for own in potentials
        if own.chain.length > 1
    }


KINDS = ("forecast", "ordinary")


def residuals(structure: Structure, run: Enumerated, kind: str) -> dict[str, Tensor]:
    """Pseudo-residuals: the normal quantile of ``P(X_t <= x_t)``, at every step.

    ``"forecast"`` given what was seen before, ``"ordinary"`` given all that was seen at other
    steps. Of counts and categories the middle of ``P(X_t < x_t)`` and ``P(X_t <= x_t)`` is taken.
    """
    if kind not in KINDS:
        raise SettingError(f"residuals: kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    result = {}
    both = (join(structure, run, t) for t in (run.tensors(), _unseen(structure, run)))
    for joined, prior in zip(*both, strict=True):
        chain, chains = joined.chain, joined.chains()
        if any(p.pairwise and p.name != chain.step for p in joined.following):
            raise ModelError(
                f"residuals: an observation of '{chain.name}' depends on the state before too."
            )
        ahead, behind, _, _ = recursions(chains)
        first = prior.chains().start.log_softmax(-1)
        before = torch.cat([first.unsqueeze(0), predicted(ahead, chains)])
        weights = before if kind == "forecast" else before + behind
        weights = weights.softmax(-1).reshape((-1, *joined.shape, chain.num_states))
        for name, a, b in observed(structure, chain):
            parts = [
                _quantile(structure, run, joined, site, w, at == 0)
                for at, (site, w) in enumerate(((a, weights[:1]), (b, weights[1:])))
                if site is not None
            ]
            result[name] = _joined(parts, a is None).movedim(0, len(chain.plates))
    return result


def _unseen(structure: Structure, run: Enumerated) -> dict[str, Tensor]:
    """The factors of a run as if nothing were seen."""
    own = run.tensors().items()
    return {n: torch.zeros_like(t) if n in structure.observations else t for n, t in own}


def _quantile(
    structure: Structure,
    run: Enumerated,
    joined: Joined,
    name: str,
    weights: Tensor,
    first: bool,
) -> Tensor:
    """The residuals of one site: steps, plates of the chain, other plates, event."""
    chain, node = joined.chain, run.trace.nodes[name]
    base, _, _ = unwrap(node["fn"])
    if any(n in run.states and n not in (chain.first, chain.step) for n in chain.following):
        raise ModelError(f"residuals: chain '{chain.name}' has assignments inside its steps.")
    if base.event_shape:
        raise ModelError(
            f"residuals: site '{name}' has vectors ({type(base).__name__}) as its events; there is"
            " no probability of less."
        )
    low, high = _below(base, node["value"], name)
    frames = {f.name: f.dim for f in plate_frames(node) if f.vectorized}
    others = [p for p in structure.plates[name] if p not in (*chain.plates, chain.steps)]
    declared = unwrap(node["fn"])[1]
    state = run.trace.nodes[chain.first if first else chain.step]["infer"]["_enumerate_dim"]
    wanted = [] if first else [frames[chain.steps]]
    wanted += [*(frames[p] for p in chain.plates), state, *(frames[p] for p in others)]
    middle, mask = (low + high) / 2, base_mask(node)
    if mask is not None:
        middle = torch.where(mask, middle, torch.nan)
    x = _laid_out(middle, declared, wanted)
    x = x.unsqueeze(0) if first else x
    w = weights.reshape((*weights.shape, *(1,) * (x.dim() - weights.dim())))
    return torch.special.ndtri((w * x).sum(weights.dim() - 1))


def _below(base: Any, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``P(X < x)`` and ``P(X <= x)`` in every state."""
    if not base.support.is_discrete:
        try:
            found = base.cdf(x)
        except NotImplementedError as error:
            raise ModelError(
                f"residuals: {type(base).__name__} (site '{name}') has no distribution function."
            ) from error
        return found, found
    top = int(x.max()) if x.numel() else 0
    if top > MOST_COUNTS or int(x.min()) < 0:
        raise ModelError(f"residuals: the counts at site '{name}' are too large ({top}).")
    low = high = torch.zeros(())
    for value in range(top + 1):
        mass = base.log_prob(torch.full_like(x, value)).exp()
        low = low + torch.where(value < x, mass, 0.0)
        high = high + torch.where(value <= x, mass, 0.0)
    return low, high


def draw(structure: Structure, params: Params) -> dict[str, Tensor]:
    """One draw of all sequences: the assignments and observations of chains, by their names.

    What an observation depends on beside the states (covariates, earlier observations) is taken
    from the data.
    """
    program, run = structure.program, structure.enumerate(params)
    result, paths, names = {}, dict[str, Tensor](), public_names(structure)
    for joined in join(structure, run, _unseen(structure, run)):
        chain, chains = joined.chain, joined.chains()
        path = draw_paths(chains.start, chains.pair, chain.length - 1)
        path = path.reshape((-1, *joined.shape))
        for z, own in ((chain.first, path[:-1]), (chain.step, path[1:])):
            paths[z] = _as_values(structure, run, z, own)
        result[chain.name] = path.movedim(0, len(chain.plates))
        for first, later in chain.inner:
            nodes = program.run_and_see(params, paths=_padded(structure, paths))[0].nodes
            drawn = [_drawn(structure, nodes, chain, z) for z in (first, later)]
            own = torch.cat([drawn[0].unsqueeze(0), drawn[1]])
            for z, part in ((first, own[:-1]), (later, own[1:])):
                paths[z] = _as_values(structure, run, z, _as_states(run, z, part))
            result[names[first]] = own.movedim(0, len(chain.plates))
    nodes = program.run_and_see(params, paths=_padded(structure, paths))[0].nodes
    for chain in structure.chains:
        for name, name_first, name_later in observed(structure, chain):
            opening, rest = (
                None if site is None else _drawn(structure, nodes, chain, site)
                for site in (name_first, name_later)
            )
            parts = [] if opening is None else [opening.unsqueeze(0)]
            parts += [] if rest is None else [rest]
            result[name] = _joined(parts, opening is None).movedim(0, len(chain.plates))
    return result


def _joined(parts: list[Tensor], late: bool) -> Tensor:
    """The steps together; NaN for the first one where there is none (``late``)."""
    if late:
        parts = [torch.full_like(parts[0][:1], torch.nan, dtype=torch.float64), *parts]
    return torch.cat(parts)


def _as_values(structure: Structure, run: Enumerated, z: str, path: Tensor) -> Tensor:
    """States (steps, plates) as the program has them: the plates at their dims, then the event."""
    node, support = run.trace.nodes[z], _support(run, z)
    frames = {f.name: f.dim for f in plate_frames(node) if f.vectorized}
    plates = [p for p in structure.plates[z] if p in frames and not _is_steps(structure, p)]
    shape = [1] * max([0, *(-frames[p] for p in plates)])
    for p, size in zip(plates, path.shape[1:], strict=True):
        shape[frames[p]] = size
    return support[path].reshape((len(path), *shape, *support.shape[1:]))


def _as_states(run: Enumerated, z: str, values: Tensor) -> Tensor:
    """The numbers of the states that values of an assignment are."""
    support = _support(run, z)
    events = support.dim() - 1
    same = values.unsqueeze(values.dim() - events) == support
    return (same.flatten(-events).all(-1) if events else same).long().argmax(-1)


def _support(run: Enumerated, z: str) -> Tensor:
    """The values of an assignment, by its states."""
    node = run.trace.nodes[z]
    value: Tensor = node["value"]
    return value.reshape((-1, *value.shape[value.dim() - len(node["fn"].event_shape) :]))


def _is_steps(structure: Structure, plate: str) -> bool:
    return any(plate == chain.steps for chain in structure.chains)


def _padded(structure: Structure, paths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Paths with as many steps as the program is run for: the last one repeated."""
    loops = structure.program.loops
    assert loops is not None
    result = {}
    for name, path in paths.items():
        missing = len(loops.steps) - len(path)
        last = path[-1:] if len(path) else path.new_zeros((1, *path.shape[1:]))
        result[name] = torch.cat([path, last.expand(missing, *path.shape[1:])])
    return result


def _drawn(structure: Structure, nodes: Any, chain: Chain, name: str) -> Tensor:
    """A draw of one site: its steps (if it has them), the chain's plates, others, the event."""
    node = nodes[name]
    fn = node["fn"]
    frames = {f.name: f for f in plate_frames(node) if f.vectorized}
    shape = [1] * max([0, *(-f.dim for f in frames.values())])
    for f in frames.values():
        shape[f.dim] = f.size
    x = fn.expand(torch.broadcast_shapes(fn.batch_shape, shape)).sample()
    return _steps_first(structure, node, chain, name, x)


def all_steps(
    structure: Structure, nodes: Any, chain: Chain, parts: Mapping[str, Tensor]
) -> Tensor:
    """The values of one observation at all steps, of which ``parts`` has one or two sites.

    The chain's plates come first, then the steps, then what else the observation has.
    """
    laid = [_steps_first(structure, nodes[n], chain, n, x) for n, x in parts.items()]
    laid = [x if n in chain.following else x.unsqueeze(0) for n, x in zip(parts, laid, strict=True)]
    return _joined(laid, not set(parts) - set(chain.following)).movedim(0, len(chain.plates))


def _steps_first(structure: Structure, node: Any, chain: Chain, name: str, x: Tensor) -> Tensor:
    events = len(node["fn"].event_shape)
    frames = {f.name: f for f in plate_frames(node) if f.vectorized}
    own = [p for p in (chain.steps, *chain.plates) if p in frames]
    own += [p for p in structure.plates[name] if p not in own]
    return _laid_out(x, events, [frames[p].dim for p in own])


def _laid_out(x: Tensor, right: int, dims: list[int]) -> Tensor:
    """The batch dims ``dims`` (from the right) in this order, then the event's ``right`` dims.

    The other batch dims have size one, or one is as good as another.
    """
    width = max([0, *(-d for d in dims)]) + right
    x = x.reshape((1,) * (width - x.dim()) + tuple(x.shape))
    batch = x.dim() - right
    at = [batch + d for d in dims]
    rest = [i for i in range(batch) if i not in at]
    return x.permute([*rest, *at, *range(batch, x.dim())])[(0,) * len(rest)]
