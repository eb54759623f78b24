"""The problem mnist-lenet5-one-epoch."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-lenet5-one-epoch` in benchmarks/training/problems.py."""

    name = "mnist-lenet5-one-epoch"
