"""Layer-local optimizers: LocoProp, alternating minimization, and who solves the layers."""
