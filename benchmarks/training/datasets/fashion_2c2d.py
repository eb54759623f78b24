"""The problem fashion-2c2d."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `fashion-2c2d` in benchmarks/training/problems.py."""

    name = "fashion-2c2d"
