"""BackPACK's helper functions."""
