"""What a program is made of: parameters, assignments, observations and their plates."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to

from pyroem._pyro import (
    Enumerated,
    Incomplete,
    Program,
    Site,
    Values,
    enumerated,
    site_log_prob,
    unwrap,
)
from pyroem.constraints import structure_of
from pyroem.errors import SettingError

Params = dict[str, Tensor]


# The dimensions of spaces of matrices, whose Jacobian would have a column for each element.
_DIMENSIONS: tuple[tuple[Any, Callable[[int], int]], ...] = (
    (constraints.simplex, lambda n: n - 1),
    (constraints.positive_definite, lambda n: n * (n + 1) // 2),
    (constraints.lower_cholesky, lambda n: n * (n + 1) // 2),
    (constraints.softplus_lower_cholesky, lambda n: n * (n + 1) // 2),
    (constraints.corr_cholesky, lambda n: n * (n - 1) // 2),
)


def elementary(constraint: Any) -> Any:
    """A constraint without what made batch dims part of its event."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


@dataclass(frozen=True)
class Parameter:
    """A continuous unknown of the program.

    ``value`` is what the program itself gives (a ``pyro.param``'s initial value, a draw from a
    prior); ``random`` says that it differs from run to run. The elements where ``held`` is true
    stay at ``value``.
    """

    name: str
    shape: tuple[int, ...]
    constraint: Any
    value: Tensor
    has_prior: bool
    random: bool
    held: Tensor | None = None

    def unconstrain(self, value: Tensor) -> Tensor:
        """The unconstrained coordinates of ``value``, finite also at the boundary."""
        raw: Tensor = transform_to(self.constraint).inv(value)
        limit = 690.0 if raw.dtype == torch.float64 else 80.0  # exp(-690) is still a number
        return torch.nan_to_num(raw, nan=0.0, posinf=limit, neginf=-limit)

    @property
    def df(self) -> int:
        """The dimension of the parameter's space: the rank of ``constrain``, block by block."""
        constraint = self.kind
        events = constraint.event_dim
        shared = structure_of(constraint)
        if shared is not None:
            batch = self.shape[: len(self.shape) - events]
            return shared.dimension(self.shape) * int(torch.Size(batch).numel())
        if self.held is not None and self.held.any():
            free = ~self.held
            if events == 0:
                return int(free.sum())
            blocks = free.reshape((-1, *self.shape[len(self.shape) - events :])).flatten(1)
            if constraint is constraints.simplex:
                return int((blocks.sum(1) - 1).clamp(min=0).sum())
            return replace(self, held=None).df * int(blocks.any(1).sum()) // len(blocks)
        blocks = self.value.reshape((-1, *self.shape[len(self.shape) - events :]))
        if events == 0 or not len(blocks):
            return self.value.numel()
        size = self.shape[-1]
        for kind, dimension in _DIMENSIONS:
            if constraint is kind or type(constraint) is type(kind):
                return dimension(size) * len(blocks)
        transform = transform_to(constraint)
        raw = transform.inv(blocks[0])
        generator = torch.Generator().manual_seed(0)
        raw = torch.rand(raw.shape, generator=generator, dtype=torch.float64).to(raw)
        jacobian = torch.autograd.functional.jacobian(transform, raw)
        rank = torch.linalg.matrix_rank(jacobian.reshape(blocks[0].numel(), raw.numel()))
        return int(rank) * len(blocks)

    @property
    def kind(self) -> Any:
        """The constraint of one block: what ``to_event`` made one event, apart again."""
        return elementary(self.constraint)

    def constrain(self, raw: Tensor) -> Tensor:
        """The value at unconstrained coordinates, by Pyro's own ``transform_to``."""
        value: Tensor = transform_to(self.constraint)(raw)
        return value if self.held is None else self.keep(value)

    def keep(self, value: Tensor) -> Tensor:
        """``value`` with the elements that are held; the rest of a simplex sums to what is left."""
        if self.held is None:
            return value
        if self.kind is constraints.simplex:
            free = torch.where(self.held, 0.0, value)
            left = 1 - torch.where(self.held, self.value, 0.0).sum(-1, keepdim=True)
            value = free * (left / free.sum(-1, keepdim=True).clamp(min=1e-300))
        return torch.where(self.held, self.value, value)


@dataclass(frozen=True)
class Held:
    """Elements of a parameter that stay at their start: those where ``mask`` is true.

    The start is ``value``, or the program's own.
    """

    name: str
    mask: Any
    value: Any = None


Fixed = Sequence["str | Held"]


def hold(structure: Structure, fixed: Fixed) -> tuple[Structure, frozenset[str]]:
    """The structure with some elements held, and the parameters that are fixed altogether."""
    names = [part.name if isinstance(part, Held) else part for part in fixed]
    check_names(names, structure.parameters, "fixed")
    whole = {part for part in fixed if isinstance(part, str)}
    parameters = dict(structure.parameters)
    for part in fixed:
        if not isinstance(part, Held):
            continue
        parameter = parameters[part.name]
        mask = torch.as_tensor(part.mask)
        if mask.dtype != torch.bool or tuple(mask.shape) not in ((), parameter.shape):
            raise SettingError(
                f"fixed: for parameter '{part.name}' expected True, or a mask of booleans of shape"
                f" {parameter.shape}, got {mask.dtype} of shape {tuple(mask.shape)}."
            )
        if mask.all():
            whole.add(part.name)
        elif mask.any():
            parameters[part.name] = _held(structure, parameter, mask, part.value)
    return replace(structure, parameters=parameters), frozenset(whole)


def _held(structure: Structure, parameter: Parameter, mask: Tensor, given: Any) -> Parameter:
    value = parameter.value
    if given is not None:
        value = torch.where(mask, structure.value(parameter.name, given).detach(), value)
    elif parameter.random:
        raise SettingError(
            f"fixed: parameter '{parameter.name}' has no values to be held at (the program draws"
            f" them at random). Give them: init={{'{parameter.name}': ...}}."
        )
    events = parameter.kind.event_dim
    blocks = mask.reshape((-1, *parameter.shape[len(parameter.shape) - events :], 1)).flatten(1)
    parts = bool((blocks.any(1) & ~blocks.all(1)).any())
    if events and parts and parameter.kind is not constraints.simplex:
        raise SettingError(
            f"fixed: parameter '{parameter.name}' consists of blocks under {parameter.kind}, which"
            " can be held as a whole only. Build the block from parts in the program."
        )
    held = replace(parameter, held=mask, value=value)
    return replace(held, value=held.keep(value))


@dataclass(frozen=True)
class Chain:
    """An assignment that depends on its value at the step before: a hidden Markov chain.

    Its first step is the site ``first``; all others together are the site ``step``, in the plate
    ``steps``. ``opening`` and ``following`` are the sites that hang on the chain in the first step
    and in the others (the chain's own among them), ``inner`` the other assignments, by pairs, and
    ``plates`` those of its sequences. If it is not ``linked``, no step depends on the one before.
    """

    name: str
    first: str
    step: str
    num_states: int
    length: int
    steps: str
    plates: tuple[str, ...]
    opening: tuple[str, ...]
    following: tuple[str, ...]
    inner: tuple[tuple[str, str], ...] = ()
    linked: bool = True


@dataclass(frozen=True)
class Structure:
    """What was read from a program with its data.

    ``assignments`` maps each assignment to its number of states, ``imputed`` the unknown part
    (``z_unobserved``) of those that are partly known; ``plates`` gives each factor
    site's vectorised plates; ``unit`` names the plates whose elements (rows) are independent
    given the parameters, with sizes ``unit_shape``; ``chains`` are loops over time that were read
    as one step, ``no_chain`` why others were not.
    """

    program: Program
    nesting: int
    parameters: dict[str, Parameter]
    assignments: dict[str, int]
    imputed: dict[str, int]
    observations: tuple[str, ...]
    factor_sites: frozenset[str]
    plates: dict[str, tuple[str, ...]]
    unit: tuple[str, ...]
    unit_shape: tuple[int, ...]
    chains: tuple[Chain, ...] = ()
    no_chain: str = ""

    @property
    def chained(self) -> frozenset[str]:
        """The sites that hang on a chain."""
        return frozenset(n for c in self.chains for n in (*c.opening, *c.following))

    @property
    def row_plates(self) -> frozenset[str]:
        """The plates whose elements are rows of data: those of ``unit``, and the chains' own."""
        return frozenset(self.unit).union(*((c.steps, *c.plates) for c in self.chains))

    @property
    def num_rows(self) -> int:
        """The number of independent rows; observation sites where no plate makes rows."""
        if not self.unit_shape:
            steps = {chain.steps: chain.length - 1 for chain in self.chains}
            own = [[steps[p] for p in self.plates[n] if p in steps] for n in self.observations]
            return max(1, sum(counts[0] if counts else 1 for counts in own))
        return int(torch.Size(self.unit_shape).numel())

    def values(self, params: Mapping[str, Any]) -> Params:
        """``params`` checked against the program's parameters, cast to the fit's dtype."""
        check_names(params, self.parameters, "params")
        missing = [name for name in self.parameters if name not in params]
        if missing:
            raise SettingError(f"params lacks a value for {quoted(missing)}.")
        return {name: self.value(name, params[name]) for name in self.parameters}

    def value(self, name: str, value: Any) -> Tensor:
        """One parameter's ``value``, checked for its shape and cast."""
        parameter = self.parameters[name]
        try:
            own = value.dtype if isinstance(value, Tensor) else self.program.dtype
            tensor = torch.as_tensor(value, dtype=own)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingError(
                f"Parameter '{name}': expected a tensor of shape {parameter.shape}, got {value!r}."
            ) from error
        if tuple(tensor.shape) != parameter.shape:
            raise SettingError(
                f"Parameter '{name}': expected shape {parameter.shape}, got {tuple(tensor.shape)}."
            )
        return tensor.to(self.program.dtype)

    def enumerate(self, params: Values) -> Enumerated:
        """One enumerated trace of the program at ``params``."""
        return enumerated(self.program, params, self.nesting, self.factor_sites)

    def log_prior(self, trace: Enumerated) -> Tensor:
        """The sum of the parameters' log prior densities (constrained space, no Jacobian)."""
        total = torch.zeros((), dtype=self.program.dtype)
        for name, parameter in self.parameters.items():
            if parameter.has_prior and name not in self.factor_sites:
                site = trace.trace.nodes[name]
                total = total + (site_log_prob(site) * site["scale"]).sum()
        return total


def whole_of(name: str) -> str:
    """``z`` of ``z_unobserved`` (or ``z_observed``), the parts that ``obs_mask`` makes of ``z``."""
    return name.removesuffix("_unobserved").removesuffix("_observed")


def known_part(name: str) -> str:
    """``z_observed`` of ``z_unobserved``."""
    return whole_of(name) + "_observed"


def to_search(
    parameters: Mapping[str, Parameter], params: Mapping[str, Tensor], steps: Mapping[str, Tensor]
) -> Params:
    """Leaves of a search: ``params`` in the unconstrained space, measured in ``steps``."""
    return {
        n: (parameters[n].unconstrain(v) / steps[n]).detach().clone().requires_grad_()
        for n, v in params.items()
    }


def from_search(
    parameters: Mapping[str, Parameter], raw: Mapping[str, Tensor], steps: Mapping[str, Tensor]
) -> Params:
    """The values at a search's leaves."""
    return {n: parameters[n].constrain(r * steps[n]) for n, r in raw.items()}


def quoted(names: Iterable[str]) -> str:
    """Names for an error message."""
    return ", ".join(f"'{name}'" for name in names)


def check_names(given: Iterable[str], known: Iterable[str], argument: str) -> None:
    """Raise where ``given`` has a name that is not ``known``, with the nearest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise SettingError(
                f"{argument}: the program has no parameter '{name}'; it has {quoted(known)}.{hint}"
            )


def base_mask(site: Site) -> Tensor | None:
    """All masks over a site, as one tensor over the batch dims of its bare distribution."""
    _, events, masks = unwrap(site["fn"])
    total: Tensor | None = None
    for mask, outside in (*masks, (site["mask"], 0)):
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask).bool()
        mask = mask.reshape(mask.shape + (1,) * (events - outside))
        total = mask if total is None else total & mask
    return total


def seen_cells(site: Site) -> Tensor | None:
    """Which cells of an observation are seen, over its batch and event dims; None where all are.

    A cell that is masked is not seen.
    """
    base, mask = unwrap(site["fn"])[0], base_mask(site)
    if mask is not None:
        mask = mask.reshape(mask.shape + (1,) * len(base.event_shape))
    if isinstance(base, Incomplete):
        mask = base.seen if mask is None else base.seen & mask
    return mask
