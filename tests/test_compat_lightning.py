"""The Lightning callback: in a real Trainer where lightning is installed, and by its hooks everywhere."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from layerwise.errors import BadInput, LeftOut
from layerwise.monitor import History

INSTALLED = importlib.util.find_spec("lightning") is not None
NAME = "layerwise.compat.lightning"


class Trainer:
    """The hooks that `lightning.Trainer.fit` calls, in its order."""

    def __init__(self, callback: Any, loggers: tuple[Any, ...] = (), accumulate: int = 1) -> None:
        self.callback, self.loggers, self.accumulate, self.global_step = callback, list(loggers), accumulate, 0

    def fit(self, module: nn.Module, batches: list[tuple[Tensor, Tensor]], fail_at: int = -1) -> None:
        opt = torch.optim.SGD(module.parameters(), lr=0.1)
        self.callback.on_fit_start(self, module)
        try:
            for i, (x, y) in enumerate(batches):
                self.callback.on_train_batch_start(self, module, (x, y), i)
                if i == fail_at:
                    raise KeyError("training_step")
                (F.cross_entropy(module(x), y) / self.accumulate).backward()
                if (i + 1) % self.accumulate == 0:
                    opt.step()
                    opt.zero_grad()
                    self.global_step += 1
                self.callback.on_train_batch_end(self, module, None, (x, y), i)
        except KeyError as error:
            self.callback.on_exception(self, module, error)
            raise
        self.callback.on_fit_end(self, module)


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class, over a stand-in for lightning where that is not installed."""
    if not INSTALLED:
        stand_in = types.ModuleType("lightning")
        stand_in.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lightning", stand_in)
        monkeypatch.delitem(sys.modules, NAME, raising=False)
    import layerwise.compat

    yield importlib.import_module(NAME).MonitorCallback
    if not INSTALLED:
        monkeypatch.delitem(sys.modules, NAME, raising=False)
        monkeypatch.delattr(layerwise.compat, "lightning", raising=False)


def batches(count: int, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)) for _ in range(count)]


def loader(count: int) -> DataLoader[Any]:
    x, y = (torch.cat(part) for part in zip(*batches(count), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Logger:
    def __init__(self) -> None:
        self.said: list[tuple[int, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.said.append((step, metrics))


def test_every_kth_step_is_logged(callback: Any) -> None:
    made = callback(history := History(), every=2)
    Trainer(made).fit(model(), batches(5))
    assert [r["step"] for r in history.records] == [0, 2, 4] and made.monitor.steps == 5
    assert all(r["update_size"] > 0 and r["curvature/0.weight"] > 0 for r in history.records)
    assert not _get_current_function_mode_stack()


def test_loggers_get_the_numbers_alone(callback: Any) -> None:
    logger, second = Logger(), Logger()
    Trainer(callback(every=3), (logger, second)).fit(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), batches(4))
    assert [step for step, _ in logger.said] == [0, 3] and logger.said == second.said
    assert "step" not in logger.said[0][1] and all(isinstance(v, float) for v in logger.said[0][1].values())


@pytest.mark.filterwarnings("ignore::layerwise.errors.LeftOut")
def test_accumulated_batches_are_one_step(callback: Any) -> None:
    history = History()
    made = callback(history, every=2)
    Trainer(made, accumulate=2).fit(model(), batches(7))  # the last step is not finished
    assert [r["step"] for r in history.records] == [0, 2] and made.monitor.steps == 3
    first = model()
    two = batches(2)
    loss = sum(F.cross_entropy(first(x), y) / 2 for x, y in two)
    assert history.records[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert not _get_current_function_mode_stack()


def test_a_step_that_is_not_finished_is_forgotten(callback: Any) -> None:
    made = callback(history := History(), every=1)
    with pytest.warns(LeftOut, match="alignment"):
        Trainer(made, accumulate=2).fit(model(), batches(5))
    assert len(history) == 2 and made.monitor.steps == 2 and not _get_current_function_mode_stack()


def test_a_step_that_fails_is_forgotten(callback: Any) -> None:
    made = callback(history := History(), every=2)
    with pytest.raises(KeyError):
        Trainer(made).fit(model(), batches(4), fail_at=2)
    assert len(history) == 1 and not _get_current_function_mode_stack()


def test_the_count_of_steps_is_in_the_checkpoint(callback: Any) -> None:
    first = callback(History(), every=2)
    assert first.state_dict() == {}
    Trainer(first).fit(model(), batches(3))
    second = callback(history := History(), every=2)
    second.load_state_dict(first.state_dict())
    Trainer(second).fit(model(), batches(3))
    assert [r["step"] for r in history.records] == [4]


def test_a_trainer_without_logger_needs_a_log(callback: Any) -> None:
    with pytest.raises(BadInput, match="log="):
        Trainer(callback()).fit(model(), batches(1))


def test_without_lightning_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=r"layerwise\[lightning\]"):
        importlib.import_module(NAME)


@pytest.mark.skipif(not INSTALLED, reason="lightning is not installed")
@pytest.mark.filterwarnings("ignore")  # lightning's own
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_real_trainer(callback: Any, accumulate: int, tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def trained(callbacks: list[Any]) -> nn.Module:
        quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, callbacks=callbacks, accumulate_grad_batches=accumulate,
            default_root_dir=tmp_path, **quiet,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, loader(6), loader(1))
        if callbacks:
            trainer.save_checkpoint(tmp_path / "run.ckpt")
        return module.net

    made = callback(history := History(), every=2)
    watched, plain = trained([made]), trained([])
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
    steps = 12 // accumulate
    assert made.monitor.steps == steps and [r["step"] for r in history.records] == list(range(0, steps, 2))
    assert all(r["noise_scale"] > 0 and r["update_size/net.0.weight"] > 0 for r in history.records)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert next(iter(saved.values()))["steps"] == steps
