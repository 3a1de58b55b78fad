"""Reading a program: which sites are observations, assignments and parameters, in which plates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyroem._pyro import (
    Brief,
    Loop,
    LoopError,
    Program,
    Site,
    Values,
    as_data,
    enumerated,
    in_markov,
    is_deterministic,
    is_plate_site,
    isolated,
    plate_frames,
    stored_constraints,
    unwrap,
)
from pyroem.chains import check_steps, find_chains, loops_as_one
from pyroem.checks import (
    check_assignments_plates,
    check_batch,
    check_dependence,
    check_observation,
    check_plates,
    kind_of,
)
from pyroem.errors import DataError, ModelError, SettingError
from pyroem.structure import Chain, Parameter, Params, Structure, base_mask, known_part

FEWEST = 8  # steps
MOST_UNROLLED = 5000  # steps of a loop by pyroem.markov that are read one after the other


def read(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    part: bool = False,
    chains: bool = False,
    some_steps: int | None = None,
) -> Structure:
    """Read a program with its data (with a ``part`` of it, of which all may be masked).

    With ``chains``, loops over time are read as one step for all where they can be; where not,
    ``no_chain`` of the result says why. With ``some_steps``, of loops by :func:`pyroem.markov` only
    about so many steps (of all sequences together) are looked at.

    Raises:
    ------
    ModelError
        Where the program cannot be fitted: no observation, a latent that cannot be enumerated,
        a continuous latent in the rows' plates, a parameter that nothing depends on, a shape
        that does not fit its plates.
    DataError
        Where an observation has NaN, infinite or unsupported values.
    """
    program = _program(model, args, kwargs or {}, dtype)
    if not chains:
        return _read(program, part)
    reader = Brief(2)
    with isolated(dtype, 0):
        nodes = program.run_and_see({}, reader=reader)[0].nodes
    if not reader.loops:
        return _read(program, part)
    try:
        if some_steps is not None:
            widest = max(math.prod(n["fn"].batch_shape) for n in nodes.values() if _is_sample(n))
            some_steps = max(some_steps // widest, FEWEST)
        return _read(program, part, reader.loops, _nesting(nodes), some_steps)
    except ModelError as error:  # one of the program itself will come again
        reason = str(error).rstrip(".")
    longest = max(loop.length for loop in reader.loops)
    if any(loop.stated for loop in reader.loops) and longest > MOST_UNROLLED:
        raise ModelError(
            f"The loop over pyroem.markov({longest}) cannot be read as one step: {reason}."
            f" (Step by step, loops of up to {MOST_UNROLLED} steps can be.)"
        )
    return replace(_read(program, part), no_chain=reason)


def _program(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> Program:
    if not callable(model):
        raise ModelError(f"Expected a Pyro program (a callable), got {type(model).__name__}.")
    if dtype not in (torch.float32, torch.float64):
        raise SettingError(f"dtype: expected torch.float64 or torch.float32, got {dtype}.")
    return Program(model, as_data(args, dtype), as_data(dict(kwargs), dtype), dtype, {}, {})


def on_other_sequences(
    structure: Structure, params: Params, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Structure, Mapping[str, Site]]:
    """The structure of a program with chains on other sequences, of any length and number.

    Also its sites there, at ``params``, each assignment in its first state.

    Raises:
    ------
    ModelError
        Where the program has other sites on them.
    DataError
        Where an observation has NaN, infinite or unsupported values.
    """
    old, dtype = structure.program, structure.program.dtype
    data = as_data(args, dtype), as_data(dict(kwargs), dtype)
    program = replace(old, args=data[0], kwargs=data[1], fill={}, missing={}, loops=None)
    assert old.loops is not None
    reader = Brief(2)
    with isolated(dtype, 0):
        program.run_and_see(params, reader=reader)
        lengths = tuple(loop.length for loop in reader.loops)
        if len(lengths) != len(old.loops.lengths) or min(lengths) < 1:
            raise ModelError(
                f"On the new data the program has loops of {list(lengths)} steps, in the fit of"
                f" {list(old.loops.lengths)}."
            )
        loops = replace(old.loops, lengths=lengths, steps=torch.arange(1, max(3, *lengths)))
        program = replace(program, loops=loops)
        nodes = program.run(params).nodes
        missing = [n for n in structure.factor_sites if n not in nodes]
        if missing:
            raise ModelError(f"On the new data the program lacks site '{missing[0]}'.")
        program = _observed(program, nodes, structure.observations, lambda name: True)
        if program.missing:
            nodes = program.run(params).nodes
        for name, filled in program.fill.items():
            nodes[name]["value"] = filled
    sizes = {f.name: int(f.size) for n in structure.factor_sites for f in plate_frames(nodes[n])}
    by_plate = {loops.plate(i).name: n for i, n in enumerate(lengths)}
    chains = tuple(replace(c, length=by_plate[c.steps]) for c in structure.chains)
    unit_shape = tuple(sizes[p] for p in structure.unit)
    return replace(structure, program=program, chains=chains, unit_shape=unit_shape), nodes


def first_look(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[list[int], set[int]]:
    """The lengths of a program's loops over time, and the sizes of its plates.

    None of either where it does not run: why, is told where it is read.
    """
    program, reader = _program(model, args, kwargs, dtype), Brief(2)
    try:
        with isolated(dtype, 0):
            run, _ = program.run_and_see({}, reader=reader)
    except ModelError:
        return [], set()
    sites = [site for site in run.nodes.values() if site["type"] == "sample"]
    sizes = {int(f.size) for s in sites for f in plate_frames(s)}
    return [loop.length for loop in reader.loops], sizes


def with_own_values(
    structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Structure:
    """The structure, its parameters with the values that the program gives them on all the data."""
    program = replace(structure.program, args=args, kwargs=kwargs, fill={}, missing={}, loops=None)
    with isolated(program.dtype, 0):
        nodes = program.run_and_see({}, reader=Brief(2))[0].nodes
    parameters = {}
    for name, parameter in structure.parameters.items():
        value = nodes[name]["value"].detach().clone().to(program.dtype)
        if tuple(value.shape) != parameter.shape or not value.isfinite().all():
            raise ModelError(
                f"Parameter '{name}' is not the same on all the data as on some of it."
            )
        parameters[name] = parameter if parameter.random else replace(parameter, value=value)
    return replace(structure, parameters=parameters)


def _is_sample(site: Site) -> bool:
    return site["type"] == "sample" and not is_plate_site(site)


def _nesting(nodes: Mapping[str, Site]) -> int:
    """The number of dims that plates take."""
    sites = (site for site in nodes.values() if site["type"] == "sample")
    return max((-f.dim for s in sites for f in plate_frames(s) if f.vectorized), default=0)


def _read(
    program: Program,
    part: bool,
    loops: Sequence[Loop] = (),
    own_dims: int = 0,
    some: int | None = None,
) -> Structure:
    """The structure of a program, its ``loops`` (if any) read as one step for all."""
    traces, dtype = [], program.dtype
    for seed in (0, 1):  # two draws tell a random start from one that the user wrote down
        with isolated(dtype, seed):
            trace, cast = program.run_and_see({}, reader=Brief(2) if loops else None)
            traces.append((trace.nodes, stored_constraints(), cast))
    (nodes, stored, cast), (again, _, cast_again) = traces
    kinds = _classify(nodes)
    parameters = {
        name: _parameter(name, nodes[name], stored, again.get(name), dtype)
        for name in kinds.parameters
    }
    start = {name: parameter.value for name, parameter in parameters.items()}
    if loops:
        stated = all(loop.stated for loop in loops)
        if kinds.imputed:
            raise LoopError(f"'{kinds.imputed[0]}' is partly known")
        program = replace(program, loops=loops_as_one(loops, own_dims, some if stated else None))
        with isolated(dtype, 0):
            nodes = program.run(start).nodes
        kinds = _classify(nodes)
    modules = {
        name: site["args"][1]
        for name, site in nodes.items()
        if site["type"] == "param"
        and len(site["args"]) > 1
        and isinstance(site["args"][1], torch.nn.Parameter)
    }
    known = {known_part(n) for n in nodes if n.endswith("_unobserved")}
    program = _observed(
        program,
        nodes,
        kinds.observations,
        lambda name: part or name in known or in_markov(nodes[name]),  # a step may be missing
    )
    steps_seen = [n for n in kinds.observations if in_markov(nodes[n])]
    masks = [base_mask(nodes[n]) for n in steps_seen]
    if masks and not part and all(m is not None and not m.any() for m in masks):
        raise DataError(
            f"Site '{steps_seen[0]}': every cell is masked, at all steps; there is nothing to fit"
            " to."
        )
    program = replace(program, modules=modules, cast=cast or cast_again)
    nesting = _nesting(nodes)
    factor_sites = {*kinds.observations, *kinds.assignments}
    with isolated(dtype, 0):
        trace = program.run(start, nesting=nesting)
        for name in kinds.parameters:  # a prior that depends on an assignment is a factor
            site = trace.nodes[name]
            if site["type"] == "sample" and site["fn"].batch_shape != nodes[name]["fn"].batch_shape:
                factor_sites.add(name)
        imputed = _leaves(kinds.imputed, program, start, nesting, frozenset(factor_sites))
        factor_sites -= imputed
        first = enumerated(program, start, nesting, frozenset(factor_sites))
        states = {
            n: _num_states(first.trace.nodes[n]) for n in kinds.assignments if n not in imputed
        }
        check_assignments_plates(first, nodes, kinds.assignments)
    with isolated(dtype, 1):
        check_dependence(first, program, start, nesting, frozenset(factor_sites), parameters)
    plates = {
        name: tuple(
            f.name
            for f in sorted(plate_frames(nodes[name]), key=lambda f: f.dim or 0)
            if f.vectorized
        )
        for name in factor_sites
    }
    found: tuple[Chain, ...] = ()
    if program.loops is not None:
        found = find_chains(first, states, program.loops)
        with isolated(dtype, 0):
            point = {name: _elsewhere(parameter) for name, parameter in parameters.items()}
            run = enumerated(program, point, nesting, frozenset(factor_sites))
            alone = replace(program, loops=None, fill={}, missing=None)
            check_steps(alone, loops, program.loops, run, point, parameters, nesting)
    if found:
        members = [chain.plates for chain in found if chain.plates] or [()]
        unit = tuple(p for p in members[0] if all(p in own for own in members))
    else:
        unit = _unit(plates, [n for n in states if n not in kinds.imputed], kinds.observations)
    sizes = {
        f.name: int(f.size)
        for site in nodes.values()
        if site["type"] == "sample"
        for f in plate_frames(site)
    }
    return Structure(
        program,
        nesting,
        parameters,
        {n: k for n, k in states.items() if n not in kinds.imputed},
        {n: k for n, k in states.items() if n in kinds.imputed},
        tuple(kinds.observations),
        frozenset(factor_sites),
        plates,
        unit,
        tuple(sizes[name] for name in unit),
        found,
    )


def _observed(
    program: Program,
    nodes: Mapping[str, Site],
    observations: Sequence[str],
    partly: Callable[[str], bool],
) -> Program:
    """The program with its observations checked: what is unfit and masked, and what is missing."""
    checked = {n: check_observation(nodes[n], partly=partly(n)) for n in observations}
    fill = {n: c.fill for n, c in checked.items() if c.fill is not None}
    missing = {n: c.missing for n, c in checked.items() if c.missing is not None}
    return replace(program, fill=fill, missing=missing)


def _elsewhere(parameter: Parameter) -> Tensor:
    """A value near the program's own, at which no two states are alike."""
    generator = torch.Generator().manual_seed(4)
    raw = parameter.unconstrain(parameter.value).clamp(-5, 5)
    noise = torch.rand(raw.shape, generator=generator, dtype=torch.float64) - 0.5
    return parameter.constrain(raw + noise.to(raw))


@dataclass
class _Kinds:
    observations: list[str]
    assignments: list[str]
    parameters: list[str]
    imputed: list[str]


def _classify(nodes: Mapping[str, Site]) -> _Kinds:
    kinds = _Kinds([], [], [], [])
    continuous, missing = [], []
    for name, site in nodes.items():
        if site["type"] == "param":
            kinds.parameters.append(name)
        if site["type"] != "sample" or is_deterministic(site):
            continue
        check_plates(site)
        if is_plate_site(site):
            continue
        if site["is_observed"] or isinstance(site["fn"], dist.Unit):
            check_batch(name, site)
            kinds.observations.append(name)
        elif name.endswith("_unobserved") and known_part(name) in nodes:
            if site["fn"].has_enumerate_support:
                kinds.imputed.append(name)
                kinds.assignments.append(name)
            else:
                missing.append(name)
        elif site["fn"].has_enumerate_support:
            check_batch(name, site)
            kinds.assignments.append(name)
        elif site["fn"].support.is_discrete and unwrap(site["fn"])[1]:
            raise ModelError(
                f"Site '{name}' is an unobserved {kind_of(site)} whose dims were declared as one"
                " event by .to_event(). Put the assignment into a pyro.plate of that size instead:"
                " its elements are then summed out one by one."
            )
        elif site["fn"].support.is_discrete:
            raise ModelError(
                f"Site '{name}' is an unobserved {kind_of(site)}, whose support is not finite, so"
                " it cannot be summed out. Expected a Categorical, OneHotCategorical, Bernoulli or"
                " Binomial assignment; for a count, use a Categorical over its likely values."
            )
        else:
            continuous.append(name)
    rows = {
        n: tuple(f.name for f in plate_frames(nodes[n]))
        for n in (*kinds.observations, *kinds.assignments)
    }
    unit = _unit(rows, kinds.assignments, kinds.observations)
    for name in missing:
        outside = unit and not any(f.name in unit for f in plate_frames(nodes[name]))
        if outside and not nodes[name]["fn"].support.is_discrete and not in_markov(nodes[name]):
            kinds.parameters.append(name)  # the unknown part of a parameter that is partly known
        else:
            kinds.imputed.append(name)
    assigned = any(rows[n] for n in kinds.assignments)
    for name in continuous:
        site = nodes[name]
        own = [f.name for f in plate_frames(site)]
        # Without an assignment in a plate, observations may share a plate with their parameters.
        whole = any(rows[n] and set(rows[n]) <= set(own) for n in rows)
        shared = [p for p in own if p in unit] if assigned or whole else []
        if not site["infer"].get("parameter") and (shared or in_markov(site)):
            where = f"the rows' plate '{shared[0]}'" if shared else "pyro.markov"
            raise ModelError(
                f"Site '{name}' is an unobserved continuous {kind_of(site)} that stands in {where}:"
                " a latent variable of each row, which cannot be summed out exactly. If it is data,"
                " pass it to obs=; if not, integrate it out in the program, or mark it with"
                " infer={'parameter': True} to maximise over it."
            )
        kinds.parameters.append(name)
    if not kinds.observations:
        raise ModelError(
            "The program has no observation: no pyro.sample statement has obs=. Check that the"
            " data is passed to fit() and on to obs=."
        )
    return kinds


def _parameter(
    name: str, site: Site, stored: Mapping[str, Any], again: Site | None, dtype: torch.dtype
) -> Parameter:
    value: Tensor = site["value"].detach().clone().to(dtype)
    if site["type"] == "param":
        constraint = stored.get(name) or site["kwargs"].get("constraint") or constraints.real
    else:
        constraint = site["fn"].support
    random = again is None or not torch.equal(value, again["value"].to(dtype))
    if not value.isfinite().all():
        raise ModelError(f"Parameter '{name}': the program's own value is not finite.")
    return Parameter(name, tuple(value.shape), constraint, value, site["type"] == "sample", random)


def _leaves(
    names: list[str], program: Program, start: Values, nesting: int, factor_sites: frozenset[str]
) -> frozenset[str]:
    """Of the unobserved parts of ``obs_mask`` sites, those on which no other site depends.

    They integrate to one. Anything else that is continuous cannot be summed out.
    """
    leaves = set()
    for name in names:
        discrete = [n for n in names if n != name]
        others = factor_sites - set(names)
        tensors = []
        for seed in (0, 1):
            with isolated(program.dtype, seed):
                run = enumerated(program, start, nesting, others)
                tensors.append(run)
        symbol = tensors[0].trace.nodes[name]["infer"].get("_enumerate_symbol")
        if symbol is not None:
            touched = any(symbol in f.dims for f in tensors[0].factors.values())
        else:
            a, b = (run.tensors() for run in tensors)
            touched = any(not torch.equal(a[n], b[n]) for n in a) and not discrete
            if touched:
                raise ModelError(
                    f"Site '{name}' holds the missing values of a continuous observation that other"
                    " sites depend on; it cannot be summed out exactly."
                )
        if not touched:
            leaves.add(name)
    return frozenset(leaves)


def _num_states(site: Site) -> int:
    dim = site["infer"]["_enumerate_dim"] - site["fn"].event_dim
    return int(site["value"].shape[dim])


def _unit(
    plates: Mapping[str, tuple[str, ...]], assignments: list[str], observations: list[str]
) -> tuple[str, ...]:
    """The plates common to all assignments that are in plates, else to all observations."""
    members = [plates[n] for n in assignments if plates[n]]
    members = members or [plates[n] for n in observations if plates[n]]
    if not members:
        return ()
    common = set(members[0]).intersection(*members[1:])
    return tuple(p for p in members[0] if p in common)
