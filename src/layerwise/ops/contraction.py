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
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import SamplesMixed
from layerwise.ops.arguments import count, plain
from layerwise.ops.base import Call, Slot
from layerwise.ops.elementwise import BiasSlot, shift
from layerwise.ops.forms import FUNCTIONS, Form, Letters
from layerwise.rows.base import Samples

__all__ = ["DECOMPOSITIONS", "FUNCTIONS", "ContractionSlot", "described", "refused", "slots"]


class _LetterKinds(NamedTuple):
    """The letters of one operand by kind, and the output's axes that may carry samples."""

    p: Letters
    k: Letters
    i: Letters
    o: Letters
    axes: tuple[int, ...]
    aligned: dict[int, int]


@lru_cache(maxsize=1024)
def _letter_kinds(used: Letters, others: tuple[Letters, ...], out: Letters, batch: int) -> _LetterKinds:
    rest = frozenset().union(*others)
    p = tuple(x for x in out if x not in used)
    k = tuple(x for x in used if x in out and x in rest)
    o = tuple(x for x in used if x in out and x not in rest)
    # a plain output letter is a feature; only torch's own batch axes can be a weight per sample
    aligned = {a: used.index(x) for a, x in enumerate(out) if x in k or (x in o and x < batch)}
    axes = tuple(a for a, x in enumerate(out) if x in p or a in aligned)
    return _LetterKinds(p, k, tuple(x for x in used if x >= 0 and x not in out), o, axes, aligned)


class ContractionSlot(Slot):
    """One operand of an einsum that is linear in it."""

    by_view = True

    def __init__(
        self,
        used: Tensor,
        letters: Letters,
        others: tuple[Tensor, ...],
        other_letters: tuple[Letters, ...],
        out: Letters,
        out_shape: torch.Size,
        batch: int,
        alpha: float,
    ) -> None:
        self.used = used
        self._kinds = kinds = _letter_kinds(letters, other_letters, out, batch)
        self.axes, self.aligned = kinds.axes, kinds.aligned
        self._letters, self._others, self._other_letters = letters, others, other_letters
        self._out, self._out_shape, self._alpha = out, out_shape, alpha

    def _sizes(self, letters: Letters) -> list[int]:
        """Sizes of letters of the used tensor (broadcast axes, marked -1, are left out of `letters`)."""
        return [self.used.shape[self._letters.index(x)] for x in letters]

    def _positions(self, samples: Samples | None) -> Letters:
        """The position letters, with the samples' letter (or the first) in front."""
        p = self._kinds.p
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
        """Input rows `[N,T,K,I]`: a view of the other operand where there is one and its axes allow it."""
        kinds, p = self._kinds, self._positions(samples)
        a = self._gather(p + kinds.k + kinds.i)
        return _as_rows(a, 0, len(p), samples, *_products(self._sizes(kinds.k), self._sizes(kinds.i)))

    def output(self, g: Tensor, samples: Samples | None) -> Tensor:
        """Cotangent rows `[V,N,T,K,O]`, a view where the axes allow it."""
        kinds, p = self._kinds, self._positions(samples)
        want = p + kinds.k + kinds.o
        g = g.to(self.used.dtype)
        if want != self._out:
            g = g.permute([0, *(1 + self._out.index(x) for x in want)])
        return _as_rows(g, 1, len(p), samples, *_products(self._sizes(kinds.k), self._sizes(kinds.o)))

    def matrix(self, used: Tensor) -> Tensor:
        """The operand as `[K,O,I]`, each a product of its letters in the operand's order."""
        kinds = self._kinds
        order = [self._letters.index(x) for x in kinds.k + kinds.o + kinds.i]
        order += [a for a, x in enumerate(self._letters) if x < 0]  # broadcast axes, of size 1
        shape = _products(self._sizes(kinds.k), self._sizes(kinds.o), self._sizes(kinds.i))
        return used.permute(order).reshape(shape)

    @property
    def arrangement(self) -> Hashable:
        """The operand's letters, and those of each kind."""
        kinds = self._kinds
        return self._letters, kinds.k, kinds.o, kinds.i

    def fold(self, w: Tensor) -> Tensor:
        """Carry `[..., K,O,I]` back to the operand's axes."""
        kinds = self._kinds
        lead, want = w.ndim - 3, kinds.k + kinds.o + kinds.i
        w = w.reshape((*w.shape[:lead], *self._sizes(want)))
        w = w.permute([*range(lead), *(lead + want.index(x) for x in self._letters if x >= 0)])
        return w.reshape((*w.shape[:lead], *self.used.shape))


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


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slots of tensors used by a product; None for a tensor that this form does not describe."""
    return described(call, FUNCTIONS[call.func](call), used)


def described(call: Call, form: Form | None, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slots of tensors used by a product that `form` describes, if it does."""
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
    operands = zip((used, *others), (mine, *theirs), strict=True)
    wide = {x for t, ls in operands for x, n in zip(ls, t.shape, strict=True) if n != 1}
    rest = frozenset().union(*theirs)
    kept = tuple(
        -1 if n == 1 and x in rest and (x in wide or x in out) else x for x, n in zip(mine, used.shape, strict=True)
    )
    tensors, letters = [], []
    for tensor, ls in zip(others, theirs, strict=True):
        drop = [d for d, x in enumerate(ls) if x in wide and tensor.shape[d] == 1]
        tensors.append(tensor.squeeze(drop) if drop else tensor)
        letters.append(tuple(x for d, x in enumerate(ls) if d not in drop))
    return tuple(tensors), kept, tuple(letters)


# -- products in groups of rows ------------------------------------------------------------------------------


def _grouped(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.grouped_mm` (a mixture of experts) as one product for each group, which ends at `offs`; zero behind the last.

    In torch 2.13 it has no second derivative; its parts have.
    """
    if offs is None:
        out = torch.bmm(mat_a, mat_b)
    else:
        ends = offs.tolist()
        groups = list(enumerate(zip([0, *ends[:-1]], ends, strict=True)))
        if mat_a.dim() == mat_b.dim() == 2:
            out = torch.stack([mat_a[:, i:j] @ mat_b[i:j] for _, (i, j) in groups])
        else:
            rows = mat_a.dim() == 2
            parts = [mat_a[i:j] @ mat_b[e] if rows else mat_a[e] @ mat_b[:, i:j] for e, (i, j) in groups if i < j]
            left = mat_a.shape[0] - ends[-1] if rows else mat_b.shape[1] - ends[-1]
            if left or not parts:
                like = parts[0].detach() if parts else mat_a.detach()
                parts.append(like.new_zeros((left, mat_b.shape[2]) if rows else (mat_a.shape[1], left)))
            out = torch.cat(parts, 0 if rows else 1)
    return out if out_dtype is None else out.to(out_dtype)


def refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call of `F.grouped_mm` has no decomposition; None where it has one."""
    return None if kwargs.get("bias") is None else "a grouped product with bias=; add the bias in a call of its own"


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
if hasattr(torch, "_grouped_mm"):  # what `F.grouped_mm` calls
    DECOMPOSITIONS[torch._grouped_mm] = _grouped
