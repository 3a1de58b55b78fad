"""Where the data of a site without a family lies, for a start and for units of length.

A registered family knows its location. Of another distribution (Student's t, Laplace, ...) it is
known only that an argument called ``loc`` moves it, and one called ``scale`` widens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import Enumerated, unwrap
from pyroem.structure import Params, Structure, base_mask

FAR = 10.0  # spreads from the data's middle; what stands further away is moved
MOST = 100_000  # cells that are looked at


@dataclass(frozen=True)
class Landmark:
    """The middle and the spread of a site's data, and which parameters stand for them."""

    middle: float
    spread: float
    locations: frozenset[str]
    scales: frozenset[str]

    def place(self, params: Params) -> Params:
        """``params`` with locations and scales that are far from the data's brought to it."""
        result = dict(params)
        for name in self.locations & params.keys():
            value = params[name]
            far = (value - self.middle).abs() > FAR * self.spread
            result[name] = torch.where(far, self.middle, value)
        for name in self.scales & params.keys():
            value = params[name]
            far = (value / self.spread).log().abs() > torch.tensor(FAR**2).log()
            result[name] = torch.where(far, self.spread, value)
        return result


def find_landmark(
    structure: Structure, name: str, traces: tuple[Enumerated, ...], points: tuple[Params, ...]
) -> Landmark | None:
    """The landmark of a site, if its distribution has a ``loc``."""
    nodes = [t.trace.nodes[name] for t in traces]
    bases = [unwrap(n["fn"])[0] for n in nodes]
    data = _data(nodes[0], bases[0])
    if data is None:
        return None
    quantiles = torch.tensor([0.25, 0.5, 0.75], dtype=data.dtype)
    low, middle, high = (float(q) for q in torch.quantile(data, quantiles))
    spread = (high - low) / 1.35 or float(data.std())  # the standard deviation of a Normal
    if not spread > 0:
        return None
    locations = _standing_for("loc", bases, points)
    scales = _standing_for("scale", bases, points)
    positive = {n for n in scales if bool((points[0][n] > 0).all() and (points[1][n] > 0).all())}
    return Landmark(middle, spread, locations, frozenset(positive))


def _data(node: Any, base: Any) -> Tensor | None:
    value = node["value"]
    if not isinstance(getattr(base, "loc", None), Tensor) or base.event_shape:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    mask = base_mask(node)
    if mask is not None:
        value, mask = torch.broadcast_tensors(value, mask)
        value = value[mask]
    value = value.reshape(-1)
    if isinstance(base, dist.LogNormal):
        value = value.log()
    value = value[:: 1 + len(value) // MOST]
    return value if len(value) > 1 and bool(value.isfinite().all()) else None


def _standing_for(
    argument: str, bases: list[Any], points: tuple[Mapping[str, Tensor], ...]
) -> frozenset[str]:
    """The parameters whose elements appear unchanged in an argument."""
    if not isinstance(getattr(bases[0], argument, None), Tensor):
        return frozenset()
    found = set()
    for name, value in points[0].items():
        if value.numel() and all(
            bool(torch.isin(point[name], getattr(base, argument).contiguous()).all())
            for base, point in zip(bases, points, strict=True)
        ):
            found.add(name)
    return frozenset(found)
