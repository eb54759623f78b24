"""The libraries that are compared, ours first, in its two ways to the gradient."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from . import asdl, backpack, curvlinops, functorch, opacus, ours
from .base import Contender, Program, Unsupported

__all__ = ["CONTENDERS", "OURS", "Contender", "Program", "Unsupported", "missing", "version_of"]

CONTENDERS = {
    "ours": Contender("Layerwise", "layerwise", "layerwise", ours.program),
    "rows": Contender('Layerwise, grad="rows"', "layerwise", "layerwise", ours.by_rows),
    "backpack": Contender("BackPACK", "backpack", "backpack-for-pytorch", backpack.program),
    "vmap": Contender("torch.func", None, "torch", functorch.program),
    "opacus": Contender("Opacus", "opacus", "opacus", opacus.program),
    "curvlinops": Contender("curvlinops", "curvlinops", "curvlinops-for-pytorch", curvlinops.program),
    "asdl": Contender("ASDL", "asdl", "asdfghjkl", asdl.program),
}


OURS = ("ours", "rows")


def missing(name: str) -> bool:
    """Whether a contender is not installed."""
    module = CONTENDERS[name].module
    return module is not None and find_spec(module) is None


def version_of(name: str) -> str | None:
    """The installed version, or None."""
    if missing(name):
        return None
    try:
        return version(CONTENDERS[name].distribution)
    except PackageNotFoundError:
        return "unknown"
