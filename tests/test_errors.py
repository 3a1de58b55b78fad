"""Bad input gives an error that names the site or argument, what was expected and what came."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS, gaussian_conjugate, gaussian_mixture, latent_class, poisson_mixture
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

import pyroem
from pyroem import EM, MAP, DataError, ModelError, SettingError

MODULE = next(p for p in PROBLEMS if isinstance(p.model, PyroModule))
X = torch.cat([torch.linspace(-3, -1, 20), torch.linspace(1, 4, 20)]).double()
PARAMS = {
    "weights": torch.tensor([0.3, 0.3, 0.4]),
    "loc": torch.tensor([-1.0, 0.0, 1.0]),
    "scale": torch.ones(3),
}


def two_states(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parameters of two Gaussians."""
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    scale = pyro.param("scale", x.new_ones(2), constraint=constraints.positive)
    return weights, loc, scale


def fails(
    kind: type[Exception], words: list[str], model: Callable[..., Any], *data: Any, **settings: Any
) -> None:
    """EM refuses, with a message that has all the words."""
    with pytest.raises(kind) as caught:
        EM().fit(model, *data, **settings)
    assert isinstance(caught.value, pyroem.PyroemError)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


# ---------------------------------------------------------------------------------------
# Programs


def test_no_observation() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x if len(x) < 5 else None)

    def nothing(x: Tensor) -> None:
        weights, _, _ = two_states(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(weights))

    fails(ModelError, ["no observation", "obs="], nothing, X)
    fails(ModelError, ["'x'"], model, X)


@pytest.mark.parametrize("name, fn", [("n", dist.Poisson(2.0)), ("tries", dist.Geometric(0.5))])
def test_infinite_latent(name: str, fn: Any) -> None:
    def model(x: Tensor) -> None:
        _, _, scale = two_states(x)
        with pyro.plate("rows", len(x)):
            n = pyro.sample(name, fn)
            pyro.sample("x", dist.Normal(n, scale[0]), obs=x)

    fails(ModelError, [f"'{name}'", type(fn).__name__, "Categorical"], model, X)


def row_latent(x: Tensor) -> None:
    weights, loc, scale = two_states(x)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc[z] + shift, scale[z]), obs=x)


def nested_latent(x: Tensor) -> None:
    weights, loc, scale = two_states(x)
    with pyro.plate("groups", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", x.shape[-1], dim=-1):
            pyro.sample("x", dist.Normal(loc[z] + shift, scale[z]), obs=x)


def inner_latent(x: Tensor) -> None:
    weights, loc, scale = two_states(x)
    with pyro.plate("groups", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("rows", x.shape[-1], dim=-1):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc[z] + shift, scale[z]), obs=x)


def markov_latent(x: Tensor) -> None:
    weights, loc, scale = two_states(x)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(weights))
        shift = pyro.sample(f"shift_{t}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{t}", dist.Normal(loc[z] + shift, scale[z]), obs=x[t])


@pytest.mark.parametrize(
    "model, data, where",
    [
        (row_latent, X, "rows"),
        (nested_latent, X.reshape(10, 4), "groups"),
        (inner_latent, X.reshape(10, 4), "rows"),
        (markov_latent, X[:4], "pyro.markov"),
    ],
)
def test_continuous_latent_of_a_row(model: Any, data: Tensor, where: str) -> None:
    fails(ModelError, ["'shift", "Normal", where], model, data)


def test_latent_of_a_row_can_be_declared_a_parameter() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            prior = dist.Normal(0.0, 0.1)
            shift = pyro.sample("shift", prior, infer={"parameter": True})
            pyro.sample("x", dist.Normal(loc[z] + shift, scale[z]), obs=x)

    fit = EM(max_iter=2).fit(model, X, init="kmeans")
    assert fit.params["shift"].shape == X.shape


def test_unused_parameter() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        pyro.param("spare", x.new_tensor(1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fails(ModelError, ["'spare'"], model, X)


def test_subsampled_plate() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", len(x), subsample_size=5) as chosen:
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x[chosen])

    fails(ModelError, ["'rows'", "5", "40", "subsample"], model, X)


def test_batch_dim_without_a_plate() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z] + 0 * x, scale[z]), obs=x)

    fails(ModelError, ["'x'", "(40,)", "plate", "to_event"], model, X)


def test_plate_of_the_wrong_size() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", 7):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fails((ModelError, DataError), ["'x'", "7", "40"], model, X)  # type: ignore[arg-type]  # a tuple does as well


def test_column_where_a_row_is_expected() -> None:
    fails(
        (DataError, ModelError),  # type: ignore[arg-type]  # a tuple does as well
        ["'x'", "(40,)", "(40, 1)"],
        gaussian_mixture,
        X.unsqueeze(-1),
    )


def test_row_where_columns_are_expected() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            emission = dist.Normal(loc[z].unsqueeze(-1), scale[z].unsqueeze(-1))
            pyro.sample("x", emission.expand([len(x), 2]).to_event(1), obs=x)

    fails((DataError, ModelError), ["'x'"], model, X)  # type: ignore[arg-type]  # a tuple does as well


def test_a_program_that_fails_under_enumeration() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            if z.dim() > 1:
                raise ValueError("what is this dim?")
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fails(ModelError, ["enumerated", "ValueError", "what is this dim?"], model, X)


def test_a_failing_program_is_named_by_its_site() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z][:7], scale[0]), obs=x)

    fails(ModelError, ["'x'", "7", "40"], model, X)


def test_scale_of_each_row() -> None:
    def model(x: Tensor) -> None:
        weights, loc, scale = two_states(x)
        with pyro.plate("rows", len(x)), poutine.scale(scale=torch.linspace(1, 2, len(x))):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)

    fails(ModelError, ["poutine.scale", "weights"], model, X)


def test_not_a_program() -> None:
    fails(ModelError, ["callable", "int"], 3)  # type: ignore[arg-type]  # wrong on purpose


# ---------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("bad", [float("inf"), -float("inf")])
def test_data_that_is_not_finite(bad: float) -> None:
    x = X.clone()
    x[3] = bad
    fails(DataError, ["'x'", "finite", str(bad), "(3,)"], gaussian_mixture, x)


def bernoulli(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    probs = pyro.param("probs", x.new_tensor([0.3, 0.6]), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Bernoulli(probs[z]), obs=x)


def dirichlet(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    alpha = pyro.param(
        "alpha", x.new_tensor([[1.0, 2.0], [2.0, 1.0]]), constraint=constraints.positive
    )
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Dirichlet(alpha[z]), obs=x)


def categorical(y: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    probs = pyro.param(
        "probs", torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]), constraint=constraints.simplex
    )
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Categorical(probs[z]), obs=y)


@pytest.mark.parametrize(
    "model, data, words",
    [
        (poisson_mixture, torch.tensor([1.0, 2.0, -3.0, 4.0]), ["'n'", "Poisson", "-3", "(2,)"]),
        (poisson_mixture, torch.tensor([1.0, 2.5, 3.0, 4.0]), ["'n'", "Poisson", "2.5", "(1,)"]),
        (bernoulli, torch.tensor([1.0, 0.0, 2.0, 0.0]), ["'x'", "Bernoulli", "2.0", "(2,)"]),
        (latent_class, torch.full((4, 6), 2.0), ["'x'", "Bernoulli", "2.0"]),
        (
            dirichlet,
            torch.tensor([[0.5, 0.5], [0.5, 0.9]]),
            ["'x'", "Dirichlet", "Simplex", "0.8", "(1,)"],
        ),
        (categorical, torch.tensor([0, 1, 3, 2]), ["'y'", "Categorical", "3", "(2,)"]),
    ],
)
def test_data_outside_the_support(model: Any, data: Tensor, words: list[str]) -> None:
    fails(DataError, words, model, data)


def test_data_that_cannot_become_a_tensor() -> None:
    words = np.array(["a", "b"])
    fails(DataError, ["tensor"], gaussian_mixture, words)


# ---------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("solver", [EM, MAP])
@pytest.mark.parametrize(
    "setting, value",
    [
        ("tol", -1),
        ("tol", float("nan")),
        ("tol", "small"),
        ("param_tol", -1e-3),
        ("max_iter", 0),
        ("max_iter", 2.5),
        ("max_iter", True),
        ("floor", -1e-3),
        ("floor", float("inf")),
        ("dtype", torch.float16),
        ("dtype", "float64"),
    ],
)
def test_solver_settings(solver: Any, setting: str, value: Any) -> None:
    with pytest.raises(SettingError) as caught:
        solver(**{setting: value})
    for word in (solver.__name__, setting, repr(value)):
        assert word in str(caught.value)


@pytest.mark.parametrize("lr", [0, -0.1, float("nan"), float("inf")])
def test_learning_rate(lr: float) -> None:
    with pytest.raises(SettingError, match="lr"):
        MAP("adam", lr=lr)


def test_optimizer() -> None:
    with pytest.raises(SettingError, match=r"optimizer.*'lbfgs'.*'bfgs'"):
        MAP("bfgs")
    with pytest.raises(SettingError, match="optimizer"):
        MAP(3)
    with pytest.raises(SettingError, match=r"optimi[sz]er"):
        MAP("adam", options={"speed": 3}).fit(gaussian_mixture, X)
    with pytest.raises(SettingError, match=r"optimi[sz]er"):
        MAP(lambda leaves: None).fit(gaussian_mixture, X)


@pytest.mark.parametrize(
    "init, words",
    [
        ("kmean", ["init", "kmeans", "'kmean'"]),
        ({"locs": torch.zeros(3)}, ["init", "'locs'", "Did you mean 'loc'?"]),
        ({"loc": torch.zeros(2)}, ["'loc'", "(3,)", "(2,)"]),
        ({"scale": torch.tensor([1.0, -1.0, 1.0])}, ["init", "'scale'"]),
        ({"weights": torch.tensor([0.5, 0.6, 0.7])}, ["init", "'weights'"]),
        ({"loc": torch.tensor([0.0, 1.0, float("nan")])}, ["init", "'loc'"]),
        (7, ["init", "7"]),
    ],
)
def test_init(init: Any, words: list[str]) -> None:
    fails(SettingError, words, gaussian_mixture, X, init=init)


def test_fixed_by_an_unknown_name() -> None:
    with pytest.raises(SettingError, match=r"fixed.*'scales'.*Did you mean 'scale'"):
        EM(fixed=["scales"]).fit(gaussian_mixture, X)


@pytest.mark.parametrize(
    "weights, words",
    [
        (torch.ones(3), ["weights", "(40,)", "(3,)", "'rows'"]),
        (torch.ones(40, 1), ["weights", "(40,)", "(40, 1)"]),
        (torch.full((40,), -1.0), ["weights", "negative"]),
        (torch.full((40,), float("nan")), ["weights", "finite"]),
        (torch.full((40,), float("inf")), ["weights", "finite"]),
        (torch.zeros(40), ["weights", "positive"]),
    ],
)
def test_weights(weights: Tensor, words: list[str]) -> None:
    fails(DataError, words, gaussian_mixture, X, weights=weights)


def test_weights_without_rows() -> None:
    chain = next(p for p in PROBLEMS if p.name == "chain")
    fails(SettingError, ["weights", "plate"], chain.model, *chain.data, weights=torch.ones(12))


@pytest.mark.parametrize("setting", [{"restarts": 0}, {"restarts": 1.5}, {"restarts": True}])
def test_restarts(setting: dict[str, Any]) -> None:
    fails(SettingError, ["restarts", "positive"], gaussian_mixture, X, **setting)


def test_restarts_of_one_point() -> None:
    fails(SettingError, ["restarts=2"], gaussian_mixture, X, init="model", restarts=2)
    fails(SettingError, ["restarts=2"], gaussian_mixture, X, init=PARAMS, restarts=2)


@pytest.mark.parametrize("seed", [-1, 1.5, 2**32, True])
def test_seed(seed: Any) -> None:
    fails(SettingError, ["seed", repr(seed)], gaussian_mixture, X, seed=seed)


# ---------------------------------------------------------------------------------------
# Functions at given parameters


@pytest.mark.parametrize("function", [pyroem.log_joint, pyroem.e_step])
def test_params_of_the_functions(function: Callable[..., Any]) -> None:
    function(gaussian_mixture, PARAMS, X)
    lacking = {n: v for n, v in PARAMS.items() if n != "loc"}
    with pytest.raises(SettingError, match=r"lacks.*'loc'"):
        function(gaussian_mixture, lacking, X)
    with pytest.raises(SettingError, match=r"'means'.*'loc'"):
        function(gaussian_mixture, {**PARAMS, "means": torch.zeros(3)}, X)
    with pytest.raises(SettingError, match=r"'loc'.*\(3,\).*\(4,\)"):
        function(gaussian_mixture, {**PARAMS, "loc": torch.zeros(4)}, X)
    with pytest.raises(SettingError, match="dtype"):
        function(gaussian_mixture, PARAMS, X, dtype=torch.int64)


def test_expected_of_other_data() -> None:
    expected = pyroem.e_step(gaussian_mixture, PARAMS, X)
    with pytest.raises(SettingError, match=r"'[xz]'.*shape"):
        pyroem.expected_log_joint(gaussian_mixture, PARAMS, expected, X[:10])


def test_functions_without_observation() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(x[0].sigmoid()))

    with pytest.raises(ModelError, match="no observation"):
        pyroem.log_joint(model, {}, X)


# ---------------------------------------------------------------------------------------
# Nothing outside is touched


def world() -> list[Any]:
    """The global state that a fit must not change."""
    store = pyro.get_param_store()
    return [
        torch.get_rng_state().tolist(),
        [a.tolist() if isinstance(a, np.ndarray) else a for a in np.random.get_state()],
        random.getstate(),
        torch.get_default_dtype(),
        {name: value.tolist() for name, value in store.items()},
        pyro.settings.get("validate_distributions_pyro"),
        torch.is_grad_enabled(),
    ]


def broken(x: Tensor) -> None:
    weights, loc, scale = two_states(x)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        random.random()
        np.random.rand()
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)
        raise RuntimeError("out of luck")


ACTIONS: dict[str, Callable[[], Any]] = {
    "EM": lambda: EM(max_iter=3).fit(gaussian_mixture, X, restarts=2, init="random"),
    "MAP": lambda: MAP(max_iter=3).fit(gaussian_mixture, X),
    "Adam": lambda: MAP("adam", max_iter=3).fit(gaussian_mixture, X),
    "float32": lambda: EM(max_iter=3, dtype=torch.float32).fit(gaussian_mixture, X),
    "module": lambda: EM(max_iter=3).fit(MODULE.model, *MODULE.data),
    "methods": lambda: [
        (f.sample(100), f.predict(), f.log_prob(), f.posterior(), f.icl(), f.explain(), f.df)
        for f in [EM(max_iter=3).fit(gaussian_conjugate, X, init="kmeans")]
    ],
    "e_step": lambda: pyroem.e_step(gaussian_mixture, PARAMS, X),
    "log_joint": lambda: pyroem.log_joint(gaussian_mixture, PARAMS, X),
    "an error": lambda: EM().fit(broken, X),
    "a refusal": lambda: EM().fit(row_latent, X),
    "a setting": lambda: EM().fit(gaussian_mixture, X, init="no"),
    "an error of e_step": lambda: pyroem.e_step(broken, {}, X),
    "an error of log_joint": lambda: pyroem.log_joint(gaussian_mixture, {}, X),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_nothing_outside_is_touched(action: Callable[[], Any]) -> None:
    pyro.param("loc", torch.tensor([5.0, 6.0, 7.0]))
    pyro.param("mine", torch.tensor(1.0), constraint=constraints.positive)
    before = world()
    if action in [ACTIONS[n] for n in ACTIONS if n.startswith("a")]:
        with pytest.raises(pyroem.PyroemError):
            action()
    else:
        action()
    assert world() == before


def test_a_module_keeps_its_parameters() -> None:
    module: Any = MODULE.model
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    EM(max_iter=3).fit(module, *MODULE.data)
    with pytest.raises(pyroem.PyroemError):
        EM().fit(module, *MODULE.data, init="no")
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name])
        assert after[name].grad is None
