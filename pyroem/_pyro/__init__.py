"""The one place that touches Pyro's internals. Written for Pyro 1.9.

It runs a program with given parameter values, enumerates its assignments with Pyro's own
``EnumMessenger``, and contracts the factors of the enumerated trace with Pyro's own
``contract_tensor_tree``.
"""

from pyroem._pyro.contract import Enumerated, Factor, align, enumerated, site_log_prob
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
    stored_constraints,
    unwrap,
)

__all__ = [
    "Enumerated",
    "Factor",
    "Program",
    "Site",
    "Values",
    "align",
    "as_data",
    "enumerated",
    "in_markov",
    "is_deterministic",
    "is_plate_site",
    "isolated",
    "plate_frames",
    "site_log_prob",
    "stored_constraints",
    "unwrap",
]
