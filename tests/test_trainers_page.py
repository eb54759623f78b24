"""Each snippet of the page "In your trainer", run with the library that it names: its steps are those of a closure.

Slow; the libraries are those of requirements/ecosystem.txt, and a test without its library is skipped.
"""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")
LIBRARIES = {
    "Transformers": "transformers accelerate", "Accelerate": "accelerate", "PEFT": "peft transformers",
    "Lightning": "lightning", "skorch": "skorch",
}  # fmt: skip
WITH_GROUP = {"DistributedDataParallel", "FSDP2", "torch.distributed.checkpoint"}

Make = Callable[[nn.Module], Any]


def sections() -> dict[str, list[str]]:
    """The blocks of code of the page, by heading; the setup's under ""."""
    pieces = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    texts = dict(zip(["", *pieces[1::2]], pieces[::2], strict=True))
    return {name: re.findall(r"^```py\n(.*?)^```$", t, flags=re.DOTALL | re.MULTILINE) for name, t in texts.items()}


SECTIONS = sections()


def prepared() -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile(SECTIONS[""][0], "docs/trainers.md", "exec"), space)
    return space


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_closure(make: Make, parts: int = 1, backward: bool = False, batches: int = 1) -> dict[str, Tensor]:
    """The parameters after `step(closure)` on the page's batches.

    parts: of a batch, each with a backward pass of its own. batches: of one step.
    """
    space = prepared()
    model, loader = space["model"], space["loader"]
    opt = make(model)
    for start in range(0, len(loader), batches):
        pieces = [piece for x, y in loader[start : start + batches]
                  for piece in zip(x.chunk(parts), y.chunk(parts), strict=True)]  # fmt: skip

        def closure(pieces: list[Any] = pieces) -> Tensor:
            if len(pieces) == 1 and not backward:
                return F.cross_entropy(model(pieces[0][0]), pieces[0][1])
            opt.zero_grad()
            losses = [F.cross_entropy(model(x), y) / len(pieces) for x, y in pieces]
            for loss in losses:
                loss.backward()
            return sum(loss.detach() for loss in losses)

        opt.step(closure)
    return parameters(model)


def by_autograd(make: Make) -> dict[str, Tensor]:
    """The parameters after plain steps of one of torch's optimizers."""
    space = prepared()
    model, opt = space["model"], make(space["model"])
    for x, y in space["loader"]:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return parameters(model)


def preconditioned() -> dict[str, Tensor]:
    """The parameters after LocoProp's steps, then those of SGD behind a preconditioner."""
    space = prepared()
    model = space["model"]
    opt: Any = lw.LocoProp(model)
    for x, y in space["loader"]:
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    opt, pre = torch.optim.SGD(model.parameters(), lr=0.1), lw.optim.Preconditioner(model)
    for x, y in space["loader"]:
        opt.zero_grad()
        with pre.watch():
            F.cross_entropy(model(x), y).backward()
        pre.step()
        opt.step()
    return parameters(model)


def accumulated() -> dict[str, Tensor]:
    """The parameters after K-FAC's steps on whole batches, then AltMin's."""
    space = prepared()
    model = space["model"]
    for opt in (lw.optim.KFAC(model, kind="kflr"), lw.AltMin(model, rows="all")):
        for x, y in space["loader"]:
            opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return parameters(model)


def kfac(model: nn.Module) -> Any:
    return lw.optim.KFAC(model)


def with_rates(model: nn.Module) -> Any:
    """Steps with the rates of the page's schedule."""
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]  # type: ignore[index]
    opt = lw.optim.KFAC(model, groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=[0.1, 0.03], total_steps=4, cycle_momentum=False)
    opt.register_step_post_hook(lambda *_: schedule.step() if schedule.last_epoch < 3 else None)
    return opt


REFERENCES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "Plain loop": lambda: by_closure(kfac),
    "Gradient scaler": preconditioned,
    "Accumulation": accumulated,
    "DistributedDataParallel": lambda: by_closure(kfac),
    "FSDP2": lambda: by_autograd(lambda model: torch.optim.SGD(model.parameters(), lr=0.1)),
    "Transformers": lambda: by_closure(kfac),
    "Accelerate": lambda: by_closure(lambda model: lw.optim.KFAC(model, kind="kflr"), batches=2),
    "Lightning": lambda: by_closure(kfac, batches=2),
    "skorch": lambda: by_closure(kfac),
    "torch.compile": lambda: by_closure(lambda model: lw.optim.KFAC(model, update_factors_every=2)),
    "Gradient checkpointing": lambda: by_closure(lambda model: lw.LocoProp(model)),
    "EMA and SWA": lambda: by_closure(kfac),
    "Schedulers and parameter groups": lambda: by_closure(with_rates),
    "torch.distributed.checkpoint": lambda: by_closure(kfac),
}


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def skip_without(section: str) -> None:
    for library in LIBRARIES.get(section, "").split():
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed (requirements/ecosystem.txt)")


def run(section: str, folder: Path, space: dict[str, Any] | None = None) -> dict[str, Any]:
    space = prepared() if space is None else space
    space["output_dir"] = str(folder)
    for block in SECTIONS[section]:
        exec(compile(block, f"docs/trainers.md, {section}", "exec"), space)
    assert not torch.overrides._get_current_function_mode_stack()
    return space


def forget_accelerators() -> None:
    """Accelerate's settings are the process's, and Trainer may have left its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("section", REFERENCES)
def test_a_snippet_takes_the_steps_of_a_closure(
    section: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(section)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if section == "Accelerate":
        forget_accelerators()
    if section in WITH_GROUP:
        request.getfixturevalue("group")
    space = run(section, tmp_path)
    found = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in parameters(space["model"]).items()}
    wanted, before = REFERENCES[section](), parameters(prepared()["model"])
    for name, p in wanted.items():
        torch.testing.assert_close(found[name].to(p), p, rtol=1e-12, atol=1e-13)
        assert not torch.equal(p, before[name])


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("make", [lw.optim.KFAC, lw.LocoProp, lw.AltMin], ids=["KFAC", "LocoProp", "AltMin"])
def test_accelerates_wrapper_takes_a_closures_step_and_returns_none(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("Accelerate")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    forget_accelerators()
    from accelerate import Accelerator

    wanted = by_closure(make)
    space = prepared()
    model, wrapped = Accelerator(cpu=True).prepare(space["model"], make(space["model"]))
    for x, y in space["loader"]:
        losses: list[Tensor] = []

        def closure(x: Tensor = x, y: Tensor = y, losses: list[Tensor] = losses) -> Tensor:
            losses.append(F.cross_entropy(model(x), y))
            return losses[-1]

        assert wrapped.step(closure) is None
        assert len(losses) == 1 and losses[0].isfinite()  # the loss is to be had in the closure
    for name, p in parameters(space["model"]).items():
        torch.testing.assert_close(p, wanted[name], rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("default")
def test_adapters_are_trained_and_frozen_weights_stay(tmp_path: Path) -> None:
    skip_without("PEFT")
    space = prepared()
    before = parameters(space["model"])
    space = run("PEFT", tmp_path, space)
    trained = dict(space["adapted"].named_parameters())
    for name, p in before.items():
        (found,) = [q for n, q in trained.items() if n.replace(".base_layer", "").endswith(f"model.{name}")]
        assert torch.equal(found, p) and not found.requires_grad
    moved = [n for n, p in trained.items() if "lora_B" in n and bool((p != 0).any())]
    assert len(moved) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("default")
def test_the_callback_serves_pytorch_lightning(tmp_path: Path) -> None:
    skip_without("Lightning")
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed (requirements/ecosystem.txt)")
    space = prepared()
    space["output_dir"] = str(tmp_path)
    (block,) = SECTIONS["Lightning"]
    exec(block.replace("import lightning\n", "import pytorch_lightning as lightning\n"), space)
    wanted = REFERENCES["Lightning"]()
    for name, p in parameters(space["model"]).items():
        torch.testing.assert_close(p, wanted[name], rtol=1e-12, atol=1e-13)


def test_every_section_has_a_test() -> None:
    assert set(SECTIONS) == {"", "PEFT", *REFERENCES}
    assert all(SECTIONS.values())
