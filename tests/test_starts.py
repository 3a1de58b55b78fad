"""Where a fit starts: given assignments, the race between guesses, labels, scales."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from sklearn.cluster import AgglomerativeClustering
from sklearn.datasets import load_wine
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.distributions import constraints

from pyroem import EM, SettingError, datasets
from pyroem.clustering import ward
from pyroem.loop import Status
from pyroem.models import gaussian_mixture, poisson_mixture
from pyroem.problem import pose
from pyroem.race import AUTO
from pyroem.sampling import sample_rows
from pyroem.starts import SEARCHES

SHAKY = (15, 32, 41)  # seeds


def faithful() -> Tensor:
    return datasets.load("faithful")[1]


def pairs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three groups in the plane, and which row is of which."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(3, (rows,), generator=generator)
    loc = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]]).double()
    return loc[z] + torch.randn(rows, 2, generator=generator, dtype=torch.float64), z


# ---------------------------------------------------------------------------------------
# Assignments that are given


def test_one_m_step_from_labels() -> None:
    x, z = pairs(90)
    start = EM(max_iter=1).fit(gaussian_mixture(3), x, init={"z": z})
    assert start.start == "the assignments given and one M-step"
    # What the start itself was: the groups' own moments.
    problem = pose(gaussian_mixture(3), (x,), {})
    weights = torch.bincount(z).double() / 90
    loc = torch.stack([x[z == k].mean(0) for k in range(3)])
    cov = torch.stack([torch.cov(x[z == k].T, correction=0) for k in range(3)])
    params = {"weights": weights, "loc": loc, "covariance": cov}
    assert start.history[0].log_joint == pytest.approx(sum(problem.parts(params)), abs=1e-9)


def test_probabilities_are_normalised() -> None:
    x, z = pairs(90)
    soft = torch.nn.functional.one_hot(z, 3).double() + 0.2
    a = EM(max_iter=2).fit(gaussian_mixture(3), x, init={"z": soft})
    b = EM(max_iter=2).fit(gaussian_mixture(3), x, init={"z": (5 * soft).numpy()})
    assert a.history[0].log_joint == pytest.approx(b.history[0].log_joint, abs=1e-9)


def test_assignments_beside_values() -> None:
    x, z = pairs(90)
    given = torch.tensor([0.2, 0.3, 0.5]).double()
    fit = EM(max_iter=1, fixed="weights").fit(
        gaussian_mixture(3), x, init={"z": z, "weights": given}
    )
    torch.testing.assert_close(fit.params["weights"], given)


def test_assignments_of_large_data() -> None:
    x, z = pairs(20_000)
    fit = EM(max_iter=1).fit(gaussian_mixture(3), x, init={"z": z})
    assert fit.problem.smaller is not None
    share = (fit.predict() == z).double().mean()
    assert share > 0.99


@pytest.mark.parametrize("name", ["chain_sequences", "chain_covariates"])
def test_states_of_sequences(name: str) -> None:
    problem = next(p for p in PROBLEMS if p.name == name)
    first = EM(max_iter=30).fit(problem.model, *problem.data, init=problem.params)
    path = first.predict()
    (chain,) = first.problem.structure.chains
    again = EM(max_iter=30).fit(problem.model, *problem.data, init={chain.name: path})
    assert again.start.startswith("the assignments given")
    agreement = (again.predict() == path).double().mean()
    assert agreement > 0.9


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(90, dtype=torch.int64) * 3, "states from 0 to 2 of shape .90,., .* got 3 to 3"),
        (torch.ones(5, dtype=torch.int64), "got torch.int64 of shape .5,."),
        (-torch.ones(90, 3), "numbers that are not negative"),
        (torch.zeros(90, 3), "numbers that are not negative"),
        ("no", "expected a tensor, got 'no'"),
    ],
)
def test_what_is_no_assignment(value: object, message: str) -> None:
    x, _ = pairs(90)
    with pytest.raises(SettingError, match=f"init: 'z': .*{message}"):
        EM().fit(gaussian_mixture(3), x, init={"z": value})


def test_given_assignments_have_no_restarts() -> None:
    x, z = pairs(90)
    with pytest.raises(SettingError, match="restarts=2: given values are the same"):
        EM().fit(gaussian_mixture(3), x, init={"z": z}, restarts=2)


# ---------------------------------------------------------------------------------------
# The search


def test_a_search_is_the_same_with_the_same_seed() -> None:
    x = faithful()
    fits = [EM().fit(gaussian_mixture(3, "tied"), x, seed=s) for s in (5, 5, 6)]
    assert fits[0].log_joint == fits[1].log_joint
    assert fits[2].log_joint == pytest.approx(fits[0].log_joint, abs=1e-4)


def test_elongated_clouds_are_found_across() -> None:
    """Two long clouds side by side: k-means on the columns cuts both in the middle."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    x[:, 0] *= 30
    x[100:, 1] += 6
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]]).double()
    fit = EM().fit(gaussian_mixture(2, "tied"), x @ turn)
    found = fit.predict()
    groups = (found[:100].double().mean() - found[100:].double().mean()).abs()
    assert groups > 0.95


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_columns_of_other_scales(scale: float) -> None:
    x = faithful()
    fit = EM().fit(gaussian_mixture(2), x)
    scaled = EM().fit(gaussian_mixture(2), x * torch.tensor([1.0, scale]).double())
    shift = len(x) * torch.tensor(scale).double().log()
    assert scaled.converged
    assert scaled.log_likelihood + float(shift) == pytest.approx(fit.log_likelihood, abs=1e-4)


def test_moves_mend_what_the_guesses_miss() -> None:
    """Four components: no guess of a first race leads to what split-and-merge moves find."""
    x = faithful()
    quick = EM().fit(gaussian_mixture(4), x, seed=1)
    thorough = EM().fit(gaussian_mixture(4), x, seed=1, init="thorough")
    assert thorough.converged
    assert thorough.log_joint >= quick.log_joint - 1e-6
    assert thorough.log_joint > -1104
    assert "split-and-merge" in thorough.start


def test_shakes_mend_what_the_guesses_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the guesses meet in lesser optima, the best known one is found none the less."""
    x, best = torch.as_tensor(load_wine().data), -3170.58206
    monkeypatch.setitem(SEARCHES, "auto", replace(AUTO, shakes=0))
    alone = [EM().fit(gaussian_mixture(3, "tied"), x, seed=s).log_likelihood for s in SHAKY]
    monkeypatch.setitem(SEARCHES, "auto", AUTO)
    fits = [EM().fit(gaussian_mixture(3, "tied"), x, seed=s) for s in SHAKY]
    assert min(alone) < best - 0.1  # which of them misses hangs on rounding
    for fit in fits:
        assert fit.log_likelihood == pytest.approx(best, abs=1e-4)
        assert "shaken" in fit.start


def test_ward_is_wards() -> None:
    """The partition of scikit-learn; of many rows the tree of a sample stands for all."""
    x, z = pairs(400)
    theirs = AgglomerativeClustering(5).fit(x).labels_
    assert adjusted_rand_score(theirs, ward(x, 5, 0)) == 1.0
    many, z = pairs(5000)
    assert adjusted_rand_score(z, ward(many, 3, 0)) > 0.98
    fit = EM().fit(gaussian_mixture(3), x, init="ward")
    assert fit.converged
    assert fit.start.startswith("Ward's assignments")
    assert fit.log_joint == pytest.approx(EM().fit(gaussian_mixture(3), x).log_joint, abs=1e-4)
    with pytest.raises(SettingError, match="restarts=3: Ward's clusters are the same"):
        EM().fit(gaussian_mixture(3), x, init="ward", restarts=3)


def test_unknown_ways_to_start() -> None:
    with pytest.raises(SettingError, match="expected one of auto, thorough, kmeans, ward"):
        EM().fit(gaussian_mixture(2), faithful(), init="Ward")


# ---------------------------------------------------------------------------------------
# Labels of some rows


def test_guesses_agree_with_labels() -> None:
    """Whatever names the guess has: three labels suffice to get all of them right."""
    for seed in range(4):
        x, z = pairs(300, seed)
        labels = torch.full((300,), -1)
        for k in range(3):
            labels[(z == k).nonzero()[0]] = k
        fit = EM().fit(gaussian_mixture(3), x, labels, seed=seed)
        assert fit.converged
        share = (fit.predict() == z).double().mean()
        assert share > 0.97


def test_rare_labels_in_large_data() -> None:
    x, z = pairs(20_000)
    labels = torch.full((20_000,), -1)
    for k in range(3):
        labels[(z == k).nonzero()[-1]] = (k + 1) % 3
    fit = EM().fit(gaussian_mixture(3), x, labels)
    assert fit.converged
    share = (fit.predict() == (z + 1) % 3).double().mean()
    assert share > 0.97


def test_a_sample_holds_what_is_rare() -> None:
    x = torch.zeros(50_000, 2)
    x[49_999, 1] = torch.nan
    labels = torch.zeros(50_000, dtype=torch.int64)
    labels[123] = 5
    index = sample_rows(50_000, 1000, None, (x, labels))
    assert len(index) == 1000 == len(index.unique())
    assert {123, 49_999} <= set(index.tolist())
    assert len(sample_rows(50_000, 1000, None, (x[:, :1], labels * 0))) == 1000


# ---------------------------------------------------------------------------------------
# States with constants of their own


def with_a_constant(x: Tensor) -> None:
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    means = torch.cat([loc, loc.new_tensor([9.0])])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)


def test_a_state_with_a_constant_keeps_its_name() -> None:
    (group,) = pose(with_a_constant, (torch.randn(30).double(),), {}).groups
    assert (group.num_states, group.movable) == (3, 2)


def test_more_than_thirty_two_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    assert EM(max_iter=3).fit(gaussian_mixture(2, "diagonal"), x).status is Status.MAX_ITER
    counts = torch.poisson(torch.full((60, 40), 3.0), generator=generator).double()
    assert EM(max_iter=3).fit(poisson_mixture(2), counts).log_likelihood < 0
