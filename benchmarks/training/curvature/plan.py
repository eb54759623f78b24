"""Which methods the second-order study runs on which problem: all where it is cheap, the rest as the budget allows."""

from __future__ import annotations

__all__ = ["METHODS_OF"]

_FIRST = ("momentum", "adam")

METHODS_OF: dict[str, tuple[str, ...]] = {
    "mnist-logistic": (*_FIRST, "kfac", "kfac-momentum", "kflr", "kfra", "ekfac", "foof", "diag-ggn", "diag-ggn-mc"),
    "fashion-2c2d": (*_FIRST, "kfac", "diag-ggn-mc"),
    "cifar10-3c3d": (*_FIRST, "kfac", "kfac-momentum", "foof", "diag-ggn-mc"),
    "cifar10-all-cnn-c": (*_FIRST, "kfac", "diag-ggn-mc"),
    "mnist-autoencoder-256": (*_FIRST, "kfac", "kfac-momentum", "ekfac", "foof", "diag-ggn-mc"),
    "text-transformer-32": (*_FIRST, "kfac", "kfac-momentum", "ekfac", "foof", "diag-ggn-mc"),
}
