"""The problem mnist-2x500."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-2x500` in benchmarks/training/problems.py."""

    name = "mnist-2x500"
