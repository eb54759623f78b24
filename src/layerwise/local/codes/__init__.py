"""Codes: free outputs of layers, and the steps that move them before the layers are fitted."""
