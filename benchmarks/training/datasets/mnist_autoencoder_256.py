"""The problem mnist-autoencoder-256."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-autoencoder-256` in benchmarks/training/problems.py."""

    name = "mnist-autoencoder-256"
