"""What the weighted rows say of a site's arguments near a point, to second order.

A search over few parameters then needs as many passes over the rows as a distribution has
arguments, however many states and parameters there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyroem.families import Arguments
from pyroem.mstep.sites import SiteModel
from pyroem.statistics import SiteStatistics


def local_model(
    site: SiteModel, arguments: Arguments, statistics: SiteStatistics
) -> Callable[[Arguments], Tensor]:
    """A function of the arguments with the first and second derivatives of the expected log-density
    at ``arguments``, each cell's own: ``g'd + d'H d / 2``, with ``d`` the way from there.
    """
    shapes = {
        name: (value.shape[: value.dim() - e], value.shape[value.dim() - e :])
        for name, value in arguments.items()
        for e in (site.arguments[name].event_dim,)
    }
    batch = torch.broadcast_shapes(*(shape for shape, _ in shapes.values()))

    def flat(values: Arguments) -> Tensor:
        parts = [values[n].expand(batch + event) for n, (_, event) in shapes.items()]
        return torch.cat([p.reshape((batch.numel(), -1)) for p in parts], 1)

    with torch.enable_grad():
        leaves = {
            name: arguments[name].detach().expand(batch + event).clone().requires_grad_()
            for name, (_, event) in shapes.items()
        }
        density = site.expected_log_density(leaves, statistics)
        slopes = torch.autograd.grad(
            density, list(leaves.values()), create_graph=True, materialize_grads=True
        )
        slope = torch.cat([s.reshape((batch.numel(), -1)) for s in slopes], 1)
        rows = [
            torch.autograd.grad(
                column.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            for column in slope.unbind(1)
        ]
    curvature = torch.stack(
        [torch.cat([g.reshape((batch.numel(), -1)) for g in row], 1) for row in rows], 1
    )
    here, slope = flat(leaves).detach(), slope.detach()

    def model(values: Arguments) -> Tensor:
        way = flat(values) - here
        bent = (curvature @ way.unsqueeze(-1)).squeeze(-1)
        return (slope * way).sum() + 0.5 * (way * bent).sum()

    return model
