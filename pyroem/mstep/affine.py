"""Recognising an affine argument: constant plus covariates times elements of parameters.

A linear predictor, a log-linear rate, a softmax gate, an effect added to another, a contrast: in
one of its coordinates an argument is often affine in some parameters. What multiplies them is found
by moving one element at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from pyroem.families import Coordinate, forms
from pyroem.mstep.selection import Selection

TOLERANCE = 1e-8
NOISE = 1e-13
MOST_ELEMENTS = 2000  # of all parameters together: each costs a run of the program
MOST_WORK = 1e9  # elements times cells
MOST_PRODUCTS = 10_000_000

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Affine:
    """``forward(argument) = constant + sum_j design_j theta_j``, with ``theta`` of ``names``.

    The argument's batch dims are parted into ``rows``, which share their coefficients, and cells,
    which differ in what coefficients they have. ``matrices`` are the distinct designs (rows,
    coefficients); for each element of the event of each cell, in order, ``entries`` names its
    design (-1: it has none) and the elements of ``theta`` that stand there.

    ``loose`` are the parameters that the constant depends on. The numbers are in double precision,
    whatever the ``dtype`` of the fit: sums of products over rows need it.
    """

    coordinate: Coordinate
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    constant: Tensor
    matrices: tuple[Tensor, ...]
    entries: tuple[tuple[int, Tensor], ...]
    base: Values
    loose: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float64

    @property
    def events(self) -> int:
        """The number of event dims: 0 or 1."""
        return self.coordinate.form.event_dim

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """The batch dims that are not rows."""
        return tuple(d for d in range(len(self.shape)) if d not in self.rows)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """The numbers of rows and cells."""
        return prod(self.shape[d] for d in self.rows), prod(self.shape[d] for d in self.cells)

    @cached_property
    def sharing(self) -> tuple[tuple[int, Tensor, Tensor], ...]:
        """For each design: the entries that have it, and their elements, a row for each entry."""
        found = []
        for m in range(len(self.matrices)):
            own = [i for i, (matrix, _) in enumerate(self.entries) if matrix == m]
            found.append((m, torch.tensor(own), torch.stack([self.entries[i][1] for i in own])))
        return tuple(found)

    @cached_property
    def products(self) -> tuple[Tensor | None, ...]:
        """For each design the products of its columns, row by row; None where they are many."""
        found: list[Tensor | None] = []
        for design in self.matrices:
            size = design.shape[1]
            if len(design) * size**2 > MOST_PRODUCTS:
                found.append(None)
            else:
                found.append((design.unsqueeze(2) * design.unsqueeze(1)).reshape((-1, size**2)))
        return tuple(found)

    @cached_property
    def single(self) -> bool:
        """Whether no cell has more than one coefficient."""
        return self.events == 0 and all(m.shape[1] == 1 for m in self.matrices)

    def theta(self, params: Values) -> Tensor:
        """The elements of all parameters as one vector."""
        return torch.cat([params[name].reshape(-1) for name in self.names]).to(self.constant)

    def spread(self, x: Tensor, event_dims: int) -> Tensor:
        """A tensor over the batch dims as (rows, cells, event); summed where there is no cell.

        A dim of size one says the same of every cell.
        """
        rank = len(self.shape)
        x = x.reshape((1,) * (rank + event_dims - x.dim()) + x.shape)
        extra = [d for d in range(rank) if self.shape[d] == 1 and x.shape[d] > 1]
        x = x.sum(extra, keepdim=True) if extra else x
        event = x.shape[rank:]
        x = x.expand((*self.shape, *event))
        x = x.permute((*self.rows, *self.cells, *range(rank, x.dim())))
        return x.reshape((*self.counts, *event))

    def value(self, params: Values, constant: Tensor | None = None) -> Tensor:
        """The coordinate at ``params``: (rows, cells, event); ``constant`` replaces the own one."""
        theta = self.theta(params)
        own = self.constant if constant is None else constant
        parts, order = [], []
        for m, entries, elements in self.sharing:
            parts.append(self.matrices[m] @ theta[elements].T)
            order.append(entries)
        if not parts:
            return own
        total = torch.cat(parts, -1)
        width = own.shape[1] * (own.shape[2] if self.events else 1)
        flat = own.reshape((len(own), width))
        if len(order) == 1 and torch.equal(order[0], torch.arange(width)):
            found = flat + total
        else:
            found = flat.expand((self.counts[0], width)).index_add(1, torch.cat(order), total)
        return found.reshape((-1, *own.shape[1:]))

    def argument(self, params: Values) -> Tensor:
        """The argument at ``params``, over the batch dims."""
        return self.coordinate.inverse(self.unspread(self.value(params)).to(self.dtype))

    def unspread(self, x: Tensor) -> Tensor:
        """Rows, cells and event dims as the batch dims and event dims of the argument."""
        order = (*self.rows, *self.cells)
        x = x.reshape((*(self.shape[d] for d in order), *x.shape[2:]))
        back = [order.index(d) for d in range(len(order))]
        return x.permute((*back, *range(len(order), x.dim())))

    def explains(self, params: Values, t: Tensor) -> bool:
        """Whether the coordinate is ``t`` at ``params``, a point that it was not made from."""
        own = self.unspread(self.value(params)).to(self.dtype)
        return _close(_gauged(self.coordinate, own), t)

    @cached_property
    def components(self) -> Tensor:
        """For each batch cell a number that cells have in common if coefficients link them."""
        size = sum(self.sizes)
        parent = list(range(size + 1))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        width = max(1, len(self.entries) // max(self.counts[1], 1))
        first = []
        for c in range(self.counts[1]):
            linked = [
                int(j)
                for _, elements in self.entries[c * width : (c + 1) * width]
                for j in elements
            ]
            for j in linked[1:]:
                parent[root(j)] = root(linked[0])
            first.append(linked[0] if linked else size)
        labels = torch.tensor([root(i) for i in first])
        order = (*self.rows, *self.cells)
        labels = labels.reshape([1] * len(self.rows) + [self.shape[d] for d in self.cells])
        return labels.permute([order.index(d) for d in range(len(order))])


def coordinate_of(coordinate: Coordinate, argument: Tensor) -> Tensor:
    """The coordinate; logits, known up to a constant, with mean zero."""
    return _gauged(coordinate, coordinate.forward(argument))


def _gauged(coordinate: Coordinate, t: Tensor) -> Tensor:
    return t - t.mean(-1, keepdim=True) if coordinate.form is forms.LOGITS else t


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = TOLERANCE if a.dtype == torch.float64 else 1e-4
    return bool(((a - b).abs() <= tolerance * b.abs().max()).all())


def additive(here: Tensor, moved: Tensor, half: Tensor, there: Tensor, there_moved: Tensor) -> bool:
    """Whether a coordinate is affine in one parameter, and what it adds is the same elsewhere.

    Given are its values at a point, with the parameter moved, with it moved half the way, and the
    first two again with all other parameters moved.
    """
    corners = (here, moved, half, there, there_moved)
    if not all(bool(x.isfinite().all()) for x in corners):
        return False
    step = moved - here
    exact = here.dtype == torch.float64
    size = max(float(x.abs().max()) for x in corners)
    rounding = (1e-12 if exact else 1e-5) * size
    # Measured by the step: a coordinate that hardly moves (probabilities near one) would seem to be
    # affine in anything.
    near = (TOLERANCE if exact else 1e-4) * float(step.abs().max()) + rounding
    return (
        bool((step.abs() > 10 * torch.finfo(here.dtype).eps * size).any())
        and bool(((2 * half - here - moved).abs() <= near).all())
        and bool(((step - there_moved + there).abs() <= near).all())
    )


def affine_of(
    coordinate: Coordinate,
    names: tuple[str, ...],
    loose: frozenset[str],
    base: Values,
    at_base: Tensor,
    boxes: list[Box],
) -> Affine:
    """The affine function whose columns, for each element of ``names`` in order, are ``boxes``.

    ``at_base`` is the coordinate where the parameters are ``base``.
    """
    sizes = tuple(base[n].numel() for n in names)
    rank = at_base.dim() - coordinate.form.event_dim
    shape = tuple(at_base.shape[:rank])
    partial = {d for box in boxes for d in range(rank) if len(box.at[d]) < shape[d]}
    rows = tuple(d for d in range(rank) if d not in partial)
    cells = tuple(d for d in range(rank) if d in partial)
    counts = prod(shape[d] for d in rows), prod(shape[d] for d in cells)
    event = at_base.shape[rank:]
    width = prod(event)

    def spread(x: Tensor) -> Tensor:
        x = x.permute((*rows, *cells, *range(rank, x.dim())))
        return x.reshape((counts[0], counts[1] * width))

    pool: list[Tensor] = []
    known: dict[float, list[int]] = {}
    of_entry: list[list[tuple[int, int]]] = [[] for _ in range(counts[1] * width)]
    constant = at_base  # where all of ``names`` are zero
    start = torch.cat([base[n].reshape(-1) for n in names]).tolist()
    for j, box in enumerate(boxes):
        whole = box.whole(at_base)
        if start[j]:
            constant = constant - start[j] * whole
        flat = spread(whole)
        for entry in (flat != 0).any(0).nonzero().reshape(-1).tolist():
            of_entry[entry].append((_pooled(flat[:, entry], pool, known), j))
    constant = torch.where(constant.abs() <= NOISE * at_base.abs(), 0.0, constant)
    matrices: list[Tensor] = []
    of_vectors: dict[tuple[int, ...], int] = {}
    entries = []
    for own in of_entry:
        own.sort()
        vectors = tuple(v for v, _ in own)
        if vectors and vectors not in of_vectors:
            of_vectors[vectors] = len(matrices)
            matrices.append(torch.stack([pool[v] for v in vectors], 1))
        elements = torch.tensor([j for _, j in own], dtype=torch.long)
        entries.append((of_vectors[vectors] if vectors else -1, elements))
    return Affine(
        coordinate,
        names,
        sizes,
        shape,
        rows,
        spread(constant).reshape((*counts, *event)).double(),
        tuple(m.double() for m in matrices),
        tuple(entries),
        {n: base[n] for n in names},
        loose,
        at_base.dtype,
    )


@dataclass(frozen=True)
class Box:
    """A column of a design: where along each batch dim it is not zero, and what it is there."""

    at: list[Tensor]
    inside: Tensor

    @staticmethod
    def of(
        coordinate: Coordinate, at_base: Tensor, moved: Tensor, step: float, units: frozenset[int]
    ) -> Box:
        """What an element adds, moved by ``step``; ``units`` are the dims of independent rows."""
        found, at = (moved - at_base) / step, []
        if coordinate.form is forms.LOGITS:
            found = _sparse(found, at_base)
        rank = found.dim() - coordinate.form.event_dim
        for d in range(rank):
            rest = [j for j in range(found.dim()) if j != d]
            used = (found != 0).any(dim=rest) if rest else found != 0
            at.append(torch.arange(len(used)) if d in units else used.nonzero().reshape(-1))
            found = found.index_select(d, at[d])
        return Box(at, found)

    def whole(self, like: Tensor) -> Tensor:
        """The column, zeros and all."""
        found = self.inside
        for d, at in reversed(list(enumerate(self.at))):
            shape = (*found.shape[:d], like.shape[d], *found.shape[d + 1 :])
            found = found.new_zeros(shape).index_copy(d, at, found)
        return found


def _sparse(found: Tensor, at_base: Tensor) -> Tensor:
    """A column of logits up to a constant: the one that leaves most elements alone."""
    found = found - found.median(-1, keepdim=True).values
    noise = NOISE * (1 + found.abs().amax(-1, keepdim=True) + at_base.abs().amax())
    return torch.where(found.abs() <= noise, 0.0, found)


def _pooled(vector: Tensor, pool: list[Tensor], known: dict[float, list[int]]) -> int:
    """The number of a vector among those that were met before."""
    key = float(f"{float(vector.abs().max()):.6g}")
    for v in known.setdefault(key, []):
        if bool(((pool[v] - vector).abs() <= 1e-14 * pool[v].abs()).all()):
            return v
    pool.append(vector.clone())
    known[key].append(len(pool) - 1)
    return len(pool) - 1


def selected(selection: Selection) -> Affine:
    """A selection as an affine function: every element of a parameter multiplied by one."""
    form = selection.coordinate.form
    index = selection.index
    blocks = sum(selection.sizes.values())
    event = tuple(selection.constants.shape[1:])
    constant = torch.zeros((*index.shape, *event), dtype=selection.constants.dtype)
    for i, value in enumerate(selection.constants):
        constant[index == blocks + i] = selection.coordinate.forward(value)
    boxes = []
    for block in range(blocks):
        for e in range(prod(event)):
            unit = torch.zeros(prod(event), dtype=constant.dtype)
            unit[e] = 1.0
            column = (index == block).reshape(index.shape + (1,) * len(event)) * unit.reshape(event)
            boxes.append(Box([torch.arange(n) for n in index.shape], column))
    names = tuple(selection.offsets)
    base = {n: torch.zeros(selection.sizes[n] * prod(event)).to(constant) for n in names}
    assert form.event_dim == len(event)
    return affine_of(selection.coordinate, names, frozenset(), base, constant, boxes)
