"""The nets: sizes, batches, random data. Costs do not depend on the values, but for ReLU's zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETS", "DecoderBlock", "Net", "Problem", "all_cnn_c", "c3d3"]


@dataclass(frozen=True)
class Problem:
    """A model and one batch; the loss is the mean cross entropy."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        """Of the model as it is."""
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> Tensor:
        """The plain gradient, into fresh memory."""
        for p in self.model.parameters():
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss


@dataclass(frozen=True)
class Net:
    """A net of the comparison; exact_batch: that of the quantities with a column for each class, where it differs."""

    label: str
    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    batch: int
    exact_batch: int | None = None

    def problem(self, exact: bool, batch: int | None = None) -> Problem:
        """Seeded; batch: another number of samples than the net's own."""
        torch.manual_seed(0)
        model = self.make()
        return Problem(model, *self.data(self.size(exact) if batch is None else batch))

    def size(self, exact: bool) -> int:
        """N."""
        return self.exact_batch if exact and self.exact_batch else self.batch


def _images(size: tuple[int, ...], classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, *size), torch.randint(classes, (n,)))


# -- chains ---------------------------------------------------------------------------------------------------


def _mlp(activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise((784, 1000, 500, 250, 10)):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


def c3d3() -> nn.Module:
    """DeepOBS's net for CIFAR-10 (Schneider, Balles and Hennig, 2019)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def all_cnn_c(classes: int = 100) -> nn.Module:
    """All-CNN-C without dropout. Source: Springenberg et al. (2015), table 1."""
    widths = [(3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1), (96, 192, 3, 1, 1), (192, 192, 3, 1, 1)]
    widths += [(192, 192, 3, 2, 1), (192, 192, 3, 1, 0), (192, 192, 1, 1, 0), (192, classes, 1, 1, 0)]
    layers: list[nn.Module] = []
    for i, o, kernel, stride, padding in widths:
        layers += [nn.Conv2d(i, o, kernel, stride, padding), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


# -- graphs ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions around an identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.short = nn.Sequential()
        if i != o:
            self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(self.short(x) + z)


def resnet8(channels: int = 3, size: int = 32) -> nn.Module:
    """He et al. (2016), 6n + 2 layers for CIFAR-10 with n = 1."""
    stem = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(size // 4), nn.Flatten(), nn.Linear(64, 10))


class Attention(nn.Module):
    """Self-attention by its formula, from four linear layers that every library can see."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.act, self.down = (
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Token embedding, sine positions, two layers, mean over positions, classifier."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], 1))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, hidden) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layers(self.embedding(tokens) + self.positions)
        return self.head(self.norm(x).mean(1))


class DecoderBlock(nn.Module):
    """Pre-norm attention with a causal mask, from one linear layer for all three of its inputs, and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder blocks with a causal mask; logits `[N, vocabulary, length]`. Source: Radford et al. (2019), pre-norm."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x))).mT


class RelativeBlock(nn.Module):
    """T5's: no biases, RMS norms, and a bias that is added to the attention's logits."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class RelativeEncoder(nn.Module):
    """T5's encoder, with one bias by distance for all blocks; logits `[N, vocabulary, length]`.

    Source: Raffel et al. (2020), section 2.1.
    """

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.distances = nn.Embedding(vocabulary, width), nn.Embedding(32, heads)
        places = torch.arange(length)
        self.register_buffer("buckets", (places[None] - places[:, None]).clamp(-16, 15) + 16)
        self.blocks = nn.ModuleList(RelativeBlock(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, bias = self.tokens(tokens), self.distances(self.buckets).permute(2, 0, 1)[None]
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x)).mT


def _sequences(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1000, (n, 64)), torch.randint(1000, (n, 64))


def _resnet18() -> nn.Module:
    """He et al. (2016), table 1, with batch norm in evaluation mode."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = (64, 64, 128, 256, 512)
    blocks = [block for i, o in itertools.pairwise(widths) for block in (Block(i, o, 1 + (i != o)), Block(o, o, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def _tokens(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1000, (n, 64)), torch.randint(10, (n,))


NETS = {
    "mlp": Net("MLP 784-1000-500-250-10, ReLU", lambda: _mlp(nn.ReLU), _images((784,), 10), 128),
    "mlp-sigmoid": Net("MLP 784-1000-500-250-10, sigmoid", lambda: _mlp(nn.Sigmoid), _images((784,), 10), 128),
    "3c3d": Net("3C3D, 3x32x32", c3d3, _images((3, 32, 32), 10), 128),
    "all-cnn-c": Net("All-CNN-C, 3x32x32, 100 classes", all_cnn_c, _images((3, 32, 32), 100), 32, exact_batch=4),
    "resnet8": Net("ResNet-8, 3x32x32, BatchNorm eval", lambda: resnet8().eval(), _images((3, 32, 32), 10), 64),
    "transformer": Net(
        "encoder: 64 tokens of 1000, width 128, 4 heads, hidden 512, 2 layers",
        lambda: Encoder(1000, 64, 128, 4, 512, 10), _tokens, 32,
    ),
    "gpt": Net(
        "decoder: 64 tokens of 1000, width 128, 4 heads, 4 blocks", lambda: GPT(1000, 64, 128, 4, 4), _sequences, 8
    ),
    "t5-like": Net(
        "encoder with a learned bias by distance: 64 tokens of 1000, width 128, 4 heads, 4 blocks",
        lambda: RelativeEncoder(1000, 64, 128, 4, 4), _sequences, 8,
    ),
    "resnet18": Net("ResNet-18, 3x64x64, BatchNorm eval", _resnet18, _images((3, 64, 64), 1000), 8),
}  # fmt: skip
