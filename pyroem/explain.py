"""``Fit.explain()``: in plain words, what was fitted, how, from where, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence

from pyroem.loop import Restart, Rule, Status
from pyroem.mstep.blocks import Rung
from pyroem.problem import Problem
from pyroem.structure import Structure, whole_of

_HOW = {
    Rung.CLOSED_FORM: "closed form",
    Rung.ON_STATISTICS: "numerically, on the expected statistics (cost independent of the rows)",
    Rung.REGRESSION: "regression",
    Rung.ON_ROWS: "numerically, on the weighted rows",
    Rung.GRADIENT: "by safeguarded ascent steps over the data (generalised EM)",
    Rung.FIXED: "fixed",
}


def describe(
    problem: Problem,
    solver: str,
    rule: Rule,
    start: str,
    status: Status,
    message: str,
    restarts: tuple[Restart, ...],
) -> str:
    """The report below the headline, as text."""
    structure = problem.structure
    lines = []
    dtype = str(structure.program.dtype).removeprefix("torch.")
    rows = f"{structure.num_rows} rows" if structure.unit else "no plate of independent rows"
    states = [
        *structure.assignments.items(),
        *((f"{whole_of(n)}, partly known", k) for n, k in structure.imputed.items()),
    ]
    plates = f" (plate {', '.join(structure.unit)})" if structure.unit else ""
    lines += [
        f"Data: {rows}{plates}, fitted in {dtype}"
        + ("." if problem.row_weights is None else ", rows weighted."),
        f"Observations: {', '.join(_shortened(structure.observations))}.",
        "Assignments: "
        + (", ".join(_shortened([f"{z} ({k} states)" for z, k in states])) or "none")
        + ".",
        *_on_missing(problem),
        f"Engine: {problem.engine.description}.",
        *_on_loops(structure),
        "",
        "How EM updates each parameter:"
        if solver.split()[0] == "EM"
        else f"{solver} follows the gradient of all parameters; an M-step would update each:",
    ]
    for name in structure.parameters:
        block = problem.plan.blocks[name]
        prior = ", prior" if structure.parameters[name].has_prior else ""
        shape = "x".join(map(str, structure.parameters[name].shape)) or "scalar"
        held = structure.parameters[name].held
        prior += "" if held is None else f", {int(held.sum())} held"
        lines.append(f"  {name} ({shape}{prior}): {_HOW[block.rung]}: {block.reason}")
    lines += [f"Free parameters: {problem.df}.", "", f"Start: {start}."]
    if problem.floors:
        names = ", ".join(problem.floors)
        lines.append(
            f"Variance floor: {problem.floor:g} of the data's variance, on {names} (floor=0 turns"
            " it off)."
        )
    lines.append(f"Status: {status}. {status.explanation}")
    if message:
        lines.append(f"  {message}")
    lines.append(
        f"Stopping rule: {rule.words}; at most {rule.max_iter} iterations."
        if rule.words
        else f"Stopping rule: objective change <= {rule.tol:g} a row and parameter change <="
        f" {rule.param_tol:g}, {rule.patience} time(s) in a row; at most {rule.max_iter}"
        " iterations."
    )
    if len(restarts) > 1:
        ends = ", ".join(f"{r.log_joint:.4f} ({r.status})" for r in restarts)
        lines.append(f"Restarts: {ends}.")
    return "\n".join(lines)


def _on_missing(problem: Problem) -> list[str]:
    sample = " in the sample that was read" if problem.smaller is not None else ""
    return [
        f"Missing: {m.cells} of the {m.total} values of '{name}'{sample} (NaN), taken as missing at"
        " random."
        for name, m in (problem.sample.structure.program.missing or {}).items()
    ]


def _on_loops(structure: Structure) -> list[str]:
    if structure.no_chain:
        return [f"Loop over time: unrolled, because {structure.no_chain}."]
    alone = [chain.name for chain in structure.chains if not chain.linked]
    return [f"A step's '{name}' does not depend on the step before." for name in alone]


def _shortened(items: Sequence[str]) -> list[str]:
    return list(items) if len(items) <= 6 else [*items[:3], "...", items[-1]]
