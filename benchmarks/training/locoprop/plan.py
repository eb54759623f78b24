"""Which methods LocoProp's study runs on which problem."""

from __future__ import annotations

from .methods import METHODS

__all__ = ["MAIN", "METHODS_OF"]

MAIN = "mnist-autoencoder"

# What the budget has no room for: on the secondary problems, methods that are not needed for the goals there.
METHODS_OF: dict[str, tuple[str, ...]] = {
    MAIN: tuple(METHODS),
    "fashion-autoencoder": (
        "momentum", "rmsprop", "adam", "momentum-100", "rmsprop-100", "adam-100", "kfac", "locoprop-m",
    ),
    "curves-autoencoder": ("momentum", "rmsprop", "adam", "shampoo", "kfac", "locoprop-m", "locoprop-s"),
    "fashion-convnet": ("momentum", "adam", "shampoo", "muon", "kfac", "locoprop-m"),
    "text-transformer": ("adam", "soap", "muon", "kfac", "locoprop-m"),
}  # fmt: skip
