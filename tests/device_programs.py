"""Whole programs on the pretend device, as newcomers write them: the numbers of the CPU.

Run by `test_devices.py` beside `device_checks.py`, in a process of its own.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device_compare import assert_same
from pretend_device import DEVICE
from torch import Tensor, nn

import layerwise as lw

torch.__future__.set_swap_module_params_on_conversion(True)  # as other devices keep a moved parameter's identity

WORDS = torch.randint(1, 12, (4, 4, 7), generator=torch.Generator().manual_seed(0))  # batches, samples, tokens


class LanguageModel(nn.Module):
    """One causal block over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(12, 8), nn.Parameter(torch.randn(6, 8) / 4)
        self.mix, self.norm, self.up, self.down = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places
        q, k, v = self.mix(self.norm(h)).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h + self.down(F.gelu(self.up(h))))

    def loss(self, words: Tensor) -> Tensor:
        words = words.to(self.places.device)
        return F.cross_entropy(self(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


class Scaler:
    """A gradient scaler, as torch's own on devices that it knows: a factor, divided out before the step."""

    factor = 2.0**10

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, before: Any) -> None:
        for p in model.parameters():
            p.grad.div_(self.factor)
        before.step()
        optimizer.step()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=["float64", "float16", "bfloat16"])
def test_a_language_model_under_autocast_with_a_scaler(dtype: torch.dtype | None) -> None:
    """K-FAC's preconditioner watches. Under autocast, which casts other calls on the CPU, to half a unit."""
    states = []
    for device in ("cpu", DEVICE):
        model = LanguageModel().to(device)
        model = model.double() if dtype is None else model
        preconditioner = lw.optim.Preconditioner(model)
        sgd, scaler = torch.optim.SGD(model.parameters(), 0.1), Scaler()
        torch.manual_seed(1)  # the labels that K-FAC draws
        for words in WORDS:
            sgd.zero_grad()
            with preconditioner.watch():
                with torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = model.loss(words)
                (loss * scaler.factor).backward()
            scaler.step(model, sgd, preconditioner)
        states.append(model.state_dict())
    assert_same(*states, DEVICE, rel=1e-12 if dtype is None else 0.5 * torch.finfo(dtype).eps)


def test_monitor_and_observe_with_checkpoints_across_devices() -> None:
    """Two steps on one device, saved, and two on the other: as four on the CPU."""
    found = []
    for places in (("cpu", "cpu"), ("cpu", DEVICE), (DEVICE, "cpu")):
        saved, history = io.BytesIO(), []  # type: ignore[var-annotated]
        for part, device in enumerate(places):
            model = LanguageModel().double().to(device)
            monitor = lw.monitor.Monitor(
                model, lambda step, record, into=history: into.append(record), every=1,
                measures=[lw.monitor.loss(), lw.monitor.gradient_norm(), lw.monitor.noise_scale()],
            )  # fmt: skip
            sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            if part:
                saved.seek(0)
                state = torch.load(saved, map_location="cpu")  # which `load_state_dict` moves
                model.load_state_dict(state["model"])
                sgd.load_state_dict(state["sgd"])
                monitor.load_state_dict(state["monitor"])
            for words in WORDS[2 * part : 2 * part + 2]:
                sgd.zero_grad()
                with monitor.step():
                    model.loss(words).backward()
                sgd.step()
            torch.save(
                {"model": model.state_dict(), "sgd": sgd.state_dict(), "monitor": monitor.state_dict()},
                saved := io.BytesIO(),
            )
        with lw.observe(model, lw.SquaredNorm(), lw.KFLR()) as seen:
            model.loss(WORDS[0]).backward()
        norms = {name: t.cpu() for name, t in seen.squared_norm.items()}
        found.append((history, norms, {name: p.detach().cpu() for name, p in model.named_parameters()}))
    for history, norms, weights in found[1:]:
        assert len(history) == 4
        for one, two in zip(history, found[0][0], strict=True):
            assert one == pytest.approx(two, rel=1e-10, nan_ok=True)
        assert_same({"n": found[0][1], "w": found[0][2]}, {"n": norms, "w": weights}, torch.device("cpu"))


def test_locoprop_of_a_model_that_is_moved_after_the_optimizer_was_made() -> None:
    """To the device after two steps, and back after two more: the state follows."""
    states = []
    for places in (("cpu",) * 3, ("cpu", DEVICE, "cpu"), (DEVICE, "cpu", DEVICE)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = lw.LocoProp(model)
        for place in places:
            model.to(place)
            for words in WORDS[:2]:
                x, y = words.double().to(place) / 12, (words[:, 0] % 3).to(place)
                optimizer.step(lambda x=x, y=y, model=model: F.cross_entropy(model(x), y))  # type: ignore[misc]
        assert not optimizer.skipped
        states.append({name: p.detach().cpu() for name, p in model.named_parameters()})
    for state in states[1:]:
        assert_same(states[0], state, torch.device("cpu"))
