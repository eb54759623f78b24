"""The diagonal of the Hessian, by columns of its root, of residuals, or of units."""
