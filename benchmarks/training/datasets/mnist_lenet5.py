"""The problem mnist-lenet5."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-lenet5` in benchmarks/training/problems.py."""

    name = "mnist-lenet5"
