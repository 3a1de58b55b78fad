"""Hidden Markov models of the major earthquakes a year, 1900 to 2006, with 1 to 4 states.

The states are decoded, the next years forecast, the residuals looked at, and a picture is drawn.
The log-likelihoods are those of Zucchini, MacDonald and Langrock, Hidden Markov Models for Time
Series: -391.9189, -342.3183, -329.4603 and -327.8316.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyroem
from pyroem import datasets


def model(counts: torch.Tensor, states: int) -> None:
    """Counts that follow a rate of their own in each state; the chain starts in equilibrium."""
    stay = 0.8 * torch.eye(states) + 0.2 / states
    transition = pyro.param("transition", stay, constraint=constraints.simplex)
    levels = torch.linspace(10, 30, states) if states > 1 else torch.tensor([20.0])
    rate = pyro.param("rate", levels, constraint=constraints.positive)
    ones = torch.ones(states, states)
    initial = torch.linalg.solve((torch.eye(states) - transition + ones).mT, ones[0])
    z = None
    for t in pyro.markov(range(len(counts))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=counts[t])


def picture(fit: pyroem.Fit, years: torch.Tensor, counts: torch.Tensor, path: str) -> None:
    """The counts with the rate of the most probable states; the probabilities of the states."""
    import matplotlib.pyplot as plt

    size = {"figsize": (9, 6), "layout": "constrained"}
    figure, (above, below) = plt.subplots(2, 1, sharex=True, **size)
    above.plot(years, counts, color="0.6", marker=".", linewidth=0.8)
    above.step(years, fit.params["rate"][fit.predict()], where="mid", color="tab:red")
    above.set_ylabel("earthquakes")
    order = fit.params["rate"].argsort()
    below.stackplot(years, fit.responsibilities()[:, order].T)
    below.set_ylabel("probability of each state")
    below.legend([f"rate {rate:.1f}" for rate in fit.params["rate"][order]], loc="lower right")
    below.set_xlabel("year")
    below.set_ylim(0, 1)
    figure.savefig(path)
    print(f"{path} written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 2 states, the first 40 years")
    parser.add_argument("--output", default="earthquakes.png", help="where the picture goes")
    options = parser.parse_args()
    columns, values = datasets.load("earthquakes")
    years, counts = (values[:, columns.index(name)] for name in ("year", "count"))
    if options.quick:
        years, counts = years[:40], counts[:40]

    print("states  log-likelihood  parameters     AIC     BIC")
    fits = []
    for states in range(1, 3 if options.quick else 5):
        fit = pyroem.EM(tol=1e-8).fit(model, counts, states)
        fits.append(fit)
        criteria = f"{fit.aic():6.1f}  {fit.bic():6.1f}"
        print(f"{states:6}  {fit.log_likelihood:14.4f}  {fit.df:10}  {criteria}")
    best = min(fits, key=lambda fit: fit.aic())
    print("\nThe least AIC:", best, "\n")
    for name, value in best.params.items():
        print(name, value.numpy().round(3).tolist())
    print("\nThe most probable states:", "".join(map(str, best.predict().tolist())))
    residuals = best.residuals()["x"]
    print(f"Pseudo-residuals: mean {residuals.mean():.2f}, sd {residuals.std():.2f}")
    ahead = best.forecast(5)
    print("Expected in the next years:", ahead.mean["x"].numpy().round(1).tolist())
    picture(best, years, counts, options.output)


if __name__ == "__main__":
    main()
