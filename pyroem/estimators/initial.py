"""Where scikit-learn's GaussianMixture starts: the same responsibilities, the same moments."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.utils import check_array

from pyroem.estimators.densities import precision_cholesky

SINGULAR = (
    "Fitting the mixture model failed because some components have ill-defined empirical"
    " covariance (for instance caused by singleton or collapsed samples). Try to decrease the"
    " number of components, increase reg_covar, or scale the input data."
)
SEEDS = ("k-means++", "random_from_data")
CAP = 1e-3  # of a column's variance: the most that is added to it


def ridge(X: NDArray, weights: NDArray | None, amount: float) -> NDArray:
    """What ``reg_covar`` adds to each column's variance ``[D]``; NaN are left out."""
    own = np.where(np.isnan(X), 0.0, 1.0 if weights is None else weights[:, None])
    total = np.maximum(own.sum(0), np.finfo(np.float64).tiny)
    x = np.nan_to_num(X.astype(np.float64))
    centre = (own * x).sum(0) / total
    variance = (own * (x - centre) ** 2).sum(0) / total
    return np.minimum(amount, np.where(variance > 0, CAP * variance, np.inf))


def first_responsibilities(
    X: NDArray, K: int, how: str, rng: np.random.RandomState, weights: NDArray | None
) -> NDArray:
    """``resp (n_samples, K)``, drawn from ``rng`` as scikit-learn draws it.

    ``"k-means++"`` and ``"random_from_data"`` choose one row for each component; the other rows
    belong to none.
    """
    N = len(X)
    if how == "random":
        found = rng.uniform(size=(N, K)).astype(X.dtype)
        return found / found.sum(1, keepdims=True)
    found = np.zeros((N, K), dtype=X.dtype)
    if how == "kmeans":
        model = KMeans(n_clusters=K, n_init=1, random_state=rng).fit(X, sample_weight=weights)
        found[np.arange(N), model.labels_] = 1
    elif how == "random_from_data":
        found[rng.choice(N, size=K, replace=False), np.arange(K)] = 1
    else:
        seeds = kmeans_plusplus(X, K, random_state=rng, sample_weight=weights)[1]
        found[seeds, np.arange(K)] = 1
    return found


def nearest_seed(X: NDArray, responsibilities: NDArray) -> NDArray:
    """Every row with the seed that is nearest to it."""
    seeds = X[responsibilities.argmax(0)]
    squares = ((X[:, None] - seeds) ** 2).sum(-1)
    return np.eye(len(seeds))[squares.argmin(1)]


def moments(
    X: NDArray, resp: NDArray, weights: NDArray | None, form: str, ridge: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    """Weights, means and covariances of weighted rows; ``ridge [D]`` is added to variances.

    Where the responsibilities of a row do not sum to one, a tied covariance is still taken over
    all rows, as in scikit-learn.
    """
    own = np.ones(len(X)) if weights is None else weights
    share = resp * own[:, None]
    total = share.sum(0) + 10 * np.finfo(resp.dtype).eps
    means = share.T @ X / total[:, None]
    if form == "full":
        apart = [X - mean for mean in means]
        covariances = np.stack(
            [(r[:, None] * a).T @ a / n for r, a, n in zip(share.T, apart, total, strict=True)]
        )
        return total / total.sum(), means, covariances + np.diag(ridge)
    if form == "tied":
        shift = X.mean(0) if np.allclose(resp.sum(1), 1) else 0.0
        centred, centres = X - shift, means - shift
        scatter = (own[:, None] * centred).T @ centred - (total * centres.T) @ centres
        return total / total.sum(), means, scatter / total.sum() + np.diag(ridge)
    squares = [r @ (X - mean) ** 2 for r, mean in zip(share.T, means, strict=True)]
    variances = np.stack(squares) / total[:, None] + ridge
    variances = variances if form == "diag" else variances.mean(1)
    return total / total.sum(), means, variances


def check_regular(covariances: NDArray, form: str) -> None:
    """Raise ``ValueError``, in scikit-learn's words, where a covariance is singular."""
    try:
        precision_cholesky(covariances, form)
    except np.linalg.LinAlgError as error:
        raise ValueError(SINGULAR) from error


def check_shape(value: NDArray, shape: tuple[int, ...], name: str) -> None:
    """Raise ``ValueError`` unless ``value`` has this shape."""
    if value.shape != shape:
        raise ValueError(
            f"The parameter '{name}' should have the shape of {shape}, but got {value.shape}"
        )


def check_weights(weights: Any, K: int) -> NDArray:
    """``weights_init``: numbers from 0 to 1 that sum to one."""
    weights = check_array(weights, dtype=[np.float64, np.float32], ensure_2d=False)
    check_shape(weights, (K,), "weights")
    if weights.min() < 0 or weights.max() > 1:
        raise ValueError(
            "The parameter 'weights' should be in the range [0, 1], but got max value"
            f" {weights.max():.5f}, min value {weights.min():.5f}"
        )
    if abs(weights.sum() - 1) > (1e-6 if weights.dtype == np.float32 else 1e-8):
        raise ValueError(
            "The parameter 'weights' should be normalized, but got sum(weights) ="
            f" {weights.sum():.5f}"
        )
    return weights


def check_means(means: Any, K: int, D: int) -> NDArray:
    """``means_init``: one row for each component."""
    means = check_array(means, dtype=[np.float64, np.float32], ensure_2d=False)
    check_shape(means, (K, D), "means")
    return means


def check_precisions(precisions: Any, form: str, K: int, D: int) -> NDArray:
    """``precisions_init``: positive, or symmetric and positive definite."""
    precisions = check_array(
        precisions, dtype=[np.float64, np.float32], ensure_2d=False, allow_nd=True
    )
    shapes = {"full": (K, D, D), "tied": (D, D), "diag": (K, D), "spherical": (K,)}
    check_shape(precisions, shapes[form], f"{form} precision")
    if form in ("diag", "spherical"):
        if precisions.min() <= 0:
            raise ValueError(f"'{form} precision' should be positive")
        return precisions
    symmetric = np.allclose(precisions, np.swapaxes(precisions, -1, -2))
    if not symmetric or np.linalg.eigvalsh(precisions).min() <= 0:
        raise ValueError(f"'{form} precision' should be symmetric, positive-definite")
    return precisions


def given_values(
    weights: Any, means: Any, precisions: Any, form: str, K: int, D: int
) -> tuple[NDArray | None, NDArray | None, NDArray | None]:
    """Weights, means and covariances that the user gives to start from; None where not given."""
    weights = None if weights is None else check_weights(weights, K)
    means = None if means is None else check_means(means, K, D)
    if precisions is None:
        return weights, means, None
    precisions = check_precisions(precisions, form, K, D).astype(np.float64)
    matrix = form in ("full", "tied")
    return weights, means, np.linalg.inv(precisions) if matrix else 1 / precisions
