"""Pictures of fits, comparisons, selections and likelihoods. Needs matplotlib.

Every function draws on the axes that it is given (``ax=``, or ``axes=`` where there are several),
else on those of a new figure, and returns them. Sizes are those of a column of a paper.
"""

from pyroem.plot.densities import density, responsibilities
from pyroem.plot.mixture import fitted_mixture, mixture_moments, report
from pyroem.plot.objective import likelihood, surface
from pyroem.plot.planes import contours, pairs
from pyroem.plot.programs import program, render_model
from pyroem.plot.selections import selection
from pyroem.plot.sequences import decoded, transitions
from pyroem.plot.solvers import comparison, history
from pyroem.plot.style import COLOURS, LINES, MARKERS, STYLE, require_matplotlib

__all__ = [
    "COLOURS",
    "LINES",
    "MARKERS",
    "STYLE",
    "comparison",
    "contours",
    "decoded",
    "density",
    "fitted_mixture",
    "history",
    "likelihood",
    "mixture_moments",
    "pairs",
    "program",
    "render_model",
    "report",
    "require_matplotlib",
    "responsibilities",
    "selection",
    "surface",
    "transitions",
]
