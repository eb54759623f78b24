"""The method adam."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `adam` in benchmarks/training/methods.py."""

    name = "adam"
