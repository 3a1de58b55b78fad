"""Mixtures of Student's t distributions: clusters with heavy tails, as a Pyro program."""

from functools import partial
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyroem.models.assignments import (
    Program,
    assignment,
    check_choice,
    check_count,
    equal_weights,
    rows,
)

Covariance = Literal["full", "diagonal", "tied", "spherical"]

TAILS = constraints.interval(0.0, 1e6)  # beyond, a t distribution cannot be told from a Gaussian


def student_t_mixture(
    components: int, covariance: Covariance = "full", df: float | None = None
) -> Program:
    """The program ``program(x, labels=None)`` of a mixture of t distributions, for rows ``[N, D]``.

        z_n ~ Categorical(weights),   x_n | z_n = k ~ t(df_k, loc_k, S_k)

    with ``weights [K]`` on the simplex, ``loc [K, D]``, and by the argument ``covariance``

    - ``"full"``: ``scale_tril [K, D, D]``, ``S_k = L_k L_k'`` (multivariate t)
    - ``"tied"``: ``scale_tril [D, D]``, the same for all components (multivariate t)
    - ``"diagonal"``: ``scale [K, D]``, columns that are independent t given the component
    - ``"spherical"``: ``scale [K]``, the same for all columns (independent t)

    ``df [K]`` are the degrees of freedom, free parameters up to 1e6 (beyond, no arithmetic tells
    the distribution from a Gaussian); or given by the argument ``df``. For
    ``labels`` see :func:`pyroem.models.assignments.assignment`. Raises ``ValueError`` on a setting
    or shape outside of these. See Peel and McLachlan (2000), Statistics and Computing 10.
    """
    check_count("components", components)
    check_choice("covariance", covariance, get_args(Covariance))
    if df is not None and not df > 0:
        raise ValueError(f"Expected df > 0, or None for a free parameter; got {df}.")
    return partial(_program, components=components, covariance=covariance, df=df)


def _program(
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    components: int,
    covariance: Covariance,
    df: float | None,
) -> None:
    x = rows(x)
    K, (N, D) = components, x.shape
    weights = equal_weights(x, K)
    loc = pyro.param("loc", lambda: x.new_zeros(K, D))
    matrix = covariance in ("full", "tied")
    one = torch.eye(D).to(x) if matrix else x.new_ones(())
    shape = {"full": (K, D, D), "diagonal": (K, D), "tied": (D, D), "spherical": (K,)}
    spread = pyro.param(
        "scale_tril" if matrix else "scale",
        lambda: one.expand(shape[covariance]).clone(),
        constraint=constraints.lower_cholesky if matrix else constraints.positive,
    )
    if df is None:
        tails = pyro.param("df", lambda: x.new_full((K,), 8.0), constraint=TAILS)
    else:
        tails = x.new_full((K,), df)
    with pyro.plate("rows", N):
        z = assignment(dist.Categorical(weights), x, labels)
        own = spread if covariance == "tied" else spread[z]
        if matrix:
            emission = dist.MultivariateStudentT(tails[z], loc[z], own)
        else:
            own = own.unsqueeze(-1) if covariance == "spherical" else own
            emission = dist.StudentT(tails[z].unsqueeze(-1), loc[z], own).to_event(1)
        pyro.sample("x", emission, obs=x)
