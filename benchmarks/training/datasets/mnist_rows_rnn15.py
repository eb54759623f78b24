"""The problem mnist-rows-rnn15."""

from benchmarks.training.plugin import TrainingDataset


class Dataset(TrainingDataset):
    """See `mnist-rows-rnn15` in benchmarks/training/problems.py."""

    name = "mnist-rows-rnn15"
