"""Training on several processes with `torch.distributed`: gradient noise between ranks, checkpoints, pipelines."""

from layerwise.distributed.checkpoints import Loaded, load, save
from layerwise.distributed.pipeline import Pipeline
from layerwise.distributed.rank_noise import NoiseEstimate, RankNoise, noise_of_ranks
from layerwise.distributed.stages import Stage, split
from layerwise.ranks.group import Ranks, check_same_model

__all__ = [
    "Loaded",
    "NoiseEstimate",
    "Pipeline",
    "RankNoise",
    "Ranks",
    "Stage",
    "check_same_model",
    "load",
    "noise_of_ranks",
    "save",
    "split",
]
