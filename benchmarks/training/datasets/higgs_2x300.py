"""The problem higgs-2x300."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `higgs-2x300` in benchmarks/training/problems.py."""

    name = "higgs-2x300"
