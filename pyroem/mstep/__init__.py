"""The M-step: how each block of parameters is updated from expected sufficient statistics."""
