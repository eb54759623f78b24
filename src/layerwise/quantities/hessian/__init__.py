"""The diagonal of the Hessian: from GGN and residual columns, from Hessian products per layer, or sampled."""
