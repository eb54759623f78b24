"""Peak memory of EKFAC of GPT-2's weight matrices, without the vocabulary, beside that of a plain step.

    python -m benchmarks.speed.overhead.ekfac_memory [--blocks 1 2 4 12] [--width 768] [--tokens 50257]

Of each number of blocks: the peaks above idle of a forward and a backward pass and of EKFAC fitted to one batch of two
sequences of 128 tokens, each in a process of its own, and what the difference is in sizes of the model. "held": the
bytes of the result, the eigenvectors of both factors of each matrix and its second moments. Linux only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import layerwise as lw
from benchmarks import probe
from benchmarks.device import GPT2

from .memory import peak

_LIMIT = 3000  # seconds of one process


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def _program(what: str, width: int, blocks: int, tokens: int, small: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    model = GPT2(24, 1, 12, 50) if small else GPT2(width, blocks, 12, tokens)
    x, y = torch.randint(50 if small else tokens, (2, 2, 128)).unbind()

    def plain() -> None:
        model.zero_grad()
        _loss(model(x), y).backward()

    def ekfac() -> object:
        model.zero_grad()
        return lw.accumulate(model, _loss, [(x, y)], lw.EKFAC(), parameters=_matrices(model)).ekfac

    return {"plain": plain, "ekfac": ekfac}[what]


def _matrices(model: GPT2) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks")]


def main(argv: list[str] | None = None) -> None:
    """Print a row for each number of blocks."""
    made = probe.parser(
        "benchmarks.speed.overhead.ekfac_memory", __doc__ or "", blocks=[1, 2, 4], width=768, tokens=50257
    )
    asked = probe.parsed(made, argv)
    print(probe.table(["blocks", "model", "plain step", "EKFAC", "difference, in models", "held, in models"], []))
    for blocks in asked.blocks:
        model = GPT2(asked.width, blocks, 12, asked.tokens)
        size = sum(p.numel() for p in model.parameters()) * 4
        shapes = [p.shape for name, p in model.named_parameters() if name in _matrices(model)]
        held = sum(4 * (o * o + i * i + o * i) for o, i in shapes)
        del model
        plain, fit = (
            peak(partial(_program, what, asked.width, blocks, asked.tokens), 1, _LIMIT) for what in ("plain", "ekfac")
        )
        if plain is None or fit is None:
            print(f"| {blocks} | failed |", flush=True)
            continue
        cells = [f"{1e-9 * bytes:.2f} GB" for bytes in (size, plain, fit)]
        print(f"| {blocks} | {' | '.join(cells)} | {(fit - plain) / size:.2f} | {held / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
