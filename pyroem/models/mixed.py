"""Mixtures for rows whose columns are of different kinds, as a Pyro program."""

from collections.abc import Sequence
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.models.assignments import (
    Program,
    assignment,
    check_choice,
    check_count,
    equal_weights,
    rows,
)

Kind = str | int
"""``"gaussian"``, ``"poisson"``, ``"bernoulli"``, or the number of categories of a column."""

KINDS = ("gaussian", "poisson", "bernoulli")


def mixed_mixture(components: int, kinds: Sequence[Kind]) -> Program:
    """The program ``program(x, labels=None)`` for rows ``x [N, D]``, column j being ``kinds[j]``.

        z_n ~ Categorical(weights),   x_nj | z_n = k ~ the distribution of kinds[j], independently

    with ``weights [K]`` on the simplex. All columns of one kind, in their order, make one site:

    - ``"gaussian"``: site ``gaussian``, parameters ``loc [K, D_g]`` and ``scale [K, D_g]``
    - ``"poisson"``: site ``poisson``, parameter ``rate [K, D_p]``
    - ``"bernoulli"``: site ``bernoulli``, parameter ``probs [K, D_b]``
    - a number C of categories: site ``categorical_<C>``, parameter ``probs_<C> [K, D_C, C]`` of the
      codes 0, ..., C - 1

    For ``labels`` see :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a
    setting or shape outside of these.
    """
    check_count("components", components)
    if not kinds:
        raise ValueError("Expected a kind for each column; got none.")
    columns: dict[Kind, list[int]] = {}
    for j, kind in enumerate(kinds):
        if isinstance(kind, str):
            check_choice("a kind", kind, KINDS)
        else:
            check_count("a number of categories", kind)
        columns.setdefault(kind, []).append(j)
    return partial(_program, components=components, columns=columns, width=len(kinds))


def _program(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    columns: dict[Kind, list[int]],
    width: int,
) -> None:
    x = rows(x, width)
    weights = equal_weights(x, components)
    tables = {kind: _table(kind, x.new_ones(components, len(of))) for kind, of in columns.items()}
    with pyro.plate("rows", len(x)):
        z = assignment(dist.Categorical(weights), x, labels)
        for kind, of in columns.items():
            name = kind if isinstance(kind, str) else f"categorical_{kind}"
            parameters = (table[z] for table in tables[kind])
            pyro.sample(name, _family(kind)(*parameters).to_event(1), obs=x[:, of])


def _family(kind: Kind) -> type[dist.TorchDistribution]:
    families = {"gaussian": dist.Normal, "poisson": dist.Poisson, "bernoulli": dist.Bernoulli}
    return families[kind] if isinstance(kind, str) else dist.Categorical


def _table(kind: Kind, ones: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The parameters of the columns of one kind, equal for all components (``ones [K, D]``)."""
    if kind == "gaussian":
        loc = pyro.param("loc", torch.zeros_like(ones))
        return loc, pyro.param("scale", ones, constraint=constraints.positive)
    if kind == "poisson":
        return (pyro.param("rate", ones, constraint=constraints.positive),)
    if kind == "bernoulli":
        return (pyro.param("probs", ones / 2, constraint=constraints.unit_interval),)
    assert isinstance(kind, int)
    start = ones.unsqueeze(-1).repeat(1, 1, kind) / kind
    return (pyro.param(f"probs_{kind}", start, constraint=constraints.simplex),)
