"""The method muon."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `muon` in benchmarks/training/methods.py."""

    name = "muon"
