"""The method foof."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `foof` in benchmarks/training/methods.py."""

    name = "foof"
