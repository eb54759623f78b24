"""Reading products of tensors as einsums: which letters stand for the axes of each operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.ops.arguments import bind
from layerwise.ops.base import Call

__all__ = ["FUNCTIONS", "Form", "Letters"]

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
    "matmul": _matmul("other"),
    "mm": _matmul("mat2"),
    "bmm": _matmul("mat2"),
    "mv": _matmul("vec"),
    "dot": _matmul("tensor"),
    "outer": _outer,
    "ger": _outer,
    "addmm": _add_matmul("mat1", "mat2"),
    "addmv": _add_matmul("mat", "vec"),
    "baddbmm": _add_matmul("batch1", "batch2"),
    "addr": _add_matmul("vec1", "vec2"),
    "addbmm": _addbmm,
}.items():
    for _owner in (torch, _METHODS):
        FUNCTIONS[getattr(_owner, _name)] = _parse
        if hasattr(_owner, _name + "_"):
            FUNCTIONS[getattr(_owner, _name + "_")] = _parse
