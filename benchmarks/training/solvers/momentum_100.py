"""The method momentum-100."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `momentum-100` in benchmarks/training/methods.py."""

    name = "momentum-100"
