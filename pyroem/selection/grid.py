"""The best of a grid of programs: components and settings, by a criterion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pyroem.em import EM
from pyroem.errors import SettingError
from pyroem.interrupt import deferred
from pyroem.loop import Status
from pyroem.progress import Progress
from pyroem.selection.candidates import CRITERIA, Candidate, Selection, best_of, criteria_of
from pyroem.selection.folds import check_folds, held_out
from pyroem.selection.programs import (
    cast_once,
    check_common,
    check_components,
    check_grid,
    pose_all,
)
from pyroem.selection.search import Search
from pyroem.solver import Solver


def select(
    model_factory: Callable[..., Callable[..., Any]],
    *args: Any,
    components: Iterable[int] = range(1, 10),
    covariance: Iterable[Any] | None = None,
    criterion: str = "bic",
    solver: Solver | None = None,
    weights: Any = None,
    seed: int = 0,
    restarts: int = 1,
    folds: int = 5,
    progress: bool = False,
    grid: Mapping[str, Iterable[Any]] | None = None,
    **kwargs: Any,
) -> Selection:
    """Fit a program with several numbers of components and settings; choose by a criterion.

    Parameters
    ----------
    model_factory
        ``model_factory(K, covariance=c, **further)`` returns the program with ``K`` components, as
        :func:`pyroem.models.gaussian.gaussian_mixture` does.
    args, kwargs
        What the program is called with, as in ``Solver.fit``.
    components, covariance, grid
        The values to try: numbers of components; settings of the factory's ``covariance`` (None:
        the factory is called without); of its further keywords, ``grid={"df": [3, 5, None]}``.
        Every combination is fitted.
    criterion
        ``"bic"``, ``"aic"``, ``"icl"``, ``"caic"``, ``"sabic"`` (see :class:`Candidate`): the
        smaller the better, the other way round than in mclust. Or ``"cv"``, the log-likelihood of
        held-out rows, the larger the better, with ``folds`` folds; that takes ``folds`` more fits
        of every program. Rows are those of the program's plate; all data is cut alike.
    solver
        ``EM()`` unless given. ``EM(accelerate="squarem")`` is faster where components overlap.
    weights, seed, restarts
        As in ``Solver.fit``; ``restarts`` are made of every program.
    progress
        Say on stderr which fit of how many is being made.

    Fits share their starts. With the same number of components, the settings with the fewest and
    the most parameters search for a start as ``Solver.fit`` does. The others start from what looks
    best after a short run: k-means, the responsibilities of fits at hand, their own fit with fewer
    components and one of these split in two. Then every fit that is worse than one with fewer
    parameters starts from the responsibilities of that one, and every fit that is worse than that
    with fewer components from a split of these; the better result is kept. So where a program
    contains another (and its M-step is exact) its likelihood is no lower. Data in blocks, and fits
    without assignments, share nothing: each searches for itself.

    An interrupt (Ctrl-C) ends the selection with the fits so far, and names what is missing.

    Raises:
    ------
    PyroemError
        For arguments, programs or data that cannot work, before any fit is made.
    """
    solver = EM() if solver is None else solver
    check_common(solver, restarts, seed)
    if criterion not in CRITERIA:
        raise SettingError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}.")
    sizes, lists = check_components(components), check_grid(covariance, grid)
    show = Progress("select:", progress or solver.progress)
    solver = replace(solver, progress=False)
    with deferred():
        data = args, kwargs = cast_once(args, kwargs, solver)
        posed = pose_all(model_factory, args, kwargs, sizes, lists, solver, weights)
        parts = None
        if criterion == "cv":
            parts = check_folds(posed[0], solver, data, folds, seed)
        search = Search(solver, posed, data, seed, restarts, show)
        held: dict[int, float] = {}
        try:
            for k in sizes:
                search.fit_all(k)
                search.settle(k)
                for i in search.at(k) if parts is not None else ():
                    show(f"held-out rows of {posed[i].label}")
                    clock = time.perf_counter()
                    held[i] = held_out(posed[i], solver, data, parts or [], seed, restarts)
                    search.seconds[i] += time.perf_counter() - clock
        except KeyboardInterrupt:
            if not search.fits:
                raise
        finally:
            show.close()
        return _selection(search, criterion, held, parts is not None)


def _selection(search: Search, criterion: str, held: Mapping[int, float], asked: bool) -> Selection:
    rows, missing = [], []
    for i, posed in enumerate(search.posed):
        fit = search.fits.get(i)
        cut = fit is None or fit.status is Status.INTERRUPTED
        if cut or (asked and i not in held):
            missing.append(posed.label)
        if fit is None:
            continue
        # A solver whose objective is not exact has no other end than that of its iterations.
        ended = fit.converged or (not search.solver.exact and fit.status is Status.MAX_ITER)
        found = criteria_of(fit)
        rows.append(
            Candidate(
                components=posed.components,
                settings=dict(posed.settings),
                log_likelihood=fit.log_likelihood,
                df=fit.df,
                cv=held.get(i),
                n_iter=fit.n_iter,
                seconds=search.seconds[i],
                status=fit.status,
                counts=ended,
                fit=fit,
                **found,
            )
        )
    notes = () if search.sharing else ("data in blocks: the fits share no starts",)
    return Selection(tuple(rows), criterion, best_of(rows, criterion), tuple(missing), notes)
