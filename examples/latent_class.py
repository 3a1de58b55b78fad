"""Latent class analysis with priors: six yes-or-no items, three kinds of respondents.

Dirichlet and Beta priors are conjugate, so every M-step is in closed form, and the result is the
posterior mode that gradient MAP finds too.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch

import pyroem


def model(answers: torch.Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("items", 6, dim=-1), pyro.plate("classes", 3, dim=-2):
        yes = pyro.sample("yes", dist.Beta(1.5, 1.5))
    with pyro.plate("respondents", len(answers)):
        kind = pyro.sample("kind", dist.Categorical(weights))
        pyro.sample("answers", dist.Bernoulli(yes[kind]).to_event(1), obs=answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer respondents")
    size = 300 if parser.parse_args().quick else 3_000
    generator = torch.Generator().manual_seed(1)
    truth = torch.tensor([[0.9] * 6, [0.8, 0.8, 0.8, 0.2, 0.2, 0.2], [0.1] * 6])
    kind = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), size, True, generator=generator)
    answers = torch.bernoulli(truth[kind], generator=generator)

    table = pyroem.compare(model, answers)
    print(table, end="\n\n")
    fit = table.fits[table.best]
    print(fit.explain(), end="\n\n")
    print("class  share  probability of yes to each item, and the truth of the nearest class")
    order = torch.cdist(fit.params["yes"], truth.double()).argmin(1)
    for k, (weight, yes) in enumerate(zip(fit.params["weights"], fit.params["yes"], strict=True)):
        own, near = (" ".join(f"{p:.2f}" for p in v.tolist()) for v in (yes, truth[order[k]]))
        print(f"{k:5d}  {float(weight):.3f}  {own}   {near}")


if __name__ == "__main__":
    main()
