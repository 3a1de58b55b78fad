"""Time to an optimum: against Pyro's own gradient inference, and with acceleration."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
from problems import PROBLEMS, Problem

from benchmarks.harness import REPEATS, SCALE, exactly, ratio, scaled, seconds, show, spread
from benchmarks.peers import svi_losses
from benchmarks.programs import APART, SLOW
from pyroem import EM, MAP, Fit, StepwiseEM
from pyroem.loop import Record

pytestmark = pytest.mark.benchmark
RATES = (0.01, 0.03, 0.1)
STEPS, PATIENCE = max(int(3000 * SCALE), 50), max(30 * SCALE, 5)  # of one run of Adam
THOROUGH = EM(tol=1e-12, param_tol=1e-9, max_iter=20_000)


def reached(fit: Fit, target: float) -> Record | None:
    return next((r for r in fit.history if r.log_joint >= target), None)


def adam(problem: Problem, lr: float, target: float, most: int = STEPS) -> tuple[float, int, float]:
    """Seconds and steps until ``target`` or until patience ends, and the best objective."""
    best, seen, clock = -float("inf"), 0, time.perf_counter()
    for loss in svi_losses(problem.oracle, problem.data, problem.params, problem.states, lr):
        best, seen = max(best, -loss), seen + 1
        if best >= target or seen > most or time.perf_counter() - clock > PATIENCE:
            break
    return time.perf_counter() - clock, seen - 1, best


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_against_pyro(problem: Problem) -> None:
    rows = len(problem.data[0])
    fit = THOROUGH.fit(problem.model, *problem.data, init=problem.params)
    _, _, start = adam(problem, 0.01, 0.0, most=0)
    assert start == pytest.approx(fit.history[0].log_joint, rel=1e-9)  # one objective, one start
    tried = {lr: adam(problem, lr, fit.log_joint - 1e-6 * rows) for lr in RATES}
    optimum = max(fit.log_joint, *(best for _, _, best in tried.values()))
    target = optimum - 1e-6 * rows
    record = reached(fit, target)
    good = {lr: run for lr, run in tried.items() if run[2] >= target}
    lr = min(good, key=lambda rate: good[rate][0], default=None)
    loops, wholes, steps = [], [], []
    for _ in range(REPEATS):
        if record is not None:
            clock, em = time.perf_counter(), exactly(max(record.iteration, 1))
            again = em.fit(problem.model, *problem.data, init=problem.params)
            wholes.append(time.perf_counter() - clock)
            loops.append(again.history[-1].seconds)
        if lr is not None:
            steps.append(adam(problem, lr, target)[0])
    gaps = ", ".join(f"{(optimum - best) / rows:.0e}" for _, _, best in tried.values())
    longest = max(took for took, _, _ in tried.values())
    show(
        {
            "to 1e-6 a row": problem.name,
            "EM's passes": str(record.passes) if record else "ends elsewhere",
            "EM's loop": spread(loops),
            "EM's whole fit": spread(wholes),
            "Adam's steps": str(good[lr][1]) if lr else f"gaps at the end {gaps}",
            "Adam": spread(steps) if lr else f"> {seconds(longest)}",
            "best rate": str(lr) if lr else "–",
            "ratio (whole fit)": ratio(wholes, steps),
        }
    )


@pytest.mark.parametrize("name", SLOW)
def test_acceleration(name: str) -> None:
    kinds = (None, "squarem", "anderson")
    settings: list[dict[str, Any]] = [{"accelerate": kind} for kind in kinds]
    n, (program, rows) = scaled(5000), SLOW[name]
    x, start = rows(n)
    fits = [dataclasses.replace(THOROUGH, **s).fit(program, x, init=start) for s in settings]
    polished = MAP(tol=1e-13, param_tol=1e-9).fit(program, x, init=fits[0])
    records = [reached(f, max(g.log_joint for g in [*fits, polished]) - 1e-7 * n) for f in fits]
    times: list[list[float]] = [[] for _ in settings]
    for _ in range(REPEATS):
        for own, setting, record in zip(times, settings, records, strict=True):
            if record is not None:
                em = dataclasses.replace(exactly(max(record.iteration, 1)), **setting)
                own.append(em.fit(program, x, init=start).history[-1].seconds)
    for kind, own, record in zip(kinds, times, records, strict=True):
        show(
            {
                "to 1e-7 a row": f"{name}, N={n:,}",
                "accelerate": str(kind),
                "passes": str(record.passes) if record else "ends elsewhere",
                "loop": spread(own),
                "ratio to none": ratio(own, times[0]),
            }
        )


@pytest.mark.parametrize("overlapping", [False, True], ids=["apart", "overlapping"])
@pytest.mark.parametrize("number", range(4))
def test_stepwise(number: int, overlapping: bool) -> None:
    name, (program, rows) = list((SLOW if overlapping else APART).items())[number]
    n = scaled(200_000)
    x, _ = rows(n)
    two = StepwiseEM().fit(program, x)
    best = EM(tol=1e-10, max_iter=20_000, accelerate="anderson").fit(program, x, init=two)
    plain = EM(tol=0, param_tol=0, max_iter=2).fit(program, x, init="random")
    show(
        {
            "after two passes": f"{name}{', overlapping' if overlapping else ''}, N={n:,}",
            "stepwise EM: below the optimum, a row": f"{(best.log_joint - two.log_joint) / n:.1e}",
            "EM from random assignments": f"{(best.log_joint - plain.log_joint) / n:.1e}",
        }
    )
