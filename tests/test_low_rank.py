"""The inverse of a damped matrix of low rank is the inverse, and other matrices go the general way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.operators import KroneckerBlock
from layerwise.operators.low_rank import inverse_of_low_rank
from layerwise.operators.ridge import inverse
from layerwise.operators.thin_block import ThinBlock, thin_block
from layerwise.optim.second_order.averages import Average, invert, load, save
from layerwise.rows.layout import MatrixLayout

SIZE = 520


def made(rank: int, dtype: torch.dtype = torch.float64, decay: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(rank, SIZE, dtype=torch.float64, generator=generator)
    x *= torch.logspace(0, -decay, rank, dtype=torch.float64)[:, None]
    a = (x.T @ x) / max(1, rank)
    return ((a + a.T) / 2).to(dtype)


def exact(a: Tensor, damping: float) -> Tensor:
    return torch.linalg.inv(a.double() + damping * torch.eye(len(a), dtype=torch.float64))


@pytest.mark.parametrize("rank", [0, 1, 30, 100])
@pytest.mark.parametrize("decay", [0.0, 4.0])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_the_inverse_is_the_dense_one(rank: int, decay: float, damping: float) -> None:
    a = made(rank, decay=decay)
    got = inverse_of_low_rank(a, torch.tensor(damping, dtype=torch.float64))
    assert got is not None and torch.equal(got, got.mT)
    torch.testing.assert_close(got, exact(a, damping), rtol=1e-9, atol=1e-10 / damping)
    assert torch.equal(inverse(a, damping), got)


def test_single_precision_is_as_exact_as_cholesky() -> None:
    a, damping = made(60, torch.float32), 1e-2
    want = exact(a, damping)
    got = inverse_of_low_rank(a, torch.tensor(damping))
    other = torch.cholesky_inverse(torch.linalg.cholesky(a + damping * torch.eye(SIZE)))
    assert got is not None and got.dtype == torch.float32
    assert float((got - want).norm()) < max(2 * float((other - want).norm()), 1e-5 * float(want.norm()))


def test_each_matrix_of_a_batch_has_its_damping() -> None:
    a = torch.stack([made(3), made(20)])
    got = inverse_of_low_rank(a, torch.tensor([0.1, 2.0], dtype=torch.float64))
    assert got is not None
    torch.testing.assert_close(got, torch.stack([exact(a[0], 0.1), exact(a[1], 2.0)]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [60, 120, 131, 200, 800])
def test_no_root_is_looked_for_in_a_matrix_of_which_a_part_has_a_higher_rank(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.operators import low_rank

    asked, root = [], low_rank._root
    monkeypatch.setattr(low_rank, "_root", lambda a: asked.append(a) or root(a))
    a = made(rank, dtype)
    a[:, 500:], a[500:] = 0, 0  # as the pixels at the rim of pictures
    found = inverse_of_low_rank(a, torch.tensor(0.1, dtype=dtype))
    low = rank <= low_rank.most_rank(a)
    assert (len(asked), found is not None) == (low, low)


def _indefinite() -> Tensor:
    a = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    a[0, 1] = a[1, 0] = 5.0  # the diagonal says nothing of it
    return a


OTHERS = {
    "full rank": made(SIZE),
    "rank above a quarter": made(SIZE // 4 + 5),
    "indefinite": _indefinite(),
    "negative": -made(5),
    "not symmetric": made(5) + torch.triu(torch.ones(SIZE, SIZE, dtype=torch.float64), 1),
    "small": made(5)[:100, :100],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_matrices_go_the_general_way(name: str) -> None:
    a = OTHERS[name]
    assert inverse_of_low_rank(a, torch.tensor(10.0)) is None
    symmetric = (a + a.T) / 2
    if float(torch.linalg.eigvalsh(symmetric)[0]) > -9:
        want = exact(symmetric, 10.0)
        torch.testing.assert_close(inverse(a, 10.0), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_as_ever(bad: float) -> None:
    a = made(5)
    a[3, 4] = a[4, 3] = bad
    with pytest.raises(NonFinite):
        inverse(a, 1.0)
    b = made(5)
    b[7, 7] = bad
    with pytest.raises(NonFinite):
        inverse(b, 1.0)


def test_no_damping_goes_the_general_way() -> None:
    assert inverse_of_low_rank(made(5), torch.tensor(0.0)) is None


# -- blocks -------------------------------------------------------------------------------------------------------


def block(a: Tensor, b: Tensor, bias: str | None = None) -> KroneckerBlock:
    shape = (len(b), len(a) - (bias is not None))
    return KroneckerBlock(a[None], b[None], MatrixLayout.whole(shape, (1, *shape)), bias)


BLOCKS = {
    "A": block(made(30), made(SIZE)[:6, :6]),
    "B": block(made(SIZE)[:6, :6], made(30)),
    "both": block(made(3), made(30)),
    "bias": block(made(30), made(SIZE)[:6, :6], "b"),
}


def gradients(of: KroneckerBlock) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    found = {"w": torch.randn(of.shape, dtype=torch.float64, generator=generator)}
    return found | ({} if of.bias is None else {of.bias: torch.randn(of.size[1], dtype=torch.float64)})


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("form", ["pi", "factored"])
def test_products_of_a_thin_block_are_those_of_the_dense_inverse(name: str, form: str) -> None:
    of, damping = BLOCKS[name], 1e-2
    want = of.inverse("w", damping, balanced=form == "pi")
    got = invert("w", of, damping, form)
    assert isinstance(got.block, ThinBlock) and not got.raised and got.block.size == want.size
    values = gradients(of)
    for key, product in got.block.product("w", values).items():
        torch.testing.assert_close(product, want.product("w", values)[key], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.block.A, want.A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.block.B, want.B, rtol=1e-9, atol=1e-9)


def test_a_saved_thin_block_goes_on_with_the_bits_of_what_was_saved() -> None:
    of = BLOCKS["both"]
    inverse_ = invert("w", of, 1e-2, "pi")
    state = save(Average(of), inverse_)
    _, loaded = load(state, torch.device("cpu"))
    assert loaded is not None and loaded.block is not None and inverse_.block is not None
    values = gradients(of)
    assert torch.equal(loaded.block.product("w", values)["w"], inverse_.block.product("w", values)["w"])


def test_the_other_factor_must_have_a_usable_inverse() -> None:
    of = block(made(30), torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)))
    assert thin_block(of, 0.1, True) is not None
    found = invert("w", of, 0.1, "pi")  # B + βI is no positive definite matrix
    assert found.raised or found.block is None or not isinstance(found.block, ThinBlock)


def test_small_diagonal_and_grouped_blocks_have_no_thin_inverse() -> None:
    small, large = made(5)[:9, :9], made(30)
    eye = torch.ones(1, 7, dtype=torch.float64)
    for of in (block(small, small), KroneckerBlock(eye, small[None]), KroneckerBlock(None, small[None]),
               KroneckerBlock(large.expand(2, -1, -1), small.expand(2, -1, -1))):  # fmt: skip
        assert thin_block(of, 0.1, True) is None
