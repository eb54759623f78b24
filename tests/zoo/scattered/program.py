"""A program whose samples lie elsewhere than along one axis of the batch, with brute force's view of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..problem import prepare

__all__ = [
    "Batch",
    "Refusal",
    "Scattered",
    "ScatteredInstance",
    "cross_entropy",
    "draw",
    "labels",
    "per_label",
    "register",
]

Batch = SimpleNamespace  # the tensors of a batch by name; `number`: the sample of each loss term; `n`: how many samples


@dataclass(frozen=True)
class Refusal:
    """An error that a cell may or must raise: names in `layerwise.errors`, words of its text, both by `|`; a reason."""

    error: str
    text: str
    why: str


@dataclass(frozen=True, repr=False)
class Scattered:
    """A model, a batch and a loss.

    kind: 1 a tensor without samples comes first; 2 the batch is taken apart; 3 rows are chosen before the loss or the
        head; 4 samples of uneven length in one tensor; 5 routed experts; 6 a sample of several rows of the batch; 7
        sample by sample; 8 other rows first (a grid, edges, masked rows); 0 samples are mixed in truth.
    batch: generator -> the batch, with `number` and `n`.
    run: (model, batch) -> what the loss calls receive; a tuple of tensors for several calls.
    call: (that, batch) -> the loss as its user writes it.
    elements: (that, batch) -> the loss's terms `[M]` by a formula of their own, with the scale that they have in it.
    samples: batch -> what the user says as `samples=`: nothing, N, or the number of each loss term.
    regular: the same sum over the same rows written the regular way, (model, batch) -> the loss; and its model, where
        that must be another one with the same parameters.
    reduction: "mean" or "sum"; None for a loss that is neither.
    own: whether the loss is no call that the library knows: it counts as a sum, and draws are no labels.
    refused: what the program's per-sample quantities must raise. may_refuse: what they may raise instead of a value.
    """

    name: str
    kind: int
    make: Callable[[], nn.Module]
    batch: Callable[[Generator], Batch]
    run: Callable[[Any, Batch], Any]
    call: Callable[[Any, Batch], Tensor]
    elements: Callable[[Any, Batch], Tensor]
    samples: Callable[[Batch], int | Tensor | None] = lambda b: None
    regular: Callable[[Any, Batch], Tensor] | None = None
    regular_make: Callable[[], nn.Module] | None = None
    reduction: str | None = "mean"
    own: bool = False
    refused: Refusal | None = None
    may_refuse: Refusal | None = None
    dtype: torch.dtype = torch.float64
    rel: float = 1e-10
    train: bool = False

    def __repr__(self) -> str:
        return f"Scattered({self.name!r})"

    @property
    def id(self) -> str:
        """The program's name in a test report."""
        return f"{self.kind}-{self.name}"

    @property
    def about(self) -> str:
        """One line about it."""
        return (self.make.__doc__ or "").strip().splitlines()[0]

    def instance(self, seed: int = 0) -> ScatteredInstance:
        """The model and one batch."""
        model = prepare(self.make, seed, self.train, self.dtype)
        return ScatteredInstance(self, model, self.batch(torch.Generator().manual_seed(seed)))

    def in_regular_form(self, seed: int = 0) -> ScatteredInstance:
        """The same parameters and batch, and the loss of `regular`."""
        instance = self.instance(seed)
        if self.regular_make is not None:
            model = prepare(self.regular_make, seed, self.train, self.dtype)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(instance.params[name])
            instance = ScatteredInstance(self, model, instance.data)
        return instance


@dataclass(frozen=True)
class ScatteredInstance:
    """A program with its model and batch drawn: closures for the library, and for the oracle."""

    program: Scattered
    model: nn.Module
    data: Batch

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.data.n

    @property
    def subject(self) -> nn.Module:
        """What names the parameters."""
        return self.model

    @property
    def params(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def samples(self) -> int | Tensor | None:
        """What the user says as `samples=`."""
        return self.program.samples(self.data)

    def logits(self) -> Any:
        """What the loss calls receive."""
        return self.program.run(self.model, self.data)

    def loss(self) -> Tensor:
        """The loss the ordinary way."""
        return self.loss_of(self.logits())

    def regular_loss(self) -> Tensor:
        """The loss in the regular form."""
        return self.program.regular(self.model, self.data)

    def loss_of(self, z: Any) -> Tensor:
        """The loss from what its calls receive."""
        return self.program.call(z, self.data)

    def terms(self) -> Tensor:
        """The samples' terms `[N]`; their sum is the loss."""
        return self.terms_of(self.logits())

    def terms_of(self, z: Any) -> Tensor:
        """The same from what the loss calls receive: the elements of each sample added up."""
        elements, number = self.program.elements(z, self.data), self.data.number
        return torch.stack([elements[number == n].sum() for n in range(self.n)])


# Batches and losses -----------------------------------------------------------------------------


def draw(gen: Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=gen, dtype=torch.float64)


def labels(gen: Generator, *shape: int, classes: int = 3) -> Tensor:
    """Class labels."""
    return torch.randint(classes, shape, generator=gen)


def cross_entropy(z: Tensor, b: Batch) -> Tensor:
    """The mean over rows `[M,C]` with `b.y`, `[M]`."""
    return F.cross_entropy(z, b.y)


def per_label(z: Tensor, b: Batch) -> Tensor:
    """Its terms: log of the sum of exponentials minus the label's logit, over M."""
    return (z.exp().sum(1).log() - z[torch.arange(len(z)), b.y]) / len(z)


def register(
    registry: list[Scattered], kind: int
) -> Callable[..., Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]]:
    """A decorator factory that turns a builder into a program of the registry, named as the builder."""

    def program(
        batch: Callable[[Generator], Batch], run: Callable[[Any, Batch], Any] = lambda m, b: m(b.x), **fields: Any
    ) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
        def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
            given = {"call": cross_entropy, "elements": per_label} | fields
            registry.append(Scattered(make.__name__, kind, make, batch, run, **given))
            return make

        return enter

    return program
