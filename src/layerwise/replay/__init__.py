"""Running a closure again: from the same state, or with codes (given activations) in place of outputs."""
