"""Results that memory has no room for are refused by name, with their size, before they are allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layerwise as lw
from layerwise import tensors
from layerwise.errors import Undefined
from layerwise.observation import guards

N, HEAD = 5, 40


@pytest.fixture(autouse=True)
def small_results_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nets of these tests are smaller than what an observation grants unread."""
    monkeypatch.setattr(guards, "_UNREAD", 0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, HEAD)).double()


def loss_of(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return F.cross_entropy(model(torch.randint(9, (N,))), torch.randint(HEAD, (N,)))


def observe(model: nn.Module, quantity: Any, **options: Any) -> Any:
    with lw.observe(model, quantity, **options) as seen:
        loss_of(model).backward()
    return seen[quantity]


def held(result: Any) -> int:
    """The numbers of a result."""
    if isinstance(result, lw.Kronecker):
        return sum(t.numel() for name, ts in result.factors.items() for t in ts)
    return sum(t.numel() for t in result.values())


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


OF_HEAD: list[tuple[Callable[[], Any], int]] = [  # what each holds of the head's weight [40,7]
    (lambda: lw.PerSampleGrad(), N * HEAD * 7),
    (lambda: lw.KFAC(1, _drawn()), HEAD**2 + 7**2),
    (lambda: lw.KFLR(), HEAD**2 + 7**2),
    (lambda: lw.Sketch(300, _drawn()), N * 300),
    (lambda: lw.DiagGGN(per_sample=True), N * HEAD * 7),
    (lambda: lw.PairwiseDot(), N * N),
    (lambda: lw.Variance(), HEAD * 7),
    (lambda: lw.SqrtGGN(1), N * HEAD * 7),
]


@pytest.mark.parametrize(("make", "numbers"), OF_HEAD, ids=lambda case: repr(case()) if callable(case) else "")
def test_what_has_no_room_is_refused_with_its_size(
    make: Callable[[], Any], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    monkeypatch.setattr(guards, "free_memory", lambda device: 8 * numbers)
    whole = observe(model, make(), parameters="3.weight")
    assert held(whole) == numbers  # exactly what fits
    monkeypatch.setattr(guards, "free_memory", lambda device: 8 * numbers - 1)
    monkeypatch.setattr(type(make()), "compute", lambda *given: pytest.fail("was computed"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(Undefined, match=rf"{numbers} numbers of '3.weight' .*GB.*free on cpu.*parameters="):
        observe(model, make(), parameters="3.weight")
    assert all(bool((p.grad == 1).all()) for p in model.parameters())  # nothing was changed


def test_a_factor_of_a_look_up_is_a_diagonal() -> None:
    numbers: list[tuple[str, int]] = []

    class Told(lw.KFLR):
        def numbers(self, gradient: Any) -> int:
            numbers.append((gradient.name, super().numbers(gradient)))
            return numbers[-1][1]

    result = observe(net(), Told())
    factors = result.factors
    assert dict(numbers) == {name: sum(t.numel() for t in ts) + (len(ts) == 1) for name, ts in factors.items()}
    assert dict(numbers)["0.weight"] == 9 + 6**2


def test_others_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "free_memory", lambda device: 8 * HEAD**2)
    model = net()
    with pytest.raises(Undefined, match=r"KFAC\(draws=1\).*'3.weight'.*DiagGGN"):
        observe(model, lw.KFAC())
    assert set(observe(model, lw.KFAC(), parameters=["0", "1"]).factors) == {"0.weight", "1.weight", "1.bias"}
    assert set(lw.optim.KFAC(model, largest_factor=HEAD - 1).describe()) == {n for n, _ in model.named_parameters()}


def test_free_memory_is_read_again_when_as_much_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[torch.device] = []

    def free(device: torch.device) -> int:
        readings.append(device)
        return 2**40

    monkeypatch.setattr(guards, "free_memory", free)
    observe(net(), lw.PerSampleGrad())
    assert len(readings) == 1  # of small results, once a pass
    monkeypatch.setattr(guards, "_GRANTED", 0)
    observe(net(), lw.PerSampleGrad())
    assert len(readings) == 1 + 5  # each of the parameters
    monkeypatch.setattr(guards, "_UNREAD", 8 * N * sum(p.numel() for p in net().parameters()))
    observe(net(), lw.PerSampleGrad())
    assert len(readings) == 1 + 5  # as much is granted unread


def test_an_unknown_device_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "free_memory", lambda device: None)
    assert len(observe(net(), lw.PerSampleGrad())) == 5


# -- what is free -----------------------------------------------------------------------------------------------------


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


CPU = torch.device("cpu")
MEMINFO = {"meminfo": "MemTotal: 900 kB\nMemAvailable:   500 kB\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/\n", {}, 500 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "9000", "a/b/memory.current": "7000"}, 2000),
        ("0::/a/b\n", {"a/memory.max": "9000", "a/memory.current": "7000", "a/b/memory.max": "max"}, 2000),
        ("0::/\n", {"memory.max": "9000", "memory.current": "7000", "memory.stat": "inactive_file 500\n"}, 2500),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "9000", "memory/x/memory.usage_in_bytes": "8000",
                                 "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 77\n"}, 1077),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": str(2**63 - 4096),
                           "memory/x/memory.usage_in_bytes": "8000"}, 500 * 1024),
        ("0::/\n", {"memory.max": "10", "memory.current": "70"}, 0),
    ],
)  # fmt: skip
def test_free_memory_is_the_least_of_the_system_and_the_cgroups(
    cgroup: str, files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_PROC", written(tmp_path / "proc", {**MEMINFO, "self/cgroup": cgroup}))
    monkeypatch.setattr(tensors, "_CGROUPS", written(tmp_path / "groups", files))
    assert tensors.free_memory(CPU) == free


def test_free_memory_is_unknown_where_nothing_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_PROC", tmp_path)
    assert tensors.free_memory(CPU) is None
    assert tensors.free_memory(torch.device("meta")) is None


def test_free_memory_of_this_machine() -> None:
    free = tensors.free_memory(CPU)
    total = tensors._field(Path("/proc/meminfo"), "MemTotal:")
    assert free is None if total is None else 0 < free <= 1024 * total  # type: ignore[operator]
