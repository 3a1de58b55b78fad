"""A line on stderr that says how far a long fit is, and about how long it will still take."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

OFTEN, SELDOM = 0.1, 10.0  # seconds between two updates: of a terminal's line, of lines in a log
SEEN = 20  # samples of the recent past that an estimate is made from
ENOUGH = 5  # samples that it takes
BAR = 20  # characters


class Trend:
    """Where a quantity that falls geometrically will fall below a limit.

    EM converges geometrically, so the logarithm of its changes falls along a line: it is fitted by
    least squares, since accelerated steps scatter about it. As EM slows down before it settles,
    the line is that of the latest samples, or of half of them, whichever falls more slowly.
    """

    def __init__(self) -> None:
        self.samples: deque[tuple[int, float]] = deque(maxlen=SEEN)

    def add(self, iteration: int, size: float) -> None:
        """One more sample; what is not a positive number says nothing."""
        if 0 < size < math.inf:
            self.samples.append((iteration, math.log(size)))

    def iterations(self, limit: float) -> float:
        """How many more iterations it takes from the latest sample on; infinite if unknown."""
        if len(self.samples) < ENOUGH or not limit > 0:
            return math.inf
        samples = list(self.samples)
        slope = max(_slope(samples), _slope(samples[-max(ENOUGH, len(samples) // 2) :]))
        if not slope < -1e-6:
            return math.inf
        return max(0.0, (math.log(limit) - samples[-1][1]) / slope)


def _slope(samples: Sequence[tuple[int, float]]) -> float:
    x = sum(i for i, _ in samples) / len(samples)
    y = sum(v for _, v in samples) / len(samples)
    spread = sum((i - x) ** 2 for i, _ in samples)
    return sum((i - x) * (v - y) for i, v in samples) / spread if spread else 0.0


class Pace:
    """The time left: iterations until the stopping rule holds, times the seconds of the latest."""

    def __init__(self) -> None:
        self.change, self.moved = Trend(), Trend()
        self.clock: deque[tuple[int, float]] = deque(maxlen=SEEN)
        self.latest = (math.inf, math.inf)

    def add(self, iteration: int, seconds: float, change: float, moved: float) -> None:
        """One more sample: changes of the objective (a row) and of the parameters (relative)."""
        self.clock.append((iteration, seconds))
        self.change.add(iteration, change)
        self.moved.add(iteration, moved)
        self.latest = (change, moved)

    def iterations(self, tol: float, param_tol: float) -> float:
        """How many more it takes until both changes are small enough; infinite if unknown."""
        more = 0.0
        trends = (self.change, self.moved)
        for trend, size, limit in zip(trends, self.latest, (tol, param_tol), strict=True):
            if not size <= limit:
                more = max(more, trend.iterations(limit))
        return more

    def left(self, more: float, rest: int) -> str:
        """In words: an estimate (``~``) where ``more`` is known, else what ``rest`` allows."""
        if len(self.clock) < 2 or self.clock[-1][0] <= self.clock[0][0]:
            return ""
        (first, before), (last, now) = self.clock[0], self.clock[-1]
        seconds = duration(min(more, rest) * (now - before) / (last - first))
        if math.isinf(more):
            return f"at most {seconds} left"
        return f"~{seconds} left" + (", to max_iter" if more > rest else "")


def duration(seconds: float) -> str:
    """In the largest unit that fits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _in_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def terminal_width() -> int:
    """The columns of the terminal that stderr writes to."""
    if not os.environ.get("COLUMNS", "").isdigit():
        with suppress(OSError, ValueError, AttributeError):
            return os.get_terminal_size(sys.stderr.fileno()).columns
    return shutil.get_terminal_size().columns


def fitted(parts: Sequence[tuple[int, str]], width: int) -> str:
    """The parts in one line of at most ``width`` characters; the least important go first.

    Each part comes with its rank: the part with the largest rank is left out first.
    """
    kept = list(parts)
    while len(kept) > 1 and sum(len(text) + 2 for _, text in kept) - 2 > width:
        kept.remove(max(kept))
    return "  ".join(text for _, text in kept)[:width]


class Progress:
    """What a fit says while it works; silent where not wanted.

    In a terminal one line is rewritten, at most ten times a second, and never longer than the
    terminal is wide. Elsewhere (a log, a notebook) there is a line every ten seconds.
    """

    def __init__(self, label: str, wanted: bool) -> None:
        self.label, self.wanted = label, wanted
        self.seen = self.shown = -math.inf
        self.width, self.held = 0, ""
        self.pace = Pace()

    def start(self, label: str) -> None:
        """Another run begins."""
        self.label, self.pace = label, Pace()

    def due(self) -> bool:
        """Whether it is time to look: what is costly to find out can wait for it."""
        return self.wanted and time.monotonic() - self.seen > OFTEN

    def __call__(self, text: str) -> None:
        """Show ``text``, if the last one is a while ago; an empty text ends the line."""
        if not text:
            self.close()
        elif self._may_show():
            self._show([(0, f"{self.label} {text}")])

    def iteration(
        self,
        iteration: int,
        limits: tuple[float, float, int],
        log_joint: float,
        change: float,
        moved: float,
        seconds: float,
        *,
        geometric: bool = True,
        note: str = "",
    ) -> None:
        """Show where the loop is: ``change`` is that of the objective a row.

        ``moved`` is that of the parameters; ``limits`` are ``tol``, ``param_tol``, ``max_iter``.
        Where convergence is not ``geometric``, the time left is that of all iterations allowed.
        """
        self.seen = time.monotonic()
        self.pace.add(iteration, seconds, abs(change), moved)
        if not self._may_show():
            return
        more, rest = math.inf, limits[2] - iteration
        if geometric:
            more = self.pace.iterations(*limits[:2])
        done = round(BAR * iteration / (iteration + min(more, rest)))
        left = self.pace.left(more, rest)
        parts = [
            (0, f"{self.label} iteration {iteration}/{limits[2]}"),
            (5, f"[{'#' * done}{'-' * (BAR - done)}]"),
            *([(4, note)] if note else []),
            (2, f"log_joint {log_joint:.6f}"),
            (3, f"change/row {change:.2e}"),
            (6, duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"),
            *([(1, left)] if left else []),
        ]
        self._show(parts)

    def end(self, text: str) -> None:
        """How a run ended: shown now or, at the latest, when the line is closed."""
        if not self.wanted:
            return
        self.held = f"{self.label} {text}"
        if self._may_show():
            self._show([(0, self.held)])

    def close(self) -> None:
        """Say what was held back, and end the line."""
        if self.held:
            self._show([(0, self.held)])
        if self.width:
            self._write("\n")
            self.width = 0

    def _may_show(self) -> bool:
        pause = OFTEN if _in_terminal() else SELDOM
        return self.wanted and time.monotonic() - self.shown > pause

    def _show(self, parts: Sequence[tuple[int, str]]) -> None:
        self.shown, self.held = time.monotonic(), ""
        if not _in_terminal():
            self._write("  ".join(text for _, text in parts).strip() + "\n")
            return
        # The last column stays free: some terminals break the line after it.
        width = max(1, terminal_width() - 1)
        line = fitted(parts, width).strip()
        self._write("\r" + line.ljust(min(self.width, width)))
        self.width = len(line)

    def _write(self, text: str) -> None:
        # AttributeError: a program without a console has no stderr.
        with suppress(
            OSError, ValueError, AttributeError
        ):  # a terminal that is gone is no reason to end a fit
            sys.stderr.write(text)
            sys.stderr.flush()
