"""The plan of an M-step: what is updated how, in which order, and what together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.mstep.agreement import check_families
from pyroem.mstep.blocks import Block, Rung, Use
from pyroem.mstep.ladder import place
from pyroem.mstep.predictors import find_predictors
from pyroem.mstep.probing import Reading, read_sites
from pyroem.mstep.regression import Regression, regression
from pyroem.mstep.scales import search_steps
from pyroem.mstep.sites import Argument, SiteModel
from pyroem.structure import Fixed, Structure, hold


@dataclass(frozen=True)
class Plan:
    """What an M-step does, in order: closed forms and regressions, then the numerical blocks.

    ``interacting`` says that one pass over the blocks may leave something to gain, so they are
    updated in turn until they settle; ``steps`` are the units of numerical searches.
    """

    structure: Structure
    reading: Reading
    blocks: dict[str, Block]
    interacting: bool
    steps: dict[str, Tensor]
    regressions: tuple[Regression, ...] = ()

    def on(self, rung: Rung) -> list[Block]:
        """The blocks on one rung, in the order of their update."""
        return [block for block in self.blocks.values() if block.rung is rung]

    @property
    def weighted_sites(self) -> frozenset[str]:
        """The sites whose posterior weights, not only statistics, the M-step needs."""
        gradient = {b.name for b in self.on(Rung.GRADIENT)}
        return frozenset(s for s, d in self.reading.dependence.items() if d & gradient)


def make_plan(structure: Structure, fixed: Fixed = ()) -> Plan:
    """Read the sites and put every parameter on the first rung that holds."""
    structure, whole = hold(structure, fixed)
    reading = read_sites(structure)
    with isolated(structure.program.dtype, 0), torch.no_grad():
        check_families(reading.sites.values(), reading.traces, reading.points[0])
        reading = find_predictors(structure, reading)
    blocks = {}
    for name, parameter in structure.parameters.items():
        if name in whole:
            blocks[name] = Block(name, Rung.FIXED, "held at its start, as asked")
        else:
            blocks[name] = place(structure, reading, parameter)
    blocks = {n: _with_partners(structure, b, blocks) for n, b in blocks.items()}
    blocks = {n: _searched_with_others(reading, b, blocks) for n, b in blocks.items()}
    # Locations and profiles first: what is then found around them is exact.
    leading = _leading_parameters(reading)
    order = sorted(blocks.values(), key=lambda b: not (b.partners or b.name in leading))
    blocks = {b.name: b for b in order}
    steps = search_steps(structure, reading, blocks)
    interacting = _interacting(structure, reading, order)
    regressions = tuple(
        regression(structure, reading.places, names) for names in _solved_together(reading, order)
    )
    for together in regressions:
        for name in together.offsets:
            blocks[name] = replace(blocks[name], reason=_in_words(together, blocks[name]))
    return Plan(structure, reading, blocks, interacting, steps, regressions)


def _searched_with_others(reading: Reading, block: Block, blocks: dict[str, Block]) -> Block:
    """The block; where a search goes on over what it is added to, a part of that search."""
    if block.rung is not Rung.REGRESSION:
        return block
    for site in reading.places:
        for argument in site.arguments.values():
            if block.name not in argument.parameters or argument.affine is None:
                continue
            for other in argument.affine.names:
                rung = blocks[other].rung
                if rung in (Rung.ON_STATISTICS, Rung.ON_ROWS):
                    return Block(block.name, rung, f"searched for together with '{other}'")
    return block


def _solved_together(reading: Reading, blocks: Iterable[Block]) -> list[list[str]]:
    """The coefficients of regressions, those that stand in one predictor together."""
    names = [b.name for b in blocks if b.rung is Rung.REGRESSION]
    groups = [{name} for name in names]
    for site in reading.places:
        for argument in site.arguments.values():
            linked = [g for g in groups if g & argument.parameters]
            if len(linked) > 1:
                groups = [g for g in groups if g not in linked] + [set[str]().union(*linked)]
    return [[n for n in names if n in g] for g in groups]


def _in_words(together: Regression, block: Block) -> str:
    terms = [t for t in together.terms if block.name in t.affine.names]
    where = ", ".join(f"{t.affine.coordinate.name} of {t.site.title}" for t in terms[:3])
    more = f" and {len(terms) - 3} more" if len(terms) > 3 else ""
    how = "weighted least squares" if together.exact else "Newton's method (IRLS)"
    reason = f"{how} ({where}{more}{block.reason})"
    others = "', '".join(n for n in together.offsets if n != block.name)
    if others:
        reason += f", together with '{others}'"
    if together.null.shape[1]:
        count = together.null.shape[1]
        reason += (
            f"; {count} of its {together.size} directions change nothing: of all maximisers, the"
            " one nearest to zero"
        )
    return reason


def _with_partners(structure: Structure, block: Block, blocks: dict[str, Block]) -> Block:
    """The block with the parameters that follow it freely, where its coordinate has a profile."""

    def alone_and_free(name: str) -> bool:
        closed = blocks[name].rung is Rung.CLOSED_FORM and len(blocks[name].uses) == 1
        parameter = structure.parameters[name]
        return closed and not parameter.has_prior and parameter.held is None

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


def _leading_parameters(reading: Reading) -> frozenset[str]:
    """The parameters of arguments that are updated first."""
    found = (site.arguments.get(_leading(site) or "") for site in reading.sites.values())
    return frozenset().union(*(a.parameters for a in found if a is not None))


def _leading(site: SiteModel) -> str | None:
    return site.family.leading or site.family.location


def _interacting(structure: Structure, reading: Reading, blocks: list[Block]) -> bool:
    """Whether one pass over the blocks may leave something to gain."""
    closed = [b for b in blocks if b.rung in (Rung.CLOSED_FORM, Rung.REGRESSION)]
    if any(b.rung is Rung.GRADIENT for b in blocks):
        return False  # generalised EM: the next iteration gains it
    moving = frozenset(b.name for b in closed)
    numeric = frozenset(b.name for b in blocks if b.rung is Rung.ON_STATISTICS)
    if any(d & moving and d & numeric for d in reading.dependence.values()):
        return True
    if any(reading.prior_dependence.get(b.name) for b in closed):
        return True
    if any(use.multiple for b in closed for use in b.uses):
        return True
    leading = _leading_parameters(reading)
    if any(structure.parameters[b.name].has_prior and b.name in leading for b in closed):
        return True  # a location's prior is weighed against the scale
    profiled = {u.site.name for b in closed if b.partners for u in b.uses}
    return any(
        not _separable(site, moving)
        for name, site in reading.sites.items()
        if name not in profiled and any(a.parameters & moving for a in site.arguments.values())
    )


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
    blocks = _blocks_at(location)
    return blocks is not None and all(
        other.selection is not None and _one_each(blocks, other.selection.index) for other in others
    )


def _blocks_at(argument: Argument) -> Tensor | None:
    """For each cell the number of the block, or of the linked coefficients, that stand there."""
    if argument.selection is not None:
        return argument.selection.index
    if argument.affine is None or argument.affine.loose:
        return None
    return argument.affine.components


__all__ = ["Block", "Plan", "Rung", "Use", "make_plan"]
