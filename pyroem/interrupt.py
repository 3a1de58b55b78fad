"""Ctrl-C between two steps of a fit, never in the middle of a program's run.

An exception out of the middle of a run would leave Pyro's own stacks as they stand. So the first
Ctrl-C is only noted, and acted upon at the next :func:`pause_point`; a second one acts at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_pressed: list[bool] = []  # one element while interrupts are deferred
_agreed: list[bool] = []  # one element while they have to be agreed upon with other processes


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Note a Ctrl-C instead of raising it, where Python's own handler is in place."""
    main = threading.current_thread() is threading.main_thread()
    if _pressed or not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def note(number: int, frame: Any) -> None:
        if _pressed[0]:
            signal.default_int_handler(number, frame)
        _pressed[0] = True

    _pressed.append(False)
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _pressed.clear()


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Act on a Ctrl-C only once all processes know of it (:func:`agree`)."""
    _agreed.append(False)
    try:
        yield
    finally:
        _agreed.clear()


def agree() -> None:
    """All processes know that Ctrl-C was pressed in one of them."""
    if _agreed:
        _agreed[0] = True


def noted() -> bool:
    """Whether Ctrl-C was pressed in this process since interrupts are deferred."""
    return bool(_pressed) and _pressed[0]


def pressed() -> bool:
    """Whether to act on a Ctrl-C."""
    return _agreed[0] if _agreed else noted()


def pause_point() -> None:
    """Raise ``KeyboardInterrupt`` if Ctrl-C was pressed."""
    if pressed():
        raise KeyboardInterrupt
