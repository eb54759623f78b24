"""The tape: records one run of a model, and sends cotangents back through it."""
