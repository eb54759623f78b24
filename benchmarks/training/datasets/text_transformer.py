"""The problem text-transformer."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `text-transformer` in benchmarks/training/problems.py."""

    name = "text-transformer"
