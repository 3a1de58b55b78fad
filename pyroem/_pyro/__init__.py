"""The one place that touches Pyro's internals. Written for Pyro 1.9.

It runs a program with given parameter values, enumerates its assignments with Pyro's own
``EnumMessenger``, and contracts the factors of the enumerated trace with Pyro's own
``contract_tensor_tree``.
"""

from pyroem._pyro.contract import Enumerated, Factor, align, enumerated, site_log_prob
from pyroem._pyro.incomplete import VECTORS, Incomplete, Missing, seen_tril
from pyroem._pyro.markov import Brief, Jump, Loop, LoopError, Reader, Whole, markov
from pyroem._pyro.run import (
    Program,
    Site,
    Values,
    as_data,
    in_markov,
    is_deterministic,
    is_plate_site,
    isolated,
    plate_frames,
    step_of,
    stored_constraints,
    unwrap,
)
from pyroem._pyro.vectorised import COUNTED, Loops, arranged

__all__ = [
    "COUNTED",
    "VECTORS",
    "Brief",
    "Enumerated",
    "Factor",
    "Incomplete",
    "Jump",
    "Loop",
    "LoopError",
    "Loops",
    "Missing",
    "Program",
    "Reader",
    "Site",
    "Values",
    "Whole",
    "align",
    "arranged",
    "as_data",
    "enumerated",
    "in_markov",
    "is_deterministic",
    "is_plate_site",
    "isolated",
    "markov",
    "plate_frames",
    "seen_tril",
    "site_log_prob",
    "step_of",
    "stored_constraints",
    "unwrap",
]
