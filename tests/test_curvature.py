"""Curvature operators: products, blocks, forms and refusals, against dense matrices by brute force."""

from __future__ import annotations

import importlib
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from support_page import table_cases
from torch import Tensor, nn
from zoo import Case, Instance, cases

import layerwise as lw
from layerwise import errors
from layerwise.graph.products import check_second

pytestmark = pytest.mark.usefixtures("float64")

TABLE = table_cases()  # whose products test_matrix.py compares with the dense matrices
CASES = [c for c in cases() if c.loss.name not in ("ce_module", "mse_scaled", "ce_user_mean")]


def _owner(params: dict[str, Tensor]) -> Tensor:
    """`[P]`: which parameter an element is of."""
    return torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(params.values())])


def _block_mask(params: dict[str, Tensor]) -> Tensor:
    """True in the diagonal blocks of the parameters."""
    owner = _owner(params)
    return owner[:, None] == owner[None, :]


def _operators(instance: Instance, kind: type[Any], **options: Any) -> Any:
    return kind(instance.subject, instance.loss, **options)


@one_in(2, case=[c for c in CASES if c in TABLE])
def test_the_zoos_blocks_are_those_of_the_whole(case: Case) -> None:
    instance = case.make(seed=0)
    owner = _owner(instance.params)
    v = torch.randn(len(owner), generator=torch.Generator().manual_seed(3))
    parts = torch.stack([v * (owner == i) for i in range(len(instance.params))], 1)
    for kind in (lw.Hessian, lw.GGN):
        whole, blocks = _operators(instance, kind), _operators(instance, kind, blocks="parameter")
        oracle.assert_close(blocks @ v, (whole @ parts)[torch.arange(len(owner)), owner])
    assert all(p.grad is None for p in instance.params.values())


@one_in(3, case=[c for c in CASES if c not in TABLE])
def test_operators_equal_the_dense_matrices(case: Case) -> None:
    instance = case.make(seed=0)
    params = instance.params
    with oracle.plain_operations():
        want = {
            lw.Hessian: oracle.hessian(params, instance.loss),
            lw.GGN: oracle.ggn(params, instance.logits, instance.loss_of),
        }
    oracle.assert_close(want[lw.Hessian], want[lw.Hessian].T)
    mask = _block_mask(params)
    for kind, matrix in want.items():
        whole = _operators(instance, kind)
        assert whole.names == list(params)
        assert whole.shape == tuple(matrix.shape)
        v = torch.randn(len(matrix), 3, generator=torch.Generator().manual_seed(3))
        oracle.assert_close(whole @ v, matrix @ v)
        blocks = _operators(instance, kind, blocks="parameter")
        oracle.assert_close(blocks @ v[:, 0], (matrix * mask) @ v[:, 0])
    assert all(p.grad is None for p in params.values())


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def made() -> tuple[nn.Sequential, Any]:
    model = _mlp()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
    return model, lambda: F.cross_entropy(model(x), y)


KINDS = pytest.mark.parametrize("kind", [lw.GGN, lw.Hessian])


@KINDS
def test_vectors_stacks_and_mappings_agree(made: Any, kind: type[Any]) -> None:
    model, closure = made
    op = kind(model, closure)
    size = op.shape[0]
    v = torch.randn(size, 4)
    dense = op.to_dense()
    oracle.assert_close(dense, dense.T)
    oracle.assert_close(op @ v, dense @ v)
    oracle.assert_close(op @ v[:, 0], dense @ v[:, 0])
    assert (op @ v[:, :0]).shape == (size, 0)
    sizes = [p.numel() for p in model.parameters()]
    named = {
        name: part.T.reshape(-1, *p.shape)
        for (name, p), part in zip(model.named_parameters(), v.split(sizes), strict=True)
    }
    want = (dense @ v).split(sizes)
    stacked = op @ named
    single = op @ {name: part[1] for name, part in named.items()}
    for (name, p), part in zip(model.named_parameters(), want, strict=True):
        oracle.assert_close(stacked[name], part.T.reshape(-1, *p.shape))
        oracle.assert_close(single[name], part.T.reshape(-1, *p.shape)[1])
    reversed_names = dict(reversed(named.items()))
    assert list(op @ reversed_names) == list(reversed_names)


@KINDS
def test_blocks_are_those_of_the_whole(made: Any, kind: type[Any]) -> None:
    model, closure = made
    whole, blocks = kind(model, closure).to_dense(), kind(model, closure, blocks="parameter").to_dense()
    mask = _block_mask(dict(model.named_parameters()))
    oracle.assert_close(blocks, whole * mask)
    assert float((whole * ~mask).abs().max()) > 1e-3


@KINDS
def test_scipy_sees_the_same_matrix(made: Any, kind: type[Any]) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    op = kind(*made)
    ours = op.to_scipy()
    dense = op.to_dense()
    v = torch.randn(op.shape[0], 3)
    oracle.assert_close(torch.from_numpy(ours @ v.numpy()), dense @ v)
    oracle.assert_close(torch.from_numpy(ours @ v[:, 0].numpy()), dense @ v[:, 0])
    oracle.assert_close(torch.from_numpy(ours @ v[:, :1].numpy()), dense @ v[:, :1])
    largest = linalg.eigsh(ours, k=1, which="LM", return_eigenvectors=False)
    values = torch.linalg.eigvalsh(dense)
    assert abs(largest[0]) == pytest.approx(float(values.abs().max()), rel=1e-8)


def test_without_scipy_the_error_is_ours(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(errors.BadInput, match="scipy"):
        lw.GGN(*made).to_scipy()


def test_attention_of_fused_kernels() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, 4, 3) for _ in range(3))
    w = {"w": torch.randn(3, 3, requires_grad=True)}

    def closure() -> Tensor:
        return F.mse_loss(F.scaled_dot_product_attention(q @ w["w"], k, v), v)

    want = torch.autograd.functional.hessian(
        lambda u: F.mse_loss(((q @ u.view(3, 3)) @ k.mT / 3**0.5).softmax(-1) @ v, v), w["w"].detach().flatten()
    )
    oracle.assert_close(lw.Hessian(w, closure).to_dense(), want)
    with pytest.raises(errors.Undefined, match="differentiated twice"):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def fused() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return closure()

        lw.Hessian(w, fused) @ torch.ones(9)


def test_batched_second_derivatives_that_torch_gets_wrong_are_not_used() -> None:
    torch.manual_seed(0)
    for shape in ((2, 4, 3), (3, 4, 3), (4, 4, 4)):  # torch fails on some shapes and is wrong on others
        w, x = {"w": torch.randn(4, 4, requires_grad=True)}, torch.randn(shape)

        def closure(w: dict[str, Tensor] = w, x: Tensor = x) -> Tensor:
            return F.group_norm(torch.einsum("oc,nct->not", w["w"], x).tanh(), 2).pow(3).sum()

        oracle.assert_close(lw.Hessian(w, closure).to_dense(), oracle.hessian(w, closure))


def test_hessian_and_ggn_of_any_loss_of_the_outputs(made: Any) -> None:
    model, _ = made
    x = torch.randn(6, 4)
    unknown = lambda: model(x).pow(4).sum() + 1e-2 * sum(p.pow(3).sum() for p in model.parameters())  # noqa: E731
    oracle.assert_close(lw.Hessian(model, unknown).to_dense(), oracle.hessian(oracle.parameters(model), unknown))
    parameters = oracle.parameters(model)
    want = oracle.ggn(parameters, lambda: model(x), lambda z: z.pow(4).sum())
    oracle.assert_close(lw.GGN(model, lambda: model(x).pow(4).sum()).to_dense(), want)
    weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    with pytest.raises(errors.UnknownLoss, match="as_loss"):
        lw.GGN(weights, lambda: torch.func.functional_call(model, weights, (x,)).pow(4).sum())
    with pytest.raises(errors.Undefined, match="directly"):
        lw.GGN(model, lambda: F.mse_loss(model(x), x[:, :3]) + model[0].weight.pow(2).sum())
    want = oracle.ggn(parameters, lambda: model(x), lambda z: F.mse_loss(z, x[:, :3]) ** 2)
    oracle.assert_close(lw.GGN(model, lambda: F.mse_loss(model(x), x[:, :3]) ** 2).to_dense(), want)
    with pytest.raises(errors.Undefined):
        lw.GGN(model, lambda: F.l1_loss(model(x), x[:, :3])) @ torch.ones(43)


class _Square(torch.autograd.Function):
    """A block that the tape cannot see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w * w, (2 * g * x * w).sum(0)


class _Once(_Square):
    """The same, without a second derivative."""

    backward = staticmethod(torch.autograd.function.once_differentiable(_Square.backward))


def test_parameters_in_blocks_that_the_tape_cannot_see() -> None:
    torch.manual_seed(0)
    w, x, y = {"w": torch.randn(3, requires_grad=True)}, torch.randn(5, 3), torch.randn(5, 3)
    for kind in (lw.Hessian, lw.GGN):
        got = kind(w, lambda: F.mse_loss(_Square.apply(x, w["w"]), y)).to_dense()
        want = kind(w, lambda: F.mse_loss(x * w["w"] * w["w"], y)).to_dense()
        oracle.assert_close(got, want)
        with pytest.raises(errors.Undefined, match="twice"):
            kind(w, lambda: F.mse_loss(_Once.apply(x, w["w"]), y)) @ torch.ones(3)


def test_what_the_closure_may_not_do(made: Any) -> None:
    model, closure = made
    with pytest.raises(errors.BadInput, match="called backward"):
        lw.GGN(model, lambda: closure().backward())
    with pytest.raises(errors.BadInput, match="returned NoneType"):
        lw.GGN(model, lambda: None)
    with pytest.raises(errors.BadInput, match="one number"):
        lw.Hessian(model, lambda: model(torch.randn(2, 4)))
    with pytest.raises(errors.BadInput, match="no parameter"):
        lw.Hessian(model, lambda: closure().detach())
    with pytest.raises(errors.NonFinite):
        lw.GGN(model, lambda: closure() * torch.nan)
    with pytest.raises(errors.BadInput, match="closure"):
        lw.GGN(model, closure())
    with pytest.raises(errors.BadInput, match="blocks"):
        lw.GGN(model, closure, blocks="layer")
    assert all(p.grad is None for p in model.parameters())


def test_changed_parameters_are_refused(made: Any) -> None:
    model, closure = made
    op = lw.Hessian(model, closure)
    with torch.no_grad():
        last = list(dict(model.named_parameters()))[-1]
        dict(model.named_parameters())[last].add_(1.0)
    with pytest.raises(errors.BadInput, match=f"'{last}' has changed since"):
        op @ torch.ones(op.shape[0])
    op = lw.GGN(model, closure)
    model.float()  # swaps the data
    with pytest.raises(errors.BadInput, match="changed"):
        op @ torch.ones(op.shape[0])


@pytest.mark.parametrize(
    "v",
    [torch.ones(3), torch.ones(43, 1, 1), torch.ones(43, dtype=torch.long), {"0.weight": torch.ones(5, 4)}, [1.0]],
    ids=["short", "cube", "integer", "names", "list"],
)
def test_directions_that_do_not_fit(made: Any, v: Any) -> None:
    with pytest.raises(errors.BadInput):
        lw.GGN(*made) @ v


def test_stacks_of_different_lengths_are_refused(made: Any) -> None:
    model, closure = made
    v = {name: torch.ones(2 + (i == 0), *p.shape) for i, (name, p) in enumerate(model.named_parameters())}
    with pytest.raises(errors.BadInput, match="alike"):
        lw.Hessian(model, closure) @ v


def test_float32(made: Any) -> None:
    model, _ = made
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=generator).float(), torch.randint(3, (6,), generator=generator)
    model.float()
    for kind in (lw.GGN, lw.Hessian):
        single = kind(model, lambda: F.cross_entropy(model(x), y)).to_dense()
        copy = _mlp()
        copy.load_state_dict(model.state_dict())
        double = kind(copy, lambda copy=copy: F.cross_entropy(copy(x.double()), y)).to_dense()
        assert single.dtype == torch.float32
        oracle.assert_close(single.double(), double, rel=1e-5)


def test_mixed_types() -> None:
    torch.manual_seed(0)
    p = {"a": torch.randn(3, requires_grad=True), "b": torch.randn(3).float().requires_grad_()}
    x = torch.randn(5, 3)
    op = lw.Hessian(p, lambda: (x * p["a"].exp() * p["b"].double()).pow(2).sum())
    assert op.dtype == torch.float64
    dense = op.to_dense()
    q = {name: v.detach().double().requires_grad_() for name, v in p.items()}
    oracle.assert_close(dense, oracle.hessian(q, lambda: (x * q["a"].exp() * q["b"]).pow(2).sum()), rel=1e-5)
    assert {name: v.dtype for name, v in (op @ p).items()} == {"a": torch.float64, "b": torch.float32}


def test_second_derivatives_that_torch_gets_wrong() -> None:
    """Weight norm of a convolution: torch's own Hessian is not even symmetric."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 2))
    x, y = torch.randn(2, 2, 3, 3), torch.randn(2, 3, 2, 2)
    loss = lambda: F.mse_loss(layer(x).tanh(), y)  # noqa: E731
    params = oracle.parameters(layer)
    got = lw.Hessian(layer, loss).to_dense()
    step, rows = 1e-5, []
    for p in params.values():
        for i in range(p.numel()):
            sides = []
            for sign in (1, -2, 1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                sides.append(torch.cat([g.flatten() for g in oracle.gradient(params, loss).values()]))
            rows.append((sides[0] - sides[1]) / (2 * step))
    oracle.assert_close(got, torch.stack(rows), rel=1e-7)


class _Detached(_Square):
    """The same, whose backward forgets that the derivative by `w` depends on `x`."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w * w, (2 * g * x.detach() * w).sum(0)


def test_a_wrong_second_derivative_is_refused_by_the_name_of_its_function() -> None:
    torch.manual_seed(0)
    p = {"a": torch.randn(5, 3, requires_grad=True), "b": torch.randn(3, requires_grad=True)}
    lw.Hessian(p, lambda: _Square.apply(p["a"], p["b"]).sum())
    with pytest.raises(errors.Undefined, match="_DetachedBackward"):
        lw.Hessian(p, lambda: _Detached.apply(p["a"], p["b"]).sum())


def test_an_asymmetric_hessian_is_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(errors.Undefined, match="not symmetric"):
        check_second([torch.randn(3, 3) @ x], [x])


def _by_hand(index: Tensor, table: Tensor, offsets: list[int], weights: Tensor | None, **options: Any) -> Tensor:
    """`F.embedding_bag`, one bag after another."""
    found = []
    for start, stop in zip(offsets, [*offsets[1:], len(index)], strict=True):
        places = [i for i in range(start, stop) if int(index[i]) != options.get("padding_idx")]
        rows = [table[index[i]] * (1 if weights is None else weights[i]) for i in places]
        some = torch.stack(rows) if rows else table.new_zeros(1, table.shape[1])
        found.append({"sum": some.sum(0), "mean": some.mean(0), "max": some.amax(0)}[options["mode"]])
    return torch.stack(found)


BAGS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "mean, sparse": {"mode": "mean", "sparse": True},
    "mean, a padding row": {"mode": "mean", "padding_idx": 2},
    "max, a padding row": {"mode": "max", "padding_idx": 2},
    "sum, learned weights": {"mode": "sum", "weighted": True},
    "sum, ends given": {"mode": "sum", "include_last_offset": True},
    "max, ends given": {"mode": "max", "include_last_offset": True},
}


@pytest.mark.parametrize("name", BAGS)
def test_operators_through_embedding_bags_are_exact_though_torch_cannot_differentiate_them_twice(name: str) -> None:
    options = dict(BAGS[name])
    index, starts, y = torch.tensor([0, 2, 3, 1, 2, 2, 4, 0]), [0, 3, 4, 4], torch.tensor([0, 1, 1, 0])
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 2)})
    model.importance = nn.Parameter(torch.rand(8)) if options.pop("weighted", False) else None
    table, weights = model["table"].weight, model.importance
    ends = [*starts, len(index)] if options.get("include_last_offset") else starts

    def logits() -> Tensor:
        bags = F.embedding_bag(index, table, torch.tensor(ends), per_sample_weights=weights, **options)
        return model["head"](bags.tanh())

    def plain() -> Tensor:
        return model["head"](_by_hand(index, table, starts, weights, **options).tanh())

    params, loss_of = oracle.parameters(model), lambda z: F.cross_entropy(z, y)
    want = oracle.ggn(params, plain, loss_of)
    oracle.assert_close(lw.GGN(model, lambda: loss_of(logits())).to_dense(), want)
    oracle.assert_close(
        lw.Hessian(model, lambda: loss_of(logits())).to_dense(), oracle.hessian(params, lambda: loss_of(plain()))
    )
