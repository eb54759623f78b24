"""The GPT in stages: both ways to train it against one process, what they send, and that a run resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from torch import Tensor, nn

from benchmarks.distributed import _gpt_stages as stages
from benchmarks.distributed import gpt
from benchmarks.distributed._gpt_stages import Shape, cross_entropy

SHAPE = Shape(width=8, heads=2, blocks=3, length=6, symbols=5, windows=4, rate=1e-2, warm_up=2, microbatches=4)
STEPS = 3


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(SHAPE.symbols, (count, SHAPE.windows, SHAPE.length + 1), generator=generator)
    return [(rows[:, :-1], rows[:, 1:]) for rows in text]


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=SHAPE.rate, betas=(0.9, 0.99), weight_decay=0.1)


def moved(opt: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    opt.zero_grad()
    loss.backward()
    opt.param_groups[0]["lr"] = SHAPE.rate * min(1.0, (step + 1) / SHAPE.warm_up)
    opt.step()


def in_stages(rank: int, name: str, size: int, shape: Shape) -> dict[str, Tensor]:
    torch.set_default_dtype(torch.float64)
    arm = stages.ARMS[name](shape, rank, size, stages.stage_of(shape, rank, size))
    arm.run(batches())
    return {k: v.detach() for k, v in arm.stage.named_parameters()}


def trained(name: str, size: int, shape: Shape = SHAPE) -> dict[str, Tensor]:
    return {k: v for part in ranks(size)(in_stages, name, size, shape) for k, v in part.items()}


@pytest.mark.usefixtures("float64")
def test_one_forward_one_backward_is_adamw_on_the_net() -> None:
    whole = stages.stage_of(SHAPE, 0, 1)
    opt = adamw(whole)
    for step, (x, y) in enumerate(batches()):
        moved(opt, cross_entropy(whole(x), y), step)
    found = trained("1F1B", 2)
    for key, value in whole.named_parameters():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("hidden", [0, 6])
def test_local_losses_have_the_bits_of_one_process_that_trains_the_stages_in_turns(hidden: int) -> None:
    size, shape = 2, replace(SHAPE, hidden=hidden)
    arms = [stages.LocalLosses(shape, rank, size, stages.stage_of(shape, rank, size)) for rank in range(size)]
    assert sum(p.numel() for p in arms[0].model.get_submodule("local0").parameters()) == 61 + bool(hidden) * 126
    opts = [adamw(arm.model) for arm in arms]
    for step, (x, y) in enumerate(batches()):
        h = x
        for arm, opt in zip(arms, opts, strict=True):
            out = arm.stage(h)
            head = arm.model.get_submodule(f"local{arm.rank}") if arm.rank + 1 < size else nn.Identity()
            moved(opt, cross_entropy(head(out), y), step)
            h = out.detach()
    found = trained("local losses", size, shape)
    whole = {k: v for arm in arms for k, v in arm.stage.named_parameters()}
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(found[key], value), key


def measured(rank: int, folder: str, repeats: int) -> dict[str, Any]:
    text = torch.randint(SHAPE.symbols, (300,), generator=torch.Generator().manual_seed(1))
    plan = gpt.Plan(replace(SHAPE, rate=3e-3), repeats, segment=2, held_out=8, folder=folder, json=None)
    return gpt.measured(rank, 2, plan, text[:200], text[200:])


def test_a_run_resumes_and_counts_what_is_sent(tmp_path: Path) -> None:
    once, *_ = ranks(2)(measured, str(tmp_path / "a"), 2)
    ranks(2)(measured, str(tmp_path / "b"), 1)
    again, *_ = ranks(2)(measured, str(tmp_path / "b"), 2)
    activations = SHAPE.windows * SHAPE.length * SHAPE.width * 4
    assert once["sent"] == {"1F1B": [activations, activations], "local losses": [activations, 0]}
    assert again["sent"] == once["sent"]
    for name, rows in once["rows"].items():
        assert [row["validation"] for row in rows] == [row["validation"] for row in again["rows"][name]]
        assert [row["steps"] for row in rows] == [0, 2, 4]
        assert rows[0]["validation"] == once["rows"]["1F1B"][0]["validation"]
        assert rows[-1]["validation"] != rows[0]["validation"]
    assert "local losses" in gpt.report({**once, "shape": vars(SHAPE)})
