"""How many components: the likelihood-ratio test by the parametric bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyroem.blocks import is_source
from pyroem.em import EM
from pyroem.errors import SettingError
from pyroem.fit import Fit
from pyroem.interrupt import deferred, pause_point, pressed
from pyroem.loop import Status, rank
from pyroem.problem import Problem
from pyroem.progress import Progress
from pyroem.selection.programs import (
    Posed,
    cast_once,
    check_common,
    check_components,
    pose_all,
)
from pyroem.selection.replicates import Places, places_of, replicate
from pyroem.selection.search import SLACK, Search, healthy
from pyroem.selection.shared import FAINT, promising, run_from, split_starts
from pyroem.solver import Solver
from pyroem.starts import Start, starts


@dataclass(frozen=True, eq=False)
class LikelihoodRatioTest:
    """The test of ``components`` (the null hypothesis) against one more.

    Attributes:
    ----------
    components
        The number of components under the null hypothesis.
    statistic
        ``2 (L_{K+1} - L_K)``, with ``L`` the log-likelihoods of ``alternative`` and ``null``.
    p_value
        ``(1 + #{replicates >= statistic}) / (B + 1)``; NaN before there is a replicate.
    replicates
        The statistics of the ``B`` data sets drawn from ``null``.
    failed
        Further data sets on which a fit collapsed; they do not count.
    missing
        Replicates that an interrupt kept from being made.
    interrupted, note
        Whether an interrupt ended the test, and why there is no p-value, where there is none.
    level, previous
        Where the number of components was sought: the level, and the tests of fewer components.
    """

    components: int
    statistic: float
    p_value: float
    replicates: tuple[float, ...]
    null: Fit
    alternative: Fit
    failed: int = 0
    missing: int = 0
    interrupted: bool = False
    note: str = ""
    level: float = 0.05
    previous: tuple[LikelihoodRatioTest, ...] = ()

    def __str__(self) -> str:
        lines = ["components       statistic  p-value  replicates"]
        for test in (*self.previous, self):
            pair = f"{test.components} against {test.components + 1}"
            p = "-" if math.isnan(test.p_value) else f"{test.p_value:.4f}"
            failed = f" ({test.failed} failed)" if test.failed else ""
            lines.append(
                f"{pair:<15s}{test.statistic:>11.4f}{p:>9s}{len(test.replicates):>12d}{failed}"
            )
        if self.note:
            lines.append(self.note)
        if self.interrupted:
            lines.append(f"interrupted; missing: {self.missing} replicates")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def likelihood_ratio_test(
    model_factory: Callable[..., Callable[..., Any]],
    *args: Any,
    components: int | None = None,
    replicates: int = 99,
    level: float = 0.05,
    most: int = 9,
    solver: Solver | None = None,
    seed: int = 0,
    restarts: int = 1,
    progress: bool = False,
    **kwargs: Any,
) -> LikelihoodRatioTest:
    """Test ``components`` against one more, by data drawn from the fit with ``components``.

    The statistic ``2 (L_{K+1} - L_K)`` has no known distribution. So data sets are drawn from the
    fitted program with ``K`` components (``Fit.sample``: what is no observation stays as it is,
    covariates and missing cells among it), and both programs are fitted to each. On a drawn data
    set the smaller program starts from the parameters that it was drawn from or from k-means, the
    larger one from that fit with one component split, from the parameters of the observed fit with
    ``K + 1`` or from k-means: whatever looks best after a short run.

    Parameters
    ----------
    model_factory
        ``model_factory(K)`` returns the program with ``K`` components; further settings by
        ``functools.partial(gaussian_mixture, covariance="EEE")``.
    args, kwargs
        What the program is called with. Its observations must be parts of these tensors, unchanged
        but for their layout.
    components
        ``K``. None: one, two, ... components until ``p_value > level`` or ``K = most``. The result
        is that of the last test; the others stand in ``previous``.
    replicates
        The number of data sets: 99 or more for a test at the level of 0.05.
    solver, seed, restarts, progress
        As in :func:`select`.

    An interrupt (Ctrl-C) ends the test with the replicates so far.

    Raises:
    ------
    PyroemError
        For arguments, programs or data that cannot work, before any fit is made.

    Source: McLachlan (1987), Applied Statistics 36, 318-324.
    """
    solver = EM() if solver is None else solver
    check_common(solver, restarts, seed)
    _check(components, replicates, level, most)
    if args and is_source(args[0]):
        raise SettingError("likelihood_ratio_test: expected rows in memory, got data in blocks.")
    show = Progress("likelihood-ratio test:", progress or solver.progress)
    solver = replace(solver, progress=False)
    first, last = (1, most) if components is None else (components, components)
    with deferred():
        data = args, kwargs = cast_once(args, kwargs, solver)
        sizes = check_components(range(first, last + 2))
        posed = pose_all(model_factory, args, kwargs, sizes[:2], {}, solver, None)
        places = places_of(posed[0].problem)
        search = Search(solver, posed, data, seed, restarts, show)
        tests: list[LikelihoodRatioTest] = []
        try:
            for k in range(first, last + 1):
                if k > first:
                    more = pose_all(model_factory, args, kwargs, [k + 1], {}, solver, None)
                    search = search.extended(more)
                null, alternative = (search.best(size) for size in (k, k + 1))
                test = _bootstrap(search, k, null, alternative, places, replicates)
                tests.append(replace(test, level=level, previous=tuple(tests)))
                if test.interrupted or not test.p_value <= level:
                    break
        except KeyboardInterrupt:
            if not tests:
                raise
            tests[-1] = replace(tests[-1], interrupted=True)
        finally:
            show.close()
        return tests[-1]


def _check(components: Any, replicates: Any, level: Any, most: Any) -> None:
    for name, value in (("components", components), ("replicates", replicates), ("most", most)):
        if name == "components" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name}: expected a positive integer, got {value!r}.")
    if not isinstance(level, (int, float)) or not 0 < level < 1:
        raise SettingError(f"level: expected a number between 0 and 1, got {level!r}.")


def _bootstrap(
    search: Search, k: int, null: Fit, alternative: Fit, places: Places, count: int
) -> LikelihoodRatioTest:
    """The test, of both fits to the observed data."""
    statistic = 2 * (alternative.log_likelihood - null.log_likelihood)
    for size, fit in ((k, null), (k + 1, alternative)):
        if not _usable(fit):
            note = f"no test: the fit with {size} components ended as {fit.status}"
            fits = (null, alternative)
            return LikelihoodRatioTest(k, math.nan, math.nan, (), *fits, missing=count, note=note)
    generator = torch.Generator().manual_seed(search.seed)
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()
    programs = [next(p for p in search.posed if p.components == size) for size in (k, k + 1)]
    found, failed, interrupted = list[float](), 0, False
    try:
        for number, seed in enumerate(seeds):
            search.show(f"{k} against {k + 1} components, replicate {number + 1} of {count}")
            pause_point()
            data = replicate(null, places, seed)
            value = _statistic(search.solver, programs, data, null, alternative, seed)
            if math.isnan(value):
                failed += 1
            else:
                found.append(value)
    except KeyboardInterrupt:
        interrupted = True
    # Ties count: of two statistics that are equal but for the fits' tolerance neither is larger.
    ties = search.solver.tol * null.problem.rows
    above = sum(value >= statistic - ties for value in found)
    return LikelihoodRatioTest(
        components=k,
        statistic=statistic,
        p_value=(1 + above) / (len(found) + 1) if found else math.nan,
        replicates=tuple(found),
        null=null,
        alternative=alternative,
        failed=failed,
        missing=count - len(found) - failed,
        interrupted=interrupted,
    )


def _statistic(
    solver: Solver,
    programs: list[Posed],
    data: tuple[tuple[Any, ...], Mapping[str, Any]],
    null: Fit,
    alternative: Fit,
    seed: int,
) -> float:
    """``2 (L_{K+1} - L_K)`` of a drawn data set; NaN where a fit collapses."""
    small, large = (solver.pose(p.model, *data, None) for p in programs)
    lower = _fit(small, solver, [Start(null.params, "the parameters drawn from")], seed)
    if not _usable(lower):
        return math.nan
    slack = SLACK * small.rows
    rivals = [Start(alternative.params, "the observed fit")]
    upper = _fit(large, solver, [*rivals, *split_starts(large, lower, data, seed)], seed)
    for share in (FAINT, FAINT**2):
        if healthy(upper) and upper.log_likelihood >= lower.log_likelihood - slack:
            break
        again = _fit(large, solver, list(split_starts(large, lower, data, seed, share)), seed)
        upper = max(upper, again, key=lambda fit: rank(fit.status, fit.log_joint))
    if not _usable(upper):
        return math.nan
    return 2 * (upper.log_likelihood - lower.log_likelihood)


def _usable(fit: Fit) -> bool:
    """Whether the likelihood counts: that of states that ended alike does, of a collapse not."""
    bad = (Status.DEGENERATE, Status.NON_FINITE)
    return math.isfinite(fit.log_likelihood) and fit.status not in bad


def _fit(problem: Problem, solver: Solver, rivals: list[Start], seed: int) -> Fit:
    """The best fit: from the most promising of the ``rivals``, and from a search for a start.

    The search is that of the fits to the observed data: were the drawn data fitted with less care,
    their statistics would be too small.
    """
    chosen = promising(problem, solver, rivals, 1, seed)
    fits = [run_from(problem, solver, [*chosen, *rivals], 1, seed)]
    if any(group.movable > 1 for group in problem.groups):
        fits.append(run_from(problem, solver, list(starts(problem, "auto", 1, seed)), 1, seed))
    if any(fit.status is Status.INTERRUPTED for fit in fits) or pressed():
        raise KeyboardInterrupt
    return max(fits, key=lambda fit: rank(fit.status, fit.log_joint))
