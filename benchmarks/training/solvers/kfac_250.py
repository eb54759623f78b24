"""The method kfac-250."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `kfac-250` in benchmarks/training/methods.py."""

    name = "kfac-250"
