"""The method ekfac."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `ekfac` in benchmarks/training/methods.py."""

    name = "ekfac"
