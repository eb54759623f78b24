"""The problem mnist-binary-2x500."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-binary-2x500` in benchmarks/training/problems.py."""

    name = "mnist-binary-2x500"
