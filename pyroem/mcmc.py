"""The posterior of the parameters by Hamiltonian Monte Carlo, the assignments summed out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from pyro.ops import stats
from torch import Tensor
from torch.distributions import biject_to

from pyroem._pyro import isolated
from pyroem.derivatives import check_in_memory
from pyroem.errors import ModelError, SettingError
from pyroem.fit import Fit
from pyroem.structure import Params, quoted
from pyroem.text import aligned, label
from pyroem.uncertainty import check_free


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws from the posterior.

    Attributes:
    ----------
    params
        By parameter ``[chains, draws, ...]``, in the constrained space; what the fit held fixed is
        the same in every draw.
    divergences
        The number of transitions that diverged: where there are any, do not trust the rest.
    """

    params: Params
    divergences: int

    def __str__(self) -> str:
        chains, draws = next(iter(self.params.values())).shape[:2]
        table = [["", "mean", "std", "5%", "95%", "n_eff", "r_hat"]]
        for name, own in self.summary().items():
            columns = [own[key].reshape(-1).tolist() for key in table[0][1:]]
            places = product(*map(range, own["mean"].shape))
            for place, *numbers in zip(places, *columns, strict=True):
                table.append([label(name, place), *(f"{v:.6g}" for v in numbers)])
        head = f"{draws} draws of the posterior in each of {chains} chain{'s' * (chains > 1)}"
        lost = f"{self.divergences} transitions diverged." if self.divergences else ""
        return "\n".join([head, *aligned(table), *([lost] if lost else [])])

    def __repr__(self) -> str:
        return f"<Draws of {', '.join(self.params)}>"

    def summary(self) -> dict[str, dict[str, Tensor]]:
        """By parameter: mean, standard deviation, 5 % and 95 % quantiles, n_eff, r_hat.

        ``r_hat`` compares the halves of each chain, and the chains; above 1.05 they have not mixed.
        Of what is fixed both are NaN.
        """
        found = {}
        for name, x in self.params.items():
            flat = x.flatten(0, 1)
            still = bool((flat == flat[0]).all())
            nothing = torch.full_like(flat[0], torch.nan)
            low, high = torch.quantile(flat, torch.tensor([0.05, 0.95]).to(flat), dim=0)
            found[name] = {
                "mean": flat.mean(0),
                "std": flat.std(0),
                "5%": low,
                "95%": high,
                "n_eff": nothing if still else stats.effective_sample_size(x),
                "r_hat": nothing if still else stats.split_gelman_rubin(x),
            }
        return found


def mcmc(
    fit: Fit,
    *,
    draws: int = 500,
    warmup: int = 300,
    chains: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Draws:
    """Draw the parameters of a fit's program from their posterior, by the No-U-Turn sampler.

    The target is ``p(data | params) p(params)`` with the assignments summed out exactly; a
    parameter without a prior has a flat one in the constrained space (where that is improper, so
    may the posterior be). All chains start at the fit, and stay near its names of the states as
    long as the modes lie apart. For small problems: each draw takes tens of gradients.

    Raises:
    ------
    SettingError
        For numbers that are not positive.
    ModelError
        Where every parameter is fixed, a parameter's constraint has no bijection with
        unconstrained numbers (a positive definite matrix: write it as a Cholesky factor), or
        elements of it are held.
    """
    for name, value in (("draws", draws), ("warmup", warmup), ("chains", chains)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"mcmc: {name} must be a positive integer, got {value!r}.")
    problem = fit.problem
    check_in_memory(problem, "mcmc")
    check_free(problem, "mcmc")
    parameters = {n: problem.structure.parameters[n] for n in problem.free}
    transforms, lost = {}, []
    for name, parameter in parameters.items():
        try:
            transforms[name] = biject_to(parameter.constraint)
        except NotImplementedError:
            lost.append(name)
        if parameter.held is not None:
            lost.append(name)
    if lost:
        raise ModelError(
            f"mcmc: no unconstrained coordinates for {quoted(lost)}. (Elements that are held have"
            " none; of a positive definite matrix sample a Cholesky factor, with the constraint"
            " lower_cholesky.)"
        )

    def potential(raw: Params) -> Tensor:
        values = {n: transforms[n](raw[n]) for n in transforms}
        log_likelihood, log_prior = problem.log_joint({**fit.params, **values})
        jacobian = sum(
            (transforms[n].log_abs_det_jacobian(raw[n], values[n]).sum() for n in transforms),
            torch.zeros(()),
        )
        return -(log_likelihood + log_prior + jacobian)

    dtype = problem.structure.program.dtype
    start = {n: transforms[n].inv(fit.params[n]).detach() for n in transforms}
    found: list[Params] = []
    diverged = 0
    with isolated(dtype, seed):
        for _ in range(chains):
            kernel: Any = NUTS(potential_fn=potential, jit_compile=False)
            sampler = MCMC(
                kernel,
                num_samples=draws,
                warmup_steps=warmup,
                initial_params={n: v.clone() for n, v in start.items()},
                disable_progbar=not progress,
            )
            sampler.run()
            raw = sampler.get_samples()
            found.append({n: transforms[n](raw[n]).detach() for n in transforms})
            diverged += sum(len(v) for v in sampler.diagnostics()["divergences"].values())
    drawn = {n: torch.stack([f[n] for f in found]) for n in transforms}
    fixed = {n: v.expand((chains, draws, *v.shape)) for n, v in fit.params.items()}
    return Draws({n: drawn.get(n, fixed[n]) for n in fit.params}, diverged)
