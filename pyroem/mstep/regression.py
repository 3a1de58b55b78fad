"""Regressions: which coefficients are solved together, and in which predictors they stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroem.families import forms
from pyroem.mstep.affine import Affine, selected
from pyroem.mstep.sites import SiteModel
from pyroem.structure import Structure

FLAT = 1e-13  # an eigenvalue of a design's products, its columns scaled: sums of others
MOST = 4_000_000  # numbers in a temporary


@dataclass(frozen=True)
class Term:
    """A predictor: an argument of a site that is affine in the coefficients."""

    site: SiteModel
    key: str
    affine: Affine


@dataclass(frozen=True)
class Regression:
    """Parameters that are solved together: coefficients that stand in common predictors.

    ``offsets`` gives their places in one vector of ``size`` elements; ``null`` is an orthonormal
    basis of its directions that nothing depends on.
    """

    offsets: dict[str, int]
    size: int
    terms: tuple[Term, ...]
    null: Tensor

    @property
    def exact(self) -> bool:
        """Whether weighted least squares maximise it at once."""
        parabolas = (forms.LOCATION, forms.VECTOR_LOCATION)
        return all(term.affine.coordinate.form in parabolas for term in self.terms)


def regression(
    structure: Structure, sites: Iterable[SiteModel], names: Iterable[str]
) -> Regression:
    """The regression of some coefficients."""
    offsets, size = {}, 0
    for name in names:
        offsets[name], size = size, size + structure.parameters[name].value.numel()
    terms = []
    for site in sites:
        for key, argument in site.arguments.items():
            if argument.parameters & offsets.keys():
                own = argument.selection
                affine = argument.affine if own is None else selected(own)
                assert affine is not None
                terms.append(Term(site, key, affine))
    null = _null_space(structure, offsets, size, terms)
    return Regression(offsets, size, tuple(terms), null)


def places(affine: Affine, offsets: dict[str, int]) -> Tensor:
    """For each element of an affine function's parameters its place among others; -1 for none."""
    parts = []
    for name, size in zip(affine.names, affine.sizes, strict=True):
        at = offsets.get(name)
        parts.append(torch.full((size,), -1) if at is None else torch.arange(at, at + size))
    return torch.cat(parts)


def accumulate(
    affine: Affine,
    where: Tensor,
    first: Tensor,
    second: Tensor,
    slope: Tensor | None,
    curvature: Tensor,
) -> None:
    """Add ``X' first`` to ``slope`` and ``X' second X`` to ``curvature``."""
    rows, cells = affine.counts
    width = len(affine.entries) // max(cells, 1)
    first = first.expand((rows, cells, *first.shape[2:])).reshape((rows, cells * width))
    size = len(curvature)
    ends = torch.cat([where, torch.tensor([-1])])
    ends = torch.where(ends < 0, size, ends)  # what is held fixed goes into a row that is dropped
    full = curvature.new_zeros((size + 1, size + 1))
    total = curvature.new_zeros(size + 1)
    for m, entries, elements in affine.sharing:
        design, at = affine.matrices[m], ends[elements]
        total.index_add_(0, at.reshape(-1), (design.T @ first[:, entries]).T.reshape(-1))
        if affine.events == 0:
            weights = second.expand((rows, cells))
            products = affine.products[m]
            if products is not None:
                blocks = weights[:, entries].T @ products
                _add(full, at, at, blocks.reshape((-1, design.shape[1], design.shape[1])))
                continue
            step = max(1, MOST // max(design.numel(), 1))
            for i in range(0, len(entries), step):
                chosen = entries[i : i + step]
                weighted = design.T.unsqueeze(0) * weights[:, chosen].T.unsqueeze(1)
                _add(full, at[i : i + step], at[i : i + step], weighted @ design)
    if affine.events:
        second = second.expand((rows, cells, width, width))
        for i, (m, one) in enumerate(affine.entries):
            for j in range(i - i % width, i - i % width + width):
                n, other = affine.entries[j]
                if m >= 0 and n >= 0:
                    weights = second[:, i // width, i % width, j % width]
                    block = (affine.matrices[m].T * weights) @ affine.matrices[n]
                    _add(full, ends[one].unsqueeze(0), ends[other].unsqueeze(0), block.unsqueeze(0))
    if slope is not None:
        slope += total[:size]
    curvature += full[:size, :size]


def _add(full: Tensor, rows: Tensor, columns: Tensor, blocks: Tensor) -> None:
    """Add blocks at pairs of places."""
    index = rows.unsqueeze(2) * full.shape[1] + columns.unsqueeze(1)
    full.view(-1).index_add_(0, index.reshape(-1), blocks.reshape(-1))


def spectrum(curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors with the diagonal scaled to one, and the scales."""
    diagonal = curvature.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    scaled = curvature / (scale.unsqueeze(0) * scale.unsqueeze(1))
    if not bool(scaled.isfinite().all()):
        eye = torch.eye(len(scale)).to(scale)
        return torch.zeros_like(scale), eye, torch.ones_like(scale)
    values, vectors = torch.linalg.eigh(scaled)
    return values, vectors, scale


def _null_space(
    structure: Structure, offsets: dict[str, int], size: int, terms: Iterable[Term]
) -> Tensor:
    """An orthonormal basis of the directions of the coefficients that nothing depends on."""
    curvature = torch.zeros((size, size), dtype=structure.program.dtype)
    for name, at in offsets.items():
        parameter = structure.parameters[name]
        if parameter.held is not None:  # not free, so not without effect
            own = slice(at, at + parameter.value.numel())
            curvature[own, own].diagonal().add_(parameter.held.reshape(-1).to(curvature))
        if parameter.has_prior:
            own = slice(at, at + parameter.value.numel())
            curvature[own, own].diagonal().add_(1.0)
    for term in terms:
        affine = term.affine
        cells = affine.constant
        one = torch.ones((1, 1)).to(cells)
        if affine.events:
            width = cells.shape[-1]
            one = torch.eye(width).to(cells).reshape((1, 1, width, width))
            if affine.coordinate.form is forms.LOGITS:
                one = one - 1 / width
        accumulate(affine, places(affine, offsets), torch.zeros_like(cells), one, None, curvature)
    values, vectors, scale = spectrum(curvature)
    flat = values <= FLAT * values.max().clamp(min=1e-300)
    directions = vectors[:, flat] / scale.unsqueeze(1)
    return torch.linalg.qr(directions).Q if directions.shape[1] else directions
