"""The problems of the second-order study."""

from __future__ import annotations

from typing import Any

from benchmarks.training.altmin.problems import CIFAR10, FASHION, MNIST, images
from benchmarks.training.locoprop.problems import PROBLEMS as LOCOPROP
from benchmarks.training.problem import Problem, class_loss

from .nets import all_cnn_c, c2d2, c3d3, logistic

__all__ = ["PROBLEMS"]

_CIFAR10: dict[str, Any] = {"classes": True, "measured": 1_000, "data": "cifar10"}
_PIXELS, _TEXT = LOCOPROP["mnist-autoencoder"], LOCOPROP["text-transformer"]

PROBLEMS: dict[str, Problem] = {
    p.name: p
    for p in (
        Problem("mnist-logistic", "logistic regression, MNIST", "classes", images("mnist", MNIST, (1, 28, 28)),
                logistic(), class_loss, rows=60_000, test_rows=10_000, validation=5_000, batch=128, measured=10_000,
                classes=True, data="mnist", tune_epochs=1, final_epochs=5),
        Problem("fashion-2c2d", "2C2D, Fashion-MNIST (10,000 images)", "classes",
                images("fashion_mnist", FASHION, (1, 28, 28)), c2d2(), class_loss, validation=1_000, batch=128,
                measured=2_000, classes=True, data="fashion_mnist", tune_epochs=1, final_epochs=4),
        Problem("cifar10-3c3d", "3C3D, CIFAR-10 (10,000 images)", "classes", images("cifar10", CIFAR10, (3, 32, 32)),
                c3d3(), class_loss, validation=1_000, batch=128, tune_epochs=1, final_epochs=5, **_CIFAR10),
        Problem("cifar10-all-cnn-c", "All-CNN-C, CIFAR-10 (2,000 images)", "classes",
                images("cifar10", CIFAR10, (3, 32, 32)), all_cnn_c(), class_loss, rows=2_000, test_rows=500,
                validation=200, batch=128, tune_epochs=1, final_epochs=3, **_CIFAR10 | {"measured": 500}),
        Problem("mnist-autoencoder-256", "deep autoencoder, MNIST (10,000 images), batch 256", "pixels", _PIXELS.load,
                _PIXELS.model, _PIXELS.loss, batch=256, tune_epochs=1, final_epochs=5),
        Problem("text-transformer-32", "small transformer, tinyshakespeare (2,000 windows), batch 32", "characters",
                _TEXT.load, _TEXT.model, _TEXT.loss, rows=2_000, test_rows=250, batch=32, tune_epochs=1,
                final_epochs=4),
    )
}  # fmt: skip
