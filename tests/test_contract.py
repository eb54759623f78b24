"""Every contraction of rows against the per-sample gradient built by one einsum with dense inputs."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.ops.base import Call
from layerwise.ops.conv import slots as conv_slots
from layerwise.rows import contract
from layerwise.rows.base import Rows, Samples, Windows

SHAPES = [  # V, N, T, K, O, I
    (1, 4, 1, 1, 3, 5),
    (3, 4, 1, 1, 3, 5),
    (2, 3, 1, 2, 3, 4),
    (1, 4, 6, 1, 3, 5),
    (1, 2, 40, 1, 3, 2),
    (1, 3, 2, 1, 20, 30),
    (3, 3, 7, 1, 4, 2),
    (6, 3, 4, 1, 4, 5),
    (6, 2, 3, 2, 4, 5),
    (2, 3, 5, 4, 2, 3),
    (2, 3, 5, 4, 1, 9),
    (2, 3, 5, 9, 1, 1),
    (1, 3, 1, 9, 1, 1),
    (7, 2, 3, 5, 1, 1),
    (1, 1, 1, 1, 1, 1),
    (2, 0, 3, 2, 3, 4),
    (2, 0, 1, 1, 3, 4),
    (2, 0, 3, 5, 1, 1),
    (2, 3, 0, 2, 3, 4),
    (1, 3, 0, 1, 3, 4),
    (2, 3, 0, 5, 1, 1),
    (1, 0, 0, 1, 2, 2),
]
LIMITS = [(1, 4), (0, 5), (0, 8), (1, 4), (1, 6), (1, 6)]
KINDS = ["float", "none", "index"]


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "plain":
        return x
    if layout == "features first":  # as an unfolded image: n, k, i, t, or v, n, k, o, t
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "samples inside":  # k, i, n, t
        return x.movedim(-4, -1).movedim(-4, -1).contiguous().movedim(-2, -4).movedim(-1, -3)
    assert layout == "gaps"
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def make(shape: tuple[int, ...], kind: str, layout: str = "plain", seed: int = 0) -> Rows:
    v, n, t, k, o, i = shape
    gen = torch.Generator().manual_seed(seed)
    if kind == "index":
        k = 1
    if kind == "none":
        i = 1
    g = strided(torch.randn(v, n, t, k, o, generator=gen, dtype=torch.float64), layout)
    if kind == "none":
        return Rows(None, g, 1)
    if kind == "index":
        return Rows(torch.randint(i, (n, t), generator=gen), g, i)
    return Rows(strided(torch.randn(n, t, k, i, generator=gen, dtype=torch.float64), layout), g, i)


def dense_input(rows: Rows) -> Tensor:
    _, n, t, k, _ = rows.g.shape
    if rows.a is None:
        return torch.ones(n, t, k, 1, dtype=rows.g.dtype)
    if rows.a.is_floating_point():
        return rows.a
    return (rows.a[..., None] == torch.arange(rows.size_in)).to(rows.g.dtype)[:, :, None]


def oracle(rows: Rows) -> Tensor:
    return torch.einsum("vntko,ntki->vnkoi", rows.g, dense_input(rows))


def same(ours: Tensor, theirs: Tensor, tol: float = 1e-12) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    scale = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tol * max(scale, 1e-300))


def check_all(rows: Rows, tol: float = 1e-12) -> None:
    """Compare each function with the oracle, and show that no input was written to."""
    before = (None if rows.a is None else rows.a.clone(), rows.g.clone())
    d, a = oracle(rows), dense_input(rows)
    v, n = d.shape[:2]
    w = torch.linspace(-1, 2, v * n, dtype=d.dtype).reshape(v, n)
    same(contract.per_sample(rows), d, tol)
    same(contract.total(rows), d.sum(1), tol)
    same(contract.squared_norm(rows), d.square().sum((2, 3, 4)), tol)
    same(contract.second_moment(rows), d.square().sum((0, 1)), tol)
    same(contract.weighted_sum(rows, w), torch.einsum("vn,vnkoi->koi", w, d), tol)
    same(contract.pairwise_dot(rows), torch.einsum("vnkoi,vmkoi->vnm", d, d), tol)
    gram = contract.input_gram(rows)
    same(gram if gram.ndim == 3 else torch.diag_embed(gram), torch.einsum("ntki,ntkj->kij", a, a), tol)
    same(contract.output_gram(rows.g), torch.einsum("vntko,vntkp->kop", rows.g, rows.g), tol)
    assert torch.equal(rows.g, before[1])
    assert before[0] is None or torch.equal(rows.a, before[0])


@pytest.mark.parametrize("layout", ["plain", "features first", "samples inside", "gaps"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(shape: tuple[int, ...], kind: str, layout: str) -> None:
    check_all(make(shape, kind, layout))


@pytest.mark.parametrize("chunk", [1, 200, 3000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle_in_chunks(
    shape: tuple[int, ...], kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract.pieces, "CHUNK_BYTES", chunk)
    check_all(make(shape, kind))


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_sides_of_every_cost_rule(
    shape: tuple[int, ...], kind: str, ghost: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "ghost_is_cheaper", lambda *_: ghost)
    monkeypatch.setattr(contract, "pairs_are_cheaper", lambda *_: pairs)
    check_all(make(shape, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape: tuple[int, ...], kind: str) -> None:
    rows = make(shape, kind)
    a = rows.a.float() if kind == "float" else rows.a
    check_all(Rows(a, rows.g.float(), rows.size_in), tol=1e-5)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(*[st.integers(low, high) for low, high in LIMITS]),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(["plain", "features first", "samples inside", "gaps"]),
    seed=st.integers(0, 1000),
)
def test_random_shapes(shape: tuple[int, ...], kind: str, layout: str, seed: int) -> None:
    check_all(make(shape, kind, layout, seed))


def test_large_grams_built_from_panels() -> None:
    rows = make((2, 3, 4, 1, 300, 700), "float")
    for ours, x in [(contract.input_gram(rows), rows.a), (contract.output_gram(rows.g), rows.g)]:
        flat = x.reshape(-1, x.shape[-1])
        same(ours, (flat.T @ flat)[None])


def test_input_gram_of_a_float_tensor_alone_and_of_a_large_vocabulary() -> None:
    rows = make((1, 3, 4, 2, 3, 5), "float")
    same(contract.input_gram(rows.a), contract.input_gram(rows))
    index = make((1, 3, 4, 1, 3, 50), "index")
    counts = contract.input_gram(index)
    assert counts.shape == (1, 50) and counts.sum() == 12
    with pytest.raises(BadInput, match="Rows"):
        contract.input_gram(index.a)


@pytest.mark.parametrize("shape", [(1, 3, 6, 1, 4, 5), (2, 3, 2, 3, 4, 5), (2, 3, 2, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_into_given_memory(shape: tuple[int, ...], kind: str) -> None:
    rows = make(shape, kind)
    out = torch.full(oracle(rows).shape, torch.nan, dtype=torch.float64)
    back = contract.per_sample(rows, out=out)
    assert back.data_ptr() == out.data_ptr()
    same(out, oracle(rows))
    with pytest.raises(BadInput, match="out"):
        contract.per_sample(rows, out=out[:, :2])


def test_reductions_never_hold_all_per_sample_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor allocated on the way is larger than the chunk and the result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                    self.size = max(self.size, x.untyped_storage().nbytes())
            return out

    monkeypatch.setattr(contract.pieces, "CHUNK_BYTES", 2**18)
    for kind, function in itertools.product(
        ["float", "index"], [contract.second_moment, contract.squared_norm, contract.pairwise_dot]
    ):
        rows = make((1, 100, 20, 1, 100, 300), kind)
        d_bytes = 100 * 100 * 300 * 8
        given = {x.untyped_storage().data_ptr() for x in (rows.a, rows.g)}
        with Largest() as seen:
            function(rows)
        limit = contract.DOT_CHUNKS * contract.pieces.CHUNK_BYTES + rows.g.nbytes + 100 * 300 * 8
        assert limit < d_bytes / 4
        assert 0 < seen.size <= limit, (kind, function.__name__)


@pytest.mark.parametrize("kind", KINDS)
def test_concat_sums_the_uses_before_squaring(kind: str) -> None:
    parts = [make((2, 3, t, 2, 3, 4), kind, seed=t) for t in (1, 4, 0, 2)]
    joined = contract.concat(parts)
    assert joined.g.shape[2] == 7
    same(oracle(joined), sum(oracle(p) for p in parts))
    check_all(joined)
    assert contract.concat(parts[:1]) is parts[0]


def test_concat_refuses_what_does_not_match() -> None:
    base = make((2, 3, 4, 1, 3, 4), "float")
    for other, text in [
        (make((2, 3, 4, 1, 3, 5), "float"), "size_in"),
        (make((2, 3, 4, 1, 2, 4), "float"), "O"),
        (make((2, 2, 4, 1, 3, 4), "float"), "N"),
        (make((1, 3, 4, 1, 3, 4), "float"), "V"),
        (make((2, 3, 4, 1, 3, 4), "index"), "kind"),
    ]:
        with pytest.raises(BadInput, match=text):
            contract.concat([base, other])
    with pytest.raises(BadInput, match="no rows"):
        contract.concat([])


def test_rows_that_contradict_each_other_are_refused() -> None:
    g = torch.zeros(1, 3, 4, 1, 2)
    for a, size_in in [
        (torch.zeros(3, 5, 1, 2), 2),
        (torch.zeros(2, 4, 1, 2), 2),
        (torch.zeros(3, 4, 2, 2), 2),
        (torch.zeros(3, 4, 1, 2), 3),
        (torch.zeros(3, 5, dtype=torch.int64), 2),
        (None, 2),
    ]:
        with pytest.raises(BadInput, match="rows"):
            contract.per_sample(Rows(a, g, size_in))
    with pytest.raises(BadInput, match="rows"):
        contract.second_moment(Rows(None, g[0], 1))
    with pytest.raises(BadInput, match="weights"):
        contract.weighted_sum(Rows(None, g, 1), torch.ones(3))


def test_narrow_takes_samples() -> None:
    for kind in KINDS:
        rows = make((2, 5, 3, 2, 3, 4), kind)
        same(oracle(contract.narrow(rows, 1, 3)), oracle(rows)[:, 1:4])


def test_flatten_samples_keeps_the_sums() -> None:
    for kind in KINDS:
        rows = make((2, 5, 3, 2, 3, 4), kind, "features first")
        one = contract.flatten_samples(rows)
        assert one.g.shape[1:3] == (1, 15)
        same(oracle(one)[:, 0], oracle(rows).sum(1))
        same(contract.output_gram(one.g), contract.output_gram(rows.g))
        same(contract.input_gram(one), contract.input_gram(rows))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_on_cuda() -> None:
    for shape, kind in itertools.product(SHAPES, KINDS):
        rows = make(shape, kind)
        there = Rows(None if rows.a is None else rows.a.cuda(), rows.g.cuda(), rows.size_in)
        d = oracle(rows)
        same(contract.per_sample(there).cpu(), d)
        same(contract.squared_norm(there).cpu(), d.square().sum((2, 3, 4)))
        same(contract.second_moment(there).cpu(), d.square().sum((0, 1)))
        same(contract.pairwise_dot(there).cpu(), torch.einsum("vnkoi,vmkoi->vnm", d, d))
        same(contract.output_gram(there.g).cpu(), contract.output_gram(rows.g))
        same(contract.input_gram(there).cpu(), contract.input_gram(rows))


class Copied(Windows):
    """Windows made by copying rows that are there, which counts how much of them is laid out at once."""

    def __init__(self, rows: Rows, log: list[int]) -> None:
        def make(low: int, high: int) -> Tensor:
            log.append(high - low)
            return rows.a[low:high].clone()

        super().__init__(make, rows.g, rows.size_in)


@pytest.mark.parametrize("piece", [1, 400, 10**9])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1]], ids=str)
def test_windows_are_laid_out_in_pieces(shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.rows.pieces.PIECE_BYTES", piece)
    rows, log = make(shape, "float"), []
    d = oracle(rows)
    w = torch.randn(d.shape[:2], dtype=torch.float64)
    for function, expected in [
        (contract.per_sample, d),
        (contract.total, d.sum(1)),
        (contract.squared_norm, d.square().sum((2, 3, 4))),
        (contract.second_moment, d.square().sum((0, 1))),
        (contract.pairwise_dot, torch.einsum("vnkoi,vmkoi->vnm", d, d)),
        (contract.input_gram, contract.input_gram(rows)),
        (lambda r: contract.weighted_sum(r, w), torch.einsum("vn,vnkoi->koi", w, d)),
    ]:
        windows = Copied(rows, log)
        same(function(windows), expected)
        if piece == 1 and shape[1] > 1 and rows.a.numel():
            assert not windows.laid_out and set(log) == {1}, "more was laid out than fits the piece"
        log.clear()
    half = contract.narrow(Copied(rows, log), 1, 2)  # clipped where there are fewer
    same(contract.per_sample(half), d[:, 1:3])
    same(contract.per_sample(Copied(rows, log).sent(rows.g * 2)), 2 * d)
    assert Copied(rows, log).kind == "float" and Copied(rows, log).a.shape == rows.a.shape


def test_pieces_of_windows_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.rows.pieces.PIECE_BYTES", 1)
    alive: list[weakref.ref] = []

    def made(low: int, high: int) -> Tensor:
        assert sum(ref() is not None for ref in alive) <= 1, "the last piece goes when the next one comes"
        piece = torch.ones(high - low, 6, 1, 4)
        alive.append(weakref.ref(piece))
        return piece

    contract.second_moment(Windows(made, torch.ones(1, 5, 6, 1, 3), 4))
    assert len(alive) == 5


@pytest.mark.parametrize(
    ("shape", "out", "kernel", "options"),
    [
        ((3, 4, 20, 20), 6, (3, 3), {"padding": 1}),
        ((3, 4, 33, 35), 6, (3, 2), {"stride": (2, 1), "padding": (1, 0), "groups": 2}),
        ((3, 4, 24, 24), 4, (3, 3), {"dilation": 2, "groups": 4}),
        ((3, 2, 300), 5, (5,), {"padding": 2}),
        ((2, 2, 8, 8, 8), 3, (2, 2, 2), {}),
    ],
    ids=str,
)
def test_a_grouped_convolution_gives_what_windows_give(
    shape: tuple[int, ...], out: int, kernel: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Float32 convolutions with many positions have a way of their own to per-sample gradients."""
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(kernel) - 1]
    x, w = torch.randn(shape), torch.randn(out, shape[1] // options.get("groups", 1), *kernel)
    z = conv(x, w, **options)
    g = torch.randn(2, *z.shape)
    (slot,) = conv_slots(Call(conv, (x, w), options, z.shape), [w])
    assert slot is not None

    def rows(grouped: bool) -> Windows:
        found = slot.rows(g, Samples(len(x), 0))
        assert isinstance(found, Windows)
        assert found.product is not None
        return found if grouped else Windows(found.make, found.g, found.size_in)

    for function in (contract.per_sample, contract.squared_norm, contract.second_moment):
        torch.testing.assert_close(function(rows(True)), function(rows(False)), rtol=1e-4, atol=1e-4)
        assert not rows(True).laid_out
    part = contract.narrow(rows(True), 1, len(x) - 1)
    torch.testing.assert_close(contract.per_sample(part), contract.per_sample(rows(False))[:, 1:], rtol=1e-4, atol=1e-4)
