"""What the papers state, shown again: LocoProp's curve and pictures, and the statements of alternating minimization."""
