"""Several processes, each with rows of its own: sums over all of them, decided on by all of them.

Every process runs the same fit. What differs between them (the statistics of their rows, an
interrupt, a failure) goes into one vector, summed over the processes once for each E-step; every
decision is taken on such sums, so that no process goes another way than the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from pyroem import errors, interrupt
from pyroem.errors import ModelError, PyroemError, SettingError
from pyroem.estep.engine import ChainEngine, MixtureEngine, log_prior, surrogate
from pyroem.mstep.runs import Expected
from pyroem.statistics import SiteStatistics
from pyroem.structure import Params

T = TypeVar("T")
EXPECT, LOG_JOINT, SHARE, ABANDON = 1, 2, 3, 4  # what an exchange is for
FINE, NO_VALUE, FAILED = 0.0, 1.0, 2.0  # how a process is: NO_VALUE of the program at a point
APART = 1e-6  # relative; how far parameters differ between processes that went different ways


class Ranks:
    """The processes of a group. All of them make the same calls in the same order.

    ``width`` is the length of what they exchange, known once the problem is; every exchange has
    the same length, so that a process that fails can always answer the others.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.width, self.closed = group, 0, False
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cpu")
        if dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())

    def agree(self, what: Callable[[], T]) -> list[T]:
        """What ``what`` gives in every process; where it fails in one, it fails in all."""
        value, failure = None, None
        try:
            value = what()
        except Exception as error:
            failure = error
        found = self._gather((_told(failure), value))
        if any(told for told, _ in found):
            self._fail([told for told, _ in found], failure)
        return [value for _, value in found]

    def check_same(self, settings: Callable[[], Mapping[str, Any]]) -> None:
        """Raise where ``settings`` differ between the processes."""
        found = self.agree(lambda: {name: repr(value) for name, value in settings().items()})
        for rank, own in enumerate(found):
            for name, value in own.items():
                if value != found[0].get(name):
                    raise SettingError(
                        f"distributed: {name} is {found[0].get(name)} in process 0 and {value} in"
                        f" process {rank}; all must be given the same."
                    )

    def sum(
        self,
        kind: int,
        body: Tensor,
        params: Params,
        failure: Exception | None = None,
        interrupted: bool = False,
    ) -> Tensor:
        """The sum of ``body`` over the processes.

        Raises:
        ------
        ModelError
            In all processes where the program cannot run in one, at ``params``.
        PyroemError
            Where a process failed or is gone, or where they do not stand at the same point.
        """
        mark = _fingerprint(params)
        own = torch.zeros(self.size, dtype=torch.float64)
        if failure is not None:
            own[self.rank] = NO_VALUE if _is_no_value(failure) else FAILED
        head = [float(interrupted or interrupt.noted()), kind, kind * kind, mark, mark * mark]
        rest = torch.zeros(self.width - len(body), dtype=torch.float64)
        flat = torch.cat([own, torch.tensor(head, dtype=torch.float64), body.double(), rest])
        flat = self._all_reduce(flat)
        states, head = flat[: self.size].tolist(), flat[self.size : self.size + len(head)].tolist()
        if head[0]:
            interrupt.agree()
        if any(states):
            told = self._gather(_told(failure))
            if max(states) == NO_VALUE:
                if failure is not None:
                    raise failure
                raise ModelError(_first(told))
            self._fail(told, failure)
        _, kinds, kinds2, marks, marks2 = (x / self.size for x in head)
        if kinds2 != kinds**2 or marks2 - marks**2 > (APART * (1 + abs(marks))) ** 2:
            self.closed = True
            raise PyroemError(
                "The processes of the fit went apart: they are not at the same step of it. Were"
                " they given the same program, settings and start?"
            )
        return flat[self.size + len(head) :][: len(body)]

    def share(self, params: Params, interrupted: bool = False) -> Params:
        """``params`` of the first process: rounding may differ between machines."""
        flat = torch.cat([v.detach().reshape(-1).double() for v in params.values()])
        found = self.sum(
            SHARE, torch.zeros_like(flat) if self.rank else flat, {}, None, interrupted
        )
        parts = found.split([v.numel() for v in params.values()])
        return {
            n: part.reshape(v.shape).to(v)
            for (n, v), part in zip(params.items(), parts, strict=True)
        }

    def abandon(self, failure: Exception) -> None:
        """Tell the others of a failure, which they learn of at their next exchange."""
        if self.closed or not self.width:
            return
        with contextlib.suppress(PyroemError):
            self.sum(ABANDON, torch.zeros(0), {}, _FatalError(failure))

    def _fail(self, told: list[Any], failure: Exception | None) -> NoReturn:
        self.closed = True
        if isinstance(failure, _FatalError):
            raise PyroemError
        if failure is not None:
            raise failure
        kind = next(t[0] for t in told if t is not None)
        raise getattr(errors, kind, PyroemError)(_first(told))

    def _all_reduce(self, flat: Tensor) -> Tensor:
        with self._alive():
            flat = flat.to(self.device)
            dist.all_reduce(flat, group=self.group)
            return flat.cpu()

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._alive():
            dist.all_gather_object(found, value, group=self.group)
        return found

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """After a call that did not end well, nothing more can be exchanged."""
        if self.closed:
            raise PyroemError("The processes of the fit are no longer together.")
        self.closed = True
        try:
            yield
        except RuntimeError as error:
            raise PyroemError(
                f"Process {self.rank} of {self.size} has lost another process of the fit: it has"
                " ended, or did not answer within the timeout of the process group"
                f" (init_process_group(timeout=...)). {' '.join(str(error).split())}"
            ) from error
        self.closed = False


class _FatalError(Exception):
    """Wraps a failure that ends the fit, whatever it is."""


def _told(failure: Exception | None) -> tuple[str, str] | None:
    """A failure as text, for the other processes."""
    if failure is None:
        return None
    if isinstance(failure, _FatalError):
        failure = failure.args[0]
    name = type(failure).__name__
    text = " ".join(str(failure).split())
    return name, text if isinstance(failure, PyroemError) else f"{name}: {text}"


def _first(told: list[Any]) -> str:
    """The message of the first process that failed."""
    rank, (_, text) = next((i, t) for i, t in enumerate(told) if t is not None)
    return f"In process {rank} of {len(told)}: {text}"


def _is_no_value(failure: Exception) -> bool:
    return isinstance(failure, (ModelError, torch.linalg.LinAlgError))


def _fingerprint(params: Params) -> float:
    """A number of order one that tells different parameters apart."""
    total, count = 0.0, 0
    for value in params.values():
        x = value.detach().double().reshape(-1).nan_to_num().asinh()
        total += float(x @ torch.linspace(1, 2, len(x), dtype=torch.float64)) if len(x) else 0.0
        count += len(x)
    return total / max(count, 1)


def ranks_of(wanted: Any) -> Ranks | None:
    """The processes that ``fit(distributed=wanted)`` asks for; None where it asks for none."""
    if wanted is None or wanted is False:
        return None
    if not dist.is_available():
        raise SettingError("distributed: this build of torch has no torch.distributed.")
    if wanted is not True and not isinstance(wanted, dist.ProcessGroup):
        raise SettingError(
            "distributed: expected True (all processes), False or a process group of"
            f" torch.distributed, got {wanted!r}."
        )
    if not dist.is_initialized():
        raise SettingError(
            "distributed: there is no process group. Call torch.distributed.init_process_group()"
            " first, in a script that torchrun starts."
        )
    group = None if wanted is True else wanted
    if dist.get_rank(group) < 0:
        raise SettingError("distributed: this process is not a member of the group given.")
    return Ranks(group)


@contextlib.contextmanager
def together(ranks: Ranks | None) -> Iterator[None]:
    """A fit in which the others hear of what goes wrong here, and interrupts are agreed upon."""
    if ranks is None:
        yield
        return
    with interrupt.shared():
        try:
            yield
        except Exception as error:
            ranks.abandon(error)
            raise


def digest(x: Tensor) -> str:
    """A short string that is the same for equal tensors."""
    return hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def flatten(expected: Expected) -> Tensor:
    """The log-likelihood and all statistics as one vector, in double precision."""
    parts = [expected.log_likelihood]
    for s in expected.statistics.values():
        parts += [s.weight, *s.values]
    return torch.cat([p.detach().reshape(-1).double() for p in parts])


def unflatten(flat: Tensor, like: Expected) -> Expected:
    """The inverse of :func:`flatten`, in the shapes of ``like``."""
    at = 0

    def following(x: Tensor) -> Tensor:
        nonlocal at
        at += x.numel()
        return flat[at - x.numel() : at].reshape(x.shape).to(x)

    log_likelihood = following(like.log_likelihood)
    statistics = {
        name: SiteStatistics(following(s.weight), tuple(following(v) for v in s.values))
        for name, s in like.statistics.items()
    }
    return Expected(log_likelihood, statistics, {})


@dataclass(frozen=True)
class DistributedEngine:
    """The kernel on rows that are spread over processes.

    ``own`` holds the rows of this process (none of them, where ``rows`` says so: the rows by
    process); ``shape`` is an example of what an E-step gives; ``work`` that of the largest share.
    """

    own: MixtureEngine | ChainEngine
    ranks: Ranks
    rows: tuple[int, ...]
    shape: Expected
    work: float = math.inf

    @property
    def description(self) -> str:
        """What it does and why it was chosen."""
        held = self.rows[self.ranks.rank]
        where = f"over {self.ranks.size} processes, this one with {held} rows"
        return f"{self.own.description}, {where}"

    def expect(self, params: Params) -> tuple[Expected, Tensor]:
        """Expected statistics and log prior at ``params``."""
        return self._sums(EXPECT, params)

    def log_joint(self, params: Params) -> tuple[Tensor, Tensor]:
        """Log-likelihood and log prior at ``params``, differentiable once.

        The gradient follows from the statistics of all rows, in every process by itself.
        """
        expected, first = self._sums(LOG_JOINT, {n: v.detach() for n, v in params.items()})
        prior = log_prior(self.own.plan, params)
        if first.isfinite():
            prior = first + (prior - prior.detach())
        return surrogate(self.own.plan, params, expected), prior

    def _sums(self, kind: int, params: Params) -> tuple[Expected, Tensor]:
        """The statistics of all rows, and the prior, which the first process counts."""
        body, failure = torch.zeros(0), None
        try:
            if self.rows[self.ranks.rank]:
                expected, prior = self.own.expect(params)
                flat = flatten(expected)
            else:
                prior = log_prior(self.own.plan, params)
                flat = torch.zeros_like(flatten(self.shape))
            counted = torch.zeros(1) if self.ranks.rank else prior.detach().reshape(1)
            body = torch.cat([flat, counted.double()])
        except Exception as error:
            failure = error
        total = self.ranks.sum(kind, body, params, failure)
        return unflatten(total[:-1], self.shape), total[-1].to(self.shape.log_likelihood)
