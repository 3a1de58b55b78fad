"""Regressions: which coefficients are solved together, and in which predictors they stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyroem.families import forms
from pyroem.mstep.affine import Affine, selected
from pyroem.mstep.sites import SiteModel
from pyroem.structure import Structure

FLAT = 1e-12  # a singular value of a design with its columns scaled: they are sums of others
ILL = 1e-3  # one that asks for another basis
GAUGE = 1e-9
ROTATED = ""  # the name of the coordinates in a basis
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
    basis of its directions that nothing depends on. Where the columns of a design are nearly sums
    of others, it is solved for in a ``basis`` in which they are not; ``rotated`` are the predictors
    of the terms there.
    """

    offsets: dict[str, int]
    size: int
    terms: tuple[Term, ...]
    null: Tensor
    basis: Tensor | None = None
    rotated: tuple[Affine, ...] = ()

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
    free = torch.ones(size, dtype=torch.bool)
    priors = torch.zeros(size, dtype=torch.float64)
    for name, at in offsets.items():
        parameter = structure.parameters[name]
        elements = slice(at, at + parameter.value.numel())
        priors[elements] = float(parameter.has_prior)
        if parameter.held is not None:
            free[elements] = ~parameter.held.reshape(-1)
    null, basis = _directions(offsets, size, terms, free, priors)
    if basis is None:
        return Regression(offsets, size, tuple(terms), null)
    rotated = tuple(_rotated(t.affine, places(t.affine, offsets), basis) for t in terms)
    return Regression(offsets, size, tuple(terms), null, basis, rotated)


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


def _directions(
    offsets: dict[str, int], size: int, terms: list[Term], free: Tensor, priors: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The directions of the coefficients that nothing depends on, and a basis of the others.

    Both from the triangular factors of the designs, whose products would hide what is below the
    square root of the precision. None where the coefficients themselves will do.
    """
    roots = [torch.diag(priors)]
    for term in terms:
        affine = term.affine
        where = places(affine, offsets)
        factors = [torch.linalg.qr(m, mode="r").R for m in affine.matrices]
        for m, elements in affine.entries:
            if m >= 0:
                root = torch.zeros((len(factors[m]), size + 1)).to(factors[m])
                root[:, where[elements]] = factors[m]  # what is held by others goes to the end
                roots.append(root[:, :size])
    root = torch.cat(roots)[:, free]
    scale = root.norm(dim=0)
    scale = torch.where(scale > 0, scale, 1.0)
    triangle = torch.linalg.qr(root / scale, mode="r").R
    _, singular, right = torch.linalg.svd(triangle, full_matrices=True)
    singular = torch.cat([singular, singular.new_zeros(len(scale) - len(singular))])
    largest = singular.max().clamp(min=1e-300) if len(singular) else 1.0
    kept = singular > FLAT * largest

    def whole(x: Tensor) -> Tensor:
        return x.new_zeros((size, x.shape[1])).index_copy(0, free.nonzero().reshape(-1), x)

    basis = whole(right[kept].T / scale.unsqueeze(1) / singular[kept])
    outside = whole(right[~kept].T / scale.unsqueeze(1))
    ill = bool((singular[kept] < ILL * largest).any())
    # Of softmax gates the same may be added to all classes.
    vectors = [term for term in terms if term.affine.events]
    gauge = outside[:, :0] if not vectors else _gauge(vectors, offsets, priors, basis)
    directions = torch.cat([outside, gauge], 1)
    null = torch.linalg.qr(directions).Q if directions.shape[1] else directions
    return null, basis if ill else None


def _gauge(terms: Iterable[Term], offsets: dict[str, int], priors: Tensor, basis: Tensor) -> Tensor:
    """The directions within a basis that kernels of vectors do not tell apart."""
    curvature = basis.T @ torch.diag(priors) @ basis
    for term in terms:
        rotated = _rotated(term.affine, places(term.affine, offsets), basis)
        cells = rotated.constant
        width = cells.shape[-1]
        one = torch.eye(width).to(cells).reshape((1, 1, width, width))
        if rotated.coordinate.form is forms.LOGITS:
            one = one - 1 / width
        own = torch.arange(basis.shape[1])
        accumulate(rotated, own, torch.zeros_like(cells), one, None, curvature)
    values, vectors = torch.linalg.eigh(curvature)
    level = GAUGE * values.max().clamp(min=1e-300) if len(values) else 0.0
    return basis @ vectors[:, values <= level]


def _rotated(affine: Affine, where: Tensor, basis: Tensor) -> Affine:
    """An affine function of the coordinates in a basis."""
    padded = torch.cat([basis, basis.new_zeros((1, basis.shape[1]))])
    own = torch.arange(basis.shape[1])
    matrices: list[Tensor] = []
    entries: list[tuple[int, Tensor]] = []
    known: dict[tuple[int, ...], int] = {}
    for m, elements in affine.entries:
        if m < 0 or not basis.shape[1]:
            entries.append((-1, own[:0]))
            continue
        key = (m, *elements.tolist())
        if key not in known:
            known[key] = len(matrices)
            matrices.append(affine.matrices[m] @ padded[where[elements]])
        entries.append((known[key], own))
    return replace(
        affine,
        names=(ROTATED,),
        sizes=(basis.shape[1],),
        matrices=tuple(matrices),
        entries=tuple(entries),
        base={},
        loose=frozenset(),
    )
