"""Tables, sparse data, parameters without elements, and models that change: exact, or a typed error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from quantity_checks import dense_factors
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath", "ignore:Sparse"),
]

IDS, Y = torch.tensor([[1, 1, 2], [0, 4, 4], [4, 4, 4], [5, 0, 2], [1, 2, 3]]), torch.tensor([0, 1, 2, 1, 0])


class Words(nn.Module):
    """A table, its rows averaged, and a head."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.table(x)
        return self.head((z.mean(1) if z.dim() == 3 else z).tanh())


class Product(nn.Module):
    """A product with sparse data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight, self.linear = kind, nn.Parameter(torch.randn(6, 3)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to_sparse_csr() if "csr" in self.kind else x.to_sparse()
        if "linear" in self.kind:
            return self.linear(x).tanh()
        return (torch.sparse.mm(x, self.weight) if "mm" in self.kind else x @ self.weight).tanh()


class Empty(nn.Module):
    """Layers without inputs or outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first = kind, nn.Linear(6, 3)
        with pytest.warns(UserWarning, match="zero-element"):
            self.none = nn.Linear(0, 3) if kind == "inputs" else nn.Linear(6, 0)
        self.rows, self.number = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.kind == "inputs":
            return z + self.none(x[:, :0])
        if self.kind == "outputs":
            return torch.cat([z, self.none(x)], 1)
        return z + self.rows.sum(0)


DATA = torch.randn(5, 6, dtype=torch.float64) * torch.tensor([1.0, 0, 0, 1, 0, 1], dtype=torch.float64)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "scaled": (lambda: Words(nn.Embedding(6, 4, scale_grad_by_freq=True)), IDS),
    "scaled_padding": (lambda: Words(nn.Embedding(6, 4, scale_grad_by_freq=True, padding_idx=4)), IDS),
    "sparse": (lambda: Words(nn.Embedding(6, 4, sparse=True)), IDS),
    "sparse_padding": (lambda: Words(nn.Embedding(6, 4, sparse=True, padding_idx=4)), IDS),
    "bag": (lambda: Words(nn.EmbeddingBag(6, 4, mode="sum", sparse=True)), IDS),
    "bag_mean": (lambda: Words(nn.EmbeddingBag(6, 4, sparse=True)), IDS),
    **{kind: ((lambda kind=kind: Product(kind)), DATA) for kind in ("coo", "csr", "coo mm", "coo linear", "csr mm")},
    **{kind: ((lambda kind=kind: Empty(kind)), DATA) for kind in ("inputs", "outputs", "rows")},
}


@pytest.mark.parametrize("name", MODELS)
def test_quantities_are_exact(name: str) -> None:
    model, x = MODELS[name][0](), MODELS[name][1]
    loss_of = lambda z: F.cross_entropy(z, Y)  # noqa: E731
    sparse = getattr(getattr(model, "table", None), "sparse", False)
    if sparse:
        model.table.sparse = False  # type: ignore[union-attr, assignment]  # brute force reshapes gradients
    used = {n for n, p in model.named_parameters() if p.numel() and _reaches(model, x, p)}
    params = {n: p for n, p in model.named_parameters() if n in used}
    terms = lambda: F.cross_entropy(model(x), Y, reduction="none") / len(Y)  # noqa: E731
    grads = oracle.per_sample_grad(params, terms)
    diag_ggn = oracle.diag_ggn(params, lambda: model(x), loss_of)
    whole = oracle.ggn(dict(_named(model)), lambda: model(x), loss_of)
    if sparse:
        model.table.sparse = True  # type: ignore[union-attr, assignment]
    first = lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.PairwiseDot(), lw.NoiseScale()
    with lw.observe(model, *first, lw.DiagGGN(), lw.Sketch(4), lw.KFLR(), lw.EKFAC()) as seen:
        loss_of(model(x)).backward()
    for what, want in {
        "per_sample_grad": grads, "squared_norm": oracle.squared_norm(grads), "variance": oracle.variance(grads),
        "second_moment": oracle.second_moment(grads), "pairwise_dot": oracle.pairwise_dot(grads),
        "diag_ggn": diag_ggn,
    }.items():  # fmt: skip
        oracle.assert_close({n: v for n, v in getattr(seen, what).items() if n in used}, want)
    noise = {n: v for n, v in seen.noise_scale.noise.items() if n in used}
    oracle.assert_close(noise, oracle.noise_scale(grads, len(Y))["noise"])
    assert used <= set(dense_factors(seen.kflr))
    if "bag" in name:
        return  # torch has no second derivative of it
    ggn = lw.GGN(model, lambda: loss_of(model(x)))
    oracle.assert_close(ggn.to_dense(), whole)
    assert not sparse or model.table.weight.grad.is_sparse  # type: ignore[union-attr]


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _reaches(model: nn.Module, x: Tensor, p: Tensor) -> bool:
    return torch.autograd.grad(model(x).sum(), p, allow_unused=True)[0] is not None


@pytest.mark.parametrize("made", [lw.LocoProp, lw.AltMin, lw.optim.KFAC, lw.optim.DiagNewton])
@pytest.mark.parametrize("name", [name for name in MODELS if "scaled" not in name])
def test_optimizers_step(name: str, made: Any) -> None:
    model, x = MODELS[name][0](), MODELS[name][1]
    opt = made(model, lr=0.01)
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(model(x), Y))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not opt.skipped


@pytest.mark.parametrize("name", ["coo", "csr", "coo linear"])
@pytest.mark.parametrize("made", [lw.LocoProp, lw.AltMin, lw.optim.KFAC])
def test_steps_on_sparse_data_are_those_on_dense_data(name: str, made: Any) -> None:
    one, other = Product(name), Product(name)
    other.load_state_dict(one.state_dict())
    dense = lambda m: (m.linear(DATA) if "linear" in name else DATA @ m.weight).tanh()  # noqa: E731
    for model, run in ((one, lambda m: m(DATA)), (other, dense)):
        torch.manual_seed(0)
        made(model, lr=0.1).step(lambda model=model, run=run: F.cross_entropy(run(model), Y))
    oracle.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("name", ["scaled", "scaled_padding"])
def test_a_gradient_scaled_by_frequency_has_no_hessian(name: str) -> None:
    model = MODELS[name][0]()
    with pytest.raises(errors.Undefined, match="not symmetric"):
        lw.Hessian(model, lambda: F.cross_entropy(model(IDS), Y))
    with pytest.raises(errors.Undefined, match="not symmetric"), lw.observe(model, lw.DiagHessian()):
        F.cross_entropy(model(IDS), Y).backward()


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 4])
def test_bags_scaled_by_frequency_have_first_order_and_no_products(mode: str, padding: int | None) -> None:
    """Their rows are torch's own, which divides by the counts of other rows; no formula of it is symmetric."""
    model = Words(nn.EmbeddingBag(6, 4, mode=mode, scale_grad_by_freq=True, padding_idx=padding))
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        F.cross_entropy(model(IDS), Y).backward()
    oracle.assert_close(seen.per_sample_grad["table.weight"].sum(0), model.table.weight.grad)
    for operator in (lw.GGN, lw.Hessian):
        with pytest.raises(errors.Undefined, match="embedding_bag with scale_grad_by_freq=True"):
            made = operator(model, lambda: F.cross_entropy(model(IDS), Y))
            made @ {name: torch.ones_like(p) for name, p in model.named_parameters()}


# Models that change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(4, 3),
        lambda: nn.Conv1d(2, 3, 2),
        lambda: nn.Embedding(4, 3),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        lambda: nn.init.trunc_normal_(torch.empty(3), std=0.1),
        lambda: nn.init.orthogonal_(tensor=torch.empty(3, 3)),
    ],
    ids=["linear", "conv", "embedding", "transformer", "trunc_normal", "by_name"],
)
def test_a_module_may_be_built_inside(build: Callable[[], Any]) -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    with lw.observe(model, lw.Variance()) as seen:
        build()
        F.cross_entropy(model(x), Y).backward()
    assert set(seen.variance) == {"weight", "bias"}
    for made in (lw.LocoProp, lw.AltMin, lw.optim.KFAC):
        made(model, lr=0.1).step(lambda: (build(), F.cross_entropy(model(x), Y))[1])


@pytest.mark.parametrize("made", [lw.LocoProp, lw.AltMin, lw.optim.KFAC, lw.optim.DiagNewton])
@pytest.mark.parametrize("how", ["parameter", "module", "frozen", "assigned"])
def test_a_parameter_replaced_after_a_step_is_named(how: str, made: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(5, 4)
    opt = made(model, lr=0.1)
    opt.step(lambda: F.cross_entropy(model(x), Y))
    if how == "parameter":
        model[2].weight = nn.Parameter(torch.randn(3, 5))
    elif how == "module":
        model[2] = nn.Linear(5, 3)
    elif how == "frozen":
        model[2].weight = nn.Parameter(torch.randn(3, 5), requires_grad=False)
    else:
        model.load_state_dict({"2.weight": torch.randn(3, 5)}, strict=False, assign=True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(errors.BadInput, match=r"tensors of 2\.weight.* are no longer the model's"):
        opt.step(lambda: F.cross_entropy(model(x), Y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class _Full:
    """A call that finds no memory; on the CPU torch's error has no type of its own."""

    def __init__(self, text: str) -> None:
        self.__name__, self._text = "full", text

    def __call__(self, *args: Any) -> Tensor:
        raise RuntimeError(self._text)


@pytest.mark.parametrize("text", ["[enforce fail] DefaultCPUAllocator: can't allocate memory", "not enough memory"])
def test_out_of_memory_is_no_bad_input(text: str) -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="memory") as caught, lw.observe(model, lw.Variance()):
        torch.overrides.handle_torch_function(_Full(text), (model.weight,), x, model.weight)
    assert not isinstance(caught.value, errors.LayerwiseError)


class Overwritten(nn.Module):
    """Layers whose output is overwritten, wholly or for all rows but one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.deep = kind, nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
        self.layer, self.shift, self.head = nn.Linear(2, 2), nn.Parameter(torch.randn(2)), nn.Linear(2, 3)
        self.table = nn.Embedding(4, 2, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(self.deep(x) + (self.table(torch.arange(3) % 4)[:, None] if self.kind == "table" else 0))
        if self.kind in ("whole", "first"):
            z[:, : None if self.kind == "whole" else 1] = self.shift
        elif self.kind == "read":
            z = torch.einsum("nti,oi->nto", self.deep(x), self.layer.weight)
            z.add_(z.tanh())
            z[:, 0] = self.shift
            z.add_(self.shift)
        return self.head(F.softplus(z).mul(2).add(z.square()))


@pytest.mark.parametrize("kind", ["whole", "first", "read", "table"])
def test_second_order_of_overwritten_rows_and_sparse_tables(kind: str) -> None:
    model, x = Overwritten(kind), torch.randn(3, 2, 2)
    loss = lambda: model(x).cosh().log().mean()  # noqa: E731
    params = oracle.parameters(model)
    model.table.sparse = False
    used = oracle.used_names(params, loss)
    want = oracle.diag_hessian({n: p for n, p in params.items() if n in used}, loss)
    model.table.sparse = True
    with lw.observe(model, lw.DiagHessian()) as seen:
        loss().backward()
    oracle.assert_close(dict(seen.diag_hessian), want)


# Parameters frozen and trained inside of a context ---------------------------------------------------------------


def _by_method(model: nn.Module, trained: bool) -> None:
    model[0].requires_grad_(trained)  # type: ignore[index]


def _by_attribute(model: nn.Module, trained: bool) -> None:
    model[0].weight.requires_grad = trained  # type: ignore[index]


TURN = pytest.mark.parametrize("turn", [_by_method, _by_attribute])


def _perceptron() -> tuple[nn.Sequential, Callable[[], Tensor]]:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 4)
    return model, lambda: F.cross_entropy(model(x), Y)


@TURN
@pytest.mark.parametrize("trained", [True, False])
def test_parameters_that_are_frozen_or_trained_inside(turn: Callable[..., None], trained: bool) -> None:
    model, loss = _perceptron()

    def begin() -> None:
        turn(model, not trained)

    def inside() -> Tensor:
        turn(model, trained)
        return loss()

    quantities = lw.Variance(), lw.DiagGGN(), lw.KFLR()
    turn(model, trained)
    with lw.observe(model, *quantities) as want:
        loss().backward()
    hessian = lw.Hessian(model, loss)
    begin()
    with lw.observe(model, *quantities) as seen:
        inside().backward()
    for quantity in quantities[:2]:
        oracle.assert_close(dict(seen[quantity]), dict(want[quantity]))
    assert set(dense_factors(seen[quantities[2]])) == set(dense_factors(want[quantities[2]]))
    begin()
    found = lw.Hessian(model, inside)
    assert found.names == hessian.names
    oracle.assert_close(found.to_dense(), hessian.to_dense())


@TURN
@pytest.mark.parametrize("kind", [lw.optim.KFAC, lw.optim.DiagNewton, lw.LocoProp, lw.AltMin])
def test_optimizers_leave_what_the_closure_froze(kind: Any, turn: Callable[..., None]) -> None:
    model, loss = _perceptron()
    before = model[0].weight.detach().clone(), model[2].weight.detach().clone()

    def closure() -> Tensor:
        turn(model, False)
        return loss()

    kind(model).step(closure)
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[2].weight, before[1])


@TURN
def test_freezing_between_forward_and_backward_is_refused(turn: Callable[..., None]) -> None:
    model, loss = _perceptron()
    asked = r"'0\.\w+' was frozen after a call with it, Use 0: linear of 0.bias, 0.weight"
    with pytest.raises(errors.BadInput, match=asked), lw.observe(model, lw.Variance()):
        total = loss()
        turn(model, False)
        total.backward()
