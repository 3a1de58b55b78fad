"""What the M-step knows of a distribution, and the registry that users extend.

A family is what the M-step knows about a distribution: with natural parameters ``eta(args)``,
statistics ``T(x)`` and log-normaliser ``A(args)``,

    log p(x | args) = <eta(args), T(x)> - A(args) + h(x),

so the expected log-density of weighted data is ``<eta, sum_n w_n T(x_n)> - (sum_n w_n) A``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroem.errors import SettingError
from pyroem.families.forms import Coefficients, Form

Arguments = dict[str, Tensor]
Statistics = tuple[Tensor, ...]


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Coordinate:
    """One way in which a program may write an argument, with the kernel it has there.

    Attributes:
    ----------
    name, argument
        The coordinate's own name and the canonical argument it is a function of.
    form
        The kernel of the expected log-density in this coordinate.
    coefficients
        ``(statistics, weight, arguments) -> coefficients`` of that kernel.
    forward, inverse
        Argument to coordinate and back.
    canonical
        The normalisation that the distribution applies to what it is given (``p / sum(p)``).
    clip
        ``(value, variance floor) -> value``: keeps a variance above its floor.
    profile
        The coordinate to use instead where the family's other argument is free and has a block for
        each of this one's at least: with that argument at its own maximiser, which comes next.
    """

    name: str
    argument: str
    form: Form
    coefficients: Callable[[Statistics, Tensor, Arguments], Coefficients]
    forward: Callable[[Tensor], Tensor] = _identity
    inverse: Callable[[Tensor], Tensor] = _identity
    canonical: Callable[[Tensor], Tensor] = _identity
    clip: Callable[[Tensor, Tensor], Tensor] | None = None
    profile: Coordinate | None = None


@dataclass(frozen=True)
class Partial:
    """How rows that show a part of their elements only are summed up, pattern by pattern.

    Attributes:
    ----------
    seen
        ``distribution -> (..., D)``: which elements each row shows.
    natural
        ``(arguments of states, patterns [P, D]) -> (eta, A)`` of what is seen, over states by
        patterns; ``eta`` is zero for statistics of what is not.
    complete
        ``(arguments, patterns, eta, statistics, weight) -> statistics`` of complete rows, summed
        over the patterns; expected ones at these arguments.
    """

    seen: Callable[[Any], Tensor]
    natural: Callable[[Arguments, Tensor], tuple[Statistics, Tensor]]
    complete: Callable[[Arguments, Tensor, Statistics, Statistics, Tensor], Statistics]


@dataclass(frozen=True)
class Family:
    """An exponential family.

    Attributes:
    ----------
    arguments
        ``distribution -> {name: tensor}``: canonical arguments, broadcast over the batch shape.
    statistics
        ``(distribution, x) -> T(x)``: a tuple of tensors over the batch shape, each with its own
        event dims.
    log_density
        ``(arguments, statistics, weight) -> <eta, statistics> - weight A``, over the batch shape.
    event_dims
        The number of event dims of each statistic.
    argument_dims
        The number of event dims of each argument (0 where not named).
    coordinates
        The coordinates that have a closed form; none is fine: the parameters are then found
        numerically on the statistics.
    location
        The argument that shifts with the data (``loc``), so that statistics are taken around the
        data's mean and lose no digits.
    leading
        The argument whose optimum does not depend on the others (the location, unless told): it is
        updated first.
    variance
        ``arguments -> variances`` of the event's elements, for the detection of collapse.
    natural
        ``arguments -> (eta, A)``: the natural parameters, shaped like the statistics, and the
        log-normaliser. Without it they are found by differentiating ``log_density``.
    base_measure
        ``(distribution, x) -> h(x)``. Without it, it is found by comparison with ``log_prob``.
    transform
        ``(distribution, x) -> y``, where all of the above are functions of ``y`` and not of ``x``.
    latent
        ``(distribution, arguments, x) -> statistics``: expected ones, where the distribution has
        a latent variable of its own; ``arguments`` are the current ones, counted from the centre
        of the data as ``x`` is. ``log_density`` is then that of ``x`` and the latent variable.
    given
        ``(distribution, x) -> statistics``, which must not depend on parameters, of a family with
        a latent variable.
    by_row
        There are no statistics but ``x`` of every row; ``log_density`` gets ``weight`` times it.
    partial
        Of a family with a latent variable, that is what of a row is missing: see :class:`Partial`.
    packed
        ``(distribution, x, empty) -> statistics`` with a symmetric matrix as the elements of its
        lower triangle, row by row: half the work. ``empty(shape)`` gives memory for a result.
    """

    arguments: Callable[[Any], Arguments]
    statistics: Callable[[Any, Tensor], Statistics]
    log_density: Callable[[Arguments, Statistics, Tensor], Tensor]
    event_dims: tuple[int, ...] = (0,)
    argument_dims: dict[str, int] | None = None
    coordinates: tuple[Coordinate, ...] = ()
    location: str | None = None
    leading: str | None = None
    variance: Callable[[Arguments], Tensor] | None = None
    natural: Callable[[Arguments], tuple[Statistics, Tensor]] | None = None
    base_measure: Callable[[Any, Tensor], Tensor] | None = None
    transform: Callable[[Any, Tensor], Tensor] | None = None
    latent: Callable[[Any, Arguments, Tensor], Statistics] | None = None
    given: Callable[[Any, Tensor], Statistics] | None = None
    by_row: bool = False
    partial: Partial | None = None
    packed: Callable[[Any, Tensor, Callable[[Sequence[int]], Tensor]], Statistics] | None = None

    def dims(self, argument: str) -> int:
        """The number of event dims of ``argument``."""
        return (self.argument_dims or {}).get(argument, 0)


def natural_parameters(
    family: Family, arguments: Arguments, example: Statistics
) -> tuple[Statistics, Tensor]:
    """``(eta, A)`` of a family, over the batch shape that ``example`` has.

    ``log_density`` is linear in the statistics and the weight: its derivative by them is
    ``(eta, -A)``, wherever it is taken. ``example`` (the statistics of some data) is a safe place.
    """
    if family.natural is not None:
        return family.natural(arguments)
    with torch.enable_grad():
        leaves = [t.detach().clone().requires_grad_() for t in example]
        batch = leaves[0].shape[: leaves[0].dim() - family.event_dims[0]]
        weight = torch.ones(batch).to(leaves[0]).requires_grad_()
        fixed = {name: value.detach() for name, value in arguments.items()}
        density = family.log_density(fixed, tuple(leaves), weight)
        *eta, minus_a = torch.autograd.grad(
            density.sum(), [*leaves, weight], allow_unused=True, materialize_grads=True
        )
    return tuple(eta), -minus_a


def flat(d: Any, x: Tensor) -> Tensor:
    """The base measure of families whose ``h`` is zero."""
    return torch.zeros((), dtype=torch.float64, device=x.device)


_REGISTRY: dict[type, Family] = {}


def register_family(distribution: type, family: Family) -> None:
    """Teach the M-step a distribution class (the exact class, not its subclasses).

    The entry is held against the distribution's own ``log_prob`` when a program that uses it is
    read; a mismatch is an error that names the site.
    """
    if not (isinstance(distribution, type) and isinstance(family, Family)):
        raise SettingError(
            "register_family: expected a distribution class and a Family, got"
            f" {distribution!r} and {type(family).__name__}."
        )
    _REGISTRY[distribution] = family


def registered(kind: type) -> Family | None:
    """The family that was registered for a class."""
    return _REGISTRY.get(kind)


def exponential_family(
    arguments: tuple[str, ...],
    statistics: Callable[[Tensor], Statistics],
    natural: Callable[..., Statistics],
    log_normaliser: Callable[..., Tensor],
    coordinates: tuple[Coordinate, ...] = (),
    base_measure: Callable[[Any, Tensor], Tensor] | None = None,
) -> Family:
    """A family from its textbook definition, for scalar events.

    ``arguments`` names attributes of the distribution; ``natural`` and ``log_normaliser`` take
    them in that order::

        register_family(MyRayleigh, exponential_family(
            ("scale",), lambda x: (x**2,), lambda s: (-0.5 * s**-2,), lambda s: 2 * s.log()))

    (``MyRayleigh`` is the user's class, with an attribute ``scale`` and a ``log_prob``.)
    """

    def log_density(args: Arguments, stats: Statistics, weight: Tensor) -> Tensor:
        values = [args[name] for name in arguments]
        eta = natural(*values)
        inner = sum((e * s for e, s in zip(eta, stats, strict=True)), torch.zeros(()))
        return inner - weight * log_normaliser(*values)

    return Family(
        lambda d: {name: getattr(d, name) for name in arguments},
        lambda d, x: statistics(x),
        log_density,
        coordinates=coordinates,
        event_dims=(0,) * len(statistics(torch.ones(()))),
        base_measure=base_measure,
    )
