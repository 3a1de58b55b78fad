"""What animals do, from where they go: a hidden Markov model of tracks of unequal length.

Each step has a length (Gamma) and a turn (von Mises); the animal rests, forages or travels. The
number of states by BIC, EM beside MAP, parameters, decoded states and a forecast, all against the
truth. Writes ``hidden_markov.png`` (needs matplotlib).
"""

import argparse
from importlib.util import find_spec

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import pyroem

NAMES = ("rests", "forages", "travels")
MOVE = torch.tensor([[0.85, 0.15, 0.0], [0.05, 0.85, 0.1], [0.0, 0.1, 0.9]], dtype=torch.float64)
SHAPE, RATE = torch.tensor([[1.5, 3.0, 8.0], [6.0, 3.0, 2.0]], dtype=torch.float64)
STRAIGHT = torch.tensor([0.3, 1.0, 6.0], dtype=torch.float64)  # concentration of the turns around 0


def model(length: Tensor, turn: Tensor, steps: Tensor, states: int) -> None:
    """Tracks [S, T], padded; ``steps`` [S] says how many count."""
    one = torch.ones(states)
    initial = pyro.param("initial", one / states, constraint=constraints.simplex)
    transition = pyro.param(
        "transition", one.expand(states, -1) / states, constraint=constraints.simplex
    )
    shape = pyro.param("shape", one, constraint=constraints.positive)
    rate = pyro.param("rate", one, constraint=constraints.positive)
    straight = pyro.param("straight", one, constraint=constraints.positive)
    with pyro.plate("tracks", len(length)):
        z = None
        for t in pyroem.markov(length.shape[1]):
            with poutine.mask(mask=t < steps):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
                pyro.sample(f"length_{t}", dist.Gamma(shape[z], rate[z]), obs=length[:, t])
                pyro.sample(f"turn_{t}", dist.VonMises(0.0, straight[z]), obs=turn[:, t])


def simulate(tracks: int, most: int) -> tuple[Tensor, ...]:
    """The states [S, T], which go on after a track's end, and what the program takes."""
    torch.manual_seed(0)
    steps = torch.randint(most // 3, most + 1, (tracks,))
    z = torch.randint(3, (tracks, most))
    for t in range(1, most):
        z[:, t] = torch.multinomial(MOVE[z[:, t - 1]], 1).squeeze(-1)
    turn = dist.VonMises(torch.zeros_like(STRAIGHT)[z], STRAIGHT[z]).sample()
    return z, dist.Gamma(SHAPE[z], RATE[z]).sample(), turn, steps


def picture(truth: Tensor, decoded: Tensor, sure: Tensor) -> None:
    """One track: the true and the decoded states, and how probable each was."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 4.5), layout="constrained")
    steps = range(1, len(truth) + 1)
    above.step(steps, truth, where="mid", color="0.7", linewidth=5, label="truth")
    above.step(steps, decoded, where="mid", color="black", label="decoded")
    above.set_yticks(range(3), NAMES)
    below.stackplot(steps, sure.T, colors=["#E69F00", "#56B4E9", "#009E73"], labels=NAMES)
    below.set(xlabel="step", ylabel="probability", xlim=(1, len(truth)), ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig("hidden_markov.png", dpi=150)
    print("hidden_markov.png written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter tracks")
    quick = parser.parse_args().quick
    truth, length, turn, steps = simulate(6 if quick else 20, 60 if quick else 200)
    fits = {}
    for states in (2, 3) if quick else (1, 2, 3, 4):
        fits[states] = pyroem.EM().fit(model, length, turn, steps, states)
        print(f"{states} states: BIC {fits[states].bic(rows=int(steps.sum())):.1f}")
    fit, by_gradient = fits[3].ordered("shape"), pyroem.MAP().fit(model, length, turn, steps, 3)
    print(f"MAP less EM: {by_gradient.log_joint - fit.log_joint:.1e} nats", end="\n\n")
    values = {"shape": SHAPE, "rate": RATE, "straight": STRAIGHT, "transition": MOVE}
    for name, value in values.items():
        print(name, fit.params[name].numpy().round(2).tolist(), " truth", value.tolist())
    seen = torch.arange(truth.shape[1]) < steps[:, None]
    print(f"states decoded: {(fit.predict() == truth)[seen].double().mean():.1%} right")
    (rows,) = (steps <= truth.shape[1] - 20).nonzero(as_tuple=True)  # of which we know what comes
    ahead = fit.forecast(20).states["z"][rows].argmax(-1)
    for h in (1, 5, 20):
        right = (ahead[:, h - 1] == truth[rows, steps[rows] + h - 1]).double().mean()
        print(f"state {h:2} steps after the end: {right:.0%} of {len(rows)} right")
    if find_spec("matplotlib") is not None:
        own = int(steps.argmax()), slice(None, int(steps.max()))
        picture(truth[own], fit.predict()[own], fit.responsibilities()[own])


if __name__ == "__main__":
    main()
