"""Many EM runs of one program as one: E-steps share their matrices, M-steps their overhead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyroem.estep.engine import MixtureEngine
from pyroem.estep.kernel import Rows, expect, expect_given
from pyroem.estep.layout import Layout
from pyroem.estep.mixture import Assigned, Group, Mixture
from pyroem.mstep.copies import copied, copyable
from pyroem.mstep.plan import Plan
from pyroem.mstep.runs import Expected
from pyroem.mstep.update import QUICK, m_step
from pyroem.problem import Problem
from pyroem.structure import Params


def no_batch(problem: Problem) -> str:
    """Why runs of the problem cannot go as one; empty where they can."""
    if problem.everywhere is not None:
        return "the rows are spread over processes"
    if isinstance(problem.engine, MixtureEngine) and problem.engine.mixture.partial:
        return "elements of vectors are missing"
    if not isinstance(problem.engine, MixtureEngine):
        return "the kernel does not serve the program"
    if problem.engine.mixture.outside:
        return "a site stands outside the rows"
    if any(b.shared is not None and b.shared.iterates for b in problem.plan.blocks.values()):
        return "an M-step has inner iterations, of another number in each run"
    if any(problem.plan.reading.prior_dependence.values()):
        return "a prior depends on a parameter"
    return copyable(problem.plan)


def has_one_group(problem: Problem) -> bool:
    """Whether every observation hangs on the same assignments."""
    return isinstance(problem.engine, MixtureEngine) and len(problem.engine.mixture.groups) == 1


class Batch:
    """Copies of a problem; parameters have a leading dim of copies.

    ``weights`` (copies by rows) are row weights of each copy's own, in place of the problem's;
    ``rows`` (:func:`pyroem.estep.stacked.stacked`) the data of each.
    """

    def __init__(
        self,
        problem: Problem,
        count: int,
        weights: Tensor | None = None,
        rows: Rows | None = None,
    ) -> None:
        assert isinstance(problem.engine, MixtureEngine)
        self.problem, self.count = problem, count
        self.plan = copied(problem.plan, count)
        self.mixture = _copied_mixture(problem.engine.mixture, self.plan, count)
        self.chunks = problem.engine.chunks if rows is None else [rows]
        if weights is not None:
            self.chunks = [rows.weighted(weights) for rows in self.chunks]

    def e_step(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and the objective of every copy."""
        with torch.no_grad():
            expected = expect(self.mixture, self.chunks, params)
            return expected, expected.log_likelihood + self._log_prior(params)

    def expected_given(self, posterior: Tensor) -> Expected:
        """Expected statistics under given posteriors: copies, states, rows (of one group)."""
        (rows,) = self.chunks
        joint = posterior.reshape(-1, posterior.shape[-1])
        with torch.no_grad():
            return expect_given(self.mixture, rows, [joint])

    def m_step(
        self, params: Params, expected: Expected, only: frozenset[str] | None = None
    ) -> Params:
        """New parameters of every copy."""
        return m_step(self.plan, params, expected, self.problem.floors, only, QUICK)

    def _log_prior(self, params: Params) -> Tensor:
        structure = self.problem.structure
        total = torch.zeros(self.count, dtype=structure.program.dtype)
        for name, parameter in structure.parameters.items():
            if parameter.has_prior:
                site = self.plan.reading.traces[0].trace.nodes[name]
                found = site["fn"].log_prob(params[name]) * site["scale"]
                total = total + found.reshape(self.count, -1).sum(1)
        return total

    def collapsed(self, params: Params, margin: float) -> Tensor:
        """Which copies have a variance below ``margin`` times its floor."""
        low = torch.zeros(self.count, dtype=torch.bool)
        clipped = self.problem.clip(params, margin)
        for name in self.problem.floors:
            low |= (clipped[name] != params[name]).reshape(self.count, -1).any(1)
        return low


def stack(points: Sequence[Params]) -> Params:
    """Parameters of several runs as one."""
    return {name: torch.stack([p[name] for p in points]) for name in points[0]}


def unstack(params: Mapping[str, Tensor]) -> list[Params]:
    """The parameters of each run."""
    return [at(params, i) for i in range(len(next(iter(params.values()))))]


def at(params: Mapping[str, Tensor], i: int) -> Params:
    """The parameters of one run."""
    return {name: value[i] for name, value in params.items()}


def _copied_mixture(mixture: Mixture, plan: Plan, count: int) -> Mixture:
    return replace(
        mixture,
        plan=plan,
        groups=tuple(_copied_group(group, plan, count) for group in mixture.groups),
        copies=count,
    )


def _copied_group(group: Group, plan: Plan, count: int) -> Group:
    sites = plan.reading.sites
    assigned = []
    for a in group.assigned:
        site = sites[a.site.name]
        site = replace(
            site,
            shape=(count, *a.site.shape),
            data=replace(a.site.data, copied=True),
        )
        dims = (0, *(d + 1 if d >= 0 else -1 for d in a.dims))
        assigned.append(Assigned(site, dims, a.measure.unsqueeze(0), copied=True))
    observed = tuple(
        ((0, *(i + 1 for i in axes)), tuple(_copied_layout(layout, plan) for layout in layouts))
        for axes, layouts in group.observed
    )
    sizes = (count, *group.sizes)
    return Group(group.names, sizes, tuple(assigned), observed, count)


def _copied_layout(layout: Layout, plan: Plan) -> Layout:
    return Layout(
        plan.reading.sites[layout.site.name],
        (0, *(i + 1 for i in layout.axes)),
        (0, *(d + 1 for d in layout.states)),
        tuple(d + 1 for d in layout.features),
        tuple(d + 1 for d in layout.pooled),
        tuple(d + 1 for d in layout.rows),
    )
