"""What a fitted program says of one observation, state by state: densities and moments.

With ``p(k | n)`` the probability of state ``k`` in row ``n`` before anything is seen, ``p(v | k,
n)`` the distribution of the observation there and ``w[n]`` the weight of the row, the component
``k`` of the data as a whole is

    sum_n w[n] p(k | n) p(v | k, n) / sum_n w[n]

whose sum over ``k`` is the fitted density of the observation. Where nothing varies along the rows
it is ``p(k) p(v | k)``: a mixture's own component.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem._pyro import Enumerated, Incomplete, arranged, plate_frames, unwrap
from pyroem.errors import DataError, ModelError, SettingError
from pyroem.estep import decode
from pyroem.estep.chain import site_weights
from pyroem.sequences import observed
from pyroem.structure import (
    Params,
    Structure,
    base_mask,
    known_part,
    quoted,
    seen_cells,
    whole_of,
)

MOST_ROWS = 1000  # rows whose own distributions are averaged, where they differ


@dataclass(frozen=True, eq=False)
class _Part:
    """One site in the layout rows, states, columns: ``base`` has batch ``[R or 1, K, D or 1]``.

    Of a distribution of vectors the columns are its event.
    """

    base: Any
    values: Tensor
    weights: Tensor
    priors: Tensor
    rows: Tensor | None

    @property
    def own(self) -> Tensor:
        """``w[n] p(k | n)`` of the rows whose distributions ``base`` has; they add up to all."""
        if self.rows is None:
            return self.priors.sum(0, keepdim=True)
        chosen = self.priors[self.rows]
        return chosen * (self.priors.sum() / chosen.sum().clamp(min=1e-300))

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means ``[R, K, D]`` and covariances ``[R, K, D, D]``."""
        d, batch = self.values.shape[1], self.own.shape
        if isinstance(self.base, dist.MultivariateStudentT):
            tail = self.base.df / (self.base.df - 2)
            spread = torch.where(self.base.df > 2, tail, torch.nan)[..., None, None]
            scatter = self.base.scale_tril @ self.base.scale_tril.mT
            return self.base.loc.expand(*batch, d), (spread * scatter).expand(*batch, d, d)
        try:
            mean, variance = self.base.mean, self.base.variance
        except NotImplementedError:
            variance = mean = torch.full((*batch, d), torch.nan)
        matrix = getattr(self.base, "covariance_matrix", None)
        if matrix is None and self.base.event_shape:
            matrix = _covariance_of_shares(self.base)
        if matrix is None:
            matrix = torch.diag_embed(variance.expand(*batch, d))
            if self.base.event_shape:  # not independent, but how is not known
                matrix = torch.where(matrix > 0, matrix, torch.nan)
        return mean.expand(*batch, d), matrix.expand(*batch, d, d)

    def column(self, at: int) -> Any | None:
        """The distribution of one column, with batch ``[R, K]``; None where it is not known."""
        base = self.base
        if not base.event_shape:
            shape = (*base.batch_shape[:-1], self.values.shape[1])
            own = base.expand(torch.Size(shape))
            return arranged(own, lambda x, right: x.select(x.dim() - right - 1, at), "column")
        loc, scatter = getattr(base, "loc", None), getattr(base, "covariance_matrix", None)
        if isinstance(base, dist.MultivariateStudentT):
            scale = (base.scale_tril @ base.scale_tril.mT)[..., at, at].sqrt()
            return dist.StudentT(base.df, base.loc[..., at], scale)
        if loc is None or scatter is None:
            return _column_of_shares(base, at)
        return dist.Normal(loc[..., at], scatter[..., at, at].sqrt())


@dataclass(frozen=True, eq=False)
class Components:
    """One observation and its fitted distribution in every state.

    Attributes:
    ----------
    name
        The observation.
    labels
        A name for each state, or combination of states: ``z = 0``.
    values
        The data, ``[N, D]``; NaN where nothing is seen.
    weights
        The posterior probability of each state in each row times the row's weight, ``[N, K]``; zero
        in rows that show nothing.
    priors
        The same before anything is seen: the probabilities by the parameters (and covariates).
    rows
        How many rows there are; of large data ``values`` has some of them.
    discrete
        Whether the observation is a count or a category.
    """

    name: str
    labels: tuple[str, ...]
    parts: tuple[_Part, ...]
    rows: int

    @cached_property
    def values(self) -> Tensor:
        """See the class."""
        return torch.cat([part.values for part in self.parts])

    @cached_property
    def weights(self) -> Tensor:
        """See the class."""
        return torch.cat([part.weights for part in self.parts])

    @cached_property
    def priors(self) -> Tensor:
        """See the class."""
        return torch.cat([part.priors for part in self.parts])

    @property
    def discrete(self) -> bool:
        """See the class."""
        return bool(self.parts[0].base.support.is_discrete)

    @property
    def categorical(self) -> bool:
        """Whether its values are categories, which have no order."""
        return isinstance(self.parts[0].base, dist.Bernoulli | dist.Categorical)

    @property
    def circular(self) -> bool:
        """Whether its values are angles, from minus pi to pi."""
        return isinstance(self.parts[0].base, dist.VonMises)

    @property
    def varies(self) -> bool:
        """Whether rows differ in their distribution, by covariates say."""
        return any(part.rows is not None for part in self.parts)

    @cached_property
    def varying_shares(self) -> bool:
        """Whether rows differ in the probabilities of their states, by a gate say."""
        total = self.priors.sum(1, keepdim=True)
        own = (self.priors / total)[total[:, 0] > 0]
        return bool((own.amax(0) - own.amin(0) > 1e-9).any())

    def column(self, column: int) -> tuple[Tensor, Tensor]:
        """What is seen of one column, and the weights of its rows.

        Raises:
        ------
        SettingError
            Where there is no such column.
        DataError
            Where nothing of it is seen.
        """
        self.column_name(column)
        values = self.values[:, column]
        seen = ~values.isnan()
        if not seen.any():
            raise DataError(f"Site '{self.name}': nothing is seen of column {column}.")
        return values[seen], self.weights.sum(1)[seen]

    def column_name(self, column: int) -> str:
        """What to call a column: ``x``, or ``x[1]`` of several."""
        width = self.values.shape[1]
        if isinstance(column, bool) or not isinstance(column, int) or not 0 <= column < width:
            raise SettingError(
                f"column: site '{self.name}' has columns 0 to {width - 1}, got {column!r}."
            )
        return self.name if width == 1 else f"{self.name}[{column}]"

    @cached_property
    def shares(self) -> Tensor:
        """The share of the rows that each state has by the parameters, ``[K]``."""
        return self.priors.sum(0) / self.priors.sum()

    def density(self, grid: Tensor, column: int = 0) -> Tensor | None:
        """The density (probability) of a column in each state times its share: ``[K, G]``.

        None where the distribution of one column alone is not known.
        """
        total = self.priors.sum()
        found: Tensor | float = 0.0
        for part in self.parts:
            base = part.column(column)
            if base is None:
                return None
            low = _log_prob(base, grid[:, None, None])
            found = found + (low.exp() * part.own).sum(1).T / total
        return found if isinstance(found, Tensor) else None

    def joint_density(self, points: Tensor) -> Tensor:
        """The density at ``points [G, D]``, the states summed out: ``[G]``."""
        total, found = self.priors.sum(), torch.zeros(len(points), dtype=points.dtype)
        for part in self.parts:
            low = _log_prob(part.base, points[:, None, None, :])
            if not part.base.event_shape:
                low = low.expand(*low.shape[:-1], points.shape[1]).sum(-1)
            found = found + (low.exp() * part.own).sum((1, 2)) / total
        return found

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means ``[K, D]`` and covariances ``[K, D, D]``, by the law of total covariance."""
        own = [(part.own, *part.moments) for part in self.parts]
        weight = torch.stack([w.sum(0) for w, _, _ in own]).sum(0)[:, None]
        mean = torch.stack([(w[..., None] * m).sum(0) for w, m, _ in own]).sum(0) / weight
        second = []
        for w, m, c in own:
            away = (m - mean).unsqueeze(-1)
            second.append((w[..., None, None] * (c + away @ away.mT)).sum(0))
        return mean, torch.stack(second).sum(0) / weight.unsqueeze(-1)


def _concentration(base: Any) -> tuple[Tensor, Tensor | float, Any] | None:
    """Of shares of a whole: their means, the variance's factor, and the whole's size."""
    if isinstance(base, dist.Dirichlet):
        a = base.concentration
        total = a.sum(-1, keepdim=True)
        return a / total, 1 / (total + 1), 1.0
    if isinstance(base, dist.DirichletMultinomial):
        a, n = base.concentration, torch.as_tensor(base.total_count).unsqueeze(-1)
        total = a.sum(-1, keepdim=True)
        return a / total, (total + n) / (total + 1) / n, n
    if isinstance(base, dist.Multinomial):
        n = torch.as_tensor(base.total_count)
        return base.probs, 1 / n, n
    if isinstance(base, dist.OneHotCategorical):
        return base.probs, 1.0, 1.0
    return None


def _covariance_of_shares(base: Any) -> Tensor | None:
    """``n^2 c (diag(m) - m m')`` of Dirichlet, multinomial and one-hot distributions."""
    found = _concentration(base)
    if found is None:
        return None
    m, c, n = found
    factor = torch.as_tensor(n * n * c)
    factor = factor.unsqueeze(-1) if factor.dim() else factor
    return factor * (torch.diag_embed(m) - m.unsqueeze(-1) * m.unsqueeze(-2))


def _column_of_shares(base: Any, at: int) -> Any | None:
    """The distribution of one column of a Dirichlet, multinomial or one-hot distribution."""
    if isinstance(base, dist.Dirichlet | dist.DirichletMultinomial):
        own = base.concentration[..., at]
        rest = base.concentration.sum(-1) - own
        if isinstance(base, dist.Dirichlet):
            return dist.Beta(own, rest)
        return dist.BetaBinomial(own, rest, base.total_count)
    if isinstance(base, dist.Multinomial):
        return dist.Binomial(base.total_count, base.probs[..., at])
    if isinstance(base, dist.OneHotCategorical):
        return dist.Bernoulli(base.probs[..., at])
    return None


def _log_prob(base: Any, values: Tensor) -> Tensor:
    """The log-density; -inf outside of the support."""
    inside = base.support.check(values)
    safe = torch.where(inside[(...,) + (None,) * len(base.event_shape)], values, _filler(base))
    found: Tensor = base.log_prob(safe.to(values.dtype))
    return torch.where(inside, found, -torch.inf)


def _filler(base: Any) -> Tensor:
    """A value of the support, for each element of the batch."""
    with torch.random.fork_rng(devices=[]):
        found: Tensor = base.sample()
        return found


def components(
    structure: Structure, params: Params, row_weights: Tensor | None = None, site: str | None = None
) -> Components:
    """One observation of a program at ``params``; ``site`` names it where there are several.

    Raises:
    ------
    SettingError
        For a name that the program does not observe, and where there are several and none is named.
    ModelError
        For an observation that has no such picture (its events are matrices, say).
    """
    run = structure.enumerate(params)
    _, weights = site_weights(structure, run, row_weights)
    unseen = {n: torch.zeros_like(t) for n, t in run.tensors().items() if _is_data(structure, n)}
    _, priors = site_weights(structure, run, row_weights, unseen)
    known = sites(structure)
    if site is None and len(known) == 1:
        (site,) = known
    if site is None or site not in known:
        got = "none was named" if site is None else f"got {site!r}"
        raise SettingError(f"site: expected one of the observations {quoted(known)}; {got}.")
    found = [_part(structure, run, name, weights[name], priors[name]) for name in known[site]]
    most = max(len(states) for states, _ in found)
    kept = [(states, part) for states, part in found if len(states) == most]
    states = kept[-1][0]
    shown = {z: _shown(structure, z, states) for z in states}
    combined = product(*(range(k) for k in states.values()))
    labels = [
        ", ".join(f"{shown[z]} = {k}" for z, k in zip(states, own, strict=True)) for own in combined
    ]
    parts = tuple(part for _, part in kept)
    return Components(site, tuple(labels), parts, sum(len(part.values) for part in parts))


def _is_data(structure: Structure, name: str) -> bool:
    """Whether a site is an observation, and not the known part of an assignment."""
    return name in structure.observations and whole_of(name) == name


def sites(structure: Structure) -> dict[str, list[str]]:
    """The sites behind each observation: one, or a chain's first step and the others."""
    found: dict[str, list[str]] = {}
    for chain in structure.chains:
        for name, *both in observed(structure, chain):
            found[name] = [site for site in both if site is not None]
    taken = {site for both in found.values() for site in both}
    data = [n for n in structure.observations if _is_data(structure, n)]
    return found | {n: [n] for n in data if n not in taken}


def _shown(structure: Structure, name: str, states: Mapping[str, int]) -> str:
    """The name of an assignment; of a chain's, without the step."""
    for chain in structure.chains:
        for first, later in decode.partners(chain):
            if name in (first, later):
                before = " before" if name == first and later in states else ""
                return (chain.name if first == chain.first else first) + before
    return whole_of(name)


def _part(
    structure: Structure, run: Enumerated, name: str, weights: Tensor, priors: Tensor
) -> tuple[dict[str, int], _Part]:
    """The states that a site hangs on, and the site laid out."""
    node = run.trace.nodes[name]
    base, declared, _ = unwrap(node["fn"])
    if isinstance(base, Incomplete):
        base = base.base_dist
    events = len(base.event_shape)
    if events > 1 or (events and declared):
        raise ModelError(f"Site '{name}': its events are no numbers or vectors; draw it yourself.")
    sizes = {**structure.assignments, **structure.imputed}
    states = {z: sizes[z] for z, s in run.states.items() if s in run.factors[name].dims}
    frames = [f for f in plate_frames(node) if f.vectorized]
    # Of vectors the columns are the event, and all plates make rows.
    rows = [f.dim for f in frames if events or f.name in structure.row_plates]
    others = [f.dim for f in frames if f.dim not in rows]
    full = {f.dim: int(f.size) for f in frames}
    full |= {_dim(run, z): k for z, k in states.items()}
    groups = (rows, [_dim(run, z) for z in states], others)

    seen, value = seen_cells(node), node["value"].double()
    value = value if seen is None else torch.where(seen, value, torch.nan)
    value = value.expand(torch.broadcast_shapes(value.shape, node["fn"].shape()[-value.dim() :]))
    right = len(node["fn"].event_shape)
    plates = {f.dim: int(f.size) for f in frames}
    value = _lay(value, right, (rows, others), plates)
    value = value[:, 0] if events else value.flatten(1)
    shown = (~value.isnan()).any(1, keepdim=True)
    w, before = (
        _lay(run.unpack(name, own) / float(run.scale), 0, groups, full).mean(-1) * shown
        for own in (weights, priors)
    )

    w, unknown = _as_labelled(run, states, w, rows, full)
    # Those of the bare distribution lie further left: it has the declared event dims in its batch.
    own = {d - declared: size for d, size in full.items()}
    own |= {i - declared: int(n) for i, n in enumerate(node["fn"].event_shape[:declared])}
    inner = ([d - declared for d in rows], [d - declared for d in groups[1]])
    columns = [*(d - declared for d in others), *range(-declared, 0)]
    differs: list[int] = []

    def look(x: Tensor, right: int) -> Tensor:
        batch = x.dim() - right
        own = [d for d in inner[0] if -d <= batch and x.shape[batch + d] > 1]
        differs.extend(d for d in own if x.stride(batch + d))
        return x

    arranged(base, look, name)
    some = None
    if differs:  # by labels too: where the state is known, that of the label stands in all states
        able = unknown.nonzero().reshape(-1)
        some = able[torch.linspace(0, len(able) - 1, min(len(able), MOST_ROWS)).round().long()]
    sizes_of = own if differs else {d: 1 if d in inner[0] else n for d, n in own.items()}

    def lay(x: Tensor, right: int) -> Tensor:
        batch = x.dim() - right
        for d in () if differs else inner[0]:
            x = x.narrow(batch + d, 0, 1) if -d <= batch else x
        x = _lay(x, right, (*inner, columns), sizes_of)
        x = x if some is None else x[some]
        return x[:, :, 0] if events else x

    return states, _Part(arranged(base, lay, name), value, w, before, some)


def _as_labelled(
    run: Enumerated,
    states: Mapping[str, int],
    weights: Tensor,
    rows: Sequence[int],
    sizes: Mapping[int, int],
) -> tuple[Tensor, Tensor]:
    """Posterior weights that are certain where states are known, and the rows where none is."""
    unknown = torch.ones(len(weights), dtype=torch.bool)
    for axis, (z, count) in enumerate(states.items()):
        node = run.trace.nodes.get(known_part(z)) if whole_of(z) != z else None
        if node is None:
            continue
        label, mask = node["value"], base_mask(node)
        label = label.argmax(-1) if node["fn"].event_shape else label.long()
        mask = torch.ones((), dtype=torch.bool) if mask is None else mask
        own = {d: sizes[d] for d in rows}
        label, known = (_lay(x, 0, (rows,), own).reshape(-1) for x in (label, mask))
        whole = weights.reshape(len(weights), *states.values())
        certain = torch.nn.functional.one_hot(label.clamp(0, count - 1), count).to(weights)
        shape = [len(weights), *(count if i == axis else 1 for i in range(len(states)))]
        told = certain.reshape(shape) * whole.sum(axis + 1, keepdim=True)
        chosen = known.reshape(-1, *(1,) * len(states))
        weights = torch.where(chosen, told, whole).reshape(weights.shape)
        unknown &= ~known
    if not unknown.any():
        raise ModelError("Every state is known: there is nothing to tell apart.")
    return weights, unknown


def _lay(
    x: Tensor, right: int, groups: Sequence[Sequence[int]], sizes: Mapping[int, int]
) -> Tensor:
    """One dim for each of the groups of dims (from the right of the batch), then ``right`` more.

    The dims that ``sizes`` has are expanded; those in no group have size one.
    """
    width = max([x.dim() - right, *(-d for d in sizes)])
    x = x.reshape((1,) * (width + right - x.dim()) + tuple(x.shape))
    x = x.expand(*(sizes.get(i - width, x.shape[i]) for i in range(width)), *x.shape[width:])
    at = [width + d for group in groups for d in group]
    rest = [i for i in range(width) if i not in at]
    x = x.permute([*rest, *at, *range(width, x.dim())])[(0,) * len(rest)]
    for i, group in enumerate(groups):
        x = x.flatten(i, i + len(group) - 1) if group else x.unsqueeze(i)
    return x


def _dim(run: Enumerated, assignment: str) -> int:
    return int(run.trace.nodes[assignment]["infer"]["_enumerate_dim"])
