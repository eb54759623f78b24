"""The method soap."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `soap` in benchmarks/training/methods.py."""

    name = "soap"
