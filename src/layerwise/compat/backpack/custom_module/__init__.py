"""Modules for operations that BackPACK needs as modules; layerwise also supports the plain torch calls."""
