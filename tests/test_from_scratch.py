"""The methods written out in one file each, `examples/*_from_scratch.py`, are what the library computes."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*_from_scratch.py"))
MOST_LINES = 60
WIDTHS = (6, 5, 4, 3)

seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def scratch(method: str) -> ModuleType:
    """A script's functions."""
    spec = importlib.util.spec_from_file_location(method, FOLDER / f"{method}_from_scratch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def net(seed: int) -> nn.Sequential:
    """Three layers with biases, tanh between them, float64."""
    torch.manual_seed(seed)
    pieces = [piece for i, o in pairwise(WIDTHS) for piece in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*pieces[:-1]).double()


def batch(seed: int, n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTHS[0], dtype=torch.float64, generator=generator)
    return x, torch.randint(WIDTHS[-1], (n,), generator=generator)


def joined(values: dict[str, Tensor]) -> list[Tensor]:
    """The model's tensors by name as the scripts have them: of each layer `[..., O, I+1]`, the bias last."""
    return [torch.cat((values[f"{n}.weight"], values[f"{n}.bias"].unsqueeze(-1)), -1) for n in (0, 2, 4)]


def weights_of(model: nn.Module) -> list[Tensor]:
    return joined({name: p.detach() for name, p in model.named_parameters()})


def assert_same(found: list[Tensor], wanted: list[Tensor], rtol: float = 1e-12) -> None:
    """Within 1e-12 of each tensor's greatest number."""
    assert len(found) == len(wanted) > 0
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == w.dtype == torch.float64 and float(w.abs().max()) > 0
        torch.testing.assert_close(f, w, rtol=0, atol=rtol * float(w.abs().max()))


def assert_moved(start: list[Tensor], end: list[Tensor]) -> None:
    """Every layer has moved by far more than `assert_same` lets through."""
    assert all(float((b - a).abs().max()) > 1e-5 * float(a.abs().max()) for a, b in zip(start, end, strict=True))


# Every file ----------------------------------------------------------------------------------------------------------


def test_there_is_one_file_for_each_method() -> None:
    assert SCRIPTS == ["altmin_from_scratch", "locoprop_from_scratch"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_is_short_and_reads_torch_alone(script: str) -> None:
    text = (FOLDER / f"{script}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            imported.add(node.module.split(".")[0])
    assert "torch" in imported and imported - {"torch"} <= sys.stdlib_module_names


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_runs(script: str, tmp_path: Path) -> None:
    path = FOLDER / f"{script}.py"
    ran = subprocess.run([sys.executable, "-I", path], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) >= 3 and "nan" not in ran.stdout and not ran.stderr


# The methods ---------------------------------------------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("kind", ["M", "S"])
def test_locoprop(seed: int, kind: str) -> None:
    file, model = scratch("locoprop"), net(seed)
    preset: Any = f"published-{kind}"
    opt = lw.LocoProp(model, preset=preset)
    start = weights_of(model)
    layers = [(w, torch.ones_like(w), torch.zeros_like(w)) for w in start]
    fs = [torch.tanh, torch.tanh, lambda z: z.softmax(1)] if kind == "M" else [lambda z: z] * 3
    for n in range(5):
        x, y = batch(10 * seed + n)
        wanted = opt.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
        layers, loss = file.step(layers, fs, x, y)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert_moved(start, weights_of(model))
    assert_same([w for w, _, _ in layers], weights_of(model))


@seeds
def test_altmin(seed: int) -> None:
    file, model = scratch("altmin"), net(seed)
    opt = lw.AltMin(model, preset="published")
    start = weights_of(model)
    weights = [w.clone().requires_grad_() for w in start]
    optimizer = torch.optim.Adam(weights, lr=8e-3)
    for n in range(5):
        x, y = batch(10 * seed + n)
        wanted = opt.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
        loss = file.step(weights, optimizer, x, y)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert_moved(start, weights_of(model))
    assert_same([w.detach() for w in weights], weights_of(model))
