"""The problem fashion-autoencoder."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `fashion-autoencoder` in benchmarks/training/problems.py."""

    name = "fashion-autoencoder"
