"""How a layer is fitted to its target: first-order steps, closed forms, running moments."""
