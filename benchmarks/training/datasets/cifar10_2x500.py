"""The problem cifar10-2x500."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `cifar10-2x500` in benchmarks/training/problems.py."""

    name = "cifar10-2x500"
