"""Where the samples of a batch lie in every use and loss, on an axis or row by row: measured, never guessed."""

from __future__ import annotations

from layerwise.graph.samples.measure import count, measure, said_count
from layerwise.graph.samples.sample_layout import SampleLayout

__all__ = ["SampleLayout", "count", "measure", "said_count"]
