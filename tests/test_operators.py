"""Operators against dense matrices, and the solver ladder on thousands of bad factors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.errors import BadInput, NonFinite
from layerwise.operators import (
    Diagonal,
    EigenBlock,
    EigenKronecker,
    Kronecker,
    KroneckerBlock,
    coordinate_descent,
    inverse,
    ridge,
)
from layerwise.operators import kronecker as kronecker_module
from layerwise.rows.layout import MatrixLayout

F64 = torch.float64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny matrices: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_psd(*shape: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """A random positive semidefinite `[..., d, d]`."""
    *batch, d = shape
    x = torch.randn(*batch, d, d + 3 if rank is None else rank, generator=gen(seed), dtype=F64)
    return x @ x.mT / x.shape[-1]


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def close(ours: Tensor, theirs: Tensor, tol: float = 1e-10) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tol * max(theirs.abs().max().item(), 1e-300))


# --- ridge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("d", [1, 2, 7, 60])
def test_ridge_equals_numpy(d: int, damping: float) -> None:
    a, b = random_psd(d, seed=d), torch.randn(5, d, generator=gen(d + 1), dtype=F64)
    theirs = np.linalg.solve((a + damping * eye(d)).numpy(), b.numpy().T).T
    close(ridge(a, b, damping), torch.from_numpy(theirs))
    close(inverse(a, damping), torch.from_numpy(np.linalg.inv((a + damping * eye(d)).numpy())))
    assert torch.equal(inverse(a, damping), inverse(a, damping).mT)


def test_ridge_is_the_minimum_of_its_objective() -> None:
    a, b = random_psd(6), torch.randn(4, 6, generator=gen(1), dtype=F64)
    w = ridge(a, b, 0.3).requires_grad_()
    (0.5 * (w @ a @ w.T).trace() - (w @ b.T).trace() + 0.15 * w.square().sum()).backward()
    assert w.grad is not None
    close(w.grad + b, b)


def test_ridge_in_batches_with_a_damping_each() -> None:
    a, b = random_psd(3, 5), torch.randn(2, 3, 4, 5, generator=gen(1), dtype=F64)
    damping = torch.tensor([0.0, 0.1, 2.0], dtype=F64)
    w = ridge(a, b, damping)
    for n in range(2):
        for k in range(3):
            close(w[n, k], ridge(a[k], b[n, k], float(damping[k])))
    mixed = torch.stack([a[0], torch.zeros_like(a[0]), a[2]])
    w = ridge(mixed, b[0])
    close(w[0], ridge(a[0], b[0, 0]))
    assert torch.equal(w[1], torch.zeros(4, 5, dtype=F64))
    close(w[2], ridge(a[2], b[0, 2]))
    assert ridge(torch.zeros(0, 3, 3), torch.zeros(0, 2, 3)).shape == (0, 2, 3)
    assert ridge(torch.zeros(0, 0), torch.zeros(2, 0)).shape == (2, 0)


def test_three_methods_are_one_ridge() -> None:
    """Exact LocoProp-S with the proximal term, FOOF, and least squares on running moments."""
    x = torch.randn(30, 6, generator=gen(0), dtype=F64)
    g = torch.randn(30, 4, generator=gen(1), dtype=F64)
    old = torch.randn(4, 6, generator=gen(2), dtype=F64)
    gamma, eta = 10.0, 0.05
    gradient, gram = g.T @ x, x.T @ x
    step = -gamma * ridge(gram, gradient, 1 / eta)
    target = x @ old.T - gamma * g
    regression = ridge(gram, target.T @ x + old / eta, 1 / eta)
    close(old + step, regression)
    stacked = torch.cat([x, eye(6) / math.sqrt(eta)])
    wanted = torch.cat([target, old.T / math.sqrt(eta)])
    close(regression, torch.linalg.lstsq(stacked, wanted).solution.T)


def bad_factor(number: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """One of many factors that break a plain Cholesky, and a damping."""
    g = gen(number)
    d = int(torch.randint(1, 24, (), generator=g))
    kind = number % 8
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64)).Q
    x = torch.randn(max(1, d // 3), d, generator=g, dtype=F64)
    if kind == 0:
        a = x.T @ x  # rank deficient
    elif kind == 1:
        a = (q * torch.logspace(0, -12, d, dtype=F64)) @ q.T
    elif kind == 2:
        a = torch.zeros(d, d, dtype=F64)
    elif kind == 3:
        a = x.T @ x + 1e-6 * torch.randn(d, d, generator=g, dtype=F64)  # slightly asymmetric
    elif kind == 4:
        a = (q * torch.linspace(-1e-7, 1, d, dtype=F64)) @ q.T  # rounding below zero
    elif kind == 5:
        a = x.T @ x * 1e-30
    elif kind == 6:
        a = x.T @ x * 1e30
    else:
        a = torch.ones(d, d, dtype=F64) * torch.rand((), generator=g)
        a[0] = a[:, 0] = 0  # a dead unit
    damping = [0.0, 0.0, 1e-12, 1e-3][number // 8 % 4]
    return a.to(dtype), damping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_thousand_bad_factors(dtype: torch.dtype) -> None:
    failures = 0
    for number in range(2000):
        a, damping = bad_factor(number, dtype)
        b = torch.randn(3, len(a), generator=gen(number), dtype=dtype)
        if number % 3 == 0:
            b = b @ a  # as in least squares: B lies in the range of A
        plain = a + damping * torch.eye(len(a), dtype=dtype)
        failures += int(torch.linalg.cholesky_ex(plain).info != 0)
        try:
            w, inv = ridge(a, b, damping), inverse(a, damping)
        except NonFinite as error:
            # only where the largest entry is so small that one over it leaves the type's range
            assert "beyond the range" in str(error) and dtype == torch.float32 and plain.abs().max() < 1e-25
            continue
        assert torch.isfinite(w).all() and torch.isfinite(inv).all()
        # W solves the system up to the jitter: (|W| times the largest change that the ladder makes)
        eps, i = torch.finfo(dtype).eps, len(a)
        symmetric = (plain.double() + plain.double().T) / 2
        residual = w.double() @ symmetric - b.double()
        if number % 3 == 0 and number % 8 in (0, 1, 5, 6, 7):
            size = float(w.double().norm() * symmetric.norm() + b.double().norm())
            assert float(residual.norm()) <= 200 * i * eps * size
    assert failures > 200  # the factors are as bad as they claim


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_a_typed_error(bad: float) -> None:
    good, b = torch.eye(3), torch.ones(2, 3)
    broken = good.clone()
    broken[1, 1] = bad
    for call in [
        lambda: ridge(broken, b),
        lambda: ridge(good, torch.full((2, 3), bad)),
        lambda: inverse(broken),
        lambda: inverse(good, bad),
        lambda: coordinate_descent(b, broken, b),
        lambda: coordinate_descent(torch.full((2, 3), bad), good, b),
        lambda: Kronecker({"w": KroneckerBlock(broken[None], good[None])}).inverse(1.0),
        lambda: Kronecker({"w": KroneckerBlock(broken[None], good[None])}).eigh(),
    ]:
        with pytest.raises((NonFinite, BadInput) if bad == -math.inf else NonFinite):
            call()


def test_ridge_refuses_what_does_not_fit() -> None:
    eye = torch.eye(3)
    for call in [
        lambda: ridge(eye, torch.ones(2, 4)),
        lambda: ridge(eye, torch.ones(2, 3, dtype=F64)),
        lambda: ridge(torch.ones(3, 2), torch.ones(2, 2)),
        lambda: ridge(eye, torch.ones(2, 3), -1.0),
        lambda: ridge(eye.half(), torch.ones(2, 3).half()),
        lambda: coordinate_descent(torch.ones(2, 3), eye, torch.ones(1, 3)),
    ]:
        with pytest.raises(BadInput):
            call()


def test_overflow_is_a_typed_error() -> None:
    with pytest.raises(NonFinite, match="range"):
        ridge(torch.eye(2) * 1e-30, torch.ones(1, 2) * 1e20)
    assert torch.isfinite(inverse(torch.full((3, 3), 3e38))).all()


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_coordinate_descent_converges_to_ridge(damping: float) -> None:
    a, b = random_psd(2, 6) + 0.2 * eye(6), torch.randn(2, 4, 6, generator=gen(3), dtype=F64)
    start = torch.randn(2, 4, 6, generator=gen(4), dtype=F64)
    before = start.clone()
    close(coordinate_descent(start, a, b, sweeps=1000, damping=damping), ridge(a, b, damping))
    assert torch.equal(start, before)

    def objective(w: Tensor) -> float:
        return float((0.5 * (w @ a * w) - w * b).sum() + 0.5 * damping * w.square().sum())

    values = [objective(coordinate_descent(start, a, b, sweeps=s, damping=damping)) for s in range(5)]
    assert values == sorted(values, reverse=True)


def test_coordinate_descent_leaves_dead_columns() -> None:
    a, b = random_psd(4), torch.randn(3, 4, generator=gen(3), dtype=F64)
    a[2] = a[:, 2] = 0
    w = coordinate_descent(torch.ones(3, 4, dtype=F64), a, b, sweeps=3)
    assert torch.equal(w[:, 2], torch.ones(3, dtype=F64)) and torch.isfinite(w).all()


# --- Kronecker ------------------------------------------------------------------------------------


def operator(rank: int | None = None) -> tuple[Kronecker, dict[str, Tensor]]:
    """A block of each kind, and a random vector."""
    blocks = {
        "linear": KroneckerBlock(
            random_psd(1, 4, seed=1, rank=rank),
            random_psd(1, 3, seed=2, rank=rank),
            MatrixLayout.whole((3, 4), (1, 3, 4)),
        ),
        "transposed": KroneckerBlock(
            random_psd(2, 3, seed=3, rank=rank),
            random_psd(2, 2, seed=4, rank=rank),
            MatrixLayout.whole((6, 2), (2, 2, 3), (0, 2, 1)),  # as a transposed grouped convolution: `[k·i, o]`
        ),
        "bias": KroneckerBlock(None, random_psd(2, 3, seed=5, rank=rank), MatrixLayout.whole((6,), (2, 3, 1))),
        "embedding": KroneckerBlock(
            torch.tensor([[3.0, 0.0, 1.0, 2.0]], dtype=F64),
            random_psd(1, 2, seed=6, rank=rank),
            MatrixLayout.whole((4, 2), (1, 2, 4), (0, 2, 1)),
        ),
        "joint": KroneckerBlock(
            random_psd(2, 4, seed=7, rank=rank),
            random_psd(2, 2, seed=8, rank=rank),
            MatrixLayout.whole((4, 3), (2, 2, 3)),
            bias="joint.bias",
        ),
        "scale": KroneckerBlock(
            random_psd(5, 1, seed=9),
            random_psd(5, 1, seed=10),
            MatrixLayout.whole((5,), (5, 1, 1)),
        ),
    }
    shapes = {"linear": (3, 4), "transposed": (6, 2), "bias": (6,), "embedding": (4, 2), "joint": (4, 3)}
    shapes |= {"joint.bias": (4,), "scale": (5,)}
    v = {n: torch.randn(s, generator=gen(i), dtype=F64) for i, (n, s) in enumerate(shapes.items())}
    return Kronecker(blocks), v


def blockwise(block: KroneckerBlock, function=torch.kron) -> Tensor:
    """The block in the order k, o, i, from numpy-like Kronecker products."""
    a = block.input_factor
    a = torch.diag_embed(a) if a.ndim == 2 else a
    return torch.block_diag(*[function(b, a) for b, a in zip(block.B, a, strict=True)])


def permutation(name: str, block: KroneckerBlock | EigenBlock) -> Tensor:
    """Row p: where the p-th element of the flattened parameter (then bias) lies in the order k, o, i."""
    k, o, i = block.size
    order = torch.arange(k * o * i).view(k, o, i)
    if block.bias is None:
        return block.fold(order).flatten()
    return torch.cat([block.fold(order[..., :-1]).flatten(), order[..., -1].flatten()])


def dense(op: Kronecker, name: str) -> Tensor:
    p = permutation(name, op.blocks[name])
    return blockwise(op.blocks[name])[p][:, p]


def flat(op: Kronecker | EigenKronecker, name: str, v: dict[str, Tensor]) -> Tensor:
    bias = op.blocks[name].bias
    return torch.cat([v[name].flatten()] + ([v[bias].flatten()] if bias else []))


NAMES = list(operator()[0].blocks)


@pytest.mark.parametrize("name", NAMES)
def test_kronecker_equals_dense(name: str) -> None:
    op, v = operator()
    m = dense(op, name)
    close(op.to_dense(name), m)
    close(flat(op, name, op @ v), m @ flat(op, name, v))
    close(op.eigh().to_dense(name), m)
    close(flat(op, name, op.eigh() @ v), m @ flat(op, name, v))
    assert {n: x.shape for n, x in (op @ v).items()} == {n: x.shape for n, x in v.items()}


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("damping", [1e-2, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_inverse_equals_dense(name: str, damping: float, rank: int | None) -> None:
    op, v = operator(rank)
    m = dense(op, name)
    damped = m + damping * eye(len(m))
    close(op.inverse(damping, exact=True).to_dense(name), torch.linalg.inv(damped))
    close(
        flat(op, name, op.inverse(damping, exact=True) @ v),
        torch.linalg.solve(damped, flat(op, name, v)),
    )
    block = op.blocks[name]
    p = permutation(name, block)

    def split(b: Tensor, a: Tensor) -> Tensor:
        i, o = len(a), len(b)
        pi = math.sqrt((a.trace() / i) / (b.trace() / o))
        a = a + pi * math.sqrt(damping) * eye(i)
        return torch.kron(torch.linalg.inv(b + math.sqrt(damping) / pi * eye(o)), torch.linalg.inv(a))

    close(op.inverse(damping).to_dense(name), blockwise(block, split)[p][:, p])


def test_trace_and_logdet_equal_dense() -> None:
    op, _ = operator()
    matrices = [dense(op, name) for name in NAMES]
    close(op.trace(), sum(m.trace() for m in matrices))
    close(op.eigh().trace(), op.trace())
    for damping in (0.0, 1e-3, 2.0):
        if damping == 0.0:
            assert op.logdet() == -math.inf  # the embedding's unused row
            continue
        theirs = sum(torch.logdet(m + damping * eye(len(m))) for m in matrices)
        close(op.logdet(damping), theirs)
    for name in NAMES:
        ours = op.eigh().eigenvalues[name].flatten().sort().values
        close(ours, torch.linalg.eigvalsh(dense(op, name)).clamp(min=0))


def test_undamped_inverse_undoes_the_product_and_skips_what_never_occurred() -> None:
    op, v = operator()
    for inv in (op.inverse(), op.inverse(exact=True), op.eigh().inverse()):
        back = inv @ (op @ v)
        for name in v:
            expected = v[name].clone()
            if name == "embedding":
                expected[1] = 0
            close(back[name], expected, 1e-8)


def test_factors_are_the_given_tensors() -> None:
    op, _ = operator()
    assert op.factors["linear"][0] is op.blocks["linear"].A
    assert len(op.factors["bias"]) == 1 and op.factors["bias"][0] is op.blocks["bias"].B
    assert "linear" in repr(op)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_of_bad_factors_is_finite(dtype: torch.dtype) -> None:
    for number in range(400):
        a, _ = bad_factor(number, dtype)
        b, _ = bad_factor(number + 3, dtype)
        op = Kronecker(
            {"w": KroneckerBlock(a[None], b[None], MatrixLayout.whole((len(b), len(a)), (1, len(b), len(a))))}
        )
        v = {"w": torch.randn(len(b), len(a), generator=gen(number), dtype=dtype)}
        for damping in (1e-4, 1.0):
            for inv in (op.inverse(damping), op.inverse(damping, exact=True)):
                assert torch.isfinite((inv @ v)["w"]).all(), (number, damping)


@pytest.mark.parametrize("make", [lambda: operator()[0], lambda: operator()[0].eigh()])
def test_names_and_shapes_that_do_not_fit_are_named(make) -> None:
    op, v = make(), operator()[1]
    with pytest.raises(BadInput, match=r"no block for.*'head'"):
        op @ (v | {"head": torch.ones(2)})
    with pytest.raises(BadInput, match=r"lacks \['joint.bias'\]"):
        op @ {n: x for n, x in v.items() if n != "joint.bias"}
    with pytest.raises(BadInput, match="'linear' is"):
        op @ (v | {"linear": v["linear"].T})
    with pytest.raises(BadInput, match=r"'joint\.bias' is"):
        op @ (v | {"joint.bias": torch.ones(3, dtype=F64)})
    with pytest.raises(BadInput, match="nope"):
        op.to_dense("nope")
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(BadInput, match="damping"):
            op.inverse(damping)


def test_blocks_that_contradict_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eye = torch.eye(3)[None]
    for a, b in [
        (torch.eye(3), eye),
        (eye, torch.eye(3)),
        (torch.ones(2, 3), eye),
        (torch.ones(1, 2, 3), eye),
    ]:
        with pytest.raises(BadInput, match="KroneckerBlock"):
            KroneckerBlock(a, b)
    with pytest.raises(BadInput, match="more than one block"):
        Kronecker({"w": KroneckerBlock(eye, eye, bias="b"), "b": KroneckerBlock(None, eye)})
    monkeypatch.setattr(kronecker_module, "DENSE_BYTES", 100)
    with pytest.raises(BadInput, match="linear"):
        operator()[0].to_dense("linear")


def test_free_spectrum_in_a_kronecker_eigenbasis() -> None:
    block = operator()[0].eigh().blocks["linear"]
    spectrum = torch.rand(1, 3, 4, generator=gen(0), dtype=F64)
    op = EigenKronecker({"w": EigenBlock(block.basis_in, block.basis_out, spectrum, block.layout)})
    basis = torch.kron(block.basis_out[0], block.basis_in[0])
    close(op.to_dense("w"), basis @ torch.diag(spectrum.flatten()) @ basis.T)
    w = torch.randn(1, 3, 4, dtype=F64, generator=gen(1))
    close(block.rotate_back(block.rotate(w)), w)
    close(block.rotate(w).flatten(), basis.T @ w.flatten())


# --- diagonal -------------------------------------------------------------------------------------


def test_diagonal_equals_dense() -> None:
    entries = {
        "w": torch.rand(3, 4, dtype=F64, generator=gen(0)),
        "b": torch.rand(3, dtype=F64, generator=gen(1)),
    }
    v = {n: torch.randn(x.shape, dtype=F64, generator=gen(2)) for n, x in entries.items()}
    op = Diagonal(entries)
    for name in entries:
        m = torch.diag(entries[name].flatten())
        damped = m + 0.3 * eye(len(m))
        close(op.to_dense(name), m)
        close((op @ v)[name].flatten(), m @ v[name].flatten())
        close(op.inverse(0.3).to_dense(name), torch.linalg.inv(damped))
    close(op.trace(), sum(x.sum() for x in entries.values()))
    close(op.logdet(0.3), sum((x + 0.3).log().sum() for x in entries.values()))
    close(op.map(torch.sqrt)["w"], entries["w"].sqrt())


def test_diagonal_refuses() -> None:
    op = Diagonal({"w": torch.ones(2)})
    with pytest.raises(BadInput, match=r"no block for.*'x'"):
        op @ {"w": torch.ones(2), "x": torch.ones(2)}
    with pytest.raises(BadInput, match="lacks"):
        op @ {}
    with pytest.raises(BadInput, match="'w' is"):
        op @ {"w": torch.ones(3)}
    with pytest.raises(BadInput, match="damping"):
        op.inverse(-1.0)
    with pytest.raises(NonFinite):
        Diagonal({"w": torch.tensor([math.nan])}).inverse(1.0)
    with pytest.raises(NonFinite):
        Diagonal({"w": torch.tensor([1e-40])}).inverse()
    with pytest.raises(BadInput, match=r"an entry of -1.0, which damping 0.0 leaves"):
        Diagonal({"w": torch.tensor([-1.0])}).logdet()
    assert torch.equal(Diagonal({"w": torch.tensor([0.0, 2.0])}).inverse()["w"], torch.tensor([0.0, 0.5]))
    assert Diagonal({}).trace() == 0
