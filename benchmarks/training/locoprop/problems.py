"""The problems of LocoProp's study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import data
from benchmarks.autoencoder import SIZES, deep_autoencoder
from benchmarks.training.problem import Problem, Split, class_loss

from .curves import curves

__all__ = ["PROBLEMS", "Characters", "next_character"]


# -- autoencoders: sigmoid cross entropy summed over pixels, mean over the batch (nats) -----------------


def _pixels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


@lru_cache(maxsize=1)
def _images(name: str) -> data.Dataset:
    return data.load(name)


def _flat(name: str) -> Callable[[int, int], Split]:
    def load(rows: int, test_rows: int) -> Split:
        d = _images(name).flat()
        return Split(d.x_train[:rows], d.y_train[:rows], d.x_test[:test_rows], d.y_test[:test_rows], d.source)

    return load


def _curves(rows: int, test_rows: int) -> Split:
    x, x_test = curves(rows, seed=1), curves(test_rows, seed=2)
    return Split(x, torch.zeros(rows), x_test, torch.zeros(test_rows), "generated: seed 1 to train, 2 to test")


def _sizes(sizes: tuple[int, ...], width: float, fewer: int) -> tuple[int, ...]:
    """Hidden layers, except the code, made `width` times as wide; the last `fewer` before the code taken away,
    or, where that is negative, the first hidden layer repeated."""
    middle = len(sizes) // 2
    encoder = [round(width * n) for n in sizes[1:middle]]
    encoder = encoder[: len(encoder) - fewer] if fewer >= 0 else [encoder[0]] * -fewer + encoder
    return (sizes[0], *encoder, sizes[middle], *reversed(encoder), sizes[-1])


def _autoencoder(sizes: tuple[int, ...]) -> Callable[[int, Mapping[str, Any]], nn.Module]:
    def model(seed: int, shape: Mapping[str, Any]) -> nn.Module:
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[shape.get("activation", "tanh")]
        return deep_autoencoder(seed, _sizes(sizes, shape.get("width", 1.0), shape.get("fewer", 0)), activation)

    return model


# -- a convolutional classifier -------------------------------------------------------------------------


def _fashion(rows: int, test_rows: int) -> Split:
    d = _images("fashion_mnist")
    return Split(d.x_train[:rows], d.y_train[:rows], d.x_test[:test_rows], d.y_test[:test_rows], d.source)


def _convnet(seed: int, shape: Mapping[str, Any]) -> nn.Module:
    _no_shape("the convolutional net", shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip


# -- a transformer on characters ------------------------------------------------------------------------

CONTEXT, MODEL_WIDTH, HEADS, BLOCKS = 64, 64, 4, 2


class _Block(nn.Module):
    """Pre-norm attention and feed-forward, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Characters(nn.Module):
    """The next character of each position."""

    def __init__(
        self, symbols: int, width: int = MODEL_WIDTH, heads: int = HEADS, blocks: int = BLOCKS, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(h)))


def _transformer(seed: int, shape: Mapping[str, Any]) -> nn.Module:
    _no_shape("the transformer", shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Characters(65)


def next_character(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross entropy of the next characters, in nats."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def _windows(rows: int, test_rows: int) -> Split:
    """Windows that do not overlap: the first of the training text, and of the held-out text."""
    d = data.load("tinyshakespeare")

    def cut(text: Tensor, n: int) -> Tensor:
        return text[: n * CONTEXT].view(n, CONTEXT)

    return Split(
        cut(d.x_train, rows), cut(d.y_train, rows), cut(d.x_test, test_rows), cut(d.y_test, test_rows), d.source
    )  # fmt: skip


def _no_shape(what: str, shape: Mapping[str, Any]) -> None:
    if shape:
        raise ValueError(f"{what} has one shape; got {dict(shape)}")


CURVES_SIZES = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)  # Martens (2010), table 1

PROBLEMS: dict[str, Problem] = {
    p.name: p
    for p in (
        Problem("mnist-autoencoder", "deep autoencoder, MNIST (10,000 images)", "autoencoder", _flat("mnist"),
                _autoencoder(SIZES), _pixels),
        Problem("fashion-autoencoder", "deep autoencoder, Fashion-MNIST (10,000 images)", "autoencoder",
                _flat("fashion_mnist"), _autoencoder(SIZES), _pixels, timed_as="mnist-autoencoder"),
        Problem("curves-autoencoder", "deep autoencoder, CURVES (10,000 generated images)", "autoencoder", _curves,
                _autoencoder(CURVES_SIZES), _pixels),
        Problem("fashion-convnet", "convolutional net, Fashion-MNIST (10,000 images)", "convnet", _fashion,
                _convnet, class_loss, batch=500),
        Problem("text-transformer", "small transformer, tinyshakespeare (4,000 windows of 64 characters)",
                "transformer", _windows, _transformer, next_character, rows=4000, test_rows=500, batch=100,
                revisions={"locoprop-m": 1}),  # 1: the softmax's loss at the output, which lies behind a flatten
    )
}  # fmt: skip
