"""The method target-propagation."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `target-propagation` in benchmarks/training/methods.py."""

    name = "target-propagation"
