"""`layerwise demo`: five ways to train one small autoencoder, side by side, in about a minute."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import LayerwiseError

__all__ = ["EPOCHS", "SECONDS_LIMIT", "DemoError", "run"]

EPOCHS = 60
SECONDS_LIMIT = 150.0
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


class DemoError(LayerwiseError):
    """The demo cannot start: an extra is missing, or its folder cannot be written."""


def run(out: Path, *, seed: int = 0, epochs: int = EPOCHS, seconds_limit: float = SECONDS_LIMIT) -> bool:
    """Train all methods, print the table, write `results.json`, `curves.png` and `layers.png` into `out`.

    seconds_limit: wall-clock seconds after which no further epoch begins. Returns True when no
    method failed. Raises `DemoError` before any work when an extra is missing or `out` is unusable.
    """
    missing = [package for module, package in EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise DemoError(f"the demo needs {' and '.join(missing)}: pip install 'layerwise[demo]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DemoError(f"cannot write into the folder {str(out)!r}: {error.strerror}") from error
    from . import main

    return main.compare(out, seed=seed, epochs=epochs, seconds_limit=seconds_limit)
