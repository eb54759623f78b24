"""Kronecker factors of parameters without a matrix of their own: slices, and gradients of single samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle_slices import gradient_factors
from torch import Tensor, nn
from zoo import case
from zoo.parts import Apply, Mean, leaf

import layerwise as lw
from layerwise import errors
from layerwise.operators import EigenKronecker, Kronecker, KroneckerBlock
from layerwise.quantities import EKFAC, KFAC, KFLR, PerSampleGrad, Quantity, SecondMoment, SqrtGGN
from layerwise.rows import layout as layouts
from layerwise.rows.layout import MatrixLayout

pytestmark = pytest.mark.usefixtures("float64")

Forward = Callable[[nn.Module, Tensor], Tensor]


def watch(model: nn.Module, x: Tensor, y: Tensor, *quantities: Quantity) -> lw.Seen:
    with lw.observe(model, *quantities) as seen:
        F.cross_entropy(model(x), y).backward()
    return seen


def columns(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """Gradients of every sample and exact root column by a backward pass each, `[M, *shape]`."""
    found, p = [], dict(model.named_parameters())[name]
    for n in range(len(x)):
        z = model(x)[n]
        q = torch.softmax(z.detach(), 0)
        values, vectors = torch.linalg.eigh((torch.diag(q) - torch.outer(q, q)) / len(x))
        for column in (vectors * values.clamp(min=0).sqrt()).T:
            found += torch.autograd.grad(z, p, column, retain_graph=True)
    return torch.stack(found)


# Views ------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda p: p.chunk(3)[1],
    "columns": lambda p: p[:, 1:3],
    "steps": lambda p: p[::2, 1::2],
    "diagonal": lambda p: p.diagonal(),
    "turned slice": lambda p: p[2:5].t(),
    "permuted blocks": lambda p: p.view(2, 3, 4).transpose(0, 1),
    "select": lambda p: p[3],
    "one": lambda p: p[3, 2],
    "whole": lambda p: p.view(3, 8),
}


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("name", VIEWS)
def test_maps_of_a_view(name: str, order: str) -> None:
    """Against the vjp of the view, for a parameter of either memory order."""
    p = nn.Parameter(torch.randn(6, 4) if order == "rows" else torch.randn(4, 6).t())
    try:
        used = VIEWS[name](p)
    except RuntimeError:
        pytest.skip("torch has no such view")
    layout = MatrixLayout.of_view(used, p)
    assert layout is not None
    w, other = torch.randn(2, 3, *used.shape), torch.randn(6, 4)
    want = torch.stack([torch.autograd.grad(used, p, g, retain_graph=True)[0] for g in w.flatten(0, 1)])
    assert torch.equal(layout.fold(w), want.view(2, 3, 6, 4))
    assert torch.equal(layout.matrix(other), VIEWS[name](other.clone()))
    assert torch.equal(layout.matrix(layout.fold(w[0, 0])), w[0, 0])
    assert layout.fold(w.to("meta")).shape == (2, 3, 6, 4)


def test_bad_blocks_are_refused() -> None:
    """A parameter stands in one whole block or in slices, never in both."""
    whole = KroneckerBlock(None, torch.eye(2)[None])
    piece = KroneckerBlock(None, torch.eye(2)[None], form="slices", parameter="w")
    with pytest.raises(errors.BadInput, match=r"\['w'\] stand in more than one"):
        Kronecker({"w": whole, "w[0]": piece})
    assert list(Kronecker({"w[0]": piece, "w[1]": piece}).names()) == ["w"]


def test_what_shows_an_element_twice_is_no_view() -> None:
    p = nn.Parameter(torch.randn(6))
    assert MatrixLayout.of_view(p.unfold(0, 3, 1), p) is None
    assert MatrixLayout.of_view(p.expand(2, 6), p) is None
    assert MatrixLayout.of_view(p * 1, p) is None
    q = nn.Parameter(torch.randn(6))
    assert MatrixLayout.of_view(p[:2], q) is None


@pytest.mark.parametrize("name", ["chunk", "columns", "steps", "turned slice", "permuted blocks"])
def test_first_order_of_slices(name: str) -> None:
    """Per-sample gradients and moments of a parameter of which some uses read slices."""
    model = Apply(
        lambda m, x: F.linear(F.linear(x[:, : VIEWS[name](m.w).flatten(1).shape[1]], VIEWS[name](m.w).flatten(1)), m.u),
        w=leaf(6, 4), u=leaf(3, VIEWS[name](torch.zeros(6, 4)).shape[0]),
    )  # fmt: skip
    x, y = torch.randn(5, 8), torch.randint(3, (5,))
    seen = watch(model, x, y, PerSampleGrad(), SecondMoment())
    grads = oracle.per_sample_grad(
        dict(model.named_parameters()), lambda: F.cross_entropy(model(x), y, reduction="none") / len(x)
    )
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.second_moment), oracle.second_moment(grads))


# Slices -----------------------------------------------------------------------------------------


class _Apart(nn.Module):
    """The same model with a layer for each slice."""

    def __init__(self, w: Tensor, b: Tensor, top: Tensor) -> None:
        super().__init__()
        self.q, self.k, self.top = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            for layer, part, shift in zip((self.q, self.k), w.chunk(2), b.chunk(2), strict=True):
                layer.weight.copy_(part)
                layer.bias.copy_(shift)
            self.top.weight.copy_(top)

    def forward(self, x: Tensor) -> Tensor:
        return self.top((self.q(x).sin() + self.k(x + 1).tanh()).mean(1))


def _chunked() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k = (F.linear(x + i, w, b) for i, (w, b) in enumerate(zip(m.w.chunk(2), m.b.chunk(2), strict=True)))
        return F.linear((q.sin() + k.tanh()).mean(1), m.top)

    return Apply(forward, w=leaf(6, 4), b=leaf(6), top=leaf(3, 3))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_slices_have_the_factors_of_separate_layers(sharing: str) -> None:
    model, x, y = _chunked(), torch.randn(5, 4, 4), torch.randint(3, (5,))
    apart = _Apart(model.w, model.b, model.top)
    quantities = KFLR(sharing), KFLR(sharing, joint=True)
    seen = watch(model, x, y, *quantities)
    one, joint = (seen[q] for q in quantities)
    want = oracle.kfac_factors(apart, lambda: apart(x), lambda z: F.cross_entropy(z, y), sharing=sharing)
    names = {"w[0]": "q.weight", "w[1]": "k.weight", "top": "top.weight"}
    for i in (0, 1):
        oracle.assert_close({n: one.factors[n][i] for n in names}, {n: want[k][i] for n, k in names.items()})
    oracle.assert_close({f"b[{i}]": one.factors[f"b[{i}]"][0] for i in (0, 1)},
                        {f"b[{i}]": want[k][1] for i, k in enumerate(("q.weight", "k.weight"))})  # fmt: skip
    assert one.forms == {"w": "slices", "b": "slices", "top": "rows"}
    assert joint.blocks.keys() == one.blocks.keys()  # a bias in slices keeps its own blocks


def _block_diagonal(operator: Kronecker | EigenKronecker) -> Tensor:
    """The whole matrix of `_chunked`'s w, from the rows of each slice."""
    a = torch.zeros(24, 24)
    for i in (0, 1):
        A, B = operator.factors[f"w[{i}]"]
        a[12 * i : 12 * i + 12, 12 * i : 12 * i + 12] = torch.kron(B[0], A[0])
    return a


def test_operators_of_slices() -> None:
    """Products, inverses, traces and determinants are those of the dense matrix."""
    model, x, y = _chunked(), torch.randn(50, 4, 4), torch.randint(3, (50,))
    kflr = watch(model, x, y, KFLR()).kflr
    dense, eye = _block_diagonal(kflr), torch.eye(24)
    oracle.assert_close(kflr.to_dense("w"), dense)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def product(matrix: Tensor) -> Tensor:
        return (matrix @ v["w"].flatten()).view(6, 4)

    oracle.assert_close((kflr @ v)["w"], product(dense))
    exact = torch.linalg.inv(dense + 0.1 * eye)
    oracle.assert_close((kflr.inverse(0.1, exact=True) @ v)["w"], product(exact))
    oracle.assert_close((kflr.eigh().inverse(0.1) @ v)["w"], product(exact))
    factored = Kronecker({n: b for n, b in kflr.blocks.items() if b.parameter == "w"}).inverse(0.1)
    oracle.assert_close((kflr.inverse(0.1) @ v)["w"], product(_block_diagonal(factored)))
    oracle.assert_close(kflr.trace(), sum(kflr.to_dense(name).trace() for name in v))
    oracle.assert_close(kflr.logdet(0.1), sum(torch.logdet(d + 0.1 * torch.eye(len(d))) for d in
                                              (kflr.to_dense(name) for name in v)))  # fmt: skip
    assert "w[1]: [K,O,I] = [1, 3, 4] from slices" in repr(kflr)
    with pytest.raises(errors.BadInput, match="lacks"):
        kflr @ {"w": v["w"]}


def test_elements_that_no_use_reads() -> None:
    """They have curvature zero, and the damped inverse divides them by the damping."""
    model = Apply(lambda m, x: F.linear(x, m.w[1:4]), w=leaf(5, 4))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    seen = watch(model, x, y, KFLR(), EKFAC(None))
    assert list(seen.kflr.blocks) == ["w[0]", "w[rest]"]
    dense = seen.kflr.to_dense("w")
    assert not dense[:4].any() and not dense[:, 16:].any()
    v = {"w": torch.randn(5, 4)}
    want = torch.linalg.inv(dense + 0.01 * torch.eye(20)) @ v["w"].flatten()
    oracle.assert_close((seen.kflr.inverse(0.01, exact=True) @ v)["w"].flatten(), want)
    oracle.assert_close((seen.kflr.inverse(0.01) @ v)["w"][0], v["w"][0] / 0.01)
    oracle.assert_close((seen.ekfac.inverse(0.01) @ v)["w"][4], v["w"][4] / 0.01)
    assert float(seen.kflr.logdet()) == -float("inf")


def test_one_layout_from_inputs_of_several_kinds() -> None:
    """A table that is looked up, summed over bags, and multiplied by weights of all its rows."""
    soft = torch.rand(5, 6)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return (F.embedding(x, m.w).sin().mean(1) + F.embedding_bag(x, m.w, mode="sum").cos()) + (soft @ m.w).tanh()

    model, x, y = Apply(forward, w=leaf(6, 3)), torch.randint(6, (5, 2)), torch.randint(3, (5,))
    for sharing in ("expand", "reduce"):
        seen = watch(model, x, y, KFLR(sharing), EKFAC(None))
        assert seen.kflr.forms == {"w": "rows"}
        hot = F.one_hot(x, 6).double()
        a = torch.cat([hot, hot.sum(1, keepdim=True), soft[:, None]], 1)  # [N,T,I]
        a = a.mean(1, keepdim=True) if sharing == "reduce" else a
        oracle.assert_close(seen.kflr.factors["w"][0], torch.einsum("nti,ntj->ij", a, a)[None] / a.shape[:2].numel())
    params = dict(model.named_parameters())
    ggn = oracle.ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    oracle.assert_close(seen.ekfac.trace(), ggn.trace())


# From gradients ---------------------------------------------------------------------------------

FROM_GRADIENTS: dict[str, tuple[Forward, dict[str, Tensor]]] = {
    "exp": (lambda m, x: F.linear(x, m.w.exp()), {"w": (3, 4)}),
    "product": (lambda m, x: F.linear(x, m.up @ m.w), {"w": (2, 4), "up": (3, 2)}),
    "transposed": (lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t())[:, :3], {"w": (4, 4)}),
    "overlapping": (lambda m, x: F.linear(x, m.w[:3]) + F.linear(x, m.w[1:4]).sin(), {"w": (4, 4)}),
    "scalar": (lambda m, x: x[:, :3] * m.w.exp(), {"w": ()}),
    "vector": (lambda m, x: x[:, :3] * torch.softmax(m.w, 0), {"w": (3,)}),
    "three axes": (lambda m, x: torch.einsum("ni,abi,b->na", x, m.w.sin(), x.new_ones(2)), {"w": (3, 2, 4)}),
    "used in both forms": (lambda m, x: F.linear(x, m.w) + F.linear(x.cos(), m.w.abs()), {"w": (3, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", FROM_GRADIENTS)
def test_factors_from_gradients(name: str, sharing: str) -> None:
    forward, shapes = FROM_GRADIENTS[name]
    model = Apply(forward, **{key: leaf(*shape) for key, shape in shapes.items()})
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    kflr = watch(model, x, y, KFLR(sharing)).kflr
    for key in shapes:
        found = columns(model, x, y, key)
        a, b = gradient_factors(found)
        block = kflr.blocks[key]
        assert block.form == "gradients" and "from gradients" in repr(kflr)
        oracle.assert_close(block.B, b)
        oracle.assert_close(block.input_factor, a)
        oracle.assert_close(block.trace(), found.square().sum())  # that of the GGN's own block
        oracle.assert_close(kflr.to_dense(key), torch.kron(b[0], a[0]))


def test_rank_one_is_exact() -> None:
    """One sample and two classes: the block is the product of one gradient with itself, a Kronecker product."""
    model = Apply(lambda m, x: F.linear(x, m.up @ m.down), up=leaf(2, 1), down=leaf(1, 4))
    x, y = torch.randn(1, 4), torch.randint(2, (1,))
    kflr, params = watch(model, x, y, KFLR()).kflr, dict(model.named_parameters())
    ggn = oracle.ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    oracle.assert_close(kflr.to_dense("up"), ggn[:2, :2])
    oracle.assert_close(kflr.to_dense("down"), ggn[2:, 2:])


def test_many_gradients_are_never_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of single samples and columns the factors are the same."""
    from layerwise.gradient import parameter as gradients

    instance = case("lora").make()
    with lw.observe(instance.subject, KFLR()) as whole:
        instance.loss().backward()
    seen_sizes, plain = [], gradients.ParameterGradient.per_sample

    def keep(self: gradients.ParameterGradient, start: int = 0, stop: int | None = None) -> Tensor:
        seen_sizes.append(plain(self, start, stop).shape[:2])
        return plain(self, start, stop)

    monkeypatch.setattr(gradients, "_CHUNK", 1)
    monkeypatch.setattr(gradients.ParameterGradient, "per_sample", keep)
    with lw.observe(instance.subject, KFLR()) as few:
        instance.loss().backward()
    assert set(seen_sizes) == {(1, 1)}
    for name, factors in whole.kflr.factors.items():
        for got, want in zip(few.kflr.factors[name], factors, strict=True):
            oracle.assert_close(got, want)


def test_a_long_side_has_a_diagonal_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On either side of the matrix, and for a vector."""
    monkeypatch.setattr(layouts, "LONG_SIDE", 3)
    monkeypatch.setattr("layerwise.rows.gram.LONG_SIDE", 3)
    model = Apply(
        lambda m, x: F.linear(x * m.v.exp(), m.w.sin()) + F.linear(x, m.t.cos() @ m.s), w=leaf(3, 4), v=leaf(4),
        t=leaf(3, 2), s=leaf(2, 4),
    )  # fmt: skip
    model.t = leaf(3, 5)
    model.s = leaf(5, 4)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    kflr = watch(model, x, y, KFLR()).kflr
    for name, turned in (("w", False), ("v", True), ("t", False), ("s", True)):
        p = dict(model.named_parameters())[name]
        d = columns(model, x, y, name).reshape(-1, p.shape[0], p[0].numel())
        d = d.mT if turned else d
        block = kflr.blocks[name]
        b = torch.einsum("moi,mpi->op", d, d)
        oracle.assert_close(block.B[0], b)
        oracle.assert_close(block.A[0], d.square().sum((0, 1)) / b.trace())
        v = {n: torch.randn_like(q) for n, q in model.named_parameters()}
        dense = kflr.to_dense(name)
        oracle.assert_close((kflr @ v)[name].flatten(), dense @ v[name].flatten())


def test_zero_curvature_has_zero_factors() -> None:
    """Dead units: no division by the trace."""
    model = Apply(lambda m, x: F.linear(F.relu(F.linear(x, m.w.exp()) - 1e3), m.u), w=leaf(3, 4), u=leaf(3, 3))
    seen = watch(model, torch.randn(5, 4), torch.randint(3, (5,)), KFLR(), EKFAC(None))
    assert not seen.kflr.blocks["w"].A.any() and not seen.kflr.blocks["w"].B.any()
    assert not seen.ekfac.eigenvalues["w"].any()


def test_sampled_factors_estimate_the_exact_ones() -> None:
    instance = case("lora").make()
    with lw.observe(instance.subject, KFLR()) as seen:
        instance.loss().backward()
    want, kfac, found = seen.kflr.blocks, KFAC(300, torch.Generator().manual_seed(0)), []
    for _ in range(20):
        with lw.observe(instance.subject, kfac) as seen:
            instance.loss().backward()
        found.append({name: block.B for name, block in seen.kfac.blocks.items()})
    for name, block in want.items():
        values = torch.stack([f[name] for f in found])
        error = values.std(0) / len(found) ** 0.5
        assert ((values.mean(0) - block.B).abs() <= 4 * error + 1e-12).all()
        assert float(error.max()) <= 0.2 * float(block.B.abs().max())


def test_samples_are_told_apart_only_where_gradients_are_needed() -> None:
    """Batch norm in training: rows need no samples, gradients of single samples do."""
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    assert set(watch(norm, x, y, KFAC()).kfac.forms.values()) == {"rows"}
    nn.utils.parametrizations.weight_norm(norm[2])
    with pytest.raises(errors.SamplesMixed):
        watch(norm, x, y, KFAC())


# Several batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("problem", ["lora", "chunked", "tied_embedding", "attention_cross", "weight_norm"])
@pytest.mark.parametrize("make", [KFLR, lambda: EKFAC(None)], ids=["KFLR", "EKFAC"])
def test_two_parts_are_the_whole(make: Callable[[], Quantity], problem: str, reduction: str) -> None:
    instance = case(problem).make()
    x, model = instance.x, instance.subject
    z = model(x)
    y = torch.randint(z.shape[1], (z.shape[0], *z.shape[2:]))
    parts, whole = make(), make()
    with lw.observe(model, parts) as seen:
        for i in (slice(0, 1), slice(1, None)):
            loss = F.cross_entropy(model(x[i]), y[i], reduction=reduction)
            (loss * (len(y[i]) / len(y)) if reduction == "mean" else loss).backward()
    with lw.observe(model, whole) as once:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    names = [name for name, p in instance.params.items() if p.grad is not None]
    oracle.assert_close(
        {name: seen[parts].to_dense(name) for name in names}, {name: once[whole].to_dense(name) for name in names}
    )
    assert seen[parts].forms == once[whole].forms


def test_batches_that_use_a_parameter_otherwise_are_refused() -> None:
    model = Apply(lambda m, x: F.linear(x, m.w[:3] if float(x[0, 0]) > 0 else m.w[1:]), w=leaf(4, 4))
    x, y = torch.rand(5, 4), torch.randint(3, (5,))
    asked = r"'w' over two batches .* from element 0 and .* from element 4\)"
    with pytest.raises(errors.Undefined, match=asked), lw.observe(model, KFLR()):
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(-x), y).backward()
    turned = Apply(lambda m, x: F.linear(x, m.w if float(x[0, 0]) > 0 else m.w.t()), w=leaf(4, 4))
    asked = r"'w' over two batches .* with strides \[0, 4, 1\] .* and .* with strides \[0, 1, 4\]"
    with pytest.raises(errors.Undefined, match=asked), lw.observe(turned, KFLR()):
        F.cross_entropy(turned(x), y).backward()
        F.cross_entropy(turned(-x), y).backward()


# The eigenbasis given ---------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["conv2d", "mlp_tanh", "lora", "chunked", "tied_embedding", "embedding_pool"])
def test_ekfac_in_a_given_basis(problem: str) -> None:
    """In its own basis it is itself; in another it is the GGN's diagonal there."""
    instance, ekfac = case(problem).make(), EKFAC(None)
    with lw.observe(instance.subject, ekfac, KFLR()) as first:
        instance.loss().backward()
    same, other = EKFAC(None, basis=first[ekfac]), EKFAC(None, basis=first.kflr.inverse(0.1))
    with lw.observe(instance.subject, same, other) as seen:
        instance.loss().backward()
    assert seen[same].blocks.keys() == first[ekfac].blocks.keys()
    oracle.assert_close(seen[same].eigenvalues, first[ekfac].eigenvalues)
    used = {name: p for name, p in instance.params.items() if p.grad is not None}
    ggn, start = oracle.ggn(used, instance.logits, instance.loss_of), 0
    got, want = {}, {}
    for name, p in used.items():
        g = ggn[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
        for key, block in ((k, b) for k, b in seen[other].blocks.items() if (b.parameter or k) == name):
            eye = torch.eye(block.size.numel()).view(-1, *block.size)
            q = block.fold(block.rotate_back(eye)).reshape(len(eye), -1)
            got[key], want[key] = block.spectrum.flatten(), torch.einsum("jp,pq,jq->j", q, g, q)
    oracle.assert_close(got, want)


def test_a_basis_that_does_not_fit_is_refused() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), torch.randint(3, (5,))
    kflr = watch(model, x, y, KFLR()).kflr
    joint = watch(model, x, y, KFLR(joint=True)).kflr
    turned = {
        n: KroneckerBlock(b.B, b.A, MatrixLayout.whole((3, 4), (1, 4, 3), (0, 2, 1))) if n == "0.weight" else b
        for n, b in kflr.blocks.items()
    }
    single = Kronecker({n: replace(b, B=b.B.float(), A=None if b.A is None else b.A.float())
                        for n, b in kflr.blocks.items()})  # fmt: skip
    for basis in (Kronecker({"0.weight": kflr.blocks["0.weight"]}), joint, Kronecker(turned), single):
        with pytest.raises(errors.BadInput, match="basis"):
            watch(model, x, y, EKFAC(None, basis=basis))
    with pytest.raises(errors.BadInput, match="basis is a dict"):
        EKFAC(basis={})  # type: ignore[arg-type]


def test_the_root_and_the_spectrum_agree() -> None:
    """EKFAC's eigenvalues from gradients are sums of squares of the root's columns in the basis."""
    instance = case("weight_norm").make()
    generator = torch.Generator().manual_seed(3)
    with lw.observe(instance.subject, EKFAC(3, generator), SqrtGGN(3, generator)) as seen:
        instance.loss().backward()
    for name, block in seen.ekfac.blocks.items():
        eye = torch.eye(block.size.numel()).view(-1, *block.size)
        q = block.fold(block.rotate_back(eye)).reshape(len(eye), -1)
        root = seen.sqrt_ggn[name].flatten(0, 1).reshape(-1, len(eye))
        oracle.assert_close(block.spectrum.flatten(), (root @ q.T).square().sum(0))


def test_pooled_positions() -> None:
    """`Mean` over positions of a layer with a derived weight: D is summed over positions before it is squared."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), Mean(1))
    x, y = torch.randn(5, 6, 4), torch.randint(3, (5,))
    kflr = watch(model, x, y, KFLR()).kflr
    for name in ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"):
        a, b = gradient_factors(columns(model, x, y, name))
        oracle.assert_close(kflr.blocks[name].B, b)
        oracle.assert_close(kflr.blocks[name].input_factor, a)


def test_the_optimizer_has_factors_of_slices_and_a_diagonal_of_products() -> None:
    """Slices, one slice alone, a product."""
    model = Apply(
        lambda m, x: F.linear(F.linear(x, m.w[1:4]).tanh() + F.linear(x, m.v[:3]) * F.linear(x, m.v[3:]), m.a @ m.b),
        w=leaf(5, 4), v=leaf(6, 4), a=leaf(3, 2), b=leaf(2, 3),
    )  # fmt: skip
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    opt = lw.optim.KFAC(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt.step(lambda: F.cross_entropy(model(x), y))
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert opt.describe() == {
        "w": "kfac [1, 3, 4]", "v": "kfac [1, 3, 4]; kfac [1, 3, 4]",
        "a": "diag-ggn (draws=1)", "b": "diag-ggn (draws=1)",
    }  # fmt: skip
