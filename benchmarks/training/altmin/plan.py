"""Which methods AltMin's study runs on which problem: all where it is cheap, the rest as the budget allows."""

from __future__ import annotations

__all__ = ["METHODS_OF"]

_BASELINES = ("momentum", "adam", "adam-100")
_ALL_BASELINES = ("momentum", "momentum-100", "momentum-twice", "adam", "adam-100", "adam-twice")
_AM = ("am-adam", "am-sgd", "am-mem")
_OFFLINE = ("offline-am", "admm")

METHODS_OF: dict[str, tuple[str, ...]] = {
    "mnist-2x100": (*_ALL_BASELINES, *_AM, "am-published", "am-async", *_OFFLINE),
    "mnist-2x100-one-epoch": (*_ALL_BASELINES, *_AM, "am-published"),
    "mnist-2x500": (*_BASELINES, *_AM, "am-published"),
    "mnist-lenet5": (*_BASELINES, "adam-twice", *_AM, "am-published"),
    "mnist-lenet5-one-epoch": (*_BASELINES, *_AM),
    "mnist-rows-rnn15": (*_BASELINES, "adam-25", "adam-twice", *_AM, "am-published"),
    "mnist-pixels-rnn15": ("adam", "am-adam"),
    "mnist-binary-2x500": (*_BASELINES, "target-propagation", *_AM),
    "cifar10-2x100": (*_BASELINES, *_AM, "am-published", *_OFFLINE),
    "cifar10-2x500": (*_BASELINES, *_AM),
    "fashion-resnet8": ("adam", "am-adam"),
    "fashion-resnet8-falling": ("adam", "am-adam"),
    "fashion-patches": ("adam", "am-adam"),
    "higgs-2x300": (*_BASELINES, *_AM, "am-published", *_OFFLINE),
}
