"""The problem curves-autoencoder."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `curves-autoencoder` in benchmarks/training/problems.py."""

    name = "curves-autoencoder"
