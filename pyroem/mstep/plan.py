"""The ladder: for each parameter the first rung that holds, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints

from pyroem._pyro import isolated, unwrap
from pyroem.families.forms import Form
from pyroem.mstep.agreement import check_families
from pyroem.mstep.blocks import Block, Rung, Use
from pyroem.mstep.scales import search_steps
from pyroem.mstep.sites import Reading, SiteModel, read_sites
from pyroem.structure import Parameter, Structure, base_mask, check_names


@dataclass(frozen=True)
class Plan:
    """What an M-step does, in order: closed forms, then the numerical blocks.

    ``interacting`` says that one pass over the blocks may leave something to gain, so they are
    updated in turn until they settle; ``steps`` are the units of numerical searches.
    """

    structure: Structure
    reading: Reading
    blocks: dict[str, Block]
    interacting: bool
    steps: dict[str, Tensor]

    def on(self, rung: Rung) -> list[Block]:
        """The blocks on one rung, in the order of their update."""
        return [block for block in self.blocks.values() if block.rung is rung]

    @property
    def weighted_sites(self) -> frozenset[str]:
        """The sites whose posterior weights, not only statistics, the M-step needs."""
        gradient = {b.name for b in self.on(Rung.GRADIENT)}
        return frozenset(s for s, d in self.reading.dependence.items() if d & gradient)


def make_plan(structure: Structure, fixed: Iterable[str] = ()) -> Plan:
    """Read the sites and put every parameter on the first rung that holds."""
    fixed = frozenset(fixed)
    check_names(fixed, structure.parameters, "fixed")
    reading = read_sites(structure)
    with isolated(structure.program.dtype, 0), torch.no_grad():
        check_families(reading.sites.values(), reading.traces, reading.points[0])
    blocks = {}
    for name, parameter in structure.parameters.items():
        if name in fixed:
            blocks[name] = Block(name, Rung.FIXED, "held at its start, as asked")
        else:
            blocks[name] = _place(structure, reading, parameter)
    blocks = {n: _with_partners(structure, b, blocks) for n, b in blocks.items()}
    # Locations and profiles first: what is then found around them is exact.
    order = sorted(blocks.values(), key=lambda b: not (b.partners or _is_location(b)))
    blocks = {b.name: b for b in order}
    steps = search_steps(structure, reading, blocks)
    return Plan(structure, reading, blocks, _interacting(structure, reading, order), steps)


def _with_partners(structure: Structure, block: Block, blocks: dict[str, Block]) -> Block:
    """The block with the parameters that follow it freely, where its coordinate has a profile."""

    def alone_and_free(name: str) -> bool:
        closed = blocks[name].rung is Rung.CLOSED_FORM and len(blocks[name].uses) == 1
        return closed and not structure.parameters[name].has_prior

    if not alone_and_free(block.name) or block.uses[0].coordinate.profile is None:
        return block
    (use,) = block.uses
    own = use.site.arguments[use.coordinate.argument]
    others = [a for a in use.site.arguments.values() if a is not own]
    partners = frozenset().union(*(a.parameters for a in others))
    if len(others) != 1 or not partners or block.name in partners:
        return block
    few, many = own.selection, others[0].selection
    if few is None or many is None or many.constants.numel():
        return block
    if not all(map(alone_and_free, partners)) or not _one_each(many.index, few.index):
        return block
    names = "', '".join(sorted(partners))
    reason = f"{block.reason}, with '{names}' at its maximum"
    return replace(block, partners=partners, reason=reason)


def _one_each(many: Tensor, few: Tensor) -> bool:
    """Whether every block of ``many`` stands beside one block of ``few`` only."""
    a, b = torch.broadcast_tensors(many, few)
    pairs = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1)
    return pairs.shape[1] == torch.unique(pairs[0]).numel()


def _is_location(block: Block) -> bool:
    return any(u.coordinate.argument == _leading(u.site) for u in block.uses)


def _leading(site: SiteModel) -> str | None:
    return site.family.leading or site.family.location


def _interacting(structure: Structure, reading: Reading, blocks: list[Block]) -> bool:
    """Whether one pass over the blocks may leave something to gain."""
    closed = [b for b in blocks if b.rung is Rung.CLOSED_FORM]
    if any(b.rung is Rung.GRADIENT for b in blocks):
        return False  # generalised EM: the next iteration gains it
    moving = frozenset(b.name for b in closed)
    numeric = frozenset(b.name for b in blocks if b.rung is Rung.ON_STATISTICS)
    if any(d & moving and d & numeric for d in reading.dependence.values()):
        return True
    if any(reading.prior_dependence.get(b.name) for b in closed):
        return True
    if any(structure.parameters[b.name].has_prior and _is_location(b) for b in closed):
        return True  # a location's prior is weighed against the scale
    profiled = {u.site.name for b in closed if b.partners for u in b.uses}
    sites = {u.site.name: u.site for b in closed for u in b.uses}
    return any(not _separable(site, moving) for n, site in sites.items() if n not in profiled)


def _separable(site: SiteModel, moving: frozenset[str]) -> bool:
    """Whether each argument's optimum is found without the arguments that come after it.

    A location's is where every location block meets one scale block only: then the scale cancels.
    ``moving`` are the parameters that are updated in closed form.
    """
    location = site.arguments.get(_leading(site) or "")
    if location is None:
        return sum(bool(a.parameters & moving) for a in site.arguments.values()) < 2
    if not location.parameters:
        return True
    others = [a for a in site.arguments.values() if a is not location and a.parameters]
    if not others:
        return True
    if location.selection is None or any(a.selection is None for a in others):
        return False
    for other in others:
        assert other.selection is not None
        if not _one_each(location.selection.index, other.selection.index):
            return False
    return True


def _place(structure: Structure, reading: Reading, parameter: Parameter) -> Block:
    name = parameter.name
    if parameter.df == 0:
        return Block(name, Rung.FIXED, "it has only one possible value")
    touched = [s for s, depends in reading.dependence.items() if name in depends]
    without = [s for s in touched if s not in reading.sites]
    if without:
        site = reading.traces[0].trace.nodes[without[0]]
        kind = type(unwrap(site["fn"])[0]).__name__
        if without[0] in structure.parameters:
            reason = f"the prior of '{without[0]}' depends on an assignment"
        else:
            reason = f"no exponential family is registered for {kind} (site '{without[0]}')"
        return Block(name, Rung.GRADIENT, reason)
    closed = _closed(structure, reading, parameter, touched)
    if closed.rung is Rung.CLOSED_FORM:
        return closed
    for s in touched:
        site = reading.sites[s]
        if site.along_rows:
            argument = next(a for a in site.arguments.values() if a.varies & site.unit_dims)
            plate = "', '".join(structure.unit)
            reason = f"argument {argument.name} of site '{s}' varies along plate '{plate}'"
            return Block(name, Rung.GRADIENT, reason)
    return closed


def _closed(
    structure: Structure, reading: Reading, parameter: Parameter, touched: list[str]
) -> Block:
    """The closed form, or a block on the statistics with the reason why there is none."""
    name = parameter.name

    def numeric(reason: str) -> Block:
        return Block(name, Rung.ON_STATISTICS, reason)

    hyper = [p for p, depends in reading.prior_dependence.items() if name in depends]
    if hyper:
        return numeric(f"the prior of '{hyper[0]}' depends on it")
    uses = []
    for s in touched:
        for argument in reading.sites[s].arguments.values():
            if name not in argument.parameters:
                continue
            if argument.selection is None:
                family = reading.sites[s].family
                if any(c.argument == argument.name for c in family.coordinates):
                    why = "is a function of it, not a selection"
                else:
                    why = "has no closed form (its family has no Coordinate for it)"
                return numeric(f"argument {argument.name} of site '{s}' {why}")
            cells = argument.selection.cells_of(name)
            uses.append(Use(reading.sites[s], argument.selection.coordinate, cells))
    if not uses:
        return numeric("only its prior depends on it")
    form = uses[0].coordinate.form
    other = next((u for u in uses if u.coordinate.form is not form), None)
    if other is not None:
        return numeric(
            f"it stands as {uses[0].coordinate.name} in site '{uses[0].site.name}' and as"
            f" {other.coordinate.name} in site '{other.site.name}'"
        )
    bounds = bounds_of(parameter, form)
    if bounds is None:
        return numeric(
            f"its constraint {parameter.constraint} does not suit the {form.name} kernel"
        )
    where = ", ".join(
        dict.fromkeys(f"{u.coordinate.name} of site '{u.site.name}'" for u in uses[:3])
    )
    if len(uses) > 3:
        where += f" and {len(uses) - 3} more sites"
    reason = f"{form.name} kernel ({where})"
    if parameter.has_prior:
        prior = reading.traces[0].trace.nodes[name]
        base, _, masks = unwrap(prior["fn"])
        kind = type(base).__name__
        if type(base) is dist.Uniform and form.event_dim == 0:
            reason += ", Uniform prior: clipped to its bounds"
        elif type(base) in form.conjugate and not masks and base_mask(prior) is None:
            reason += f", conjugate {kind} prior"
        else:
            return numeric(f"the {kind} prior is not conjugate to the {form.name} kernel")
    return Block(name, Rung.CLOSED_FORM, reason, form, tuple(uses), *bounds)


def bounds_of(parameter: Parameter, form: Form) -> tuple[float, float] | None:
    """The interval of a scalar kernel, or ``(-inf, inf)`` where a block's constraint suits it."""
    constraint, events = parameter.constraint, 0
    while isinstance(constraint, constraints.independent):
        events += constraint.reinterpreted_batch_ndims
        constraint = constraint.base_constraint
    if "scalar" in form.domain:
        return interval_of(constraint)
    kinds: dict[str, Any] = {
        "simplex": constraints.simplex,
        "positive_definite": constraints.positive_definite,
        "lower_cholesky": (constraints.lower_cholesky, dist.constraints.softplus_lower_cholesky),
    }
    for domain in form.domain:
        if domain == "real_vector" and interval_of(constraint) == (-torch.inf, torch.inf):
            return -torch.inf, torch.inf
        if domain == "circle" and interval_of(constraint) in (
            (-torch.inf, torch.inf),
            (-math.pi, math.pi),
        ):
            return -torch.inf, torch.inf
        if domain == "positive_vector" and interval_of(constraint) == (0.0, torch.inf):
            return -torch.inf, torch.inf
        wanted = kinds.get(domain, ())
        if constraint in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return -torch.inf, torch.inf
    return None


def interval_of(constraint: Any) -> tuple[float, float] | None:
    """The bounds of an elementwise constraint; None where it is none."""
    if constraint in (constraints.real, constraints.real_vector):
        return -torch.inf, torch.inf
    if constraint in (
        constraints.positive,
        constraints.nonnegative,
        dist.constraints.softplus_positive,
    ):
        return 0.0, torch.inf
    lower = getattr(constraint, "lower_bound", None)
    upper = getattr(constraint, "upper_bound", None)
    known = (
        constraints.greater_than,
        constraints.greater_than_eq,
        constraints.less_than,
        constraints.interval,
        constraints.half_open_interval,
    )
    if not isinstance(constraint, tuple(k for k in known if isinstance(k, type))):
        return None
    bounds = [torch.as_tensor(b) for b in (lower, upper) if b is not None]
    if any(b.numel() != 1 for b in bounds):
        return None
    return (
        -torch.inf if lower is None else float(lower),
        torch.inf if upper is None else float(upper),
    )


__all__ = ["Block", "Plan", "Rung", "Use", "bounds_of", "interval_of", "make_plan"]
