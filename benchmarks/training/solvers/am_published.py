"""The method am-published."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `am-published` in benchmarks/training/methods.py."""

    name = "am-published"
