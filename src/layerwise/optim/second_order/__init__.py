"""Second-order optimizers: K-FAC, Newton with a diagonal, and the preconditioner in front of any other."""
