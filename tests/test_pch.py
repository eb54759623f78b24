"""The positive-curvature Hessian: against loops over units, against BackPACK, its forms and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64")

MODIFY: dict[str, Callable[[float], float]] = {"abs": abs, "clip": lambda r: max(r, 0.0)}
MODIFIED = pytest.mark.parametrize("modify", MODIFY)
Calls = list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]


class Noted(nn.Module):
    """A model that notes its elementwise calls, for the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.calls: Calls = []

    def noted(self, s: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = s(x)
        self.calls.append((x, y, s))
        return y

    def forward(self, x: Tensor) -> Tensor:
        self.calls.clear()
        h = self.noted(torch.sigmoid, self.first(x))
        h = self.noted(torch.tanh, F.relu(self.second(h)) + 0.5 * h[:, 1:])
        return self.third(h)


class NotedConv(Noted):
    """A convolution, a sequence and a layer that is used twice."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conv, self.mix, self.head = nn.Conv1d(1, 2, 2), nn.Linear(3, 3), nn.Linear(6, 3)
        self.calls: Calls = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.clear()
        h = self.noted(F.gelu, self.conv(x[:, None]))
        h = self.noted(torch.sin, self.mix(self.noted(torch.tanh, self.mix(h))))
        return self.head(h.flatten(1))


def _case(kind: type[Noted]) -> tuple[Noted, Callable[[], Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    model = kind()
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    return model, lambda: F.cross_entropy(model(x), y), x, y


def _mask(model: nn.Module) -> Tensor:
    owner = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(model.parameters())])
    return owner[:, None] == owner[None, :]


def _want(
    model: Noted, closure: Callable[[], Tensor], x: Tensor, y: Tensor, modify: Callable[[float], float]
) -> Tensor:
    params = oracle.parameters(model)
    ggn = oracle.ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    return ggn + oracle.residual_terms(params, closure(), list(model.calls), modify)


@MODIFIED
@pytest.mark.parametrize("kind", [Noted, NotedConv])
def test_it_equals_loops_over_units(kind: type[Noted], modify: str) -> None:
    model, closure, x, y = _case(kind)
    want = _want(model, closure, x, y, MODIFY[modify])
    op = lw.PCH(model, closure, modify=modify)
    assert op.names == [name for name, _ in model.named_parameters()]
    oracle.assert_close(op.to_dense(), want)
    oracle.assert_close(lw.PCH(model, closure, modify=modify, blocks="parameter").to_dense(), want * _mask(model))
    assert float(torch.linalg.eigvalsh(want).min()) > -1e-12
    assert all(p.grad is None for p in model.parameters())


def test_the_oracle_with_residuals_as_they_are_is_the_hessian_in_blocks() -> None:
    model, closure, x, y = _case(Noted)
    blocks = lw.Hessian(model, closure, blocks="parameter").to_dense()
    oracle.assert_close(_want(model, closure, x, y, lambda r: r) * _mask(model), blocks)


def test_abs_differs_from_clip_and_both_from_the_ggn() -> None:
    model, closure, *_ = _case(Noted)
    found = [lw.PCH(model, closure).to_dense(), lw.PCH(model, closure, "clip").to_dense()]
    found.append(lw.GGN(model, closure).to_dense())
    for i in range(3):
        assert float((found[i] - found[i - 1]).abs().max()) > 1e-4


@MODIFIED
def test_vectors_stacks_mappings_and_scipy_agree(modify: str) -> None:
    model, closure, *_ = _case(Noted)
    op = lw.PCH(model, closure, modify=modify)
    dense = op.to_dense()
    oracle.assert_close(dense, dense.T)
    v = torch.randn(op.shape[0], 4)
    oracle.assert_close(op @ v, dense @ v)
    oracle.assert_close(op @ v[:, 0], dense @ v[:, 0])
    sizes = [p.numel() for p in model.parameters()]
    pairs = zip(model.named_parameters(), v[:, 0].split(sizes), strict=True)
    named = op @ {name: part.view(p.shape) for (name, p), part in pairs}
    oracle.assert_close(torch.cat([row.flatten() for row in named.values()]), dense @ v[:, 0])
    pytest.importorskip("scipy")
    oracle.assert_close(torch.from_numpy(op.to_scipy() @ v.numpy()), dense @ v)


def test_piecewise_linear_models_have_no_residuals() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    oracle.assert_close(lw.PCH(model, closure).to_dense(), lw.GGN(model, closure).to_dense())


@MODIFIED
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"offsets": torch.tensor([0, 2, 2, 7])}], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_linear_in_their_tables(mode: str, options: dict[str, Any], trained: bool, modify: str) -> None:
    """The largest entry of a bag is one of the table's elements, which piecewise is linear as ReLU is."""

    class Bag(Noted):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.table = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=options.get("padding_idx"))
            self.mix, self.head, self.calls = nn.Linear(3, 4), nn.Linear(4, 3), []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.clear()
            bags = self.table(*((x,) if "offsets" not in options else (x.flatten(), options["offsets"])))
            return self.head(self.noted(torch.tanh, self.mix(bags)))

    model = Bag()
    model.table.requires_grad_(trained)
    x, y = torch.randint(6, (4, 3)), torch.randint(3, (4,))
    with oracle.plain_operations():
        want = _want(model, lambda: F.cross_entropy(model(x), y), x, y, MODIFY[modify])
    oracle.assert_close(lw.PCH(model, lambda: F.cross_entropy(model(x), y), modify=modify).to_dense(), want)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@MODIFIED
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ReLU])
def test_backpack_gives_the_same_blocks(modify: str, act: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its residuals count the gradient once: its 1.7.1 multiplies by it in two places."""
    backpack = pytest.importorskip("backpack", reason="BackPACK is not installed beside")
    from backpack.core.derivatives.elementwise import ElementwiseDerivatives
    from backpack.extensions import PCHMP

    second = lambda self, module, g_inp, g_out: self.d2f(module, g_inp, g_out)  # noqa: E731
    monkeypatch.setattr(ElementwiseDerivatives, "hessian_diagonal", second)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, 3))
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    op = lw.PCH(model, lambda: F.cross_entropy(model(x), y), modify=modify, blocks="parameter")
    stack = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    ours = op @ stack
    backpack.extend(model)
    with backpack.backpack(PCHMP(modify=modify)):
        backpack.extend(nn.CrossEntropyLoss())(model(x), y).backward()
    for name, p in model.named_parameters():
        oracle.assert_close(ours[name], p.pchmp(stack[name]).detach())


# Refusals -----------------------------------------------------------------------------------------------

OTHER: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (lambda: nn.Softmax(-1), "SoftmaxBackward0"),
    "norm": (lambda: nn.LayerNorm(5), "layer_norm of 1"),
    "attention": (lambda: nn.MultiheadAttention(5, 1), "SoftmaxBackward0|BmmBackward0"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_curvature_is_refused_by_its_name(name: str) -> None:
    make, node = OTHER[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), make(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))

    def closure() -> Tensor:
        h = model[0](x)
        h = model[1](h, h, h)[0] if name == "attention" else model[1](h)
        return F.cross_entropy(model[2](h), y)

    with pytest.raises(errors.Undefined, match=node):
        lw.PCH(model, closure)
    model[0].requires_grad_(False)  # below it there is nothing to ask for any more
    if name != "attention":
        lw.PCH(model, closure)


def test_parametrizations_are_refused() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(errors.Undefined, match="original0"):
        lw.PCH(model, lambda: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("options", [{"modify": "sqrt"}, {"modify": None}, {"blocks": "layer"}], ids=str)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    model, closure, *_ = _case(Noted)
    with pytest.raises(errors.BadInput):
        lw.PCH(model, closure, **options)
