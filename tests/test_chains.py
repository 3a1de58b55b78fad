"""Hidden Markov models: how they are read and fitted, and what a fit says of sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hmmlearn.hmm as hmm
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from problems import PROBLEMS
from pyro import poutine
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform, constraints

import pyroem
from pyroem import EM, MAP, SVI, DataError, Fit, ModelError, SettingError, datasets
from pyroem._pyro import isolated
from pyroem.estep import scan
from pyroem.estep.scan import Chains, Smoothed, smooth
from pyroem.estep.trace import posterior
from pyroem.problem import pose
from pyroem.structure import Held

BY_NAME = {p.name: p for p in PROBLEMS}
DOUBLE: Any = {"dtype": torch.float64}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(name: str, *data: Tensor) -> Fit:
    """A fit of a problem that has hardly moved from its own point."""
    problem = BY_NAME[name]
    return EM(max_iter=1).fit(problem.model, *(data or problem.data), init=problem.params)


# ---------------------------------------------------------------------------------------
# Forward-backward by itself


def by_hand(chains: Chains, weights: Tensor) -> Smoothed:
    """All paths, one after the other."""
    steps, sequences, k = chains.emit.shape
    value = torch.zeros(sequences, **DOUBLE)
    states = torch.zeros(steps + 1, sequences, k, **DOUBLE)
    pairs = torch.zeros(steps, sequences, k, k, **DOUBLE)
    pair = chains.pair.expand(max(steps, 1), sequences, k, k)
    for n in range(sequences):
        end = int(chains.ends[n])
        paths = list(itertools.product(range(k), repeat=end + 1))
        logs = []
        for path in paths:
            total = chains.start[n, path[0]]
            for t in range(end):
                total = total + pair[t, n, path[t], path[t + 1]] + chains.emit[t, n, path[t + 1]]
            logs.append(total)
        value[n] = torch.stack(logs).logsumexp(0)
        for share, path in zip(torch.stack(logs).softmax(0) * weights[n], paths, strict=True):
            for t in range(end + 1):
                states[t, n, path[t]] += share
            for t in range(end):
                pairs[t, n, path[t], path[t + 1]] += share
    away = [d for d in (0, 1) if chains.pair.shape[d] == 1]
    return Smoothed(value, states, pairs.sum(away, keepdim=True) if away else pairs)


def some_chains(
    steps: int, sequences: int, k: int, by: str = "", size: float = 1.0, zeros: bool = False
) -> Chains:
    generator = seeded(steps + 10 * sequences + 100 * k)
    shape = (steps if "t" in by and steps else 1, sequences if "n" in by else 1, k, k)
    matrix = torch.randn(shape, generator=generator, **DOUBLE).softmax(-1)
    if zeros:
        matrix = matrix * torch.ones(k, k, **DOUBLE).triu()
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return Chains(
        torch.randn(sequences, k, generator=generator, **DOUBLE).log_softmax(-1),
        matrix.log(),
        size * torch.randn(steps, sequences, k, generator=generator, **DOUBLE),
        torch.randint(0, steps + 1, (sequences,), generator=generator),
    )


both_ways = pytest.mark.parametrize("fast", [True, False], ids=["compiled", "torch"])


@both_ways
@pytest.mark.parametrize("by", ["", "t", "n", "tn"])
@pytest.mark.parametrize(("steps", "sequences", "k"), [(0, 2, 2), (1, 1, 3), (4, 3, 2), (3, 2, 3)])
def test_forward_backward_equals_all_paths(
    steps: int, sequences: int, k: int, by: str, fast: bool
) -> None:
    for size, zeros in ((1.0, False), (30.0, True), (1000.0, False), (1000.0, True)):
        chains = some_chains(steps, sequences, k, by, size, zeros)
        weights = torch.rand(sequences, generator=seeded(5), **DOUBLE)
        found, wanted = smooth(chains, weights, fast), by_hand(chains, weights)
        torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood)
        torch.testing.assert_close(found.states, wanted.states, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.pairs, wanted.pairs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_long_chains_in_torch_and_compiled(size: float, zeros: bool) -> None:
    """The blocks of the one are not the steps of the other; ends differ by sequence."""
    chains = some_chains(1500, 2, 3, size=size, zeros=zeros)
    weights = torch.tensor([1.0, 0.5], **DOUBLE)
    a, b = smooth(chains, weights), smooth(chains, weights, fast=False)
    torch.testing.assert_close(a.log_likelihood, b.log_likelihood, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(a.states, b.states, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(a.pairs, b.pairs, rtol=1e-8, atol=1e-8)


def test_a_million_steps() -> None:
    steps = 1_000_000
    chains = some_chains(steps, 1, 2, size=30.0)
    chains = Chains(chains.start, chains.pair, chains.emit, torch.tensor([steps]))
    found = smooth(chains, torch.ones(1, **DOUBLE))
    assert bool(found.log_likelihood.isfinite())
    total = found.states.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)
    assert float(found.pairs.sum()) == pytest.approx(steps, rel=1e-10)
    # Cut in two at a step whose state is all but certain, the parts add up.
    sure = int((found.states[400_000:600_000, 0].amax(-1) > 1 - 1e-14).nonzero()[0]) + 400_000
    first = Chains(chains.start, chains.pair, chains.emit[:sure], torch.tensor([sure]))
    start = torch.where(found.states[sure] > 0.5, 0.0, -torch.inf)
    rest = Chains(start, chains.pair, chains.emit[sure:], torch.tensor([steps - sure]))
    one = torch.ones(1, **DOUBLE)
    parts = smooth(first, one).log_likelihood + smooth(rest, one).log_likelihood
    torch.testing.assert_close(parts, found.log_likelihood, rtol=1e-12, atol=1e-6)


@both_ways
def test_viterbi_equals_all_paths(fast: bool) -> None:
    for zeros, by in ((False, "t"), (True, ""), (False, "n")):
        chains = some_chains(5, 3, 2, by, 2.0, zeros)
        path = scan.best_path(chains, fast)
        pair = chains.pair.expand(5, 3, 2, 2)
        for n in range(3):
            end = int(chains.ends[n])
            best = max(
                itertools.product(range(2), repeat=end + 1),
                key=lambda p, n=n, end=end: float(  # type: ignore[misc]
                    chains.start[n, p[0]]
                    + sum(
                        pair[t, n, p[t], p[t + 1]] + chains.emit[t, n, p[t + 1]] for t in range(end)
                    )
                ),
            )
            assert tuple(path[: end + 1, n].tolist()) == best


# ---------------------------------------------------------------------------------------
# Reading


def gaussian_chain(x: Tensor, k: int = 2) -> None:
    """A chain of Gaussians, by pyroem's own loop."""
    even = x.new_ones(k, k) / k
    initial = pyro.param("initial", even[0], constraint=constraints.simplex)
    transition = pyro.param("transition", even, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.linspace(-1, 1, k).to(x))
    scale = pyro.param("scale", x.new_ones(k), constraint=constraints.positive)
    z = None
    for t in pyroem.markov(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], scale[z]), obs=x[t])


def test_reading_takes_as_many_runs_however_long_the_chain_is() -> None:
    runs = []
    for steps in (40, 4000, 400_000):
        count = [0]

        def counted(x: Tensor, count: list[int] = count) -> None:
            gaussian_chain(x)
            count[0] += 1

        x = torch.randn(steps, generator=seeded(), **DOUBLE)
        problem = pose(counted, (x,), {})
        assert problem.structure.chains[0].length == steps
        assert problem.structure.num_rows == steps
        runs.append(count[0])
    assert max(runs) <= runs[0] + 3


def test_a_chain_read_on_some_steps_is_the_chain_of_all() -> None:
    x = torch.randn(3000, generator=seeded(), **DOUBLE) + (torch.arange(3000) // 50 % 2) * 3
    ours = EM(max_iter=5).fit(gaussian_chain, x, init={"loc": [-0.5, 2.0]})

    def unmodified(x: Tensor) -> None:
        steps, pyroem.markov = pyroem.markov, lambda count: pyro.markov(range(count))  # type: ignore[assignment]
        try:
            gaussian_chain(x)
        finally:
            pyroem.markov = steps

    theirs = EM(max_iter=5).fit(unmodified, x, init={"loc": [-0.5, 2.0]})
    loops = [fit.problem.plan.structure.program.loops for fit in (ours, theirs)]
    assert all(own is not None for own in loops)
    assert len(loops[0].steps) < 1500 < len(loops[1].steps)  # type: ignore[union-attr]
    assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-12)
    for name, value in theirs.params.items():
        torch.testing.assert_close(ours.params[name], value, rtol=1e-9, atol=1e-9)


REFUSED: dict[str, tuple[str, Callable[..., None]]] = {}


def refused(match: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A program whose loop cannot run as one, and what is said of it."""

    def note(program: Callable[..., None]) -> Callable[..., None]:
        REFUSED[program.__name__] = match, program
        return program

    return note


def states(x: Tensor) -> tuple[Tensor, Tensor]:
    transition = pyro.param(
        "transition", x.new_tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex
    )
    return transition, pyro.param("loc", x.new_tensor([-1.0, 1.0]))


@refused("take an earlier")
def carries_an_observation(x: Tensor) -> None:
    transition, loc = states(x)
    z: Any = 0
    before = x.new_zeros(())
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z] + 0.3 * before, 1.0), obs=x[t])
        before = x[t]


@refused("comes out differently at different steps")
def asks_for_one_step(x: Tensor) -> None:
    transition, loc = states(x)
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        spread = 2.0 if t == 3 else 1.0
        pyro.sample(f"x_{t}", dist.Normal(loc[z], spread), obs=x[t])


@refused("history=2")
def looks_back_twice(x: Tensor) -> None:
    transition, loc = states(x)
    z: Any = 0
    y: Any = 0
    for t in pyro.markov(range(len(x)), history=2):
        y, z = z, pyro.sample(f"z_{t}", dist.Categorical((transition[z] + transition[y]) / 2))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])


@refused("carried from step to step together")
def two_chains_in_one_observation(x: Tensor) -> None:
    transition, loc = states(x)
    z: Any = 0
    w: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        w = pyro.sample(f"w_{t}", dist.Categorical(transition[w]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z] + 3 * loc[w], 1.0), obs=x[t])


@refused("'regime', outside the loop")
def has_a_state_for_all_steps(x: Tensor) -> None:
    transition, loc = states(x)
    regime = pyro.sample("regime", dist.Categorical(x.new_tensor([0.5, 0.5])))
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z] + 2.0 * regime, 1.0), obs=x[t])


@refused("does not run over range")
def runs_backwards(x: Tensor) -> None:
    transition, loc = states(x)
    z: Any = 0
    for t in pyro.markov(reversed(range(len(x)))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_unrolled_and_says_so(name: str) -> None:
    match, program = REFUSED[name]
    x = torch.randn(6, generator=seeded(), **DOUBLE)
    fit, by_trace = EM(max_iter=3).fit(program, x), EM(max_iter=3, engine="trace").fit(program, x)
    assert not fit.problem.structure.chains
    assert match in fit.explain()
    assert fit.log_likelihood == pytest.approx(by_trace.log_likelihood, rel=1e-12)
    with pytest.raises(ModelError, match="not read as a chain"):
        fit.filter()


def test_a_long_loop_that_cannot_run_as_one_is_an_error() -> None:
    def carries(x: Tensor) -> None:
        transition, loc = states(x)
        z: Any = 0
        before = x.new_zeros(())
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z] + 0.3 * before, 1.0), obs=x[t])
            before = x[t]

    with pytest.raises(ModelError, match=r"cannot be read as one step.*x\[t - 1\]"):
        EM().fit(carries, torch.randn(9000, generator=seeded(), **DOUBLE))


def test_late_steps_are_compared_too() -> None:
    """What a string says of a step is told from what it says of another."""

    def spelt(x: Tensor) -> None:
        transition, loc = states(x)
        z: Any = 0
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            shift = 50.0 if f"{t}" >= "30" else 0.0
            pyro.sample(f"x_{t}", dist.Normal(loc[z] + shift, 1.0), obs=x[t])

    fit = EM(max_iter=1).fit(spelt, torch.randn(100, generator=seeded(), **DOUBLE))
    assert not fit.problem.structure.chains


def test_steps_in_arithmetic() -> None:
    """Seasons, trends and comparisons with tensors."""

    def seasonal(x: Tensor, late: Tensor) -> None:
        transition, loc = states(x)
        season = pyro.param("season", x.new_tensor([0.0, 0.5, -0.5]))
        z: Any = 0
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            mean = loc[z] + season[t % 3] + 0.01 * t + (t + 1) / 100 - (2 - t) * 0.001
            with poutine.mask(mask=t >= late):
                pyro.sample(f"x_{t}", dist.Normal(mean, 1.0), obs=x[t])

    data = torch.randn(12, generator=seeded(), **DOUBLE), torch.tensor(2)
    fit = EM(max_iter=4).fit(seasonal, *data)
    by_trace = EM(max_iter=4, engine="trace").fit(seasonal, *data)
    assert fit.problem.structure.chains
    assert fit.log_likelihood == pytest.approx(by_trace.log_likelihood, rel=1e-12)


@pytest.mark.parametrize("length", [0, -1, 2.5, "ten", True])
def test_markov_refuses(length: Any) -> None:
    with pytest.raises(SettingError, match="markov"):
        pyroem.markov(length)


# ---------------------------------------------------------------------------------------
# What a fit says of sequences


CHAINED = [
    p for p in PROBLEMS if p.name.startswith("chain") and at(p.name).problem.structure.chains
]
chained = pytest.mark.parametrize("name", [p.name for p in CHAINED])


@chained
def test_decoding_equals_the_unrolled_program(name: str) -> None:
    problem, fit = BY_NAME[name], at(name)
    structure = pose(problem.model, problem.data, {}, engine="trace").structure
    for method, backend in (("joint", "logmax"), ("marginal", "logsum")):
        with isolated(torch.float64):
            marginals = posterior(structure, fit.params, backend=backend).marginals
        wanted = {z: p.argmax(-1) for z, p in marginals.items()}
        if name == "chain_ragged" and method == "joint":
            continue  # the unrolled path is chosen with what comes after the end: see below
        found = fit.predict(method=method)
        found = (
            {fit.problem.structure.chains[0].name: found} if isinstance(found, Tensor) else found
        )
        for z, path in found.items():
            steps = [wanted[f"{z}_{t}"] for t in range(path.shape[-1])]
            assert torch.equal(path, torch.stack(steps, -1)), (method, z)


@chained
def test_other_sequences_and_rows(name: str) -> None:
    problem, fit = BY_NAME[name], at(name)
    if problem.row_plate is None:
        assert float(fit.log_prob()) == pytest.approx(fit.log_likelihood)
        shorter = tuple(x[:5] for x in problem.data)
        value = float(pyroem.log_joint(problem.model, fit.params, *shorter))
        prior = float(sum(pose(problem.model, shorter, {}).log_joint(fit.params)[1:]))
        assert float(fit.log_prob(*shorter)) == pytest.approx(value - prior)
        return
    some = tuple(x[3:9] for x in problem.data)
    rows = fit.log_prob()
    torch.testing.assert_close(fit.log_prob(*some), rows[3:9])
    assert float(rows.sum()) == pytest.approx(fit.log_likelihood)
    whole, part = fit.predict(), fit.predict(*some)
    if isinstance(whole, Tensor):
        assert torch.equal(part, whole[3:9])
    else:
        assert all(torch.equal(part[z], whole[z][3:9]) for z in whole)


def forward(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Filtered probabilities of ``gaussian_chain`` by the textbook's recursion."""
    seen = dist.Normal(params["loc"], params["scale"]).log_prob(x.unsqueeze(-1)).exp()
    found = [params["initial"] * seen[0]]
    for own in seen[1:]:
        found.append((found[-1] / found[-1].sum()) @ params["transition"] * own)
    return torch.stack([p / p.sum() for p in found])


def sticky_data(steps: int) -> Tensor:
    noise = torch.randn(steps, generator=seeded(1), **DOUBLE)
    return noise + 2.5 * (torch.arange(steps) // 7 % 2)


def test_filter_and_forecast() -> None:
    x = sticky_data(60)
    fit = EM().fit(gaussian_chain, x, init={"loc": [0.0, 2.5]})
    wanted = forward(fit.params, x)
    whole = fit.filter()
    torch.testing.assert_close(whole.probs["z"], wanted)
    assert float(whole.log_prob) == pytest.approx(fit.log_likelihood)
    state, total = fit.filter(x[:40]), 0.0
    total += float(state.log_prob)
    for t in range(40, 60):  # one observation at a time
        state = fit.filter(x[t : t + 1], state=state)
        total += float(state.log_prob)
        torch.testing.assert_close(state.last["z"], wanted[t])
    assert total == pytest.approx(fit.log_likelihood)
    again = fit.filter(x[39:], state=fit.filter(x[:40]), overlap=True)
    torch.testing.assert_close(again.probs["z"], wanted[40:])
    ahead = fit.forecast(4)
    probs = wanted[-1]
    for h in range(4):
        probs = probs @ fit.params["transition"]
        torch.testing.assert_close(ahead.states["z"][h], probs)
        components = dist.Normal(fit.params["loc"], fit.params["scale"])
        mixture = dist.MixtureSameFamily(dist.Categorical(probs), components)
        value = ahead.observations["x"].log_prob(torch.full((4,), 0.7, **DOUBLE))[h]
        torch.testing.assert_close(value, mixture.log_prob(torch.tensor(0.7, **DOUBLE)))
        torch.testing.assert_close(ahead.mean["x"][h], mixture.mean)


def test_filter_of_many_sequences_and_of_programs_that_look_back() -> None:
    fit = at("chain_sequences")
    (x,) = BY_NAME["chain_sequences"].data
    whole = fit.filter()
    parts = fit.filter(x[:, :2])
    parts = fit.filter(x[:, 2:], state=parts)
    torch.testing.assert_close(parts.probs["z"], whole.probs["z"][:, 2:])
    assert fit.forecast(3).states["z"].shape == (60, 3, 3)
    assert fit.forecast(3).mean["x"].shape == (60, 3)
    fit = at("chain_autoregressive")
    (x,) = BY_NAME["chain_autoregressive"].data
    parts = fit.filter(x[:, :3])
    rest = fit.filter(x[:, 2:], state=parts, overlap=True)
    torch.testing.assert_close(rest.probs["z"], fit.filter().probs["z"][:, 3:])
    with pytest.raises(ModelError, match="differs by step"):
        fit.forecast(2)
    fit, data = at("chain_covariates"), BY_NAME["chain_covariates"].data
    with pytest.raises(SettingError, match="overlap=True"):
        fit.filter(*(x[:, 2:] for x in data), state=fit.filter(*(x[:, :2] for x in data)))
    with pytest.raises(SettingError, match="60 sequence"):
        at("chain_sequences").filter(state={"z": torch.ones(3, 3)})


def test_residuals() -> None:
    x = sticky_data(8)
    fit = EM(max_iter=3).fit(gaussian_chain, x, init={"loc": [0.0, 2.5]})
    p = fit.params
    below = dist.Normal(p["loc"], p["scale"]).cdf(x.unsqueeze(-1))
    filtered = forward(p, x)
    before = torch.cat([p["initial"].unsqueeze(0), filtered[:-1] @ p["transition"]])
    wanted = scipy.stats.norm.ppf((before * below).sum(-1).numpy())
    np.testing.assert_allclose(fit.residuals()["x"].numpy(), wanted, rtol=1e-8)
    ordinary = []
    for t in range(8):  # the weight of each state, where the step shows nothing
        densities = []
        for k in range(2):
            values = []
            for path in itertools.product(range(2), repeat=8):
                if path[t] != k:
                    continue
                value = math.log(p["initial"][path[0]])
                for s in range(8):
                    value += math.log(p["transition"][path[s - 1], path[s]]) if s else 0.0
                    own = dist.Normal(p["loc"][path[s]], p["scale"][path[s]])
                    value += float(own.log_prob(x[s])) if s != t else 0.0
                values.append(value)
            densities.append(torch.tensor(values).logsumexp(0))
        ordinary.append(float((torch.stack(densities).softmax(0) * below[t]).sum()))
    found = fit.residuals(kind="ordinary")["x"].numpy()
    np.testing.assert_allclose(found, scipy.stats.norm.ppf(ordinary), rtol=1e-5)
    with pytest.raises(SettingError, match="kind"):
        fit.residuals(kind="both")
    with pytest.raises(ModelError, match="vectors"):
        at("chain_several").residuals()


def test_residuals_of_counts_are_normal_under_the_model() -> None:
    fit = at("chain_sequences")
    drawn = fit.sample(3000, seed=2)["x"]
    values = fit.residuals(drawn)["x"]
    assert values.shape == drawn.shape
    assert abs(float(values.mean())) < 0.03
    assert float(values.std()) == pytest.approx(1.0, abs=0.03)


@chained
def test_samples_follow_the_chain(name: str) -> None:
    fit, problem = at(name), BY_NAME[name]
    if problem.row_plate is None or "edge" in name or "auto" in name:
        return  # few rows, or what is drawn hangs on the data
    count = 4000
    drawn = fit.sample(count, seed=1)
    first = fit.problem.structure.chains[0]
    z = drawn[first.name]
    assert z.shape == (count, first.length)
    again = fit.sample(count, seed=1)
    assert all(torch.equal(drawn[n], again[n]) for n in drawn)
    if fit.problem.engine.description.find("products") < 0:
        return  # transitions differ by sequence
    matrix = fit.problem.engine.potentials(fit.params)[0].pair.reshape(-1, *[first.num_states] * 2)  # type: ignore[attr-defined]
    counts = torch.zeros(first.num_states, first.num_states)
    counts.index_put_(
        (z[:, :-1].reshape(-1), z[:, 1:].reshape(-1)), torch.ones(()), accumulate=True
    )
    torch.testing.assert_close(
        counts.double() / counts.sum(1, keepdim=True), matrix[0].exp(), rtol=0, atol=0.05
    )


def test_samples_have_the_fitted_emissions() -> None:
    fit = at("chain_mixture_emissions")
    drawn = fit.sample(5000, seed=1)
    assert {name: x.shape[0] for name, x in drawn.items()} == {"z": 5000, "c": 5000, "x": 5000}
    for z, c in itertools.product(range(2), repeat=2):
        own = drawn["x"][(drawn["z"] == z) & (drawn["c"] == c)]
        assert float(own.mean()) == pytest.approx(float(fit.params["loc"][z, c]), abs=0.06)
        share = float(((drawn["z"] == z) & (drawn["c"] == c)).sum() / (drawn["z"] == z).sum())
        assert share == pytest.approx(float(fit.params["mixing"][z, c]), abs=0.04)


# ---------------------------------------------------------------------------------------
# hmmlearn


LENGTHS = [40, 1, 25, 60]
INITIAL = torch.tensor([0.5, 0.3, 0.2], **DOUBLE)
TRANSITION = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.3, 0.2, 0.5]], **DOUBLE)


def ragged(make: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Padded sequences and their lengths; and the rows as hmmlearn takes them."""
    state = (torch.arange(sum(LENGTHS)) // 4) % 3
    rows = make(state)
    parts = rows.split(LENGTHS)
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    return padded, torch.tensor(LENGTHS), rows.numpy()


def chain_of(
    emission: Callable[[Any], Any],
) -> Callable[[Tensor, Tensor], None]:
    """Ragged sequences with an emission of three states."""

    def program(x: Tensor, lengths: Tensor) -> None:
        initial = pyro.param("initial", INITIAL, constraint=constraints.simplex)
        transition = pyro.param("transition", TRANSITION, constraint=constraints.simplex)
        of_state = emission(x)
        with pyro.plate("sequences", len(x)):
            z = None
            for t in pyroem.markov(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    probs = initial if z is None else transition[z]
                    z = pyro.sample(f"z_{t}", dist.Categorical(probs))
                    of_state(z, t)

    return program


def same_as_hmmlearn(theirs: Any, fit: Fit, rows: np.ndarray, pairs: dict[str, np.ndarray]) -> None:
    pairs = {"initial": theirs.startprob_, "transition": theirs.transmat_, **pairs}
    for name, value in pairs.items():
        torch.testing.assert_close(
            fit.params[name], torch.as_tensor(value), rtol=1e-8, atol=1e-8, msg=name
        )
    assert fit.log_likelihood == pytest.approx(theirs.score(rows, LENGTHS), rel=1e-10)
    probs = theirs.predict_proba(rows, LENGTHS)
    ours = fit.responsibilities()
    seen = torch.cat([own[:n] for own, n in zip(ours, LENGTHS, strict=True)])
    np.testing.assert_allclose(seen.numpy(), probs, atol=1e-7)


iterations = pytest.mark.parametrize("count", [1, 10, 100])


def fitted(theirs: Any, rows: np.ndarray) -> Any:
    theirs.startprob_, theirs.transmat_ = INITIAL.numpy(), TRANSITION.numpy()
    return theirs.fit(rows, LENGTHS)


def exactly(count: int) -> EM:
    return EM(max_iter=count, tol=0.0, param_tol=0.0, floor=0.0)


@iterations
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_hmmlearn_gaussian(kind: str, count: int) -> None:
    noise = torch.randn(sum(LENGTHS), 2, generator=seeded(2), **DOUBLE)
    centres = torch.tensor([[-1.0, 0.0], [1.5, 1.0], [0.0, -2.0]], **DOUBLE)
    x, lengths, rows = ragged(lambda z: centres[z] + noise * (0.6 + 0.2 * z.unsqueeze(-1)))
    loc, eye = 0.5 * centres, torch.eye(2, **DOUBLE)
    start: dict[str, Tensor] = {
        "full": eye.repeat(3, 1, 1),
        "tied": eye,
        "diag": torch.ones(3, 2, **DOUBLE),
        "spherical": torch.ones(3, **DOUBLE),
    }
    constraint = {"full": constraints.positive_definite, "tied": constraints.positive_definite}

    def emission(x: Tensor) -> Any:
        means = pyro.param("loc", loc)
        cov = pyro.param("cov", start[kind], constraint=constraint.get(kind, constraints.positive))

        def of_state(z: Any, t: Any) -> None:
            if kind in ("full", "tied"):
                own = cov if kind == "tied" else cov[z]
                d = dist.MultivariateNormal(means[z], covariance_matrix=own)
            else:
                spread = cov[z].sqrt() if kind == "diag" else cov[z].sqrt().unsqueeze(-1)
                d = dist.Normal(means[z], spread).to_event(1)
            pyro.sample(f"x_{t}", d, obs=x[:, t])

        return of_state

    theirs = hmm.GaussianHMM(
        3, kind, min_covar=0, covars_prior=0, covars_weight=0, init_params="", n_iter=count,
        tol=-np.inf,
    )  # fmt: skip
    theirs.means_, theirs.covars_ = loc.numpy(), start[kind].numpy()
    fitted(theirs, rows)
    cov = theirs._covars_[:, 0] if kind == "spherical" else theirs._covars_
    fit = exactly(count).fit(chain_of(emission), x, lengths)
    same_as_hmmlearn(theirs, fit, rows, {"loc": theirs.means_, "cov": cov})


@iterations
def test_hmmlearn_categorical_and_poisson(count: int) -> None:
    noise = torch.rand(sum(LENGTHS), 1, generator=seeded(3), **DOUBLE)
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], **DOUBLE)
    y, lengths, rows = ragged(lambda z: (probs[z].cumsum(-1) < noise).sum(-1, keepdim=True))

    def categories(x: Tensor) -> Any:
        own = pyro.param("probs", 0.5 * probs + 0.5 / 3, constraint=constraints.simplex)
        return lambda z, t: pyro.sample(f"y_{t}", dist.Categorical(own[z]), obs=x[:, t, 0])

    theirs = hmm.CategoricalHMM(3, init_params="", n_iter=count, tol=-np.inf)
    theirs.emissionprob_, theirs.n_features = (0.5 * probs + 0.5 / 3).numpy(), 3
    fitted(theirs, rows)
    fit = exactly(count).fit(chain_of(categories), y, lengths)
    same_as_hmmlearn(theirs, fit, rows, {"probs": theirs.emissionprob_})

    rates = torch.tensor([1.0, 4.0, 9.0], **DOUBLE)
    n, lengths, rows = ragged(lambda z: (rates[z].unsqueeze(-1) + 4 * noise - 2).round().abs())

    def counts(x: Tensor) -> Any:
        rate = pyro.param("rate", rates.sqrt() * 2, constraint=constraints.positive)
        return lambda z, t: pyro.sample(f"n_{t}", dist.Poisson(rate[z]), obs=x[:, t, 0])

    theirs = hmm.PoissonHMM(3, init_params="", n_iter=count, tol=-np.inf)
    theirs.lambdas_ = (rates.sqrt() * 2).numpy()[:, None]
    fitted(theirs, rows.astype(int))
    fit = exactly(count).fit(chain_of(counts), n, lengths)
    same_as_hmmlearn(theirs, fit, rows.astype(int), {"rate": theirs.lambdas_[:, 0]})


@iterations
def test_hmmlearn_mixture_emissions(count: int) -> None:
    noise = torch.randn(sum(LENGTHS), 2, generator=seeded(4), **DOUBLE)
    x, lengths, rows = ragged(lambda z: 2.0 * z.unsqueeze(-1) + noise)
    loc = torch.tensor([[[-1.0, 0], [0, 1]], [[1.5, 2], [2, 3]], [[3.0, 4], [5, 4]]], **DOUBLE)
    mixing = torch.tensor([[0.4, 0.6], [0.5, 0.5], [0.7, 0.3]], **DOUBLE)

    def emission(x: Tensor) -> Any:
        weights = pyro.param("mixing", mixing, constraint=constraints.simplex)
        means = pyro.param("loc", loc)
        var = pyro.param("var", torch.ones(3, 2, 2, **DOUBLE), constraint=constraints.positive)

        def of_state(z: Any, t: Any) -> None:
            c = pyro.sample(f"c_{t}", dist.Categorical(weights[z]))
            pyro.sample(
                f"x_{t}", dist.Normal(means[z, c], var[z, c].sqrt()).to_event(1), obs=x[:, t]
            )

        return of_state

    # Its update of the variances is around the means before: not the maximiser. They stay here.
    theirs = hmm.GMMHMM(
        3, 2, covariance_type="diag", means_prior=0.0, means_weight=0.0, weights_prior=1,
        init_params="", params="stmw", n_iter=count, tol=-np.inf,
    )  # fmt: skip
    theirs.weights_, theirs.means_ = mixing.numpy(), loc.numpy()
    theirs.covars_ = np.ones((3, 2, 2))
    theirs.n_features = 2
    fitted(theirs, rows)
    solver = EM(max_iter=count, tol=0.0, param_tol=0.0, fixed=("var",))
    fit = solver.fit(chain_of(emission), x, lengths)
    pairs = {"initial": theirs.startprob_, "transition": theirs.transmat_}
    pairs |= {"mixing": theirs.weights_, "loc": theirs.means_}
    for name, value in pairs.items():
        torch.testing.assert_close(
            fit.params[name], torch.as_tensor(value), rtol=1e-8, atol=1e-8, msg=name
        )
    assert fit.log_likelihood == pytest.approx(theirs.score(rows, LENGTHS), rel=1e-10)


# ---------------------------------------------------------------------------------------
# Gradients


def test_em_map_and_svi_on_one_chain() -> None:
    x = sticky_data(80)
    init = {"loc": [0.0, 2.0]}
    solvers = {
        "EM": EM(tol=1e-10),
        "L-BFGS": MAP(tol=1e-10),
        "Adam": MAP("adam", lr=0.05),
        "SVI": SVI(max_iter=800),
    }
    table = pyroem.compare(gaussian_chain, x, solvers=solvers, init=init)
    best = table.fits["EM"].log_joint
    for name, fit in table.fits.items():
        assert fit.log_joint == pytest.approx(best, abs=1e-2), name
        assert "matrix products" in fit.explain()
    assert table.fits["L-BFGS"].log_joint == pytest.approx(best, abs=1e-6)


def test_svi_is_pyros_own_step_for_step() -> None:
    x, steps = sticky_data(12), 30
    start = {n: p.value for n, p in pose(gaussian_chain, (x,), {}).structure.parameters.items()}
    start["loc"] = torch.tensor([0.0, 2.0], **DOUBLE)
    options = {"lr": 0.02, "lrd": 1.0, "clip_norm": 1e9}
    solver = SVI(
        max_iter=steps, lr=0.02, decay=1.0, options={"clip_norm": 1e9}, tol=0.0, param_tol=0.0
    )
    ours = solver.fit(gaussian_chain, x, init=start)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        for name, value in start.items():
            positive = constraints.positive if name == "scale" else constraints.real
            simplex = constraints.simplex if name in ("initial", "transition") else positive
            pyro.param(name, value.clone(), constraint=simplex)
        svi = pyro.infer.SVI(
            pyro.infer.config_enumerate(gaussian_chain),
            lambda x: None,
            pyro.optim.ClippedAdam(options),
            pyro.infer.TraceEnum_ELBO(max_plate_nesting=0),
        )
        values = [-svi.step(x) for _ in range(steps + 1)]
    history = [record.log_joint for record in ours.history]
    np.testing.assert_allclose(history, values[: len(history)], rtol=1e-6)
    assert len(history) == steps + 1


# ---------------------------------------------------------------------------------------
# The earthquakes, as in Zucchini, MacDonald and Langrock, Hidden Markov Models for Time Series


def earthquakes() -> Tensor:
    columns, values = datasets.load("earthquakes")
    return values[:, columns.index("count")]


def poisson_chain(x: Tensor, k: int, stationary: bool) -> None:
    stay = 0.8 * torch.eye(k) + 0.2 / k
    transition = pyro.param("transition", stay, constraint=constraints.simplex)
    levels = torch.linspace(10, 30, k) if k > 1 else torch.tensor([20.0])
    rate = pyro.param("rate", levels, constraint=constraints.positive)
    if stationary:
        ones = torch.ones(k, k)
        initial = torch.linalg.solve((torch.eye(k) - transition + ones).mT, ones[0])
    else:
        initial = pyro.param("initial", torch.ones(k) / k, constraint=constraints.simplex)
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t])


@pytest.mark.parametrize(
    ("k", "stationary", "wanted", "rates"),
    [
        (1, True, -391.9189, [19.364]),
        (2, True, -342.3183, [15.472, 26.125]),
        (3, True, -329.4603, [13.146, 19.721, 29.714]),
        (4, True, -327.8316, [11.283, 13.853, 19.695, 29.700]),
        (2, False, -341.8787, [15.421, 26.018]),
        (3, False, -328.5275, [13.134, 19.713, 29.710]),
    ],
)
def test_published_fits(k: int, stationary: bool, wanted: float, rates: list[float]) -> None:
    fit = EM(tol=1e-9, max_iter=3000).fit(poisson_chain, earthquakes(), k, stationary)
    assert fit.log_likelihood == pytest.approx(wanted, abs=1e-4)
    found = fit.params["rate"].sort().values
    np.testing.assert_allclose(found.numpy(), rates, atol=2e-3)
    assert fit.df == k * k if stationary else k * k + k - 1


# ---------------------------------------------------------------------------------------
# Priors, zeros, ties


def test_sticky_rows_and_zeros() -> None:
    """Dirichlet rows with a bonus for staying; entries of zero stay zero."""

    def left_to_right(x: Tensor) -> None:
        ahead = torch.tensor([[10.0, 2.0, 1.0], [1.0, 10.0, 2.0], [1.0, 1.0, 10.0]])
        transition = pyro.sample("transition", dist.Dirichlet(ahead).to_event(1))
        loc = pyro.param("loc", torch.tensor([0.0, 1.0, 2.0]))
        z: Any = 0
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 0.5), obs=x[t])

    x = torch.tensor([0.1, -0.2, 0.0, 1.1, 0.9, 1.2, 2.2, 1.9, 2.0, 2.1], **DOUBLE)
    start = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]], **DOUBLE)
    held = Held("transition", start == 0, start)
    fit = EM(tol=1e-10, fixed=[held]).fit(left_to_right, x, init={"transition": start})
    found = fit.params["transition"]
    assert bool((found[start == 0] == 0).all())
    torch.testing.assert_close(found.sum(-1), torch.ones(3, **DOUBLE))
    by_gradient = MAP(tol=1e-10, fixed=[held]).fit(left_to_right, x, init={"transition": start})
    assert fit.log_joint == pytest.approx(by_gradient.log_joint, abs=1e-6)
    assert fit.predict().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


# ---------------------------------------------------------------------------------------
# What users get wrong


def sequences(x: Tensor, lengths: Tensor) -> None:
    initial = pyro.param("initial", torch.ones(2) / 2, constraint=constraints.simplex)
    transition = pyro.param("transition", torch.ones(2, 2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyroem.markov(x.shape[1]):
            with poutine.mask(mask=t < lengths):
                probs = initial if z is None else transition[z]
                z = pyro.sample(f"z_{t}", dist.Categorical(probs))
                pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[:, t])


def test_sequences_of_length_one_and_none() -> None:
    """They count for what is seen of them."""
    x = torch.randn(6, 7, generator=seeded(), **DOUBLE) + torch.tensor([[-2.0], [2.0]]).repeat(3, 1)
    lengths = torch.tensor([7, 1, 0, 4, 0, 1])
    fit = EM().fit(sequences, x, lengths)
    rows = fit.log_prob()
    assert abs(float(rows[2])) < 1e-12
    kept = lengths > 0
    without = EM().fit(sequences, x[kept], lengths[kept])
    assert fit.log_likelihood == pytest.approx(without.log_likelihood)
    for name, value in without.params.items():
        torch.testing.assert_close(fit.params[name], value)
    spoilt = x.clone()
    spoilt[1, 3] = torch.nan  # beyond the end: it is not looked at
    assert EM().fit(sequences, spoilt, lengths).log_likelihood == pytest.approx(fit.log_likelihood)
    spoilt[0, 3] = torch.inf
    with pytest.raises(DataError, match=r"'x_1'.*inf at index \(2, 0\)"):
        EM().fit(sequences, spoilt, lengths)
    with pytest.raises(DataError, match=r"its mask has shape \(4,\)"):
        EM().fit(sequences, x, lengths[:4])
    with pytest.raises(DataError, match="every cell is masked"):
        EM().fit(sequences, x, 0 * lengths)


def test_one_value_for_all_steps() -> None:
    """Data that does not differ by step, under a mask that does."""

    def constant(x: Tensor, lengths: Tensor) -> None:
        transition, loc = states(x)
        z: Any = 0
        with pyro.plate("sequences", len(x)):
            for t in pyroem.markov(4):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
                    pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x)

    data = torch.randn(3, generator=seeded(), **DOUBLE), torch.tensor([4, 4, 2])
    fit = EM(max_iter=2).fit(constant, *data)
    value = float(pyroem.log_joint(constant, fit.params, *data))
    assert fit.log_likelihood == pytest.approx(value, rel=1e-12)


def test_a_single_chain_with_a_hole() -> None:
    def with_hole(x: Tensor) -> None:
        transition, loc = states(x)
        seen = x.isfinite()
        z: Any = 0
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            with poutine.mask(mask=seen[t]):
                pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])

    x = sticky_data(20)
    x[[0, 5, 6, 19]] = torch.nan
    fit = EM(max_iter=5).fit(with_hole, x)
    unrolled = EM(max_iter=5, engine="trace").fit(with_hole, x)
    # What is missing at the end is left out of the statistics: another path to the same optimum.
    assert fit.history[0].log_joint == pytest.approx(unrolled.history[0].log_joint)
    assert bool(fit.responsibilities().isfinite().all())
    ends = [EM(tol=1e-11, engine=e).fit(with_hole, x).log_likelihood for e in ("auto", "trace")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_states_that_nothing_visits() -> None:
    """Their rows stay as they are; the fit says which state holds no data."""
    x = torch.cat([torch.zeros(20, **DOUBLE), torch.full((20,), 5.0, **DOUBLE)])
    x = x + 0.1 * torch.randn(40, generator=seeded(), **DOUBLE)
    start = {
        "initial": [1.0, 0.0, 0.0],
        "transition": [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.2, 0.3, 0.5]],
        "loc": [0.0, 5.0, 50.0],
    }
    fit = EM(fixed=("scale",)).fit(gaussian_chain, x, 3, init=start)
    assert "state 2 of assignment 'z_0" in fit.message
    assert all(bool(value.isfinite().all()) for value in fit.params.values())
    torch.testing.assert_close(fit.params["transition"][2], torch.tensor([0.2, 0.3, 0.5], **DOUBLE))


def test_states_without_dependence() -> None:
    """A chain that forgets is a mixture; it is fitted as what it says."""

    def forgetful(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(weights))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])

    def mixture(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    x = sticky_data(50)
    a, b = EM().fit(forgetful, x), EM().fit(mixture, x)
    assert a.log_likelihood == pytest.approx(b.log_likelihood)
    assert "does not depend on the step before" in a.explain()


def test_weights_of_sequences_and_of_one_chain() -> None:
    (x,) = BY_NAME["chain_sequences"].data
    program, params = BY_NAME["chain_sequences"].model, BY_NAME["chain_sequences"].params
    twice = EM(max_iter=4).fit(program, torch.cat([x, x[:20]]), init=params)
    weights = torch.ones(60)
    weights[:20] = 2
    weighted = EM(max_iter=4).fit(program, x, init=params, weights=weights)
    assert weighted.log_likelihood == pytest.approx(twice.log_likelihood)
    assert weighted.icl() == pytest.approx(twice.icl())
    with pytest.raises(SettingError, match="no plate of independent rows"):
        EM().fit(gaussian_chain, sticky_data(9), weights=torch.ones(9))


def test_single_precision() -> None:
    x = sticky_data(200)
    double = EM(max_iter=5).fit(gaussian_chain, x, init={"loc": [0.0, 2.0]})
    single = EM(max_iter=5, dtype=torch.float32).fit(gaussian_chain, x, init={"loc": [0.0, 2.0]})
    assert single.params["loc"].dtype == torch.float32
    torch.testing.assert_close(
        single.params["loc"].double(), double.params["loc"], rtol=0, atol=1e-3
    )


def test_padding_changes_nothing() -> None:
    """Neither the best path, nor where a filter and a forecast go on."""
    x = torch.randn(6, 4, generator=seeded(4), **DOUBLE)
    lengths = torch.tensor([4, 4, 2, 3, 4, 0])
    start = {"initial": [0.6, 0.4], "transition": [[0.95, 0.05], [0.45, 0.55]], "loc": [0.0, 1.0]}
    fit = EM(max_iter=1, fixed=tuple(start)).fit(sequences, x, lengths, init=start)
    padded = torch.cat([x, torch.zeros(6, 20, **DOUBLE)], 1)
    paths = fit.predict(x, lengths), fit.predict(padded, lengths)
    for row, length in enumerate(lengths):
        assert torch.equal(paths[0][row, :length], paths[1][row, :length])
    a, b = (fit.filter(y, lengths).last["z"] for y in (x, padded))
    torch.testing.assert_close(a, b, equal_nan=True)
    assert bool(a[5].isnan().all())
    a, b = (fit.forecast(2, y, lengths).states["z"] for y in (x, padded))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a[5, 0], torch.tensor([0.6, 0.4], **DOUBLE))
    # One step after another, of unequal lengths: the whole.
    state, total = None, torch.zeros(6, **DOUBLE)
    for t in range(4):
        one = (lengths > t).long()
        state = fit.filter(x[:, t : t + 1], one, state=state)
        total = total + state.log_prob
    torch.testing.assert_close(total, fit.log_prob(x, lengths))
    with pytest.raises(SettingError, match="got Tensor"):
        fit.filter(x, lengths, state=torch.ones(6, 2))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------
# Layouts and names


def turns() -> Any:
    start = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    return pyro.param("transition", start, constraint=constraints.simplex)


def ways() -> tuple[Tensor, Tensor]:
    return turns(), pyro.param("loc", torch.tensor([-1.0, 1.0]))


def after(z: Any, transition: Tensor) -> Any:
    return dist.Categorical(transition[0] if z is None else transition[z])


def two_loops(x: Tensor, y: Tensor) -> None:
    """Chains of different lengths, in plates of different sizes."""
    transition, loc = ways()
    for name, data in (("u", x), ("v", y)):
        z = None
        with pyro.plate(name, data.shape[1]):
            for t in pyro.markov(range(len(data))):
                z = pyro.sample(f"z{name}_{t}", after(z, transition))
                pyro.sample(f"{name}_{t}", dist.Normal(loc[z], 1.0), obs=data[t])


def one_stem(x: Tensor, y: Tensor) -> None:
    """Two chains in one loop, their names alike but for the end; one is masked."""
    transition, loc = ways()
    slope = pyro.param("slope", torch.tensor(0.3))
    z = w = None
    with pyro.plate("rows", x.shape[1]):
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"s_{t}_a", after(z, transition))
            pyro.sample(f"x_{t}", dist.Normal(loc[z] + slope * y[t], 1.0), obs=x[t])
            w = pyro.sample(f"s_{t}_b", after(w, transition))
            seen = dist.Normal(loc[w], 1.0).mask(t < torch.tensor([2, 3, 6]))
            pyro.sample(f"y_{t}", seen, obs=y[t])


def beside_the_loop(x: Tensor, y: Tensor) -> None:
    """An observation of each sequence that hangs on no state."""
    transition, loc = ways()
    mean, z = pyro.param("mean", torch.tensor(0.0)), None
    with poutine.scale(scale=0.5), pyro.plate("rows", x.shape[1]):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[0])
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", after(z, transition))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])


def added_up(x: Tensor, y: Tensor) -> None:
    """What the loop adds up is used after it: it cannot run as one."""
    transition, loc = ways()
    z, total = None, torch.zeros(())
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", after(z, transition))
        pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t, 0])
        total = total + loc.pow(2).sum()
    pyro.factor("penalty", -total)


def words(x: Tensor, y: Tensor) -> None:
    """Counts of several words, of which the numbers are no tensors; a name in the middle."""
    transition = turns()
    probs = pyro.param("probs", torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]))
    z = None
    for t in pyroem.markov(len(x)):
        z = pyro.sample(f"z_{t}", after(z, transition))
        logits = probs[z] * y[t, 0]
        counts = (x[t].abs() * 3).round()
        pyro.deterministic(f"logits_{t}", logits)
        pyro.sample(f"x_{t}_words", dist.Multinomial(9, logits=logits), obs=counts)


@pytest.mark.parametrize(
    "program", [two_loops, one_stem, beside_the_loop, added_up, words], ids=lambda p: p.__name__
)
def test_layouts(program: Callable[[Tensor, Tensor], None]) -> None:
    x = torch.randn(6, 3, generator=seeded(), **DOUBLE)
    if program is words:
        x = torch.tensor([[1.0, 1.0, 1.0]], **DOUBLE).expand(6, 3)
    y = torch.randn(9 if program is two_loops else 6, 2, generator=seeded(1), **DOUBLE)
    y = torch.cat([y, y[:, :1]], 1) if program is not two_loops else y
    fit = EM(max_iter=3).fit(program, x, y)
    assert bool(fit.problem.structure.chains) == (program is not added_up)
    value = float(pyroem.log_joint(program, fit.params, x, y))
    assert fit.log_joint == pytest.approx(value, rel=1e-10)
    if program is beside_the_loop:
        assert float(fit.log_prob().sum()) == pytest.approx(value, rel=1e-10)
    if program is two_loops:
        assert {n: tuple(p.shape) for n, p in fit.predict().items()} == {"zu": (3, 6), "zv": (2, 9)}
        assert float(fit.log_prob()) == pytest.approx(value, rel=1e-10)  # no plate is theirs both
    if program is one_stem:
        assert set(fit.sample(2)) == {"s_a", "s_b", "x", "y"}
    if program is words:
        assert set(fit.sample()) == {"z", "x_words"}
        assert fit.sample()["x_words"].sum(-1).tolist() == [9] * 6


def test_filter_refuses_what_it_cannot_go_on_with() -> None:
    def seasonal(x: Tensor) -> None:
        transition, loc = ways()
        season, z = pyro.param("season", torch.tensor([0.0, 1.0])), None
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", after(z, transition))
            pyro.sample(f"x_{t}", dist.Normal(loc[z] + season[t % 2], 1.0), obs=x[t])

    x = sticky_data(12)
    fit = EM(max_iter=2).fit(seasonal, x)
    for overlap in (False, True):
        with pytest.raises(SettingError, match="number of the step"):
            fit.filter(x[10:], state=fit.filter(x[:10]), overlap=overlap)
    fit, data = at("chain_autoregressive"), BY_NAME["chain_autoregressive"].data
    with pytest.raises(SettingError, match="overlap=True"):
        fit.filter(*(x[:, 3:] for x in data), state=fit.filter(*(x[:, :3] for x in data)))
    with pytest.raises(ModelError, match="forecast"):
        fit.forecast(1, *(x[:, :2] for x in data))


def test_long_chains_with_holes_and_forecasts_from_the_end() -> None:
    def with_holes(x: Tensor, seen: Tensor) -> None:
        transition, loc = ways()
        z = None
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", after(z, transition))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0).mask(seen[t]), obs=x[t])

    x = sticky_data(2500)
    seen = torch.rand(2500, generator=seeded(3)) > 0.1
    fit = EM(max_iter=2).fit(with_holes, x, seen)
    assert torch.equal(fit.residuals()["x"].isnan(), ~seen)
    ended = seen.clone()
    ended[2000:] = False
    last = int(ended.nonzero().max())
    filtered = fit.filter(x, ended).probs["z"][last]
    ahead = fit.forecast(3, x, ended)
    torch.testing.assert_close(ahead.states["z"][0], filtered @ fit.params["transition"])


def test_emissions_of_other_kinds() -> None:
    def inflated(x: Tensor) -> None:
        transition = turns()
        rate = pyro.param("rate", torch.tensor([1.0, 5.0]), constraint=constraints.positive)
        gate = pyro.param("gate", torch.tensor([0.2, 0.1]), constraint=constraints.unit_interval)
        z = None
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", after(z, transition))
            d = dist.ZeroInflatedPoisson(rate[z], gate=gate[z])
            pyro.sample(f"x_{t}", d, obs=x[t])

    def heavy(x: Tensor) -> None:
        transition, loc = ways()
        df = pyro.param("df", torch.tensor([3.0, 6.0]), constraint=constraints.positive)
        scale = pyro.param("scale", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
        z = None
        with pyro.plate("rows", 4):
            for t in pyroem.markov(len(x)):
                z = pyro.sample(f"z_{t}", after(z, transition))
                pyro.sample(f"x_{t}", dist.StudentT(df[z], loc[z], scale[z]), obs=x[t])

    def trials(x: Tensor) -> None:
        transition = turns()
        probs = pyro.param("probs", torch.tensor([0.2, 0.7]), constraint=constraints.unit_interval)
        z = None
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", after(z, transition))
            pyro.sample(f"x_{t}", dist.Binomial(x[t] + 3, probs[z]), obs=x[t])

    counts = torch.poisson(2 + 4 * (torch.arange(40) // 8 % 2).double(), generator=seeded())
    noise = torch.randn(20, 4, generator=seeded(), **DOUBLE)
    for program, x in ((inflated, counts), (heavy, noise), (trials, counts)):
        fit = EM(max_iter=4).fit(program, x)
        assert fit.problem.structure.chains
        value = float(pyroem.log_joint(program, fit.params, x))
        assert fit.log_joint == pytest.approx(value, rel=1e-9)
        values = [record.log_joint for record in fit.history]
        assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(values))
    assert bool(EM(max_iter=2).fit(trials, counts).residuals()["x"].isfinite().all())


def test_unrolled_programs_with_many_joint_states() -> None:
    """The number of joint states of 70 steps is no 64-bit number."""

    def stepwise(x: Tensor) -> None:
        transition, loc = ways()
        z = None
        with pyro.plate("rows", x.shape[1]):
            for t in pyro.markov(range(len(x))):
                z = pyro.sample(f"z_{t}", after(z, transition))
                pyro.sample(f"x_{t}", dist.Normal(loc[z] + math.sin(t), 1.0), obs=x[t])

    x = torch.randn(70, 2, generator=seeded(), **DOUBLE)
    fit = EM(max_iter=1).fit(stepwise, x)
    assert "unrolled" in fit.explain()
    value = float(pyroem.log_joint(stepwise, fit.params, x))
    assert fit.log_likelihood == pytest.approx(value, rel=1e-10)


def test_forecast_through_transforms_that_differ_by_state() -> None:
    stretch, x = torch.tensor([0.5, 2.0], **DOUBLE), torch.rand(30, generator=seeded(), **DOUBLE)

    def model(x: Tensor) -> None:
        matrix = pyro.param("matrix", torch.eye(2) * 0.6 + 0.2, constraint=constraints.simplex)
        z = 0
        for t in pyroem.markov(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(matrix[z]))
            through = [AffineTransform(1.0, stretch[z]), ExpTransform()]
            base = dist.Normal(torch.zeros(()), torch.ones(()))
            pyro.sample(f"x_{t}", dist.TransformedDistribution(base, through), obs=x[t])

    ahead = EM(max_iter=1).fit(model, x + 0.1).forecast(2)
    value = torch.tensor([0.3, 4.0], **DOUBLE)
    parts = torch.distributions.LogNormal(torch.ones(2, **DOUBLE), stretch)
    wanted = (ahead.states["z"] * parts.log_prob(value[:, None]).exp()).sum(-1).log()
    torch.testing.assert_close(ahead.observations["x"].log_prob(value), wanted)


def test_empty_sequences_do_not_count_in_criteria() -> None:
    def model(x: Tensor, lengths: Tensor) -> None:
        matrix = pyro.param("matrix", torch.eye(2) * 0.6 + 0.2, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([0.0, 3.0]))
        with pyro.plate("sequences", len(x)):
            z = 0
            for t in pyroem.markov(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Categorical(matrix[z]))
                    pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[:, t])

    x = torch.randn(5, 30, generator=seeded())
    fit = EM(max_iter=5).fit(model, x, torch.tensor([30, 20, 30, 0, 0]))
    full = EM(max_iter=5).fit(model, x[:3], torch.tensor([30, 20, 30]))
    assert fit.bic() == pytest.approx(full.bic(), rel=1e-12)
    assert fit.icl() == pytest.approx(full.icl(), rel=1e-12)
    weights = torch.tensor([1.0, 2.0, 1.0, 7.0, 1.0])
    fit = EM(max_iter=5).fit(model, x, torch.tensor([30, 20, 30, 0, 0]), weights=weights)
    full = EM(max_iter=5).fit(model, x[:3], torch.tensor([30, 20, 30]), weights=weights[:3])
    assert fit.bic() == pytest.approx(full.bic(), rel=1e-12)
