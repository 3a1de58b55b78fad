"""Data in blocks: what a fit reads again in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_large import X, mixture, simulated
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyroem
from pyroem import EM, MAP, DataError, ModelError, SettingError, StepwiseEM, blocks

SMALL = simulated(1000)
INIT = {
    "weights": [0.3, 0.3, 0.4],
    "loc": [[-2.0, 0.0], [0.0, 2.0], [2.0, 0.0]],
    "scale": [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
}


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return len(SMALL)

    def __getitem__(self, i: int) -> Tensor:
        return SMALL[i]


class Flow(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(SMALL)


def mapped(folder: Path, offset: int = 0) -> np.memmap[Any, Any]:
    path = folder / "rows.bin"
    path.write_bytes(b"\0" * offset + SMALL.numpy().tobytes())
    return np.memmap(path, dtype=np.float64, mode="r", offset=offset, shape=tuple(SMALL.shape))


def npy(folder: Path) -> Path:
    np.save(folder / "rows.npy", SMALL.numpy())
    return folder / "rows.npy"


def parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    columns = {"b": SMALL[:, 0].numpy(), "name": ["r"] * len(SMALL), "a": SMALL[:, 1].numpy()}
    pq.write_table(pyarrow.table(columns), folder / "rows.parquet")
    return folder / "rows.parquet"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "a tensor": lambda folder: blocks(SMALL, rows=300),
    "an array": lambda folder: blocks(SMALL.numpy(), rows=1),
    "one block": lambda folder: blocks(SMALL),
    "a memory map": mapped,
    "with an offset": lambda folder: blocks(mapped(folder, 24), rows=77),
    "a view of a map": lambda folder: blocks(mapped(folder)[:], rows=77),
    "a .npy file": lambda folder: blocks(npy(folder), rows=128),
    "a parquet file": lambda folder: blocks(parquet(folder), rows=128, columns=["b", "a"]),
    "a dataset": lambda folder: Rows(),
    "a dataset of tuples": lambda folder: TensorDataset(SMALL),
    "a loader": lambda folder: DataLoader(Rows(), batch_size=333),
    "an iterable dataset": lambda folder: blocks(Flow(), rows=100),
    "a function": lambda folder: blocks(lambda: iter(SMALL.split(170))),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_gives_the_same_fit(source: Callable[[Path], Any], tmp_path: Path) -> None:
    data = source(tmp_path)
    solver = EM(max_iter=5 if len(list(zip(range(300), blocks(data), strict=False))) > 200 else 300)
    whole = solver.fit(mixture, SMALL, init=INIT)
    fit = solver.fit(mixture, data, init=INIT)
    assert fit.status is whole.status and fit.n_iter == whole.n_iter
    assert fit.log_joint == pytest.approx(whole.log_joint, rel=1e-11)
    for name in whole.params:
        torch.testing.assert_close(fit.params[name], whole.params[name], rtol=1e-8, atol=1e-8)
    assert fit.bic() == pytest.approx(whole.bic(), rel=1e-11)
    torch.testing.assert_close(fit.responsibilities(), whole.responsibilities())
    torch.testing.assert_close(fit.predict(SMALL[:7]), whole.predict(SMALL[:7]))
    torch.testing.assert_close(fit.log_prob(), whole.log_prob())
    assert "1000 rows" in fit.explain()


@pytest.mark.parametrize("solver", [EM(), MAP(), EM(accelerate="anderson")], ids=lambda s: s.name)
@pytest.mark.parametrize("init", ["auto", "kmeans", "random"])
def test_starts_come_from_a_sample(solver: Any, init: str) -> None:
    fit = solver.fit(mixture, blocks(X, rows=1000), init=init)
    assert fit.converged, fit.explain()
    whole = EM().fit(mixture, X, init=fit)
    assert whole.log_joint == pytest.approx(fit.log_joint, rel=1e-7)


def test_weights_more_arguments_and_masks(tmp_path: Path) -> None:
    weights = torch.arange(1000, dtype=torch.float64) % 4
    whole = EM(max_iter=20).fit(mixture, SMALL, 3, init=INIT, weights=weights)
    for source in (blocks(SMALL, rows=300), blocks(lambda: iter(SMALL.split(170)))):
        fit = EM(max_iter=20).fit(mixture, source, 3, init=INIT, weights=weights)
        assert fit.log_joint == pytest.approx(whole.log_joint, rel=1e-11)
        keyword = EM(max_iter=20).fit(mixture, source, states=3, init=INIT, weights=weights)
        assert keyword.log_joint == pytest.approx(whole.log_joint, rel=1e-11)
    holes = SMALL.clone()
    holes[::3, 0] = torch.nan

    def masked(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([[-2.0, 0.0], [2.0, 1.0]]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[z], 1.0).mask(~x.isnan()).to_event(1), obs=x)

    fits = [EM().fit(masked, data) for data in (holes, blocks(holes, rows=300))]
    assert fits[0].log_joint == pytest.approx(fits[1].log_joint, rel=1e-10)


def test_several_arrays() -> None:
    def pair(x: Tensor, n: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        rate = pyro.param("rate", torch.tensor([1.0, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)
            pyro.sample("n", dist.Poisson(rate[z]), obs=n)

    data = SMALL[:, 0], SMALL[:, 1].abs().round().int()
    whole = EM().fit(pair, *data)
    fit = EM().fit(pair, blocks(data, rows=99))
    assert fit.log_joint == pytest.approx(whole.log_joint, rel=1e-10)


def test_what_cannot_be_read_in_blocks() -> None:
    def ragged(x: Tensor) -> None:
        mixture(x - x.mean(0))

    def chain(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(x[:3]))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t, 0])

    bad = SMALL.clone()
    bad[700, 1] = torch.inf
    numbers = iter(range(100))
    once = iter(SMALL.split(300))

    def shrinking() -> Iterator[Tensor]:
        return iter(SMALL[: 1000 - next(numbers)].split(300))

    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (chain, blocks(SMALL), ModelError, "one plate of independent rows"),
        (mixture, blocks(bad, rows=300), DataError, "finite data"),
        (mixture, blocks(shrinking), DataError, "every pass must read the same data"),
        (mixture, blocks(lambda: iter(())), DataError, "hold no rows"),
    ]
    for model, data, error, match in cases:
        with pytest.raises(error, match=match):
            EM(max_iter=3).fit(model, data)
    wide = torch.cat([SMALL, SMALL], 1)
    for data, weights, match in (
        (blocks(lambda: iter([SMALL, wide])), None, r"Block 1 has rows of shapes \[\(4,\)\]"),
        (blocks(lambda: iter([(SMALL, SMALL[:9])])), None, "Block 0: its arguments have 1000, 9"),
        (blocks(SMALL), torch.ones(999), r"one for each row \(1000,\), got shape \(999,\)"),
        (blocks(lambda: iter([SMALL])), torch.ones(999), "one for each row, 1000 or more; got 999"),
        (blocks(lambda: iter([SMALL])), torch.ones(1001), "one for each row, 1000; got 1001"),
        (blocks(SMALL), ["a"] * 1000, "expected numbers, one for each row, got list"),
        (SMALL, blocks(SMALL), "expected numbers, one for each row, got Blocks"),
    ):
        with pytest.raises(DataError, match=match):
            EM(max_iter=3).fit(lambda *x: mixture(x[0]), data, weights=weights)
    with pytest.raises(SettingError, match="can be read once only"):
        blocks(once)
    with pytest.raises(DataError, match="can be read once only"):
        EM().fit(mixture, once)
    with pytest.raises(DataError, match="beside the blocks has 3000 rows too"):
        EM().fit(lambda x, y: mixture(x + y), blocks(SMALL.repeat(3, 1)), torch.zeros(3000, 1))
    with pytest.raises(SettingError, match="data in blocks needs the kernel"):
        EM(engine="trace").fit(mixture, blocks(SMALL))
    with pytest.raises(SettingError, match="rows must be a positive integer"):
        blocks(SMALL, rows=0)
    with pytest.raises(DataError, match="array 1 has 999 rows"):
        blocks((SMALL, SMALL[:-1]))
    with pytest.raises(DataError, match="cannot be read"):
        blocks("nowhere.npy")
    with pytest.raises(SettingError, match=r"\.npy or a \.parquet file"):
        blocks("rows.txt")


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    with pytest.raises(DataError, match="no column 'c'; it has b, name, a"):
        blocks(path, columns=["a", "c"])
    with pytest.raises(DataError, match="column 'name' is not numeric"):
        EM().fit(mixture, blocks(path))


def test_only_blocks_are_in_memory(tmp_path: Path) -> None:
    """A file is read block by block: no block is larger than asked for, and none is kept."""
    sizes = []
    for (block,) in blocks(mapped(tmp_path), rows=64):
        assert not isinstance(block, np.memmap)
        sizes.append(len(block))
    assert max(sizes) == 64 and sum(sizes) == len(SMALL)


def test_blocks_can_be_passed_on() -> None:
    same = blocks(blocks(SMALL, rows=10))
    assert isinstance(same, pyroem.Blocks)


def rare(x: Tensor, b: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(2))
    p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)
        pyro.sample("b", dist.Bernoulli(p), obs=b)


@pytest.mark.parametrize("solver", [EM(), MAP(), MAP("adam")], ids=str)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_what_is_rare_need_not_be_in_the_sample(solver: Any, in_blocks: bool) -> None:
    x = torch.cat([simulated(9000)[:, 0], simulated(9000)[:, 0] + 6])
    b = torch.zeros(len(x), dtype=torch.float64)
    b[[11, 12, 13]] = 1.0
    data = (blocks((x, b), rows=5000),) if in_blocks else (x, b)
    fit = solver.fit(rare, *data)
    assert float(fit.params["p"]) == pytest.approx(3 / len(x), rel=0.02)


TRANSFORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "standardised": lambda x: (x - x.mean(0)) / x.std(0),
    "scaled": lambda x: x / x.abs().max(),
    "differences": lambda x: torch.diff(x, dim=0, prepend=x[:1]),
}


@pytest.mark.parametrize("transform", TRANSFORMED.values(), ids=TRANSFORMED.keys())
def test_rows_that_depend_on_other_rows(transform: Callable[[Tensor], Tensor]) -> None:
    def program(x: Tensor) -> None:
        mixture(transform(x))

    with pytest.raises(DataError, match=r"Block 0 .*: .* of some of its rows alone"):
        EM().fit(program, blocks(SMALL, rows=300), init=INIT)


def test_new_rows_in_blocks() -> None:
    fit = EM().fit(mixture, SMALL[:500], init=INIT)
    for given in (blocks(SMALL, rows=300), blocks(lambda: iter(SMALL.split(170)))):
        assert torch.equal(fit.predict(given), fit.predict(SMALL))
        torch.testing.assert_close(fit.log_prob(given), fit.log_prob(SMALL))
        torch.testing.assert_close(fit.responsibilities(given), fit.responsibilities(SMALL))
        assert fit.posterior(given)["z"].probs.shape == (1000, 3)
    with pytest.raises(ModelError, match="needs a program with a kernel"):
        EM(engine="trace", max_iter=2).fit(mixture, SMALL, init=INIT).predict(blocks(SMALL))
    bad = SMALL.clone()
    bad[700, 1] = torch.inf
    with pytest.raises(DataError, match=r"Block 2 \(from row 600 on\): .* at index \(100, 1\)"):
        fit.predict(blocks(bad, rows=300))


def test_a_scale_computed_from_the_rows() -> None:
    def tempered(x: Tensor) -> None:
        with poutine.scale(scale=100 / len(x)):
            mixture(x)

    with pytest.raises(DataError, match=r"Block 0 .*scales"):
        EM().fit(tempered, blocks(SMALL, rows=300), init=INIT)


def test_priors_that_depend_on_the_data() -> None:
    def program(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.mean(0), 1.0).expand([3, 2]).to_event(2))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)

    with pytest.raises(DataError, match="Block 0"):
        EM().fit(program, blocks(SMALL, rows=300))


def test_a_projection_is_no_dependence() -> None:
    """Products of matrices of other sizes differ in the last digits."""
    projection = torch.randn((2, 2), generator=torch.Generator().manual_seed(1)).double()

    def program(x: Tensor) -> None:
        mixture(x @ projection)

    fit = EM(max_iter=3).fit(program, blocks(SMALL, rows=300), init=INIT)
    assert fit.n_iter == 3


def test_rows_and_blocks_without_any_value() -> None:
    seen = torch.ones(1000, 2, dtype=torch.bool)
    seen[:300, 0] = False

    def partly(x: Tensor, seen: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-2.0, 2.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            with pyro.poutine.mask(mask=seen[:, 0]):
                pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x[:, 0])
            pyro.sample("y", dist.Normal(-loc[z], 1.0), obs=x[:, 1])

    whole = EM().fit(partly, SMALL, seen)
    fit = EM().fit(partly, blocks((SMALL, seen), rows=300))
    assert fit.log_joint == pytest.approx(whole.log_joint, rel=1e-9)
    single = whole.log_prob(SMALL[:1], seen[:1])
    torch.testing.assert_close(single, whole.log_prob()[:1])


# ---------------------------------------------------------------------------------------
# Sequences


def ragged_chains(x: Tensor, lengths: Tensor) -> None:
    """Hidden Markov models of sequences of unequal lengths."""
    transition = pyro.param(
        "transition", torch.tensor([[0.7, 0.3], [0.3, 0.7]]), constraint=constraints.simplex
    )
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("sequences", len(x)):
        z: Any = 0
        for t in pyroem.markov(x.shape[1]):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
                pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[:, t])


def ragged_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (300,), generator=generator)
    rates = torch.tensor([1.0, 6.0])[torch.randint(2, (300, 1), generator=generator)]
    return torch.poisson(rates.expand(300, 8), generator=generator).double(), lengths


def test_sequences_in_blocks() -> None:
    """Also where each block is padded to a length of its own."""
    x, lengths = ragged_data()
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1))

    def own_lengths() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, 300, 50):
            longest = int(lengths[i : i + 50].max())
            yield x[i : i + 50, :longest], lengths[i : i + 50]

    whole = EM(max_iter=10).fit(ragged_chains, x, lengths, weights=weights)
    for source in (blocks((x.numpy(), lengths.numpy()), rows=70), blocks(own_lengths)):
        fit = EM(max_iter=10).fit(ragged_chains, source, weights=weights)
        assert fit.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-12)
        for name, value in whole.params.items():
            torch.testing.assert_close(fit.params[name], value, rtol=1e-9, atol=1e-9)
        assert torch.equal(fit.predict(x[:9], lengths[:9]), whole.predict(x[:9], lengths[:9]))
        with pytest.raises(ModelError, match="in blocks"):
            fit.predict()
    stepwise = StepwiseEM(batch=30).fit(ragged_chains, x, lengths)
    best = EM().fit(ragged_chains, x, lengths, init=stepwise)
    assert (best.log_likelihood - stepwise.log_likelihood) / 300 < 0.01
