"""The oracle and the table of problems are what they claim to be."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import brute_force
from problems import PROBLEMS, Problem
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

TINY = [p for p in PROBLEMS if p.tiny is not None]
ROWS = [p for p in PROBLEMS if p.row_plate is not None]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)


def nodes(problem: Problem) -> dict[str, Any]:
    """The sites of a program, run once with Pyro alone."""
    return dict(poutine.trace(problem.model).get_trace(*problem.data).nodes)


def enumerated(problem: Problem, params: dict[str, Tensor], hide_priors: bool = True) -> Any:
    """The program at fixed parameters, as Pyro's own enumeration takes it."""
    samples = {n: v for n, v in params.items() if nodes(problem)[n]["type"] == "sample"}
    free = {n: v for n, v in params.items() if n not in samples}
    program = poutine.substitute(poutine.condition(problem.oracle, samples), free)
    if hide_priors:
        program = poutine.block(program, hide=list(samples))
    return config_enumerate(program)


def guide(*data: Tensor) -> None:
    """Nothing to guide: all that is not enumerated is given."""


def trace_enum(
    problem: Problem,
    data: tuple[Tensor, ...],
    params: dict[str, Tensor] | None = None,
    hide_priors: bool = True,
) -> float:
    """Log-likelihood (or log-joint) by Pyro's own enumeration."""
    program = enumerated(problem, params or problem.params, hide_priors)
    return float(-TraceEnum_ELBO().loss(program, guide, *data))


def probabilities(marginal: Any) -> Tensor:
    """The states' probabilities in a marginal from ``compute_marginals``."""
    if isinstance(marginal, dist.Bernoulli):
        return torch.stack([1 - marginal.probs, marginal.probs], -1)
    # For a Binomial assignment, Pyro puts the log-weights of the states in ``logits``.
    return marginal.logits.softmax(-1)


@pytest.mark.parametrize("problem", TINY, ids=repr)
def test_oracle_agrees_with_pyro(problem: Problem) -> None:
    assert problem.tiny is not None
    oracle = brute_force(problem.oracle, problem.params, problem.tiny)
    assert len(pyro.get_param_store()) == 0
    assert float(oracle.log_likelihood) == pytest.approx(
        trace_enum(problem, problem.tiny), abs=1e-9
    )
    assert float(oracle.log_joint) == pytest.approx(
        trace_enum(problem, problem.tiny, hide_priors=False), abs=1e-9
    )


@pytest.mark.parametrize("problem", TINY, ids=repr)
def test_oracle_marginals_agree_with_pyro(problem: Problem) -> None:
    assert problem.tiny is not None
    oracle = brute_force(problem.oracle, problem.params, problem.tiny)
    program = enumerated(problem, problem.params)
    marginals = TraceEnum_ELBO().compute_marginals(program, guide, *problem.tiny)
    assert set(marginals) == set(oracle.marginals)
    for site, expected in oracle.marginals.items():
        probs = probabilities(marginals[site]).reshape(expected.shape)
        torch.testing.assert_close(probs, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(expected.sum(-1), torch.ones_like(expected[..., 0]))


@pytest.mark.parametrize("problem", TINY, ids=repr)
def test_pairwise_has_the_right_margins(problem: Problem) -> None:
    assert problem.tiny is not None
    oracle = brute_force(problem.oracle, problem.params, problem.tiny)
    for a in oracle.marginals:
        for b in oracle.marginals:
            joint = oracle.pairwise(a, b)
            if oracle.plate_dims[a] >= oracle.plate_dims[b]:
                torch.testing.assert_close(joint.sum(-1), oracle.marginals[a])
            if a == b:
                torch.testing.assert_close(joint, torch.diag_embed(oracle.marginals[a]))
            torch.testing.assert_close(joint, oracle.pairwise(b, a).transpose(-1, -2))


def two_rows(x: Tensor) -> None:
    """A mixture small enough for pencil and paper."""
    weights = pyro.param("weights", x.new_tensor([0.5, 0.5]), constraint=constraints.simplex)
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def test_oracle_by_hand() -> None:
    def normal(x: float, mean: float) -> float:
        return math.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)

    params = {
        "weights": torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True),
        "loc": torch.tensor([-1.0, 2.0], dtype=torch.float64),
    }
    x = torch.tensor([0.0, 1.5], dtype=torch.float64)
    first = (0.25 * normal(0.0, -1.0), 0.75 * normal(0.0, 2.0))
    second = (0.25 * normal(1.5, -1.0), 0.75 * normal(1.5, 2.0))

    oracle = brute_force(two_rows, params, (x,))
    likelihood = math.log(sum(first)) + math.log(sum(second))
    assert oracle.log_likelihood.item() == pytest.approx(likelihood, abs=1e-12)
    assert oracle.log_prior.item() == pytest.approx(-2.5 - math.log(2 * math.pi), abs=1e-12)
    expected = [[v / sum(first) for v in first], [v / sum(second) for v in second]]
    assert oracle.marginals["z"].tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    (gradient,) = torch.autograd.grad(oracle.log_likelihood, params["weights"])
    # The weight of a state gains, per unit, its expected count over its weight; Categorical
    # divides the weights by their sum, which takes off the number of rows.
    counts = [expected[0][k] + expected[1][k] for k in range(2)]
    assert gradient.tolist() == pytest.approx([counts[0] / 0.25 - 2, counts[1] / 0.75 - 2])


def test_oracle_refuses_what_it_cannot_do() -> None:
    x = torch.zeros(2, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="'loc'"):
        brute_force(two_rows, {"weights": weights}, (x,))
    problem = PROBLEMS[0]
    with pytest.raises(ValueError, match="too many"):
        brute_force(problem.oracle, problem.params, problem.data)


def test_names_are_unique() -> None:
    assert len({p.name for p in PROBLEMS}) == len(PROBLEMS)


@every_problem
def test_problem_is_what_it_says(problem: Problem) -> None:
    latent, parameters = {}, set()
    for name, node in nodes(problem).items():
        if node["type"] == "param":
            parameters.add(name)
            support = pyro.get_param_store().get_state()["constraints"][name]
        elif node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node):
            if node["fn"].has_enumerate_support:
                latent[name] = len(node["fn"].enumerate_support(expand=False))
                continue
            parameters.add(name)
            support = node["fn"].support
        else:
            continue
        value = problem.params[name]
        assert value.dtype == torch.float64 and not value.requires_grad
        assert value.shape == node["value"].shape
        assert bool(support.check(value).all())
    assert parameters == set(problem.params)
    assert latent == problem.states
    for renaming in problem.symmetries:
        sizes = {problem.params[name].shape[dim] for name, dim in renaming.axes}
        assert {problem.states[site] for site in renaming.sites} == sizes


@every_problem
def test_the_point_is_no_optimum(problem: Problem) -> None:
    params = {n: v.clone().requires_grad_() for n, v in problem.params.items()}
    program = enumerated(problem, params, hide_priors=False)
    loss = TraceEnum_ELBO().differentiable_loss(program, guide, *problem.data)
    for gradient in torch.autograd.grad(loss, list(params.values())):
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().max()) > 1e-3


@every_problem
def test_states_can_be_renamed(problem: Problem) -> None:
    expected = trace_enum(problem, problem.data, hide_priors=False)
    for renaming in problem.symmetries:
        order = torch.arange(problem.states[renaming.sites[0]]).roll(1)
        params = renaming.permute(problem.params, order)
        found = trace_enum(problem, problem.data, params, hide_priors=False)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("problem", ROWS, ids=repr)
def test_rows_are_independent(problem: Problem) -> None:
    rows = len(problem.data[0])
    order = torch.randperm(rows)
    parts = [
        trace_enum(problem, tuple(x[order[part]] for x in problem.data))
        for part in torch.arange(rows).split(rows // 2 - 3)
    ]
    assert sum(parts) == pytest.approx(trace_enum(problem, problem.data), rel=1e-12)
    plates = {f.name for n in nodes(problem).values() for f in n.get("cond_indep_stack", ())}
    assert problem.row_plate in plates
