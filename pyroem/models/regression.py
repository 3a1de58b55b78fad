"""Mixtures of regressions, and mixtures of experts, as a Pyro program."""

from functools import partial
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.models.assignments import (
    Program,
    assignment,
    beside,
    check_choice,
    check_count,
    equal_weights,
    rows,
)

Response = Literal["gaussian", "poisson", "binomial"]


def mixture_of_regressions(
    components: int,
    family: Response = "gaussian",
    intercept: bool = False,
    concomitant: bool = False,
) -> Program:
    """The program ``program(x, y, labels=None, size=None)``, covariates ``x [N, D]``, ``y [N]``.

        z_n ~ Categorical(weights),   eta_nk = coefficients_k . x_n

    - ``"gaussian"``: ``y_n | z_n = k ~ Normal(eta_nk, scale_k)``
    - ``"poisson"``: ``y_n | z_n = k ~ Poisson(size_n exp(eta_nk))``, ``size [N]`` the exposures
    - ``"binomial"``: ``y_n | z_n = k ~ Binomial(size_n, logits=eta_nk)``, ``size [N]`` the trials

    with ``weights [K]`` on the simplex, ``coefficients [K, D]`` and ``scale [K]``; ``size`` is one
    if left out. The covariates are taken as they are; with ``intercept`` a column of ones comes
    before them (D + 1 coefficients). With ``concomitant`` the weights depend on the covariates,

        z_n ~ Categorical(logits = gate x_n),   gate [K, D] in place of ``weights``

    (a mixture of experts; ``gate`` is known up to a vector that all components share). For
    ``labels`` see :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a setting
    or shape outside of these. See Grün and Leisch (2008), Journal of Statistical Software 28(4).
    """
    check_count("components", components)
    check_choice("family", family, get_args(Response))
    return partial(
        _program,
        components=components,
        family=family,
        intercept=intercept,
        concomitant=concomitant,
    )


def _program(
    x: torch.Tensor,
    y: torch.Tensor,
    labels: torch.Tensor | None = None,
    size: torch.Tensor | None = None,
    *,
    components: int,
    family: Response,
    intercept: bool,
    concomitant: bool,
) -> None:
    x = rows(x)
    y = beside("y", y, x).to(x.dtype)
    if size is not None and family == "gaussian":
        raise ValueError("Expected size with counts only; got it with family 'gaussian'.")
    size = x.new_ones(len(x)) if size is None else beside("size", size, x).to(x.dtype)
    X = torch.cat([torch.ones_like(x[:, :1]), x], -1) if intercept else x
    K, (N, D) = components, X.shape
    if concomitant:
        gate = pyro.param("gate", lambda: x.new_zeros(K, D))
        weights = dist.Categorical(logits=X @ gate.T)
    else:
        weights = dist.Categorical(equal_weights(x, K))
    coefficients = pyro.param("coefficients", lambda: x.new_zeros(K, D))
    if family == "gaussian":
        scale = pyro.param("scale", lambda: x.new_ones(K), constraint=constraints.positive)
    with pyro.plate("rows", N):
        z = assignment(weights, x, labels)
        eta = (coefficients[z] * X).sum(-1)
        if family == "gaussian":
            response = dist.Normal(eta, scale[z])
        elif family == "poisson":
            response = dist.Poisson((eta + size.log()).exp())
        else:
            response = dist.Binomial(size, logits=eta)
        pyro.sample("y", response, obs=y)
