"""Reading a program: which sites are observations, assignments and parameters, in which plates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroem._pyro import (
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
from pyroem.errors import DataError, ModelError, SettingError
from pyroem.structure import Parameter, Structure, base_mask, quoted


def read(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Structure:
    """Read a program with its data.

    Raises:
    ------
    ModelError
        Where the program cannot be fitted: no observation, a latent that cannot be enumerated,
        a continuous latent in the rows' plates, a parameter that nothing depends on, a shape
        that does not fit its plates.
    DataError
        Where an observation has NaN, infinite or unsupported values.
    """
    if not callable(model):
        raise ModelError(f"Expected a Pyro program (a callable), got {type(model).__name__}.")
    if dtype not in (torch.float32, torch.float64):
        raise SettingError(f"dtype: expected torch.float64 or torch.float32, got {dtype}.")
    program = Program(
        model, as_data(args, dtype), as_data(dict(kwargs or {}), dtype), dtype, {}, {}
    )
    traces = []
    for seed in (0, 1):  # two draws tell a random start from one that the user wrote down
        with isolated(dtype, seed):
            trace, cast = program.run_and_see({})
            traces.append((trace.nodes, stored_constraints(), cast))
    (nodes, stored, cast), (again, _, cast_again) = traces
    kinds = _classify(nodes)
    parameters = {
        name: _parameter(name, nodes[name], stored, again.get(name), dtype)
        for name in kinds.parameters
    }
    modules = {
        name: site["args"][1]
        for name, site in nodes.items()
        if site["type"] == "param"
        and len(site["args"]) > 1
        and isinstance(site["args"][1], torch.nn.Parameter)
    }
    fill = {}
    for name in kinds.observations:
        filled = _check_observation(nodes[name])
        if filled is not None:
            fill[name] = filled
    program = replace(program, modules=modules, fill=fill, cast=cast or cast_again)
    nesting = max(
        (
            -f.dim
            for site in nodes.values()
            if site["type"] == "sample"
            for f in plate_frames(site)
            if f.vectorized
        ),
        default=0,
    )
    factor_sites = {*kinds.observations, *kinds.assignments}
    start = {name: parameter.value for name, parameter in parameters.items()}
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
        _check_dependence(program, start, nesting, frozenset(factor_sites), parameters)
    plates = {
        name: tuple(
            f.name
            for f in sorted(plate_frames(nodes[name]), key=lambda f: f.dim or 0)
            if f.vectorized
        )
        for name in factor_sites
    }
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
        frozenset(kinds.imputed),
        tuple(kinds.observations),
        frozenset(factor_sites),
        plates,
        unit,
        tuple(sizes[name] for name in unit),
    )


@dataclass
class _Kinds:
    observations: list[str]
    assignments: list[str]
    parameters: list[str]
    imputed: list[str]


def _classify(nodes: Mapping[str, Site]) -> _Kinds:
    kinds = _Kinds([], [], [], [])
    continuous = []
    for name, site in nodes.items():
        if site["type"] == "param":
            kinds.parameters.append(name)
        if site["type"] != "sample" or is_deterministic(site):
            continue
        if is_plate_site(site):
            _check_plate(name, site)
        elif site["is_observed"]:
            _check_batch(name, site)
            kinds.observations.append(name)
        elif (
            name.endswith("_unobserved")
            and name[: -len("un") - len("observed")] + "observed" in nodes
        ):
            kinds.imputed.append(name)
            if site["fn"].has_enumerate_support:
                kinds.assignments.append(name)
        elif site["fn"].has_enumerate_support:
            _check_batch(name, site)
            kinds.assignments.append(name)
        elif site["fn"].support.is_discrete:
            raise ModelError(
                f"Site '{name}' is an unobserved {_kind(site)}, whose support is not finite, so it"
                " cannot be summed out. Expected a Categorical, OneHotCategorical, Bernoulli or"
                " Binomial assignment; for a count, use a Categorical over its likely values."
            )
        else:
            continuous.append(name)
    rows = {
        n: frozenset(f.name for f in plate_frames(nodes[n]))
        for n in (*kinds.observations, *kinds.assignments)
    }
    for name in continuous:
        site = nodes[name]
        own = frozenset(f.name for f in plate_frames(site))
        inside = [n for n, plates in rows.items() if plates and plates <= own]
        if not site["infer"].get("parameter") and (inside or in_markov(site)):
            where = (
                f"plate {quoted(sorted(own))}, as '{inside[0]}' does" if inside else "pyro.markov"
            )
            raise ModelError(
                f"Site '{name}' is an unobserved continuous {_kind(site)} that stands in {where}: a"
                " latent variable of each row, which cannot be summed out exactly. Integrate it out"
                " in the program, or mark it with infer={'parameter': True} to maximise over it."
            )
        kinds.parameters.append(name)
    if not kinds.observations:
        raise ModelError(
            "The program has no observation: no pyro.sample statement has obs=. Check that the"
            " data is passed to fit() and on to obs=."
        )
    return kinds


def _kind(site: Site) -> str:
    return type(unwrap(site["fn"])[0]).__name__


def _check_plate(name: str, site: Site) -> None:
    size, subsample = site["fn"].size, site["fn"].subsample_size
    if subsample is not None and subsample < size:
        raise ModelError(
            f"Plate '{name}' is subsampled ({subsample} of {size}); a fit uses all the data."
            " Take subsample_size and subsample out of the program."
        )


def _check_batch(name: str, site: Site) -> None:
    """Every batch dim of size over one must be a plate."""
    dims = {f.dim for f in plate_frames(site) if f.vectorized}
    shape = site["fn"].batch_shape
    wide = [i - len(shape) for i, size in enumerate(shape) if size > 1]
    loose = [dim for dim in wide if dim not in dims]
    if loose:
        raise ModelError(
            f"Site '{name}' has batch shape {tuple(shape)}, but no plate declares dim {loose[0]}."
            " Put the statement into a pyro.plate of that size, or declare the dim a part of the"
            " event with .to_event()."
        )


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


def _check_observation(site: Site) -> Tensor | None:
    """Check the data of an observation; where masked cells are NaN, return the data without."""
    name, fn, value = site["name"], site["fn"], site["value"]
    if isinstance(fn, pyro.distributions.Unit):
        return None
    expected = tuple(fn.batch_shape + fn.event_shape)
    try:
        fits = torch.broadcast_shapes(value.shape, expected) == expected
    except RuntimeError:
        fits = False
    if not fits:
        raise DataError(
            f"Site '{name}': expected data of shape {expected}, got {tuple(value.shape)}."
        )
    base, _, _ = unwrap(fn)
    mask = base_mask(site)
    if mask is not None:
        mask = mask.reshape(mask.shape + (1,) * len(base.event_shape))
        value, mask = torch.broadcast_tensors(value, mask)
    bad = ~value.isfinite()
    shown = bad if mask is None else bad & mask
    if shown.any():
        index = tuple(int(i) for i in shown.nonzero()[0])
        raise DataError(
            f"Site '{name}': expected finite data, got {value[index].item()} at index {index}"
            f" ({int(shown.sum())} such cells). Mask them (poutine.mask, .mask() or obs_mask)."
        )
    filled = None
    if bad.any():
        value = filled = torch.where(bad, value[~bad].mean() if (~bad).any() else 0.0, value)
    try:
        ok = base.support.check(value)
    except NotImplementedError:
        return filled
    if mask is not None:
        cell_mask = mask
        for _ in range(mask.dim() - ok.dim()):
            cell_mask = cell_mask[..., 0]
        ok = ok | ~cell_mask
    if not ok.all():
        index = tuple(int(i) for i in (~ok).nonzero()[0])
        raise DataError(
            f"Site '{name}': {type(base).__name__} data must lie in {base.support}, got"
            f" {value[index].tolist()} at index {index} ({int((~ok).sum())} such cells)."
        )
    return filled


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


def _check_dependence(
    program: Program,
    start: Values,
    nesting: int,
    factor_sites: frozenset[str],
    parameters: Mapping[str, Parameter],
) -> None:
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    run = enumerated(program, leaves, nesting, factor_sites)
    total = sum((t.sum() for t in run.tensors().values()), torch.zeros(()))
    for name, parameter in parameters.items():
        if parameter.has_prior and name not in factor_sites:
            site = run.trace.nodes[name]
            total = total + site["fn"].log_prob(site["value"].detach()).sum()
    if not total.requires_grad:
        grads: list[Tensor | None] = [None] * len(leaves)
    else:
        grads = list(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
    unused = [name for name, g in zip(leaves, grads, strict=True) if g is None]
    if unused:
        raise ModelError(
            f"No site depends on parameter {quoted(unused)}: the data cannot inform it. Take it out"
            " of the program, or use it."
        )


def _unit(
    plates: Mapping[str, tuple[str, ...]], assignments: list[str], observations: list[str]
) -> tuple[str, ...]:
    """The plates common to all assignments that are in plates, else to all observations."""
    members = [plates[n] for n in assignments if plates[n]] or [plates[n] for n in observations]
    common = set(members[0]).intersection(*members[1:])
    return tuple(p for p in members[0] if p in common)
