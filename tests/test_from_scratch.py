"""The methods written out in one file each, `examples/*_from_scratch.py`, are what the library computes."""

from __future__ import annotations

import ast
import importlib.util
import os
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
from book import execute, inserts
from layerwise.replay.state import seed_of

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
    methods = "altmin ggn_diagonal kfac locoprop per_sample".split()
    assert [script.removesuffix("_from_scratch") for script in SCRIPTS] == methods


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


@pytest.mark.thinned(3)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_runs(script: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the tensors are small, and threads would wait for each other
    ran = subprocess.run(
        [sys.executable, "-I", FOLDER / f"{script}.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=250,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) >= 3 and "nan" not in ran.stdout and not ran.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_shows_a_file_whole_and_does_not_run_it(script: str) -> None:
    path = f"examples/{script}.py"
    shown = inserts.filled(f"# A page\n\n<!-- book: listing {path} -->\n\nText.\n", "page.md")
    text = (FOLDER / f"{script}.py").read_text(encoding="utf-8")
    assert shown == f'# A page\n\n```{{ .python title="{path}" }}\n{text}```\n\nText.\n'
    assert execute.with_outputs(shown, "page.md") == shown


@pytest.mark.parametrize("path", ["examples/nothing.py", "README.md", "../outside.py", ""])
def test_a_listing_is_of_a_python_file_of_the_repository(path: str) -> None:
    with pytest.raises(inserts.Unknown, match="listing of"):
        inserts.filled(f"<!-- book: listing{' ' * bool(path)}{path} -->", "page.md")


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


@seeds
@pytest.mark.parametrize("kfac_seed", [0, 7])
def test_kfac(seed: int, kfac_seed: int) -> None:
    """The library draws its labels by a generator for each step, which is given to the file here."""
    file, model = scratch("kfac"), net(seed)
    opt = lw.optim.KFAC(
        model, lr=0.1, momentum=0.0, kl_clip=None, update_factors_every=1, update_inverses_every=1, seed=kfac_seed
    )
    start = weights_of(model)
    layers = [(w, w.new_zeros(w.shape[1], w.shape[1]), w.new_zeros(len(w), len(w))) for w in start]
    for t in range(1, 6):
        x, y = batch(10 * seed + t)
        generator = torch.Generator().manual_seed(seed_of(kfac_seed, t - 1))
        wanted = opt.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
        layers, loss = file.step(layers, x, y, t, generator)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert opt.counters == {"raised": 0, "kept": 0, "identity": 0}
    assert_moved(start, weights_of(model))
    assert_same([w for w, _, _ in layers], weights_of(model))


@seeds
def test_per_sample_gradients(seed: int) -> None:
    file, model = scratch("per_sample"), net(seed)
    x, y = batch(seed)
    with lw.observe(model, lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance()) as seen:
        F.cross_entropy(model(x), y).backward()
    layers = file.step(weights_of(model), x, y)
    assert_same([file.per_sample(a, g) for a, g in layers], joined(seen.per_sample_grad))
    assert_same([file.second_moment(a, g) for a, g in layers], joined(seen.second_moment))
    assert_same([file.variance(a, g) for a, g in layers], joined(seen.variance))
    norms = [seen.squared_norm[f"{n}.weight"] + seen.squared_norm[f"{n}.bias"] for n in (0, 2, 4)]
    assert_same([file.squared_norm(a, g) for a, g in layers], norms)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same([file.per_sample(a, g).sum(0) for a, g in layers], joined(gradients))


@seeds
def test_ggn_diagonal(seed: int) -> None:
    file, model = scratch("ggn_diagonal"), net(seed)
    x, y = batch(seed)
    weights = weights_of(model)
    inputs, outputs = file.forward(weights, x)
    for quantity, columns in (
        (lw.DiagGGN(), file.root(outputs[-1])),
        (
            lw.DiagGGN(draws=1, generator=torch.Generator().manual_seed(seed)),
            file.drawn(outputs[-1], torch.Generator().manual_seed(seed)),
        ),
    ):
        with lw.observe(model, quantity) as seen:
            F.cross_entropy(model(x), y).backward()
        assert_same(file.diagonal(weights, inputs, columns), joined(seen.diag_ggn))
