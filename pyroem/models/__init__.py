"""Ready-made Pyro programs: plain functions that import Pyro and torch only."""

from pyroem.models.bayesian import bayesian_gaussian_mixture
from pyroem.models.categories import bernoulli_mixture, latent_class
from pyroem.models.counts import poisson_mixture, zero_inflated_mixture
from pyroem.models.gaussian import gaussian_mixture
from pyroem.models.hidden_markov import hidden_markov
from pyroem.models.mixed import mixed_mixture
from pyroem.models.noise import box_sides, box_volume, gaussian_mixture_with_noise
from pyroem.models.priors import CategoryPrior, Prior, weak_category_prior, weak_prior
from pyroem.models.regression import mixture_of_regressions
from pyroem.models.student_t import student_t_mixture

__all__ = [
    "CategoryPrior",
    "Prior",
    "bayesian_gaussian_mixture",
    "bernoulli_mixture",
    "box_sides",
    "box_volume",
    "gaussian_mixture",
    "gaussian_mixture_with_noise",
    "hidden_markov",
    "latent_class",
    "mixed_mixture",
    "mixture_of_regressions",
    "poisson_mixture",
    "student_t_mixture",
    "weak_category_prior",
    "weak_prior",
    "zero_inflated_mixture",
]
