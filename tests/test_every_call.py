"""Calls that read a tensor twice, or whose output is written onto: every quantity is that of brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from program_checks import check_mse
from quantity_checks import dense_factors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo.parts import leaf

import layerwise as lw
from layerwise import errors

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath"),
]

Named = dict[str, Tensor]


# The same tensor twice in one call --------------------------------------------------------------------------


def _twice() -> dict[str, tuple[Named, Callable[[Named], Tensor]]]:
    """Programs by name, each a call that reads one parameter, or tensors derived from it, more than once."""
    x = torch.randn(4, 3)
    q = torch.randn(4, 2, 3)
    mask = torch.rand(4, 3) > 0.5
    vector, square, memory = {"v": leaf(3)}, {"w": leaf(3, 3)}, {"m": leaf(5, 3)}
    return {
        "multi_dot": (square, lambda p: torch.linalg.multi_dot([x, p["w"], p["w"]]).tanh()),
        "multi_dot_view": (square, lambda p: torch.linalg.multi_dot([x, p["w"], p["w"].T])),
        "einsum": (vector, lambda p: torch.einsum("nd,d,d->nd", x, p["v"], p["v"])),
        "einsum_three": (vector, lambda p: torch.einsum("nd,d,d,d->nd", x, p["v"], p["v"], p["v"]).tanh()),
        "einsum_matrix": (square, lambda p: torch.einsum("ni,ij,jk->nk", x, p["w"], p["w"])),
        "layer_norm": (vector, lambda p: F.layer_norm(x, (3,), p["v"], p["v"]).tanh()),
        "group_norm": (vector, lambda p: F.group_norm(q.mT, 1, p["v"], p["v"])),
        "attention": (memory, lambda p: F.scaled_dot_product_attention(q, p["m"], p["m"])),
        "bilinear": (square, lambda p: torch.bilinear(x, x, p["w"].unsqueeze(0), p["w"].flatten()[:1])),
        "linear": (square, lambda p: F.linear(x, p["w"], p["w"][0]).tanh()),
        "addcmul": (vector, lambda p: torch.addcmul(x, p["v"], p["v"]).tanh()),
        "where": (vector, lambda p: torch.where(mask, p["v"], p["v"].exp()) * x),
        "where_same": (vector, lambda p: torch.where(x > 0, p["v"], p["v"]).tanh()),
        "cat": (square, lambda p: torch.cat([x, p["w"].expand(3, 3)[:1].expand(4, 3), p["w"][:1].expand(4, 3)], 1)),
        "cat_same": (
            {"b": leaf(1, 3)},
            lambda p: (lambda b: torch.cat([x, b, b], 1).tanh())(p["b"].expand(4, 3)),
        ),
        "derived": (square, lambda p: (lambda d: torch.einsum("ni,ij,kj->nk", x, d, d))(p["w"].tanh())),
        "two_derived": (square, lambda p: torch.einsum("ni,ij,jk->nk", x, p["w"].tanh(), p["w"] * 2)),
        "lerp": (vector, lambda p: torch.lerp(x, p["v"], p["v"])),
        "addr": ({"v": leaf(4)}, lambda p: torch.addmv(p["v"], x @ torch.ones(3, 4), p["v"]).unsqueeze(1)),
    }  # fmt: skip


TWICE = (
    "multi_dot multi_dot_view einsum einsum_three einsum_matrix layer_norm group_norm attention bilinear linear "
    "addcmul where where_same cat cat_same derived two_derived lerp addr"
).split()


@pytest.mark.parametrize("name", TWICE)
def test_a_tensor_twice_in_one_call(name: str) -> None:
    params, run = _twice()[name]
    check_mse(params, lambda: run(params))


def test_pch_refuses_a_product_of_a_parameter_with_itself() -> None:
    params, x = {"v": leaf(3)}, torch.randn(4, 3)
    with pytest.raises(errors.Undefined, match="linear in v"):
        lw.PCH(params, lambda: torch.einsum("nd,d,d->nd", x, params["v"], params["v"]).square().sum())


# A write in place onto a use's output that is a view ---------------------------------------------------------


class _Written(nn.Module):
    """Layers on three axes, whose outputs are views in torch 2.13; `write` returns what it made of the first."""

    def __init__(self, write: Callable[[Any, Tensor, Tensor], Tensor], layer: str = "linear") -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.pos, self.scale = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))
        self.write, self.layer = write, layer

    def forward(self, x: Tensor) -> Tensor:
        if self.layer == "einsum":
            z = torch.einsum("nti,oi->nto", x, self.first.weight)
        elif self.layer == "permuted":
            z = torch.einsum("nti,oi->not", x, self.first.weight).mT
        elif self.layer == "tensordot":
            z = torch.tensordot(x, self.first.weight.T, 1)
        elif self.layer == "normed":
            z = F.instance_norm(self.first(x).mT, weight=self.scale).mT
        else:
            z = self.first(x)
        return self.last(self.write(self, z, x))


def _set(z: Tensor, index: Any, value: Any) -> Tensor:
    z[index] = value
    return z


def _half(z: Tensor) -> Tensor:
    z[..., :2].mul_(3.0)
    return z


def _row(s: Any, z: Tensor) -> Tensor:
    z[:, 0] += s.pos[0]
    return z


def _chunks(z: Tensor) -> Tensor:
    a = z[..., :2]
    a.mul_(2).add_(z[..., 2:].tanh())
    return z


WRITES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "parameter": lambda s, z, x: z.add_(s.pos),
    "relu": lambda s, z, x: F.relu(z, inplace=True),
    "relu_module": lambda s, z, x: nn.ReLU(inplace=True)(z),
    "dropout": lambda s, z, x: F.dropout(z, 0.5, training=False, inplace=True).tanh(),
    "residual": lambda s, z, x: z.add_(x.mean(2, keepdim=True)).tanh(),
    "own_residual": lambda s, z, x: z.add_(z.tanh()),
    "scaled": lambda s, z, x: z.mul_(2).sigmoid_(),
    "masked": lambda s, z, x: z.masked_fill_(x[..., :1] > 0, 0.5).tanh(),
    "slice": lambda s, z, x: _set(z, (slice(None), slice(1, 3)), 0.0).tanh(),
    "scaled_slice": lambda s, z, x: _half(z).tanh(),
    "gated_slice": lambda s, z, x: _chunks(z),
    "parameter_slice": lambda s, z, x: _row(s, z).tanh(),
    "set_parameter": lambda s, z, x: _set(z, (slice(None), 0), s.pos[0]).tanh(),
    "twice": lambda s, z, x: z.mul_(2).add_(s.pos).mul_(s.scale).tanh_(),
    "view_of_it": lambda s, z, x: z.flatten(1).mul_(2).add_(s.pos.flatten()).view_as(z).tanh_(),
}


FEW = ("parameter", "relu", "scaled_slice", "parameter_slice")
LAYERS = [(write, "linear") for write in WRITES]
LAYERS += [(write, layer) for layer in ("einsum", "permuted", "tensordot", "normed") for write in FEW]


@pytest.mark.parametrize(("write", "layer"), LAYERS)
def test_a_write_onto_the_output_of_a_use(write: str, layer: str) -> None:
    model, x = _Written(WRITES[write], layer), torch.randn(3, 5, 3)
    check_mse(model, lambda: model(x))


PLAIN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "parameter": lambda s, z, x: z + s.pos,
    "relu": lambda s, z, x: F.relu(z),
    "residual": lambda s, z, x: (z + x.mean(2, keepdim=True)).tanh(),
    "scaled": lambda s, z, x: (z * 2).sigmoid(),
    "masked": lambda s, z, x: z.masked_fill(x[..., :1] > 0, 0.5).tanh(),
    "slice": lambda s, z, x: torch.cat([z[:, :1], 0 * z[:, 1:3], z[:, 3:]], 1).tanh(),
    "scaled_slice": lambda s, z, x: torch.cat([3 * z[..., :2], z[..., 2:]], 2).tanh(),
    "parameter_slice": lambda s, z, x: torch.cat([z[:, :1] + s.pos[0], z[:, 1:]], 1).tanh(),
    "view_of_it": lambda s, z, x: (z * 2 + s.pos).tanh(),
}


def _twins(write: str) -> tuple[nn.Module, nn.Module]:
    one, other = _Written(WRITES[write]), _Written(PLAIN[write])
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("write", PLAIN)
def test_factors_under_a_write_are_those_of_the_same_model_without(write: str) -> None:
    x, y = torch.randn(3, 5, 3), torch.randn(3, 5, 2)
    found = []
    for model in _twins(write):
        torch.manual_seed(1)
        quantities = [lw.KFLR("expand"), lw.KFLR("reduce"), lw.KFAC(draws=2)]
        if write not in ("parameter_slice", "view_of_it"):  # their graphs have a path around the write, so no chain
            quantities.append(lw.KFRA("expand"))
        with lw.observe(model, *quantities) as seen:
            F.mse_loss(model(x), y).backward()
        found.append([dense_factors(seen[q]) for q in quantities])
    for one, other in zip(*found, strict=True):
        for i in (0, 1):
            oracle.assert_close({n: f[i] for n, f in one.items()}, {n: f[i] for n, f in other.items()})


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "locoprop": lambda model: lw.LocoProp(model, lr=0.1),
    "locoprop_m": lambda model: lw.LocoProp(model, lr=0.1, loss="matching"),
    "altmin": lambda model: lw.AltMin(model, lr=0.1),
    "altmin_sweep": lambda model: lw.AltMin(model, lr=0.1, codes="sweep"),
    "kfac": lambda model: lw.optim.KFAC(model, lr=0.1),
    "diag_newton": lambda model: lw.optim.DiagNewton(model, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("write", PLAIN)
def test_steps_under_a_write_are_those_of_the_same_model_without(write: str, optimizer: str) -> None:
    x, y = torch.randn(3, 5, 3), torch.randn(3, 5, 2)
    one, other = _twins(write)
    for model in (one, other):
        torch.manual_seed(1)
        opt = OPTIMIZERS[optimizer](model)
        for _ in range(3):
            opt.step(lambda model=model: F.mse_loss(model(x), y))
    oracle.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("loss", ["squared", "matching"])
def test_a_written_slice_is_no_transfer_function(loss: str) -> None:
    """The relu does not read what the layer gave; it is not the layer's own."""
    x, y = torch.randn(6, 5, 3)[:, 0], torch.randn(6, 2)
    one = _Written(lambda s, z, x: _set(z, (slice(None), slice(1, 3)), 0.3).relu())
    other = _Written(lambda s, z, x: torch.cat([z[:, :1], torch.full((6, 2), 0.3), z[:, 3:]], 1).relu())
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        lw.LocoProp(model, lr=0.1, loss=loss).step(lambda model=model: F.mse_loss(model(x), y))  # type: ignore[arg-type]
    oracle.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


class _Program(nn.Module):
    """A program over its parts."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run, self.last = run, nn.Linear(4, 2)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, x))


def _write(s: Any, o: Tensor) -> Tensor:
    """A parameter added in place, and a slice scaled."""
    o += s.p
    o[:, 1:].mul_(2)
    return o


def _seen_through_views(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    h.view(3, 20).add_(s.p)
    h[:, 1].mul_(2)
    return h.sigmoid()


def _assembled(s: Any, x: Tensor) -> Tensor:
    o = torch.zeros(3, 5, 4)
    o[:, :2].addcmul_(x[:, :2], s.p)
    o[:, 2:] = x[:, 2:] * s.q
    return o


def _indexed(s: Any, x: Tensor) -> Tensor:
    z = s.a(x)
    z[:, torch.tensor([0, 2])] += s.p
    z.index_add_(1, torch.tensor([1]), x[:, :1])
    return z.scatter_(2, torch.zeros(3, 5, 1, dtype=torch.long), 0.0)


def _turned(s: Any, x: Tensor) -> Tensor:
    z = s.a(x).transpose_(1, 2)
    z.mul_(2).unsqueeze_(1)
    return z.squeeze(1).transpose(1, 2)


def _checkpointed(s: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: _write(s, s.a(x)).tanh_(), x, use_reentrant=False)


PROGRAMS: dict[str, Callable[[], _Program]] = {
    "attention": lambda: _Program(
        lambda s, x: _write(s, F.scaled_dot_product_attention(x, s.k.expand(3, 5, 4), s.v.expand(3, 5, 4))),
        k=torch.randn(5, 4), v=torch.randn(5, 4), p=torch.randn(4),
    ),
    "multi_dot": lambda: _Program(
        lambda s, x: _write(s, torch.linalg.multi_dot([x[:, 0], s.k, s.v])),
        k=torch.randn(4, 3), v=torch.randn(3, 4), p=torch.randn(4),
    ),
    "multihead": lambda: _Program(
        lambda s, x: s.a(x, x, x, need_weights=False)[0].add_(x).relu_(),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    "lstm": lambda: _Program(
        lambda s, x: _write(s, s.a(x)[0].add_(x)), a=nn.LSTM(4, 4, batch_first=True), p=torch.randn(4)
    ),
    "conv": lambda: _Program(lambda s, x: _write(s, s.a(x)), a=nn.Conv1d(5, 3, 1), p=torch.randn(4)),
    "embedding": lambda: _Program(
        lambda s, x: _write(s, s.a((x > 0).long().sum(-1))), a=nn.Embedding(6, 4), p=torch.randn(4)
    ),
    "frozen": lambda: _Program(
        lambda s, x: _write(s, s.a(x)), a=nn.Linear(4, 4).requires_grad_(requires_grad=False), p=torch.randn(4)
    ),
    "layer_norm": lambda: _Program(lambda s, x: _write(s, s.a(x)), a=nn.LayerNorm(4), p=torch.randn(4)),
    "views": lambda: _Program(_seen_through_views, a=nn.Linear(4, 4), p=torch.randn(20)),
    "assembled": lambda: _Program(_assembled, p=torch.randn(4), q=torch.randn(4)),
    "indexed": lambda: _Program(_indexed, a=nn.Linear(4, 4), p=torch.randn(4)),
    "turned": lambda: _Program(_turned, a=nn.Linear(4, 4)),
    "checkpointed": lambda: _Program(_checkpointed, a=nn.Linear(4, 4), p=torch.randn(4)),
    "copied": lambda: _Program(lambda s, x: s.a(x).copy_(s.c(x)).sin_(), a=nn.Linear(4, 4), c=nn.Linear(4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_writes_in_other_programs(name: str) -> None:
    model, x = PROGRAMS[name](), torch.randn(3, 5, 4)
    with oracle.plain_operations():
        check_mse(model, lambda: model(x))


class _Returns(nn.Module):
    """A model that returns a view."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.view = nn.Linear(3, 4), nn.Linear(4, 2), view

    def forward(self, x: Tensor) -> Tensor:
        return self.view(self.last(self.first(x).tanh()))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda z: z[:, -1], "flat": lambda z: z.flatten(1), "turned": lambda z: z.mT, "part": lambda z: z[..., :1],
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", ["whole", "slice", "twice"])
def test_a_write_onto_what_the_model_returned(write: str, view: str) -> None:
    """Its loss is of the user's own, and begins at what was returned."""
    model, x = _Returns(VIEWS[view]), torch.randn(3, 5, 3)

    def loss(z: Tensor, plain: bool) -> Tensor:
        if plain:
            z = z.clone()
        if write == "slice":
            z[:, :1].mul_(2)
        else:
            z *= 2
        if write == "twice":
            z.add_(z.detach().sign())
        return (z - 0.1).abs().pow(3).sum() / 3

    quantities = lw.PerSampleGrad(), lw.DiagGGN(), lw.DiagHessian(), lw.KFLR()
    found = []
    for plain in (False, True):
        with lw.observe(model, *quantities) as seen:
            loss(model(x), plain).backward()
        factors = dense_factors(seen.kflr)
        found.append([dict(seen[q]) for q in quantities[:3]] + [{n: f[i] for n, f in factors.items()} for i in (0, 1)])
        found[-1].append({"ggn": lw.GGN(model, lambda plain=plain: loss(model(x), plain)).to_dense()})
    for one, other in zip(*found, strict=True):
        oracle.assert_close(one, other)


def test_calls_without_a_gradient_are_no_uses() -> None:
    """They may compare a parameter with data, or ask about both."""
    params, x = {"w": leaf(4, 3)}, torch.randn(4, 3)

    def logits() -> Tensor:
        assert not torch.equal(params["w"], x) and not torch.allclose(x, params["w"])
        return x * params["w"]

    check_mse(params, logits)


# Products in groups of rows -----------------------------------------------------------------------------------


def _by_loops(a: Tensor, b: Tensor, ends: list[int] | None) -> Tensor:
    """`F.grouped_mm` in any type; zero behind the last group."""
    if ends is None:
        return torch.stack([x @ y for x, y in zip(a, b, strict=True)])
    owners = [e for e, (i, j) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) for _ in range(j - i)]
    if a.dim() == b.dim() == 2:
        onehot = F.one_hot(torch.tensor(owners), len(ends)).double()
        return torch.einsum("mk,ke,kn->emn", a[:, : len(owners)], onehot, b[: len(owners)])
    if a.dim() == 2:
        rows = [a[r] @ b[owners[r]] if r < len(owners) else torch.zeros(b.shape[2]) for r in range(len(a))]
        return torch.stack(rows)
    return torch.stack([a[e] @ b[:, c] for c, e in enumerate(owners)], 1)


class _Grouped(TorchFunctionMode):
    """Lets the oracle run `F.grouped_mm` in float64, in which torch has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._grouped_mm:
            offs = (kwargs or {}).get("offs")
            return _by_loops(*args, None if offs is None else offs.tolist())
        return func(*args, **(kwargs or {}))


def _offs(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


GROUPED: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[Named, Tensor], Tensor]]] = {
    "experts": ({"w": (3, 3, 2)}, lambda p, x: F.grouped_mm(x, p["w"], offs=_offs(1, 3, 4))),
    "transposed": ({"w": (3, 2, 3)}, lambda p, x: F.grouped_mm(x, p["w"].mT, offs=_offs(2, 2, 4))),
    "rows_left": ({"w": (2, 3, 2)}, lambda p, x: F.grouped_mm(x, p["w"], offs=_offs(1, 3)) + x[:, :2]),
    "two_layers": (
        {"w": (2, 3, 3), "v": (2, 3, 2)},
        lambda p, x: F.grouped_mm(F.grouped_mm(x, p["w"], offs=_offs(2, 4)).tanh(), p["v"], offs=_offs(2, 4)),
    ),
    "batched": ({"w": (4, 3, 2)}, lambda p, x: F.grouped_mm(x[:, None], p["w"])[:, 0]),
    "columns": ({"w": (3, 4)}, lambda p, x: F.grouped_mm(x.expand(2, 4, 3), p["w"], offs=_offs(1, 4))),
    "inner": ({"w": (3, 2)}, lambda p, x: F.grouped_mm(x, p["w"], offs=_offs(1, 3)).transpose(0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_products(name: str) -> None:
    shapes, run = GROUPED[name]
    params, x = {key: leaf(*shape) for key, shape in shapes.items()}, torch.randn(4, 3)
    with _Grouped():
        check_mse(params, lambda: run(params, x).tanh())


def test_a_grouped_product_in_single_precision_is_torchs() -> None:
    w, x = torch.randn(3, 4, 8, dtype=torch.float32, requires_grad=True), torch.randn(6, 4, dtype=torch.float32)
    plain = F.grouped_mm(x, w, offs=_offs(1, 1, 6))
    with lw.observe({"w": w}, lw.SquaredNorm()):
        assert torch.allclose(F.grouped_mm(x, w, offs=_offs(1, 1, 6)), plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(errors.UnsupportedCall, match="bias="), lw.observe({"w": w}, lw.SquaredNorm()):
        F.grouped_mm(x, w, offs=_offs(1, 1, 6), bias=torch.zeros(3, 8))
