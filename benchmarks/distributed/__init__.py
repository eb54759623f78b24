"""What layerwise costs over several processes: `python -m benchmarks.distributed NAME`."""
