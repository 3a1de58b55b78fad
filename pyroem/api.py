"""Functions on a program at given parameters: objective, E-step, expected log-joint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyroem._pyro import as_data, isolated
from pyroem.curves import Curve, curve
from pyroem.errors import SettingError
from pyroem.estep.trace import Posterior, posterior
from pyroem.mstep.update import expected_sum
from pyroem.problem import pose
from pyroem.reading import read
from pyroem.structure import Structure

Model = Callable[..., Any]


def _read(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: Any) -> Structure:
    """Read the program outside any transform of ``torch.func``: those are per thread."""
    with ThreadPoolExecutor(1) as pool:
        structure = pool.submit(read, model, args, kwargs, dtype=dtype).result()
    # The data itself may be what is differentiated: it has to come from this thread.
    own = replace(structure.program, args=as_data(args, dtype), kwargs=as_data(kwargs, dtype))
    return replace(structure, program=own)


def log_joint(
    model: Model,
    params: Mapping[str, Any],
    *args: Any,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> Tensor:
    """``log p(data | params) + log p(params)``, the assignments summed out exactly.

    ``params`` holds a value for every parameter of the program (``pyro.param`` and latent
    continuous sites), in the constrained space. The result is a scalar, differentiable to any
    order in ``params``, under autograd and under ``torch.func``.
    """
    structure = _read(model, args, kwargs, dtype)
    values = structure.values(params)
    with isolated(dtype):
        trace = structure.enumerate(values)
        return trace.log_likelihood(trace.tensors()) + structure.log_prior(trace)


def likelihood_curve(
    model: Model,
    params: Mapping[str, Any],
    *args: Any,
    which: str,
    values: Any = None,
    points: int = 101,
    weights: Any = None,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> Curve:
    """:func:`log_joint` along one element of a parameter, all others held as in ``params``.

    ``which`` is an element (``"loc[1]"``; of a single number the parameter's name), ``values``
    what it is set to, else ``points`` values around where it stands; ``weights`` are those of rows.
    See :func:`pyroem.curves.curve`. Through a fit it is ``fit.curve``.
    """
    problem = pose(model, args, kwargs, dtype=dtype, weights=weights)
    own = {n: v.detach() for n, v in problem.structure.values(params).items()}
    return curve(problem, own, which, values, points)


def e_step(
    model: Model,
    params: Mapping[str, Any],
    *args: Any,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> Posterior:
    """The posterior of the assignments at ``params``; see :class:`Posterior`."""
    structure = _read(model, args, kwargs, dtype)
    values = {n: v.detach() for n, v in structure.values(params).items()}
    with isolated(dtype):
        return posterior(structure, values)


def expected_log_joint(
    model: Model,
    params: Mapping[str, Any],
    expected: Posterior,
    *args: Any,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> Tensor:
    """``Q(params | old) = E[log p(data, assignments | params)] + log p(params)``.

    ``expected`` is the posterior at the old parameters, from :func:`e_step`. At ``params = old``
    the gradient of Q is that of :func:`log_joint` (Fisher's identity).
    """
    if not isinstance(expected, Posterior):
        raise SettingError(
            f"expected: a Posterior from pyroem.e_step is needed, got {type(expected).__name__}."
        )
    structure = _read(model, args, kwargs, dtype)
    values = structure.values(params)
    with isolated(dtype):
        trace = structure.enumerate(values)
        total = structure.log_prior(trace)
        for name, factor in trace.factors.items():
            weights = expected.weights[name]
            if weights.shape != factor.tensor.shape:
                raise SettingError(
                    f"expected: the weights of site '{name}' have shape {tuple(weights.shape)}, but"
                    f" the program gives {tuple(factor.tensor.shape)}; was it another data set?"
                )
            total = total + expected_sum(weights, factor.tensor) * trace.scale
        return total
