"""The one module that touches Pyro's internals. Written for Pyro 1.9.

It runs a program with given parameter values, enumerates its assignments with Pyro's own
``EnumMessenger``, and contracts the factors of the enumerated trace with Pyro's own
``contract_tensor_tree``.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.distribution import Distribution
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.util import get_rng_state, set_rng_state, set_rng_seed
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pyroem.errors import DataError, ModelError, PyroemError

Values = Mapping[str, Tensor]
Site = Any  # a node of a Pyro trace


@contextlib.contextmanager
def isolated(dtype: torch.dtype, seed: int | None = None) -> Iterator[None]:
    """Leave no trace: own parameter store, own random state, ``dtype`` as default, no validation."""
    rng, old_dtype = get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            if seed is not None:
                set_rng_seed(seed)
            yield
    finally:
        torch.set_default_dtype(old_dtype)
        set_rng_state(rng)


def is_plate_site(site: Site) -> bool:
    """Whether the site only draws a plate's subsample."""
    return type(site["fn"]).__name__ == "_Subsample"


def plate_frames(site: Site) -> tuple[Any, ...]:
    """The plates (vectorised and sequential) that the site stands in, innermost first."""
    return tuple(site["cond_indep_stack"])


def in_markov(site: Site) -> bool:
    """Whether the site stands in a ``pyro.markov`` context."""
    return site["infer"].get("_markov_depth", 0) > 0


def is_deterministic(site: Site) -> bool:
    """Whether the site is a ``pyro.deterministic`` statement."""
    return bool(site["infer"].get("_deterministic"))


class _Cast(TorchFunctionMode):
    """Gives every torch operation the substituted module parameters, in one floating dtype.

    A ``nn.Parameter`` is replaced by the value that the fit holds for it; any other floating
    tensor of another dtype (a float32 constant of the program, a buffer) is cast.
    """

    def __init__(self, dtype: torch.dtype, replace: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.dtype, self.replace, self.used = dtype, replace, False

    def _convert(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in self.replace:
            self.used = True
            return self.replace[id(x)]
        if x.dtype != self.dtype and x.is_floating_point():
            self.used = True
            return x.to(self.dtype)
        return x

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("__set__", "requires_grad_"):
            return func(*args, **(kwargs or {}))
        return func(*tree_map(self._convert, args), **tree_map(self._convert, kwargs or {}))


class _Substitute(Messenger):
    """Puts values in at parameters, marks assignments for enumeration, casts observations."""

    def __init__(
        self,
        values: Values,
        dtype: torch.dtype,
        enumerate_: bool,
        fill: Mapping[str, Tensor],
        observed: bool = True,
    ) -> None:
        super().__init__()
        self.values, self.dtype, self.enumerate = values, dtype, enumerate_
        self.fill, self.observed = fill, observed

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate_site(msg) or is_deterministic(msg):
            return
        name = msg["name"]
        if msg["is_observed"]:
            if not self.observed and not isinstance(msg["fn"], pyro.distributions.Unit):
                msg["is_observed"], msg["value"], msg["done"] = False, None, False
                return
            value = torch.as_tensor(self.fill.get(name, msg["value"]))
            if value.is_floating_point():
                value = value.to(self.dtype)
            msg["value"] = value
        elif name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        else:
            # Enumeration is ours to configure, whatever the program asked for.
            msg["infer"].pop("num_samples", None)
            msg["infer"]["enumerate"] = (
                "parallel" if self.enumerate and msg["fn"].has_enumerate_support else None
            )
            msg["infer"]["expand"] = False

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.is_floating_point():
            msg["value"] = value.to(self.dtype)

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].to(self.dtype)


@dataclass(frozen=True)
class Program:
    """A Pyro callable with its data: what a fit runs again and again.

    ``modules`` maps the names of module parameters to the ``nn.Parameter`` objects that the
    program's modules hold; ``fill`` holds observations whose masked NaN cells were replaced.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    modules: Mapping[str, Tensor]
    fill: Mapping[str, Tensor]
    cast: bool = True

    def run(
        self,
        values: Values,
        *,
        nesting: int | None = None,
        observed: bool = True,
    ) -> Trace:
        """Trace the program at ``values``; enumerate to the left of ``nesting`` plates if given."""
        substitute = _Substitute(values, self.dtype, nesting is not None, self.fill, observed)
        replace = {id(p): values[n] for n, p in self.modules.items() if n in values}
        with contextlib.ExitStack() as stack:
            tracer = stack.enter_context(poutine.trace())
            if nesting is not None:
                first = -1 - nesting
                stack.enter_context(EnumMessenger(first_available_dim=first))
            stack.enter_context(substitute)
            if self.cast or replace:
                stack.enter_context(_Cast(self.dtype, replace))
            try:
                self.model(*self.args, **self.kwargs)
            except PyroemError:
                raise
            except Exception as error:
                raise _explain_failure(error, nesting is not None) from error
        return tracer.trace


def _explain_failure(error: Exception, enumerated: bool) -> ModelError:
    site, frame = None, error.__traceback__
    while frame is not None:  # the innermost pyro.sample or pyro.param call that was under way
        code = frame.tb_frame.f_code
        if code.co_name in ("sample", "param") and code.co_filename.endswith("primitives.py"):
            site = frame.tb_frame.f_locals.get("name", site)
        frame = frame.tb_next
    where = f"at site '{site}'" if site else "outside its sample and param statements"
    how = "with its assignments enumerated" if enumerated else "on the data given"
    hint = ""
    if "dtype" in str(error):
        hint = " Check that integer data is not used where the program needs floating numbers."
    elif enumerated:
        hint = (
            " Enumeration adds dimensions to the left of the plates: index parameters with the"
            " assignment, avoid .item() and control flow on it, and count dims from the right."
        )
    return ModelError(
        f"The program failed {where} when it was run {how}: {type(error).__name__}: {error}.{hint}"
    )


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
    return x._pyro_dims  # type: ignore[attr-defined, no-any-return]


def _pack(x: Tensor, dims: str) -> Tensor:
    x._pyro_dims = dims  # type: ignore[attr-defined]
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
        lookup = {s: n for n, s in (*self.states.items(), *self.plates.items())}
        return tuple(lookup[d] for d in dims)

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
    ) -> tuple[Tensor, str, bool]:
        """The log-likelihood of each unit of the plates ``unit``, its dims, and whether it is all."""
        symbols = "".join(self.plates[name] for name in unit)
        total, complete = torch.zeros([1] * len(symbols)), True
        for ordinal, term in self.contract(tensors):
            if ordinal >= set(symbols):
                rest = [i for i, d in enumerate(_dims(term)) if d not in symbols]
                dims = "".join(d for d in _dims(term) if d in symbols)
                row = term.sum(rest) if rest else term[...]
                total = total + align(row, dims, symbols)
            else:
                complete = False
        return total * self.scale, symbols, complete

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
        return packed_scale_and_mask(value, mask=site["mask"])
    return value


def packed_scale_and_mask(value: Tensor, mask: Any) -> Tensor:
    """Zero where the mask is False, without a NaN from there."""
    return pyro.distributions.util.scale_and_mask(value, mask=mask)


def enumerated(
    program: Program, values: Values, nesting: int, factor_sites: frozenset[str]
) -> Enumerated:
    """Trace ``program`` with its assignments enumerated, and collect the factors."""
    trace = program.run(values, nesting=nesting)
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
        ordinal = frozenset(
            trace.plate_to_symbol[f.name] for f in plate_frames(site) if f.vectorized
        )
        factors[name] = Factor(tensor, _dims(tensor), ordinal)
        scales.append((name, site["scale"]))
    return Enumerated(
        trace, factors, states, dict(trace.plate_to_symbol), _common_scale(scales)
    )


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


def as_data(x: Any, dtype: torch.dtype) -> Any:
    """Arrays and data frames in (nested) arguments to tensors; floating tensors to ``dtype``."""

    def convert(leaf: Any) -> Any:
        if hasattr(leaf, "__array__") and not isinstance(leaf, Tensor):
            try:
                leaf = torch.as_tensor(leaf.__array__())
            except TypeError as error:
                raise DataError(
                    f"Data of type {type(leaf).__name__} cannot become a tensor: {error}"
                ) from error
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    return tree_map(convert, x)


def unwrap(fn: Distribution) -> tuple[Distribution, int, list[tuple[Tensor | bool, int]]]:
    """Peel ``Independent``, ``ExpandedDistribution`` and masks off a distribution.

    Returns the bare distribution, the number of batch dims that were declared event dims, and the
    masks met on the way, each with the number of those dims declared outside it.
    """
    events, masks = 0, []
    while True:
        if isinstance(fn, pyro.distributions.MaskedDistribution):
            masks.append((fn._mask, events))
        elif isinstance(fn, torch.distributions.Independent):
            events += fn.reinterpreted_batch_ndims
        elif not isinstance(fn, pyro.distributions.ExpandedDistribution):
            return fn, events, masks
        fn = fn.base_dist
