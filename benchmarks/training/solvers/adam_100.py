"""The method adam-100."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `adam-100` in benchmarks/training/methods.py."""

    name = "adam-100"
