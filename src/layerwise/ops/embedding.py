"""Look-ups in a table: `embedding`, an index of the first axis, and `embedding_bag`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.ops.arguments import bind, count, plain
from layerwise.ops.base import Call, Slot
from layerwise.rows.base import Samples

__all__ = ["FUNCTIONS", "BagSlot", "EmbeddingSlot", "bags_of_rows", "slots"]
_BAG = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip


class EmbeddingSlot(Slot):
    """Rows of a table chosen by an index: the input row is one-hot, given as the index of its 1."""

    indexed = True

    def __init__(self, used: Tensor, index: Tensor, padding: int | None = None) -> None:
        self.used, self._index, self._padding = used, index, padding
        self._lead = index.shape
        self.axes = range(index.ndim)

    def _rows(self, x: Tensor, lead: int, tail: list[int], samples: Samples | None) -> Tensor:
        """`[lead.., *lead axes of the output, *tail]` to `[lead.., N,T, *tail]`."""
        size, axis = self._lead.numel(), 0 if samples is None else samples.axis
        n = self._lead[axis] if self._lead else 1
        if axis:
            x = x.movedim(lead + axis, lead)
        if samples is not None:
            x, n = samples.split(x, lead), samples.n
        return x.reshape(*x.shape[:lead], n, size // n if n else 0, *tail)

    def input(self, samples: Samples | None) -> Tensor:
        """The index as int64 `[N,T]`."""
        # torch counts negative indices from the end
        return self._rows(self._index.long().remainder(self.used.shape[0]), 0, [], samples)

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        """Cotangent rows `[V,N,T,1,O]`, zero where the index is the padding's."""
        g = g.to(self.used.dtype)
        if self._padding is not None:  # these positions give the table no gradient
            pad = self._index == self._padding
            g = g.masked_fill(pad.reshape(*pad.shape, *(1,) * (self.used.ndim - 1)), 0)
        return self._rows(g, 1, [1, math.prod(self.used.shape[1:])], samples)

    def matrix(self, used: Tensor) -> Tensor:
        """The table as `[1,O,I]`."""
        return used.reshape(1, used.shape[0], -1).transpose(1, 2)

    def fold(self, w: Tensor) -> Tensor:
        """Carry `[..., 1,O,I]` to the table's shape."""
        return w.squeeze(-3).transpose(-1, -2).reshape(*w.shape[:-3], *self.used.shape)


class BagSlot(EmbeddingSlot):
    """Weighted sums of rows of a table: the input rows `[bags, I]` hold how much of each row was taken."""

    indexed = False

    def __init__(self, used: Tensor, bags: int, counts: Callable[[], Tensor]) -> None:
        self.used, self._counts, self._padding = used, counts, None
        self._lead = torch.Size((bags,))
        self.axes = (0,)

    def input(self, samples: Samples | None) -> Tensor:
        """How much of each row of the table was taken, `[N,T,1,I]`."""
        return self._rows(self._counts(), 0, [1, self.used.shape[0]], samples)


def _bound(call: Call, names: tuple[str, ...]) -> dict[str, Any] | None:
    defaults = {"norm_type": 2.0, "scale_grad_by_freq": False, "mode": "mean", "include_last_offset": False}
    values = bind(call, names, tuple(defaults.get(name) for name in names))
    return None if values is None else dict(zip(names, values, strict=True))


def _embedding(call: Call, used: Tensor) -> Slot | None:
    v = _bound(call, ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
                      "sparse"))  # fmt: skip
    if v is None or v["weight"] is not used or v["max_norm"] is not None or v["scale_grad_by_freq"]:
        return None
    padding = v["padding_idx"]
    return EmbeddingSlot(used, v["input"], None if padding is None else padding % used.shape[0])


def _bag(call: Call, used: Tensor) -> Slot | None:
    v = _bound(call, _BAG)
    if v is None or v["weight"] is not used or count((call.args, call.kwargs), used) != 1:
        return None
    if v["mode"] not in ("sum", "mean") or v["max_norm"] is not None or v["scale_grad_by_freq"]:
        return None
    weights = v["per_sample_weights"]
    if weights is not None and weights.requires_grad:
        weights = weights.detach()
    bags = call.out_shape[0]

    def counts() -> Tensor:
        flat, bag = v["input"].long().flatten(), _bag_of_each(v["input"], v["offsets"], bags)
        one = used.new_ones(len(flat)) if weights is None else weights.flatten().to(used.dtype)
        if v["padding_idx"] is not None:
            one = one.masked_fill(flat == v["padding_idx"] % used.shape[0], 0)
        rows = used.new_zeros(bags, used.shape[0]).index_put_((bag, flat), one, accumulate=True)
        return rows if v["mode"] == "sum" else rows / rows.sum(1, keepdim=True).clamp(min=1)

    return BagSlot(used, bags, counts)


def _bag_of_each(index: Tensor, offsets: Tensor | None, bags: int) -> Tensor:
    """The number of the bag that each element of the index, flattened, goes to."""
    if index.ndim == 2 or offsets is None:
        return torch.arange(bags, device=index.device).repeat_interleave(index.shape[1])
    places = torch.arange(len(index), device=index.device)
    return torch.searchsorted(offsets[:bags].long(), places, right=True) - 1


def bags_of_rows(embedding: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding_bag` by calls that can be differentiated twice; embedding: what looks up rows, as `F.embedding`.

    Raises Undefined under `scale_grad_by_freq`, where torch divides by counts of its own.
    """
    call = Call(F.embedding_bag, args, kwargs, torch.Size())
    v = _bound(call, _BAG)
    if v is None or v["max_norm"] is not None or (v["sparse"] and embedding is F.embedding):
        return F.embedding_bag(*args, **kwargs)
    if v["scale_grad_by_freq"]:
        raise Undefined(
            "asked for products with the curvature of an embedding_bag with scale_grad_by_freq=True, whose gradient in "
            "torch 2.13 is divided by counts of other rows on the CPU, and is no derivative: leave that option out"
        )
    index, table, offsets, weights, padding = (
        v[name] for name in ("input", "weight", "offsets", "per_sample_weights", "padding_idx")
    )
    bags = len(index) if index.ndim == 2 else len(offsets) - v["include_last_offset"]
    flat, bag = index.long().flatten(), _bag_of_each(index, offsets, bags)
    rows = embedding(flat, table, padding)
    counted = torch.ones_like(flat) if padding is None else (flat != padding % len(table)).long()
    size = torch.zeros(bags, dtype=torch.int64, device=flat.device).index_add_(0, bag, counted).unsqueeze(1)
    if v["mode"] == "max":
        with torch.no_grad():  # which row gave each element; of an empty bag, none did
            whole = torch.cat((size.new_zeros(1, 1), size.cumsum(0))).flatten()
            kept = flat[counted.bool()]
            chosen = torch.embedding_bag(table, kept, whole, False, 2, False, None, True)[3].long()
        width = table.shape[1]  # each element is a row of the table's elements, which is linear
        places = chosen.clamp(min=0) * width + torch.arange(width, device=flat.device)
        return embedding(places, table.reshape(-1, 1), None).squeeze(-1).masked_fill(size == 0, 0)
    scale = counted.to(rows.dtype) if weights is None else counted * weights.flatten()
    out = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows * scale.unsqueeze(1))
    return out / size.clamp(min=1) if v["mode"] == "mean" else out


def _index(call: Call, used: Tensor) -> Slot | None:
    """`table[index]` with one tensor of integers: an embedding."""
    if len(call.args) != 2 or call.kwargs or call.args[0] is not used or used.ndim == 0:
        return None
    index = call.args[1]
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    return EmbeddingSlot(used, index) if whole else None


def _index_select(call: Call, used: Tensor) -> Slot | None:
    bound = bind(call, ("input", "dim", "index"), (None, None, None))
    if bound is None or bound[0] is not used or used.ndim == 0 or bound[1] % used.ndim or bound[2].ndim != 1:
        return None
    return EmbeddingSlot(used, bound[2])


FUNCTIONS: dict[Callable[..., Any], Callable[[Call, Tensor], Slot | None]] = {
    F.embedding: _embedding,
    F.embedding_bag: _bag,
    torch.Tensor.__getitem__: _index,
    torch.index_select: _index_select,
    torch.Tensor.index_select: _index_select,
}


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slots of tables looked up by a call; None for any other tensor."""
    build = FUNCTIONS[call.func]
    return [build(call, u) if plain(u) else None for u in used]
