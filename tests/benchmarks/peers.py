"""The peers: what else fits the same models. Each returns a ``Run`` as pyroem's side does."""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, init_to_value
from pyro.nn import PyroModule
from torch import Tensor

from benchmarks.harness import Run, lap
from benchmarks.programs import Params, Program


def _clocked(estimator: Any) -> Any:
    """A class of scikit-learn's kind that stamps the start of each E-step.

    Both it and StepMix make an E-step and an M-step in every iteration, and one more E-step at the
    end: from stamp to stamp is one iteration, without set-up.
    """

    class Clocked(estimator):
        def _e_step(self, *args: Any, **kwargs: Any) -> Any:
            self.stamps = [*getattr(self, "stamps", []), time.perf_counter()]
            return super()._e_step(*args, **kwargs)

    return Clocked


def _fitted(model: Any, x: Any) -> tuple[float, float]:
    """Fit; the seconds of an iteration and of the whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as asked
        clock = time.perf_counter()
        model.fit(x)
        whole = time.perf_counter() - clock
    return lap(model.stamps), whole


def sklearn_mixture(x: Tensor, k: int, start: Params | None = None, **options: Any) -> Run:
    """scikit-learn's ``GaussianMixture``, from ``start`` or from its own k-means."""
    mixture = pytest.importorskip("sklearn.mixture")
    if start is not None:
        cov = start["cov"] if "cov" in start else start["scale"][:, None, None] ** 2
        options["weights_init"] = start["weights"].numpy()
        options["means_init"] = start["loc"].reshape(k, -1).numpy()
        options["precisions_init"] = torch.linalg.inv(cov).numpy()
    data = x.reshape(len(x), -1).numpy()
    model = _clocked(mixture.GaussianMixture)(k, reg_covar=0, random_state=0, **options)
    seconds, whole = _fitted(model, data)
    found = {"weights": model.weights_, "loc": model.means_, "cov": model.covariances_}
    params = {name: torch.from_numpy(value) for name, value in found.items()}
    if x.dim() == 1:
        params["scale"] = params.pop("cov").sqrt().flatten()
        params["loc"] = params["loc"].flatten()
    return Run(seconds, whole, model.n_iter_, params, model.score(data))


def pomegranate_mixture(x: Tensor, start: Params, iterations: int) -> Run:
    """pomegranate's mixture of full-covariance Gaussians."""
    gmm = pytest.importorskip("pomegranate.gmm")
    distributions = pytest.importorskip("pomegranate.distributions")
    dtype = torch.get_default_dtype()
    # It sums the responsibilities in the default type whatever the parameters' own is.
    torch.set_default_dtype(torch.float64)
    try:
        clock = time.perf_counter()
        components = [
            # It updates in place what it is given.
            distributions.Normal(loc.clone(), cov.clone(), covariance_type="full")
            for loc, cov in zip(start["loc"], start["cov"], strict=True)
        ]
        model = gmm.GeneralMixtureModel(components, priors=start["weights"].clone())
        stamps = [time.perf_counter()]
        for _ in range(iterations):
            model.summarize(x)
            model.from_summaries()
            stamps.append(time.perf_counter())
    finally:
        torch.set_default_dtype(dtype)
    params = {
        "weights": model.priors.data.clone(),
        "loc": torch.stack([c.means.data for c in model.distributions]),
        "cov": torch.stack([c.covs.data for c in model.distributions]),
    }
    value = float(model.log_probability(x).mean())
    return Run(lap(stamps), stamps[-1] - clock, iterations, params, value)


def stepmix_classes(x: Tensor, start: Params, iterations: int) -> Run:
    """StepMix's latent classes of binary items."""
    stepmix = pytest.importorskip("stepmix")

    class Started(_clocked(stepmix.StepMix)):  # type: ignore[misc]
        def _initialize_parameters(self, X: Any, random_state: Any) -> None:
            self.weights_ = start["weights"].numpy()
            self._initialize_parameters_measurement(X, random_state, init_emission=False)
            self._mm.set_parameters({"pis": start["probs"].numpy()})

    model = Started(
        len(start["weights"]), measurement="binary", abs_tol=0, max_iter=iterations, progress_bar=0
    )
    seconds, whole = _fitted(model, x.numpy())
    found = model.get_parameters()
    params = {"weights": found["weights"], "probs": found["measurement"]["pis"]}
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    return Run(seconds, whole, model.n_iter_, tensors, model.score(x.numpy()))


def hmmlearn_chain(
    rows: Tensor, lengths: Tensor | None, start: Params, iterations: int, implementation: str
) -> Run:
    """hmmlearn's ``GaussianHMM`` with diagonal covariances; no priors."""
    base: Any = pytest.importorskip("hmmlearn.hmm").GaussianHMM

    class Clocked(base):
        def _do_estep(self, *args: Any) -> Any:
            self.stamps = [*getattr(self, "stamps", []), time.perf_counter()]
            return super()._do_estep(*args)

    model = Clocked(
        len(start["initial"]), "diag", min_covar=0, covars_prior=0, covars_weight=1,
        n_iter=iterations, tol=-float("inf"), init_params="", implementation=implementation,
    )  # fmt: skip
    model.startprob_, model.transmat_ = start["initial"].numpy(), start["transition"].numpy()
    model.means_, model.covars_ = start["loc"].numpy(), start["scale"].numpy() ** 2
    data, sizes = rows.numpy(), None if lengths is None else lengths.numpy()
    clock = time.perf_counter()
    model.fit(data, sizes)
    whole = time.perf_counter() - clock
    found = {"initial": model.startprob_, "transition": model.transmat_, "loc": model.means_}
    params = {name: torch.from_numpy(value) for name, value in found.items()}
    params["scale"] = torch.from_numpy(model._covars_).sqrt()
    value = model.score(data, sizes) / (len(rows) if sizes is None else len(sizes))
    return Run(lap(model.stamps), whole, iterations, params, value)


def svi_losses(
    program: Any, data: tuple[Any, ...], start: Params, hide: Iterable[str], lr: float
) -> Iterator[float]:
    """The losses of Pyro's own SVI with a delta guide and Adam, from ``start`` on, for ever.

    Each is that of the point before its step.
    """
    with pyro.get_param_store().scope():
        own = copy.deepcopy(program)
        trace = poutine.trace(own).get_trace(*data)
        frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())]
        nesting = max((-f.dim for f in frames if f.vectorized), default=0)
        store = pyro.get_param_store()
        for name in start:
            # Adam works in place, and an unconstrained parameter would share the start's memory.
            if isinstance(own, PyroModule) and name in own._pyro_params:
                setattr(own, name, start[name].clone())
            elif name in store:
                store[name] = start[name].clone()
        guide = AutoDelta(
            poutine.block(own, hide=list(hide)), init_loc_fn=init_to_value(values=start)
        )
        elbo = TraceEnum_ELBO(max_plate_nesting=nesting)
        svi = SVI(config_enumerate(own), guide, pyro.optim.Adam({"lr": lr}), elbo)
        while True:
            yield float(svi.step(*data))


def svi_steps(program: Program, x: Tensor, start: Params, steps: int) -> Run:
    """So many steps of Pyro's SVI."""
    clock, stamps = time.perf_counter(), []
    losses = svi_losses(program, (x,), start, ["z"], 0.01)
    for loss in itertools.islice(losses, steps + 1):  # a step tells where the one before led
        stamps.append(time.perf_counter())
        value = -loss / len(x)
    return Run(lap(stamps), stamps[-1] - clock, steps, {}, value)


def products(x: Tensor, k: int, passes: int, block: int = 8192) -> Run:
    """The two matrix products of one pass, with the matrix of statistics formed already.

    No program that works on statistics in float64 can be faster.
    """
    n, d = x.shape
    rows, columns = torch.tril_indices(d, d)
    phi = torch.empty(n, 1 + d + len(rows), dtype=x.dtype)
    phi[:, 0], phi[:, 1 : d + 1], phi[:, d + 1 :] = 1, x, x[:, rows] * x[:, columns]
    eta = torch.ones(phi.shape[1], k, dtype=x.dtype)
    stamps, total = [time.perf_counter()], torch.zeros(k, phi.shape[1], dtype=x.dtype)
    for _ in range(passes):
        for part in phi.split(block):
            total.addmm_((part @ eta).T, part)
        stamps.append(time.perf_counter())
    return Run(lap(stamps), stamps[-1] - stamps[0], passes, {}, float("nan"))
