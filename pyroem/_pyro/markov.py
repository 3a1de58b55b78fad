"""Loops over time: how a reader goes through ``pyro.markov`` without unrolling it.

Pyro runs a loop step by step. A reader runs the first step, and then all others as one: the loop's
variable is a :class:`Step`, which stands for ``1, 2, ..., T - 1`` at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.poutine.markov_messenger import MarkovMessenger
from torch import Tensor

from pyroem.errors import ModelError, SettingError


class LoopError(ModelError):
    """The body of a loop cannot run once for all steps."""


_NO_COUNT = {"getitem", "gt", "lt", "ge", "le", "eq", "ne"}


class Step:
    """The steps ``first`` to ``last`` of a loop as one.

    It indexes tensors (``x[t]``, ``x[:, t - 1]``), takes part in arithmetic and in comparisons with
    tensors (``t < lengths``), and names sites as the step ``first`` would. ``value`` is a number
    for torch: a scalar that ``torch.vmap`` maps over the steps.
    """

    def __init__(self, value: Tensor, first: int, last: int, reader: Vectorised) -> None:
        self.index, self.first, self.last, self.reader = value, first, last, reader

    @property
    def value(self) -> Tensor:
        """The number of the step, for a computation."""
        self.reader.counted = True
        return self.index

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        indexing = getattr(func, "__name__", "").strip("_") in _NO_COUNT
        given = {k: _values(v, indexing) for k, v in (kwargs or {}).items()}
        return func(*_values(args, indexing), **given)

    def __format__(self, spec: str) -> str:
        return format(self.first, spec)

    def __str__(self) -> str:
        return str(self.first)

    __repr__ = __str__
    __hash__ = None  # type: ignore[assignment]  # it is no key: it is many numbers

    def __bool__(self) -> bool:
        return self._decided(operator.ne, 0)

    def _compare(self, other: Any, compare: Callable[[Any, Any], Any]) -> Any:
        if isinstance(other, Tensor):
            return compare(self.index, other)
        return self._decided(compare, other)

    def _decided(self, compare: Callable[[Any, Any], Any], other: Any) -> bool:
        """A comparison with a number, if it comes out the same at all steps."""
        if other is None:
            return bool(compare is operator.ne)
        ends = {bool(compare(self.first, other)), bool(compare(self.last, other))}
        inside = compare in (operator.eq, operator.ne) and self.first < other < self.last
        if len(ends) > 1 or inside:
            raise LoopError(
                f"it compares the step with {other}, which comes out differently at different steps"
            )
        return ends.pop()

    def __eq__(self, other: object) -> Any:
        return self._compare(other, operator.eq)

    def __ne__(self, other: object) -> Any:
        return self._compare(other, operator.ne)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, operator.lt)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, operator.le)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, operator.gt)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, operator.ge)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int):
            ends = self.first + other, self.last + other
            return Step(self.index + other, *ends, self.reader)
        return self.value + other

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, int) else self.value - other

    __radd__ = __add__

    def __rsub__(self, other: Any) -> Any:
        return other - self.value

    def __mul__(self, other: Any) -> Any:
        return self.value * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self.value / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.value

    def __floordiv__(self, other: Any) -> Any:
        return self.value // other

    def __mod__(self, other: Any) -> Any:
        return self.value % other

    def __pow__(self, other: Any) -> Any:
        return self.value**other

    def __rpow__(self, other: Any) -> Any:
        return other**self.value

    def __neg__(self) -> Any:
        return -self.value


def _values(x: Any, indexing: bool) -> Any:
    if isinstance(x, Step):
        return x.index if indexing else x.value
    if type(x) in (tuple, list):
        return type(x)(_values(y, indexing) for y in x)
    return x


@dataclass(frozen=True)
class Loop:
    """A loop that was met: its steps, whether by :func:`markov`, and why not as one (if so)."""

    length: int
    stated: bool
    reason: str


class Reader:
    """What goes through the loops of a run; ``at`` is the loop and step that it is in."""

    def __init__(self) -> None:
        self.loops: list[Loop] = []
        self.at: tuple[int, int] | None = None

    def enter(self, messenger: Any) -> list[Any] | None:
        """The values of the loop's variable; None for the loop's own."""
        steps = messenger._iterable
        stated = isinstance(steps, _Stated)
        own = steps.steps if stated else steps
        reason = ""
        if not isinstance(own, range) or own.start != 0 or own.step != 1:
            reason = "it does not run over range(T)"
        elif messenger.history != 1:
            reason = f"history={messenger.history}: a step sees more than the one before"
        elif self.at is not None:
            reason = "it stands in another loop"
        elif not len(own):
            reason = "it has no step"
        length = len(own) if isinstance(own, range) else 0
        self.loops.append(Loop(length, stated, reason))
        return None if reason else self.steps(length)

    def steps(self, length: int) -> list[Any] | None:
        """The values of the variable of a loop of ``length`` steps."""
        raise NotImplementedError


class Brief(Reader):
    """The first steps only."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def steps(self, length: int) -> list[Any] | None:
        """The first ``count`` of them."""
        return list(range(min(length, self.count)))


class Jump(Reader):
    """The first step, and then one further on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def steps(self, length: int) -> list[Any] | None:
        """Two of them."""
        return [0, min(self.step, length - 1)] if length > 1 else [0]


class Whole(Reader):
    """Every step, one after the other."""

    def steps(self, length: int) -> list[Any] | None:
        """All of them."""
        return list(range(length))


class Vectorised(Reader):
    """The first step, and the others as one: ``step`` is a scalar that is mapped over them.

    ``counted`` says that the program computed with it, beyond indexing and comparing.
    """

    def __init__(self, step: Tensor) -> None:
        super().__init__()
        self.step, self.counted = step, False

    def steps(self, length: int) -> list[Any] | None:
        """Two values. A shorter loop repeats its last step; the repeats are cut off later."""
        last = length - 1
        return [0, Step(self.step.clamp(max=last), 1, max(last, 1), self)]


_READER: ContextVar[Reader | None] = ContextVar("reader", default=None)


@contextmanager
def reading(reader: Reader | None) -> Iterator[None]:
    """Let ``reader`` go through the loops of the programs that run."""
    if reader is not None:
        reader.loops, reader.at = [], None
    token = _READER.set(reader)
    try:
        yield
    finally:
        _READER.reset(token)


def current_step() -> tuple[int, int] | None:
    """The loop and the step that the program is in, while a reader goes through it."""
    reader = _READER.get()
    return None if reader is None else reader.at


def vectorising() -> bool:
    """Whether the loops that run are run for all steps at once."""
    return isinstance(_READER.get(), Vectorised)


class _Stated:
    """The steps of a loop that was declared by :func:`markov`."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)


def markov(length: int) -> Any:
    """Steps ``0, 1, ..., length - 1`` of a first-order chain: ``for t in pyroem.markov(T)``.

    Under Pyro it is ``pyro.markov(range(T))``. pyroem runs the body twice only, for the first step
    and for all others at once, so that a long loop is read as fast as a short one. For that the
    body may use ``t`` to name sites, to index tensors (``x[t]``, ``x[:, t - 1]``), in arithmetic
    (``t % 12``) and in comparisons with tensors (``t < lengths``); what passes from one step to the
    next may be the state only. An earlier observation is taken from the data: ``x[t - 1]``.

    Raises:
    ------
    SettingError
        Where ``length`` is no positive integer.
    """
    try:
        if isinstance(length, bool):
            raise TypeError
        steps = operator.index(length)
    except TypeError as error:
        raise SettingError(
            f"markov: expected the number of steps, got {type(length).__name__} {length!r:.40}."
        ) from error
    if steps < 1:
        raise SettingError(f"markov: expected at least one step, got {steps}.")
    return pyro.markov(_Stated(range(steps)))


_plain = MarkovMessenger.__iter__


def _iterate(messenger: MarkovMessenger) -> Iterator[Any]:
    reader = _READER.get()
    steps = None if reader is None else reader.enter(messenger)
    if reader is None or steps is None:
        yield from _plain(messenger)
        return
    number = len(reader.loops) - 1
    with ExitStack() as stack:
        for i, value in enumerate(steps):
            stack.enter_context(messenger)
            reader.at = number, i
            try:
                yield value
            finally:
                reader.at = None


# Pyro's loops send no message that a handler could act on, so this is done in their iterator. Where
# no reader is at work it is Pyro's own.
MarkovMessenger.__iter__ = _iterate
