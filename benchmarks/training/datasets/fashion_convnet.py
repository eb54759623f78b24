"""The problem fashion-convnet."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `fashion-convnet` in benchmarks/training/problems.py."""

    name = "fashion-convnet"
