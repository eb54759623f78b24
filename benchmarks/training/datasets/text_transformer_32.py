"""The problem text-transformer-32."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `text-transformer-32` in benchmarks/training/problems.py."""

    name = "text-transformer-32"
