"""Beyond one process, on `torch.distributed`: agreement, gradient noise between ranks, checkpoints, stages."""

from layerwise.distributed.checkpoints import Loaded, load, save
from layerwise.distributed.noise import NoiseEstimate, RankNoise, noise_of_ranks
from layerwise.distributed.pipeline import Pipeline
from layerwise.distributed.stages import Stage, split
from layerwise.ranks import Ranks, check_same_model

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
