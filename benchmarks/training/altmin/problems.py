"""The problems of AltMin's study."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.training.problem import Problem, Split, class_loss

from .nets import dense, elman, lenet5, patches, resnet8, signs

__all__ = ["CIFAR10", "FASHION", "MNIST", "PROBLEMS", "higgs", "images"]

FASHION = (0.2860,), (0.3530,)  # mean and deviation of a training pixel
MNIST = (0.1307,), (0.3081,)  # mean and deviation of a training pixel
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of all 50,000 training images
ORDER = 0  # the seed that HIGGS' training rows are shuffled by: its rounded rows come last


@lru_cache(maxsize=1)
def _loaded(name: str) -> data.Dataset:
    return data.load(name)


def _cut(d: data.Dataset, x: Tensor, y: Tensor, x_test: Tensor, rows: int, test_rows: int) -> Split:
    if rows > len(x) or test_rows > len(x_test):
        raise ValueError(
            f"{d.name} has {len(x)} training and {len(x_test)} test rows here; {rows} and {test_rows} were asked for"
        )
    source = d.source + (f"; {d.subset}" if d.subset else "")
    return Split(x[:rows], y[:rows], x_test[:test_rows], d.y_test[:test_rows], source)


def images(name: str, moments: tuple[Any, Any], shape: tuple[int, ...]) -> Callable[[int, int], Split]:
    """Images less their mean and over their deviation by channel, each as `shape`."""
    mean, deviation = (torch.tensor(m).view(1, -1, 1, 1) for m in moments)

    def load(rows: int, test_rows: int) -> Split:
        d = _loaded(name)
        x, x_test = (((t - mean) / deviation).reshape(-1, *shape) for t in (d.x_train[:rows], d.x_test[:test_rows]))
        return _cut(d, x, d.y_train, x_test, rows, test_rows)

    return load


def higgs(rows: int, test_rows: int) -> Split:
    """Rows in an order of their own, features less the training rows' mean and over their deviation.

    The test rows are rows of the test set: the released program's are its training rows.
    """
    d = _loaded("higgs")
    order = torch.randperm(len(d.x_train), generator=torch.Generator().manual_seed(ORDER))[:rows]
    x = d.x_train[order]
    mean, deviation = x.mean(0), x.std(0)
    return _cut(d, (x - mean) / deviation, d.y_train[order], (d.x_test - mean) / deviation, rows, test_rows)


_STRAIGHT = {
    "adam": "STE-Adam", "adam-100": "STE-Adam, batch B/T", "momentum": "STE-SGD", "momentum-100": "STE-SGD, batch B/T",
}  # fmt: skip
_MNIST: dict[str, Any] = {
    "rows": 60_000, "test_rows": 10_000, "validation": 5_000, "batch": 200, "measured": 10_000, "classes": True,
    "data": "mnist",
}  # fmt: skip
_CIFAR10: dict[str, Any] = {
    "rows": 10_000, "test_rows": 2_000, "validation": 1_000, "batch": 200, "classes": True, "data": "cifar10",
    "tune_epochs": 3, "final_epochs": 10,
}  # fmt: skip
_FASHION: dict[str, Any] = {
    "rows": 20_000, "test_rows": 5_000, "validation": 2_000, "batch": 200, "classes": True, "data": "fashion_mnist",
    "measured": 2_000, "final_epochs": 5,
}  # fmt: skip
_FLAT = images("mnist", MNIST, (784,))
_COLOURS = images("cifar10", CIFAR10, (3072,))

PROBLEMS: dict[str, Problem] = {
    p.name: p
    for p in (
        Problem("mnist-2x100", "MNIST, dense 2 x 100", "dense", _FLAT, dense(784, 100, 100, 10), class_loss,
                early=100, final_epochs=50, **_MNIST),
        Problem("mnist-2x100-one-epoch", "MNIST, dense 2 x 100, one epoch with a falling rate", "dense", _FLAT,
                dense(784, 100, 100, 10), class_loss, early=100, final_epochs=1, schedule="linear",
                timed_as="mnist-2x100", **_MNIST),
        Problem("mnist-2x500", "MNIST, dense 2 x 500", "dense", _FLAT, dense(784, 500, 500, 10), class_loss,
                early=100, **_MNIST),
        Problem("mnist-lenet5", "MNIST, LeNet-5", "conv", images("mnist", MNIST, (1, 28, 28)), lenet5(), class_loss,
                early=100, final_epochs=3, **_MNIST),
        Problem(
            "mnist-lenet5-one-epoch",
            "MNIST, LeNet-5, one epoch with a falling rate",
            "conv",
            images("mnist", MNIST, (1, 28, 28)),
            lenet5(),
            class_loss,
            early=100,
            final_epochs=1,
            schedule="linear",
            timed_as="mnist-lenet5",
            **_MNIST,
        ),
        Problem("mnist-rows-rnn15", "sequential MNIST row by row, 15 recurrent units, a falling rate", "recurrent",
                images("mnist", MNIST, (28, 28)), elman(28), class_loss, early=100, final_epochs=3,
                schedule="linear", revision=2, **_MNIST),
        Problem("mnist-pixels-rnn15", "sequential MNIST pixel by pixel, short form (5,000 images), 15 recurrent units",
                "recurrent", images("mnist", MNIST, (784, 1)), elman(1), class_loss, early=40, early_rows=500,
                final_epochs=3, **_MNIST | {"rows": 5_000, "test_rows": 1_000, "validation": 500, "batch": 250,
                                            "measured": 500}),
        Problem("mnist-binary-2x500", "MNIST, binary 2 x 500 (signs), a falling rate", "binary", _FLAT,
                signs(784, 500, 500, 10), class_loss, early=100, labels=_STRAIGHT, schedule="linear", **_MNIST),
        Problem("cifar10-2x100", "CIFAR-10 subset (10,000 images), dense 2 x 100", "dense", _COLOURS,
                dense(3072, 100, 100, 10), class_loss, early=100, **_CIFAR10),
        Problem("cifar10-2x500", "CIFAR-10 subset (10,000 images), dense 2 x 500", "dense", _COLOURS,
                dense(3072, 500, 500, 10), class_loss, early=100, **_CIFAR10),
        Problem("fashion-resnet8", "ResNet-8 with batch norm, Fashion-MNIST (20,000 images)", "conv",
                images("fashion_mnist", FASHION, (1, 28, 28)), resnet8(), class_loss, trials=3,
                **_FASHION | {"final_epochs": 3}),
        Problem("fashion-resnet8-falling", "ResNet-8 with batch norm, Fashion-MNIST (20,000 images), a falling rate",
                "conv", images("fashion_mnist", FASHION, (1, 28, 28)), resnet8(), class_loss, trials=3,
                schedule="linear", timed_as="fashion-resnet8", **_FASHION | {"final_epochs": 5}),
        Problem("fashion-patches", "transformer over patches, Fashion-MNIST (20,000 images)", "dense",
                images("fashion_mnist", FASHION, (1, 28, 28)), patches(), class_loss, **_FASHION),
        Problem("higgs-2x300", "HIGGS subset (20,970 rows), dense 2 x 300", "tabular", higgs, dense(28, 300, 300, 2),
                class_loss, early=100, rows=20_970, test_rows=5_000, validation=2_970, batch=200, classes=True,
                data="higgs", tune_epochs=3, final_epochs=10),
    )
}  # fmt: skip
