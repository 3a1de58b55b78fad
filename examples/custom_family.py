"""Teach pyroem a distribution: a mixture of Rayleigh-distributed wave heights.

The torch distribution below is the user's own. Nothing more is needed to fit it: its parameters are
found on the weighted rows. With five lines it becomes a family, whose parameters are found on the
expected statistics by the fast kernel; with a coordinate more, in closed form.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyroem
from pyroem.families.forms import SCALE


class Rayleigh(dist.TorchDistribution):
    """``p(x) = x / scale^2 exp(-x^2 / (2 scale^2))`` for ``x > 0``."""

    arg_constraints = {"scale": constraints.positive}  # noqa: RUF012  (torch's own convention)
    support = constraints.positive

    def __init__(self, scale: torch.Tensor, validate_args: bool | None = None) -> None:
        self.scale = scale
        super().__init__(scale.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "Rayleigh":
        return Rayleigh(self.scale.expand(batch_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008
        u = torch.rand(self._extended_shape(sample_shape))
        return self.scale * (-2 * u.log()).sqrt()

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return x.log() - 2 * self.scale.log() - x**2 / (2 * self.scale**2)


# eta T(x) - A: T = x^2, eta = -1 / (2 scale^2), A = 2 log scale. In the scale the kernel is
# -2 w log(t) - s / (2 t^2), of the form -a log(t) - b / t^2 whose maximiser pyroem knows.
pyroem.register_family(
    Rayleigh,
    pyroem.exponential_family(
        ("scale",),
        statistics=lambda x: (x**2,),
        natural=lambda scale: (-0.5 / scale**2,),
        log_normaliser=lambda scale: 2 * scale.log(),
        coordinates=(
            pyroem.Coordinate("scale", "scale", SCALE, lambda s, w, args: (2 * w, 0.5 * s[0])),
        ),
    ),
)


def model(heights: torch.Tensor) -> None:
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("waves", len(heights)):
        sea = pyro.sample("sea", dist.Categorical(weights))
        pyro.sample("height", Rayleigh(scale[sea]), obs=heights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer waves")
    size = 500 if parser.parse_args().quick else 5_000
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(size, generator=generator)
    rough = torch.rand(size, generator=generator) < 0.3
    heights = torch.where(rough, 4.0, 1.0) * (-2 * u.log()).sqrt()
    fit = pyroem.EM().fit(model, heights)
    print(fit.explain(), end="\n\n")
    print({name: value.numpy().round(3).tolist() for name, value in fit.params.items()})


if __name__ == "__main__":
    main()
