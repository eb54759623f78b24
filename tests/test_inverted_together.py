"""Factors inverted as one batch, by Cholesky alone, which an accelerator waits for once: the inverses one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.operators.kronecker import EigenBlock, KroneckerBlock
from layerwise.operators.ridge import by_cholesky, inverse, ridge
from layerwise.optim.second_order.averages import Asked, fields_of, invert, invert_together
from layerwise.rows.layout import MatrixLayout


def spd(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape[:-1], shape[-1] + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


def block(groups: int, size_out: int, size_in: int, seed: int, diagonal: bool = False) -> KroneckerBlock:
    a = spd(groups, size_in, size_in, seed=seed)
    layout = MatrixLayout.whole(torch.Size((groups * size_out, size_in)), (groups, size_out, size_in))
    a = a.diagonal(dim1=-2, dim2=-1).clone() if diagonal else a
    return KroneckerBlock(a, spd(groups, size_out, size_out, seed=seed + 50), layout)


@pytest.mark.parametrize("form", ["pi", "factored", "input"])
def test_blocks_inverted_together_are_those_inverted_one_by_one(form: str) -> None:
    """Equal shapes of both sides and of different blocks, groups, a diagonal side, and different dampings."""
    blocks = {
        "square": block(1, 4, 4, 0), "other": block(1, 4, 3, 1), "grouped": block(2, 4, 3, 2),
        "looked up": block(1, 3, 5, 3, diagonal=True), "zero": KroneckerBlock(
            torch.zeros(1, 3, 3, dtype=torch.float64), spd(1, 4, 4), MatrixLayout.whole(torch.Size((4, 3)), (1, 4, 3))),
    }  # fmt: skip
    asked = {name: Asked(each, 0.01 * (n + 1), form) for n, (name, each) in enumerate(blocks.items())}
    found = invert_together(asked)
    assert found.keys() == blocks.keys()
    for name, each in asked.items():
        want = invert(name, *each)
        assert not found[name].raised and not want.raised
        mine, its = fields_of(found[name].block), fields_of(want.block)
        assert all(torch.allclose(mine[key], its[key], rtol=1e-12, atol=0.0) for key in ("A", "B"))
    dense, damped = blocks["square"], found["square"].block
    if form == "input":  # `I ⊗ (A + λI)⁻¹`
        eye = torch.eye(4, dtype=torch.float64)
        assert torch.allclose(damped.A @ (dense.A + 0.01 * eye), eye, atol=1e-11)
        return
    extra_a, extra_b = dense.dampings(0.01, balanced=form == "pi")
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(damped.A @ (dense.A + extra_a[:, None, None] * eye), eye, atol=1e-11)
    assert torch.allclose(damped.B @ (dense.B + extra_b[:, None, None] * eye), eye, atol=1e-11)


def test_blocks_that_fail_or_have_another_form_are_left() -> None:
    good, bad, wrong = block(1, 3, 3, 0), block(1, 3, 3, 1), block(1, 3, 3, 2)
    bad.A[0] -= 100 * torch.eye(3, dtype=torch.float64)
    wrong.B[0, 0, 0] = float("nan")
    eigen = good.eigh("good")
    assert isinstance(eigen, EigenBlock)
    asked = {
        "good": Asked(good, 0.1, "pi"), "bad": Asked(bad, 0.1, "pi"), "wrong": Asked(wrong, 0.1, "factored"),
        "eigen": Asked(good, 0.1, "eigen"), "basis": Asked(eigen, 0.1, "pi"), "input": Asked(good, 0.1, "input"),
        "bad input": Asked(bad, 0.1, "input"),
    }  # fmt: skip
    assert invert_together(asked).keys() == {"good", "input"}
    assert invert_together({}) == {}


@pytest.mark.parametrize("damping", [0.3, torch.tensor([0.1, 2.0], dtype=torch.float64)], ids=["number", "each"])
def test_a_solution_by_cholesky_alone(damping: float | Tensor) -> None:
    A, B = spd(2, 4, 4), torch.randn(2, 3, 4, dtype=torch.float64)
    for found, want in (
        (by_cholesky(A, B, damping), ridge(A, B, damping)), (by_cholesky(A, None, damping), inverse(A, damping))
    ):  # fmt: skip
        assert found[1].tolist() == [True, True]
        assert torch.allclose(found[0], want, rtol=1e-11, atol=1e-13)


def test_what_cholesky_alone_does_not_solve() -> None:
    """Each matrix says so by itself; `ridge` then finds another way, or raises."""
    A, B = spd(4, 3, 3), torch.ones(4, 2, 3, dtype=torch.float64)
    A[1] = -A[1]
    A[2, 0, 0], B[3, 0, 0] = float("inf"), float("nan")
    assert by_cholesky(A, B, 0.1)[1].tolist() == [True, False, False, False]
    assert by_cholesky(A, None, 0.1)[1].tolist() == [True, False, False, True]
    assert not by_cholesky(A[:1], B[:1], -1e-3)[1].item()
    assert torch.isfinite(ridge(A[1], B[1], 0.1)).all()
    with pytest.raises(NonFinite):
        ridge(A[3], B[3], 0.1)
    assert by_cholesky(A[:, :0, :0], B[..., :0])[1].tolist() == [True] * 4


def test_a_root_of_a_large_factor_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise.operators import low_rank

    asked: list[int] = []
    part = low_rank._largest_part
    monkeypatch.setattr(low_rank, "_largest_part", lambda a: asked.append(len(a)) or part(a))
    full = block(1, 3, 520, 0)
    found = invert("full", full, 0.1, "pi").block
    assert asked == [520]
    extra, _ = full.dampings(0.1)
    assert torch.allclose(fields_of(found)["A"] @ (full.A + extra * torch.eye(520)), torch.eye(520).double(), atol=1e-8)
