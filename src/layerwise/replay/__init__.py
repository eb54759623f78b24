"""A closure run again: from the same state, or with codes in place of outputs."""
