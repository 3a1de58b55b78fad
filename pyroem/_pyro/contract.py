"""The factors of an enumerated trace, and their contraction by Pyro's own tensor algebra."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyroem._pyro.markov import Reader
from pyroem._pyro.run import Program, Site, Values, plate_frames
from pyroem.errors import ModelError


class _WeightedRing(LogRing):
    """Pyro's log-space ring, with underflow-free products and optional row weights."""

    def __init__(self, backend: str, weights: Tensor | None, unit: str) -> None:
        super().__init__()
        self._backend = f"pyroem.semiring.{backend}"
        self._weights, self._unit = weights, unit

    def product(self, term: Tensor, ordinal: frozenset[str]) -> Tensor:
        if self._weights is not None and self._unit and ordinal >= set(self._unit):
            term = _weigh(term, self._weights, self._unit)
        return super().product(term, ordinal)


def _dims(x: Tensor) -> str:
    return x._pyro_dims  # type: ignore[attr-defined]  # an attribute of Pyro


def _pack(x: Tensor, dims: str) -> Tensor:
    x._pyro_dims = dims  # type: ignore[attr-defined]  # an attribute of Pyro
    return x


def align(x: Tensor, own: str, dims: str) -> Tensor:
    """Permute and reshape a packed tensor with dims ``own`` to broadcast against ``dims``."""
    present = [d for d in dims if d in own]
    x = x.permute([own.index(d) for d in present])
    sizes = iter(x.shape)
    return x.reshape([next(sizes) if d in own else 1 for d in dims])


def _weigh(term: Tensor, weights: Tensor, unit: str) -> Tensor:
    """Multiply a packed term by row weights, one dim for each symbol in ``unit``."""
    present = "".join(d for d in unit if d in _dims(term))  # a plate of size one has no dim
    weights = weights.reshape([weights.shape[unit.index(d)] for d in present])
    return _pack(term * align(weights, present, _dims(term)), _dims(term))


@dataclass(frozen=True)
class Factor:
    """The log-probability tensor of one site, packed: one dim for each symbol in ``dims``."""

    tensor: Tensor
    dims: str
    ordinal: frozenset[str]


@dataclass(frozen=True)
class Enumerated:
    """An enumerated trace and the factors whose contraction is the log-likelihood.

    ``states`` maps an assignment to its enumeration symbol, ``plates`` a vectorised plate to its
    own; ``scale`` is the common ``poutine.scale`` of the factors.
    """

    trace: Trace
    factors: dict[str, Factor]
    states: dict[str, str]
    plates: dict[str, str]
    scale: float | Tensor

    def names(self, dims: str) -> tuple[str, ...]:
        """The assignment or plate behind each symbol."""
        return tuple(self._behind[d] for d in dims)

    @cached_property
    def _behind(self) -> dict[str, str]:
        return {s: n for n, s in (*self.states.items(), *self.plates.items())}

    def sizes(self, name: str) -> dict[str, int]:
        """The sizes of a site's vectorised plates."""
        frames = plate_frames(self.trace.nodes[name])
        return {f.name: int(f.size) for f in frames if f.vectorized}

    def tensors(self) -> dict[str, Tensor]:
        """The factors' own tensors."""
        return {name: factor.tensor for name, factor in self.factors.items()}

    def contract(
        self,
        tensors: Mapping[str, Tensor],
        *,
        backend: str = "logsum",
        weights: Tensor | None = None,
        unit: tuple[str, ...] = (),
    ) -> list[tuple[frozenset[str], Tensor]]:
        """Eliminate every assignment; one packed term for each independent group of sites."""
        ring = self._ring(backend, weights, unit)
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for name, tensor in tensors.items():
            factor = self.factors[name]
            term = _pack(tensor[...], factor.dims)
            tree.setdefault(factor.ordinal, []).append(term)
        try:
            result = contract_tensor_tree(tree, set(self.states.values()), ring=ring)
        except NotImplementedError as error:
            names = {s: n for n, s in self.plates.items()}
            message = str(error)
            for symbol, name in names.items():
                message = message.replace(f"[{symbol}]", f"['{name}']")
            raise ModelError(f"The program cannot be enumerated: {message}") from error
        return [(t, term) for t, terms in result.items() for term in terms]

    def log_likelihood(
        self,
        tensors: Mapping[str, Tensor],
        *,
        backend: str = "logsum",
        weights: Tensor | None = None,
        unit: tuple[str, ...] = (),
    ) -> Tensor:
        """``log p(observations)``: the contraction, multiplied out over all plates."""
        ring = self._ring(backend, weights, unit)
        terms = self.contract(tensors, backend=backend, weights=weights, unit=unit)
        total = sum(ring.product(term, ordinal) for ordinal, term in terms)
        return torch.as_tensor(total * self.scale)

    def row_log_likelihood(
        self, tensors: Mapping[str, Tensor], unit: tuple[str, ...]
    ) -> tuple[Tensor, bool]:
        """The log-likelihood of each element of the plates ``unit``; whether they are independent.

        They are not where an assignment outside these plates ties them together. Observations
        outside (of a parameter) that no assignment touches are left out.
        """
        symbols = "".join(self.plates[name] for name in unit)
        total, states = torch.zeros([1] * len(symbols)), set(self.states.values())
        outside = (f for f in self.factors.values() if not f.ordinal >= set(symbols))
        complete = not any(states & set(f.dims) for f in outside)
        for ordinal, term in self.contract(tensors):
            if ordinal >= set(symbols):
                rest = [i for i, d in enumerate(_dims(term)) if d not in symbols]
                dims = "".join(d for d in _dims(term) if d in symbols)
                row = term.sum(rest) if rest else term[...]
                total = total + align(row, dims, symbols)
        return total * self.scale, complete

    def unpack(self, name: str, packed_tensor: Tensor) -> Tensor:
        """A packed tensor of a site in Pyro's layout: enumeration dims left of the plates."""
        tensor = _pack(packed_tensor[...], self.factors[name].dims)
        return packed.unpack(tensor, self.trace.symbol_to_dim)

    def _ring(self, backend: str, weights: Tensor | None, unit: tuple[str, ...]) -> _WeightedRing:
        return _WeightedRing(backend, weights, "".join(self.plates[name] for name in unit))


def site_log_prob(site: Site, *, masked: bool = True) -> Tensor:
    """The site's unscaled log-probability, under the mask of its handlers if ``masked``."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    if masked and site["mask"] is not None:
        return scale_and_mask(value, mask=site["mask"])
    return value


def enumerated(
    program: Program,
    values: Values,
    nesting: int,
    factor_sites: frozenset[str],
    reader: Reader | None = None,
) -> Enumerated:
    """Trace ``program`` with its assignments enumerated, and collect the factors.

    ``reader`` goes through its loops, instead of the program's own way.
    """
    trace, _ = program.run_and_see(values, nesting=nesting, reader=reader)
    trace.symbolize_dims()
    factors: dict[str, Factor] = {}
    states: dict[str, str] = {}
    scales: list[tuple[str, Any]] = []
    for name, site in trace.nodes.items():
        if name not in factor_sites:
            continue
        enumerates = site["infer"].get("_enumerate_dim") is not None
        if enumerates:
            states[name] = site["infer"]["_enumerate_symbol"]
        # As in TraceEnum_ELBO, a mask does not touch an enumerated site: it must sum to one.
        try:
            log_prob = site_log_prob(site, masked=not enumerates)
            tensor = packed.pack(log_prob[...], site["infer"]["_dim_to_symbol"])
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"Site '{name}': its log-probability fails: {error}") from error
        except AssertionError as error:
            raise ModelError(
                f"Site '{name}': its log-probability fails. Does a step look further back than its"
                " loop says? For two steps: pyro.markov(range(T), history=2)."
            ) from error
        ordinal = frozenset(
            trace.plate_to_symbol[f.name] for f in plate_frames(site) if f.vectorized
        )
        factors[name] = Factor(tensor, _dims(tensor), ordinal)
        scales.append((name, site["scale"]))
    return Enumerated(trace, factors, states, dict(trace.plate_to_symbol), _common_scale(scales))


def _common_scale(scales: list[tuple[str, Any]]) -> float | Tensor:
    if not scales:
        return 1.0
    first, scale = scales[0]
    for name, other in scales:
        if isinstance(other, Tensor) and other.dim():
            raise ModelError(
                f"Site '{name}': poutine.scale must be one number for all sites, got a tensor of"
                f" shape {tuple(other.shape)}. Give row weights to fit(weights=...) instead."
            )
        if float(other) != float(scale):
            raise ModelError(
                f"Sites '{first}' and '{name}' have different poutine.scale values"
                f" ({float(scale):g} and {float(other):g}); summing assignments out needs one."
            )
    return scale
