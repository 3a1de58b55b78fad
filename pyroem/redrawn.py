"""The problem of a fit on data drawn anew, without reading its program again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroem._pyro import Program, Site, isolated, site_log_prob
from pyroem.checks import check_observation
from pyroem.errors import PyroemError
from pyroem.estep.engine import MixtureEngine
from pyroem.estep.kernel import Rows
from pyroem.estep.stacked import stackable, stacked
from pyroem.mstep.recognise import same
from pyroem.problem import Problem
from pyroem.structure import Structure, base_mask

Data = tuple[tuple[Any, ...], dict[str, Any]]  # what a program is called with


@dataclass(frozen=True)
class Redrawn:
    """A problem, its ``engine``, and the ``sites`` of its program at the first point of the plan.

    Other data has the same plan where the program differs from these sites in the values that it
    observes, and in nothing else.
    """

    problem: Problem
    engine: MixtureEngine
    sites: Mapping[str, Site]

    @property
    def numbers(self) -> int:
        """The number of statistics of all rows of a data set."""
        (rows,) = self.engine.chunks
        return rows.features * rows.num_rows

    def problems(self, data: Iterable[Data]) -> tuple[list[Problem], Rows] | None:
        """The problem on each of several data sets, without row weights; the rows of all, stacked.

        None where one of them is no such data, or has values that the program cannot have
        observed: what is wrong is told where the program is read.

        Variance floors are those of the problem's own data.
        """
        posed, rows = list[Problem](), list[Rows]()
        for args, kwargs in data:
            try:
                found = self._on(args, kwargs)
            except PyroemError:
                return None
            if found is None:
                return None
            posed.append(found[0])
            rows.append(found[1])
        return posed, stacked(rows)

    def _on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Problem, Rows] | None:
        problem, structure = self.problem, self.problem.structure
        program, fill = replace(structure.program, args=args, kwargs=kwargs, fill={}), {}
        with isolated(program.dtype, 0), torch.no_grad():
            sites = _sites(problem, program)
            for name in structure.observations:
                checked = check_observation(sites[name])
                if checked.missing is not None:
                    return None
                if checked.fill is not None:
                    sites[name]["value"] = fill[name] = checked.fill
            if not _only_values_differ(structure, self.sites, sites):
                return None
            rows = Rows(self.engine.mixture, sites)
        structure = replace(structure, program=replace(program, fill=fill))
        plan, engine = (
            replace(problem.plan, structure=structure),
            replace(self.engine, chunks=[rows]),
        )
        own = replace(problem, structure=structure, plan=plan, row_weights=None, engine=engine)
        return own, rows


def redrawn(problem: Problem) -> Redrawn | None:
    """How to pose a problem on other data; None where its program has to be read again.

    It needs the mixture kernel, and data that was read as a whole, whose statistics are kept.
    """
    engine = problem.engine
    if not isinstance(engine, MixtureEngine) or not isinstance(engine.chunks, list):
        return None
    if problem.smaller is not None or not all(map(stackable, engine.chunks)):
        return None
    program = problem.structure.program
    with isolated(program.dtype, 0), torch.no_grad():
        return Redrawn(problem, engine, _sites(problem, program))


def _sites(problem: Problem, program: Program) -> Mapping[str, Site]:
    """What the program says, its assignments enumerated, where the plan was made."""
    run = program.run(problem.plan.reading.points[0], nesting=problem.structure.nesting)
    sites: Mapping[str, Site] = run.nodes
    return sites


def _only_values_differ(
    structure: Structure, here: Mapping[str, Site], there: Mapping[str, Site]
) -> bool:
    """Whether two runs say the same but for the values of observations.

    They say the same of an observation where its density of one value is the same, to the last
    bit, in every row and state: so are arguments, constants and masks. The point is a random one:
    what agrees there by chance has probability zero.
    """
    if list(here) != list(there):
        return False
    for name in (*structure.factor_sites, *structure.parameters):
        one, other = here[name], there[name]
        if one["type"] != other["type"] or one["value"].shape != other["value"].shape:
            return False
        if name not in structure.observations and not same(one["value"], other["value"]):
            return False
        if one["type"] == "param":
            if not _alike(*(site["kwargs"].get("constraint") for site in (one, other))):
                return False
            continue
        masks = base_mask(one), base_mask(other)
        scales = torch.as_tensor(one["scale"]), torch.as_tensor(other["scale"])
        densities = site_log_prob(one), site_log_prob({**other, "value": one["value"]})
        if (masks[0] is None) != (masks[1] is None) or not same(*scales) or not same(*densities):
            return False
    return True


def _alike(one: Any, other: Any) -> bool:
    """Whether two constraints are the same; of what cannot be told they are not."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return same(one, other)
    if isinstance(one, constraints.Constraint):
        a, b = vars(one), vars(other)
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    return bool(one == other)
