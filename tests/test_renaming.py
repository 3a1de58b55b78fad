"""Renaming states: what moves with them, what forbids it, and that a renamed fit is the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS, Problem
from pyro.distributions import constraints
from test_brute_force import trace_enum
from torch import Tensor
from torch.nn.functional import softplus

from pyroem import EM, MAP, SVI, Fit, compare, models
from pyroem.errors import SettingError
from pyroem.matching import match, parameter_difference
from pyroem.problem import pose
from pyroem.renaming import Renaming, renamings
from pyroem.symmetry import permute

BY_NAME = {problem.name: problem for problem in PROBLEMS}

# Programs of the table whose states the program itself tells apart: by weights that are numbers,
# by the state in which a chain starts, by labels, by sums over the states before, by a sum of zero
# over some of them; and those whose parameters have no axis of states (two scalars side by side).
TOLD_APART = {
    "inverse_gamma_mixture",
    "failures_by_state",
    "hierarchical_means",
    "sum_to_zero",
    "cumulative_means",
    "bernoulli_where",
    "bernoulli_blend",
    "binomial_assignment",
    "global_assignment",
    "ordered_means",
    "chain_ragged",
    "chain_autoregressive",
    "chain_by_edge",
    "chains_side_by_side",
    "chains_coupled",
    "labelled_mixture",
}
# Those that can be renamed, though the table does not say so.
FURTHER = {
    "chain_mixture_emissions",
    "chain_covariates",
    "chain_several",
    "chain_panel",
}


def found_in(problem: Problem) -> tuple[Renaming, ...]:
    return renamings(pose(problem.model, problem.data, {}), problem.params)


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_what_moves_is_what_the_table_says(problem: Problem) -> None:
    found = found_in(problem)
    own = {frozenset(r.group.axes): r for r in found if r.possible}
    if problem.name in TOLD_APART:
        assert not problem.symmetries
        assert not own
        assert all(r.why for r in found)
    elif problem.name in FURTHER:
        assert own
    else:
        assert set(own) == {frozenset(s.axes) for s in problem.symmetries}
        for known in problem.symmetries:
            renaming = own[frozenset(known.axes)]
            assert set(renaming.group.assignments) <= set(known.sites)
            assert renaming.classes == (tuple(range(problem.states[known.sites[0]])),)
            assert not renaming.why


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name in FURTHER], ids=repr)
def test_what_moves_beyond_the_table_is_right(problem: Problem) -> None:
    """By Pyro's own enumeration."""
    before = trace_enum(problem, problem.data, hide_priors=False)
    for renaming in found_in(problem):
        order = torch.arange(renaming.group.num_states).roll(1)
        after = permute(problem.params, renaming.group, order)
        assert any(not torch.equal(after[n], v) for n, v in problem.params.items())
        value = trace_enum(problem, problem.data, after, hide_priors=False)
        assert value == pytest.approx(before, rel=1e-12)


# ---------------------------------------------------------------------------------------
# Parameters that are no plain selection


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


N = 90
LABEL = torch.arange(N) % 3
T = draws(N, seed=1).exp()
X = draws(N, 3, seed=2)  # as many columns as states: a square table of coefficients
COUNTS = torch.poisson(
    torch.tensor([0.5, 3.0, 9.0]).double()[LABEL] * T, torch.Generator().manual_seed(3)
)
Y = torch.tensor([-6.0, 0.0, 6.0]).double()[LABEL] + X[:, 0] + 0.5 * draws(N, seed=4)


def weights_of(k: int = 3) -> Tensor:
    return pyro.param("weights", torch.ones(k).double() / k, constraint=constraints.simplex)


def exposures(t: Tensor, y: Tensor) -> None:
    weights = weights_of()
    rate = pyro.sample("rate", dist.Gamma(y.new_ones(3) * 2, 0.5).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Poisson(rate[z] * t), obs=y)


def square_regressions(x: Tensor, y: Tensor) -> None:
    weights = weights_of()
    b = pyro.param("b", lambda: torch.randn(3, x.shape[-1]).double())
    scale = pyro.param("scale", y.new_ones(3), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal((b[z] * x).sum(-1), scale[z]), obs=y)


def lines(x: Tensor, y: Tensor) -> None:
    a, b = (pyro.param(n, lambda: torch.randn(3).double()) for n in "ab")
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(y.new_ones(3) / 3))
        pyro.sample("y", dist.Normal(a[z] + b[z] * x[:, 0], 1.0), obs=y)


def links(x: Tensor, y: Tensor) -> None:
    weights = weights_of()
    loc, r, s = (pyro.param(n, lambda: torch.randn(3).double()) for n in ("loc", "r", "s"))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], softplus(r)[z] + (1 + s**2).sqrt()[z]), obs=y)


def experts(x: Tensor, y: Tensor) -> None:
    """A gate whose last axis is that of the states, square as well."""
    gate = pyro.param("gate", lambda: 0.1 * torch.randn(3, 3).double())
    loc = pyro.param("loc", lambda: torch.randn(3).double())
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(logits=x @ gate))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def two_steps(x: Tensor, y: Tensor) -> None:
    """A softmax of transitions, and emissions that are no selection: both steps move together."""
    first = pyro.param("first", lambda: torch.ones(3).double() / 3, constraint=constraints.simplex)
    ways = pyro.param("ways", lambda: torch.randn(3, 3).double())
    b = pyro.param("b", lambda: torch.randn(3).double())
    with pyro.plate("rows", len(y)):
        before = pyro.sample("z", dist.Categorical(first))
        pyro.sample("x", dist.Normal(b[before] * 2 + x[:, 1], 1.0), obs=x[:, 0])
        after = pyro.sample("w", dist.Categorical(ways.softmax(-1)[before]))
        pyro.sample("y", dist.Normal(b[after] * x[:, 2], 1.0), obs=y)


def one_of_two(x: Tensor, y: Tensor) -> None:
    """A binary assignment whose probability is a function of coefficients."""
    c = pyro.param("c", lambda: torch.randn(3).double())
    b = pyro.param("b", lambda: torch.randn(2).double())
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(logits=x @ c))
        pyro.sample("y", dist.Normal(b[z.long()] * (1 + x[:, 0] ** 2), 1.0), obs=y)


def population(x: Tensor, y: Tensor) -> None:
    """Centres of the states that only a prior knows."""
    weights = weights_of()
    centre = pyro.sample("centre", dist.Normal(y.new_zeros(3), 5.0).to_event(1))
    loc = pyro.sample("loc", dist.Normal(centre, 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def kinds(components: int = 3) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any, str]]:
    """Programs, their data, the axes that move, and a parameter to order by."""
    chain = draws(2, 12, 1, seed=7)
    size = torch.full((N,), 20.0).double()
    regressions = models.mixture_of_regressions
    return {
        "exposures": (exposures, (T, COUNTS), {("weights", 0), ("rate", 0)}, "rate"),
        "square": (square_regressions, (X, Y), {("weights", 0), ("b", 0), ("scale", 0)}, "weights"),
        "lines": (lines, (X, Y), {("a", 0), ("b", 0)}, "b"),
        "links": (links, (X, Y), {("weights", 0), ("loc", 0), ("r", 0), ("s", 0)}, "s"),
        "experts": (experts, (X, Y), {("gate", 1), ("loc", 0)}, "gate"),
        "steps": (two_steps, (X, Y), {("first", 0), ("ways", 0), ("ways", 1), ("b", 0)}, "ways"),
        "binary": (one_of_two, (X, Y), {("b", 0)}, "b"),
        "population": (population, (X, Y), {("weights", 0), ("centre", 0), ("loc", 0)}, "centre"),
        "normal regressions": (
            regressions(components),
            (X, Y),
            {("weights", 0), ("coefficients", 0), ("scale", 0)},
            "coefficients",
        ),
        "counts": (
            regressions(components, "poisson", intercept=True),
            (X, COUNTS, None, T),
            {("weights", 0), ("coefficients", 0)},
            "weights",
        ),
        "trials": (
            regressions(components, "binomial", concomitant=True),
            (X, COUNTS.clamp(max=20), None, size),
            {("gate", 0), ("coefficients", 0)},
            "gate",
        ),
        "poisson": (
            models.poisson_mixture(components),
            (COUNTS[:, None], None, T),
            {("weights", 0), ("rate", 0)},
            "weights",
        ),
        "noise": (
            models.gaussian_mixture_with_noise(components, 20.0, "diagonal"),
            (Y[:, None],),
            {("weights", 0), ("loc", 0), ("scale", 0)},
            "loc",
        ),
        "t": (
            models.student_t_mixture(components, "diagonal"),
            (Y[:, None],),
            {("weights", 0), ("loc", 0), ("scale", 0), ("df", 0)},
            "df",
        ),
        "chain": (
            models.hidden_markov(components, covariance="diagonal"),
            (chain,),
            {("initial", 0), ("transition", 0), ("transition", 1), ("loc", 0), ("scale", 0)},
            "transition",
        ),
    }


def short(model: Callable[..., Any], data: tuple[Any, ...], **settings: Any) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that were too few
        return EM(max_iter=2, keep_path=True).fit(model, *data, init="random", **settings)


def agrees(fit: Fit) -> None:
    assert sum(fit.problem.parts(fit.params)) == pytest.approx(fit.log_joint, rel=1e-10)


@pytest.mark.parametrize("name", list(kinds()))
def test_a_fit_in_another_order_is_the_same_fit(name: str) -> None:
    model, data, axes, by = kinds()[name]
    fit = short(model, data)
    agrees(fit)
    (renaming,) = (r for r in fit.renamings if r.axes_of(by))
    assert renaming.group.axes == axes
    found = fit.ordered(by)
    agrees(found)
    index = tuple(slice(None) if (by, i) in axes else 0 for i in range(found.params[by].dim()))
    key = found.params[by][index]
    rising = key.diagonal() if key.dim() == 2 else key
    assert bool((rising.diff() >= 0).all())
    # Whatever the order, all of what moves has moved, and comes back.
    order = torch.arange(renaming.group.num_states)
    count = len(max(renaming.classes, key=len))
    order[:count] = order[:count].roll(1)
    turned = permute(fit.params, renaming.group, order)
    assert sum(fit.problem.parts(turned)) == pytest.approx(fit.log_joint, rel=1e-10)
    assert all(not torch.equal(turned[n], fit.params[n]) for n, _ in axes)
    back = match(fit, _with(fit, turned))
    for n, value in turned.items():
        torch.testing.assert_close(back[n], value, rtol=1e-9, atol=1e-9)


def _with(fit: Fit, params: dict[str, Tensor]) -> Fit:
    return replace(fit, params=params)


def test_ends_of_one_optimum_are_alike_whatever_their_labels() -> None:
    """The optimum, found from both orders, by two solvers."""
    for model, data in (
        (models.poisson_mixture(2), (COUNTS[LABEL != 1][:, None], None, T[LABEL != 1])),
        (models.mixture_of_regressions(2, intercept=True), (X[LABEL != 1], Y[LABEL != 1])),
    ):
        fit = EM(tol=1e-10).fit(model, *data)
        other = {n: v.flip(0) for n, v in fit.params.items()}
        mirror = MAP(tol=1e-10).fit(model, *data, init=other)
        assert abs(mirror.log_joint - fit.log_joint) < 1e-6
        gaps = [float((mirror.params[n] - v).abs().max()) for n, v in fit.params.items()]
        assert max(gaps) > 1.0
        assert parameter_difference(mirror, fit) < 1e-3


def test_a_comparison_sees_through_labels() -> None:
    model, data = models.poisson_mixture(2), (COUNTS[LABEL != 1][:, None], None, T[LABEL != 1])
    solvers = {"a": EM(tol=1e-10), "b": MAP(tol=1e-10)}
    study = compare(model, *data, solvers=solvers, init="random", seeds=4)
    ends = [fit for own in study.comparisons.values() for fit in own.fits.values()]
    assert {int(fit.params["rate"].argmax()) for fit in ends} == {0, 1}
    assert all(max(row.parameter_difference) < 1e-3 for row in study.rows)


# ---------------------------------------------------------------------------------------
# States that cannot change places


def told_by_prior(y: Tensor) -> None:
    weights = weights_of(2)
    prior = dist.Normal(y.new_tensor([6.0, 0.0]), y.new_tensor([0.1, 5.0]))
    loc = pyro.sample("loc", prior.to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def told_by_a_share(y: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(y.new_tensor(3.0), 1.0))
    loc = pyro.param("loc", y.new_tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(loc[z.long()], 1.0), obs=y)


def three(y: Tensor, spread: Tensor) -> None:
    weights = weights_of()
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(3), spread).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


EVEN, UNEVEN = torch.full((3,), 9.0).double(), torch.tensor([2.0, 9.0, 9.0]).double()
PLACES = {"loc": torch.tensor([6.0, 0.0, -6.0]).double()}


@pytest.mark.parametrize(
    ("model", "data", "why"),
    [
        (told_by_prior, (Y,), "the prior of 'loc' differs by state"),
        (told_by_a_share, (Y,), "the prior of 'share' differs by state"),
        (BY_NAME["ordered_means"].model, BY_NAME["ordered_means"].data, "constraint of 'loc'"),
        (BY_NAME["labelled_mixture"].model, BY_NAME["labelled_mixture"].data, "log-likelihood"),
    ],
)
def test_states_that_are_told_apart_keep_their_names(
    model: Callable[..., Any], data: tuple[Any, ...], why: str
) -> None:
    fit = short(model, data)
    with pytest.raises(SettingError, match=rf"ordered: .*cannot be renamed: .*{why}"):
        fit.ordered("loc")
    other = {n: v.flip(0) if v.dim() else v for n, v in fit.params.items()}
    for name, value in match(_with(fit, other), fit).items():
        assert torch.equal(value, other[name])


def test_elements_that_are_held_keep_their_names() -> None:
    held = torch.tensor([True, False, False])
    fit = EM(fixed={"loc": held}).fit(three, Y, EVEN, init=PLACES)
    (renaming,) = fit.renamings
    assert renaming.classes == ((0,), (1, 2))
    found = fit.ordered("loc")  # the other two are renamed
    agrees(found)
    assert found.params["loc"][0] == 6.0
    assert bool((found.params["loc"][1:].diff() > 0).all())
    assert torch.equal(found.params["weights"], fit.params["weights"][[0, 2, 1]])
    fit = EM(fixed={"loc": ~held}).fit(three, Y, EVEN, init={"loc": PLACES["loc"]})
    with pytest.raises(SettingError, match="elements of 'loc' are held, and differ by state"):
        fit.ordered("weights")
    shares = {**PLACES, "weights": torch.tensor([0.2, 0.3, 0.5]).double()}
    fit = EM(fixed=["weights"]).fit(three, Y, EVEN, init=shares)
    with pytest.raises(SettingError, match="'weights' are held"):
        fit.ordered("loc")
    shares["weights"] = torch.ones(3).double() / 3  # alike for all: no name hangs on it
    fit = EM(fixed=["weights"]).fit(three, Y, EVEN, init=shares)
    agrees(fit.ordered("loc"))


def test_a_prior_that_tells_one_state_apart_leaves_the_others() -> None:
    fit = EM().fit(three, Y, UNEVEN, init=PLACES)
    (renaming,) = fit.renamings
    assert (renaming.classes, renaming.possible) == (((0,), (1, 2)), True)
    assert "the prior of 'loc'" in renaming.why
    found = fit.ordered("loc")
    agrees(found)
    mirror = EM().fit(three, Y, UNEVEN, init={"loc": PLACES["loc"][[0, 2, 1]]})
    assert parameter_difference(mirror, fit) < 1e-3
    elsewhere = EM().fit(three, Y, UNEVEN, init={"loc": PLACES["loc"].flip(0)})
    assert parameter_difference(elsewhere, fit) > 0.5  # another optimum


# ---------------------------------------------------------------------------------------
# What else a fit holds


def test_the_path_is_renamed() -> None:
    fit = EM(keep_path=True, max_iter=20).fit(three, Y, EVEN, init=PLACES)
    found = fit.ordered("loc")
    assert not torch.equal(found.params["loc"], fit.params["loc"])
    assert len(found.path) == len(fit.path) > 2
    for name, value in found.params.items():
        assert torch.equal(found.path[-1][name], value)
    for own, old in zip(found.path, fit.path, strict=True):
        assert sum(fit.problem.parts(own)) == pytest.approx(sum(fit.problem.parts(old)), rel=1e-12)
        assert torch.equal(own["loc"], old["loc"].flip(0))


def test_the_approximation_is_renamed() -> None:
    fit = SVI(guide="normal", max_iter=5).fit(three, Y, EVEN, init=PLACES)
    found = fit.ordered("loc")
    assert not torch.equal(found.params["loc"], fit.params["loc"])
    a, b = fit.approximation.draw(5, seed=3), found.approximation.draw(5, seed=3)
    order = fit.params["loc"].argsort()
    assert torch.equal(b["loc"], a["loc"][:, order])
    assert found.approximation.elbo == fit.approximation.elbo
