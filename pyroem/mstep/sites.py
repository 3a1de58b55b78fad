"""What the M-step knows of each site: its family, its arguments and how they hang on parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyroem.families import Arguments, Coordinate, Family
from pyroem.mstep.affine import Affine
from pyroem.mstep.selection import Selection
from pyroem.statistics import SiteStatistics, weighted_sum

FEW = 32  # rows


@dataclass(frozen=True)
class Argument:
    """One canonical argument: the batch dims along which it differs, the parameters behind it.

    What is no selection may be an affine function of some of them, or in some coordinate a
    multiple of one: ``proportional`` gives that coordinate and each cell's element (-1: none).
    """

    name: str
    event_dim: int
    varies: frozenset[int]
    parameters: frozenset[str]
    selection: Selection | None
    affine: Affine | None = None
    proportional: Mapping[str, tuple[Coordinate, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """What was seen at a site; its statistics ``T(x - centre)`` are made when they are asked for.

    ``first`` keeps only the first row's, where all are alike; ``copied`` puts a dim of size one,
    for copies of the program, in front.
    """

    family: Family
    base: Any
    value: Tensor
    rank: int
    rows: frozenset[int]
    centre: Tensor | None = None
    first: bool = False
    copied: bool = False

    @cached_property
    def statistics(self) -> tuple[Tensor, ...]:
        """Of all rows, each padded to the site's rank."""
        return self._made(self.value)

    @cached_property
    def few(self) -> tuple[Tensor, ...]:
        """Of the first rows: their shapes tell those of all, the rows' dims apart."""
        value = self.value
        for d in self.rows:
            value = value.narrow(d, 0, min(FEW, value.shape[d]))
        try:
            made = self._made(value)
        except RuntimeError:  # constants of the distribution differ by row
            return self.statistics
        lead = int(self.copied)
        same = all(t.shape[d + lead] in (1, value.shape[d]) for t in made for d in self.rows)
        return made if same or self.first else self.statistics

    def _made(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x if self.centre is None else x - self.centre
        found = zip(self.family.statistics(self.base, x), self.family.event_dims, strict=True)
        made = tuple(pad(t, self.rank, e) for t, e in found)
        for d in self.rows if self.first else ():
            made = tuple(t.narrow(d, 0, 1) for t in made)
        return tuple(t.unsqueeze(0) for t in made) if self.copied else made


@dataclass(frozen=True)
class SiteModel:
    """A site with a family. Batch dims are counted from the left of ``shape``.

    ``data`` holds what depends on the data alone; ``scale`` is the data's variance, the yardstick
    of the variance floor.
    """

    name: str
    family: Family
    shape: tuple[int, ...]
    events: int
    arguments: dict[str, Argument]
    data: Recorded
    mask: Tensor | None
    centre: Tensor | None
    scale: Tensor | None
    unit_dims: frozenset[int]
    is_prior: bool = False

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"the prior of '{self.name}'" if self.is_prior else f"site '{self.name}'"

    @property
    def read(self) -> bool:
        """Whether all arguments can be had without a run of the program."""
        return all(
            a.selection is not None or (a.affine is not None and not a.affine.loose)
            for a in self.arguments.values()
        )

    def drawn(self, value: Tensor) -> SiteStatistics:
        """The statistics of a prior: its data is the parameter's current value."""
        if self.family.transform is not None:
            value = self.family.transform(self.data.base, value)
        value = pad(value, len(self.shape), len(self.data.base.event_shape))
        own = replace(self, data=replace(self.data, value=value))
        one = torch.ones((1,) * (len(self.shape) - self.events), dtype=value.dtype)
        return own.expected(one)

    @property
    def sufficient(self) -> tuple[Tensor, ...]:
        """The statistics of all rows."""
        return self.data.statistics

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the statistics."""
        return self.data.value.dtype

    @property
    def keep(self) -> frozenset[int]:
        """The batch dims along which any argument varies: the cells' dims."""
        if self.family.by_row:
            return frozenset(range(len(self.shape)))
        return frozenset().union(*(a.varies for a in self.arguments.values()))

    @property
    def along_rows(self) -> bool:
        """Whether an argument varies along the rows' plates."""
        return bool(self.keep & self.unit_dims)

    @property
    def current(self) -> bool:
        """Whether the statistics hang on the current arguments, or are the rows themselves."""
        return self.family.latent is not None or self.family.by_row

    def statistics_at(self, base: Any) -> tuple[Tensor, ...]:
        """The statistics of all rows, of which some are expected ones at the program's ``base``."""
        if self.family.latent is None:
            return self.sufficient
        arguments = self.arguments_in(base)
        x = self.data.value if self.centre is None else self.data.value - self.centre
        found = self.family.latent(base, self.centred(arguments), x)
        shapes = zip(found, self.family.event_dims, strict=True)
        return tuple(pad(t, len(self.shape), e) for t, e in shapes)

    def expected(self, weights: Tensor, base: Any = None) -> SiteStatistics:
        """Expected statistics under posterior ``weights`` (Pyro's layout).

        ``base`` is the program's own distribution at the site, for a family with latent variables.
        """
        w = weights.reshape(weights.shape + (1,) * self.events)
        w = w.reshape((1,) * (len(self.shape) - w.dim()) + w.shape)
        if self.mask is not None:
            w = w * self.mask
        one = torch.ones((1,) * len(self.shape), dtype=w.dtype, device=w.device)
        weight = weighted_sum(w, one, self.shape, self.keep)
        values = tuple(weighted_sum(w, t, self.shape, self.keep) for t in self.statistics_at(base))
        return SiteStatistics(weight, values)

    def evaluate(self, params: Mapping[str, Tensor], base: Callable[[], Any]) -> Arguments:
        """The arguments at ``params``; ``base`` gives the program's own distribution if needed."""
        return {name: self.evaluate_one(name, params, base) for name in self.arguments}

    def evaluate_one(
        self, name: str, params: Mapping[str, Tensor], base: Callable[[], Any]
    ) -> Tensor:
        """One argument at ``params``."""
        argument = self.arguments[name]
        if argument.selection is not None:
            return argument.selection.argument(params)
        if argument.affine is not None and not argument.affine.loose:
            return argument.affine.argument(params)
        return self.argument_in(base(), name)

    def arguments_in(self, base: Any) -> Arguments:
        """The arguments of the program's own distribution, padded to the site's rank."""
        return {
            name: pad(value, len(self.shape), self.arguments[name].event_dim)
            for name, value in self.family.arguments(base).items()
        }

    def argument_in(self, base: Any, name: str) -> Tensor:
        """One argument of the program's own distribution, over the dims along which it varies."""
        argument = self.arguments[name]
        value = self.family.arguments(base)[name]
        return narrow(value, argument.event_dim, len(self.shape), argument.varies)

    def centred(self, arguments: Arguments) -> Arguments:
        """The arguments, with the location counted from the centre of the data."""
        if self.family.location is None:
            return arguments
        assert self.centre is not None
        shifted = arguments[self.family.location] - self.centre
        return {**arguments, self.family.location: shifted}

    def expected_log_density(self, arguments: Arguments, statistics: SiteStatistics) -> Tensor:
        """``sum over cells of <eta, statistics> - weight A`` (without the base measure)."""
        density = self.family.log_density(
            self.centred(arguments), statistics.values, statistics.weight
        )
        return density.sum()


def seen(site: SiteModel, t: Tensor, event_dims: int) -> Tensor:
    """A coordinate of an argument with zeros where it is masked: there it may be anything."""
    if site.mask is None:
        return t
    shape = t.shape[: t.dim() - event_dims]
    alike = [d for d, n in enumerate(shape) if n == 1 and site.mask.shape[d] > 1]
    mask = (site.mask > 0).to(t)
    mask = mask.amax(alike, keepdim=True) if alike else mask
    return torch.where(mask.reshape(mask.shape + (1,) * event_dims) > 0, t, 0.0)


def pad(x: Tensor, rank: int, event_dim: int) -> Tensor:
    """Batch dims of size one on the left, up to ``rank``."""
    return x.reshape((1,) * (rank + event_dim - x.dim()) + x.shape)


def narrow(x: Tensor, event_dim: int, rank: int, varies: frozenset[int]) -> Tensor:
    """Cut the batch dims along which ``x`` does not vary down to size one."""
    x = pad(x, rank, event_dim)
    for dim in range(rank):
        if dim not in varies and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x
