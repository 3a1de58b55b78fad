"""Log-densities of rows under each component, from fitted parameters: plain numpy formulas.

Each function returns ``log p(x_n | z_n = k)``, rows by components. NaN is a missing value: what is
seen of the row has the marginal density. The tests hold every formula against the Pyro program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.special import gammaln

Array = NDArray[np.floating]

LOG_TWO_PI = float(np.log(2 * np.pi))
SMALLEST = 1e-100  # of rates and probabilities: what the closed forms hold them above


def precision_cholesky(covariances: Array, form: str) -> Array:
    """Upper triangular ``U`` with ``U U' = covariance^-1``; of variances ``1 / sqrt(variance)``.

    ``form`` is ``"full"`` ``[K, D, D]``, ``"tied"`` ``[D, D]``, ``"diag"`` ``[K, D]`` or
    ``"spherical"`` ``[K]``. Raises ``numpy.linalg.LinAlgError`` where a covariance is singular.
    """
    if form in ("diag", "spherical"):
        if not np.all(covariances > 0):
            raise np.linalg.LinAlgError("a variance is not positive")
        return 1 / np.sqrt(covariances)
    lower = np.linalg.cholesky(covariances)
    stack = lower.reshape((-1, *lower.shape[-2:]))
    one = np.eye(lower.shape[-1], dtype=lower.dtype)
    inverse = [linalg.solve_triangular(matrix, one, lower=True).T for matrix in stack]
    return np.ascontiguousarray(np.stack(inverse).reshape(lower.shape))


def gaussian(X: Array, means: Array, cholesky: Array, form: str) -> Array:
    """``Normal(x_n; mean_k, (U_k U_k')^-1)`` by ``U = precision_cholesky(covariances, form)``."""
    squares, log_det = _distances(X, means, cholesky, form)
    seen = (~np.isnan(X)).sum(1)[:, None] if np.isnan(X).any() else X.shape[1]
    return log_det - 0.5 * (seen * LOG_TWO_PI + squares)


def student_t(X: Array, df: Array, means: Array, cholesky: Array, form: str) -> Array:
    """Multivariate t (``"full"``, ``"tied"``) or columns that are independent t, by the form."""
    if form in ("full", "tied"):
        squares, log_det = _distances(X, means, cholesky, form)
        D = (~np.isnan(X)).sum(1)[:, None]
        normaliser = gammaln((df + D) / 2) - gammaln(df / 2) - 0.5 * D * np.log(np.pi * df)
        return normaliser + log_det - 0.5 * (df + D) * np.log1p(squares / df)
    normaliser = gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * np.log(np.pi * df)
    found = np.empty((len(X), len(means)))
    for k, mean in enumerate(means):
        inverse = np.broadcast_to(cholesky[k], mean.shape)
        square = ((X - mean) * inverse) ** 2
        cells = normaliser[k] + np.log(inverse) - 0.5 * (df[k] + 1) * np.log1p(square / df[k])
        found[:, k] = np.nansum(cells, 1)
    return found


def _distances(X: Array, means: Array, cholesky: Array, form: str) -> tuple[Array, Array]:
    """Squared Mahalanobis distances and ``log det U_k``, over what is seen of each row."""
    missing = np.isnan(X)
    if not missing.any():
        return _complete(X, means, cholesky, form)
    squares = np.empty((len(X), len(means)))
    log_det = np.empty_like(squares)
    patterns, own = np.unique(missing, axis=0, return_inverse=True)
    for p, pattern in enumerate(patterns):
        rows, seen = own.reshape(-1) == p, ~pattern
        part = _marginal(cholesky, form, seen)
        squares[rows], log_det[rows] = _complete(X[np.ix_(rows, seen)], means[:, seen], part, form)
    return squares, log_det


def _marginal(cholesky: Array, form: str, seen: NDArray[np.bool_]) -> Array:
    """``U`` of the columns that are seen alone."""
    if form == "spherical":
        return cholesky
    if form == "diag":
        return cholesky[:, seen]
    covariance = np.linalg.inv(cholesky @ np.swapaxes(cholesky, -1, -2))
    part = covariance[..., seen, :][..., seen]
    return precision_cholesky(part, form) if seen.any() else part


def _complete(X: Array, means: Array, cholesky: Array, form: str) -> tuple[Array, Array]:
    K, D = means.shape
    squares = np.empty((len(X), K), dtype=np.result_type(X, means))
    if form == "tied":
        projected, centres = X @ cholesky, means @ cholesky
        for k in range(K):
            squares[:, k] = _row_squares(projected - centres[k])
        return squares, np.full(K, np.log(np.diagonal(cholesky)).sum())
    for k in range(K):
        apart = X - means[k]
        apart = apart @ cholesky[k] if form == "full" else apart * cholesky[k]
        squares[:, k] = _row_squares(apart)
    if form == "full":
        diagonal = np.diagonal(cholesky, axis1=-2, axis2=-1)
        return squares, np.log(diagonal).sum(-1)
    return squares, np.log(cholesky).sum(-1) if form == "diag" else D * np.log(cholesky)


def _row_squares(x: Array) -> Array:
    return np.einsum("nd,nd->n", x, x)


def split(X: Array) -> tuple[Array, Array]:
    """``X`` with zeros where it is missing, and where it is seen, as numbers."""
    seen = ~np.isnan(X)
    return np.where(seen, X, 0.0), seen.astype(X.dtype)


def poisson(X: Array, rate: Array) -> Array:
    """Independent counts: ``sum_j x_nj log(rate_kj) - rate_kj - log(x_nj!)``."""
    x, seen = split(X)
    measure = (gammaln(x + 1) * seen).sum(1, keepdims=True)
    return x @ np.log(np.maximum(rate, SMALLEST)).T - seen @ rate.T - measure


def bernoulli(X: Array, probs: Array) -> Array:
    """Independent binary columns: ``sum_j x_nj log(p_kj) + (1 - x_nj) log(1 - p_kj)``."""
    x, seen = split(X)
    yes = np.log(np.maximum(probs, SMALLEST))
    no = np.log(np.maximum(1 - probs, SMALLEST))
    return x @ yes.T + (seen - x) @ no.T


def categorical(codes: Array, tables: Sequence[Array]) -> Array:
    """Independent categories: ``sum_j log(tables_j[k, x_nj])``, codes from 0."""
    total = np.zeros((len(codes), len(tables[0])))
    for column, table in zip(codes.T, tables, strict=True):
        seen = ~np.isnan(column)
        logs = np.log(np.maximum(table, SMALLEST)).T
        if seen.all():
            total += logs[column.astype(np.intp)]
        else:
            total[seen] += logs[column[seen].astype(np.intp)]
    return total


def draw_rows(
    rng: np.random.RandomState,
    weights: Array,
    n: int,
    draw: Callable[[int, int], NDArray],
) -> tuple[NDArray, NDArray[np.int64]]:
    """``n`` rows of a mixture, component by component: ``draw(k, count)`` makes those of one."""
    share = np.asarray(weights, dtype=np.float64)
    counts = rng.multinomial(n, share / share.sum() if abs(share.sum() - 1) > 1e-12 else share)
    parts = [draw(k, int(count)) for k, count in enumerate(counts)]
    return np.concatenate(parts), np.repeat(np.arange(len(counts), dtype=np.int64), counts)
