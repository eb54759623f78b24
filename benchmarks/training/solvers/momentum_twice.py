"""The method momentum-twice."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `momentum-twice` in benchmarks/training/methods.py."""

    name = "momentum-twice"
