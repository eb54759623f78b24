"""The problem mnist-autoencoder."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-autoencoder` in benchmarks/training/problems.py."""

    name = "mnist-autoencoder"
