"""The E-step: posterior weights of a program's factors, as the derivative of their contraction."""
