"""The number of free parameters of a plan: of the directions in which the model changes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.families import forms
from pyroem.mstep.blocks import Rung
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Run
from pyroem.structure import Params

MOST = 200  # coordinates whose effect is looked at
FLAT = 1e-9  # relative


def degrees_of_freedom(plan: Plan) -> int:
    """The dimensions of the free parameters' spaces, less the directions that change nothing.

    Those are the constants that may be added to logits, coefficients of covariates that are sums of
    others, and what a function of several parameters does not tell apart.
    """
    regressed = {name for r in plan.regressions for name in r.offsets}
    total, linked = 0, []
    for name, block in plan.blocks.items():
        if block.rung is Rung.FIXED:
            continue
        free = plan.structure.parameters[name].df
        has_prior = plan.structure.parameters[name].has_prior
        if not has_prior and not any(name in d for d in plan.reading.dependence.values()):
            continue  # nothing depends on it
        if name in regressed:
            total += free
        elif block.rung is not Rung.CLOSED_FORM and _in_arguments(plan, name):
            linked.append(name)
        else:
            total += free - _constants(plan, name, free)
    total -= sum(r.null.shape[1] for r in plan.regressions)
    return total + _rank(plan, linked)


def _constants(plan: Plan, name: str, free: int) -> int:
    """Only differences of logits and ratios of unnormalised probabilities count."""
    form, parameter = plan.blocks[name].form, plan.structure.parameters[name]
    unnormalised = form is forms.SIMPLEX and free == parameter.value.numel()
    if (form is forms.LOGITS or unnormalised) and parameter.held is None:
        return free // parameter.shape[-1]
    return 0


def _in_arguments(plan: Plan, name: str) -> bool:
    """Whether the sites that it stands in all have a family, and do not vary along the rows."""
    sites = [s for s, depends in plan.reading.dependence.items() if name in depends]
    known = [plan.reading.sites[s] for s in sites if s in plan.reading.sites]
    along = any(a.varies & s.unit_dims for s in known for a in s.arguments.values())
    return bool(sites) and len(known) == len(sites) and not along


def _rank(plan: Plan, names: list[str]) -> int:
    """The rank of the sites' arguments as functions of ``names``, at a random point."""
    parameters, point = plan.structure.parameters, plan.reading.points[0]
    full = sum(parameters[n].df for n in names)
    raw = {n: parameters[n].unconstrain(point[n]).detach().requires_grad_() for n in names}
    if not names or sum(v.numel() for v in raw.values()) > MOST:
        return full
    sites = [s for s in plan.reading.sites.values() if plan.reading.dependence[s.name] & set(names)]
    with isolated(plan.structure.program.dtype, 0), torch.enable_grad():
        values: Params = {**point, **{n: parameters[n].constrain(r) for n, r in raw.items()}}
        run = Run(plan, values)
        found = torch.cat([v.reshape(-1) for s in sites for v in run.arguments(s).values()])
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
