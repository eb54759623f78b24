"""The pictures of LocoProp: what their figures are computed from, against definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import layerwise as lw
from benchmarks.autoencoder import deep_autoencoder, reconstruction_loss
from benchmarks.papers import alignment, matching_losses
from benchmarks.speed import step_cost
from layerwise import local
from layerwise.local.layers.record import problem_of, record


def test_losses_of_the_picture_are_integrals() -> None:
    """`∫_b^a (f(s) − f(b)) ds`: zero on the diagonal, and for ReLU wherever both are negative."""
    for transfer, f in ((local.TANH, torch.tanh), (local.RELU, torch.relu), (local.IDENTITY, lambda s: s)):
        assert transfer in matching_losses.PANELS.values()
        grid, loss = matching_losses.surface(transfer, 9)
        for target, row in zip(grid, loss, strict=True):
            for prediction, value in zip(grid, row, strict=True):
                s = torch.linspace(float(target), float(prediction), 20_001, dtype=torch.float64)
                want = torch.trapezoid(f(s) - f(target), s)
                assert abs(value - want) < 1e-7
    both = grid < 0
    assert bool((matching_losses.surface(local.RELU, 9)[1][both][:, both] == 0).all())


def test_the_picture_of_losses_is_written(tmp_path: Path) -> None:
    assert matching_losses.main(["--out", str(tmp_path / "losses.png")]) == 0
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_shifted_solve_against_a_direct_one() -> None:
    m = torch.randn(30, 12, dtype=torch.float64)
    m = m @ m.T  # singular
    b = torch.randn(30, dtype=torch.float64)
    shifts = [1e-2, 1.0, 1e6]
    found = alignment.shifted_solve(m.__matmul__, b, shifts, tol=1e-12)
    for x, shift in zip(found, shifts, strict=True):
        want = torch.linalg.solve(m + shift * torch.eye(30, dtype=torch.float64), b)
        assert (x - want).norm() < 1e-9 * want.norm()
    with pytest.raises(ArithmeticError, match="after 2 products"):
        alignment.shifted_solve(m.__matmul__, b, shifts, tol=1e-12, most=2)


def test_references_of_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input factor's step is the exact solve of the squared problem; the GGN's solves the dense system."""
    monkeypatch.setattr(alignment, "FACTORS", (1e-1, 1e5))
    model, x = deep_autoencoder(0, (6, 5, 3, 5, 6)).double(), torch.rand(40, 6, dtype=torch.float64)
    found = alignment.references(model, x)
    recorded = record(model, lambda: reconstruction_loss(model, x))
    for layer in recorded.layers:
        problem = problem_of(recorded, layer, 1.0, local.IDENTITY)
        a = torch.cat((problem.a[:, 0], torch.ones(40, 1, dtype=torch.float64)), 1)
        eta = 1 / (0.1 * float(a.square().sum()) / a.shape[1])
        dw, db = local.ProximalSolve(eta)(problem)
        assert db is not None
        want = torch.cat((dw[0], db[0, :, None]), 1)
        got = found["input factor", 1e-1][layer.name] / 40  # A is a mean
        assert (got - want).norm() < 1e-9 * want.norm()
        for reference in ("input factor", "K-FAC", "GGN"):  # much damping leaves the gradient
            near = F.cosine_similarity(found[reference, 1e5][layer.name].flatten(),
                                       found["gradient", 0.0][layer.name].flatten(), 0)  # fmt: skip
            assert near > 1 - 1e-6
    ggn = lw.GGN(model, lambda: reconstruction_loss(model, x))
    dense = ggn.to_dense()
    model.zero_grad()
    reconstruction_loss(model, x).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    damped = dense + 0.1 * alignment.mean_eigenvalue(ggn) * torch.eye(len(g), dtype=torch.float64)
    step = torch.linalg.solve(damped, -g)
    first = found["GGN", 1e-1]["0.weight"]
    want = torch.cat((step[:30].view(5, 6), step[30:35, None]), 1)
    assert (first - want).norm() < 1e-3 * want.norm()  # of conjugate gradient stopped at a residual of 1e-5


def test_changes_of_the_alignment_start_along_the_gradient() -> None:
    """One gradient step is −G exactly, in both forms; the model stays as it is."""
    model, x = deep_autoencoder(0, (6, 5, 3, 5, 6)).double(), torch.rand(40, 6, dtype=torch.float64)
    before = [p.clone() for p in model.parameters()]
    gradient = alignment.references(model, x)["gradient", 0.0]
    seen = 0
    for solver, steps, change in alignment.local_changes(model, x):
        if steps == 1 and "gradient" in solver:
            seen += 1
            for name, step in gradient.items():
                assert F.cosine_similarity(change[name].flatten(), step.flatten(), 0) > 1 - 1e-12
    assert seen == 2 and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_alignment_writes_curves_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "SIZES", (6, 5, 3, 5, 6))
    monkeypatch.setattr(alignment, "images", lambda count: torch.rand(200, 6, dtype=torch.float64))
    out = tmp_path / "alignment.json"
    assert alignment.main(["--seeds", "0", "1", "--batch", "30", "--train-steps", "3", "--out", str(out)]) == 0
    body = json.loads(out.read_text(encoding="utf-8"))
    curves = body["states"]["after 3 steps of Adam"]
    assert len(curves) == 4 * len(alignment.REFERENCES) and out.with_suffix(".png").is_file()
    for curve in curves:
        assert len(curve["mean"]) == len(alignment.STEPS) and len(curve["mean"][0]) == 4
        for t, row in enumerate(curve["mean"]):  # the best of the factors at this T
            assert abs(sum(row) / 4 - max(by[t] for by in curve["by factor"].values())) < 1e-3


def test_the_report_of_step_costs_takes_the_faster_rmsprop() -> None:
    seconds = {"RMSProp": 0.3, "RMSProp (foreach)": 0.2, "LocoProp-M": 0.5}
    said = step_cost.report("mnist", seconds, {"RMSProp": 90.0, "RMSProp (foreach)": 100.0, "LocoProp-M": 120.0})
    assert "| LocoProp-M | 500.0 | 120 | 2.50 | 1.20 |" in said and "time / RMSProp (foreach)" in said


def test_a_mean_step_is_that_of_its_kinds_of_steps() -> None:
    parts = {"KFAC, no factors due": 1.0, "KFAC, new factors": 2.0, "KFAC, new factors and inverses": 5.0}
    steps = [5.0 if n % 100 == 0 else 2.0 if n % 10 == 0 else 1.0 for n in range(100)]
    (mean,) = step_cost.amortised(parts).values()
    assert mean == pytest.approx(sum(steps) / 100) and not step_cost.amortised({"Adam": 1.0})
    whitened = {"LocoProp-M, whitened, no mean due": 1.0, "LocoProp-M, whitened": 2.0}
    steps = [2.0 if n % 10 == 0 else 1.0 for n in range(10)]
    assert step_cost.amortised(parts | whitened) == pytest.approx(
        {"KFAC, every 10 and 100": mean, "LocoProp-M, whitened every 10": sum(steps) / 10}
    )
    said = step_cost.report("mnist", {"RMSProp": 1.0, **parts}, dict.fromkeys(["RMSProp", *parts], 10.0))
    assert "| KFAC, every 10 and 100 | 1130.0 | - | 1.13 | - |" in said
