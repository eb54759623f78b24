"""A GPT in stages, one a rank, and two ways to train it: stages with losses of their own, and 1F1B with gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.speed.overhead.nets import DecoderBlock
from layerwise.distributed import Stage

__all__ = ["ARMS", "Arm", "LocalLosses", "OneForwardOneBackward", "Shape", "cross_entropy", "stage_of", "validation"]

_AHEAD = 2  # batches that a stage may be ahead of the next one
_TRAINING, _VALIDATION = 1, 2  # tags of messages
Batch = tuple[Tensor, Tensor]
Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class Shape:
    """Sizes of the net, and how it is trained."""

    width: int
    heads: int
    blocks: int
    length: int
    symbols: int
    windows: int  # a batch
    rate: float = 1e-3
    warm_up: int = 20  # steps in which the rate rises to its value
    microbatches: int = 8  # of 1F1B
    hidden: int = 0  # units of the hidden layer in the heads of local losses; 0: they are linear


class Places(nn.Module):
    """Embeddings of symbols and of their places."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.symbol, self.place = (nn.Embedding(n, shape.width) for n in (shape.symbols, shape.length))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.symbol(x) + self.place.weight
        return out


class Hidden(nn.Module):
    """A hidden layer beside the identity, as in a block without attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.first, self.last = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.last(F.gelu(self.first(self.norm(x))))
        return out


def parts_of(shape: Shape) -> dict[str, nn.Module]:
    """The net as a chain: GPT-2's, pre-norm, matrices drawn from N(0, 0.02²)."""
    parts: dict[str, nn.Module] = {"places": Places(shape)}
    parts |= {f"blocks.{n}": DecoderBlock(shape.width, shape.heads) for n in range(shape.blocks)}
    parts["head"] = _head(shape)
    return {name: _drawn(part) for name, part in parts.items()}


def stage_of(shape: Shape, rank: int, size: int, seed: int = 0) -> Stage:
    """The stage of a rank: the same number of blocks each, the embeddings in the first, the head in the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = parts_of(shape)
    blocks = [round(n * shape.blocks / size) for n in range(size + 1)]
    ends = [0, *(1 + n for n in blocks[1:-1]), len(parts)]
    low, high = list(pairwise(ends))[rank]
    return Stage(dict(list(parts.items())[low:high]))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over windows and places, in nats a symbol."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@torch.no_grad()
def validation(stage: nn.Module, rank: int, size: int, batches: Sequence[Batch], width: int) -> float:
    """The mean loss over batches of one size, on all ranks."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in batches:
        h = x
        if rank > 0:
            h = torch.empty(*x.shape, width, dtype=_type(stage))
            dist.recv(h, rank - 1, tag=_VALIDATION)
        out = stage(h)
        if rank + 1 < size:
            dist.send(out, rank + 1, tag=_VALIDATION)
        else:
            total += cross_entropy(out, y)
    dist.broadcast(total, size - 1)
    return float(total) / len(batches)


class Arm:
    """A stage of a net in training by AdamW; nanoGPT's settings for characters, without dropout and clipping."""

    def __init__(self, shape: Shape, rank: int, size: int, stage: Stage, model: nn.Module) -> None:
        self.shape, self.rank, self.size, self.stage, self.model = shape, rank, size, stage, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=shape.rate, betas=(0.9, 0.99), weight_decay=0.1)
        self.steps = 0

    def run(self, batches: Sequence[Batch]) -> None:
        """A step for each batch."""
        raise NotImplementedError

    def _move(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.shape.rate * min(1.0, self.steps / max(1, self.shape.warm_up))
        self.optimizer.step()
        self.optimizer.zero_grad()


class OneForwardOneBackward(Arm):
    """AdamW on the net's loss: torch's 1F1B schedule, activations up and gradients down for each microbatch."""

    def __init__(self, shape: Shape, rank: int, size: int, stage: Stage) -> None:
        super().__init__(shape, rank, size, stage, stage)
        piece = PipelineStage(stage, rank, size, torch.device("cpu"))
        self._schedule = Schedule1F1B(piece, shape.microbatches, loss_fn=cross_entropy)

    def run(self, batches: Sequence[Batch]) -> None:
        """A step for each batch; the pipeline is filled and emptied in each."""
        for x, y in batches:
            given = (x,) if self.rank == 0 else ()
            self._schedule.step(*given, target=y if self.rank == self.size - 1 else None, return_outputs=False)
            self._move()


class LocalLosses(Arm):
    """AdamW on a loss of each stage: the net's for the last, the loss of a small head of their own for the others.

    Activations pass up, and nothing passes down: a stage does not wait for those above it (but to stay at most two
    batches ahead). The numbers are those of one process that trains the stages in turns on each batch.
    Source: Belilovsky, Eickenberg and Oyallon (2020), "Decoupled greedy learning of CNNs".
    """

    def __init__(self, shape: Shape, rank: int, size: int, stage: Stage) -> None:
        model, self._head = nn.Module(), nn.Sequential()
        model.add_module("stage", stage)
        if rank + 1 < size:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rank)
                self._head = _drawn(_local_head(shape))
            model.add_module(f"local{rank}", self._head)  # names differ between ranks, as checkpoints need
        super().__init__(shape, rank, size, stage, model)

    def run(self, batches: Sequence[Batch]) -> None:
        """A step for each batch; the first batch's activations fill the pipeline, once."""
        sent: deque[tuple[dist.Work | None, Tensor]] = deque()
        due = self._receive(batches[0][0])
        for n, (x, y) in enumerate(batches):
            h = x
            if due is not None:
                work, h = due
                work.wait()
                due = self._receive(x) if n + 1 < len(batches) else None
            out = self.stage(h)
            if self.rank + 1 < self.size:
                above = out.detach()
                sent.append((dist.isend(above, self.rank + 1, tag=_TRAINING), above))
            cross_entropy(self._head(out), y).backward()
            self._move()
            while len(sent) > _AHEAD:
                _wait(sent)
        while sent:
            _wait(sent)

    def _receive(self, x: Tensor) -> tuple[dist.Work, Tensor] | None:
        """What the stage below will send of a batch, and the place that it comes to; None for the first stage."""
        if self.rank == 0:
            return None
        place = torch.empty(*x.shape, self.shape.width, dtype=_type(self.stage))
        work = dist.irecv(place, self.rank - 1, tag=_TRAINING)
        assert work is not None
        return work, place


ARMS: dict[str, type[LocalLosses] | type[OneForwardOneBackward]] = {
    "1F1B": OneForwardOneBackward, "local losses": LocalLosses
}  # fmt: skip


def _wait(sent: deque[tuple[dist.Work | None, Tensor]]) -> None:
    work, _ = sent.popleft()
    if work is not None:
        work.wait()


def _head(shape: Shape) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.symbols))


def _local_head(shape: Shape) -> nn.Sequential:
    """Linear, or behind a hidden layer whose output is added to its input."""
    return nn.Sequential(*([Hidden(shape)] if shape.hidden else []), *_head(shape))


def _drawn(part: Part) -> Part:
    for p in part.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, 0.0, 0.02)
    return part


def _type(stage: nn.Module) -> torch.dtype:
    return next(stage.parameters()).dtype
