"""Differentiating through a fit: the converged parameters as a function of what they came from.

At a maximum ``g(u, a) = d l / d u = 0``, where ``a`` is anything that the objective depends on:
data, row weights, a prior's setting. So ``d u / d a = I^-1 dg / d a``, with ``I`` the observed
information: the implicit function theorem. No iteration of the fit is differentiated.

Source: Krantz and Parks (2002), The Implicit Function Theorem; of EM: Gould et al. (2016).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pyroem._pyro import as_data
from pyroem.derivatives import check_in_memory, coordinates, log_joint
from pyroem.errors import ModelError, SettingError
from pyroem.fit import Fit
from pyroem.problem import numbers_of
from pyroem.structure import Params
from pyroem.uncertainty import SINGULAR, STEEP, check_free, directions, rows_of_derivatives


def implicit(fit: Fit, *args: Any, weights: Any = None, **kwargs: Any) -> Params:
    """The parameters of a fit as differentiable functions of its arguments.

    Parameters
    ----------
    fit
        A fit that has converged.
    args, kwargs
        What the program was called with, as tensors of which some require gradients; none to leave
        the data as it is. Tensors that the program itself holds (a prior's setting in a closure)
        count too.
    weights
        One number a row, with gradients if the parameters' dependence on single rows is wanted:
        ``d params / d weights[n]`` is the influence of row n.

    Returns:
    -------
    dict of tensors
        The values of ``fit.params``. Their first derivatives are those of the maximum; second ones
        are not.

    Raises:
    ------
    ModelError
        Where every parameter is fixed, the parameters are no maximum for these arguments, or the
        information is singular.
    """
    problem = fit.problem
    check_in_memory(problem, "implicit")
    check_free(problem, "implicit")
    structure, dtype = problem.structure, problem.structure.program.dtype
    program = structure.program
    if args or kwargs:
        if program.fill and structure.chains:
            raise ModelError(
                f"implicit: {', '.join(program.fill)} has NaN cells that the program masks, in a"
                " chain: derivatives by such data are not supported. Those by row weights and by"
                " tensors of the program are: give no data."
            )
        program = replace(program, args=as_data(args, dtype), kwargs=as_data(kwargs, dtype))
        structure = replace(structure, program=program)
    own = problem.row_weights if weights is None else numbers_of(weights, dtype)
    if own is not None and tuple(own.shape) != structure.unit_shape:
        raise SettingError(
            f"implicit: weights must have the shape of the rows {structure.unit_shape}, got"
            f" {tuple(own.shape)}."
        )
    at = coordinates(problem, fit.params)
    u = at.vector.clone().requires_grad_()
    with torch.enable_grad():
        total = log_joint(structure, at.params(u), own)
        (slope,) = torch.autograd.grad(total, u, create_graph=True)
        information = -rows_of_derivatives(slope, u)
        basis, _ = directions(at)
        information = basis.T @ information @ basis
        information = 0.5 * (information + information.T)
        scale = information.diagonal().abs().clamp(min=1e-300).sqrt()
        values = torch.linalg.eigvalsh(information / scale / scale[:, None])
        if not bool((values > SINGULAR * values.abs().max()).all()):
            raise ModelError(
                "implicit: the information matrix is not positive definite at the fit, so that the"
                " maximum is no function of its arguments. fit.uncertainty() says more."
            )
        step = torch.linalg.solve(information, basis.T @ slope)
        far = float((step.detach() @ information @ step.detach()).sqrt())
        if far > STEEP:
            raise ModelError(
                "implicit: the parameters are no maximum for these arguments: a Newton step would"
                f" move them by {far:.2g} standard errors."
            )
        # The value stays; the derivative is that of the step.
        return at.params(u.detach() + basis @ (step - step.detach()))
