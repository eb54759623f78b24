"""The problem cifar10-3c3d."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `cifar10-3c3d` in benchmarks/training/problems.py."""

    name = "cifar10-3c3d"
