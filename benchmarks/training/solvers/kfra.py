"""The method kfra."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `kfra` in benchmarks/training/methods.py."""

    name = "kfra"
