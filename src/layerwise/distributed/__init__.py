"""Beyond one process, on `torch.distributed`: checkpoints to start again from, and models in stages."""

from layerwise.distributed.checkpoints import Loaded, load, save
from layerwise.distributed.pipeline import Pipeline
from layerwise.distributed.stages import Stage, split

__all__ = ["Loaded", "Pipeline", "Stage", "load", "save", "split"]
