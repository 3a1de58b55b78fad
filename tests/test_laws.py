"""The laws of EM, over the whole table of problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pyro
import pytest
import torch
from brute_force import brute_force
from problems import PROBLEMS, Problem
from pyro.infer import TraceEnum_ELBO
from test_brute_force import enumerated, guide, probabilities
from torch import Tensor

import pyroem
from pyroem import EM, MAP
from pyroem._pyro import isolated, unwrap
from pyroem.estep.chain import lengths
from pyroem.estep.engine import ChainTraceEngine, MixtureEngine, is_chained
from pyroem.estep.kernel import Rows
from pyroem.estep.mixture import mixture_of
from pyroem.families import forms
from pyroem.mstep.closed import closed_update
from pyroem.mstep.plan import Rung
from pyroem.mstep.runs import Expected
from pyroem.mstep.update import expected_sum
from pyroem.problem import Problem as Posed
from pyroem.problem import pose
from pyroem.statistics import add
from pyroem.structure import Params

ROWS = [p for p in PROBLEMS if p.row_plate is not None]
FEW = [p for p in PROBLEMS if p.name in ("gaussian_mixture", "poisson_mixture", "chain")]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
every_problem_with_rows = pytest.mark.parametrize("problem", ROWS, ids=repr)
few_problems = pytest.mark.parametrize("problem", FEW, ids=repr)


BY_NAME = {p.name: p for p in PROBLEMS}


@cache
def posed_by_name(name: str, engine: str = "auto") -> Posed:
    return pose(BY_NAME[name].model, BY_NAME[name].data, {}, engine=engine)


def posed(problem: Problem) -> Posed:
    """The problem, read and planned once for all laws."""
    return posed_by_name(problem.name)


def rows_of(problem: Problem) -> int:
    return posed(problem).structure.num_rows


def random_point(problem: Problem, seed: int) -> Params:
    """A point of the parameter space that is far from ``problem.params``."""
    generator = torch.Generator().manual_seed(seed)
    point = {}
    for name, parameter in posed(problem).structure.parameters.items():
        raw = parameter.unconstrain(problem.params[name])
        noise = torch.randn(raw.shape, generator=generator, dtype=raw.dtype)
        point[name] = parameter.constrain(raw + 0.7 * noise)
    return point


def objective(target: Posed, params: Params) -> float:
    with isolated(torch.float64), torch.no_grad():
        log_likelihood, log_prior = target.log_joint(params)
    return float(log_likelihood + log_prior)


def em_steps(target: Posed, params: Params, count: int) -> Params:
    with isolated(torch.float64, 0):
        for _ in range(count):
            expected, _ = target.e_step(params)
            params = target.m_step(params, expected)
    return params


def tell(name: str, message: str) -> str:
    return f"{name}: {message}"


def close(found: Params, wanted: Params, *, rtol: float, atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        a, b = found[name], wanted[name]
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=partial(tell, name))


# ---------------------------------------------------------------------------------------
# 1. The E-step is exact


@every_problem
def test_e_step_equals_enumeration_by_hand(problem: Problem) -> None:
    assert problem.tiny is not None
    oracle = brute_force(problem.oracle, problem.params, problem.tiny)
    found = pyroem.e_step(problem.model, problem.params, *problem.tiny)
    exact: dict[str, Any] = {"rtol": 0.0, "atol": 1e-9}
    torch.testing.assert_close(found.log_likelihood, oracle.log_likelihood, **exact)
    torch.testing.assert_close(
        pyroem.log_joint(problem.model, problem.params, *problem.tiny), oracle.log_joint, **exact
    )
    assert set(found.marginals) == set(oracle.marginals)
    for z, expected in oracle.marginals.items():
        torch.testing.assert_close(found.marginals[z], expected, **exact)


@every_problem
def test_pairwise_weights_equal_enumeration_by_hand(problem: Problem) -> None:
    assert problem.tiny is not None
    oracle = brute_force(problem.oracle, problem.params, problem.tiny)
    found = pyroem.e_step(problem.model, problem.params, *problem.tiny)
    plates = pose(problem.model, problem.tiny, {}, engine="trace").structure.plates
    for z, marginal in oracle.marginals.items():
        axes, weights = found.axes[z], found.weights[z]
        parents = [a for a in axes if a in oracle.marginals and a != z]
        for parent in parents:
            dims = [p for p in plates[z] if p in axes]
            assert set(dims) | set(parents) | {z} == set(axes)
            wanted = oracle.pairwise(parent, z)
            rest = [i for i, a in enumerate(axes) if a not in (*dims, parent, z)]
            left = [a for a in axes if a in (*dims, parent, z)]
            pair = weights.sum(rest) if rest else weights
            pair = pair.permute([left.index(a) for a in (*dims, parent, z)])
            torch.testing.assert_close(pair, wanted, rtol=0, atol=1e-9)
        if not parents:
            plain = weights.permute([axes.index(a) for a in (*plates[z], z)])
            torch.testing.assert_close(plain, marginal, rtol=0, atol=1e-9)


@every_problem
def test_marginals_equal_those_of_pyro(problem: Problem) -> None:
    found = pyroem.e_step(problem.model, problem.params, *problem.data).marginals
    program = enumerated(problem, problem.params)
    theirs = TraceEnum_ELBO().compute_marginals(program, guide, *problem.data)
    assert set(found) == set(theirs)
    for z, marginal in theirs.items():
        expected = probabilities(marginal).reshape(found[z].shape)
        torch.testing.assert_close(found[z], expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------
# 2. Fisher: at the parameters of the E-step, Q and the objective have one gradient


@every_problem
def test_fisher(problem: Problem) -> None:
    expected = pyroem.e_step(problem.model, problem.params, *problem.data)
    leaves = {n: v.clone().requires_grad_() for n, v in problem.params.items()}
    values = list(leaves.values())
    q = pyroem.expected_log_joint(problem.model, leaves, expected, *problem.data)
    objective = pyroem.log_joint(problem.model, leaves, *problem.data)
    for name, a, b in zip(
        leaves,
        torch.autograd.grad(q, values),
        torch.autograd.grad(objective, values),
        strict=True,
    ):
        scale = float(b.abs().max()) + 1.0
        assert float((a - b).abs().max()) <= 1e-9 * scale, name


def flat_log_joint(problem: Problem) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The objective as a function of one unconstrained vector."""
    parameters = posed(problem).structure.parameters
    raw = {n: p.unconstrain(problem.params[n]) for n, p in parameters.items()}
    sizes = [v.numel() for v in raw.values()]

    def function(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        params = {
            n: parameters[n].constrain(part.reshape(raw[n].shape))
            for n, part in zip(raw, parts, strict=True)
        }
        return pyroem.log_joint(problem.model, params, *problem.data)

    return function, torch.cat([v.reshape(-1) for v in raw.values()])


@few_problems
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own forward mode
def test_the_objective_has_second_derivatives(problem: Problem) -> None:
    function, at = flat_log_joint(problem)
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(at), gradient)
    hessian = torch.autograd.functional.hessian(function, at)
    assert bool(hessian.isfinite().all())
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.func.hessian(function)(at), hessian, rtol=1e-8, atol=1e-8)
    step = 1e-5 * torch.randn(at.shape, generator=torch.Generator().manual_seed(0)).to(at)
    ahead, behind = (torch.func.grad(function)(at + s) for s in (step, -step))
    torch.testing.assert_close((ahead - behind) / 2, hessian @ step, rtol=1e-4, atol=1e-8)


# ---------------------------------------------------------------------------------------
# 3. Ascent: an EM step never lowers the objective


@every_problem
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_ascent(problem: Problem, seed: int | None) -> None:
    target = posed(problem)
    params = problem.params if seed is None else random_point(problem, seed)
    values = []
    with isolated(torch.float64, 0):
        for _ in range(9):
            expected, log_prior = target.e_step(params)
            values.append(float(expected.log_likelihood + log_prior))
            params = target.m_step(params, expected)
    for old, new in pairwise(values):
        assert new >= old - 1e-9 * abs(old)
    assert values[-1] > values[0]


# ---------------------------------------------------------------------------------------
# 4. A closed form is the numeric maximiser of Q


def q_function(problem: Problem) -> Callable[[Params], Tensor]:
    """``Q(. | problem.params)`` from posterior weights and the program's own log-densities."""
    target = posed_by_name(problem.name, "trace")  # every step of a chain by itself
    structure, sites = target.structure, target.plan.reading.sites
    weights = pyroem.e_step(problem.model, problem.params, *problem.data).weights
    if problem.name == "chain_ragged":  # what comes after a sequence's end counts for nothing
        lengths = problem.data[1]
        weights = {z: w * (int(z.split("_")[1]) < lengths) for z, w in weights.items()}
    statistics = target.e_step(problem.params)[0].statistics

    def q(params: Params) -> Tensor:
        trace = structure.enumerate(params)
        total = structure.log_prior(trace)
        for name, factor in trace.factors.items():
            if name in sites and sites[name].family.latent is not None:
                # Its own latent variables have their posterior at problem.params too.
                base, _, _ = unwrap(trace.trace.nodes[name]["fn"])
                arguments = sites[name].evaluate(params, partial(lambda d: d, base))
                total = total + sites[name].expected_log_density(arguments, statistics[name])
            else:
                total = total + expected_sum(weights[name], factor.tensor)
        return total

    return q


def maximiser(
    problem: Problem, q: Callable[[Params], Tensor], names: Iterable[str]
) -> tuple[Params, float]:
    """Maximise Q over ``names`` alone, in the unconstrained space, from ``problem.params``."""
    parameters, rows = posed(problem).structure.parameters, rows_of(problem)
    raw = {
        n: parameters[n].unconstrain(problem.params[n]).detach().clone().requires_grad_()
        for n in names
    }

    def values() -> Params:
        return {**problem.params, **{n: parameters[n].constrain(r) for n, r in raw.items()}}

    optimiser = torch.optim.LBFGS(
        list(raw.values()),
        max_iter=150,
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -q(values()) / rows
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        found = values()
        return found, float(q(found))


def fixed_gauge(form: Any, value: Tensor) -> Tensor:
    """Logits are known up to a constant only."""
    return value.log_softmax(-1) if form is forms.LOGITS else value


@every_problem
def test_closed_forms_maximise_q(problem: Problem) -> None:
    target = posed(problem)
    with isolated(torch.float64, 0):
        expected, _ = target.e_step(problem.params)
        q = q_function(problem)
        for block in target.plan.on(Rung.CLOSED_FORM):
            value = closed_update(target.plan, block, problem.params, expected)
            wanted, best = maximiser(problem, q, [block.name])
            reached = float(q({**problem.params, block.name: value}))
            if not problem.smooth:
                assert reached >= best - 1e-8 * abs(best), block.name
                continue
            assert reached == pytest.approx(best, rel=1e-8), block.name
            torch.testing.assert_close(
                fixed_gauge(block.form, value),
                fixed_gauge(block.form, wanted[block.name]),
                rtol=1e-5,
                atol=1e-5,
                msg=partial(tell, block.name),
            )


@every_problem
def test_the_whole_m_step_maximises_q(problem: Problem) -> None:
    target = posed(problem)
    with isolated(torch.float64, 0):
        expected, _ = target.e_step(problem.params)
        q = q_function(problem)
        reached = float(q(target.m_step(problem.params, expected)))
        if target.plan.on(Rung.GRADIENT):  # generalised EM: a few steps up
            assert reached > float(q(problem.params))
            return
        _, best = maximiser(problem, q, problem.params)
    assert reached >= best - 1e-6 * rows_of(problem)


def test_q_is_what_the_package_computes() -> None:
    problem = PROBLEMS[0]
    expected = pyroem.e_step(problem.model, problem.params, *problem.data)
    elsewhere = random_point(problem, 3)
    theirs = pyroem.expected_log_joint(problem.model, elsewhere, expected, *problem.data)
    with isolated(torch.float64, 0):
        torch.testing.assert_close(q_function(problem)(elsewhere), theirs)


# ---------------------------------------------------------------------------------------
# 5. The kernel equals the trace

KERNEL = [p for p in PROBLEMS if isinstance(posed_by_name(p.name).engine, MixtureEngine)]
CHAINS = [p for p in PROBLEMS if is_chained(posed_by_name(p.name).engine)]


def test_most_programs_have_a_kernel() -> None:
    without = {p.name for p in PROBLEMS} - {p.name for p in (*KERNEL, *CHAINS)}
    by_running = {p.name for p in CHAINS if isinstance(posed(p).engine, ChainTraceEngine)}
    assert by_running == {"chain_covariates", "chain_autoregressive", "chain_by_edge"}
    assert without == {
        "failures_by_state",  # statistics that differ by state
        "student_t_mixture",  # statistics that depend on parameters
        "multivariate_t_mixture",
        "zero_inflated_mixture",
        "student_t_full",
        "student_t_spherical",
        "zero_inflated_columns",
        "laplace_mixture",  # statistics that are the rows themselves
        "weibull_mixture",
        "overdispersed_mixture",
        "dirichlet_multinomial_mixture",
        "linear_regressions",  # arguments that vary along the rows
        "poisson_regressions",
        "logistic_regressions",
        "binomial_regressions",
        "negative_binomial_regressions",
        "gamma_regressions",
        "categorical_regressions",
        "heteroscedastic_regressions",
        "multivariate_regressions",
        "mixture_of_experts",
        "poisson_exposure",
        "base_rates",
        "experts_counts",
        "nested_assignments",
        "global_assignment",
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("problem", KERNEL, ids=repr)
def test_kernel_equals_trace(problem: Problem, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = posed(problem).structure.unit_shape
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) if weighted else None
    trace = pose(problem.model, problem.data, {}, weights=weights, engine="trace")
    mixture = mixture_of(trace.structure, trace.plan)
    assert not isinstance(mixture, str)
    nodes = trace.plan.reading.traces[0].trace.nodes
    exact: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-10}
    with isolated(torch.float64, 0):
        wanted, prior = trace.e_step(problem.params)
        whole = trace.log_joint(leaves(problem.params))
        for cache, size in ((10**9, 10**9), (0, 10**9), (0, 17), (10**9, 17)):
            rows = Rows(mixture, nodes, weights, cache)
            rows.size = size
            engine = MixtureEngine(mixture, [rows])
            found, own_prior = engine.expect(problem.params)
            torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood, **exact)
            torch.testing.assert_close(own_prior, prior, **exact)
            for name, site in wanted.statistics.items():
                own = found.statistics[name]
                for a, b in zip(
                    (own.weight, *own.values), (site.weight, *site.values), strict=True
                ):
                    torch.testing.assert_close(*torch.broadcast_tensors(a, b), **exact)
        for a, b in zip(engine.log_joint(leaves(problem.params)), whole, strict=True):
            torch.testing.assert_close(a, b, **exact)
        at = [leaves(problem.params) for _ in range(2)]
        totals = (sum(engine.log_joint(at[0])), sum(trace.log_joint(at[1])))
        for total in totals:
            torch.as_tensor(total).backward()
        for name in problem.params:
            torch.testing.assert_close(at[0][name].grad, at[1][name].grad, rtol=1e-9, atol=1e-9)


def leaves(params: Params) -> Params:
    return {name: value.clone().requires_grad_() for name, value in params.items()}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("problem", CHAINS, ids=repr)
def test_chain_kernel_equals_trace(problem: Problem, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = posed(problem).structure.unit_shape
    weighted = weighted and bool(shape)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) if weighted else None
    trace = pose(problem.model, problem.data, {}, weights=weights, engine="trace")
    chain = pose(problem.model, problem.data, {}, weights=weights)
    exact: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-10}
    assert is_chained(chain.engine)
    structure = chain.structure
    nodes = chain.plan.reading.traces[0].trace.nodes
    ends = {c.name: lengths(structure, nodes, c) for c in structure.chains}
    by_running = ChainTraceEngine(structure, chain.plan, weights, ends, "it was asked for")
    with isolated(torch.float64, 0):
        wanted, prior = trace.e_step(problem.params)
        new = trace.m_step(problem.params, wanted)
        for engine in (chain.engine, by_running):
            found, own_prior = engine.expect(problem.params)
            torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood, **exact)
            torch.testing.assert_close(own_prior, prior, **exact)
            if problem.name != "chain_ragged":  # what comes after the end is left out
                close(chain.m_step(problem.params, found), new, rtol=1e-9, atol=1e-9)
            at = [leaves(problem.params) for _ in range(2)]
            totals = (sum(engine.log_joint(at[0])), sum(trace.log_joint(at[1])))
            for total in totals:
                torch.as_tensor(total).backward()
            for name in problem.params:
                torch.testing.assert_close(at[0][name].grad, at[1][name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("problem", CHAINS, ids=repr)
def test_both_spellings_of_a_loop_are_one(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, steps = pyro.markov, len([z for z in problem.states if z.startswith("z_")])

    def stated(loop: Any, **settings: Any) -> Any:
        return pyroem.markov(len(loop)) if isinstance(loop, range) else plain(loop, **settings)

    with isolated(torch.float64, 0):
        ours = posed(problem)
        wanted = ours.e_step(problem.params)[0]
        monkeypatch.setattr(pyro, "markov", stated)
        theirs = pose(problem.model, problem.data, {})
        found = theirs.e_step(problem.params)[0]
    assert theirs.structure.chains == ours.structure.chains
    assert {chain.length for chain in theirs.structure.chains} == {steps}
    torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood)
    assert found.statistics.keys() == wanted.statistics.keys()
    for name, site in wanted.statistics.items():
        own = found.statistics[name]
        for a, b in zip((own.weight, *own.values), (site.weight, *site.values), strict=True):
            torch.testing.assert_close(a, b)
    # Under Pyro it is Pyro's own loop.
    value = pyroem.log_joint(problem.model, problem.params, *problem.data)
    torch.testing.assert_close(value, sum(ours.log_joint(problem.params)))


# ---------------------------------------------------------------------------------------
# 6. Statistics add


@every_problem_with_rows
@pytest.mark.parametrize("engine", ["auto", "trace"])
def test_statistics_of_row_subsets_add_up(problem: Problem, engine: str) -> None:
    target = posed_by_name(problem.name, engine)
    rows = len(problem.data[0])
    first = (torch.arange(rows) % 3 == 0).double()
    subsets = [
        pose(problem.model, problem.data, {}, weights=w, engine=engine) for w in (first, 1 - first)
    ]
    with isolated(torch.float64, 0):
        whole, _ = target.e_step(problem.params)
        parts = [subset.e_step(problem.params)[0] for subset in subsets]
        total = add(parts[0].statistics, parts[1].statistics)
        value = parts[0].log_likelihood + parts[1].log_likelihood
        torch.testing.assert_close(value, whole.log_likelihood, rtol=1e-12, atol=1e-9)
        for name, expected in whole.statistics.items():
            for a, b in zip(
                (total[name].weight, *total[name].values),
                (expected.weight, *expected.values),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        weights = {n: parts[0].weights[n] + parts[1].weights[n] for n in whole.weights}
        joined = target.m_step(problem.params, Expected(value, total, weights))
        at_once = target.m_step(problem.params, whole)
    close(joined, at_once, rtol=1e-6, atol=1e-7)


def densities(target: Posed, expected: Expected, params: Params) -> dict[str, float]:
    """Each site's expected log-density at ``params``: free of the centre of its statistics."""
    structure = target.structure
    nodes = structure.program.run(params, nesting=structure.nesting).nodes
    result = {}
    for name, site in target.plan.reading.sites.items():
        base, _, _ = unwrap(nodes[name]["fn"])
        arguments = site.evaluate(params, partial(lambda d: d, base))
        value = site.expected_log_density(arguments, expected.statistics[name])
        result[name] = float(value)
    return result


@every_problem_with_rows
def test_statistics_of_separate_data_add_up(problem: Problem) -> None:
    rows = len(problem.data[0])
    cut = rows // 3
    pieces = [tuple(x[:cut] for x in problem.data), tuple(x[cut:] for x in problem.data)]
    if problem.name == "chain_ragged":  # its masks, hence its sites, differ from part to part
        pieces = [tuple(x[i::2] for x in problem.data) for i in (0, 1)]
    targets = [posed(problem), *(pose(problem.model, piece, {}) for piece in pieces)]
    with isolated(torch.float64, 0), torch.no_grad():
        found = [t.e_step(problem.params)[0] for t in targets]
        for seed in (4, 5):
            at = random_point(problem, seed)
            whole, a, b = (densities(t, e, at) for t, e in zip(targets, found, strict=True))
            for name, value in whole.items():
                assert a[name] + b[name] == pytest.approx(value, rel=1e-9, abs=1e-8), name


# ---------------------------------------------------------------------------------------
# 7. Labels and the order of rows mean nothing


@every_problem
def test_renaming_states_changes_nothing(problem: Problem) -> None:
    target = posed(problem)
    value = objective(target, problem.params)
    after = em_steps(target, problem.params, 2)
    for renaming in problem.symmetries:
        order = torch.arange(problem.states[renaming.sites[0]]).roll(1)
        renamed = renaming.permute(problem.params, order)
        assert objective(target, renamed) == pytest.approx(value, rel=1e-12)
        wanted = renaming.permute(after, order)
        found = em_steps(target, renamed, 2)
        close(found, wanted, **precision(target))


def precision(target: Posed) -> dict[str, float]:
    """How closely two M-steps from the same statistics agree."""
    if any(target.plan.on(r) for r in (Rung.GRADIENT, Rung.ON_ROWS, Rung.ON_STATISTICS)):
        return {"rtol": 1e-5, "atol": 1e-5}
    if all(regression.exact for regression in target.plan.regressions):
        return {"rtol": 1e-9, "atol": 1e-10}
    return {"rtol": 1e-7, "atol": 1e-8}


@every_problem_with_rows
def test_permuting_rows_changes_nothing(problem: Problem) -> None:
    order = torch.randperm(len(problem.data[0]), generator=torch.Generator().manual_seed(0))
    target = posed(problem)
    shuffled = pose(problem.model, tuple(x[order] for x in problem.data), {})
    value = objective(target, problem.params)
    assert objective(shuffled, problem.params) == pytest.approx(value, rel=1e-12)
    found, wanted = (em_steps(t, problem.params, 2) for t in (shuffled, target))
    close(found, wanted, **precision(target))


# ---------------------------------------------------------------------------------------
# 8. Where EM stops is an optimum, and gradient ascent finds the same


@every_problem
def test_em_ends_at_an_optimum_that_map_finds_too(problem: Problem) -> None:
    settings: dict[str, Any] = {"tol": 1e-13, "param_tol": 1e-9, "max_iter": 5000}
    init: dict[str, Any] = {"init": problem.params}
    em = EM(**settings).fit(problem.model, *problem.data, **init)
    assert em.converged, str(em)
    target, rows = posed(problem), rows_of(problem)
    parameters = target.structure.parameters
    raw = {
        n: p.unconstrain(em.params[n]).detach().clone().requires_grad_()
        for n, p in parameters.items()
    }
    with isolated(torch.float64, 0):
        log_likelihood, log_prior = target.log_joint(
            {n: p.constrain(raw[n]) for n, p in parameters.items()}
        )
    if not problem.smooth:  # the search by gradients ends at some kink
        assert objective(target, em.params) == pytest.approx(em.log_joint, rel=1e-12)
        return
    gradients = torch.autograd.grad((log_likelihood + log_prior) / rows, list(raw.values()))
    for name, gradient in zip(raw, gradients, strict=True):
        assert float(gradient.abs().max()) <= 2e-6, name
    by_gradient = MAP(**settings).fit(problem.model, *problem.data, **init)
    assert by_gradient.log_joint == pytest.approx(em.log_joint, abs=1e-7 * rows)
    assert em.log_joint == pytest.approx(objective(target, em.params), rel=1e-12)


# ---------------------------------------------------------------------------------------
# 9. Row weights count rows


@every_problem_with_rows
def test_a_row_weight_counts_rows(problem: Problem) -> None:
    rows = len(problem.data[0])
    times = (torch.arange(rows) * 5) % 3  # 0, 1 and 2 in turn
    repeated = tuple(x.repeat_interleave(times, 0) for x in problem.data)
    weighted = pose(problem.model, problem.data, {}, weights=times)
    spelled_out = pose(problem.model, repeated, {})
    assert weighted.rows == pytest.approx(spelled_out.rows)
    value = objective(spelled_out, problem.params)
    assert objective(weighted, problem.params) == pytest.approx(value, rel=1e-11)
    with isolated(torch.float64, 0):
        assert float(weighted.e_step(problem.params)[0].log_likelihood) == pytest.approx(
            float(spelled_out.e_step(problem.params)[0].log_likelihood), rel=1e-11
        )
    found, wanted = (em_steps(t, problem.params, 1) for t in (weighted, spelled_out))
    exact = not weighted.plan.on(Rung.GRADIENT)
    tolerance = 1e-6 if exact else 1e-3  # ascent steps stop short of the maximum
    close(found, wanted, rtol=tolerance, atol=tolerance)


@every_problem_with_rows
def test_a_fit_counts_weighted_rows(problem: Problem) -> None:
    rows = len(problem.data[0])
    times = (torch.arange(rows) * 5) % 3
    repeated = tuple(x.repeat_interleave(times, 0) for x in problem.data)
    solver = EM(max_iter=1)
    weighted = solver.fit(problem.model, *problem.data, init=problem.params, weights=times)
    spelled_out = solver.fit(problem.model, *repeated, init=problem.params)
    assert weighted.log_likelihood == pytest.approx(spelled_out.log_likelihood, rel=1e-6)
    assert weighted.history[0].log_joint == pytest.approx(
        spelled_out.history[0].log_joint, rel=1e-11
    )
    rows_alone = weighted.log_prob()
    assert float((rows_alone * times).sum()) == pytest.approx(weighted.log_likelihood, rel=1e-10)


def test_the_laws_leave_the_store_alone() -> None:
    pyroem.e_step(PROBLEMS[0].model, PROBLEMS[0].params, *PROBLEMS[0].data)
    assert len(pyro.get_param_store()) == 0
