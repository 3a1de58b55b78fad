"""Covariances: scikit-learn's arrays and the program's parameters, by the type of covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyroem.models.gaussian import COVARIANCES, NAMED

FORMS = {  # mclust's fourteen names to the shape of covariances_, as scikit-learn names it
    **{name: "full" for name in COVARIANCES if name not in NAMED},
    "EEE": "tied",
    **dict.fromkeys(("VVI", "EEI", "VEI", "EVI"), "diag"),
    **dict.fromkeys(("VII", "EII"), "spherical"),
}
ALIASES = {"diag": "diagonal"}
PRIORS: dict[str, Any] = {"VVV": "full", "EEE": "tied", "VVI": "diagonal", "VII": "spherical"}


@dataclass(frozen=True)
class Shape:
    """A type of covariance, with a conjugate prior or without."""

    name: str
    prior: bool

    @property
    def mclust(self) -> str:
        """Its name in mclust."""
        name = ALIASES.get(self.name, self.name)
        return NAMED.get(name, name)

    @property
    def form(self) -> str:
        """The shape of ``covariances_``: "full", "tied", "diag" or "spherical"."""
        return FORMS[self.mclust]

    @property
    def spread(self) -> str:
        """The name of the program's parameter."""
        if self.prior:
            return "precision" if self.form in ("full", "tied") else "variance"
        if self.mclust in ("VEI", "EVI"):
            return "variance"
        return "covariance" if self.form in ("full", "tied") else "scale"

    def covariances(self, value: NDArray, components: int) -> NDArray:
        """``covariances_`` from the program's parameter."""
        if self.spread == "precision":
            return np.linalg.inv(value)
        value = value**2 if self.spread == "scale" else value
        if self.mclust in ("EEI", "EII"):
            rows = value.shape[1:]
            value = np.broadcast_to(value, (components, *rows))
        return np.ascontiguousarray(value)

    def parameter(self, covariances: NDArray) -> NDArray:
        """The program's parameter from ``covariances_``."""
        if self.spread == "precision":
            return np.linalg.inv(covariances)
        if self.spread == "scale":
            scale = np.sqrt(covariances)
            return {"EEI": scale[:1], "EII": scale[0]}.get(self.mclust, scale)
        return covariances

    def parameters(self, K: int, D: int) -> int:
        """How many are free, where the components share all of their covariance or nothing."""
        own = {"full": K * D * (D + 1) // 2, "tied": D * (D + 1) // 2, "diag": K * D}
        return own.get(self.form, K) + K * D + K - 1
