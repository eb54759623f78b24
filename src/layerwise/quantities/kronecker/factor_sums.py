"""Sums over stacks of cotangents and batches, from which Kronecker factors are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.operators.kronecker import KroneckerBlock
from layerwise.ranks.group import digest_of
from layerwise.ranks.sums import TensorSpec
from layerwise.rows.layout import FactorForm, rest_of

__all__ = ["Factors", "Sums", "block_names", "blocks_of", "counted_blocks"]

Counts = tuple[float | None, float]  # as `Sums.counts`, the first None where only the device knows it


@dataclass(frozen=True)
class Sums:
    """The sums for one matrix of a parameter.

    inputs: sum of a a^T, `[K,I,I]`, its diagonal `[K,I]`, or zero where an earlier stack of the batch has it; for the
    form "gradients" sum of D^T D. mean: sum of a (for a joint bias), or zero. counts: the divisor of inputs (number of
    rows; for "gradients" the trace of D^T D), and the number of rows before reduction. outputs: `[K,O,O]`.
    known: the counts, as far as the host knows them; None: not at all, as of sums over ranks.
    """

    inputs: Tensor
    mean: Tensor
    counts: Tensor
    outputs: Tensor
    known: Counts | None = field(default=None, repr=False, compare=False)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.inputs + other.inputs,
            self.mean + other.mean,
            self.counts + other.counts,
            self.outputs + other.outputs,
            _total(self.known, other.known),
        )


def _total(one: Counts | None, two: Counts | None) -> Counts | None:
    if one is None or two is None:
        return None
    return (None if one[0] is None or two[0] is None else one[0] + two[0]), one[1] + two[1]


@dataclass(frozen=True, repr=False)
class Factors:
    """The sums for all matrices of a parameter; supports `+`, `*` and `/` like a tensor, scaling with the squared loss.

    laid: form and matrices of the parameter, given with the first stack of each batch. Adding batches that read the
    parameter as different matrices raises Undefined.
    """

    name: str
    shape: torch.Size
    form: str
    sums: tuple[Sums, ...]
    laid: FactorForm | None

    def __add__(self, other: Factors) -> Factors:
        if self.laid is not None and other.laid is not None and self.laid != other.laid:
            raise Undefined(
                f"asked for Kronecker factors of {self.name!r} over two batches that use it as different matrices "
                f"({self._described()} and {other._described()}); observe each batch on its own"
            )
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return replace(self, sums=sums, laid=self.laid or other.laid)

    def __mul__(self, factor: float) -> Factors:
        if self.form == "gradients":
            scaled = [
                Sums(s.inputs * factor, s.mean, s.counts * factor, s.outputs * factor, s.known) for s in self.sums
            ]
        else:
            scaled = [replace(s, outputs=s.outputs * factor) for s in self.sums]
        return replace(self, sums=tuple(scaled))

    def __truediv__(self, divisor: float) -> Factors:
        return self * (1 / divisor)

    def tensors(self) -> list[Tensor]:
        """All tensors that are summed."""
        return [t for s in self.sums for t in (s.inputs, s.mean, s.counts, s.outputs)]

    def replaced(self, tensors: Sequence[Any]) -> Factors:
        """The same form and matrices with other sums."""
        return replace(self, sums=tuple(Sums(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)))

    def described(self) -> Factors:
        """The same form and matrices with `TensorSpec`s in place of the sums."""
        return self.replaced([TensorSpec.of(t) for t in self.tensors()])

    def __repr__(self) -> str:
        """Short, and another one where two have no sum."""
        shown = [f"A {_shown(s.inputs)}, B {_shown(s.outputs)}" for s in self.sums]
        rest = digest_of({"laid": repr(self.laid), "sums": repr(self.sums), "shape": repr(self.shape)})
        return f"{self.form}: {'; '.join(shown)}, of layout {rest[:8]}"

    def _described(self) -> str:
        """The matrices in words: their sizes `[K,O,I]`, and where they lie in the parameter."""
        assert self.laid is not None
        shown = [
            f"{list(m.size)} at irregular places {repr(m.index)[:8]}"
            if m.strides is None
            else f"{list(m.size)} with strides {list(m.strides)} from element {m.offset}"
            for m in self.laid.matrices
        ]
        return f"{self.form}, [K,O,I] = {', '.join(shown)}"


def _shown(t: Any) -> str:
    return repr(t if isinstance(t, TensorSpec) else TensorSpec.of(t))


def block_names(name: str, laid: FactorForm) -> list[str]:
    """The names of a parameter's blocks: its own name, or `name[0]`, `name[1]`, ... for slices."""
    return [f"{name}[{i}]" for i in range(len(laid.matrices))] if laid.form == "slices" else [name]


def blocks_of(values: Mapping[str, Factors], joint: bool) -> dict[str, KroneckerBlock]:
    """The blocks of all parameters by name. joint: put a bias into the block of its weight."""
    return {key: block for key, (block, _) in counted_blocks(values, joint).items()}


def counted_blocks(
    values: Mapping[str, Factors], joint: bool, late: bool = False
) -> dict[str, tuple[KroneckerBlock, float | Tensor]]:
    """The blocks of all parameters by name, each with the divisor of its A, which is the mean of nothing where it is 0.

    joint: as for `blocks_of`. late: counts that only the device knows stay there, as numbers `[]`; else they are read.
    """
    blocks: dict[str, tuple[KroneckerBlock, float | Tensor]] = {}
    counts = _counts(values, late)
    pairs = _pairs(values, counts) if joint else {}
    inside = set(pairs.values())
    for name, factors in values.items():
        laid, bias = factors.laid, pairs.get(name)
        assert laid is not None
        if name in inside:
            continue
        keys = block_names(name, laid)
        for key, matrix, sums, (seen, _) in zip(keys, laid.matrices, factors.sums, counts[name], strict=True):
            a = None if matrix.bias else _divided(sums.inputs, seen)
            if bias is not None:
                count = sums.counts[0].clamp(min=1)
                a = _with_constant(sums.inputs / count, sums.mean / count)
            parameter = name if key != name else None
            blocks[key] = KroneckerBlock(a, sums.outputs, matrix, bias, laid.form, parameter), seen
        rest = rest_of(laid.matrices) if laid.form == "slices" else None
        if rest is not None:
            b = factors.sums[0].outputs
            nothing = b.new_zeros(1, rest.size[-1]), b.new_zeros(1, 1, 1)
            blocks[f"{name}[rest]"] = KroneckerBlock(*nothing, rest, None, laid.form, name), 0.0
    return blocks


def _divided(total: Tensor, count: float | Tensor) -> Tensor:
    """`total / count`, without a copy for a count of 1; `total` (zero) for a count of 0."""
    if isinstance(count, Tensor):
        return total / count.masked_fill(count == 0, 1)
    return total if count in (0, 1) else total / count


def _counts(values: Mapping[str, Factors], late: bool) -> dict[str, list[tuple[float | Tensor, float]]]:
    """The counts of each parameter's sums as numbers; the host waits at most once for all."""
    held = [sums for factors in values.values() for sums in factors.sums]
    unread = [s.counts for s in held if s.known is None or (s.known[0] is None and not late)]
    numbers = iter(torch.cat([t.to(unread[0].device) for t in unread]).tolist() if unread else ())

    def of(sums: Sums) -> tuple[float | Tensor, float]:
        known = sums.known
        if known is None or (known[0] is None and not late):
            return next(numbers), next(numbers)
        return sums.counts[0] if known[0] is None else known[0], known[1]

    return {name: [of(sums) for sums in factors.sums] for name, factors in values.items()}


def _pairs(values: Mapping[str, Factors], counts: Mapping[str, list[tuple[float | Tensor, float]]]) -> dict[str, str]:
    """Pairs of a weight and its bias that share every row."""
    pairs: dict[str, str] = {}
    for name, factors in values.items():
        assert factors.laid is not None
        bias = factors.laid.matrices[0].partner
        sums = factors.sums[0]
        if bias is None or bias not in values or not sums.mean.dim() or bias in pairs.values():
            continue
        its = values[bias]
        if its.form == "rows" and counts[bias][0][1] == counts[name][0][1]:
            pairs[name] = bias
    return pairs


def _with_constant(a: Tensor, mean: Tensor) -> Tensor:
    """The mean of `(a, 1)(a, 1)^T`, `[K,I+1,I+1]`, from the means of a a^T and a."""
    top = torch.cat([a, mean[:, :, None]], 2)
    bottom = torch.cat([mean, mean.new_ones(len(mean), 1)], 1)
    return torch.cat([top, bottom[:, None]], 1)
