"""Finding the arguments that are affine in parameters, by running the program at chosen points."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import unwrap
from pyroem.errors import PyroemError
from pyroem.families import Coordinate
from pyroem.mstep.affine import (
    MOST_ELEMENTS,
    MOST_WORK,
    Affine,
    Box,
    additive,
    affine_of,
    coordinate_of,
)
from pyroem.mstep.intervals import interval_of
from pyroem.mstep.probing import LEVELS, Reading, opposite
from pyroem.mstep.sites import SiteModel, seen
from pyroem.structure import Params, Structure

FAILURES = (PyroemError, ArithmeticError, ValueError, RuntimeError)


def find_predictors(structure: Structure, reading: Reading) -> Reading:
    """The reading, with every argument that is affine in parameters recognised as such."""
    search = _Search(structure, reading)
    found = []
    for site in (*reading.sites.values(), *reading.priors.values()):
        for key, argument in site.arguments.items():
            if argument.selection is None and argument.parameters:
                candidate = search.candidate(site, key)
                if candidate is not None:
                    found.append(candidate)
    sites, priors = dict(reading.sites), dict(reading.priors)
    for place, affine in search.designs(found):
        known = priors if place.site.is_prior else sites
        site = known[place.site.name]
        argument = replace(site.arguments[place.key], affine=affine)
        known[site.name] = replace(site, arguments={**site.arguments, place.key: argument})
    for name, site in sites.items():
        arguments = dict(site.arguments)
        for key, argument in site.arguments.items():
            rest = argument.parameters - set(argument.affine.names if argument.affine else ())
            if argument.selection is None and rest:
                multiples = search.multiples(site, key, rest)
                arguments[key] = replace(argument, proportional=multiples)
        sites[name] = replace(site, arguments=arguments)
    return replace(reading, sites=sites, priors=priors)


@dataclass(frozen=True)
class _Candidate:
    """An argument that seems to be affine in ``names``; the columns of its design so far."""

    site: SiteModel
    key: str
    coordinate: Coordinate
    names: tuple[str, ...]
    tag: str
    at_base: Tensor
    boxes: list[Box] = field(default_factory=list)

    def value(self, nodes: Any) -> Tensor | None:
        """The coordinate in a run of the program; None where there is none."""
        return None if nodes is None else _value(self.site, self.key, self.coordinate, nodes)

    def add(self, nodes: Any, step: float) -> None:
        """The next column, from a run with one element moved by ``step``."""
        moved = self.value(nodes)
        moved = torch.full_like(self.at_base, torch.nan) if moved is None else moved
        self.boxes.append(Box.of(self.coordinate, self.at_base, moved, step, self.site.unit_dims))


def _value(site: SiteModel, key: str, coordinate: Coordinate, nodes: Any) -> Tensor:
    base, _, _ = unwrap(nodes[site.name]["fn"])
    t = coordinate_of(coordinate, site.argument_in(base, key))
    return seen(site, t, coordinate.form.event_dim)


def _elements(ratios: list[Tensor], times: Tensor) -> Tensor | None:
    """For each cell the element by whose factor it grew, at all points; -1 where it stayed."""
    factors = torch.cat([times.new_ones(1), times])
    gap = (ratios[0].unsqueeze(-1) - factors).abs()
    best = gap.min(-1)
    close = torch.isfinite(ratios[0]) & (best.values <= 1e-9)
    for other in ratios[1:]:
        close &= (ratios[0] - other).abs() <= 1e-9
    cells = best.indices - 1
    return cells if bool(close.all()) and bool((cells >= 0).any()) else None


class _Search:
    """Runs of the program, those that are asked for again kept."""

    def __init__(self, structure: Structure, reading: Reading) -> None:
        self.structure, self.reading = structure, reading
        here, there = reading.points
        intervals = {n: interval_of(p.constraint) for n, p in structure.parameters.items()}
        self.straight = {n for n, interval in intervals.items() if interval is not None}
        self.free = {n for n in self.straight if intervals[n] == (-torch.inf, torch.inf)}
        self.positive = {n for n, interval in intervals.items() if interval == (0.0, torch.inf)}
        origin = {n: torch.zeros_like(v) if n in self.free else v for n, v in here.items()}
        far = opposite(structure, here)
        self.points: dict[str, Params] = {
            "here": here,
            "there": there,
            "far": far,
            "origin": origin,
        }
        self._runs: dict[Any, Any] = {}

    def run(self, point: Params) -> Any:
        """The sites of the program; None where it cannot run there."""
        try:
            return self.structure.program.run(point, nesting=self.structure.nesting).nodes
        except FAILURES:
            return None

    def kept(self, key: Any, point: Params) -> Any:
        """A run that is made once."""
        if key not in self._runs:
            self._runs[key] = self.run(point)
        return self._runs[key]

    def candidate(self, site: SiteModel, key: str) -> _Candidate | None:
        """The first coordinate of the argument that is affine in some parameters."""
        for coordinate in site.family.coordinates:
            if coordinate.argument != key or coordinate.form.expansion is None:
                continue
            hangs = site.arguments[key].parameters & self.straight
            names = tuple(sorted(n for n in hangs if self._additive(site, key, coordinate, n)))
            elements = sum(self.points["here"][n].numel() for n in names)
            if not names or elements > MOST_ELEMENTS:
                continue
            for tag in ("origin", "here"):  # from zero the columns are exact
                nodes = self.kept(tag, self.points[tag])
                if nodes is None:
                    continue
                at_base = _value(site, key, coordinate, nodes)
                if bool(at_base.isfinite().all()) and elements * at_base.numel() <= MOST_WORK:
                    return _Candidate(site, key, coordinate, names, tag, at_base)
        return None

    def _additive(self, site: SiteModel, key: str, coordinate: Coordinate, name: str) -> bool:
        here, there = self.points["here"], self.points["there"]
        middle = (here[name] + there[name]) / 2
        runs = (
            self.kept("here", here),
            self.kept(("moved", name), {**here, name: there[name]}),
            self.kept(("half", name), {**here, name: middle}),
            self.kept("there", there),
            self.kept(("there", name), {**there, name: here[name]}),
        )
        if any(nodes is None for nodes in runs):
            return False
        a, b, c, d, e = (_value(site, key, coordinate, nodes) for nodes in runs)
        return additive(a, b, c, e, d)

    def multiples(
        self, site: SiteModel, key: str, names: frozenset[str]
    ) -> dict[str, tuple[Coordinate, Tensor]]:
        """The positive parameters of which an argument is a multiple, cell by cell."""
        found = {}
        for name in sorted(names):
            value = self.points["here"][name]
            if name not in self.positive or not value.numel():
                continue
            ranks = torch.arange(1, value.numel() + 1).to(value).reshape(value.shape)
            times = 1 + ranks / (value.numel() + 1)  # another for each element
            runs = [self._grown(tag, name, times) for tag in ("here", "there", "far")]
            for coordinate in site.family.coordinates:
                form = coordinate.form
                if coordinate.argument != key or form.stretched is None or form.event_dim:
                    continue
                ratios = [
                    _value(site, key, coordinate, moved) / _value(site, key, coordinate, own)
                    for own, moved in runs
                    if own is not None and moved is not None
                ]
                cells = _elements(ratios, times.reshape(-1)) if len(ratios) > 1 else None
                if cells is not None:
                    found[name] = coordinate, cells
                    break
        return found

    def _grown(self, tag: str, name: str, times: Tensor) -> tuple[Any, Any]:
        """Runs at a point, and where one parameter is some times larger."""
        point = self.points[tag]
        grown = {**point, name: point[name] * times}
        return self.kept(tag, point), self.kept(("times", tag, name), grown)

    def designs(self, candidates: list[_Candidate]) -> list[tuple[_Candidate, Affine]]:
        """The affine functions of the candidates that are what they seem."""
        for tag in ("origin", "here"):
            own = [c for c in candidates if c.tag == tag]
            for name in sorted({n for c in own for n in c.names}):
                base = self.points[tag][name]
                for i in range(base.numel()):
                    with_it = [c for c in own if name in c.names]
                    values, step = self._column(tag, name, i, with_it)
                    for c, value in zip(with_it, values, strict=True):
                        units = c.site.unit_dims
                        c.boxes.append(Box.of(c.coordinate, c.at_base, value, step, units))
        found = []
        for c in candidates:
            loose = c.site.arguments[c.key].parameters - frozenset(c.names)
            point = self.points[c.tag]
            affine = affine_of(c.coordinate, c.names, loose, point, c.at_base, c.boxes)
            if self._holds(c, affine):
                found.append((c, affine))
        return found

    def _column(
        self, tag: str, name: str, i: int, own: list[_Candidate]
    ) -> tuple[list[Tensor], float]:
        """The coordinates where one element is moved by as much as none overflows; and how far."""
        values, step = list[Tensor](), 0.0
        for level in LEVELS:
            moved, step = self._moved(tag, name, i, level)
            nodes = self.run({**self.points[tag], name: moved})
            found = [c.value(nodes) for c in own]
            values = [
                torch.full_like(c.at_base, torch.nan) if v is None else v
                for c, v in zip(own, found, strict=True)
            ]
            if all(bool(v.isfinite().all()) for v in values):
                break
        return values, step

    def _moved(self, tag: str, name: str, i: int, level: float) -> tuple[Tensor, float]:
        """One element of a parameter moved, and how far."""
        value = self.points[tag][name].clone().reshape(-1)
        old = float(value[i])
        far = self.points["there"][name].reshape(-1)
        value[i] = level if tag == "origin" and name in self.free else far[i]
        return value.reshape(self.points[tag][name].shape), float(value[i]) - old

    def _holds(self, c: _Candidate, found: Affine) -> bool:
        """Whether it explains what the program does at both probes, and far from them."""
        if not all(bool(m.isfinite().all()) for m in (found.constant, *found.matrices)):
            return False
        for tag in ("here", "there", "far"):
            point = self.points[tag]
            if found.loose:  # the constant is that of the base
                point = {**self.points[c.tag], **{n: point[n] for n in found.names}}
            key = (c.tag, tag, found.names) if found.loose else tag
            t = c.value(self.kept(key, point))
            if t is None and tag == "far":
                continue  # the program may have demands that no constraint states
            if t is None or not found.explains(point, t):
                return False
        return True


__all__ = ["find_predictors"]
