"""Quantities in the user's own backward pass: `observe`, its results, and sums over batches and ranks."""
