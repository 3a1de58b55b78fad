"""One fit by several processes, each with rows of its own, which never leave it.

    torchrun --nproc-per-node 2 examples/several_processes.py

Each process makes its own part of the data (yours would read a file of its own) and calls the same
fit; all end with the same parameters, those of all rows. Started without torchrun, the script makes
and fits all parts alone, which must give the same log-likelihood.
"""

import argparse
import datetime
import os

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyroem

PARTS = 4


def model(x: torch.Tensor) -> None:
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.zeros(3, 2))
    scale = pyro.param("scale", torch.ones(3, 2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def part(number: int, rows: int) -> torch.Tensor:
    """Some of the rows, the same whoever makes them."""
    generator = torch.Generator().manual_seed(number)
    centres = torch.tensor([[0.0, 0.0], [4.0, 1.0], [1.0, 5.0]], dtype=torch.float64)
    z = torch.randint(3, (rows,), generator=generator)
    return centres[z] + torch.randn((rows, 2), generator=generator, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows")
    rows = 2_500 if parser.parse_args().quick else 250_000
    under_torchrun = "RANK" in os.environ
    rank, world = 0, 1
    if under_torchrun:
        # A process that does not answer for so long is given up.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    mine = [part(number, rows) for number in range(rank, PARTS, world)]
    x = torch.cat([torch.zeros((0, 2), dtype=torch.float64), *mine])
    fit = pyroem.EM().fit(model, x, distributed=under_torchrun)

    predicted = fit.predict()  # each process, of its own rows
    print(f"process {rank} of {world}: {len(predicted)} rows, {fit}", flush=True)
    if rank == 0:
        print(fit.explain())
        order = fit.params["loc"][:, 0].argsort()
        for name, value in fit.params.items():
            print(f"{name:8s}", value[order].numpy().round(3).tolist())
    if under_torchrun:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
