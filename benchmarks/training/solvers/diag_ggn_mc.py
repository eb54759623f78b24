"""The method diag-ggn-mc."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `diag-ggn-mc` in benchmarks/training/methods.py."""

    name = "diag-ggn-mc"
