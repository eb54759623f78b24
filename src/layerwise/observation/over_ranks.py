"""Sums of quantities over ranks, which join as several backward passes of one process do."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.quantities.base import ByParameter
from layerwise.ranks.group import Ranks, digest_of, first_difference
from layerwise.ranks.sums import TensorSpec, all_reduced, describe, tensors_of, zeros_like
from layerwise.ranks.trainers import Placements

__all__ = ["Table", "placed", "sum_tables"]

Values = dict[str, tuple[Any, ...]]


class Table(NamedTuple):
    """The weighted values of one quantity, by parameter.

    concatenate: which of a parameter's values belong to samples, and stay on their rank. stacks: whether these have
    columns besides, of which ranks may have different numbers.
    """

    label: str
    values: Values
    concatenate: tuple[bool, ...]
    stacks: bool = False


class PerSample(NamedTuple):
    """A value of single samples, which stays on its rank: its shape and type."""

    spec: TensorSpec


def sum_tables(ranks: Ranks, tables: Sequence[Table], samples: int) -> list[Values]:
    """The tables with every value that adds up summed over ranks.

    A parameter that a rank lacks counts as zero there, for its `samples` too. Raises BadInput on all ranks, by name,
    where they hold different kinds of values for one parameter.
    """
    tables = _completed(ranks, tables, samples)
    held = [
        (number, name, place, value)
        for number, table in enumerate(tables)
        for name in sorted(table.values)
        for place, value in enumerate(table.values[name])
        if not table.concatenate[place]
    ]
    out: list[dict[str, list[Any]]] = [{name: list(v) for name, v in table.values.items()} for table in tables]
    for (number, name, place, _), total in zip(held, all_reduced(ranks, [x for *_, x in held]), strict=True):
        out[number][name][place] = total
    return [{name: tuple(values[name]) for name in sorted(values)} for values in out]


def _completed(ranks: Ranks, tables: Sequence[Table], samples: int) -> list[Table]:
    """The tables with the parameters of all ranks."""
    mine = {
        (table.label, name): tuple(
            PerSample(TensorSpec.of(value)) if own else describe(value)
            for value, own in zip(values, table.concatenate, strict=True)
        )
        for table in tables
        for name, values in table.values.items()
    }
    stacks = {table.label for table in tables if table.stacks}
    texts = {f"{label} of {name}": _text(found, label in stacks) for (label, name), found in mine.items()}
    if len(set(ranks.gather(digest_of(texts)))) == 1:
        return list(tables)
    said = ranks.gather((texts, mine))
    differs = first_difference([theirs for theirs, _ in said], length=200)
    if differs is not None:
        raise BadInput(f"asked to add up {differs[0]} over ranks, which hold it in different ways: {differs[1]}")
    everything = {key: found for _, theirs in said for key, found in theirs.items()}
    return [table._replace(values=_filled(table, everything, samples)) for table in tables]


def _text(found: Sequence[Any], stacks: bool) -> str:
    """What must agree: of a value of single samples all but their number, and the number of columns."""
    return repr([(x.spec.shape[1 + stacks :], x.spec.dtype) if isinstance(x, PerSample) else x for x in found])


def _filled(table: Table, everything: Mapping[tuple[str, str], Sequence[Any]], samples: int) -> Values:
    values = dict(table.values)
    like = next((t for v in values.values() for x in v for t in tensors_of(x)), torch.empty(0))
    columns = like.shape[1] if table.stacks and like.dim() > 1 else None
    for (label, name), found in everything.items():
        if label == table.label and name not in values:
            values[name] = tuple(
                _no_samples(x.spec, samples, columns, like.device)
                if isinstance(x, PerSample)
                else zeros_like(x, like.device)
                for x in found
            )
    return values


def _no_samples(spec: TensorSpec, samples: int, columns: int | None, device: torch.device) -> Tensor:
    """Zero for every sample of a rank that did not use the parameter."""
    rest = spec.shape[1:] if columns is None else (columns, *spec.shape[2:])
    return torch.zeros((samples, *rest), dtype=spec.dtype, device=device)


def placed(result: Any, placements: Placements) -> Any:
    """A result by parameter with DTensors placed like their parameters, where it has their shape.

    Every rank holds the whole value and keeps its own part: nothing is sent.
    """
    if not placements or not isinstance(result, ByParameter):
        return result
    out = copy.copy(result)
    out._values = {name: _like(value, placements.get(name)) for name, value in result.items()}
    if out._total is None and out._values:
        out._total = result.total
    for key, value in vars(result).items():
        if isinstance(value, ByParameter):
            setattr(out, key, placed(value, placements))
    return out


def _like(value: Tensor, p: Any) -> Tensor:
    if p is None or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    found: Tensor = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return found
