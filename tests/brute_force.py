"""An oracle: replays a program once for every joint value of its assignments.

It shares nothing with pyroem or with Pyro's enumeration. Every unobserved discrete site is
given concrete values, element by element within its plates, the program is run, and the
log-probabilities of its sites are added up. The cost is exponential: for tiny data only.

Masks follow Pyro's own enumeration: a mask silences observations (and priors of continuous
sites), but the prior of an assignment always sums to one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Model = Callable[..., Any]
MAX_COMBINATIONS = 5_000


class SetValues(Messenger):
    """Give parameters and unobserved samples the values listed, whatever their kind."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class _FirstOfSupport(Messenger):
    """Give every unobserved discrete sample the first value of its support."""

    def _pyro_sample(self, msg: Any) -> None:
        if _is_assignment(msg):
            msg["value"] = msg["fn"].enumerate_support(expand=True)[0]


@dataclass(frozen=True)
class _Assignment:
    """What an assignment looks like: its values, its shape and the plates it is in."""

    support: Tensor  # (K, *event_shape)
    batch_shape: torch.Size
    plate_dims: frozenset[int]


@dataclass(frozen=True)
class BruteForce:
    """The exact answers for one program, one point and one tiny data set."""

    log_likelihood: Tensor
    """Log-probability of the observations, assignments summed out."""
    log_prior: Tensor
    """Log-density of the unobserved continuous sites (zero where there are none)."""
    marginals: dict[str, Tensor]
    """Posterior of each assignment: the sizes of its plates from left to right, then K."""
    posterior: Tensor
    """Posterior probability of every joint value, (C,)."""
    one_hot: dict[str, Tensor]
    """Every joint value of each assignment as an indicator, (C, *batch_shape, K)."""
    plate_dims: dict[str, frozenset[int]]
    """The dims of the plates that each assignment is in."""

    @property
    def log_joint(self) -> Tensor:
        """The objective: log-likelihood plus log-prior."""
        return self.log_likelihood + self.log_prior

    def pairwise(self, site_a: str, site_b: str) -> Tensor:
        """Joint posterior of two assignments: sizes of the plates of either, then (Ka, Kb)."""
        a, b = self.one_hot[site_a].unsqueeze(-1), self.one_hot[site_b].unsqueeze(-2)
        batch = max(a.dim(), b.dim()) - 3
        a = a.reshape(a.shape[:1] + (1,) * (batch + 3 - a.dim()) + a.shape[1:])
        b = b.reshape(b.shape[:1] + (1,) * (batch + 3 - b.dim()) + b.shape[1:])
        joint = torch.tensordot(self.posterior, a * b, dims=1)
        return _keep_plates(joint, self.plate_dims[site_a] | self.plate_dims[site_b], 2)


def brute_force(model: Model, params: Mapping[str, Tensor], data: tuple[Any, ...]) -> BruteForce:
    """Sum out every assignment of ``model(*data)`` at ``params`` by trying all of their values.

    ``params`` holds constrained values of every ``pyro.param`` and every unobserved continuous
    sample. Results are differentiable in the values that require gradients.
    """
    with pyro.get_param_store().scope():  # a PyroModule would write to the user's store
        return _brute_force(model, params, data)


def _brute_force(model: Model, params: Mapping[str, Tensor], data: tuple[Any, ...]) -> BruteForce:
    sites = _assignments(model, params, data)
    sizes = [len(a.support) for a in sites.values() for _ in range(prod(a.batch_shape))]
    if prod(sizes) > MAX_COMBINATIONS:
        raise ValueError(f"{prod(sizes)} joint values are too many to try: cut the data down")
    table = torch.tensor(list(product(*map(range, sizes))), dtype=torch.long)

    indices: dict[str, Tensor] = {}
    start = 0
    for name, site in sites.items():
        stop = start + prod(site.batch_shape)
        indices[name] = table[:, start:stop].reshape((len(table), *site.batch_shape))
        start = stop

    log_joints, log_prior = [], torch.tensor(0.0, dtype=torch.float64)
    for c in range(len(table)):
        values = {name: site.support[indices[name][c]] for name, site in sites.items()}
        log_joint, log_prior = _log_prob(model, {**params, **values}, data)
        log_joints.append(log_joint)
    log_joint = torch.stack(log_joints)
    log_likelihood = log_joint.logsumexp(0)

    posterior = (log_joint - log_likelihood).exp()
    one_hot = {
        name: torch.nn.functional.one_hot(indices[name], len(site.support)).to(posterior.dtype)
        for name, site in sites.items()
    }
    plate_dims = {name: site.plate_dims for name, site in sites.items()}
    marginals = {
        name: _keep_plates(torch.tensordot(posterior, one_hot[name], dims=1), plate_dims[name], 1)
        for name in sites
    }
    return BruteForce(log_likelihood, log_prior, marginals, posterior, one_hot, plate_dims)


def _is_latent(site: Any) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def _is_assignment(site: Any) -> bool:
    return _is_latent(site) and site["fn"].has_enumerate_support


def _is_parameter(site: Any) -> bool:
    return site["type"] == "param" or (_is_latent(site) and not _is_assignment(site))


def _assignments(
    model: Model, params: Mapping[str, Tensor], data: tuple[Any, ...]
) -> dict[str, _Assignment]:
    """Run the program once and describe its assignments."""
    with SetValues(params), _FirstOfSupport():
        trace = poutine.trace(model).get_trace(*data)
    sites = {}
    for name, site in trace.nodes.items():
        if _is_assignment(site):
            fn: Any = site["fn"]
            support = fn.enumerate_support(expand=False)
            dims = frozenset(f.dim for f in site["cond_indep_stack"] if f.dim is not None)
            sites[name] = _Assignment(
                support.reshape((len(support), *fn.event_shape)), fn.batch_shape, dims
            )
        elif _is_parameter(site) and name not in params:
            raise ValueError(f"no value was given for {name!r}")
    return sites


def _log_prob(
    model: Model, values: Mapping[str, Tensor], data: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Log-probability of (assignments and observations, continuous unobserved sites)."""
    with SetValues(values):
        trace = poutine.trace(model).get_trace(*data)
    trace.compute_log_prob()
    joint = prior = torch.tensor(0.0, dtype=torch.float64)
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if _is_assignment(site):
            joint = joint + (site["unscaled_log_prob"] * site["scale"]).sum()
        elif site["is_observed"]:
            joint = joint + site["log_prob_sum"]
        else:
            prior = prior + site["log_prob_sum"]
    return joint, prior


def _keep_plates(tensor: Tensor, plate_dims: frozenset[int], event_dim: int) -> Tensor:
    """Drop the batch dims of size one that belong to no plate."""
    batch_dim = tensor.dim() - event_dim
    shape = [tensor.shape[i] for i in range(batch_dim) if i - batch_dim in plate_dims]
    return tensor.reshape(shape + list(tensor.shape[batch_dim:]))
