"""The method kfac-momentum."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `kfac-momentum` in benchmarks/training/methods.py."""

    name = "kfac-momentum"
