"""Every operation as a grouped linear map, against brute force: one vjp per sample of the call itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import layerwise as lw
from layerwise import ops
from layerwise.errors import SamplesMixed, Undefined
from layerwise.ops import Call, Samples, Slot
from layerwise.ops.opaque import OpaqueSlot
from layerwise.ops.registry import BUILD

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(data(*shape))


def positive(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape, dtype=torch.float64) + 0.5)


@dataclass
class Case:
    """A call; `used` are the tensors in it that come from `params` (the same unless they are derived)."""

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    params: list[Tensor] | None = None
    axes: Sequence[int] | None = None  # the axes that every slot must offer for samples
    masked: bool = False  # positions without gradient: Z = W A is not compared

    def tensors(self) -> list[Tensor]:
        flat: list[Any] = []
        for value in (*self.args, *self.kwargs.values()):
            flat += value if isinstance(value, (list, tuple)) else [value]
        return [x for x in flat if isinstance(x, Tensor) and x.requires_grad]

    def run(self, zero: Tensor | None = None) -> Tensor:
        """The call itself; with one of its tensors set to zero where asked."""

        def change(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(change(y) for y in x)
            if x is zero and x is not None:
                return torch.zeros_like(x)
            return x

        args = [change(x) for x in self.args]
        if ops.writes_first(self.func):
            args[0] = args[0].clone()
        out = self.func(*args, **{k: change(v) for k, v in self.kwargs.items()})
        return args[0] if out is None else out

    def call(self) -> Call:
        """What the tape records."""

        def detach(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(detach(y) for y in x)
            return x if not isinstance(x, Tensor) or x.requires_grad else x.detach()

        return Call(
            self.func, tuple(detach(x) for x in self.args), {k: detach(v) for k, v in self.kwargs.items()},
            self.run().shape,
        )  # fmt: skip


def placements(shape: torch.Size, axis: int) -> list[Samples]:
    """All ways to see samples along an axis: one a place, or several places a sample in both orders."""
    size = shape[axis]
    out = [Samples(size, axis)]
    for n in range(1, size):
        if size % n == 0:
            out += [Samples(n, axis, True), Samples(n, axis, False)]
    return out


def brute(case: Case, param: Tensor, g: Tensor, samples: Samples) -> Tensor:
    """Per-sample gradients `[V,N,*param.shape]`: a vjp of the call for each cotangent, masked to a sample."""
    out = case.run()
    size = out.shape[samples.axis]
    r = size // samples.n
    rows = []
    for cotangent in g:
        for n in range(samples.n):
            keep = [n * r + j if samples.n_major else j * samples.n + n for j in range(r)]
            mask = torch.zeros(size, dtype=out.dtype)
            mask[keep] = 1
            masked = cotangent * mask.reshape(-1, *(1,) * (out.ndim - 1 - samples.axis))
            (row,) = torch.autograd.grad(out, param, masked, retain_graph=True)
            rows.append(row.to_dense() if row.is_sparse else row)
    return torch.stack(rows).reshape(len(g), samples.n, *param.shape)


def from_rows(slot: Slot, g: Tensor, samples: Samples | None) -> Tensor:
    """The contraction sum_t g aᵀ written out naively, also for index and constant rows."""
    rows = slot.rows(g, samples)
    v, n, t, k, o = rows.g.shape
    if rows.a is None:
        a = torch.ones(n, t, k, 1, dtype=g.dtype)
    elif rows.a.is_floating_point():
        a = rows.a
    else:
        a = F.one_hot(rows.a, rows.size_in).to(g.dtype).unsqueeze(2)
    assert a.shape == (n, t, k, rows.size_in)
    return slot.fold(torch.einsum("vntko,ntki->vnkoi", rows.g, a))


def carry(w: Tensor, slot: Slot, param: Tensor) -> Tensor:
    """Gradients of the slot's tensor carried back to the parameter it is derived from."""
    if slot.used is param:
        return w
    flat = w.reshape(-1, *slot.used.shape)
    back = [torch.autograd.grad(slot.used, param, row, retain_graph=True)[0] for row in flat]
    return torch.stack(back).reshape(*w.shape[: w.ndim - slot.used.ndim], *param.shape)


def check_map(case: Case, call: Call, slot: Slot, used: Tensor) -> None:
    """`matrix` and `fold` are inverse, and Z = W A is what the call adds for this tensor."""
    w = slot.matrix(slot.used.detach())
    assert w.ndim == 3
    torch.testing.assert_close(slot.fold(w), slot.used.detach(), rtol=0, atol=0)
    many = torch.randn(2, 3, *w.shape, dtype=w.dtype)
    folded = slot.fold(many)
    assert folded.shape == (2, 3, *slot.used.shape)
    torch.testing.assert_close(slot.matrix(folded[1, 2]), many[1, 2], rtol=0, atol=0)
    assert slot.bias == (slot.input(None) is None)
    if not slot.linear or case.masked:
        return
    added = (case.run() - case.run(zero=used)).detach()
    shared = [a for a in slot.axes if a not in slot.aligned]
    for samples in [None, *(s for a in shared for s in placements(added.shape, a))]:
        rows = slot.rows(added[None], samples)
        z = rows.g[0]
        if rows.a is None:
            a = torch.ones(*z.shape[:3], 1, dtype=w.dtype)
        else:
            a = rows.a
            if not a.is_floating_point():
                a = F.one_hot(a, rows.size_in).to(w.dtype).unsqueeze(2)
        torch.testing.assert_close(torch.einsum("koi,ntki->ntko", w, a), z, **TOLERANCE)


def check(case: Case, opaque: bool = False) -> None:
    """The slots of a call agree with brute force for every place the samples can have."""
    call = case.call()
    used = case.tensors()
    params = case.params or used
    slots = ops.slots(call, used)
    assert len(slots) == len(used) == len(params)
    for slot, tensor, leaf in zip(slots, used, params, strict=True):
        assert slot.factored != opaque, f"{call.func} {type(slot).__name__}"
        if case.axes is not None:
            assert list(slot.axes) == list(case.axes)
        assert set(slot.aligned) <= set(slot.axes)
        for v in (1, 3):
            g = torch.randn(v, *call.out_shape, dtype=torch.float64)
            if slot.factored:
                total = from_rows(slot, g, None).sum(1, keepdim=True)
                out = case.run()
                whole = [torch.autograd.grad(out, leaf, row, retain_graph=True)[0].to_dense() for row in g]
                everything = torch.stack(whole).unsqueeze(1)
                torch.testing.assert_close(carry(total, slot, leaf), everything, **TOLERANCE)
            for axis in slot.axes:
                for samples in placements(call.out_shape, axis):
                    expected = brute(case, leaf, g, samples)
                    dense = carry(slot.dense(g, samples), slot, leaf)
                    torch.testing.assert_close(dense, expected, **TOLERANCE)
                    if slot.factored and axis not in slot.aligned:
                        rows = carry(from_rows(slot, g, samples), slot, leaf)
                        torch.testing.assert_close(rows, expected, **TOLERANCE)
        if slot.factored:
            check_map(case, call, slot, tensor)


CONTRACTIONS: dict[str, Callable[[int], Case]] = {
    "linear": lambda n: Case(F.linear, [data(n, 3), param(4, 3), param(4)], axes=[0]),
    "linear, no bias": lambda n: Case(F.linear, [data(n, 3), param(n, 3)], axes=[0]),
    "linear, T = N": lambda n: Case(F.linear, [data(n, n, 3), param(4, 3), param(4)], axes=[0, 1]),
    "linear, 4 axes": lambda n: Case(F.linear, [data(2, n, 3, 2), param(4, 2), param(4)], axes=[0, 1, 2]),
    "linear, flattened": lambda n: Case(F.linear, [data(4 * n, 3), param(2, 3), param(2)], axes=[0]),
    "linear, one output": lambda n: Case(F.linear, [data(n, 3), param(1, 3), param(1)], axes=[0]),
    "linear, vector": lambda n: Case(F.linear, [data(n, 2, 3), param(3)], axes=[0, 1]),
    "linear, kwargs": lambda n: Case(
        F.linear, [], {"input": data(n, 3), "bias": param(2), "weight": param(2, 3)}),
    "linear, transposed data": lambda n: Case(F.linear, [data(3, n, 2).mT, param(4, n)], axes=[0, 1]),
    "linear, parameter as input": lambda n: Case(F.linear, [param(2, 3), data(n, 3)], axes=[1]),
    "linear, unbatched": lambda n: Case(F.linear, [data(3), param(4, 3), param(4)], axes=[]),
    "matmul": lambda n: Case(torch.matmul, [data(n, 3), param(3, 4)], axes=[0]),
    "@": lambda n: Case(torch.Tensor.matmul, [data(n, 5, 3), param(3, 4)], axes=[0, 1]),
    "parameter @ data": lambda n: Case(torch.Tensor.matmul, [param(4, 3), data(n, 3, 5)], axes=[0, 2]),
    "data transposed": lambda n: Case(torch.matmul, [param(4, 3), data(3, n)], axes=[1]),
    "__rmatmul__": lambda n: Case(torch.Tensor.__rmatmul__, [param(3, 4), data(n, 3)], axes=[0]),
    "heads": lambda n: Case(torch.matmul, [data(n, 2, 5, 3), param(2, 3, 4)], axes=[0, 1, 2]),
    "heads, one weight": lambda n: Case(torch.matmul, [data(n, 2, 5, 3), param(1, 3, 4)], axes=[0, 1, 2]),
    "vector parameter": lambda n: Case(torch.matmul, [data(n, 5, 3), param(3)], axes=[0, 1]),
    "vector data": lambda n: Case(torch.matmul, [param(n, 3), data(3)], axes=[]),
    "batch in the weight only": lambda n: Case(torch.matmul, [data(5, 3), param(n, 3, 2)]),
    "mm": lambda n: Case(torch.mm, [data(n, 3), param(3, 2)], axes=[0]),
    "mv": lambda n: Case(torch.mv, [data(n, 3), param(3)], axes=[0]),
    "Tensor.mv": lambda n: Case(torch.Tensor.mv, [data(n, 3), param(3)], axes=[0]),
    "outer": lambda n: Case(torch.outer, [data(n), param(3)], axes=[0]),
    "bmm, weight per sample": lambda n: Case(torch.bmm, [data(n, 5, 3), param(n, 3, 2)], axes=[0, 1]),
    "bmm, weight per head": lambda n: Case(torch.bmm, [data(2, n, 3), param(2, 3, 2)], axes=[0, 1]),
    "addmm": lambda n: Case(torch.addmm, [param(2), data(n, 3), param(3, 2)], axes=[0]),
    "addmm, scaled": lambda n: Case(
        torch.addmm, [param(2), data(n, 3), param(3, 2)], {"beta": 0.5, "alpha": -3}),
    "addmm, rank one bias": lambda n: Case(torch.addmm, [param(1, 2), data(n, 3), param(3, 2)]),
    "addmm, scalar bias": lambda n: Case(torch.addmm, [param(1), data(n, 3), param(3, 2)]),
    "addmm, full bias": lambda n: Case(torch.addmm, [param(n, 2), data(n, 3), param(3, 2)]),
    "addmm, data added": lambda n: Case(torch.Tensor.addmm, [data(n, 2), data(n, 3), param(3, 2)], axes=[0]),
    "addmm_": lambda n: Case(torch.Tensor.addmm_, [data(n, 2), data(n, 3), param(3, 2)], axes=[0]),
    "addmv": lambda n: Case(torch.addmv, [data(n), data(n, 3), param(3)], {"alpha": 2}, axes=[0]),
    "addmv, bias of samples": lambda n: Case(torch.addmv, [param(n), data(n, 3), param(3)], axes=[0]),
    "addr": lambda n: Case(torch.addr, [data(n, 3), data(n), param(3)], axes=[0]),
    "baddbmm": lambda n: Case(torch.baddbmm, [param(2, 1, 4), data(2, n, 3), param(2, 3, 4)], {"alpha": 0.5}),
    "addbmm": lambda n: Case(torch.addbmm, [data(n, 4), data(2, n, 3), param(2, 3, 4)], axes=[0]),
    "bilinear": lambda n: Case(F.bilinear, [data(n, 3), data(n, 2), param(4, 3, 2), param(4)], axes=[0]),
    "bilinear, positions": lambda n: Case(
        F.bilinear, [data(n, 5, 3), data(n, 5, 2), param(4, 3, 2)], axes=[0, 1]),
    "tensordot": lambda n: Case(torch.tensordot, [data(n, 3, 4), param(3, 4, 2)], {"dims": 2}, axes=[0]),
    "tensordot, lists": lambda n: Case(
        torch.tensordot, [data(4, n, 3), param(2, 3, 4)], {"dims": ([0, 2], [2, 1])}),
    "tensordot, outer": lambda n: Case(torch.tensordot, [param(2), data(n, 3)], {"dims": 0}, axes=[1, 2]),
    "einsum": lambda n: Case(torch.einsum, ["ni,io->no", data(n, 3), param(3, 4)], axes=[0]),
    "einsum, list": lambda n: Case(torch.einsum, ["nti,oi->nto", [data(n, 5, 3), param(4, 3)]], axes=[0, 1]),
    "einsum, implicit": lambda n: Case(torch.einsum, ["bi,io", data(n, 3), param(3, 4)], axes=[0]),
    "einsum, groups": lambda n: Case(torch.einsum, ["nthi,hio->ntho", data(n, 5, 2, 3), param(2, 3, 4)]),
    "einsum, groups mixed": lambda n: Case(
        torch.einsum, ["i h o, h i n -> o n h", param(3, 2, 4), data(2, 3, n)]),
    "einsum, ellipsis": lambda n: Case(
        torch.einsum, ["...i,oi->...o", data(n, 5, 3), param(4, 3)], axes=[0, 1]),
    "einsum, ellipses": lambda n: Case(torch.einsum, ["...i,...io->...o", data(n, 2, 3), param(2, 3, 4)]),
    "einsum, three": lambda n: Case(torch.einsum, ["ni,nj,oij->no", data(n, 3), data(n, 2), param(4, 3, 2)]),
    "einsum, low rank": lambda n: Case(torch.einsum, ["ni,ir,ro->no", data(n, 3), param(3, 2), param(2, 4)]),
    "einsum, summed data": lambda n: Case(torch.einsum, ["nti,oi->no", data(n, 5, 3), param(4, 3)], axes=[0]),
    "einsum, summed weight": lambda n: Case(
        torch.einsum, ["ni,oij->no", data(n, 3), param(4, 3, 2)], axes=[0]),
    "einsum, elementwise": lambda n: Case(torch.einsum, ["ni,i->ni", data(n, 3), param(3)], axes=[0, 1]),
    "einsum, per sample": lambda n: Case(torch.einsum, ["ni,nio->no", data(n, 3), param(n, 3, 4)], axes=[0]),
    "einsum, broadcast": lambda n: Case(
        torch.einsum, ["nhi,hio->nho", data(n, 2, 3), param(1, 3, 4)], axes=[0, 1]),
    "einsum, broadcast data": lambda n: Case(
        torch.einsum, ["nhi,hio->nho", data(n, 1, 3), param(2, 3, 4)], axes=[0]),
    "einsum, broadcast sum": lambda n: Case(torch.einsum, ["ni,oi->no", data(n, 3), param(4, 1)], axes=[0]),
    "einsum, broadcast sum 2": lambda n: Case(torch.einsum, ["ni,oi->no", data(n, 1), param(4, 3)], axes=[0]),
}  # fmt: skip

EMBEDDINGS: dict[str, Callable[[int], Case]] = {
    "embedding": lambda n: Case(F.embedding, [torch.randint(0, 5, (n,)), param(5, 3)], axes=[0]),
    "embedding, sequence": lambda n: Case(
        F.embedding, [torch.randint(0, 4, (n, 4)), param(4, 3)], axes=[0, 1]),
    "embedding, int32": lambda n: Case(
        F.embedding, [torch.randint(0, 4, (n, 4)).int(), param(4, 3)], axes=[0, 1]),
    "embedding, padding": lambda n: Case(
        F.embedding, [torch.randint(0, 2, (n, 4)), param(4, 3)], {"padding_idx": 1}, masked=True,
        axes=[0, 1]),
    "embedding, padding from the end": lambda n: Case(
        F.embedding, [torch.randint(0, 2, (n, 4)), param(2, 3)], {"padding_idx": -1}, masked=True),
    "embedding, sparse": lambda n: Case(
        F.embedding, [torch.randint(0, 4, (n, 4)), param(4, 3)], {"sparse": True}),
    "table[index]": lambda n: Case(
        torch.Tensor.__getitem__, [param(4, 3), torch.randint(-4, 4, (n, 2))], axes=[0, 1]),
    "vector[index]": lambda n: Case(
        torch.Tensor.__getitem__, [param(4), torch.randint(-4, 4, (n,))], axes=[0]),
    "array[index]": lambda n: Case(
        torch.Tensor.__getitem__, [param(4, 3, 2), torch.randint(-4, 4, (n,))], axes=[0]),
    "index_select": lambda n: Case(torch.index_select, [param(4, 3), 0, torch.randint(0, 4, (n,))], axes=[0]),
    "bag": lambda n: Case(F.embedding_bag, [torch.randint(0, 5, (n, 4)), param(5, 3)], axes=[0]),
    "bag, sum": lambda n: Case(
        F.embedding_bag, [torch.randint(0, 5, (n, 4)), param(5, 3)], {"mode": "sum"}, axes=[0]),
    "bag, weighted": lambda n: Case(F.embedding_bag, [torch.randint(0, 5, (n, 4)), param(5, 3)], {
        "mode": "sum", "per_sample_weights": data(n, 4)}, axes=[0]),
    "bag, padding from the end": lambda n: Case(
        F.embedding_bag, [torch.randint(0, 2, (n, 4)), param(2, 3)], {"padding_idx": -1}),
    "bag, padding": lambda n: Case(
        F.embedding_bag, [torch.randint(0, 2, (n, 4)), param(5, 3)], {"padding_idx": 1}),
    "bag, offsets": lambda n: Case(F.embedding_bag, [
        torch.randint(0, 5, (7,)), param(5, 3), torch.tensor([0, 2, 2, 6, 7][:n])], axes=[0]),
    "bag, last offset": lambda n: Case(F.embedding_bag, [torch.randint(0, 5, (6,)), param(5, 3)], {
        "offsets": torch.tensor([*[0, 2, 2, 3, 4, 5, 6][:n], 6]), "include_last_offset": True}, axes=[0]),
}  # fmt: skip


def expanded(n: int, *shape: int) -> tuple[nn.Parameter, Tensor]:
    p = param(1, *shape)
    return p, p.expand(n, *shape)


def token(n: int, func: Callable[..., Any] = torch.cat, dim: int = 1) -> Case:
    """A class token in front of a sequence."""
    p, q = expanded(n, 1, 3)
    return Case(func, [[q, data(n, 4, 3)]], {"dim": dim}, params=[p], axes=[0, 2])


def stacked(n: int) -> Case:
    p, q = expanded(n, 3)
    return Case(torch.stack, [[data(n, 3), q], 1], params=[p], axes=[0, 2])


def added(n: int) -> Case:
    p, q = expanded(n, 4, 3)
    return Case(torch.Tensor.add, [data(n, 4, 3), q], params=[p], axes=[0, 1, 2])


def repeated(n: int) -> Case:
    p = param(1, 3)
    return Case(torch.cat, [[p.repeat(n, 1), data(n, 2)], 1], params=[p], axes=[0])


def twice_expanded(n: int) -> Case:
    p = param(3)
    return Case(torch.Tensor.mul, [data(n, 4, 3, 2), p[None, None, :, None].expand(n, 4, 3, 2)], params=[p])


def _where(n: int) -> Case:
    return Case(torch.where, [data(n, 3) > 0, data(n, 3), param(3)], axes=[0, 1])


ELEMENTWISE: dict[str, Callable[[int], Case]] = {
    "x + p": lambda n: Case(torch.Tensor.add, [data(n, 3), param(3)], axes=[0, 1]),
    "p + x": lambda n: Case(torch.Tensor.__add__, [param(3), data(n, 3)], axes=[0, 1]),
    "x + alpha p": lambda n: Case(torch.add, [data(n, 3), param(3)], {"alpha": -2.5}),
    "p + alpha x": lambda n: Case(torch.add, [], {"input": param(3), "other": data(n, 3), "alpha": -2.5}),
    "x - p": lambda n: Case(torch.Tensor.sub, [data(n, 3), param(3)]),
    "p - x": lambda n: Case(torch.sub, [param(3), data(n, 3)], {"alpha": 3}),
    "rsub": lambda n: Case(torch.rsub, [param(3), data(n, 3)], {"alpha": 3}),
    "rsub other": lambda n: Case(torch.rsub, [data(n, 3), param(3)], {"alpha": 3}),
    "x += p": lambda n: Case(torch.Tensor.add_, [data(n, 3), param(3)]),
    "x *= p": lambda n: Case(torch.Tensor.mul_, [data(n, 3), param(3)]),
    "x /= p": lambda n: Case(torch.Tensor.div_, [data(n, 3), positive(3)]),
    "position table": lambda n: Case(torch.Tensor.add, [data(n, 4, 3), param(4, 3)], axes=[0, 1, 2]),
    "position table 1": lambda n: Case(torch.Tensor.add, [data(n, 4, 3), param(1, 4, 3)]),
    "full size": lambda n: Case(torch.Tensor.add, [data(n, 3), param(n, 3)], axes=[0, 1]),
    "scalar": lambda n: Case(torch.Tensor.mul, [data(n, 3), param()], axes=[0, 1]),
    "x * p": lambda n: Case(torch.Tensor.mul, [data(n, 3), param(3)]),
    "p * x": lambda n: Case(torch.mul, [param(3), data(n, 4, 3)]),
    "column * row": lambda n: Case(torch.mul, [param(3, 1), data(n, 1, 4)], axes=[0, 1, 2]),
    "channels": lambda n: Case(torch.mul, [data(n, 3, 2, 2), param(3, 1, 1)]),
    "x / p": lambda n: Case(torch.Tensor.div, [data(n, 3), positive(3)]),
    "p / x": lambda n: Case(torch.Tensor.div, [param(3), data(n, 3)]),
    "x ** p": lambda n: Case(torch.Tensor.__pow__, [data(n, 3).exp(), param(3)]),
    "p ** x": lambda n: Case(torch.Tensor.__pow__, [positive(3), data(n, 3)]),
    "__rpow__": lambda n: Case(torch.Tensor.__rpow__, [param(3), data(n, 3).exp()]),
    "__rdiv__": lambda n: Case(torch.Tensor.__rtruediv__, [positive(3), data(n, 3)]),
    "__rsub__": lambda n: Case(torch.Tensor.__rsub__, [param(3), data(n, 3)]),
    "where": _where,
    "lerp": lambda n: Case(torch.lerp, [data(n, 3), param(3), data(n, 3)]),
    "lerp weight": lambda n: Case(torch.lerp, [data(n, 3), data(n, 3), param(3)]),
    "maximum": lambda n: Case(torch.maximum, [data(n, 3), param(3)]),
    "clamp": lambda n: Case(torch.clamp, [data(n, 3)], {"min": param(3)}),
    "addcmul": lambda n: Case(torch.addcmul, [data(n, 3), param(3), data(n, 3)], {"value": 0.5}),
    "addcdiv": lambda n: Case(torch.addcdiv, [param(3), data(n, 3), positive(3)]),
    "two parameters": lambda n: Case(torch.where, [data(n, 3) > 0, param(3), param(n, 1)]),
    "masked_fill": lambda n: Case(
        torch.Tensor.masked_fill, [data(n, 3), data(n, 3) > 0, param()], axes=[0, 1]),
    "masked_fill of p": lambda n: Case(torch.Tensor.masked_fill, [param(3), data(n, 3) > 0, 2.0]),
    "prelu": lambda n: Case(torch.prelu, [data(n, 3, 2), param(3)], axes=[0, 2]),
    "prelu, one": lambda n: Case(F.prelu, [data(n, 3, 2), param(1)], axes=[0, 1, 2]),
    "prelu, vector": lambda n: Case(F.prelu, [data(n), param(1)], axes=[0]),
    "class token": token,
    "class token, alias": lambda n: token(n, torch.concat, -2),
    "stack": stacked,
    "expanded and added": added,
    "repeated": repeated,
    "expanded from a vector": twice_expanded,
    "cat of parameters": lambda n: Case(torch.cat, [[data(2, n), param(1, n), param(3, n)]], axes=[1]),
}  # fmt: skip

_stats = {
    "running_mean": torch.linspace(-1, 1, 3, dtype=torch.float64),
    "running_var": torch.linspace(0.5, 2, 3, dtype=torch.float64),
}
NORMS: dict[str, Callable[[int], Case]] = {
    "layer": lambda n: Case(F.layer_norm, [data(n, 4, 3), (3,), param(3), param(3), 1e-3], axes=[0, 1]),
    "layer, two axes": lambda n: Case(F.layer_norm, [data(n, 4, 3), (4, 3)], {
        "weight": param(4, 3), "bias": param(4, 3)}, axes=[0]),
    "layer, builtin": lambda n: Case(torch.layer_norm, [data(n, 3), (3,), param(3), param(3)], axes=[0]),
    "layer, no bias": lambda n: Case(F.layer_norm, [data(n, n, n), (n,)], {"weight": param(n)}),
    "rms": lambda n: Case(F.rms_norm, [data(n, 4, 3), (3,)], {"weight": param(3)}, axes=[0, 1]),
    "rms, eps": lambda n: Case(F.rms_norm, [data(n, 3), (3,), param(3), 0.1], axes=[0]),
    "group": lambda n: Case(F.group_norm, [data(n, 4, 3, 2), 2, param(4), param(4)], axes=[0, 2, 3]),
    "group, eps": lambda n: Case(
        F.group_norm, [data(n, 4, 3), 2], {"weight": param(4), "bias": param(4), "eps": 0.2}),
    "batch": lambda n: Case(
        F.batch_norm, [data(n, 3)], {**_stats, "weight": param(3), "bias": param(3)}, axes=[0]),
    "batch, image": lambda n: Case(F.batch_norm, [data(n, 3, 2, 2), *_stats.values(), param(3), param(3)]),
    "batch, builtin": lambda n: Case(
        torch.batch_norm, [data(n, 3, 2), param(3), param(3), *_stats.values(), False, 0.1, 1e-3, False]),
    "batch, training": lambda n: Case(
        F.batch_norm, [data(n, 3, 2), _stats["running_mean"].clone(), _stats["running_var"].clone()],
        {"weight": param(3), "bias": param(3), "training": True}),
    "instance": lambda n: Case(
        F.instance_norm, [data(n, 3, 4)], {"weight": param(3), "bias": param(3)}, axes=[0, 2]),
    "instance, statistics": lambda n: Case(F.instance_norm, [data(n, 3, 4)], {
        **_stats, "weight": param(3), "bias": param(3), "use_input_stats": False}),
}  # fmt: skip

TABLE = {
    f"{family} {name}": case
    for family, table in {
        "contraction": CONTRACTIONS, "embedding": EMBEDDINGS, "elementwise": ELEMENTWISE, "norm": NORMS
    }.items()
    for name, case in table.items()
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", TABLE)
def test_known_call(name: str, n: int) -> None:
    check(TABLE[name](n))


@st.composite
def einsum_cases(draw: st.DrawFn) -> Case:
    """A random einsum of two or three operands, axes of size 1 broadcast among them, one a parameter."""
    sizes = {letter: draw(st.integers(1, 3)) for letter in "abcde"}
    terms = draw(st.lists(st.lists(st.sampled_from("abcde"), unique=True, max_size=4), min_size=2, max_size=3))
    seen = sorted(set().union(*terms))
    out = draw(st.lists(st.sampled_from(seen), unique=True)) if seen else []
    shapes = [[draw(st.sampled_from([1, sizes[c]])) for c in term] for term in terms]
    tensors = [data(*shape) for shape in shapes]
    place = draw(st.integers(0, len(terms) - 1))
    tensors[place] = param(*shapes[place])
    equation = ",".join("".join(term) for term in terms) + "->" + "".join(out)
    return Case(torch.einsum, [equation, *tensors])


@settings(max_examples=150)
@given(einsum_cases())
def test_einsum(case: Case) -> None:
    check(case)


CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


@st.composite
def conv_cases(draw: st.DrawFn, transposed: bool) -> Case:
    """A random convolution of dimension 1 to 3 with every argument drawn for itself."""
    dims = draw(st.integers(1, 3))
    high = 4 if dims < 3 else 3

    def each(low: int, top: int) -> list[int]:
        return draw(st.lists(st.integers(low, top), min_size=dims, max_size=dims))

    n, groups = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    c, o = groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 2), each(0, 2)
    size = [max(d * (k - 1) + 1 - 2 * p, 0) + s for d, k, p, s in
            zip(dilation, kernel, padding, each(1, high), strict=True)]  # fmt: skip
    bias = draw(st.booleans())
    if transposed:
        extra = [min(e, max(s, d) - 1) for e, s, d in zip(each(0, 2), stride, dilation, strict=True)]
        # the output must not be empty
        size = [
            max(m, 1 + -(-max(2 * p - d * (k - 1) - e, 0) // s)) for m, p, d, k, e, s in
            zip(size, padding, dilation, kernel, extra, stride, strict=True)
        ]  # fmt: skip
        args = [data(n, c, *size), param(c, o, *kernel), param(groups * o) if bias else None]
        return Case(TRANSPOSED[dims], [*args, stride, padding, extra, groups, dilation], axes=[0])
    pads: Any = draw(st.sampled_from(["each", "one", "same", "valid"]))
    if pads == "same":
        stride = [1] * dims
    if pads == "valid":
        size = [max(m, d * (k - 1) + 1) for m, d, k in zip(size, dilation, kernel, strict=True)]
    if pads == "one":
        pads = padding[0]
        size = [max(m, d * (k - 1) + 1 - 2 * pads) for m, d, k in zip(size, dilation, kernel, strict=True)]
    kwargs = {"stride": stride, "padding": padding if pads == "each" else pads, "dilation": dilation}
    args = [data(n, c, *size), param(groups * o, c // groups, *kernel), param(groups * o) if bias else None]
    return Case(CONV[dims], args, {**kwargs, "groups": groups}, axes=[0])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=60)
@given(conv_cases(transposed=False))
def test_convolution(case: Case) -> None:
    check(case)


@settings(max_examples=60)
@given(conv_cases(transposed=True))
def test_transposed_convolution(case: Case) -> None:
    check(case)


CONVS: dict[str, Callable[[], Case]] = {
    "plain": lambda: Case(torch.conv2d, [data(4, 2, 5, 5), param(3, 2, 3, 3), param(3), 2, 1], axes=[0]),
    "pointwise": lambda: Case(torch.conv2d, [data(4, 2, 5, 5), param(3, 2, 1, 1), param(3)], axes=[0]),
    "channels last": lambda: Case(
        torch.conv2d, [data(4, 2, 5, 5).to(memory_format=torch.channels_last), param(3, 2, 3, 3)], axes=[0]),
    "view": lambda: Case(torch.conv1d, [data(4, 5, 6)[:, 1:, ::2], param(3, 4, 2)], axes=[0]),
    "repeated": lambda: Case(torch.conv1d, [data(4, 1, 6).expand(4, 2, 6), param(3, 2, 2)], axes=[0]),
    "depthwise": lambda: Case(
        torch.conv1d, [data(4, 3, 6), param(6, 1, 3), param(6)], {"groups": 3, "padding": 1}),
    "even kernel, same": lambda: Case(
        torch.conv2d, [data(2, 1, 4, 5), param(2, 1, 2, 4)], {"padding": "same"}),
    "unbatched": lambda: Case(torch.conv2d, [data(2, 5, 5), param(3, 2, 3, 3), param(3)], axes=[]),
    "unbatched transposed": lambda: Case(
        torch.conv_transpose2d, [data(2, 3, 3), param(2, 3, 3, 3), param(3), 2], axes=[]),
    "cropping transposed": lambda: Case(
        torch.conv_transpose1d, [data(4, 2, 5), param(2, 3, 2), None, 1, 2], axes=[0]),
    "upsampling": lambda: Case(
        torch.conv_transpose2d, [data(4, 2, 3, 3), param(2, 3, 2, 2), param(3), 2], axes=[0]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVS)
def test_convolution_cases(name: str) -> None:
    check(CONVS[name]())


def _assign(x: Tensor, value: Tensor) -> None:
    x[:, 1] = value


OPAQUE: dict[str, Callable[[int], Case]] = {
    "einsum, diagonal": lambda n: Case(torch.einsum, ["ni,ii->ni", data(n, 3), param(3, 3)]),
    "einsum, sublists": lambda n: Case(torch.einsum, [data(n, 3), [0, 1], param(3, 2), [1, 2], [0, 2]]),
    "parameter as image": lambda n: Case(torch.conv2d, [param(1, 2, 4, 4), data(n, 2, 3, 3)]),
    "normalize": lambda n: Case(F.cosine_similarity, [data(n, 4, 3), param(3)], {"dim": -1}),
    "cdist": lambda n: Case(torch.cdist, [data(n, 3), param(4, 3)]),
    "frequency": lambda n: Case(
        F.embedding, [torch.randint(0, 4, (n, 4)), param(4, 3)], {"scale_grad_by_freq": True}),
    "bag, max": lambda n: Case(F.embedding_bag, [torch.randint(0, 5, (n, 4)), param(5, 3)], {"mode": "max"}),
    "table[:, index]": lambda n: Case(torch.Tensor.__getitem__, [
        param(3, 4), (slice(None), torch.randint(0, 4, (n,)))]),
    "assignment": lambda n: Case(torch.Tensor.__setitem__, [data(n, 4, 3), (slice(None), 1), param(3)]),
    "in place": lambda n: Case(torch.Tensor.index_add_, [data(n, 3), 1, torch.tensor([2, 0]), param(n, 2)]),
    "layer norm of a parameter": lambda n: Case(F.layer_norm, [param(4, 3), (3,), data(3)]),
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_call(name: str, n: int) -> None:
    check(OPAQUE[name](n), opaque=True)


def test_opaque_batches_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.ops.opaque._CHUNK", 40)
    check(Case(torch.cdist, [data(5, 3), param(4, 3)]), opaque=True)


def test_opaque_loops_where_torch_cannot_batch() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
            ctx.save_for_backward(x, p)
            return x * p**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
            x, p = ctx.saved_tensors
            assert g.sum().item() == g.sum().item()  # .item() is refused under vmap
            return None, (g * x * 3 * p**2).sum(0)

    check(Case(Cube.apply, [data(3, 2), param(2)]), opaque=True)


def test_opaque_refuses_random_calls_and_keeps_the_random_state() -> None:
    case = Case(lambda x, p: x * F.dropout(p.expand_as(x), 0.5), [data(4, 30), param(30)])
    (slot,) = ops.slots(case.call(), case.tensors())
    g, state = data(1, 4, 30), torch.get_rng_state()
    with pytest.raises(Undefined, match="random"):
        slot.dense(g, Samples(4, 0))
    assert torch.equal(state, torch.get_rng_state())


@torch.library.custom_op("layerwise_tests::noisy", mutates_args=())
def noisy(x: Tensor, w: Tensor) -> Tensor:
    return x * w * torch.rand_like(x)


noisy.register_autograd(
    lambda ctx, g: (None, (g * ctx.saved_tensors[1] / ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1], output),
)


@pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath")
@pytest.mark.parametrize("quantity", [lw.Variance, lw.KFLR])
def test_the_refusal_of_a_random_call_names_parameter_and_line(quantity: Callable[[], lw.Quantity]) -> None:
    w = nn.Parameter(torch.ones(3))
    asked = r"at Use 0: noisy\S* of gate \(line \d+ of test_ops.py\), .* the call is random"
    with pytest.raises(Undefined, match=asked), lw.observe({"gate": w}, quantity()):
        F.mse_loss(noisy(torch.randn(4, 3), w), torch.zeros(4, 3)).backward()


def test_opaque_refuses_a_wrong_batched_derivative_and_loops() -> None:
    class Batched(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * p

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
            wrong = torch._C._functorch.is_batchedtensor(g)
            return None, (g * ctx.saved_tensors[0]).sum(0) * (2 if wrong else 1)

    check(Case(Batched.apply, [data(3, 2), param(2)]), opaque=True)


def test_complex_calls_are_opaque_and_exact() -> None:
    x, g = torch.randn(4, 3, dtype=torch.complex128), torch.randn(2, 4, 3, dtype=torch.complex128)
    for dtype in (torch.float64, torch.complex128):
        p = nn.Parameter(torch.randn(3, dtype=dtype))
        (slot,) = ops.slots(Call(torch.mul, (x, p), {}, x.shape), [p])
        assert isinstance(slot, OpaqueSlot)
        # the real masks of the brute force, in complex numbers
        rows = [torch.autograd.grad(x * p, p, torch.where(mask, c, 0))[0] for c in g for mask in (
            (torch.arange(4) % 2 == n).unsqueeze(1) for n in range(2))]  # fmt: skip
        expected = torch.stack(rows).reshape(2, 2, 3)
        torch.testing.assert_close(slot.dense(g, Samples(2, 0, False)), expected, **TOLERANCE)


def test_opaque_has_no_rows() -> None:
    case = OPAQUE["cdist"](3)
    (slot,) = ops.slots(case.call(), case.tensors())
    for ask in (
        lambda: slot.input(None),
        lambda: slot.output(data(1, 3, 4), None),
        lambda: slot.fold(data(1, 4, 3)),
        lambda: slot.matrix(slot.used),
    ):
        with pytest.raises(Undefined, match="cdist"):
            ask()


def test_rows_along_an_axis_of_the_tensor_itself_are_refused() -> None:
    for name in ("elementwise full size", "contraction bmm, weight per sample"):
        case, axis = TABLE[name](3), 0
        (slot,) = ops.slots(case.call(), case.tensors())
        assert axis in slot.aligned
        with pytest.raises(SamplesMixed, match="dense"):
            slot.rows(torch.randn(1, *case.run().shape, dtype=torch.float64), Samples(3, axis))


@pytest.mark.parametrize("build", [token, stacked, added, twice_expanded])
def test_expanded_parameters_have_rows_along_the_samples(build: Callable[[int], Case]) -> None:
    case = build(5)
    (slot,) = ops.slots(case.call(), case.tensors())
    assert slot.used is case.params[0]  # not the N copies of it
    assert 0 in slot.axes and 0 not in slot.aligned
    rows = slot.output(torch.randn(1, *case.run().shape, dtype=torch.float64), Samples(5, 0))
    assert rows.shape[1] == 5 and rows.shape[3] == slot.used.numel()


def test_calls_that_overwrite_a_derived_tensor_read_it_before() -> None:
    p, x = param(3) * 1, data(3)
    (slot,) = ops.slots(Call(torch.Tensor.mul_, (p, x), {}, x.shape), [p])
    g = data(1, 3)
    assert torch.allclose(slot.dense(g, Samples(3, 0))[0], torch.diag(g[0] * x), rtol=1e-12)


def test_training_norms_leave_the_running_statistics() -> None:
    case = NORMS["batch, training"](4)
    before = [x.clone() for x in case.args[1:]]
    case.args = [case.args[0], *(x.clone() for x in before)]
    call = Call(case.func, tuple(case.args), case.kwargs, case.args[0].shape)
    for slot in ops.slots(call, case.tensors()):
        slot.rows(torch.randn(1, *call.out_shape, dtype=torch.float64), None)
    assert all(torch.equal(a, b) for a, b in zip(before, case.args[1:], strict=True))


def test_other_dtypes_are_cast_to_that_of_the_parameter() -> None:
    cases = [
        (F.linear, (torch.randn(4, 3, dtype=torch.bfloat16), nn.Parameter(torch.randn(2, 3))), (4, 2)),
        (torch.conv2d, (torch.randn(4, 2, 3, 3, dtype=torch.bfloat16), nn.Parameter(torch.randn(2, 2, 2, 2))),
         (4, 2, 2, 2)),
        (torch.mul, (torch.randn(4, 3, dtype=torch.bfloat16), nn.Parameter(torch.randn(3))), (4, 3)),
        (F.layer_norm, (torch.randn(4, 3, dtype=torch.bfloat16), (3,), nn.Parameter(torch.randn(3))), (4, 3)),
        (torch.cdist, (torch.randn(4, 3, dtype=torch.bfloat16), nn.Parameter(torch.randn(2, 3))), (4, 2)),
    ]  # fmt: skip
    for func, args, shape in cases:
        (slot,) = ops.slots(Call(func, args, {}, torch.Size(shape)), [args[-1]])
        g = torch.randn(2, *shape, dtype=torch.bfloat16)
        dense = slot.dense(g, Samples(4, 0))
        assert dense.dtype == torch.float32
        wide = [x.float() if isinstance(x, Tensor) and x is not args[-1] else x for x in args]
        expected = brute(Case(func, wide), args[-1], g.float(), Samples(4, 0))
        torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)
        if slot.factored:
            assert slot.input(None).dtype == slot.output(g, None).dtype == torch.float32


def test_cheap_rows_are_views() -> None:
    x, w, b = data(4, 5, 3), param(2, 3), param(2)
    weight, bias = ops.slots(Call(F.linear, (x, w, b), {}, torch.Size((4, 5, 2))), [w, b])
    g = data(3, 4, 5, 2)
    assert weight.input(None).data_ptr() == x.data_ptr()
    for samples in (None, Samples(4, 0), Samples(5, 1)):
        assert weight.input(samples).data_ptr() == x.data_ptr()
        for slot in (weight, bias):
            assert slot.output(g, samples).data_ptr() == g.data_ptr()
    x, w, b = data(4, 3, 5, 5), param(2, 3, 3, 3), param(2)
    kernel, bias = ops.slots(Call(torch.conv2d, (x, w, b), {}, torch.Size((4, 2, 3, 3))), [w, b])
    g = data(3, 4, 2, 3, 3)
    for samples in (None, Samples(4, 0)):
        assert kernel.output(g, samples).data_ptr() == g.data_ptr() == bias.output(g, samples).data_ptr()
        assert kernel.input(samples).permute(2, 3, 0, 1).is_contiguous()  # the layout [k,i,n,t]


class Seen(TorchFunctionMode):
    """Collects every call on a parameter as the tape sees it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, list[Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat: list[Any] = []
        for value in (*args, *kwargs.values()):
            flat += value if isinstance(value, (list, tuple)) else [value]
        used = [x for x in flat if isinstance(x, nn.Parameter)]
        before = (args[0].clone(), *args[1:]) if args and ops.writes_first(func) else args
        out = func(*args, **kwargs)
        if used and isinstance(out, Tensor):
            self.calls.append((Call(func, before, kwargs, out.shape), used))
        return out


def in_place(x: Tensor, p: Tensor) -> Tensor:
    y = x * 1
    y += p
    y *= p
    y -= p
    y /= p
    return y


_p, _w = param(6), param(6, 6)


def ready(module: nn.Module, *inputs: Tensor) -> Callable[[], Tensor]:
    return partial(module.double(), *inputs)


MODELS: dict[str, Callable[[], Any]] = {
    "linear": lambda: ready(nn.Linear(6, 3), data(4, 6)),
    "bilinear": lambda: ready(nn.Bilinear(6, 6, 3), data(4, 6), data(4, 6)),
    **{
        f"conv2d {mode}": lambda mode=mode: ready(nn.Conv2d(6, 4, 3, padding=1, groups=2, padding_mode=mode),
            data(4, 6, 5, 5))
        for mode in ("zeros", "circular", "reflect", "replicate")
    },
    "conv1d": lambda: ready(nn.Conv1d(6, 3, 3, padding="same"), data(4, 6, 5)),
    "conv3d": lambda: ready(nn.Conv3d(6, 3, 3, dilation=2), data(4, 6, 5, 5, 5)),
    "transposed 1d": lambda: ready(nn.ConvTranspose1d(6, 3, 3, stride=2, output_padding=1), data(4, 6, 5)),
    "transposed 2d": lambda: ready(nn.ConvTranspose2d(6, 3, 3), data(4, 6, 5, 5)),
    "transposed 3d": lambda: ready(nn.ConvTranspose3d(6, 3, 2), data(4, 6, 2, 2, 2)),
    "embedding": lambda: ready(nn.Embedding(5, 3, padding_idx=0), torch.tensor([[1, 2]])),
    "bag": lambda: ready(nn.EmbeddingBag(5, 3), torch.tensor([[1, 2]])),
    "layer norm": lambda: ready(nn.LayerNorm(6), data(4, 6)),
    "rms norm": lambda: ready(nn.RMSNorm(6), data(4, 6)),
    "group norm": lambda: ready(nn.GroupNorm(3, 6), data(4, 6, 5)),
    "instance norm": lambda: ready(nn.InstanceNorm2d(6, affine=True), data(4, 6, 5, 5)),
    "batch norm": lambda: ready(nn.BatchNorm2d(6).eval(), data(4, 6, 5, 5)),
    "batch norm, training": lambda: ready(nn.BatchNorm1d(6), data(4, 6)),
    "prelu": lambda: ready(nn.PReLU(6), data(4, 6, 5)),
    "arithmetic": lambda: lambda: [
        op for x in (data(4, 6),) for op in (
            x + _p, _p + x, x - _p, _p - x, x * _p, _p * x, x / _p, _p / x, x.exp() ** _p, _p.add(x))],
    "in place": lambda: lambda: in_place(data(4, 6), _p),
    "products": lambda: lambda: [
        op for x in (data(4, 6),) for op in (
            x @ _w, _w @ x.T, torch.matmul(x, _w), x.matmul(_w), x.mm(_w), x.T.__rmatmul__(_w), x @ _p,
            torch.einsum("ni,io->no", x, _w), torch.tensordot(x, _w, 1), torch.addmm(_p, x, _w))],
    "selection": lambda: lambda: [
        torch.where(data(4, 6) > 0, data(4, 6), _p), torch.cat([data(4, 6), _w]), _w[torch.tensor([1, 2])]],
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_calls_of_ordinary_models_are_known(name: str) -> None:
    run = MODELS[name]()
    with Seen() as seen:
        run()
    assert seen.calls
    for call, used in seen.calls:
        if call.out_shape and "get" not in getattr(call.func, "__name__", ""):
            assert call.func in BUILD, call.func
            for slot in ops.slots(call, used):
                assert not isinstance(slot, OpaqueSlot), call.func
                slot.rows(torch.randn(2, *call.out_shape, dtype=torch.float64), None)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(6, 3)(nn.utils.rnn.pack_sequence([torch.randn(4, 6)])),
        lambda: torch._native_multi_head_attention(
            *[torch.randn(4, 3, 6)] * 3, 6, 2, torch.randn(18, 6), torch.randn(18), torch.randn(6, 6), torch.randn(6)
        ),
        lambda: nn.Embedding(5, 3, max_norm=1.0)(torch.tensor([1])),
        lambda: nn.EmbeddingBag(5, 3, max_norm=1.0)(torch.tensor([[1]])),
    ],
)
def test_composite_calls_are_refused(build: Callable[[], Any]) -> None:
    reasons = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reasons.append(ops.refused(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Watch():
        build()
    assert sum(reason is not None for reason in reasons) == 1


def test_ordinary_calls_are_not_refused() -> None:
    for func in (F.linear, torch.conv2d, F.embedding, torch.add, torch.cdist):
        assert ops.refused(func) is None
    assert torch.cdist not in BUILD


def test_sample_owners_match_split() -> None:
    for n_major in (True, False):
        samples = Samples(3, 0, n_major)
        owner = samples.split(samples.owner(12), 0)
        assert owner.shape == (3, 4)
        assert torch.equal(owner, torch.arange(3).unsqueeze(1).expand(3, 4))
    assert math.prod(owner.shape) == 12
