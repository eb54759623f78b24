"""The problem mnist-2x100."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-2x100` in benchmarks/training/problems.py."""

    name = "mnist-2x100"
