"""Which rank inverts which blocks of curvature, and what that costs it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerwise.optim.second_order.averages import Block
from layerwise.ranks.group import longest_first

__all__ = ["RankCost", "assigned", "inversion_cost", "product_cost"]


@dataclass(frozen=True)
class RankCost:
    """What the curvature costs one rank.

    blocks: those that it owns. factor_bytes, inverse_bytes: of all averages and inverses that it holds.
    inversion_flops: `Σ K (I³ + O³)` of its own blocks, each time inverses are due. step_flops: `Σ 2 K O I (O + I)` of
    the blocks that it multiplies a gradient by, every step.
    """

    rank: int
    blocks: tuple[str, ...]
    factor_bytes: int
    inverse_bytes: int
    inversion_flops: int
    step_flops: int


def inversion_cost(block: Block) -> int:
    """`K (I³ + O³)` for a pair of factors, counting a diagonal factor, and a diagonal block, by its elements."""
    groups, size_out, size_in = block.size
    if block.form == "diagonal":
        return groups * size_out * size_in
    return groups * (_cube(size_out, block, "B", "basis_out") + _cube(size_in, block, "A", "basis_in"))


def _cube(size: int, block: Block, *fields: str) -> int:
    factor = next((getattr(block, field) for field in fields if hasattr(block, field)), None)
    return size if factor is None or factor.ndim == 2 else size**3


def product_cost(block: Block) -> int:
    """`2 K O I (O + I)`: the block's product with a gradient; a diagonal's is its elements."""
    groups, size_out, size_in = block.size
    each = 1 if block.form == "diagonal" else 2 * (size_out + size_in)
    return groups * size_out * size_in * each


def assigned(blocks: Mapping[str, Block], size: int, held: Mapping[str, int]) -> dict[str, int]:
    """The owners of blocks among `size` ranks: the longest inversion first, to the rank with the least work so far.

    held: earlier owners, who keep their blocks. Slices of one parameter stay together, since they act on one gradient.
    Source: Osawa et al. (2019) and Pauloski et al. (2021), "KAISA", section 3, for K-FAC's factors.
    """
    loads, work = [0.0] * size, dict[str, int]()
    members: dict[str, list[str]] = {}
    owner_of = {blocks[key].parameter or key: rank for key, rank in held.items() if key in blocks}
    for key, block in blocks.items():
        name = block.parameter or key
        members.setdefault(name, []).append(key)
        work[name] = work.get(name, 0) + inversion_cost(block)
    for name, rank in owner_of.items():
        loads[rank] += work[name]
    owner_of |= longest_first({name: work[name] for name in sorted(work.keys() - owner_of.keys())}, loads)
    return {key: owner_of[name] for name, keys in members.items() for key in keys}
