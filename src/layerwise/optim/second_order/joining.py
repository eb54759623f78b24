"""The sums of curvature of one batch as tensors to be added over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.observation.union import weighed
from layerwise.optim.second_order.watched_batch import MeasuredSums, Watched
from layerwise.quantities.kronecker.factor_sums import Factors
from layerwise.ranks.group import Ranks
from layerwise.ranks.sums import describe, tensors_of
from layerwise.tape.uses import first_bad_call
from layerwise.tensors import is_finite

__all__ = ["added", "bad_curvature", "described", "on_cpu", "summed"]

_SUMMED = (Tensor, Factors)  # second moments are added later, where all ranks have them in one eigenbasis
_MESSAGE = 2**26  # bytes sent at once, which are held twice meanwhile


def summed(ranks: Ranks, found: MeasuredSums, weight: float) -> MeasuredSums:
    """The sums of all ranks' batches, of which this one has a weight in the whole loss.

    As for several batches of one process (`layerwise.observation.union`): a value of power p scales by `weight^p`.
    Gradients that wait for an eigenbasis are scaled alone.
    """
    powers = found.quantity.powers
    scaled = {name: weighed(value, powers, weight) for name, value in found.values.items()}
    sums = iter(added(ranks, [t for value in scaled.values() for part in value for t in _tensors(part)]))
    union = replace(found.union, samples=0, terms=1.0)  # nothing that is watched here reads them
    return found._replace(
        values={name: tuple(_with(part, sums) for part in value) for name, value in scaled.items()}, union=union
    )


def added(ranks: Ranks, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over ranks in memory of their own, sent in parts of bounded size."""
    if ranks.size == 1:
        return list(tensors)
    out: list[Tensor] = []
    part: list[Tensor] = []
    for i, t in enumerate(tensors):
        part.append(t)
        if i + 1 == len(tensors) or sum(p.numel() * p.element_size() for p in part) >= _MESSAGE:
            # clones: parts of one message would keep all of it, and lie in memory otherwise than a loaded state
            out += [s.clone() for s in ranks.sum(part)]
            part = []
    return out


def bad_curvature(watched: Watched) -> str | None:
    """The first block, or where they are not finished yet the first sum, that holds NaN or infinity."""
    places = [
        ("the curvature" if measured.block.form == "diagonal" else "a Kronecker factor", name, x)
        for name, measured in watched.blocks.items() for x in measured.tensors()
    ]  # fmt: skip
    for found in watched.found:
        for name, value in found.values.items():
            what = "a Kronecker factor" if isinstance(value[0], Factors) else "the curvature"
            places += [(what, name, t) for part in value for t in _tensors(part)]
    # a norm may overflow where no entry does, but is read in a tenth of the time
    norms = torch._foreach_norm([x for *_, x in places]) if places else []
    for (what, name, x), norm in zip(places, norms, strict=True):
        if not math.isfinite(norm) and not is_finite(x):
            return first_bad_call(watched.uses) or f"{what} of {name}"
    return None


def described(found: MeasuredSums) -> dict[str, str]:
    """By parameter, the shapes and the places of its sums, which must be those of all ranks."""
    return {
        name: ", ".join(repr(describe(part)) for part in value if isinstance(part, _SUMMED))
        for name, value in found.values.items()
    }


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a value that add up over ranks here."""
    return tensors_of(value) if isinstance(value, _SUMMED) else []


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """A value with the next tensors in place of its own."""
    if isinstance(value, Factors):
        return value.replaced([next(tensors) for _ in value.tensors()])
    return next(tensors) if isinstance(value, Tensor) else value


def on_cpu(state: Any) -> Any:
    """A state with its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, Mapping):
        return {key: on_cpu(value) for key, value in state.items()}
    return state
