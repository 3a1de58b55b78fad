"""pyroem: closed-form EM and gradient MAP for any Pyro program with discrete assignments."""

from pyroem._pyro import markov
from pyroem.api import e_step, expected_log_joint, likelihood_curve, log_joint
from pyroem.benchmark import Benchmark, BenchmarkRow, benchmark
from pyroem.blocks import Blocks, blocks
from pyroem.bootstrap import Bootstrap, bootstrap
from pyroem.compare import Comparison, Row, Study, compare
from pyroem.curves import Curve, Surface
from pyroem.em import EM
from pyroem.errors import DataError, ModelError, PyroemError, SettingError
from pyroem.estep.trace import Posterior
from pyroem.families import Coordinate, Family, exponential_family, register_family
from pyroem.fit import Fit
from pyroem.gradient import MAP
from pyroem.implicit import implicit
from pyroem.loop import Record, Restart, Status
from pyroem.mcmc import Draws, mcmc
from pyroem.profiles import Profile
from pyroem.selection import (
    Candidate,
    LikelihoodRatioTest,
    Selection,
    likelihood_ratio_test,
    select,
)
from pyroem.stepwise import StepwiseEM
from pyroem.uncertainty import Uncertainty
from pyroem.variational import SVI, Approximation

__version__ = "0.1.0"

__all__ = [
    "EM",
    "MAP",
    "SVI",
    "Approximation",
    "Benchmark",
    "BenchmarkRow",
    "Blocks",
    "Bootstrap",
    "Candidate",
    "Comparison",
    "Coordinate",
    "Curve",
    "DataError",
    "Draws",
    "Family",
    "Fit",
    "LikelihoodRatioTest",
    "ModelError",
    "Posterior",
    "Profile",
    "PyroemError",
    "Record",
    "Restart",
    "Row",
    "Selection",
    "SettingError",
    "Status",
    "StepwiseEM",
    "Study",
    "Surface",
    "Uncertainty",
    "benchmark",
    "blocks",
    "bootstrap",
    "compare",
    "e_step",
    "expected_log_joint",
    "exponential_family",
    "implicit",
    "likelihood_curve",
    "likelihood_ratio_test",
    "log_joint",
    "markov",
    "mcmc",
    "register_family",
    "select",
]
