"""The kernel is held against the program itself before a fit, on a few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroem._pyro import Enumerated
from pyroem.errors import ModelError
from pyroem.estep.columns import Scratch
from pyroem.estep.kernel import IMPOSSIBLE, Rows
from pyroem.estep.layout import Layout, finite
from pyroem.estep.partial import PartialSums
from pyroem.mstep.runs import Run
from pyroem.mstep.sites import pad

FEW = 64  # rows
AGREE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative to the terms of the sum


def check_kernel(rows: Rows) -> None:
    """Compare every observation's log-probabilities with those of the reading's traces.

    Raises:
    ------
    ModelError
        Naming the site whose kernel differs from the program.
    """
    plan = rows.mixture.plan
    stop = min(FEW, rows.num_rows)
    for point, trace in zip(plan.reading.points, plan.reading.traces, strict=True):
        run = Run(plan, point)
        partial = {s.layout.site.name: s for parts in rows.partial(point) for s in parts}
        for layout in rows.mixture.layouts:
            name = layout.site.name
            exact = _by_trace(layout, trace)
            if name in partial:
                own, size = _of_partial(partial[name], stop)
            else:
                own, size = _by_kernel(rows, layout, run, stop)
            if rows.patterns is not None and exact.shape[1] > 1:
                exact = exact[:, rows.patterns.order]
            exact = exact[:, :stop]
            gap = torch.where(own == exact, 0.0, (own - exact).abs())
            if not (gap <= AGREE[own.dtype] * (1 + size)).all():
                raise ModelError(
                    f"Site '{name}': the kernel does not agree with the program (difference"
                    f" {float(gap.max()):g} in the log-probability of a row). Use engine='trace';"
                    " if the site's family is your own, mend its natural parameters, base measure"
                    " or packed statistics."
                )


def _by_kernel(rows: Rows, layout: Layout, run: Run, stop: int) -> tuple[Tensor, Tensor]:
    """A site's log-probabilities (its states by the rows), and the size of the terms summed."""
    site = layout.site
    etas, normaliser = layout.natural(run.centred(site))
    column = rows.columns[site.name]
    pieces, mask = column.block(0, stop)
    count = mask if mask is not None else torch.full((layout.num_features, 1), layout.repeats)
    terms = [(-normaliser, count.to(normaliser)), *zip(map(finite, etas), pieces, strict=True)]
    total = sum((eta @ piece for eta, piece in terms), torch.zeros(()))
    size = sum((eta.abs() @ piece.abs() for eta, piece in terms), torch.zeros(()))
    if column.has_measure:
        measure = column.measure(0, stop)
        total, size = total + measure, size + measure.abs()
    return torch.where(total < IMPOSSIBLE, -torch.inf, total), size


def _of_partial(sums: PartialSums, stop: int) -> tuple[Tensor, Tensor]:
    phi = sums.block(0, stop, Scratch())
    own = sums.log_probabilities(phi, 0, stop)
    return own, own.abs() + phi.abs().amax(0)


def _by_trace(layout: Layout, trace: Enumerated) -> Tensor:
    site = layout.site
    exact = trace.unpack(site.name, trace.factors[site.name].tensor)
    rank = layout.rank - site.events  # the declared events are summed
    exact = pad(exact, rank, 0)
    kept = [*layout.states, *layout.rows]
    features = [d for d in (*layout.features, *layout.pooled) if d < rank]
    exact = exact.expand(
        [n if d in kept or d in features else -1 for d, n in enumerate(site.shape[:rank])]
    )
    order = [d for d in range(rank) if d not in (*kept, *features)]
    exact = exact.permute([*order, *kept, *features])[(0,) * len(order)]
    exact = exact.sum(list(range(len(kept), exact.dim()))) if features else exact
    return exact.reshape(layout.num_states, -1)
