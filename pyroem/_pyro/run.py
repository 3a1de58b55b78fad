"""Running a program at given parameter values, with its assignments enumerated."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.distribution import Distribution
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pyroem._pyro.incomplete import Missing, hide
from pyroem._pyro.markov import Brief, Reader, current_step, reading, vectorising
from pyroem._pyro.vectorised import Loops, vectorised_trace
from pyroem.errors import DataError, ModelError, PyroemError

MANY = 1000  # rows

Values = Mapping[str, Tensor]
Site = Any  # a node of a Pyro trace


@contextlib.contextmanager
def isolated(dtype: torch.dtype, seed: int | None = None) -> Iterator[None]:
    """Leave no trace: own parameter store and random state, ``dtype`` as default, no checks."""
    rng, old_dtype = get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            pyro.get_param_store().scope(),
            pyro.validation_enabled(False),
            torch.inference_mode(False),
        ):
            if seed is not None:
                _seed(seed)
            yield
    finally:
        torch.set_default_dtype(old_dtype)
        set_rng_state(rng)


def _seed(seed: int) -> None:
    """What ``pyro.set_rng_seed`` does; torch's own function asks every kind of device, slowly."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)


def stored_constraints() -> dict[str, Any]:
    """The constraints of the parameters that modules put into Pyro's parameter store."""
    return dict(pyro.get_param_store().get_state()["constraints"])


def is_plate_site(site: Site) -> bool:
    """Whether the site only draws a plate's subsample."""
    return type(site["fn"]).__name__ == "_Subsample"


def plate_frames(site: Site) -> tuple[Any, ...]:
    """The plates (vectorised and sequential) that the site stands in, innermost first."""
    return tuple(site["cond_indep_stack"])


def in_markov(site: Site) -> bool:
    """Whether the site stands in a ``pyro.markov`` context."""
    return site["infer"].get("_markov_depth", 0) > 0


def step_of(site: Site) -> tuple[int, int] | None:
    """The loop and the step that the site was met in, where a reader went through the loops."""
    at: tuple[int, int] | None = site["infer"].get("_pyroem_step")
    return at


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
        if type(x) in (list, tuple):  # not torch.Size, which operations tell from a tuple
            return type(x)(map(self._convert, x))
        if not isinstance(x, Tensor):
            return x
        if id(x) in self.replace:
            self.used = True
            return self.replace[id(x)]
        if x.dtype != self.dtype and x.is_floating_point():
            self.used = True
            return x.to(self.dtype)
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _speaks_of_the_object(func):
            return func(*args, **(kwargs or {}))
        kwargs = {k: self._convert(v) for k, v in (kwargs or {}).items()}
        return func(*map(self._convert, args), **kwargs)


def _speaks_of_the_object(func: Any) -> bool:
    """Whether a torch function sets or asks for a property of the tensor object itself.

    ``pyro.module`` asks a parameter whether it requires a gradient: its cast would say no.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        asked = getattr(getattr(func, "__self__", None), "__name__", "")
        return asked in ("requires_grad", "is_leaf", "grad", "grad_fn")
    return name in ("__set__", "requires_grad_")


class _Enumerate(EnumMessenger):
    """Pyro's enumeration, without a look at the ``.data`` of parameters and observations.

    ``torch.func.vmap`` does not allow that.
    """

    def __init__(self, values: Values, first_available_dim: int) -> None:
        super().__init__(first_available_dim=first_available_dim)
        self.values = values

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if name in self.values and not msg["is_observed"]:
            dims = msg["infer"].setdefault("_dim_to_id", {})
            dims.update(self._param_dims.get(name, {}))
            self._value_dims[name] = {}
        elif msg["is_observed"] and isinstance(value, Tensor):
            dims = msg["infer"].setdefault("_dim_to_id", {})
            dims.update(self._param_dims.get(name, {}))
            shape = value.shape[: value.dim() - msg["fn"].event_dim]
            own = {d: i for d, i in dims.items() if len(shape) >= -d and shape[d] > 1}
            self._value_dims[name] = own
        else:
            super()._pyro_post_sample(msg)


class _Substitute(Messenger):
    """Puts values in at parameters, marks assignments for enumeration, casts observations."""

    def __init__(
        self,
        values: Values,
        dtype: torch.dtype,
        enumerate_: bool,
        fill: Mapping[str, Tensor],
        missing: Mapping[str, Missing] | None,
        observed: bool = True,
    ) -> None:
        super().__init__()
        self.values, self.dtype, self.enumerate = values, dtype, enumerate_
        self.fill, self.missing, self.observed = fill, missing, observed
        self.first: dict[str, tuple[Any, Any, Tensor | None]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        msg["infer"]["_pyroem_step"] = current_step()
        if is_plate_site(msg) or is_deterministic(msg):
            return
        name = msg["name"]
        base = unwrap(msg["fn"])[0]
        if type(base) is pyro.distributions.Poisson:
            # At rate 0 (a zero-inflated count) torch's gradient of a count of 0 is NaN: take none.
            base.rate = torch.where(base.rate > 0, base.rate, base.rate.detach())
        if msg["is_observed"]:
            if not self.observed and not isinstance(msg["fn"], pyro.distributions.Unit):
                msg["is_observed"], msg["value"], msg["done"] = False, None, False
                return
            # What is filled in has all steps; they get it when they are together again.
            fill = {} if vectorising() else self.fill
            given = torch.as_tensor(msg["value"])
            value = torch.as_tensor(fill.get(name, given))
            if value is not given and value.shape == given.shape:
                value = torch.where(given == value, given, value)  # with its derivatives
            if self.missing is None:
                if given.is_floating_point() and bool(given.isnan().any()):
                    msg["fn"] = hide(msg["fn"], ~given.isnan())
                    value = torch.where(value.isnan(), 0.0, value)
            elif name in self.missing:
                filler = self.missing[name].filler
                msg["fn"] = hide(msg["fn"], ~given.isnan())
                value = torch.where(value.isnan(), filler.to(value), value)
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
            if vectorising() and not self.enumerate and msg["fn"].has_enumerate_support:
                # There is no drawing for all steps at once.
                msg["value"] = msg["fn"].enumerate_support(expand=False)[0]
                msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not isinstance(value, Tensor):
            return
        if value.is_floating_point():
            value = value.to(self.dtype)
        drawn = not msg["is_observed"] and msg["name"] not in self.values
        if drawn and self.observed and not self.enumerate and msg["fn"].has_enumerate_support:
            value = _one_row(value, msg)
        msg["value"] = value

    def _pyro_param(self, msg: Any) -> None:
        # Values never go through the parameter store: it would keep them, and it cannot be used
        # under torch.func. A later statement of the same name repeats the first.
        name, given = msg["name"], len(msg["args"]) > 1
        if given and isinstance(msg["args"][1], torch.nn.Parameter):
            # It stays where its module has it; _Cast puts the fit's value in wherever it is used.
            self.first.setdefault(name, (msg["args"], None, msg["args"][1]))
            msg["value"], msg["done"] = msg["args"][1], True
            return
        if name in self.first:
            msg["args"], msg["kwargs"]["constraint"], value = self.first[name]
        else:
            value = None
            if name in self.values:
                value = self.values[name]
            elif given:
                initial = msg["args"][1]
                value = (initial() if callable(initial) else initial).detach().to(self.dtype)
            self.first[name] = msg["args"], msg["kwargs"].get("constraint"), value
        if value is not None:
            msg["value"], msg["done"] = value, True

    def _pyro_post_param(self, msg: Any) -> None:
        if not isinstance(msg["value"], torch.nn.Parameter):
            msg["value"] = msg["value"].to(self.dtype)


class _Trained(_Substitute):
    """As it stands, but for parameters, which are in Pyro's parameter store."""

    def _pyro_param(self, msg: Any) -> None:
        pass


def _one_row(value: Tensor, site: Site) -> Tensor:
    """An assignment as its enumeration shapes it: of size one along plates with many rows.

    To gather parameters for each of them (a covariance matrix, say) takes long, and nothing needs
    it but the mistake of a program that works for one state only; a few rows show that too.
    """
    events = len(site["fn"].event_shape)
    for frame in plate_frames(site):
        if frame.vectorized and frame.size > MANY and value.dim() >= events - frame.dim:
            value = value.narrow(frame.dim - events, 0, 1)
    return value


@dataclass(frozen=True)
class Program:
    """A Pyro callable with its data: what a fit runs again and again.

    ``modules`` maps the names of module parameters to the ``nn.Parameter`` objects that the
    program's modules hold; ``fill`` holds observations whose masked NaN cells were replaced,
    ``missing`` those of which some cells are missing (None: look at each); ``loops``, if there are
    any, are run for all their steps at once.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    modules: Mapping[str, Tensor]
    fill: Mapping[str, Tensor]
    cast: bool = True
    loops: Loops | None = None
    missing: Mapping[str, Missing] | None = field(default_factory=dict)

    def run(
        self,
        values: Values,
        *,
        nesting: int | None = None,
        observed: bool = True,
    ) -> Trace:
        """Trace the program at ``values``; enumerate to the left of ``nesting`` plates if given."""
        return self.run_and_see(values, nesting=nesting, observed=observed)[0]

    def run_and_see(
        self,
        values: Values,
        *,
        nesting: int | None = None,
        observed: bool = True,
        reader: Reader | None = None,
        paths: Mapping[str, Tensor] | None = None,
    ) -> tuple[Trace, bool]:
        """As :meth:`run`; also whether any tensor of the program had to be cast or replaced.

        ``reader`` goes through the loops, instead of the program's own way; ``paths`` are
        assignments that differ by step.
        """
        if self.loops is not None and not values:
            reader = reader or Brief(2)  # priors are drawn from: not for all steps at once
        if self.loops is None or reader is not None:
            return self._execute(values, nesting, observed, reader)
        cast = []

        def run(reader: Reader, given: Mapping[str, Tensor]) -> Trace:
            trace, used = self._execute({**values, **given}, nesting, observed, reader)
            cast.append(used)
            return trace

        trace = vectorised_trace(run, self.loops, paths)
        for name, value in self.fill.items() if observed else ():
            trace.nodes[name]["value"] = value
        return trace, cast[0]

    def trainable(self) -> Callable[..., None]:
        """The program for Pyro's own inference: assignments marked for enumeration, data cast."""

        def model(*args: Any, **kwargs: Any) -> None:
            own = _Trained({}, self.dtype, True, self.fill, self.missing)
            with contextlib.ExitStack() as stack:
                stack.enter_context(reading(None))
                stack.enter_context(own)
                if self.cast:
                    stack.enter_context(_Cast(self.dtype, {}))
                self.model(*args, **kwargs)

        return model

    def _execute(
        self, values: Values, nesting: int | None, observed: bool, reader: Reader | None
    ) -> tuple[Trace, bool]:
        enumerate_ = nesting is not None
        substitute = _Substitute(values, self.dtype, enumerate_, self.fill, self.missing, observed)
        replace = {id(p): values[n] for n, p in self.modules.items() if n in values}
        with contextlib.ExitStack() as stack:
            stack.enter_context(reading(reader))
            tracer = stack.enter_context(poutine.trace())
            if nesting is not None:
                first = -1 - nesting
                stack.enter_context(_Enumerate(values, first))
            stack.enter_context(substitute)
            cast = _Cast(self.dtype, replace)
            if self.cast or replace or reader is not None:
                stack.enter_context(cast)
            try:
                if not values:
                    # Draws from priors: torch says this of most Wishart matrices.
                    stack.enter_context(warnings.catch_warnings())
                    warnings.filterwarnings("ignore", "Singular sample")
                self.model(*self.args, **self.kwargs)
            except PyroemError:
                raise
            except Exception as error:
                raise _explain_failure(error, nesting is not None) from error
        return tracer.trace, cast.used


def _explain_failure(error: Exception, enumerated: bool) -> ModelError:
    site, frame = None, error.__traceback__
    while frame is not None:  # the innermost pyro.sample or pyro.param call that was under way
        code = frame.tb_frame.f_code
        if code.co_name in ("sample", "param") and code.co_filename.endswith("primitives.py"):
            site = frame.tb_frame.f_locals.get("name", site)
        frame = frame.tb_next
    where = f"at site '{site}'" if site else "outside its sample and param statements"
    how = "with its assignments enumerated" if enumerated else "on the data given"
    hint, text = "", str(error).rstrip(". \n")
    if "size cannot be zero" in text:
        return ModelError(f"The program failed {where}: the data has no rows (a plate of size 0).")
    if isinstance(error, torch.linalg.LinAlgError):
        hint = " A matrix became singular: is some column constant, or a sum of others?"
    elif "unexpected keyword argument" in text:
        hint = " Is it a misspelt setting of fit (init, restarts, seed, weights)?"
    elif "dtype" in text:
        hint = " Check that integer data is not used where the program needs floating numbers."
    elif "64 dims" in text or "maximum supported dimension" in text:
        hint = " A loop over time has to run over pyroem.markov(T) or pyro.markov(range(T))."
    elif "Multiple sample sites named" in text:
        hint = " Make a plate before the loop that it is used in, and name sites by the step."
    elif enumerated:
        hint = (
            " Enumeration adds dimensions to the left of the plates: index parameters with the"
            " assignment, avoid .item() and control flow on it, and count dims from the right."
        )
    return ModelError(
        f"The program failed {where} when it was run {how}: {type(error).__name__}: {text}.{hint}"
    )


def as_data(x: Any, dtype: torch.dtype) -> Any:
    """Arrays and data frames in (nested) arguments to tensors; floating tensors to ``dtype``."""

    def convert(leaf: Any) -> Any:
        if hasattr(leaf, "__array__") and not isinstance(leaf, Tensor):
            try:
                if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
                    hidden = np.ma.getmaskarray(leaf)  # what is masked is missing
                    leaf = np.where(hidden, np.nan, np.ma.getdata(leaf).astype(np.float64))
                array = np.asarray(leaf)
                leaf = torch.as_tensor(array.astype(array.dtype.newbyteorder("="), order="C"))
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"Data of type {type(leaf).__name__} cannot become a tensor: {error}"
                ) from error
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_complex():
            raise DataError(f"Data must be real numbers, got a tensor of {leaf.dtype}.")
        if leaf.is_inference():
            leaf = leaf.clone()
        leaf = leaf.cpu()  # programs are read on the CPU; only rows go to a device
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

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
