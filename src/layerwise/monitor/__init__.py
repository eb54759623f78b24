"""Monitoring of training: measures of every k-th step, by parameter, logged through any callable.

Other steps run unchanged, and nothing is written onto the model. See `docs/monitor.md`.
"""

from layerwise.monitor.measures import (
    Measure,
    Step,
    alignment,
    curvature,
    default,
    gradient_norm,
    largest_eigenvalue,
    loss,
    noise_scale,
    signal_to_noise,
    update_cosine,
    update_size,
)
from layerwise.monitor.monitor import Monitor
from layerwise.monitor.records import History, JSONLines, read
from layerwise.monitor.tensorboard import TensorBoard

__all__ = [
    "History",
    "JSONLines",
    "Measure",
    "Monitor",
    "Step",
    "TensorBoard",
    "alignment",
    "curvature",
    "default",
    "gradient_norm",
    "largest_eigenvalue",
    "loss",
    "noise_scale",
    "read",
    "signal_to_noise",
    "update_cosine",
    "update_size",
]
