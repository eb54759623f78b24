"""The method offline-am."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `offline-am` in benchmarks/training/methods.py."""

    name = "offline-am"
