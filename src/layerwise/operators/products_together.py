"""Products of several blocks with what each acts on: on an accelerator those of equal shape as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from layerwise.operators.kronecker import EigenBlock, KroneckerBlock
from layerwise.operators.thin_block import ThinBlock

__all__ = ["products_together", "side_by_side"]

Block = KroneckerBlock | EigenBlock
AnyBlock = TypeVar("AnyBlock", bound=KroneckerBlock | EigenBlock)
Values = Mapping[str, Tensor]


def products_together(blocks: Mapping[str, Block], values: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
    """Of each block by key, what `block.product` gives for its values, tensors by parameter name.

    Of a slice of a parameter, the product is its matrix `[K,O,I]` alone.
    On an accelerator blocks of equal shape are one block of more groups: few launches for all of them, and each result
    is dense, as the multi-tensor operations that read it need it. On the CPU, which gains nothing, each is multiplied
    by itself.
    """
    alike: dict[Any, list[str]] = {}
    for key, block in blocks.items():
        alike.setdefault(_shape_of(key, block), []).append(key)
    found: dict[str, dict[str, Tensor]] = {}
    for keys in alike.values():
        some = [blocks[key] for key in keys]
        if _is_apart(some[0]):
            found[keys[0]] = _product(some[0], keys[0], values[keys[0]])
        else:
            found |= _as_one(keys, some, values)
    return {key: found[key] for key in blocks}


def side_by_side(blocks: Mapping[str, AnyBlock]) -> dict[str, AnyBlock]:
    """The same blocks; on an accelerator the tensors of those of equal shape lie one after another in memory.

    Then no product gathers them. Those that lie so already are not copied.
    """
    alike: dict[Any, list[str]] = {}
    for key, block in blocks.items():
        alike.setdefault(_shape_of(key, block), []).append(key)
    found = dict(blocks)
    for keys in alike.values():
        some = [blocks[key] for key in keys]
        if len(some) == 1 or some[0].like.is_meta:
            continue
        names = ("A", "B") if isinstance(some[0], KroneckerBlock) else ("basis_in", "basis_out", "spectrum")
        joined = dict(zip(names, map(_joined, zip(*map(_tensors, some), strict=True)), strict=True))
        pieces = {name: [None] * len(some) if t is None else t.chunk(len(some)) for name, t in joined.items()}
        for i, (key, block) in enumerate(zip(keys, some, strict=True)):
            found[key] = replace(block, **{name: its[i] for name, its in pieces.items()})  # type: ignore[arg-type]
    return found


def _product(block: Block, key: str, values: Values) -> dict[str, Tensor]:
    made = block.product(block.parameter or key, values)
    return made if block.parameter is None else made | {block.parameter: block.matrix(made[block.parameter])}


def _shape_of(key: str, block: Block) -> Any:
    """What blocks of one batch have in common."""
    if _is_apart(block):
        return key
    forms = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in _tensors(block))
    return type(block), forms, block.bias is None


def _is_apart(block: Block) -> bool:
    return isinstance(block, ThinBlock) or block.like.device.type == "cpu"


def _tensors(block: Block) -> tuple[Tensor | None, ...]:
    if isinstance(block, KroneckerBlock):
        return block.A, block.B
    return block.basis_in, block.basis_out, block.spectrum


def _as_one(keys: Sequence[str], blocks: Sequence[Block], values: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
    first, dtype = blocks[0], blocks[0].like.dtype
    kind: Any = type(first)
    one = kind(*(_joined(parts) for parts in zip(*map(_tensors, blocks), strict=True)))
    pairs = [block.apart(block.parameter or key, values[key]) for key, block in zip(keys, blocks, strict=True)]
    pieces = [x.to(dtype) for pair in pairs for x in pair if x is not None]
    groups, size_out, size_in = first.size
    w = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
    w = w.unflatten(-1, (len(blocks), size_in)).permute(2, 0, 1, 3).reshape(-1, size_out, size_in)
    weights, biases = _applied(one, w, first.bias is not None)
    parts = [None] * len(blocks) if biases is None else biases.unflatten(0, (-1, groups)).unbind()
    found = {}
    for key, block, w, b in zip(keys, blocks, weights.unflatten(0, (-1, groups)).unbind(), parts, strict=True):
        name = block.parameter or key
        found[key] = {name: block.fold(w) if block.parameter is None else w}
        if b is not None and block.bias is not None:
            found[key][block.bias] = b.flatten()
    return found


def _applied(block: Block, w: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The block's product, and with a bias the last column `[K,O]` apart: both dense."""
    if not bias:
        return block.apply(w), None
    if isinstance(block, KroneckerBlock) and block.A is not None and block.A.ndim == 3:  # a product each is no copy
        w, left = w @ block.A, KroneckerBlock(None, block.B)
        return left.apply(w[..., :-1]), left.apply(w[..., -1:])[..., 0]
    if isinstance(block, EigenBlock) and block.basis_in is not None:
        outer, inputs = replace(block, basis_in=None), block.basis_in.mT
        w = outer.rotate_back(block.rotate(w) * block.spectrum)
        return w @ inputs[..., :-1], (w @ inputs[..., -1:])[..., 0]
    out = block.apply(w)
    return out[..., :-1].contiguous(), out[..., -1].contiguous()


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors `[K,...]` of equal shape as one `[G·K,...]`: a view where they lie one after another in memory."""
    first = parts[0]
    if first is None or len(parts) == 1:
        return first
    some = [t for t in parts if t is not None]
    memory, size, start = first.untyped_storage().data_ptr(), first.numel(), first.storage_offset()
    if all(
        t.is_contiguous() and t.untyped_storage().data_ptr() == memory and t.storage_offset() == start + i * size
        for i, t in enumerate(some)
    ):
        return first.as_strided((len(some) * len(first), *first.shape[1:]), first.stride(), start)
    return torch.cat(some)
