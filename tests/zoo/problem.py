"""A model with its data as one frozen description, and its pairing with a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from .losses import LOSSES, Loss

__all__ = ["Case", "Functional", "Instance", "Problem", "batch_of", "floats", "prepare", "register", "tokens"]


class Functional:
    """A model without modules: a dictionary of leaf tensors and a pure function of it and the input."""

    def __init__(self, params: Mapping[str, Tensor], forward: Callable[[Mapping[str, Tensor], Any], Any]):
        self.params = {name: p.detach().double().requires_grad_() for name, p in params.items()}
        self.forward = forward

    def __call__(self, x: Any) -> Any:
        return self.forward(self.params, x)

    def named_parameters(self) -> Any:
        return self.params.items()


Model = nn.Module | Functional


@dataclass(frozen=True)
class Problem:
    """A tiny model and the shape of its world.

    make: () -> the model, its weights drawn from torch's global generator.
    inputs: generator -> x, a tensor or a tuple of tensors, samples along dim 0.
    out: the shape of what the loss call receives; a tuple of shapes for several heads.
    losses: names in `LOSSES`.
    layout: where the samples lie in the loss's positions: "first" dim 0; "flat_n" dim 0 is (n, t);
        "flat_t" dim 0 is (t, n); "second" dim 1.
    head: the model's output -> what the loss call receives.
    own_loss: (model, x, y) -> loss, where the model computes its loss itself.
    own_output: (model, x, y) -> the model's output, where it cannot be called as `model(x)`.
    dtype, rel: of the parameters, and how near to the oracle results must be: 1e-10 but where the model itself rounds.
    train: in training mode.
    """

    name: str
    make: Callable[[], Model]
    inputs: Callable[[Generator], Any]
    out: Any
    losses: tuple[str, ...] = ("ce_mean", "mse_sum")
    layout: str = "first"
    head: Callable[[Any], Any] = lambda out: out
    own_loss: Callable[[Any, Any, Any], Tensor] | None = None
    own_output: Callable[[Any, Any, Any], Any] | None = None
    tags: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float64
    rel: float = 1e-10
    train: bool = False

    @property
    def special(self) -> bool:
        """Whether the model rounds, or mixes its samples: most table tests cannot have it."""
        return self.dtype != torch.float64 or "mixed" in self.tags

    def build(self, seed: int = 0) -> Model:
        """The model, no weight or running statistic at a special value."""
        return prepare(self.make, seed, self.train, self.dtype)

    def batch(self, seed: int = 0, loss: str | None = None) -> tuple[Any, Any]:
        """(x, y) for the named loss (default: the first), the same for the same seed."""
        return batch_of(self.inputs, LOSSES[loss or self.losses[0]].target, self.out, seed)

    def per_sample(self, e: Tensor, n: int) -> Tensor:
        """Sum loss elements over everything but the samples: `[N]`."""
        if self.layout == "flat_n":
            e = e.unflatten(0, (n, -1))
        elif self.layout == "flat_t":
            e = e.unflatten(0, (-1, n)).transpose(0, 1)
        elif self.layout == "second":
            e = e.transpose(0, 1)
        return e.reshape(n, -1).sum(1)


@dataclass(frozen=True)
class Instance:
    """A case with its model and batch drawn: closures for the library, and for the oracle."""

    problem: Problem
    spec: Loss
    model: Model
    x: Any
    y: Any

    @property
    def n(self) -> int:
        """The number of samples."""
        return (self.x[0] if isinstance(self.x, tuple) else self.x).shape[0]

    @property
    def subject(self) -> nn.Module | dict[str, Tensor]:
        """What names the parameters: the module, or the dictionary of a functional model."""
        return self.model.params if isinstance(self.model, Functional) else self.model

    @property
    def params(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def output(self) -> Any:
        """The model's own output."""
        if self.problem.own_output is not None:
            return self.problem.own_output(self.model, self.x, self.y)
        return self.model(*self.x) if isinstance(self.x, tuple) else self.model(self.x)

    def logits(self) -> Any:
        """What the loss call receives."""
        return self.problem.head(self.output())

    def loss(self) -> Tensor:
        """The loss the ordinary way."""
        if self.problem.own_loss is not None:
            return self.problem.own_loss(self.model, self.x, self.y)
        return self.loss_of(self.logits())

    def terms(self) -> Tensor:
        """The samples' terms `[N]`; their sum is the loss."""
        return self.terms_of(self.logits())

    def loss_of(self, z: Any) -> Tensor:
        """The loss from what its call receives."""
        return self.spec.call(z, self.y)

    def terms_of(self, z: Any) -> Tensor:
        """The samples' terms `[N]` from what the loss call receives."""
        elements = self.spec.elements(z, self.y)
        parts = elements if isinstance(elements, tuple) else (elements,)
        return torch.stack([self.problem.per_sample(e, self.n) for e in parts]).sum(0)


class Case(NamedTuple):
    """One model with one loss."""

    problem: Problem
    loss: Loss

    @property
    def id(self) -> str:
        """The case's name in a test report."""
        return f"{self.problem.name}-{self.loss.name}"

    def make(self, seed: int = 0, batch_seed: int | None = None) -> Instance:
        """Draw the model and one batch; another `batch_seed` gives another batch for the same model."""
        x, y = self.problem.batch(seed if batch_seed is None else batch_seed, self.loss.name)
        return Instance(self.problem, self.loss, self.problem.build(seed), x, y)


def prepare(make: Callable[[], Model], seed: int, train: bool = False, dtype: torch.dtype = torch.float64) -> Model:
    """Build with a seed and a dtype, and move every weight and running statistic off special values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        if isinstance(model, Functional):
            return model
        model = model.to(dtype).train(train)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_()
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
    return model


def batch_of(
    inputs: Callable[[Generator], Any], target: Callable[[Generator, Any], Any], out: Any, seed: int
) -> tuple[Any, Any]:
    """(x, y) drawn from one seeded generator."""
    gen = torch.Generator().manual_seed(seed)
    x = inputs(gen)
    shape = tuple(map(torch.Size, out)) if isinstance(out[0], tuple) else torch.Size(out)
    return x, target(gen, shape)


def floats(*shape: int) -> Callable[[Generator], Tensor]:
    """Standard normal inputs of this shape."""
    return lambda gen: torch.randn(shape, generator=gen, dtype=torch.float64)


def tokens(vocabulary: int, *shape: int) -> Callable[[Generator], Tensor]:
    """Token indices of this shape; the first sample holds token 0 and a repeated token."""

    def draw(gen: Generator) -> Tensor:
        x = torch.randint(vocabulary, shape, generator=gen)
        x.view(-1)[:3] = torch.tensor([0, 2, 2])
        return x

    return draw


def register(
    registry: list[Problem],
) -> Callable[..., Callable[[Callable[[], Model]], Callable[[], Model]]]:
    """A decorator factory that turns a builder into a `Problem` of the registry, named as the builder."""

    def problem(
        inputs: Callable[[Generator], Any], out: Any, *losses: str, tags: str = "", **fields: Any
    ) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
        def enter(make: Callable[[], Model]) -> Callable[[], Model]:
            if losses:
                fields["losses"] = losses
            registry.append(Problem(make.__name__, make, inputs, out, tags=frozenset(tags.split()), **fields))
            return make

        return enter

    return problem
