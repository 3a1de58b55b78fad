"""The M-step: maximise the expected log-joint, block by block, never lowering it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import site_log_prob, unwrap
from pyroem.families import Arguments
from pyroem.families.forms import Form
from pyroem.mstep.maximise import maximise
from pyroem.mstep.plan import Block, Plan, Rung, Use
from pyroem.mstep.selection import as_blocks
from pyroem.mstep.sites import SiteModel
from pyroem.statistics import Statistics
from pyroem.structure import Params

THOROUGH = (50, 200)  # sweeps over interacting blocks, L-BFGS iterations in each
QUICK = (3, 20)
SWEEP_TOLERANCE = 1e-9
GRADIENT_STEPS = 10
FEW = 32  # coordinates for which second derivatives are taken
SMALLEST = {torch.float64: 1e-100, torch.float32: 1e-30}


@dataclass(frozen=True)
class Expected:
    """What the E-step hands over: statistics of sites with a family, weights of the others.

    ``weights`` (Pyro's layout) are there for the sites that gradient blocks need.
    """

    log_likelihood: Tensor
    statistics: Statistics
    weights: Mapping[str, Tensor]

    def select(self, index: Tensor) -> Expected:
        """Those of some copies, where the first dim counts copies."""
        statistics = {name: s.select(index) for name, s in self.statistics.items()}
        return Expected(self.log_likelihood.index_select(0, index), statistics, self.weights)


class Run:
    """The program's distributions at some parameters, traced only if something asks."""

    def __init__(self, plan: Plan, params: Params) -> None:
        self.plan, self.params = plan, params
        self._nodes: Any = None

    @property
    def nodes(self) -> Any:
        """The sites of the program."""
        if self._nodes is None:
            structure = self.plan.structure
            self._nodes = structure.program.run(self.params, nesting=structure.nesting).nodes
        return self._nodes

    def arguments(self, site: SiteModel) -> Arguments:
        """A site's canonical arguments."""
        return site.evaluate(self.params, lambda: unwrap(self.nodes[site.name]["fn"])[0])

    def centred(self, site: SiteModel) -> Arguments:
        """A site's arguments, the location counted from the data's centre; each made when used."""
        return _Centred(site, self)

    def prior(self, name: str) -> Any:
        """The prior's site, from the first reading where its arguments are constants."""
        if not self.plan.reading.prior_dependence[name]:
            return self.plan.reading.traces[0].trace.nodes[name]
        return self.nodes[name]

    def log_prior(self, name: str) -> Tensor:
        """The log prior density of a parameter."""
        site = {**self.prior(name), "value": self.params[name]}
        return (site_log_prob(site) * site["scale"]).sum()


class _Centred(Arguments):
    """Arguments that are evaluated when they are asked for."""

    def __init__(self, site: SiteModel, run: Run) -> None:
        super().__init__()
        self.site, self.run = site, run

    def __missing__(self, key: str) -> Tensor:
        site = self.site
        selection = site.arguments[key].selection
        if selection is None:
            value = self.run.arguments(site)[key]
        else:
            value = selection.argument(self.run.params)
        if key == site.family.location and site.centre is not None:
            value = value - site.centre
        self[key] = value
        return value


def m_step(
    plan: Plan,
    params: Params,
    expected: Expected,
    floor: Mapping[str, Tensor] | None = None,
    only: frozenset[str] | None = None,
    effort: tuple[int, int] = THOROUGH,
) -> Params:
    """New parameters with at least the expected log-joint of ``params``.

    Blocks that interact (a shared mean with several variances) are updated in turn until they
    settle, or as often as the ``effort`` allows; what is left to gain, the next M-step gains.
    ``only`` restricts the update to some parameters (for a partial start).
    """
    sweeps, iterations = effort
    chosen = [
        b
        for b in plan.blocks.values()
        if b.rung is not Rung.FIXED and (only is None or b.name in only)
    ]
    names = {b.name for b in chosen}
    closed = [b for b in chosen if b.rung is Rung.CLOSED_FORM]
    numeric = [b for b in chosen if b.rung is Rung.ON_STATISTICS]
    gradient = [b for b in chosen if b.rung is Rung.GRADIENT]
    current = dict(params)
    for sweep in range(sweeps):
        before = current
        for block in closed:
            if block.partners and block.partners <= names:
                block = block.profiled
            value = closed_update(plan, block, current, expected, floor)
            current = {**current, block.name: value}
        if numeric:
            own = [b.name for b in numeric]
            current = {**current, **_on_statistics(plan, own, current, expected, iterations)}
        if gradient and sweep == 0:
            own = [b.name for b in gradient]
            current = {**current, **_on_data(plan, own, current, expected)}
        if not plan.interacting:
            break
        moved = max((_relative(current[b.name], before[b.name]) for b in chosen), default=0.0)
        if moved < SWEEP_TOLERANCE:
            break
    return current


def _relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().max() / (old.abs().max() + 1e-300)) if new.numel() else 0.0


def closed_update(
    plan: Plan,
    block: Block,
    params: Params,
    expected: Expected,
    floor: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The maximiser of the expected log-joint in one parameter, the others held fixed.

    Blocks without any weight (a dead component) keep their value.
    """
    form, old = block.form, params[block.name]
    assert form is not None
    run = Run(plan, params)
    totals = pooled(block, run, expected)
    if plan.structure.parameters[block.name].has_prior:
        prior = _prior_coefficients(form, run.prior(block.name), old)
        totals = tuple(t + p.reshape(t.shape) for t, p in zip(totals, prior, strict=True))
    value = form.mode(*totals).reshape(old.shape)
    if not math.isfinite(value.sum()):
        value = torch.where(_finite_blocks(value, form.event_dim), value, old)
    coordinate = block.uses[0].coordinate
    if floor is not None and block.name in floor and coordinate.clip is not None:
        value = coordinate.clip(value, floor[block.name])
    if "scalar" in form.domain:
        value = _inside(value, block.lower, block.upper)
        if plan.structure.parameters[block.name].has_prior:
            value = _below(value, run.prior(block.name))
    return value


def _finite_blocks(x: Tensor, event_dim: int) -> Tensor:
    finite = x.isfinite()
    if event_dim:
        batch = finite.shape[: finite.dim() - event_dim]
        finite = finite.flatten(len(batch)).all(-1).reshape(batch + (1,) * event_dim)
    return finite


def _inside(x: Tensor, lower: float, upper: float) -> Tensor:
    """Clip to the open interval; a closed unit interval may be reached."""
    if (lower, upper) == (0.0, 1.0):
        return x.clamp(0.0, 1.0)
    if lower == 0.0:
        return x.clamp(SMALLEST[x.dtype], upper if upper < torch.inf else 1 / SMALLEST[x.dtype])
    width = 1e-12 if x.dtype == torch.float64 else 1e-6
    low = lower + width * max(1.0, abs(lower)) if lower > -torch.inf else None
    high = upper - width * max(1.0, abs(upper)) if upper < torch.inf else None
    return x if low is None and high is None else x.clamp(low, high)


def _below(x: Tensor, prior: Any) -> Tensor:
    """Off the upper bound of a Uniform prior, which gives it no density."""
    base, _, _ = unwrap(prior["fn"])
    if type(base) is not dist.Uniform:
        return x
    return torch.minimum(x, torch.nextafter(base.high.to(x), base.low.to(x)))


def pooled(block: Block, run: Run, expected: Expected) -> tuple[Tensor, ...]:
    """The coefficients of a parameter's kernel, summed over every cell where it stands."""
    form, value = block.form, run.params[block.name]
    assert form is not None
    blocks = as_blocks(value, form.event_dim)
    event = tuple(blocks.shape[1:])
    if block.alone:  # the usual case needs no sums
        found = _coefficients(block.uses[0], run, expected, form)
        shapes = [(*event[:1] * dims,) if form.event_dim else () for dims in form.coefficient_dims]
        if all(
            c.shape[: c.dim() - len(s)] == block.uses[0].cells.shape
            for c, s in zip(found, shapes, strict=True)
        ):
            return tuple(c.reshape((len(blocks), *s)) for c, s in zip(found, shapes, strict=True))
    totals: list[Tensor] = []
    for dims in form.coefficient_dims:
        shape = (*event[:1] * dims,) if form.event_dim else ()
        totals.append(torch.zeros((len(blocks), *shape), dtype=value.dtype, device=value.device))
    for use in block.uses:
        coefficients = _coefficients(use, run, expected, form)
        for i, (c, dims) in enumerate(zip(coefficients, form.coefficient_dims, strict=True)):
            batch = torch.broadcast_shapes(c.shape[: c.dim() - dims], use.cells.shape)
            index = use.cells.expand(batch).reshape(-1)
            c = c.expand(batch + c.shape[c.dim() - dims :]).reshape(
                (-1, *c.shape[c.dim() - dims :])
            )
            chosen = index >= 0
            totals[i] = totals[i].index_add(0, index[chosen], c[chosen])
    return tuple(totals)


def _coefficients(use: Use, run: Run, expected: Expected, form: Form) -> tuple[Tensor, ...]:
    site, statistics = use.site, expected.statistics[use.site.name]
    coefficients = use.coordinate.coefficients(
        statistics.values, statistics.weight, run.centred(site)
    )
    if use.coordinate.argument == site.family.location:
        return _uncentred(coefficients, site, form)
    return coefficients


def _uncentred(coefficients: tuple[Tensor, ...], site: SiteModel, form: Form) -> tuple[Tensor, ...]:
    """The kernel of a location counted from zero: ``b + a centre``."""
    b, a = coefficients
    assert site.centre is not None
    if form.event_dim == 0:
        return b + a * site.centre, a
    return b + (a @ site.centre.unsqueeze(-1)).squeeze(-1), a


def _prior_coefficients(form: Form, prior: Any, value: Tensor) -> tuple[Tensor, ...]:
    base, _, _ = unwrap(prior["fn"])
    if type(base) is dist.Uniform:
        zero = torch.zeros_like(value)
        return tuple(zero for _ in form.coefficient_dims)
    base = base.expand(value.shape[: value.dim() - len(base.event_shape)])
    scale = prior["scale"]
    return tuple((c * scale).to(value) for c in form.conjugate[type(base)](base))


def _priors_touched(plan: Plan, names: list[str]) -> list[str]:
    """The priors of ``names``, and those whose arguments depend on them."""
    hangs = plan.reading.prior_dependence
    return [p for p, depends in hangs.items() if p in names or depends & set(names)]


def _on_statistics(
    plan: Plan, names: list[str], params: Params, expected: Expected, iterations: int
) -> Params:
    """Maximise over ``names`` together, on the expected statistics alone."""
    sites = [plan.reading.sites[s] for s, d in plan.reading.dependence.items() if d & set(names)]
    priors = _priors_touched(plan, names)

    def objective(values: Params) -> Tensor:
        run = Run(plan, {**params, **values})
        total = torch.zeros((), dtype=plan.structure.program.dtype)
        for site in sites:
            total = total + site.expected_log_density(
                run.arguments(site), expected.statistics[site.name]
            )
        for prior in priors:
            total = total + run.log_prior(prior)
        return total

    return maximise(
        objective,
        {n: params[n] for n in names},
        plan.structure.parameters,
        plan.steps,
        max_iter=iterations,
        rows=plan.structure.num_rows,
        few=FEW,
    )


def _on_data(plan: Plan, names: list[str], params: Params, expected: Expected) -> Params:
    """A few ascent steps over ``names``, on the expected log-density of the data itself."""
    structure = plan.structure
    sites = [s for s, d in plan.reading.dependence.items() if d & set(names)]
    priors = _priors_touched(plan, names)

    def objective(values: Params) -> Tensor:
        run = Run(plan, {**params, **values})
        total = torch.zeros((), dtype=structure.program.dtype)
        for s in sites:
            node = run.nodes[s]
            log_prob = site_log_prob(node, masked=node["infer"].get("_enumerate_dim") is None)
            total = total + expected_sum(expected.weights[s], log_prob)
        for prior in priors:
            total = total + run.log_prior(prior)
        return total

    return maximise(
        objective,
        {n: params[n] for n in names},
        structure.parameters,
        plan.steps,
        max_iter=GRADIENT_STEPS,
        rows=structure.num_rows,
    )


def expected_sum(weights: Tensor, log_prob: Tensor) -> Tensor:
    """``sum weights * log_prob``, with zero weights winning over ``-inf``."""
    impossible = (weights == 0) & ~log_prob.isfinite()
    return (weights * torch.where(impossible, torch.zeros_like(log_prob), log_prob)).sum()
