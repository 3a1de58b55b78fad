"""The numbers of the mixture kernel: blocks of rows, matrix products, a softmax."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import unwrap
from pyroem.estep.columns import Columns, Scratch
from pyroem.estep.layout import Layout, finite
from pyroem.estep.mixture import Group, Mixture
from pyroem.estep.partial import PartialSums, Patterns
from pyroem.mstep.runs import Expected, Run
from pyroem.mstep.sites import pad
from pyroem.statistics import SiteStatistics
from pyroem.structure import Params, base_mask

BLOCK = 700_000  # numbers in a block of Phi and L: they stay in the cache
BLOCK_ON_DEVICE = 100_000_000  # on an accelerator large products are fast, small ones are not
CACHE = 4_000_000  # numbers in all of Phi that are kept rather than made anew in each pass
IMPOSSIBLE = -1e200  # a sum that holds the logarithm of zero


class Rows:
    """The data of all observations, in blocks, and their base measure.

    ``weights`` has the rows last; where copies of a fit run as one, each may have its own (copies
    by rows, :meth:`weighted`).

    Of the rows only those of ``index`` are taken, if it is given. Where masks hide none of them,
    ``mixture`` becomes the one that is given as ``unmasked``.
    """

    def __init__(
        self,
        mixture: Mixture,
        nodes: Mapping[str, Any],
        weights: Tensor | None = None,
        cache: int = CACHE,
        device: torch.device | None = None,
        index: Tensor | None = None,
        unmasked: Mixture | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.mixture, self.dtype = mixture, mixture.plan.structure.program.dtype
        self.columns: dict[str, Columns] = {}
        for layout in mixture.layouts:
            node = nodes[layout.site.name]
            base, _, _ = unwrap(node["fn"])
            mask = base_mask(node)
            if mask is not None:
                mask = pad(mask.to(layout.site.dtype), layout.rank, 0)
            column = Columns(layout, base, node["value"], mask, device)
            if index is not None:
                column.take(index)
            self.columns[layout.site.name] = column
        self.patterns: Patterns | None = None
        if mixture.partial:
            rows = max(c.num_rows for c in self.columns.values())
            self.patterns = Patterns(mixture.partial, nodes, rows)
            for column in self.columns.values():
                column.take(self.patterns.order)
            weights = None if weights is None else weights.reshape(-1)[self.patterns.order]
        masks = [c.mask for c in self.columns.values() if c.mask is not None]
        if unmasked is not None and masks and all(bool(mask.all()) for mask in masks):
            self.mixture = mixture = unmasked
            for column in self.columns.values():
                column.mask = None
        self.num_rows = max(c.num_rows for c in self.columns.values())
        self.weights = None if weights is None else weights.reshape(-1).to(self.device)
        self.total = float(self.num_rows if weights is None else weights.sum())
        self.features = features = sum(sum(layout.heights) for layout in mixture.layouts)
        self.span = (0, self.num_rows)
        numbers = BLOCK if self.device.type == "cpu" else BLOCK_ON_DEVICE
        self.size = max(64, numbers // (features + 2 * mixture.num_states))
        self.cached: list[list[list[Tensor]]] | None = None
        if features * self.num_rows <= cache:
            self.size = max(64, numbers // (2 * mixture.num_states))
            self.cached = [
                [[torch.cat(self._made(b, 0, self.num_rows))] for _, b in g.observed]
                for g in mixture.groups
            ]

    def restored(self, by_row: Tensor) -> Tensor:
        """What was found row by row, in the order of the data."""
        return by_row if self.patterns is None else by_row[self.patterns.back]

    def weighted(self, weights: Tensor) -> Rows:
        """The same rows under other weights: of each row, or of each copy and row."""
        assert self.patterns is None or weights.dim() == 1
        own = copy.copy(self)
        own.__dict__.pop("measure", None)
        own.weights = weights if self.patterns is None else weights[self.patterns.order]
        own.weights = own.weights.to(self.device, self.dtype)
        own.total = float(weights.sum())
        if weights.dim() > 1:  # a block holds the joint states of all copies
            numbers = BLOCK if self.device.type == "cpu" else BLOCK_ON_DEVICE
            states = self.mixture.num_states * len(weights)
            own.size = max(64, numbers // (2 * states + (self.features if not self.cached else 0)))
        return own

    def weights_of(self, start: int, stop: int) -> Tensor | None:
        """The weights of a block's rows."""
        return None if self.weights is None else self.weights[..., start:stop]

    def partial(self, params: Params) -> list[list[PartialSums]]:
        """For each group the sums over rows of which elements are missing, at some parameters."""
        if self.patterns is None:
            return [[] for _ in self.mixture.groups]
        run, patterns = Run(self.mixture.plan, params), self.patterns
        return [
            [PartialSums(x, self.columns[x.site.name], patterns, run) for x in group.partial]
            for group in self.mixture.groups
        ]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The rows of each block."""
        first, last = self.span
        for start in range(first, last, self.size):
            yield start, min(start + self.size, last)

    def parts(self, size: int) -> Iterator[Rows]:
        """The same rows, ``size`` of them at a time."""
        for start in range(0, self.num_rows, size):
            part = copy.copy(self)
            part.span = (start, min(start + size, self.num_rows))
            part.__dict__.pop("measure", None)
            weights = None if self.weights is None else self.weights[slice(*part.span)]
            part.total = float(part.span[1] - start if weights is None else weights.sum())
            yield part

    def _made(
        self, layouts: Iterable[Layout], start: int, stop: int, scratch: Scratch | None = None
    ) -> list[Tensor]:
        pieces: list[Tensor] = []
        for layout in layouts:
            found, mask = self.columns[layout.site.name].block(start, stop, scratch)
            pieces += found if mask is None else [*found, mask]
        return pieces

    def phi(self, group: int, start: int, stop: int, scratch: Scratch) -> list[list[Tensor]]:
        """The statistics of a block, part by part: matrices to be stacked, or all in one.

        They last until ``scratch`` is used for the next block.
        """
        if self.cached is None:
            parts = self.mixture.groups[group].observed
            return [self._made(layouts, start, stop, scratch) for _, layouts in parts]
        if stop - start == self.num_rows:
            return self.cached[group]
        return [[whole[..., start:stop]] for (whole,) in self.cached[group]]

    def measure_of(self, start: int, stop: int) -> Tensor:
        """The base measure of a block's rows."""
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for column in self.columns.values():
            if column.has_measure:
                total = total + column.measure(start, stop)
        return total.expand(stop - start)

    @cached_property
    def measure(self) -> Tensor:
        """The weighted sum of the base measure over all rows; one for each copy's weights."""
        total = torch.zeros((), dtype=torch.float64)
        if any(column.has_measure for column in self.columns.values()):
            for start, stop in self.blocks():
                own = _sum(self.measure_of(start, stop), self.weights_of(start, stop))
                total = total + own.cpu()
        return total


@dataclass(frozen=True)
class Coefficients:
    """``base`` and ``E`` of every group at some parameters.

    ``base`` (joint states by one) holds the log prior of the states and the log-normalisers;
    ``natural`` for each part of the observations the natural parameters (states by features).
    """

    base: tuple[Tensor, ...]
    natural: tuple[tuple[list[Tensor], ...], ...]

    def to(self, device: torch.device) -> Coefficients:
        """The same on a device; nothing waits for the copies."""
        if device.type == "cpu":
            return self
        natural = tuple(
            tuple([eta.to(device, non_blocking=True) for eta in etas] for etas in parts)
            for parts in self.natural
        )
        return Coefficients(tuple(b.to(device, non_blocking=True) for b in self.base), natural)


def coefficients(mixture: Mixture, params: Params, stacked: bool) -> Coefficients:
    """The natural parameters of every site at ``params``, in one matrix if ``stacked``."""
    run = Run(mixture.plan, params)
    bases, naturals = [], []
    for group in mixture.groups:
        priors = [assigned.log_prior(run.centred(assigned.site)) for assigned in group.assigned]
        base = sum(priors[1:], priors[0]) if priors else group.zero
        parts = []
        for axes, layouts in group.observed:
            etas: list[Tensor] = []
            for layout in layouts:
                site = layout.site
                found, normaliser = layout.natural(run.centred(site))
                etas += found
                if site.mask is None:
                    total = normaliser.sum(1) if layout.num_features > 1 else normaliser
                    total = total if layout.repeats == 1 else total * layout.repeats
                    base = base - group.spread(total.reshape(-1), axes)
                else:
                    etas.append(-normaliser)
            etas = [torch.cat(etas, 1)] if stacked else etas
            parts.append([finite(eta) for eta in etas])
        bases.append(base.expand(group.sizes).reshape(-1, 1))
        naturals.append(tuple(parts))
    return Coefficients(tuple(bases), tuple(naturals))


def log_joint_states(
    group: Group,
    base: Tensor,
    natural: tuple[list[Tensor], ...],
    phi: list[list[Tensor]],
    n: int,
    out: Tensor | None = None,
) -> Tensor:
    """``L`` of ``n`` rows: the joint states by the rows, without the base measure.

    It may be made in ``out``. Statistics may have a leading dim of copies, each with its own.
    """
    total: Tensor | None = None
    for (axes, _), etas, pieces in zip(group.observed, natural, phi, strict=True):
        whole = len(axes) == len(group.sizes)
        own = _product(base if whole else None, etas[0], pieces[0], out)
        for eta, piece in zip(etas[1:], pieces[1:], strict=True):
            own.addmm_(eta, piece)
        if whole:
            total = own
        else:
            before = base if total is None else total
            spread = group.spread(own, axes)
            total = (before.reshape((*group.sizes, -1)) + spread).reshape(base.shape[0], -1)
    return base.expand(-1, n).clone() if total is None else total


def _product(base: Tensor | None, eta: Tensor, phi: Tensor, out: Tensor | None) -> Tensor:
    """``base + E Phi``, in ``out`` if there is a ``base``; copy by copy, where ``phi`` has them."""
    if phi.dim() == 2:
        return eta @ phi if base is None else torch.addmm(base, eta, phi, out=out)
    copies, features, rows = phi.shape
    own = eta.view(copies, -1, features)
    if base is None:
        return torch.bmm(own, phi).view(-1, rows)
    place = None if out is None else out.view(copies, -1, rows)
    return torch.baddbmm(base.view(copies, -1, 1), own, phi, out=place).view(-1, rows)


def normalise(joint: Tensor, weights: Tensor | None) -> Tensor:
    """``L`` (..., states, rows) to the (weighted) posterior ``R``, in place.

    ``weights`` are (..., rows). Returns the log-likelihoods (..., rows).
    """
    most = joint.amax(-2, keepdim=True)
    joint.sub_(most).exp_()
    total = joint.sum(-2, keepdim=True)
    joint.mul_(total.reciprocal() if weights is None else weights.unsqueeze(-2) / total)
    return most.add_(total.log_()).squeeze(-2)


def expect(mixture: Mixture, chunks: Iterable[Rows], params: Params) -> Expected:
    """The E-step: the log-likelihood and the expected statistics of every site."""
    found: dict[bool, Coefficients] = {}
    totals = [Totals() for _ in mixture.groups]
    likelihoods: list[Tensor] = []
    measured = torch.zeros((), dtype=torch.float64)
    statistics: dict[str, SiteStatistics] = {}
    for rows in chunks:
        stacked, partial = rows.cached is not None, rows.partial(params)
        if stacked not in found:
            found[stacked] = coefficients(mixture, params, stacked).to(rows.device)
        likelihoods += _add(mixture, rows, found[stacked], totals, partial)
        measured = measured + rows.measure
        _add_partial(statistics, partial, rows.dtype)
    likelihood = torch.zeros(()) if not likelihoods else likelihoods[0]
    if len(likelihoods) > 1:
        likelihood = torch.stack(likelihoods).sum(0)
    value = home(likelihood, totals) + measured
    for group, total in zip(mixture.groups, totals, strict=True):
        statistics.update(total.statistics(group, mixture.plan.structure.program.dtype))
    run = Run(mixture.plan, params)
    for site, own, outside in mixture.outside:
        statistics[site.name] = own
        value = value + site.expected_log_density(run.arguments(site), own) + outside
    if mixture.scale != 1.0:
        statistics = {name: s.scaled(mixture.scale) for name, s in statistics.items()}
        value = value * mixture.scale
    return Expected(torch.where(value < IMPOSSIBLE, -torch.inf, value), statistics, {})


def _add_partial(
    statistics: dict[str, SiteStatistics], partial: list[list[PartialSums]], dtype: torch.dtype
) -> None:
    for sums in (s for parts in partial for s in parts):
        name, own = sums.layout.site.name, sums.statistics(dtype)
        statistics[name] = statistics[name] + own if name in statistics else own


def _add(
    mixture: Mixture,
    rows: Rows,
    found: Coefficients,
    totals: list[Totals],
    partial: list[list[PartialSums]],
) -> list[Tensor]:
    """Add the statistics of all blocks to ``totals`` and ``partial``.

    Returns the log-likelihood of each block.
    """
    likelihoods, scratch = [], Scratch()
    for start, stop in rows.blocks():
        weights = rows.weights_of(start, stop)
        for g, group in enumerate(mixture.groups):
            phi, base = rows.phi(g, start, stop, scratch), found.base[g]
            out = scratch.empty(g, (len(base), stop - start), base)
            joint = log_joint_states(group, base, found.natural[g], phi, stop - start, out)
            vectors = _join(group, joint, partial[g], start, stop, scratch)
            copies = (
                joint if mixture.copies is None else joint.view(mixture.copies, -1, stop - start)
            )
            by_row = normalise(copies, weights)
            likelihoods.append(_sum(by_row, weights))
            totals[g].add(group, joint, phi)
            for sums, own in zip(partial[g], vectors, strict=True):
                sums.add(group.marginal(joint, sums.layout.axes), own, start, stop)
    return likelihoods


def _join(
    group: Group,
    joint: Tensor,
    partial: list[PartialSums],
    start: int,
    stop: int,
    scratch: Scratch,
) -> list[Tensor]:
    """Add what rows with missing elements show to ``L`` of a block; returns their statistics."""
    vectors = []
    for sums in partial:
        phi = sums.block(start, stop, scratch)
        own = group.spread(sums.log_probabilities(phi, start, stop), sums.layout.axes)
        joint.view((*group.sizes, -1)).add_(own)
        vectors.append(phi)
    return vectors


def expect_given(
    mixture: Mixture, rows: Rows, posteriors: Sequence[Tensor], params: Params | None = None
) -> Expected:
    """The statistics under given posteriors: for each group the joint states by rows.

    A posterior of one column holds for every row. Row weights come on top. What is missing of a
    row is expected at ``params``.
    """
    partial = rows.partial(params or mixture.plan.reading.points[0])
    statistics: dict[str, SiteStatistics] = {s.name: own for s, own, _ in mixture.outside}
    for g, (group, given) in enumerate(zip(mixture.groups, posteriors, strict=True)):
        total, scratch = Totals(), Scratch()
        for start, stop in rows.blocks():
            phi = rows.phi(g, start, stop, scratch)
            own = given.expand(-1, stop - start)
            if given.shape[1] > 1:
                own = given[:, start:stop]
                if rows.patterns is not None:
                    own = given[:, rows.patterns.order[start:stop]]
            own = own if rows.weights is None else own * rows.weights[start:stop]
            total.add(group, own.to(rows.device), phi)
            for sums in partial[g]:
                vectors = sums.block(start, stop, scratch)
                sums.add(group.marginal(own, sums.layout.axes), vectors, start, stop)
        home(torch.zeros((), device=rows.device), [total])
        statistics.update(total.statistics(group, rows.dtype))
    _add_partial(statistics, partial, rows.dtype)
    if mixture.scale != 1.0:
        statistics = {name: s.scaled(mixture.scale) for name, s in statistics.items()}
    return Expected(torch.zeros((), dtype=rows.dtype), statistics, {})


def _sum(by_row: Tensor, weights: Tensor | None) -> Tensor:
    """The (weighted) sum over the rows, in double precision."""
    return (by_row if weights is None else by_row * weights).sum(-1, dtype=torch.float64)


def home(likelihood: Tensor, totals: list[Totals]) -> Tensor:
    """Bring all sums from the device in one copy: the only time that an E-step waits for it."""
    if likelihood.device.type == "cpu":
        return likelihood
    tensors = [likelihood]
    for total in totals:
        assert total.counts is not None
        tensors += [total.counts, *(s for sums in total.sums for s in sums)]
    flat = torch.cat([t.reshape(-1) for t in tensors]).cpu()
    parts = iter(flat.split([t.numel() for t in tensors]))
    likelihood = next(parts).reshape(likelihood.shape)
    for total in totals:
        assert total.counts is not None
        total.counts = next(parts).reshape(total.counts.shape)
        total.sums = [[next(parts).reshape(s.shape) for s in sums] for sums in total.sums]
    return likelihood


class Totals:
    """Sums over the blocks, for one group; in double precision, whatever that of the data."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.sums: list[list[Tensor]] = []

    def add(self, group: Group, posterior: Tensor, phi: list[list[Tensor]]) -> None:
        """Add ``Phi R'`` of a block."""
        counts = posterior.sum(1, dtype=torch.float64)
        first = self.counts is None
        self.counts = counts if self.counts is None else self.counts + counts
        double = posterior.dtype == torch.float64
        for i, ((axes, _), pieces) in enumerate(zip(group.observed, phi, strict=True)):
            columns = group.marginal(posterior, axes).T
            if first:
                self.sums.append([_sums(piece, columns).double() for piece in pieces])
                continue
            for piece, total in zip(pieces, self.sums[i], strict=True):
                if double and piece.dim() == 2:
                    total.addmm_(piece, columns)
                else:
                    total.add_(_sums(piece, columns))

    def statistics(self, group: Group, dtype: torch.dtype) -> dict[str, SiteStatistics]:
        """The expected statistics of every site of the group."""
        assert self.counts is not None
        self.counts = self.counts.to(dtype)
        self.sums = [[total.to(dtype) for total in sums] for sums in self.sums]
        counts = self.counts.reshape(group.sizes)
        result = {a.site.name: a.expected(counts) for a in group.assigned}
        for (axes, layouts), sums in zip(group.observed, self.sums, strict=True):
            weight = group.marginal(self.counts.unsqueeze(1), axes).T
            pieces = iter(_unstacked(layouts, sums))
            for layout in layouts:
                found = [next(pieces) for _ in layout.widths]
                if layout.site.mask is not None:
                    own = next(pieces)
                else:
                    own = weight if layout.repeats == 1 else weight * layout.repeats
                result[layout.site.name] = layout.statistics(own, found)
        return result


def _sums(phi: Tensor, columns: Tensor) -> Tensor:
    """``Phi R'``: features by states; ``phi`` may have the rows of each copy."""
    if phi.dim() == 2:
        return phi @ columns
    copies, features, rows = phi.shape
    found = torch.bmm(phi, columns.T.reshape(copies, -1, rows).mT)
    return found.transpose(0, 1).reshape(features, -1)


def _unstacked(layouts: tuple[Layout, ...], sums: list[Tensor]) -> list[Tensor]:
    """One matrix for each statistic."""
    sizes = [w for layout in layouts for w in layout.heights]
    if len(sums) == len(sizes):
        return sums
    return list(sums[0].split(sizes))


def posteriors(
    mixture: Mixture, rows: Rows, params: Params
) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
    """For each block the posterior of each group's joint states (states by rows), the rows'
    log-likelihoods and their weights.
    """
    found = coefficients(mixture, params, rows.cached is not None).to(rows.device)
    scratch, partial = Scratch(), rows.partial(params)
    for start, stop in rows.blocks():
        by_row = rows.measure_of(start, stop)
        joints = []
        for g, group in enumerate(mixture.groups):
            phi = rows.phi(g, start, stop, scratch)
            joint = log_joint_states(group, found.base[g], found.natural[g], phi, stop - start)
            _join(group, joint, partial[g], start, stop, scratch)
            by_row = by_row + normalise(joint, None)
            joints.append(joint)
        yield joints, by_row * mixture.scale, rows.weights_of(start, stop)


def marginals(mixture: Mixture, chunks: Iterable[Rows], params: Params) -> dict[str, Tensor]:
    """For each assignment its posterior probabilities: rows by states."""
    none = {z: n for group in mixture.groups for z, n in zip(group.names, group.sizes, strict=True)}
    parts = {z: [torch.zeros((0, n))] for z, n in none.items()}
    for rows in chunks:
        own: dict[str, list[Tensor]] = {z: [] for z in parts}
        for joints, _, _ in posteriors(mixture, rows, params):
            for group, joint in zip(mixture.groups, joints, strict=True):
                for axis, z in enumerate(group.names):
                    own[z].append(group.marginal(joint, (axis,)).T.cpu())
        for z, blocks in own.items():
            parts[z].append(rows.restored(torch.cat(blocks)))
    return {z: torch.cat(found) for z, found in parts.items()}


def best_states(mixture: Mixture, chunks: Iterable[Rows], params: Params) -> dict[str, Tensor]:
    """For each assignment its state in the most probable joint assignment of each row."""
    none = torch.zeros(0, dtype=torch.int64)
    parts = {z: [none] for group in mixture.groups for z in group.names}
    for rows in chunks:
        own: dict[str, list[Tensor]] = {z: [] for z in parts}
        for joints, _, _ in posteriors(mixture, rows, params):
            for group, joint in zip(mixture.groups, joints, strict=True):
                best = torch.unravel_index(joint.argmax(0), group.sizes) if group.sizes else ()
                for z, states in zip(group.names, best, strict=True):
                    own[z].append(states.cpu())
        for z, blocks in own.items():
            parts[z].append(rows.restored(torch.cat(blocks)))
    return {z: torch.cat(found) for z, found in parts.items()}


def row_log_likelihoods(mixture: Mixture, chunks: Iterable[Rows], params: Params) -> Tensor:
    """The log-likelihood of each row."""
    parts = [torch.zeros(0)]
    for rows in chunks:
        blocks = [by_row.cpu() for _, by_row, _ in posteriors(mixture, rows, params)]
        parts.append(rows.restored(torch.cat(blocks)))
    return torch.cat(parts)


def entropy(mixture: Mixture, chunks: Iterable[Rows], params: Params) -> Tensor:
    """The (weighted) sum over the rows of the entropy of their assignments."""
    total = torch.zeros((), dtype=mixture.plan.structure.program.dtype)
    for rows in chunks:
        for joints, _, weights in posteriors(mixture, rows, params):
            for joint in joints:
                own = torch.xlogy(joint, joint).sum(0)
                total = total - _sum(own, weights).cpu()
    return total * mixture.scale
