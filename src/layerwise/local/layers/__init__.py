"""Layers found on the tape, and the recorded run from which their local problems are made."""
