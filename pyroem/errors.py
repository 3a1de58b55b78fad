"""Errors that pyroem raises. Each names the site or argument, what was expected and what came."""

from __future__ import annotations


class PyroemError(ValueError):
    """Base class of every error that pyroem raises on purpose."""


class ModelError(PyroemError):
    """The program is not one that can be fitted (a site, a parameter, a shape)."""


class DataError(PyroemError):
    """The data does not suit the program (NaN, outside a support, wrong shape)."""


class SettingError(PyroemError):
    """A solver, a start or another setting has a value that makes no sense."""
