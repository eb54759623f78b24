"""The problem cifar10-all-cnn-c."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `cifar10-all-cnn-c` in benchmarks/training/problems.py."""

    name = "cifar10-all-cnn-c"
