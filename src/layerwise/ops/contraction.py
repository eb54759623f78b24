"""Products of tensors: `linear`, `matmul`, `addmm`, `bmm`, `bilinear`, `einsum` and their kin as one form.

Every such call is an einsum. Seen from one operand, each letter is of one of four kinds:

    k   in the operand, in another one and in the output
    i   in the operand, not in the output (summed)
    o   in the operand and the output only
    p   in another operand and the output only: the positions, samples among them

so the other operands laid out as `[p, k, i]` are the input rows, and the output is `[p, k, o]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import SamplesMixed
from layerwise.ops.arguments import bind, count, plain
from layerwise.ops.base import Call, Samples, Slot
from layerwise.ops.elementwise import BiasSlot, shift

__all__ = ["FUNCTIONS", "ContractionSlot", "slots"]

Letters = tuple[int, ...]
# torch.einsum takes the letters 0 to 51; batch axes count up from 0, the matrix axes are at the end.
_ROW, _SUM, _COLUMN = 49, 50, 51


class Form(NamedTuple):
    """A call as `alpha * einsum(operands) + beta * addend`; `batch` letters may be sample-aligned."""

    tensors: tuple[Tensor, ...]
    letters: tuple[Letters, ...]
    out: Letters
    batch: int = 0
    alpha: float = 1.0
    addend: Any = None
    beta: float = 1.0


class Plan(NamedTuple):
    """The letters of one operand by kind, and what they mean for the output's axes."""

    p: Letters
    k: Letters
    i: Letters
    o: Letters
    axes: tuple[int, ...]
    aligned: dict[int, int]


@lru_cache(maxsize=1024)
def _plan(used: Letters, others: tuple[Letters, ...], out: Letters, batch: int) -> Plan:
    rest = frozenset().union(*others)
    p = tuple(x for x in out if x not in used)
    k = tuple(x for x in used if x in out and x in rest)
    o = tuple(x for x in used if x in out and x not in rest)
    # a plain output letter is a feature; only torch's own batch axes can be a weight per sample
    aligned = {a: used.index(x) for a, x in enumerate(out) if x in k or (x in o and x < batch)}
    axes = tuple(a for a, x in enumerate(out) if x in p or a in aligned)
    return Plan(p, k, tuple(x for x in used if x >= 0 and x not in out), o, axes, aligned)


class ContractionSlot(Slot):
    """One operand of an einsum that is linear in it."""

    def __init__(
        self, used: Tensor, letters: Letters, others: tuple[Tensor, ...], other_letters: tuple[Letters, ...],
        out: Letters, out_shape: torch.Size, batch: int, alpha: float,
    ) -> None:
        self.used = used
        self.plan = plan = _plan(letters, other_letters, out, batch)
        self.axes, self.aligned = plan.axes, plan.aligned
        self._letters, self._others, self._other_letters = letters, others, other_letters
        self._out, self._out_shape, self._alpha = out, out_shape, alpha

    def _sizes(self, letters: Letters) -> list[int]:
        """Sizes of letters of the used tensor (broadcast axes, marked -1, are left out of `letters`)."""
        return [self.used.shape[self._letters.index(x)] for x in letters]

    def _positions(self, samples: Samples | None) -> Letters:
        """The position letters, that of the samples (or the first) in front."""
        p = self.plan.p
        if samples is None:
            return p
        lead = self._out[samples.axis]
        if lead not in p:
            raise SamplesMixed(
                f"rows were asked for samples along axis {samples.axis} of an output of shape "
                f"{tuple(self._out_shape)}, which is no position axis of this call; use dense()"
            )
        return (lead, *(x for x in p if x != lead))

    def _gather(self, want: Letters) -> Tensor:
        """The other operands as one tensor with the axes `want`, constant along letters they lack."""
        rest = frozenset().union(*self._other_letters)
        have = tuple(x for x in want if x in rest)
        tensors = [x.to(self.used.dtype) for x in self._others]
        letters = self._other_letters[0]
        if len(tensors) == 1 and len(letters) == len(have):
            a = tensors[0] if letters == have else tensors[0].permute([letters.index(x) for x in have])
        else:
            with torch.autocast(self.used.device.type, enabled=False):
                pairs = [y for x in zip(tensors, self._other_letters, strict=True) for y in x]
                a = torch.einsum(*pairs, have)
        for axis, x in enumerate(want):
            if x not in rest:  # only ever a summed letter of the used tensor
                a = a.unsqueeze(axis).expand(*a.shape[:axis], *self._sizes((x,)), *a.shape[axis:])
        return a if self._alpha == 1 else a * self._alpha

    def input(self, samples: Samples | None) -> Tensor:
        plan, p = self.plan, self._positions(samples)
        a = self._gather(p + plan.k + plan.i)
        return _as_rows(a, 0, len(p), samples, *_products(self._sizes(plan.k), self._sizes(plan.i)))

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        plan, p = self.plan, self._positions(samples)
        want = p + plan.k + plan.o
        g = g.to(self.used.dtype)
        if want != self._out:
            g = g.permute(0, *(1 + self._out.index(x) for x in want))
        return _as_rows(g, 1, len(p), samples, *_products(self._sizes(plan.k), self._sizes(plan.o)))

    def matrix(self, used: Tensor) -> Tensor:
        plan = self.plan
        order = [self._letters.index(x) for x in plan.k + plan.o + plan.i]
        order += [a for a, x in enumerate(self._letters) if x < 0]  # broadcast axes, of size 1
        shape = _products(self._sizes(plan.k), self._sizes(plan.o), self._sizes(plan.i))
        return used.permute(order).reshape(shape)

    def fold(self, w: Tensor) -> Tensor:
        plan = self.plan
        lead, want = w.ndim - 3, plan.k + plan.o + plan.i
        w = w.reshape(*w.shape[:lead], *self._sizes(want))
        w = w.permute(*range(lead), *(lead + want.index(x) for x in self._letters if x >= 0))
        return w.reshape(*w.shape[:lead], *self.used.shape)


def _products(*sizes: Sequence[int]) -> list[int]:
    return [math.prod(s) for s in sizes]


def _as_rows(x: Tensor, lead: int, positions: int, samples: Samples | None, k: int, c: int) -> Tensor:
    """`[lead.., p.., k.., c..]` to `[lead.., N,T,K,C]`: the first position axis is that of the samples."""
    n = x.shape[lead] if positions else 1
    t = math.prod(x.shape[lead + 1 : lead + positions])
    if samples is not None:
        t *= n // samples.n
        x, n = samples.split(x, lead), samples.n
    return x.reshape(*x.shape[:lead], n, t, k, c)


def _linear(call: Call) -> Form | None:
    bound = bind(call, ("input", "weight", "bias"), (None, None, None))
    if bound is None:
        return None
    x, weight, bias = bound
    lead = tuple(range(x.ndim - 1))
    if weight.ndim == 2:
        return Form((x, weight), ((*lead, _SUM), (_COLUMN, _SUM)), (*lead, _COLUMN), addend=bias)
    return Form((x, weight), ((*lead, _SUM), (_SUM,)), lead, addend=bias)


def _bilinear(call: Call) -> Form | None:
    bound = bind(call, ("input1", "input2", "weight", "bias"), (None,) * 4)
    if bound is None:
        return None
    x, y, weight, bias = bound
    lead = tuple(range(x.ndim - 1))
    letters = ((*lead, _ROW), (*lead, _SUM), (_COLUMN, _ROW, _SUM))
    return Form((x, y, weight), letters, (*lead, _COLUMN), addend=bias)


def _matmul_form(x: Tensor, y: Tensor) -> Form:
    batch = max(x.ndim - 2, y.ndim - 2, 0)
    ends: list[Letters] = []
    for tensor, matrix in ((x, (_ROW, _SUM)), (y, (_SUM, _COLUMN))):
        own = max(tensor.ndim - 2, 0)
        ends.append((*range(batch - own, batch), *(matrix if tensor.ndim > 1 else (_SUM,))))
    out = (*range(batch), *((_ROW,) if x.ndim > 1 else ()), *((_COLUMN,) if y.ndim > 1 else ()))
    return Form((x, y), (ends[0], ends[1]), out, batch)


def _matmul(second: str, flip: bool = False) -> Callable[[Call], Form | None]:
    def parse(call: Call) -> Form | None:
        bound = bind(call, ("input", second), (None, None))
        if bound is None:
            return None
        return _matmul_form(bound[1], bound[0]) if flip else _matmul_form(bound[0], bound[1])

    return parse


def _add_matmul(first: str, second: str) -> Callable[[Call], Form | None]:
    def parse(call: Call) -> Form | None:
        bound = bind(call, ("input", first, second, "beta", "alpha"), (None, None, None, 1, 1))
        if bound is None or len(call.args) > 3:  # beta and alpha in front: an old signature
            return None
        addend, x, y, beta, alpha = bound
        if x.ndim == 1:  # addr
            form = Form((x, y), ((_ROW,), (_COLUMN,)), (_ROW, _COLUMN))
        else:
            form = _matmul_form(x, y)
        return form._replace(alpha=alpha, beta=beta, addend=addend)

    return parse


def _addbmm(call: Call) -> Form | None:
    form = _add_matmul("batch1", "batch2")(call)
    return None if form is None else form._replace(out=form.out[1:], batch=0)


def _outer(call: Call) -> Form | None:
    bound = bind(call, ("input", "vec2"), (None, None))
    return None if bound is None else Form(tuple(bound), ((_ROW,), (_COLUMN,)), (_ROW, _COLUMN))


def _tensordot(call: Call) -> Form | None:
    bound = bind(call, ("a", "b", "dims"), (None, None, 2))
    if bound is None or isinstance(bound[2], Tensor):
        return None
    x, y, dims = bound
    if isinstance(dims, int):
        first, second = list(range(x.ndim - dims, x.ndim)), list(range(dims))
    else:
        first, second = ([d] if isinstance(d, int) else list(d) for d in dims)
    if x.ndim + y.ndim > 52:
        return None
    left, right = list(range(x.ndim)), list(range(x.ndim, x.ndim + y.ndim))
    summed = [left[d] for d in first]
    for d, letter in zip(second, summed, strict=True):
        right[d] = letter
    out = tuple(q for q in left + right if q not in summed)
    return Form((x, y), (tuple(left), tuple(right)), out)


def _einsum(call: Call) -> Form | None:
    if call.kwargs or not call.args or not isinstance(call.args[0], str):
        return None
    tensors = call.args[1:]
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    left, arrow, right = call.args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors) or not all(isinstance(t, Tensor) for t in tensors):
        return None
    dots = [t.ndim - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True)]
    widest = max((d for d, term in zip(dots, terms, strict=True) if "..." in term), default=0)
    named = sorted(set(left) - set(".,"))
    number = {c: widest + j for j, c in enumerate(named)}
    if widest + len(named) > 52:
        return None
    if not arrow:
        right = ("..." if "..." in left else "") + "".join(c for c in named if left.count(c) == 1)

    def read(term: str, dots: int) -> Letters:
        before, ellipsis, after = term.partition("...")
        middle = range(widest - dots, widest) if ellipsis else ()
        return (*(number[c] for c in before), *middle, *(number[c] for c in after))

    letters = tuple(read(term, d) for term, d in zip(terms, dots, strict=True))
    if any(len(set(x)) < len(x) or len(x) != t.ndim for x, t in zip(letters, tensors, strict=True)):
        return None  # a repeated letter takes a diagonal
    return Form(tuple(tensors), letters, read(right, widest))


_METHODS = torch.Tensor
FUNCTIONS: dict[Callable[..., Any], Callable[[Call], Form | None]] = {
    torch.nn.functional.linear: _linear,
    torch.bilinear: _bilinear,
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    _METHODS.__matmul__: _matmul("other"),
    _METHODS.__rmatmul__: _matmul("other", flip=True),
}
for _name, _parse in {
    "matmul": _matmul("other"), "mm": _matmul("mat2"), "bmm": _matmul("mat2"), "mv": _matmul("vec"),
    "dot": _matmul("tensor"), "outer": _outer, "ger": _outer,
    "addmm": _add_matmul("mat1", "mat2"), "addmv": _add_matmul("mat", "vec"),
    "baddbmm": _add_matmul("batch1", "batch2"), "addr": _add_matmul("vec1", "vec2"), "addbmm": _addbmm,
}.items():
    for _owner in (torch, _METHODS):
        FUNCTIONS[getattr(_owner, _name)] = _parse
        if hasattr(_owner, _name + "_"):
            FUNCTIONS[getattr(_owner, _name + "_")] = _parse


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slots of tensors used by a product; None for a tensor that this form does not describe."""
    form = FUNCTIONS[call.func](call)
    return [None] * len(used) if form is None else [_slot(call, form, u) for u in used]


def _slot(call: Call, form: Form, used: Tensor) -> Slot | None:
    if used is form.addend:
        if count((call.args, call.kwargs), used) != 1 or not plain(used):
            return None
        last = len(call.out_shape) - 1
        feature = last > 0 or call.func is torch.nn.functional.linear
        if form.beta == 1 and feature and used.shape == call.out_shape[-1:]:
            return BiasSlot(used, last, tuple(range(last)), call.out_shape)
        return shift(used, used, call.out_shape, form.beta)
    places = [j for j, x in enumerate(form.tensors) if x is used]
    if len(places) != 1 or not plain(used):
        return None
    j = places[0]
    others, letters = form.tensors[:j] + form.tensors[j + 1 :], form.letters
    mine, theirs = letters[j], letters[:j] + letters[j + 1 :]
    # linear's letters cannot broadcast; leaving out the general rule keeps the common call cheap
    if call.func is not torch.nn.functional.linear:
        others, mine, theirs = _broadcast(used, mine, others, theirs, form.out)
    others = tuple(x.detach() if x.requires_grad else x for x in others)
    return ContractionSlot(used, mine, others, theirs, form.out, call.out_shape, form.batch, form.alpha)


def _broadcast(
    used: Tensor, mine: Letters, others: tuple[Tensor, ...], theirs: tuple[Letters, ...], out: Letters
) -> tuple[tuple[Tensor, ...], Letters, tuple[Letters, ...]]:
    """Leave out axes of size 1 that meet the same letter elsewhere; those of `used` are marked -1."""
    wide = {x for t, ls in zip(others, theirs, strict=True) for x, n in zip(ls, t.shape, strict=True) if n != 1}
    wide |= {x for x, n in zip(mine, used.shape, strict=True) if n != 1}
    rest = frozenset().union(*theirs)
    kept = tuple(
        -1 if n == 1 and x in rest and (x in wide or x in out) else x
        for x, n in zip(mine, used.shape, strict=True)
    )
    tensors, letters = [], []
    for tensor, ls in zip(others, theirs, strict=True):
        drop = [d for d, x in enumerate(ls) if x in wide and tensor.shape[d] == 1]
        tensors.append(tensor.squeeze(drop) if drop else tensor)
        letters.append(tuple(x for d, x in enumerate(ls) if d not in drop))
    return tuple(tensors), kept, tuple(letters)
