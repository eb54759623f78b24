"""The problem mnist-pixels-rnn15."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-pixels-rnn15` in benchmarks/training/problems.py."""

    name = "mnist-pixels-rnn15"
