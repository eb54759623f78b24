"""Interfaces of other libraries over this one, so that a script can switch by changing an import."""
