"""Kronecker factors of a parameter's curvature: K-FAC, KFLR, EKFAC."""
