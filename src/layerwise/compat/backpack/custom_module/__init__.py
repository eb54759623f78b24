"""Modules for operations that BackPACK needs as modules; here the plain torch calls would do."""
