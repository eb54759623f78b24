"""The method adam-twice."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `adam-twice` in benchmarks/training/methods.py."""

    name = "adam-twice"
