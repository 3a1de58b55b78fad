"""The program at some parameters, and the kernels of one parameter under expected statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import site_log_prob, unwrap
from pyroem.families import Arguments, Coordinate
from pyroem.families.forms import Form
from pyroem.mstep.plan import Plan, Use
from pyroem.mstep.sites import SiteModel
from pyroem.statistics import SiteStatistics, Statistics
from pyroem.structure import Params


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
        return site.evaluate(self.params, lambda: self.base(site))

    def base(self, site: SiteModel) -> Any:
        """The program's own distribution at a site."""
        return unwrap(self.nodes[site.name]["fn"])[0]

    def centred(self, site: SiteModel) -> Arguments:
        """A site's arguments, the location counted from the data's centre; each made when used."""
        return _Centred(site, self)

    def statistics(self, site: SiteModel, expected: Expected) -> SiteStatistics:
        """A site's expected statistics; of a prior, those of the parameter itself."""
        return (
            site.drawn(self.params[site.name]) if site.is_prior else expected.statistics[site.name]
        )

    def prior(self, name: str) -> Any:
        """The prior's site, from the first reading where its arguments are constants.

        Where it depends on parameters in a known way, it is built again.
        """
        known = self.plan.reading.priors.get(name)
        if self.plan.reading.prior_dependence[name] and (known is None or not known.read):
            return self.nodes[name]
        node = self.plan.reading.traces[0].trace.nodes[name]
        if known is None:
            return node
        again = type(known.data.base)(**self.arguments(known))
        return {**node, "fn": again.to_event(known.events)}

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
        value = site.evaluate_one(key, self.run.params, lambda: self.run.base(site))
        if key == site.family.location and site.centre is not None:
            value = value - site.centre
        self[key] = value
        return value


def coefficients_of(use: Use, value: Tensor, run: Run, expected: Expected) -> tuple[Tensor, ...]:
    """The coefficients of a parameter's kernel, for every cell of one place where it stands.

    ``value`` is the parameter now.
    """
    coefficients = coefficients_at(use.site, use.coordinate, run, expected)
    form = use.coordinate.form
    if use.multiple:
        assert form.stretched is not None
        argument = use.site.evaluate_one(
            use.coordinate.argument, run.params, lambda: run.base(use.site)
        )
        own = value.reshape(-1)[use.cells.clamp(min=0)]
        factor = torch.where(use.cells >= 0, use.coordinate.forward(argument) / own, 1.0)
        return form.stretched(factor, *coefficients)
    if use.offset is not None:
        assert form.shifted is not None
        coefficients = form.shifted(use.offset, *coefficients)
    if use.factor is not None:
        assert form.stretched is not None
        coefficients = form.stretched(use.factor, *coefficients)
    return coefficients


def coefficients_at(
    site: SiteModel, coordinate: Coordinate, run: Run, expected: Expected
) -> tuple[Tensor, ...]:
    """The coefficients of a coordinate's kernel, for every cell of a site."""
    statistics = run.statistics(site, expected)
    coefficients = coordinate.coefficients(statistics.values, statistics.weight, run.centred(site))
    if coordinate.argument == site.family.location:
        return _uncentred(coefficients, site, coordinate.form)
    return coefficients


def _uncentred(coefficients: tuple[Tensor, ...], site: SiteModel, form: Form) -> tuple[Tensor, ...]:
    """The kernel of a location counted from zero: ``b + a centre``."""
    b, a = coefficients
    assert site.centre is not None
    if form.event_dim == 0:
        return b + a * site.centre, a
    return b + (a @ site.centre.unsqueeze(-1)).squeeze(-1), a


def prior_coefficients(form: Form, prior: Any, value: Tensor) -> tuple[Tensor, ...]:
    """The coefficients that a conjugate prior adds, for every block of a parameter."""
    base, _, _ = unwrap(prior["fn"])
    if type(base) is dist.Uniform:
        zero = torch.zeros_like(value)
        return tuple(zero for _ in form.coefficient_dims)
    base = base.expand(value.shape[: value.dim() - len(base.event_shape)])
    scale = prior["scale"]
    return tuple((c * scale).to(value) for c in form.conjugate[type(base)](base))
