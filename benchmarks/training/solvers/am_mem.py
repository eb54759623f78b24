"""The method am-mem."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `am-mem` in benchmarks/training/methods.py."""

    name = "am-mem"
