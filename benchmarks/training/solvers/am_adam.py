"""The method am-adam."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `am-adam` in benchmarks/training/methods.py."""

    name = "am-adam"
