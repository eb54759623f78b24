"""Small random programs whose samples are any set of rows: pieces, routes, constants first, chosen rows, pools, pairs.

python -m tests.random_programs --count 2000 --seed 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_nets import Program
from torch import Tensor, nn
from zoo.parts import Apply

__all__ = ["INGREDIENTS", "Layout", "layouts"]

INGREDIENTS = ("pieces", "routed", "constant_first", "chosen", "uneven", "pairs", "one_by_one")

Draw = Callable[[Any], Any]
Step = Callable[[Any, Tensor], Tensor]  # (model, rows) -> rows


@dataclass(repr=False)
class Layout(Program):
    """A program with the sample of each row that its loss receives.

    after: from the model's output to those rows. untold: whether nothing but the user can say what a sample is.
    """

    number: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    count: int = 0
    after: Callable[[Tensor], Tensor] = lambda z: z
    untold: bool = False

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) for x in self.x]
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return f"{self.description}, {shapes}, {self.reduction}, {self.factor}, {trained}"

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.count

    def logits(self) -> Tensor:
        """What the loss receives."""
        return self.after(super().logits())

    def terms(self) -> Tensor:
        """The samples' terms: the losses of their rows added up, over the number by which the mean divides."""
        z = self.logits()
        rows = torch.stack([self.call(z[r : r + 1], self.y[r : r + 1], "sum") for r in range(len(z))])
        terms = torch.stack([rows[self.number == n].sum() for n in range(self.count)])
        return self.factor * terms * (self._share() if self.reduction == "mean" else 1)


# Layers on rows ---------------------------------------------------------------------------------


def _sizes(draw: Draw, total: int) -> list[int]:
    """Sizes of pieces that add up."""
    sizes = []
    while total:
        sizes.append(draw(st.integers(1, total)))
        total -= sizes[-1]
    return sizes


def _pieces(draw: Draw, name: str, rows: int) -> Step:
    """A layer on the pieces of the batch: chunks, uneven pieces, every other row, two slices."""
    kind = draw(st.sampled_from(["chunks", "split", "strided", "slices", "groups"]))
    many, sizes, at = draw(st.integers(1, 3)), _sizes(draw, rows), draw(st.integers(0, rows))
    if kind == "strided" and rows % 2 == 0:
        return lambda m, x: torch.stack([getattr(m, name)(part) for part in (x[::2], x[1::2])], 1).flatten(0, 1)
    parts = {
        "split": lambda x: x.split(sizes),
        "slices": lambda x: (x[:at], x[at:]),
        "groups": lambda x: x.view(-1, many, *x.shape[1:]).unbind() if len(x) % many == 0 else (x,),
    }.get(kind, lambda x: x.chunk(many))
    return lambda m, x: torch.cat([getattr(m, name)(part) for part in parts(x)])


def _one_by_one(draw: Draw, name: str) -> Step:
    """A layer row by row."""
    batches = draw(st.booleans())
    if batches:
        return lambda m, x: torch.cat([getattr(m, name)(x[r : r + 1]) for r in range(len(x))])
    return lambda m, x: torch.stack([getattr(m, name)(row) for row in x])


def _routed(draw: Draw, name: str, o: int) -> Step:
    """Two or three layers, one for each row by the sum of its features."""
    kind, many = draw(st.sampled_from(["masks", "index_add", "index_put", "sorted"])), draw(st.integers(2, 3))

    def step(m: Any, x: Tensor) -> Tensor:
        experts = [getattr(m, f"{name}{e or ''}") for e in range(many)]
        rows = x.flatten(0, -2)
        route = (3 * rows.detach().sum(-1)).round().long() % many
        out = rows.new_zeros(len(rows), o)
        if kind == "sorted":
            order = route.argsort(stable=True)
            pieces = rows[order].split(route.bincount(minlength=many).tolist())
            out = torch.cat([layer(piece) for layer, piece in zip(experts, pieces, strict=True)])[order.argsort()]
        for e, layer in enumerate(experts if kind != "sorted" else []):
            chosen = route == e
            if kind == "masks":
                out[chosen] = layer(rows[chosen])
            elif kind == "index_add":
                at = chosen.nonzero()[:, 0]
                out = out.index_add(0, at, layer(rows.index_select(0, at)))
            else:
                out = out.index_put(chosen.nonzero(as_tuple=True), layer(rows[chosen]))
        return out.view(*x.shape[:-1], o)

    return step


def _some_rows(draw: Draw, name: str, shape: tuple[int, ...], o: int) -> Step:
    """A layer on the rows that a mask keeps, and zeros elsewhere."""
    keep = torch.rand(shape) > draw(st.sampled_from([0.2, 0.6]))
    keep.view(-1)[0] = True

    def step(m: Any, x: Tensor) -> Tensor:
        out = x.new_zeros(*shape, o)
        out[keep] = getattr(m, name)(x[keep])
        return out

    return step


def _layer(draw: Draw, ingredient: str, name: str, shape: tuple[int, ...], o: int) -> tuple[str, Step]:
    """One of the ways above, or the layer on all rows at once, and its name."""
    others = ["whole", "whole", "pieces", "routed", "masked", "one_by_one"]
    kind = draw(st.sampled_from([ingredient] * 4 + others if ingredient in others else others))
    if kind == "pieces":
        return kind, _pieces(draw, name, shape[0])
    if kind == "routed":
        return kind, _routed(draw, name, o)
    if kind == "masked":
        return kind, _some_rows(draw, name, shape, o)
    if kind == "one_by_one":
        return kind, _one_by_one(draw, name)
    return kind, lambda m, x: getattr(m, name)(x)


# Constants, pools, choices ----------------------------------------------------------------------


def _constant(draw: Draw, steps: int | None, h: int) -> tuple[Callable[[Any], Tensor], dict[str, nn.Module]]:
    """(model) -> what is added to every row, `[T,h]` or `[h]`, from parameters alone; and its parts."""
    index = torch.randint(4, (1 if steps is None else steps,))
    if draw(st.booleans()):
        index = index[None]
    features = torch.randn(*index.shape, 2)
    kind = draw(st.sampled_from(["table", "features", "deep"]))
    parts = {
        "table": {"table": nn.Embedding(4, h)},
        "features": {"table": nn.Linear(2, h)},
        "deep": {"table": nn.Embedding(4, 3), "above": nn.Linear(3, h)},
    }[kind]

    def constant(m: Any) -> Tensor:
        given = features.to(next(m.parameters()).dtype) if kind == "features" else index
        value = m.table(given)
        value = m.above(value.tanh()) if kind == "deep" else value
        return value.sum(-2) if steps is None else value

    return constant, parts


def _pool(draw: Draw, number: Tensor, n: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A name, and rows of uneven samples, `[R,h]`, to `[N,h]`."""
    kinds = ["index_add", "scatter_add", "matrix", "mean"]
    if bool((number.diff() >= 0).all()):
        kinds.append("split")
    kind, counts = draw(st.sampled_from(kinds)), number.bincount(minlength=n)
    return kind, {
        "index_add": lambda h: h.new_zeros(n, h.shape[1]).index_add(0, number, h),
        "scatter_add": lambda h: h.new_zeros(n, h.shape[1]).scatter_add(0, number[:, None].expand_as(h), h),
        "matrix": lambda h: (number == torch.arange(n)[:, None]).to(h.dtype) @ h,
        "mean": lambda h: h.new_zeros(n, h.shape[1]).index_add(0, number, h) / counts[:, None],
        "split": lambda h: torch.stack([part.mean(0) for part in h.split(counts.tolist())]),
    }[kind]


def _choice(draw: Draw, n: int, t: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(logits `[N,T,o]` -> the rows that count, the sample of each); every sample keeps one at least."""
    keep = torch.rand(n, t) > draw(st.sampled_from([0.3, 0.7]))
    keep[torch.arange(n), torch.randint(t, (n,))] = True
    kind = draw(st.sampled_from(["mask", "nonzero", "select", "active", "index_select"]))
    choose = {
        "mask": lambda z: z[keep],
        "nonzero": lambda z: z[keep.nonzero(as_tuple=True)],
        "select": lambda z: z.masked_select(keep[..., None]).view(-1, z.shape[-1]),
        "active": lambda z: z.reshape(-1, z.shape[-1])[keep.view(-1)],
        "index_select": lambda z: z.flatten(0, 1).index_select(0, keep.flatten().nonzero()[:, 0]),
    }[kind]
    return choose, keep.nonzero()[:, 0]


# Programs ---------------------------------------------------------------------------------------


def _losses(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Callable, Tensor]:
    if draw(st.booleans()):
        return lambda z, y, r: F.cross_entropy(z, y, reduction=r), torch.randint(shape[1], shape[:1])
    return lambda z, y, r: F.mse_loss(z, y, reduction=r), torch.randn(shape, dtype=dtype)


def _of_pairs(draw: Draw, dtype: torch.dtype, n: int) -> tuple[Callable, Tensor]:
    """A loss of the difference of two scores."""
    if draw(st.booleans()):
        return lambda z, y, r: F.binary_cross_entropy_with_logits(z, y, reduction=r), torch.rand(n, dtype=dtype)
    return lambda z, y, r: F.mse_loss(z, y, reduction=r), torch.randn(n, dtype=dtype)


@st.composite
def layouts(draw: Draw, ingredient: str) -> Layout:
    """Programs with one ingredient for certain, and others by chance."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    form = {"uneven": "uneven", "pairs": "pairs", "chosen": "sequence"}.get(ingredient)
    form = form or draw(st.sampled_from(["rows", "sequence", "sequence", "uneven", "pairs"]))
    n, t = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    i, h, o = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(2, 3))
    number = torch.arange(n).repeat_interleave(torch.randint(1, 4, (n,)))
    if form == "uneven" and draw(st.booleans()):
        number = number[torch.randperm(len(number))]
    shape = {"rows": (n,), "sequence": (n, t), "uneven": (len(number),), "pairs": (2 * n,)}[form]
    way, first = _layer(draw, ingredient, "first", shape, h)
    deep, mix = draw(st.booleans()), form == "sequence" and draw(st.booleans())
    other, second = _layer(draw, ingredient, "second", shape, h) if deep else ("", None)
    parts = {f"first{e}": nn.Linear(i, h) for e in (("", 1, 2) if way == "routed" else ("",))}
    parts |= {f"second{e}": nn.Linear(h, h) for e in (("", 1, 2) if other == "routed" else ("",))} if deep else {}
    constant = None
    if ingredient == "constant_first" or draw(st.integers(0, 3)) == 0:
        constant, more = _constant(draw, t if form == "sequence" else None, h)
        parts |= more
    end, pool, after, untold, samples = _ends(draw, ingredient, form, number, n, t)

    def forward(m: Any, x: Tensor) -> Tensor:
        shift = 0.0 if constant is None else constant(m)
        z = (first(m, x) + shift).tanh()
        z = z.cumsum(1) if mix else z
        z = z if second is None else second(m, z).tanh()
        return m.head(pool(z))

    model = Apply(forward, **parts, head=nn.Linear(h, 1 if form == "pairs" else o))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    model = model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.6)
    for p in model.parameters():
        p.requires_grad_(draw(st.integers(0, 4)) > 0)
    terms = after.number
    size = (n,) if form == "pairs" else (len(terms), o)
    call, y = _of_pairs(draw, dtype, n) if form == "pairs" else _losses(draw, size, dtype)
    said = [form, way, other, "a constant first" if constant else "no constant", end, str(dtype), f"samples={samples}"]
    return Layout(
        model, (torch.randn(*shape, i, dtype=dtype),), y, call, draw(st.sampled_from(["mean", "sum", "none"])),
        draw(st.sampled_from([1.0, 1.0, 10.0])), ", ".join(said), samples, terms, n, after.rows, untold,
    )  # fmt: skip


class _After(NamedTuple):
    """From the model's output to the loss's rows, and the sample of each."""

    rows: Callable[[Tensor], Tensor]
    number: Tensor


def _ends(
    draw: Draw, ingredient: str, form: str, number: Tensor, n: int, t: int
) -> tuple[str, Callable[[Tensor], Tensor], _After, bool, int | Tensor | None]:
    """A name; in front of the head; behind the model; whether only the user knows the samples; what is said of them."""
    pool, every, kind = (lambda z: z), torch.arange(n), ""
    after, untold = _After(lambda z: z, every), False
    if form == "pairs":
        half = draw(st.booleans())
        after = _After(lambda z: (z[:n] - z[n:] if half else z[::2] - z[1::2])[:, 0], every)
        untold = True
    elif form == "uneven" and draw(st.integers(0, 3)) > 0:
        kind, pool = _pool(draw, number, n)
    elif form == "uneven":
        after, untold = _After(lambda z: z, number), True
    elif form == "sequence":
        kind = "chosen" if ingredient == "chosen" else draw(st.sampled_from(["mean", "last", "flat", "chosen"]))
        if kind == "chosen":
            after = _After(*_choice(draw, n, t))
        elif kind == "flat":
            after = _After(lambda z: z.flatten(0, 1), every.repeat_interleave(t))
        elif kind == "last":
            last = torch.randint(t, (n,))
            pool = lambda z: z[torch.arange(n), last]  # noqa: E731
        else:
            pool = lambda z: z.mean(1)  # noqa: E731
    said = draw(st.sampled_from(["numbers", "count"] if untold else ["nothing", "nothing", "nothing", "numbers"]))
    if untold and form == "uneven":
        said = "numbers"  # a count does not say which rows, and without one every row is a sample
    elif untold and draw(st.integers(0, 5)) == 0:
        said = "nothing"
    return kind, pool, after, untold, {"nothing": None, "count": n, "numbers": after.number}[said]
