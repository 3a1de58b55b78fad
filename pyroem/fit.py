"""What a solver returns: the parameters, how they were found, and what follows from them."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from pyroem import imputation, sequences, simulation
from pyroem._pyro import Enumerated, isolated, unwrap
from pyroem.blocks import is_source
from pyroem.components import Components, components
from pyroem.constrained import Which
from pyroem.curves import Curve, Surface, curve, surface
from pyroem.errors import ModelError, SettingError
from pyroem.estep import decode
from pyroem.estep.chain import Potentials, site_weights
from pyroem.estep.kernel import Rows, best_states, entropy, marginals, row_log_likelihoods
from pyroem.estep.mixture import Mixture
from pyroem.estep.trace import entropy_of_known, posterior
from pyroem.explain import describe
from pyroem.loop import Record, Restart, Rule, Status
from pyroem.mstep.blocks import Rung
from pyroem.problem import Problem, pose
from pyroem.profiles import Profile, profile
from pyroem.reading import on_other_sequences, read
from pyroem.renaming import Renaming, renamings
from pyroem.sequences import Filtered, Forecast
from pyroem.structure import Held, Params, Structure
from pyroem.symmetry import permute
from pyroem.uncertainty import Uncertainty, rate_matrix, uncertainty

MOST_NUMBERS = 20_000_000  # rows by joint states of which a whole trace is made for pictures


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted program.

    Attributes:
    ----------
    params
        Every parameter by name, in the constrained space.
    log_likelihood, log_prior
        The two parts of the objective at ``params``.
    history
        One :class:`~pyroem.loop.Record` for each iteration.
    status, message
        How the fit ended, and the particulars.
    solver, rule
        The solver's name and its stopping rule.
    start
        How the start was found.
    restarts
        The objective, status and iterations of every start.
    approximation
        Of SVI with a guide: the approximate posterior, with its ELBO and draws; else None.
    path
        The parameters at every iteration, from the start on, where the solver was told to keep them
        (``EM(keep_path=True)``).
    """

    params: Params
    log_likelihood: float
    log_prior: float
    history: tuple[Record, ...]
    status: Status
    message: str
    solver: str
    rule: Rule
    start: str
    restarts: tuple[Restart, ...]
    problem: Problem
    approximation: Any = None
    path: tuple[Params, ...] = ()

    @property
    def log_joint(self) -> float:
        """``log_likelihood + log_prior``: what every solver maximises."""
        return self.log_likelihood + self.log_prior

    @property
    def converged(self) -> bool:
        """Whether the fit ended well."""
        return self.status is Status.CONVERGED

    @property
    def n_iter(self) -> int:
        """The number of iterations."""
        return len(self.history) - 1

    def explain(self) -> str:
        """How each parameter is updated and why, where the fit started and how it ended."""
        return f"{self}\n\n" + describe(
            self.problem,
            self.solver,
            self.rule,
            self.start,
            self.status,
            self.message,
            self.restarts,
        )

    def __str__(self) -> str:
        note = f" ({self.message})" if self.message else ""
        return (
            f"{self.solver} fit: {self.status}{note} after {self.n_iter} iterations,"
            f" log_joint {self.log_joint:.6f}, log_likelihood {self.log_likelihood:.6f}"
        )

    def __repr__(self) -> str:
        return f"<{self}>"

    def _structure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
        """The structure on new data, or on that of the fit where none is given."""
        own = self.problem.structure
        if not args and not kwargs:
            return own
        if own.chains and args and is_source(args[0]):
            raise ModelError(
                "Sequences in blocks: ask block by block, [fit.predict(*b) for b in blocks]."
            )
        if own.chains:
            return on_other_sequences(own, self.params, args, kwargs)[0]
        structure = read(own.program.model, args, kwargs, dtype=own.program.dtype, part=True)
        for name, parameter in structure.parameters.items():
            if name not in self.params or parameter.shape != tuple(self.params[name].shape):
                raise ModelError(
                    f"On the new data parameter '{name}' has shape {parameter.shape}, but the fit"
                    f" has {tuple(self.params[name].shape) if name in self.params else 'none'}."
                )
        return structure

    def posterior(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """For each assignment its marginal posterior as a Pyro distribution over the plates.

        ``Bernoulli`` and ``OneHotCategorical`` assignments keep their kind; the others give a
        ``Categorical`` over the states.
        """
        found = self._marginals(args, kwargs)
        structure = self.problem.sample.structure
        with isolated(structure.program.dtype, 0):
            nodes = dict(structure.program.run(self.params).nodes)
        for chain in structure.chains:
            nodes[chain.name] = nodes[chain.step]
        kinds = {z: z if z in nodes else f"{z}_unobserved" for z in found}
        return {z: _as_distribution(nodes.get(kinds[z]), p) for z, p in found.items()}

    def responsibilities(self, *args: Any, **kwargs: Any) -> Any:
        """The posterior probability of each state: the plates' dims, then the states.

        One tensor where the program has one assignment, else a dict by assignment.
        """
        return _single(self._marginals(args, kwargs))

    def _marginals(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        with self._kernel(args, kwargs) as kernel:
            if kernel is not None:
                return self._in_plates(marginals(*kernel, self.params), args, kwargs)
            structure = self._structure(args, kwargs)
            if structure.chains:
                return sequences.named(structure, decode.marginals(self._potentials(structure)))
            return posterior(structure, self.params).marginals

    @contextlib.contextmanager
    def _kernel(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[Mixture, Iterable[Rows]] | None]:
        """The kernel and the rows that are asked about; None where the program has to be traced."""
        problem = self.problem
        with isolated(problem.structure.program.dtype, 0), torch.no_grad():
            chunks = problem.chunks_of(self.params, args, kwargs)
            if chunks is None or problem.kernel is None:
                yield None
            else:
                yield problem.kernel.mixture, chunks

    def _in_plates(
        self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Rows folded into the plates that they come from."""
        own = self.problem.structure.unit_shape
        shape = (-1,) if args or kwargs or len(own) == 1 else own
        return {z: v.reshape((*shape, *v.shape[1:])) for z, v in values.items()}

    def predict(self, *args: Any, method: str = "joint", **kwargs: Any) -> Any:
        """The most probable states, as state numbers.

        With ``method="joint"`` those of the most probable joint assignment of each row (of each
        sequence: Viterbi); with ``"marginal"`` the most probable state of each assignment by
        itself. One tensor where the program has one assignment, else a dict by assignment; of a
        chain the plates of its sequences, then the steps.
        """
        if method not in ("joint", "marginal"):
            raise SettingError(f"predict: method must be 'joint' or 'marginal', got {method!r}.")
        if method == "marginal":
            found = self._marginals(args, kwargs)
            return _single({z: p.argmax(-1) for z, p in found.items()})
        with self._kernel(args, kwargs) as kernel:
            if kernel is not None:
                best = best_states(*kernel, self.params)
                return _single(self._in_plates(best, args, kwargs))
            structure = self._structure(args, kwargs)
            if structure.chains:
                best = decode.states(self._potentials(structure, best=True))
                return _single(sequences.named(structure, best))
            found = posterior(structure, self.params, backend="logmax").marginals
        return _single({z: p.argmax(-1) for z, p in found.items()})

    def _potentials(self, structure: Structure, best: bool = False) -> list[Potentials]:
        """The log-probabilities of the chains on the sequences of ``structure``."""
        with isolated(structure.program.dtype, 0), torch.no_grad():
            engine = self.problem.on_sequences(structure, self.params)
            return engine.potentials(self.params, best)

    def _chains(self, what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
        """The program on some sequences, if it has chains; ``what`` needs them."""
        own = self.problem.structure
        if not own.chains:
            why = f": {own.no_chain}" if own.no_chain else ""
            raise ModelError(f"{what}: the program was not read as a chain of states{why}.")
        return self._structure(args, kwargs)

    def _run(self, structure: Structure) -> Enumerated:
        with isolated(structure.program.dtype, 0), torch.no_grad():
            return structure.enumerate(self.params)

    def filter(
        self,
        *args: Any,
        state: Filtered | Mapping[str, Tensor] | None = None,
        overlap: bool = False,
        **kwargs: Any,
    ) -> Filtered:
        """``p(state at t | seen up to t)`` of every step, from left to right only.

        With ``state``, what :meth:`filter` gave before, the data goes on where that left off: one
        step or more. Where a step looks at the step before (its observation, its covariates), begin
        the new data with the last step seen and give ``overlap=True``.

        Raises:
        ------
        ModelError
            Where the program is no chain.
        SettingError
            Where ``state`` is of other sequences.
        """
        before = state.last if isinstance(state, Filtered) else state
        if before is not None and not isinstance(before, Mapping):
            raise SettingError(
                "filter: state must be what filter() gave before, or a dict of probabilities by"
                f" chain; got {type(before).__name__}."
            )
        if overlap and before is None:
            raise SettingError("filter: overlap=True needs the state of the past.")
        structure = self._chains("filter", args, kwargs)
        if before is not None:
            sequences.check_going_on(self.problem.plan, overlap)
        return sequences.filtered(structure, self._potentials(structure), before, overlap)

    def forecast(self, steps: int, *args: Any, **kwargs: Any) -> Forecast:
        """The states and the observations of the ``steps`` after the end of each sequence.

        The end is the last step of which anything is seen.

        Raises:
        ------
        ModelError
            Where the program is no chain, or what comes depends on covariates.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise SettingError(f"forecast: steps must be a positive integer, got {steps!r}.")
        structure = self._chains("forecast", args, kwargs)
        run, potentials = self._run(structure), self._potentials(structure)
        varying = sequences.varying_steps(self.problem.plan)
        with isolated(structure.program.dtype, 0), torch.no_grad():
            return sequences.forecast(structure, run, potentials, steps, varying)

    def residuals(self, *args: Any, kind: str = "forecast", **kwargs: Any) -> dict[str, Tensor]:
        """Pseudo-residuals of a chain's observations: normal if the model is right.

        The normal quantile of ``P(X_t <= x_t)`` given what was seen before (``"forecast"``), or
        given all other steps (``"ordinary"``); of counts and categories the middle between that and
        ``P(X_t < x_t)``. NaN where nothing is seen.

        Source: Zucchini, MacDonald and Langrock (2016), chapter 6.
        """
        structure = self._chains("residuals", args, kwargs)
        run = self._run(structure)
        with isolated(structure.program.dtype, 0), torch.no_grad():
            return sequences.residuals(structure, run, kind)

    def log_prob(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log-likelihood of each row (of each element of the rows' plates).

        Raises:
        ------
        ModelError
            Where the rows are not independent given the parameters (a global assignment, a
            factor outside their plate).
        """
        structure, depends = self.problem.structure, self.problem.plan.reading.dependence
        outside = [n for n, plates in structure.plates.items() if set(structure.unit) - set(plates)]
        complete = not any(depends.get(n) for n in outside)
        with self._kernel(args, kwargs) as kernel:
            if kernel is not None and complete:
                found = row_log_likelihoods(*kernel, self.params)
                return self._in_plates({"": found}, args, kwargs)[""]
        structure = self._structure(args, kwargs)
        if structure.chains:
            alone = all(set(structure.unit) <= set(chain.plates) for chain in structure.chains)
            rows = self._by_sequence(structure) if alone else torch.zeros(())
        else:
            with isolated(structure.program.dtype, 0), torch.no_grad():
                trace = structure.enumerate(self.params)
                rows, alone = trace.row_log_likelihood(trace.tensors(), structure.unit)
        if not (complete and alone):
            raise ModelError(
                "log_prob: the rows are not independent given the parameters, because some site"
                " outside their plate ties them together. Use log_likelihood."
            )
        return rows.expand(structure.unit_shape)

    def _by_sequence(self, structure: Structure) -> Tensor:
        """The log-likelihood of each element of the unit's plates of a program with chains."""
        found = decode.log_likelihoods(structure, self._potentials(structure))
        if not structure.factor_sites <= structure.chained:
            found = found + decode.log_likelihoods_outside(structure, self._run(structure))
        return found * float(self.problem.plan.reading.traces[0].scale)

    def impute(self, *args: Any, draws: int | None = None, seed: int = 0, **kwargs: Any) -> Any:
        """The data with its missing values (NaN) filled in, given what is seen of each row.

        By what is expected there, ``sum_k p(z = k | seen) E[x | z = k, seen]``, in a
        ``Categorical`` site by the most probable category; with ``draws``, so many times at random
        (first dim), the assignments drawn from their posterior and the values given them. A cell
        that the program masks is missing too, where others are NaN. One tensor, shaped as the
        data, where one observation has missing values, else a dict by observation; of a chain the
        plates of its sequences, then the steps.

        Raises:
        ------
        ModelError
            For ``draws`` of a chain, and where nothing is missing.
        """
        if draws is not None and (isinstance(draws, bool) or draws < 1):
            raise SettingError(f"impute: draws must be a positive integer, got {draws!r}.")
        structure = self._structure(args, kwargs)
        if not structure.program.missing:
            raise ModelError("impute: no value is missing.")
        with isolated(structure.program.dtype, seed), torch.no_grad():
            if draws is not None:
                return _single(imputation.draws(structure, self.params, draws))
            return _single(imputation.means(structure, self.params))

    def sample(self, n: int | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw assignments and observations from the fitted program.

        ``n`` rows are drawn by repeating the program over its own plates (covariates included) as
        often as needed; rows come in the first dim, then the other plates. Without ``n``, one draw
        of everything, in Pyro's own layout (of data in blocks: of the sample that was read).

        What the program takes from its data is taken from it here too: covariates, and in an
        autoregression the observation before (a draw is then one step ahead of the data, no
        simulation of the whole).
        """
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise SettingError(f"sample: n must be a positive integer, got {n!r}.")
        problem = self.problem
        whole = n is None or problem.structure.chains
        structure = problem.structure if whole else problem.sample.structure
        return simulation.draw(structure, self.params, n, seed)

    @property
    def df(self) -> int:
        """The number of free parameters: of directions that change the model."""
        return self.problem.df

    def aic(self) -> float:
        """Akaike's criterion ``2 df - 2 log_likelihood``: smaller is better."""
        return 2 * self.df - 2 * self.log_likelihood

    def bic(self, rows: float | None = None) -> float:
        """Schwarz's criterion ``df log(rows) - 2 log_likelihood``: smaller is better.

        ``rows`` counts the elements of the outermost plates that all assignments share (weighted
        rows by their weight): ten sequences in a plate are ten rows. A program without such a plate
        (one long chain) has as many rows as observation sites. Give ``rows`` to count otherwise.
        """
        rows = self.problem.rows if rows is None else rows
        if not rows > 0:
            raise SettingError(f"bic: rows must be a positive number, got {rows!r}.")
        return self.df * math.log(rows) - 2 * self.log_likelihood

    def icl(self, rows: float | None = None) -> float:
        """``bic + 2 H``, with ``H`` the posterior entropy of all assignments jointly.

        Of a chain the states up to the last step that shows anything count.
        """
        if self.problem.everywhere is not None:
            raise SettingError(
                "icl: the rows are spread over processes, and this one cannot tell the entropy of"
                " the others' assignments. Use bic."
            )
        with self._kernel((), {}) as kernel:
            if kernel is not None:
                return self.bic(rows) + 2 * float(entropy(*kernel, self.params))
        structure = self.problem.structure
        weights = self.problem.row_weights
        with isolated(structure.program.dtype, 0), torch.no_grad():
            trace = structure.enumerate(self.params)
            tensors = trace.tensors()
            value, found = site_weights(structure, trace, weights)
            mean = sum(torch.where(w > 0, w * tensors[n], 0.0).sum() for n, w in found.items())
            known = entropy_of_known(structure, trace, found)
        return self.bic(rows) + 2 * float(value - mean - known)

    def components(self, site: str | None = None) -> Components:
        """One observation, state by state: its rows, their weights, densities and moments.

        ``site`` names the observation where there are several. Of large data (above 20 million
        log-probabilities of rows, or in blocks) ``values`` has the rows that starts
        were sought on: see :attr:`Components.rows`.
        """
        problem, small = self.problem, self.problem.sample
        structure = problem.structure
        size = structure.num_rows * math.prod(structure.assignments.values())
        if not problem.streamed and problem.everywhere is None and size <= MOST_NUMBERS:
            small = problem
        with isolated(structure.program.dtype, 0), torch.no_grad():
            found = components(small.structure, self.params, small.row_weights, site)
        rows = len(found.values) if small is problem else structure.num_rows
        return replace(found, rows=rows)

    def transitions(self) -> dict[str, Tensor]:
        """The transition matrix of each chain, ``[K, K]``: rows are the states before.

        The mean over the steps and sequences, where covariates change it.

        Raises:
        ------
        ModelError
            Where the program is no chain.
        """
        return sequences.transitions(self._potentials(self._chains("transitions", (), {})))

    def report(self, path: str | Path) -> Path:
        """Write a page of HTML: explanation, tables and pictures, in one file without links.

        Needs matplotlib. Returns the path.
        """
        from pyroem.report import write

        return write(self, path)

    @property
    def _doubt(self) -> str:
        """What is to be said first of anything that takes the fit for a maximum."""
        if self.converged:
            return ""
        note = f" ({self.message})" if self.status is Status.DEGENERATE and self.message else ""
        return f"The fit did not converge: {self.status}{note}."

    def uncertainty(self, method: str = "observed") -> Uncertainty:
        """Standard errors and intervals of the parameters, and the covariance of all of them.

        ``method`` is ``"observed"`` (the exact Hessian of the log-joint), ``"louis"`` (the same by
        Louis' formula), ``"outer"`` (the rows' scores) or ``"sandwich"``; see
        :mod:`pyroem.uncertainty`. Elements at a bound, and what the data do not determine, have no
        standard error (NaN); ``message`` says which and why.
        """
        return uncertainty(self.problem, self.params, method, self._doubt)

    def profile(
        self, which: Which, level: float = 0.95, points: int = 21, *, name: str | None = None
    ) -> Profile:
        """The profile of the log-joint along one number, and the interval that follows from it.

        ``which`` is an element (``"loc[1]"``) or a function of the dict of parameters that gives a
        scalar tensor, called ``name``: ``lambda p: p["loc"][1] - p["loc"][0]``. The other
        parameters are maximised anew at each of the ``points``; see :mod:`pyroem.profiles`.
        """
        return profile(self.problem, self.params, which, level, points, name, self._doubt)

    def curve(self, which: str, values: Any = None, points: int = 101) -> Curve:
        """The log-joint along one element, all other parameters held; see :mod:`pyroem.curves`."""
        return curve(self.problem, self.params, which, values, points)

    def surface(self, first: str, second: str, values: Any = None, points: int = 41) -> Surface:
        """The log-joint over two elements, all other parameters held, as :meth:`curve`."""
        return surface(self.problem, self.params, first, second, values, points)

    def rate_matrix(self) -> Tensor:
        """EM's own derivative at the fit: what part of the distance to it an iteration leaves.

        ``I_c^-1 I_m``, complete-data and missing information, in unconstrained coordinates.
        """
        return rate_matrix(self.problem, self.params)

    @property
    def rate(self) -> float:
        """The largest eigenvalue of :meth:`rate_matrix`: EM's rate of convergence."""
        found = torch.linalg.eigvals(self.rate_matrix()).real
        return float(found.max()) if len(found) else 0.0

    @property
    def basins(self) -> tuple[tuple[float, int], ...]:
        """The distinct optima that the restarts ended in: objective and number, the best first.

        Ends whose objectives differ by less than 1e-5 a row count as one; a collapse, a saddle and
        a run that did not settle are no optimum.
        """
        near = 1e-5 * self.problem.rows
        ends = sorted(r.log_joint for r in self.restarts if r.status is Status.CONVERGED)[::-1]
        found: list[list[float]] = []
        for value in ends:
            if found and found[-1][-1] - value <= near:
                found[-1].append(value)
            else:
                found.append([value])
        return tuple((own[0], len(own)) for own in found)

    @cached_property
    def renamings(self) -> tuple[Renaming, ...]:
        """How the states can be renamed so that the objective stays as it is."""
        return renamings(self.problem, self.params)

    def ordered(self, by: str) -> Fit:
        """The same fit with its states named in the order of a parameter: of its first elements.

        Of a parameter with two axes of states (a transition matrix) it is the order of the
        diagonal. States that cannot change places keep their names. The path and the
        approximation are renamed alike.

        Raises:
        ------
        SettingError
            Where the parameter has no axis of states, or no two states can change places: a prior,
            elements that are held or the program itself tell them apart.
        """
        known = [own for own in self.renamings if own.axes_of(by)]
        if not known:
            names = {name for own in self.renamings for name, _ in own.group.axes}
            refused = "".join(_refused(own) for own in self.renamings if own.why)
            raise SettingError(
                f"ordered: expected one of {', '.join(sorted(names)) or 'no parameter'}, which have"
                f" an axis of states; got {by!r}.{refused}"
            )
        orders = []
        for own in known:
            if own.group.num_states > 1 and not own.possible:
                raise SettingError(f"ordered: {by!r} gives no order.{_refused(own)}")
            axes, value = own.axes_of(by), self.params[by]
            states = torch.arange(value.shape[axes[0]])
            first = value[tuple(states if i in axes else 0 for i in range(value.dim()))]
            orders.append(own.sorted_by(first))

        def renamed(params: Params) -> Params:
            for own, order in zip(known, orders, strict=True):
                params = permute(params, own.group, order)
            return params

        path = tuple(renamed(params) for params in self.path)
        approximation = self.approximation and self.approximation.mapped(renamed)
        return replace(self, params=renamed(self.params), path=path, approximation=approximation)

    def guide(self) -> Callable[..., dict[str, Tensor]]:
        """A Pyro guide at the fitted values, for ``pyro.infer.Predictive``.

        It samples every parameter that has a prior from a ``Delta``, and puts the others into
        Pyro's parameter store when it is called.
        """
        parameters, params = self.problem.structure.parameters, self.params

        def fitted(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            store = pyro.get_param_store()
            for name, parameter in parameters.items():
                value = params[name].clone()
                if parameter.has_prior:
                    pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
                else:
                    if name in store:
                        del store[name]
                    pyro.param(name, value, constraint=parameter.constraint)
            return dict(params)

        return fitted

    def save(self, path: str | Path) -> None:
        """Write the parameters and the record of the fit (not the program, not the data)."""
        torch.save(
            {
                "params": self.params,
                "log_likelihood": self.log_likelihood,
                "log_prior": self.log_prior,
                "history": [tuple(r) for r in self.history],
                "status": self.status.value,
                "message": self.message,
                "start": self.start,
                "restarts": [(r.log_joint, r.status.value, r.n_iter) for r in self.restarts],
                "solver": self.solver,
                "rule": asdict(self.rule),
                "problem": {
                    "dtype": self.problem.structure.program.dtype,
                    "fixed": [b.name for b in self.problem.plan.on(Rung.FIXED)],
                    "held": {
                        n: p.held
                        for n, p in self.problem.structure.parameters.items()
                        if p.held is not None
                    },
                    "floor": self.problem.floor,
                },
            },
            path,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[..., Any],
        *args: Any,
        weights: Any = None,
        **kwargs: Any,
    ) -> Fit:
        """Read a fit back, with the program and data that it belongs to.

        Raises:
        ------
        SettingError
            Where the file holds no fit, or the log-likelihood of the data given is not that of the
            fit. (For other data use the methods of the fit: ``fit.predict(new_data)``.)
        """
        try:
            stored = torch.load(path, weights_only=True)
            settings = stored["problem"]
        except (pickle.UnpicklingError, KeyError, TypeError, RuntimeError, EOFError) as error:
            raise SettingError(f"{path}: not a file that Fit.save wrote.") from error
        held = settings.pop("held", {})
        fixed = [
            *settings.pop("fixed"),
            *(Held(n, m, stored["params"][n]) for n, m in held.items()),
        ]
        problem = pose(model, args, kwargs, weights=weights, fixed=fixed, **settings)
        params = problem.structure.values(stored["params"])
        with isolated(settings["dtype"], 0), torch.no_grad():
            found, wanted = float(problem.log_joint(params)[0]), stored["log_likelihood"]
        precision = 1e-8 if settings["dtype"] == torch.float64 else 1e-3
        if abs(found - wanted) > precision * max(1.0, abs(wanted)):
            raise SettingError(
                f"{path}: the fit has log-likelihood {wanted:.6f}, but the program with the data"
                f" given has {found:.6f} at its parameters. Give the data it was fitted to."
            )
        return cls(
            params,
            stored["log_likelihood"],
            stored["log_prior"],
            tuple(Record(*r) for r in stored["history"]),
            Status(stored["status"]),
            stored["message"],
            stored["solver"],
            Rule(**stored["rule"]),
            stored["start"],
            tuple(Restart(a, Status(b), c) for a, b, c in stored["restarts"]),
            problem,
        )


def _refused(own: Renaming) -> str:
    some = "Some states" if own.possible else "The states"
    return f" {some} of '{own.group.assignments[0]}' cannot be renamed: {own.why}."


def _single(values: dict[str, Tensor]) -> Any:
    return next(iter(values.values())) if len(values) == 1 else values


def _as_distribution(site: Any, probs: Tensor) -> Any:
    base = None if site is None else unwrap(site["fn"])[0]
    if isinstance(base, dist.Bernoulli):
        return dist.Bernoulli(probs[..., 1])
    if isinstance(base, dist.OneHotCategorical):
        return dist.OneHotCategorical(probs)
    return dist.Categorical(probs)
