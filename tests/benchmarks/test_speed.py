"""Time of an iteration and of a fit, against the peers."""

from __future__ import annotations

import pytest

from benchmarks import peers, programs
from benchmarks.harness import Run, assert_equal, exactly, interleave, run_pyroem, scaled, versus
from pyroem import EM

pytestmark = pytest.mark.benchmark
TOL = 1e-6
# scikit-learn's rule: the log-likelihood a row changed by less than `tol`. No parameter moves by
# more than twice its largest element, so that a `param_tol` of 2 leaves the rule alone.
SAME_RULE = EM(tol=TOL, param_tol=2)


@pytest.mark.parametrize("peer", ["scikit-learn", "pomegranate", "Pyro SVI", "matrix products"])
def test_full_covariance(peer: str) -> None:
    n, d, k, times = scaled(200_000), 16, 16, 5
    x, start = programs.gaussian_rows(n, d, k)
    program = programs.full_gaussian(k)

    def theirs() -> Run:
        if peer == "scikit-learn":
            return peers.sklearn_mixture(x, k, start, tol=0, max_iter=times)
        if peer == "pomegranate":
            return peers.pomegranate_mixture(x, start, times)
        if peer == "Pyro SVI":
            return peers.svi_steps(program, x, start, times)
        return peers.products(x, k, times)

    ours, others = interleave(lambda: run_pyroem(exactly(times), program, x, init=start), theirs)
    if others[0].params:
        assert_equal(ours[0], others[0])
    versus("full covariance, iteration", f"N={n:,} D={d} K={k}", peer, ours, others)


def test_many_rows() -> None:
    n, d, k, times = scaled(1_000_000), 2, 3, 5
    x, start = programs.gaussian_rows(n, d, k)
    ours, theirs = interleave(
        lambda: run_pyroem(exactly(times), programs.full_gaussian(k), x, init=start),
        lambda: peers.sklearn_mixture(x, k, start, tol=0, max_iter=times),
    )
    assert_equal(ours[0], theirs[0])
    versus("many rows, iteration", f"N={n:,} D={d} K={k}", "scikit-learn", ours, theirs)


def test_small_iteration() -> None:
    n, times = scaled(10_000), 50
    x, start = programs.pair_rows(n, 4.0)
    ours, theirs = interleave(
        lambda: run_pyroem(exactly(times), programs.gaussian(2), x, init=start),
        lambda: peers.sklearn_mixture(x, 2, start, tol=0, max_iter=times),
    )
    assert_equal(ours[0], theirs[0])
    versus("small, iteration", f"N={n:,} D=1 K=2", "scikit-learn", ours, theirs)


def test_small_whole() -> None:
    n, program = scaled(10_000), programs.gaussian(2)
    x, _ = programs.pair_rows(n, 4.0)
    kmeans, auto, theirs = interleave(
        lambda: run_pyroem(SAME_RULE, program, x, init="kmeans"),
        lambda: run_pyroem(SAME_RULE, program, x),
        lambda: peers.sklearn_mixture(x, 2, tol=TOL, max_iter=1000),
    )
    for init, ours in {"kmeans": kmeans, "auto": auto}.items():
        assert abs(ours[0].value - theirs[0].value) < 100 * TOL  # one optimum, from two starts
        name = f"small, whole fit, init {init}"
        versus(name, f"N={n:,} D=1 K=2", "scikit-learn", ours, theirs, "whole")


def test_latent_classes() -> None:
    n, items, k, times = scaled(20_000), 20, 5, 20
    x, start = programs.item_rows(n, items, k)
    ours, theirs = interleave(
        lambda: run_pyroem(exactly(times), programs.latent_classes(k), x, init=start),
        lambda: peers.stepmix_classes(x, start, times),
    )
    assert_equal(ours[0], theirs[0])
    versus("latent classes, iteration", f"N={n:,} items={items} K={k}", "StepMix", ours, theirs)


def test_restarts() -> None:
    n, d, k, count = scaled(1000), 2, 5, 32
    x, _ = programs.gaussian_rows(n, d, k, apart=2.0)
    program = programs.full_gaussian(k)
    ours, theirs = interleave(
        lambda: run_pyroem(SAME_RULE, program, x, init="kmeans", restarts=count),
        lambda: peers.sklearn_mixture(x, k, n_init=count, tol=TOL, max_iter=1000),
    )
    size = f"N={n:,} D={d} K={k}"
    versus(f"{count} restarts, whole fit", size, "scikit-learn", ours, theirs, "whole")
