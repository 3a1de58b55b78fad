"""The objective along one element of a parameter, and over two, with all the rest held.

A curve is a cut through ``log p(data | params) + log p(params)``. It is no profile, for which the
rest is maximised anew at each point (:mod:`pyroem.profiles`), and lies below it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroem._pyro import isolated
from pyroem.constraints import structure_of
from pyroem.derivatives import check_in_memory
from pyroem.errors import SettingError
from pyroem.mstep.intervals import interval_of
from pyroem.problem import Problem
from pyroem.structure import Parameter, Params, check_names
from pyroem.text import label, plain
from pyroem.uncertainty import uncertainty

Index = tuple[int, ...]
WIDE = 4.0  # standard errors on either side
EDGE = 1e-3  # of the way to a bound: how near to it a default range comes


@dataclass(frozen=True, eq=False)
class Curve:
    """``log p(data | params) + log p(params)`` along one element, the rest held.

    Attributes:
    ----------
    name
        The element, such as ``"loc[0, 1]"``.
    values, log_joint
        Its values, and the objective at each. NaN outside the element's support.
    estimate, maximum
        The element and the objective at the parameters that the curve passes through. At a fit that
        is the maximum.
    message
        What is missing, and why; empty where all is well.
    """

    name: str
    values: Tensor
    log_joint: Tensor
    estimate: float
    maximum: float
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; those that are not finite become None."""
        return {key: plain(value) for key, value in vars(self).items()}

    def __str__(self) -> str:
        ends = f"{float(self.values.min()):.6g} to {float(self.values.max()):.6g}"
        line = f"log_joint at {len(self.values)} values of {self.name} from {ends}"
        return f"{line}, {self.maximum:.6f} at {self.estimate:.6g}" + _below(self.message)

    def __repr__(self) -> str:
        return f"<Curve of {self.name} at {len(self.values)} values>"


@dataclass(frozen=True, eq=False)
class Surface:
    """``log p(data | params) + log p(params)`` over two elements, the rest held.

    Attributes:
    ----------
    names
        The two elements.
    values
        The values of each, ``[n1]`` and ``[n2]``.
    log_joint
        The objective ``[n1, n2]``. NaN outside the supports.
    estimate, maximum
        The two elements and the objective at the parameters that the surface passes through.
    message
        What is missing, and why; empty where all is well.
    """

    names: tuple[str, str]
    values: tuple[Tensor, Tensor]
    log_joint: Tensor
    estimate: tuple[float, float]
    maximum: float
    message: str

    def project(self, params: Mapping[str, Any]) -> tuple[float, float]:
        """The two elements at ``params``: where they lie on the plane of the surface.

        The surface's height there is that of ``params`` only where the rest agrees too.
        """
        first, second = (_read(name, params) for name in self.names)
        return first, second

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; those that are not finite become None."""
        return {key: plain(value) for key, value in vars(self).items()}

    def __str__(self) -> str:
        (a, b), (m, n) = self.names, self.log_joint.shape
        at = f"{self.estimate[0]:.6g}, {self.estimate[1]:.6g}"
        return f"log_joint at {m} x {n} values of {a} and {b}, {self.maximum:.6f} at {at}" + _below(
            self.message
        )

    def __repr__(self) -> str:
        return f"<Surface of {' and '.join(self.names)}>"


def curve(
    problem: Problem, params: Params, which: str, values: Any = None, points: int = 101
) -> Curve:
    """The objective along the element ``which`` of a parameter, all others as in ``params``.

    The other elements of a simplex keep their ratios; a symmetric matrix stays symmetric. Without
    ``values``: ``points`` of them, up to four standard errors on either side (half of the element's
    size where it has none), within its support.

    Raises:
    ------
    SettingError
        Where ``which`` names no element, or ``values`` are not numbers.
    ModelError
        For data in blocks or spread over processes.
    """
    check_in_memory(problem, "curve")
    name, index = element(problem.structure.parameters, which, "which")
    (along,) = _ranges(problem, params, [(name, index)], [values], points)
    with isolated(problem.structure.program.dtype, 0):
        heights = torch.tensor(
            [_height(problem, params, {(name, index): t}) for t in along.tolist()],
            dtype=torch.float64,
        )
        maximum = sum(problem.parts(params))
    at = float(params[name][index])
    return Curve(label(name, index), along, heights, at, maximum, _missing(heights))


def surface(
    problem: Problem,
    params: Params,
    first: str,
    second: str,
    values: Sequence[Any] | None = None,
    points: int = 41,
) -> Surface:
    """The objective over two elements, all others as in ``params``; see :func:`curve`.

    ``values`` are those of the first and of the second; without them ``points`` of each.

    Raises:
    ------
    SettingError
        As :func:`curve`; and where both are the same element, or all of a simplex.
    ModelError
        For data in blocks or spread over processes.
    """
    check_in_memory(problem, "surface")
    parameters = problem.structure.parameters
    one, two = element(parameters, first, "first"), element(parameters, second, "second")
    if one == two:
        raise SettingError(f"surface: expected two elements, got '{label(*one)}' twice.")
    whole = parameters[one[0]].kind is constraints.simplex and parameters[one[0]].shape[-1] == 2
    if whole and one[0] == two[0] and one[1][:-1] == two[1][:-1]:
        raise SettingError(
            f"surface: '{label(*one)}' and '{label(*two)}' sum to one: there is no surface. Ask for"
            " the curve of one."
        )
    given = (None, None) if values is None else tuple(values)
    if len(given) != 2:
        raise SettingError(f"values: expected those of two elements, got {len(given)}.")
    along, across = _ranges(problem, params, [one, two], given, points)
    with isolated(problem.structure.program.dtype, 0):
        heights = torch.tensor(
            [
                [_height(problem, params, {one: a, two: b}) for b in across.tolist()]
                for a in along.tolist()
            ],
            dtype=torch.float64,
        )
        maximum = sum(problem.parts(params))
    at = float(params[one[0]][one[1]]), float(params[two[0]][two[1]])
    names = label(*one), label(*two)
    return Surface(names, (along, across), heights, at, maximum, _missing(heights))


def element(parameters: Mapping[str, Parameter], text: Any, argument: str) -> tuple[str, Index]:
    """The parameter and the index that a label names."""
    if not isinstance(text, str):
        raise SettingError(
            f"{argument}: expected the name of an element, such as 'loc[0]'; got {text!r}."
        )
    name, index = _parsed(text, parameters)
    check_names([name], parameters, argument)
    shape = parameters[name].shape
    if len(index) == len(shape):
        index = tuple(i + n if -n <= i < 0 else i for i, n in zip(index, shape, strict=True))
    inside = len(index) == len(shape) and all(0 <= i < n for i, n in zip(index, shape, strict=True))
    if not inside:
        example = f"such as '{label(name, tuple(n - 1 for n in shape))}'" if shape else "one number"
        raise SettingError(
            f"{argument}: parameter '{name}' has shape {shape}: expected one element, {example};"
            f" got {text!r}."
        )
    return name, index


def _parsed(text: str, known: Iterable[str]) -> tuple[str, Index]:
    found = re.fullmatch(r"(.+)\[([-\d,\s]+)\]", text)
    if text in known or found is None:
        return text, ()
    parts = [part.strip() for part in found[2].split(",")]
    if not all(re.fullmatch(r"-?\d+|", part) for part in parts):
        return text, ()
    return found[1], tuple(int(part) for part in parts if part)


def _read(name: str, params: Mapping[str, Any]) -> float:
    own, index = _parsed(name, params)
    if own not in params:
        raise SettingError(f"project: params lacks a value for '{own}'.")
    return float(params[own][index] if index else params[own])


def support(parameter: Parameter, index: Index) -> tuple[float, float]:
    """The bounds of one element, as far as they do not depend on the others."""
    kind = parameter.kind
    if kind is constraints.simplex:
        return 0.0, 1.0
    shared = structure_of(kind)
    if shared is not None and shared.event_dim == 2:
        return 0.0, math.inf
    matrix = kind.event_dim >= 2 or shared is not None
    if matrix and index[-1] == index[-2]:
        return 0.0, math.inf
    return interval_of(parameter.constraint) or (-math.inf, math.inf)


def moved(parameter: Parameter, value: Tensor, wanted: Mapping[Index, float]) -> Tensor | None:
    """``value`` with some elements set; None where that leaves the constraint.

    The other elements of a simplex keep their ratios; a symmetric matrix stays symmetric.
    """
    result, kind = value.detach().clone(), parameter.kind
    for index, number in wanted.items():
        result[index] = number
        if _symmetric(kind):
            result[(*index[:-2], index[-1], index[-2])] = number
    if kind is constraints.simplex:
        for row in {index[:-1] for index in wanted}:
            kept = torch.zeros(parameter.shape[-1], dtype=torch.bool)
            kept[[index[-1] for index in wanted if index[:-1] == row]] = True
            if parameter.held is not None:
                kept = kept | parameter.held[row]
            left = 1 - float(result[row][kept].sum())
            others = result[row][~kept]
            if left > 0 and not float(others.sum()) > 0:
                return None
            result[row] = result[row].masked_scatter(~kept, others * (left / others.sum()))
    return result if bool(torch.as_tensor(parameter.constraint.check(result)).all()) else None


def _symmetric(kind: Any) -> bool:
    shared = structure_of(kind)
    if shared is not None:
        return bool(shared.event_dim == 3)
    return isinstance(kind, type(constraints.symmetric))


def _height(problem: Problem, params: Params, wanted: Mapping[tuple[str, Index], float]) -> float:
    """The objective with some elements set; NaN outside their support."""
    own = dict(params)
    for name in {name for name, _ in wanted}:
        parts = {index: t for (n, index), t in wanted.items() if n == name}
        value = moved(problem.structure.parameters[name], params[name], parts)
        if value is None:
            return math.nan
        own[name] = value
    return sum(problem.parts(own))


def _ranges(
    problem: Problem,
    params: Params,
    elements: Sequence[tuple[str, Index]],
    values: Sequence[Any],
    points: int,
) -> list[Tensor]:
    """The values along each element: those given, or around where it stands."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise SettingError(f"points: expected a whole number of at least 2, got {points!r}.")
    errors: Params = {}
    if any(v is None for v in values):
        errors = uncertainty(problem, params).standard_errors
    found = []
    for (name, index), given in zip(elements, values, strict=True):
        if given is not None:
            found.append(_numbers(given))
            continue
        at = float(params[name][index])
        low, high = support(problem.structure.parameters[name], index)
        half = WIDE * float(errors[name][index]) if name in errors else math.nan
        if not (math.isfinite(half) and half > 0):
            half = 0.5 * abs(at) or 1.0
        start = max(at - half, at - (1 - EDGE) * (at - low))
        stop = min(at + half, at + (1 - EDGE) * (high - at))
        found.append(torch.linspace(start, stop, points, dtype=torch.float64))
    return found


def _numbers(given: Any) -> Tensor:
    try:
        values = torch.as_tensor(given, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"values: expected a list of numbers, got {given!r}.") from error
    if values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
        raise SettingError(
            f"values: expected a list of finite numbers, got {values.tolist()!r:.80}."
        )
    return values


def _missing(heights: Tensor) -> str:
    lost, zero = int(heights.isnan().sum()), int(heights.isneginf().sum())
    parts = []
    if lost:
        parts.append(
            f"{lost} of {heights.numel()} values leave the constraint of their parameter, or the"
            " program has no density there: NaN."
        )
    if zero:
        parts.append(f"The data are impossible at {zero} of {heights.numel()} values: -inf.")
    return " ".join(parts)


def _below(message: str) -> str:
    return f"\n{message}" if message else ""
