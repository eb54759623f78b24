"""The method adam-25."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `adam-25` in benchmarks/training/methods.py."""

    name = "adam-25"
