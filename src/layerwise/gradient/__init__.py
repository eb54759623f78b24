"""The per-sample gradient of one parameter over all its uses, as rows (inputs and output cotangents)."""
