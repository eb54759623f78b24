"""Proofs on autograd's graph: coverage, where samples lie, where curvature enters, products with it."""
