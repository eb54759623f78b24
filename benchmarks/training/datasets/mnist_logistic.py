"""The problem mnist-logistic."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-logistic` in benchmarks/training/problems.py."""

    name = "mnist-logistic"
