"""What a configuration is: a small model of a package, a batch, a loss, and what brute force needs to know of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Configuration", "Program", "double_throughout", "installed", "prepare", "shaken", "sliced"]

SHAKEN = 0.1  # the standard deviation of what is added to the parameters
OPERATORS = ("nms", "qnms")


@dataclass(frozen=True)
class Program:
    """A loss over a batch of N samples, each of which is a batch of its own.

    outputs: a batch -> the tensor (or tuple of tensors) that the loss calls receive; None where the model makes the
    loss by itself, so that what its outputs are is a choice. loss_of: outputs and their batch -> the loss.
    loss: a batch -> the loss as a user writes it, where it is not loss_of(outputs(batch), batch).
    weights: the loss is the sum of them times the losses of the samples; 1 / N each by default.
    """

    model: nn.Module
    batch: Any
    samples: Sequence[Any]
    outputs: Callable[[Any], Any] | None
    loss_of: Callable[[Any, Any], Tensor]
    loss: Callable[[Any], Tensor] | None = None
    weights: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of `lw.observe`
    mixed: bool = False  # the samples meet: no sample has a gradient of its own

    def value(self, batch: Any = None) -> Tensor:
        """The loss of a batch, of the whole one by default."""
        batch = self.batch if batch is None else batch
        if self.loss is not None:
            return self.loss(batch)
        assert self.outputs is not None
        return self.loss_of(self.outputs(batch), batch)

    def terms(self) -> list[Callable[[], Tensor]]:
        """The loss of each sample in a run of its own, weighted."""
        weights = self.weights or [1 / len(self.samples)] * len(self.samples)
        return [partial(self._term, w, one) for w, one in zip(weights, self.samples, strict=True)]

    def _term(self, weight: float, sample: Any) -> Tensor:
        return weight * self.value(sample)


@dataclass(frozen=True)
class Configuration:
    """A row of the table: who makes the program, and from which packages (names of modules)."""

    package: str
    name: str
    make: Callable[[], Program]
    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The name of its test."""
        return f"{self.package}-{self.name}".replace(" ", "_")


def sliced(batch: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Each sample of a batch by itself: a slice of its tensors of `count` rows, and all else as it is."""

    def row(value: Any, n: int) -> Any:
        return value[n : n + 1] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

    return [{name: row(value, n) for name, value in batch.items()} for n in range(count)]


def shaken(model: nn.Module) -> nn.Module:
    """The model in evaluation and float64, its parameters away from zeros, ones and equal values."""
    wide = {False: torch.float64, True: torch.complex128}
    model = model._apply(lambda t: t.to(wide[t.is_complex()]) if t.is_complex() or t.is_floating_point() else t).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(SHAKEN * torch.randn_like(p))
    return model


def installed(*modules: str) -> str:
    """The first of the modules that is not at hand; empty where all are."""
    return next((name for name in modules if importlib.util.find_spec(name) is None), "")


def prepare() -> None:
    """Let torchvision be imported beside a torch that its compiled part was not built for.

    transformers and timm import it for its transforms; no model here calls one of its operators.
    """
    if installed("torchvision"):
        return
    try:
        import torchvision
    except RuntimeError:
        for name in OPERATORS:
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float most) -> Tensor")
        import torchvision  # noqa: F401


@contextmanager
def double_throughout() -> Iterator[None]:
    """float64 where a model asks for float32, as many do before a softmax, a norm or the loss.

    What is compared is then which numbers are computed, and not how they are rounded on the way.
    """
    before = torch.get_default_dtype(), torch.float32, torch.float, torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32, torch.float, torch.Tensor.float = torch.float64, torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        _, torch.float32, torch.float, torch.Tensor.float = before
