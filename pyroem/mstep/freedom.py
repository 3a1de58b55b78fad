"""The number of free parameters of a plan: of the directions in which the model changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroem._pyro import isolated
from pyroem.families import forms
from pyroem.mstep.blocks import Rung
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Run
from pyroem.mstep.selection import as_blocks
from pyroem.mstep.sites import SiteModel
from pyroem.structure import Params

MOST, MOST_ALONG = 200, 50  # coordinates whose effect is looked at: on few cells, on all rows
FLAT = 1e-9  # relative


def degrees_of_freedom(plan: Plan) -> int:
    """The dimensions of the free parameters' spaces, less the directions that change nothing.

    Those are the constants that may be added to logits, coefficients of covariates that are sums of
    others, and what a function of several parameters does not tell apart.
    """
    regressed = {name for r in plan.regressions for name in r.offsets}
    reading = plan.reading
    used = frozenset().union(*reading.dependence.values(), *reading.prior_dependence.values())
    total, linked = 0, []
    for name, block in plan.blocks.items():
        parameter = plan.structure.parameters[name]
        if block.rung is Rung.FIXED or (name not in used and not parameter.has_prior):
            continue
        multiple = any(use.multiple for use in block.uses)
        if name in regressed:
            total += parameter.df
        elif (block.rung is not Rung.CLOSED_FORM or multiple) and _in_arguments(plan, name):
            linked.append(name)
        else:
            total += _of_block(plan, name)
    total -= sum(r.null.shape[1] for r in plan.regressions)
    return total + _rank(plan, linked)


def _of_block(plan: Plan, name: str) -> int:
    """Of the parts of a parameter that stand somewhere; of logits only the differences."""
    block, parameter = plan.blocks[name], plan.structure.parameters[name]
    form, free = block.form, parameter.df
    if form is None or not block.uses or parameter.has_prior or block.shared is not None:
        return free
    blocks = as_blocks(parameter.value, form.event_dim)
    cells = torch.cat([use.cells.reshape(-1) for use in block.uses])
    stand = torch.unique(cells[cells >= 0])
    held = torch.zeros(blocks.shape, dtype=torch.bool)
    if parameter.held is not None:
        held = as_blocks(parameter.held, form.event_dim)
    loose = stand[~held.reshape((len(blocks), -1))[stand].any(1)]
    if form.event_dim == 0:
        return len(stand) - int(held[stand].sum())
    missing = len(blocks) - len(stand)
    if parameter.held is None:
        free -= missing * (free // max(len(blocks), 1))
    unnormalised = form is forms.SIMPLEX and parameter.kind is not constraints.simplex
    return free - (len(loose) if form is forms.LOGITS or unnormalised else 0)


def _in_arguments(plan: Plan, name: str) -> bool:
    """Whether the sites that it stands in all have a family."""
    sites = [s for s, depends in plan.reading.dependence.items() if name in depends]
    return bool(sites) and all(s in plan.reading.sites for s in sites)


def _rank(plan: Plan, names: list[str]) -> int:
    """The rank of the sites' arguments as functions of ``names``, at a random point."""
    parameters, point = plan.structure.parameters, plan.reading.points[0]
    full = sum(parameters[n].df for n in names)
    raw = {n: parameters[n].unconstrain(point[n]).detach().requires_grad_() for n in names}
    sites = [s for s in plan.reading.sites.values() if plan.reading.dependence[s.name] & set(names)]
    along = any(a.varies & s.unit_dims for s in sites for a in s.arguments.values())
    if not names or sum(v.numel() for v in raw.values()) > (MOST_ALONG if along else MOST):
        return full
    with isolated(plan.structure.program.dtype, 0), torch.enable_grad():
        values: Params = {**point, **{n: parameters[n].constrain(r) for n, r in raw.items()}}
        run = Run(plan, values)
        found = torch.cat([v.reshape(-1) for s in sites for v in _told(s, run)])
        generator = torch.Generator().manual_seed(0)
        rows: list[Tensor] = []
        for _ in range(full + 5):  # a sketch has the same rank
            mix = torch.randn(len(found), generator=generator, dtype=torch.float64).to(found)
            grads = torch.autograd.grad(
                found @ mix, list(raw.values()), retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    jacobian = torch.stack(rows)
    scale = jacobian.norm(dim=0).clamp(min=1e-300)
    singular = torch.linalg.svdvals(jacobian / scale)
    return int((singular > FLAT * singular.max()).sum()) if len(singular) else 0


def _told(site: SiteModel, run: Run) -> Iterable[Tensor]:
    """What a distribution is told: its natural parameters, or its arguments."""
    arguments = run.arguments(site)
    if site.family.natural is None:
        return arguments.values()
    eta, normaliser = site.family.natural(arguments)
    return (*eta, normaliser)
