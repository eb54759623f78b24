"""Optimizers trained on one footing: the same pre-declared trials for all, one row a run, curves by Benchopt."""
