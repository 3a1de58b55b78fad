"""A fit as one page of HTML: explanation, tables and pictures, in one file without links."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyroem import plot
from pyroem.components import sites
from pyroem.errors import PyroemError, SettingError
from pyroem.fit import Fit
from pyroem.plot.style import COLUMN, require_matplotlib, styled

MOST_ELEMENTS = 60  # of the parameters, in the table with standard errors
MOST_SITES = 6  # observations that are drawn
RATE_FOR = 200  # elements of the parameters up to which EM's rate is computed
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.6rem 0; }
th, td { padding: 0.18rem 0.8rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 1px solid #888; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
pre.words { white-space: pre-wrap; }
figure { display: inline-block; margin: 0.6rem 1.2rem 0.6rem 0; vertical-align: top; }
figcaption { font-size: 0.85rem; color: #444; max-width: 26rem; }
.wide { overflow-x: auto; } td { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
.status { padding: 0.5rem 0.8rem; border-left: 4px solid #009E73; background: #f2f8f6; }
.status.bad { border-color: #D55E00; background: #fcf3ee; }
.note { color: #444; }
"""


def write(fit: Fit, path: str | Path) -> Path:
    """Write the page; see :meth:`pyroem.Fit.report`.

    What cannot be drawn or computed for a program (a picture of vectors with many columns, standard
    errors of data in blocks) is replaced by a line that says why.

    Raises:
    ------
    SettingError
        Where the file cannot be written: before any work.
    ImportError
        Where matplotlib lacks.
    """
    require_matplotlib()
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise SettingError(f"report: cannot write '{target}': no such folder, or no permission.")
    title = f"{fit.solver} fit"
    parts = [_summary(fit), _pictures(fit), _parameters(fit), _convergence(fit), _explanation(fit)]
    body = "\n".join(parts)
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    target.write_text(page, encoding="utf-8")
    return target


def _summary(fit: Fit) -> str:
    structure = fit.problem.structure
    good = "status" if fit.converged else "status bad"
    message = f" {fit.message}" if fit.message else ""
    words = f"<b>{fit.status}</b>. {html.escape(fit.status.explanation + message)}"
    seen = list(sites(fit.problem.sample.structure))
    observed = ", ".join(seen[:MOST_SITES]) + (", ..." if len(seen) > MOST_SITES else "")
    rows = [
        ("rows", f"{structure.num_rows:,}"),
        ("observations", html.escape(observed)),
        ("log-likelihood", f"{fit.log_likelihood:.6f}"),
        *([("log prior", f"{fit.log_prior:.6f}")] if fit.log_prior else []),
        ("free parameters", str(fit.df)),
        *((name, _number(criterion)) for name, criterion in _criteria(fit)),
        ("iterations", str(fit.n_iter)),
        ("seconds", f"{fit.history[-1].seconds:.3g}"),
    ]
    return f'<p class="{good}">{words}</p>\n' + _table([("", "")], rows)


def _criteria(fit: Fit) -> Iterator[tuple[str, Callable[[], float]]]:
    yield "AIC", fit.aic
    yield "BIC", fit.bic
    yield "ICL", fit.icl


def _number(compute: Callable[[], float]) -> str:
    try:
        return f"{compute():.4f}"
    except PyroemError as error:
        return f"none ({html.escape(str(error))})"


def _pictures(fit: Fit) -> str:
    structure = fit.problem.sample.structure
    found = ["<h2>Data and fit</h2>"]
    seen = list(sites(structure))
    known = [name for name in seen if not _is_given(fit, name)]
    for name in known[:MOST_SITES]:
        found += _of_site(fit, name)
    if len(known) > MOST_SITES:
        found.append(f'<p class="note">{len(known) - MOST_SITES} further observations.</p>')
    if len(known) < len(seen):
        others = ", ".join(name for name in seen if name not in known)
        found.append(f'<p class="note">Given, without parameters: {html.escape(others)}.</p>')
    for chain in [c.name for c in structure.chains if c.length > 1]:
        picture = _picture(partial(plot.transitions, fit, chain), COLUMN, 3.1)
        found.append(_figure(picture, f"Transitions of {chain}."))
    if structure.chains:
        name = seen[0]
        drawn = _picture(lambda ax: plot.decoded(fit, 0, name, ax=ax), 2 * COLUMN, 2.4)
        found.append(_figure(drawn, "The first sequence and its most probable path of states."))
    drawn = _whole(lambda: plot.program(fit))
    found.append(_figure(drawn, "The program: assignments are round, observations grey."))
    return "\n".join(found)


def _is_given(fit: Fit, name: str) -> bool:
    """Whether a site depends on no parameter: labels of rows, say."""
    depends = fit.problem.plan.reading.dependence
    return name in depends and not depends[name]


def _of_site(fit: Fit, name: str) -> list[str]:
    """A site by itself, or the pairs of its columns; and who is responsible."""
    try:
        found = fit.components(name)
    except PyroemError as error:
        return [f'<p class="note">{html.escape(f"{name}: {error}")}</p>']
    width = found.values.shape[1]
    if width == 1 or found.discrete:
        drawn = [
            _figure(
                _picture(partial(plot.density, fit, name, i), COLUMN, 2.8),
                f"{found.column_name(i)}: the data, and the density that was fitted.",
            )
            for i in range(min(width, 6))
        ]
    elif width == 2:
        flat = _picture(lambda ax: plot.contours(fit, name, ax=ax), COLUMN, 3.3)
        words = f"{name}: rows by their most probable state; thin lines are the fitted density."
        drawn = [_figure(flat, words)]
        drawn += [
            _figure(
                _picture(partial(plot.density, fit, name, i), COLUMN, 2.8),
                f"{found.column_name(i)} alone.",
            )
            for i in range(2)
        ]
    else:
        many = _whole(lambda: plot.pairs(fit, name))
        more = f" (the first 6 of {width} columns)" if width > 6 else ""
        drawn = [_figure(many, f"{name}: all pairs of columns{more}.")]
    if len(found.labels) > 1:
        who = _picture(lambda ax: plot.responsibilities(fit, name, ax=ax), COLUMN, 2.6)
        drawn.append(
            _figure(who, f"The posterior probability of each state, by {found.column_name(0)}.")
        )
    return drawn


def _parameters(fit: Fit) -> str:
    lines = ["<h2>Parameters</h2>"]
    count = sum(value.numel() for value in fit.params.values())
    if count > MOST_ELEMENTS:
        shapes = {n: "x".join(map(str, v.shape)) or "scalar" for n, v in fit.params.items()}
        rows = [(n, shapes[n], _short(v)) for n, v in fit.params.items()]
        lines.append(_table([("parameter", "shape", "from, to")], rows))
        lines.append(f'<p class="note">{count} elements: standard errors were left out.</p>')
        every = "\n".join(f"{name} = {value.tolist()}" for name, value in fit.params.items())
        words = f'<pre class="words">{html.escape(every)}</pre>'
        lines.append(f"<details><summary>All estimates</summary>{words}</details>")
        return "\n".join(lines)
    try:
        found = fit.uncertainty()
        lines.append(f"<pre>{html.escape(str(found))}</pre>")
        lines.append(
            '<p class="note">Standard errors from the exact Hessian of the log-joint, with 95 %'
            " intervals by the delta method.</p>"
        )
    except (PyroemError, RuntimeError) as error:
        values = [(n, html.escape(str(v.tolist()))) for n, v in fit.params.items()]
        lines.append(_table([("parameter", "estimate")], values))
        lines.append(f'<p class="note">No standard errors: {html.escape(str(error))}</p>')
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{float(value.min()):.4g}, {float(value.max()):.4g}" if value.numel() else ""


def _convergence(fit: Fit) -> str:
    lines = ["<h2>Convergence</h2>"]
    if len(fit.history) > 1:
        drawn = _whole(lambda: plot.history(fit)[0])
        lines.append(_figure(drawn, "The objective, against iterations and seconds."))
    lines.append(f"<p>{_rate(fit)}</p>")
    if len(fit.restarts) > 1:
        rows = [(f"{value:.6f}", str(times)) for value, times in fit.basins]
        if rows:
            lines.append(f"<p>{len(fit.restarts)} starts ended in {len(rows)} distinct optima:</p>")
            lines.append(_table([("log-joint", "starts")], rows))
        else:
            lines.append(f"<p>None of the {len(fit.restarts)} starts settled at an optimum.</p>")
    return "\n".join(lines)


def _rate(fit: Fit) -> str:
    """EM's rate of convergence, in words."""
    if sum(value.numel() for value in fit.params.values()) > RATE_FOR:
        return "EM's rate of convergence was left out: there are many parameters."
    try:
        rate = fit.rate
    except (PyroemError, RuntimeError) as error:
        return f"EM's rate of convergence: not known. {html.escape(str(error))}"
    words = f"EM's rate of convergence is {rate:.4f} here (its rate matrix's largest eigenvalue)"
    if 0 < rate < 1:
        steps = math.log(0.1) / math.log(rate)
        return f"{words}: a digit takes {steps:.1f} iterations."
    return f"{words}."


def _explanation(fit: Fit) -> str:
    return f'<h2>How it was fitted</h2>\n<pre class="words">{html.escape(fit.explain())}</pre>'


def _table(head: Sequence[tuple[str, ...]], rows: Sequence[tuple[str, ...]]) -> str:
    """Cells are HTML already."""
    titles = "".join(f"<th>{cell}</th>" for cell in head[0])
    top = f"<tr>{titles}</tr>\n" if any(head[0]) else ""
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{top}{body}\n</table></div>'


def _picture(draw: Callable[[Any], Any], width: float, height: float) -> str:
    """What is drawn on axes of a figure that belongs to no window, or why nothing is."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.subplots()
        return _encoded(lambda: draw(ax) and figure)


def _whole(draw: Callable[[], Any]) -> str:
    """The same where the picture chooses its own size."""
    import matplotlib.pyplot as plt
    import numpy as np

    opened = set(plt.get_fignums())
    try:
        return _encoded(lambda: np.ravel(draw())[0].figure)
    finally:
        for number in set(plt.get_fignums()) - opened:
            plt.close(number)


def _encoded(draw: Callable[[], Any]) -> str:
    try:
        figure = draw()
    except (PyroemError, ValueError) as error:
        return f'<p class="note">Not drawn: {html.escape(str(error))}</p>'
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    data = base64.b64encode(buffer.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    return f'<img width="{width}" alt="" src="data:image/png;base64,{data}">'


def _figure(picture: str, caption: str) -> str:
    if picture.startswith("<p"):
        return picture
    words = html.escape(caption)
    described = picture.replace('alt=""', f'alt="{html.escape(caption, quote=True)}"', 1)
    return f"<figure>{described}<figcaption>{words}</figcaption></figure>"
