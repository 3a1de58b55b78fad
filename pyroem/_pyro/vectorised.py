"""A program whose loops run once for all steps, as a trace in which the steps are a plate.

The program runs under ``torch.vmap`` over the steps, which hides their dim from it. Afterwards the
tensors that differ by step get that dim, to the left of the program's own plates, and the sites of
the loops a plate. What does not differ by step stays as small as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import pyro
import torch
from pyro.distributions.distribution import Distribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions.constraints import is_dependent

from pyroem._pyro.incomplete import Incomplete
from pyroem._pyro.markov import LoopError, Vectorised

COUNTED = "_pyroem_counted"  # whether the program computed with the number of the step
_EITHER = (
    ("probs", "logits"),
    ("gate", "gate_logits"),
    ("covariance_matrix", "precision_matrix", "scale_tril"),
)


@dataclass(frozen=True)
class Loops:
    """The loops of a program: their lengths, the dim of the steps, which of the steps are run.

    ``steps`` are two at least: one alone would not show what differs by step. Those beyond the end
    of a loop are cut off.
    """

    lengths: tuple[int, ...]
    dim: int
    steps: Tensor

    def plate(self, number: int) -> CondIndepStackFrame:
        """The steps of a loop (without the first) as a plate; of a loop of one step that one."""
        name = "markov_steps" if len(self.lengths) == 1 else f"markov_steps_{number}"
        size = max(1, int((self.steps < self.lengths[number]).sum()))
        return CondIndepStackFrame(name, self.dim, size, 0, size)


@dataclass(frozen=True)
class _Apart:
    """A distribution as tensors, each with the number of dims that stand right of the plates."""

    leaves: list[tuple[Tensor, int]]
    again: Callable[[list[Tensor]], Any]


def vectorised_trace(
    run: Callable[[Vectorised, Mapping[str, Tensor]], Trace],
    loops: Loops,
    paths: Mapping[str, Tensor] | None = None,
) -> Trace:
    """The trace of a program with its loops' steps as plates.

    ``run`` runs the program with a reader at given assignments; those of ``paths`` differ by step
    (their first dim).
    """
    found: dict[str, Any] = {}

    def body(step: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        reader = Vectorised(step)
        trace = run(reader, given)
        found["counted"] = reader.counted
        found["trace"], found["sites"] = trace, {}
        leaves: list[Tensor] = []
        for name in [n for n, site in trace.nodes.items() if _is_deterministic(site)]:
            trace.nodes.pop(name)  # nothing of a fit hangs on it
        for name, site in trace.nodes.items():
            apart = _apart_site(name, site)
            found["sites"][name] = (len(leaves), apart)
            leaves += [t for t, _ in apart.leaves]
        return tuple(leaves)

    given = dict(paths or {})
    made = torch.vmap(body, randomness="same")(loops.steps, given)
    trace = Trace()
    setattr(trace, COUNTED, found["counted"])
    for name, site in found["trace"].nodes.items():
        start, apart = found["sites"][name]
        at = site.get("infer", {}).get("_pyroem_step")
        inside = at is not None and at[1] == 1
        plate = loops.plate(at[0]) if inside else None
        leaves = []
        for (logical, right), tensor in zip(
            apart.leaves, made[start : start + len(apart.leaves)], strict=True
        ):
            if tensor.stride(0) == 0:  # vmap expands what is the same at all steps
                leaves.append(logical)
                continue
            if at is not None and at[1] == 0 and paths:  # the path's first step comes first
                leaves.append(tensor[0])
                continue
            if not inside:
                raise LoopError(f"site '{name}', outside the loop, depends on the step")
            assert plate is not None
            leaves.append(_placed(tensor[: plate.size], right, -1 - loops.dim, name))
        node = apart.again(leaves)
        if plate is not None:
            node["cond_indep_stack"] = (plate, *site["cond_indep_stack"])
            if node["is_observed"]:
                node = _expanded(node, plate)
        trace.add_node(name, **node)
    return trace


def _is_deterministic(site: Any) -> bool:
    return site["type"] == "sample" and bool(site["infer"].get("_deterministic"))


def _placed(tensor: Tensor, right: int, plates: int, name: str) -> Tensor:
    """Bring the steps from the first dim to their place, left of the plates."""
    width, rank = plates + right, tensor.dim() - 1
    if rank <= width:
        return tensor.reshape((len(tensor), *(1,) * (width - rank), *tensor.shape[1:]))
    at = rank - width - 1
    if tensor.shape[1 + at] != 1:
        raise LoopError(f"site '{name}' has more dims than its plates and its event")
    return tensor.squeeze(1 + at).movedim(0, at)


def _expanded(node: dict[str, Any], plate: CondIndepStackFrame) -> dict[str, Any]:
    """An observation's distribution over all steps, as a plate would have it."""
    fn = node["fn"]
    shape = [plate.size] + [1] * (-1 - (plate.dim or -1))
    batch = torch.broadcast_shapes(fn.batch_shape, shape)
    return {**node, "fn": fn.expand(torch.Size(batch))} if batch != fn.batch_shape else node


def _apart_site(name: str, site: Any) -> _Apart:
    if site["type"] != "sample":
        value = site.get("value")
        if not isinstance(value, Tensor):
            return _Apart([], lambda given: dict(site))
        return _Apart([(value, value.dim())], lambda given: {**site, "value": given[0]})
    fn = site["fn"]
    apart = _apart(fn, 0, name) if isinstance(fn, Distribution) else _opaque(fn, name)
    leaves, own = list(apart.leaves), len(apart.leaves)
    value, mask, scale = site["value"], site["mask"], site["scale"]
    is_unit = isinstance(fn, pyro.distributions.Unit)
    if not is_unit:
        leaves.append((value, len(getattr(fn, "event_shape", ()))))
    if isinstance(mask, Tensor):
        leaves.append((mask, 0))
    if isinstance(scale, Tensor):
        leaves.append((scale, scale.dim()))

    def again(given: list[Tensor]) -> dict[str, Any]:
        rest = iter(given[own:])
        node = {**site, "infer": dict(site["infer"])}
        if any(a is not b for a, (b, _) in zip(given, apart.leaves, strict=False)):
            node["fn"] = apart.again(given[:own])
        if is_unit:
            node["value"] = node["fn"].log_factor.new_empty((*node["fn"].batch_shape, 0))
        else:
            node["value"] = next(rest)
        if isinstance(mask, Tensor):
            node["mask"] = next(rest)
        if isinstance(scale, Tensor):
            node["scale"] = next(rest)
        return node

    return _Apart(leaves, again)


def _apart(fn: Any, outer: int, name: str) -> _Apart:
    """A distribution as tensors; ``outer`` dims right of the plates are declared outside it."""
    kind: Any = type(fn)
    if isinstance(fn, pyro.distributions.MaskedDistribution):
        inner = _apart(fn.base_dist, outer, name)
        if not isinstance(fn._mask, Tensor):
            return _Apart(inner.leaves, lambda given: inner.again(given).mask(fn._mask))
        return _Apart(
            [*inner.leaves, (fn._mask, outer)],
            lambda given: inner.again(given[:-1]).mask(given[-1]),
        )
    if isinstance(fn, torch.distributions.Independent):
        count = fn.reinterpreted_batch_ndims
        inner = _apart(fn.base_dist, outer + count, name)
        return _Apart(inner.leaves, lambda given: inner.again(given).to_event(count))
    if isinstance(fn, pyro.distributions.ExpandedDistribution):
        inner = _apart(fn.base_dist, outer, name)

        def expanded(given: list[Tensor]) -> Any:
            base = inner.again(given)
            return base.expand(torch.broadcast_shapes(base.batch_shape, fn.batch_shape))

        return _Apart(inner.leaves, expanded)
    if isinstance(fn, Incomplete):
        inner = _apart(fn.base_dist, outer, name)
        return _Apart(
            [*inner.leaves, (fn.seen, outer + 1)],
            lambda given: Incomplete(inner.again(given[:-1]), given[-1]),
        )
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        first = _apart(fn.mixture_distribution, outer, name)
        second, count = _apart(fn.component_distribution, outer + 1, name), len(first.leaves)
        return _Apart(
            [*first.leaves, *second.leaves],
            lambda given: kind(first.again(given[:count]), second.again(given[count:])),
        )
    arguments = _arguments(fn)
    if arguments is not None:
        supports = fn.arg_constraints
        tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
        leaves = [(v, outer + int(supports[n].event_dim)) for n, v in tensors.items()]
        return _Apart(
            leaves, lambda given: kind(**{**arguments, **dict(zip(tensors, given, strict=True))})
        )
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return _apart_transformed(fn, outer, name)
    return _opaque(fn, name)


def _opaque(fn: Any, name: str) -> _Apart:
    """A distribution that cannot be built again: it must not differ by step."""

    def again(given: list[Tensor]) -> Any:
        raise LoopError(
            f"the distribution {type(fn).__name__} at site '{name}' differs by step, and cannot be"
            " built again from its arguments"
        )

    leaves, todo = [], [fn]
    while todo:
        x = todo.pop()
        if isinstance(x, Tensor):
            leaves.append((x, x.dim()))
        elif isinstance(x, (list, tuple)):
            todo += x
        elif isinstance(x, torch.distributions.Distribution | torch.distributions.Transform):
            todo += vars(x).values()
    return _Apart(leaves, again)


def arranged(
    fn: Any, arrange: Callable[[Tensor, int], Tensor], name: str, masks: bool = True
) -> Any:
    """The distribution, every tensor laid out anew: ``arrange(tensor, dims right of batch)``."""
    apart = _apart(fn if masks else _unmasked(fn), 0, name)
    return apart.again([arrange(tensor, right) for tensor, right in apart.leaves])


def _unmasked(fn: Any) -> Any:
    """The distribution without masks."""
    if isinstance(fn, pyro.distributions.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent):
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, pyro.distributions.ExpandedDistribution):
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    return fn


def _apart_transformed(fn: Any, outer: int, name: str) -> _Apart:
    """A base distribution and transforms, whose tensors have the dims of the values."""
    inner = _apart(fn.base_dist, outer, name)
    right = outer + len(fn.event_shape)
    steps = [step for transform in fn.transforms for step in _steps(transform)]
    if any(_nested(step) for step in steps):
        return _opaque(fn, name)
    places = [
        (i, key, value)
        for i, step in enumerate(steps)
        for key, value in vars(step).items()
        if isinstance(value, Tensor)
    ]

    def again(given: list[Tensor]) -> Any:
        own = [copy.copy(step) for step in steps]
        for i, _, _ in places:
            own[i]._inv = None  # the copy's would undo the original
        for (i, key, _), value in zip(places, given[len(inner.leaves) :], strict=True):
            setattr(own[i], key, value)
        return type(fn)(inner.again(given[: len(inner.leaves)]), own)

    return _Apart([*inner.leaves, *((v, right) for _, _, v in places)], again)


def _steps(transform: Any) -> list[Any]:
    """A transform, or those that it is composed of."""
    if isinstance(transform, torch.distributions.ComposeTransform):
        return [step for part in transform.parts for step in _steps(part)]
    return [transform]


def _nested(transform: Any) -> bool:
    """Whether a transform holds another one, and with it tensors out of reach."""
    kinds = (torch.distributions.Transform, torch.nn.Module, list, tuple)
    inverse = isinstance(transform, torch.distributions.transforms._InverseTransform)
    if inverse and any(isinstance(v, Tensor) for v in vars(transform.inv).values()):
        return True
    return any(isinstance(v, kinds) for key, v in vars(transform).items() if key != "_inv")


def _arguments(fn: Distribution) -> dict[str, Any] | None:
    """What the distribution's class has to be given to build it again; None if that is unknown."""
    kind: Any = type(fn)
    supports = getattr(kind, "arg_constraints", None)
    if not isinstance(supports, Mapping) or not supports:
        return None
    accepted = inspect.signature(kind).parameters
    names = [n for n in accepted if n in supports]
    held = vars(getattr(fn, "_categorical", fn))
    for group in _EITHER:
        present = [n for n in group if n in names]
        if len(present) > 1:
            given = [n for n in held if n in present] or present
            names = [n for n in names if n not in present or n == given[0]]
    values = {n: getattr(fn, n, None) for n in names}
    values = {n: v for n, v in values.items() if v is not None}
    if not values or not all(isinstance(v, (Tensor, Number)) for v in values.values()):
        return None
    for name, parameter in accepted.items():  # a number of trials, say
        if name in supports or name == "validate_args":
            continue
        if isinstance(getattr(fn, name, None), Number):
            values[name] = getattr(fn, name)
        elif parameter.default is inspect.Parameter.empty:
            return None
    tensors = [n for n, v in values.items() if isinstance(v, Tensor)]
    if any(is_dependent(supports[n]) for n in tensors):
        return None
    return values


__all__ = ["COUNTED", "Loops", "arranged", "vectorised_trace"]
