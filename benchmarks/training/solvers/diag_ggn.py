"""The method diag-ggn."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `diag-ggn` in benchmarks/training/methods.py."""

    name = "diag-ggn"
