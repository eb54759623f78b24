"""A model of the zoo on the CPU and on a device: every quantity has the same values, on the parameters' device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import quantity_table
import torch
from quantity_checks import Truth
from quantity_table import COLUMNS, Column
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo import Case, Functional, Instance

import layerwise as lw
from layerwise import errors

__all__ = ["APART", "Compared", "assert_same", "compare", "moved", "tensors_in"]

APART = {  # models that a device cannot run, and why
    "position_embedding": "its forward makes a tensor on the CPU",
    "constant_start": "its forward makes a tensor on the CPU",
    "char_gpt": "its forward makes a tensor on the CPU",
    "cells": "its forward makes a tensor on the CPU",
}


@dataclass(frozen=True)
class Compared:
    """What came of the quantities of a model, by name."""

    same: tuple[str, ...]
    refused: tuple[str, ...]  # on the CPU
    differ: dict[str, str]  # and in what


def moved(instance: Instance, device: torch.device, dtype: torch.dtype = torch.float64) -> Instance:
    """The instance with its model and batch on a device; float64 becomes dtype."""

    def to(x: Any) -> Any:
        return x.to(device, dtype if x.dtype == torch.float64 else x.dtype) if isinstance(x, Tensor) else x

    if isinstance(instance.model, Functional):
        model: Any = Functional({}, instance.model.forward)
        model.params = {n: to(p.detach()).requires_grad_() for n, p in instance.model.params.items()}
    else:
        model = instance.model.to(device)
        if dtype != torch.float64:
            model = model.to(dtype)
    return replace(instance, model=model, x=pytree.tree_map(to, instance.x), y=pytree.tree_map(to, instance.y))


def tensors_in(result: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a result, but where a parameter's elements lie, which is the same for all devices."""
    if isinstance(result, Tensor):
        yield path, result
    elif isinstance(result, list | tuple):
        for i, x in enumerate(result):
            yield from tensors_in(x, f"{path}[{i}]")
    elif hasattr(result, "items"):
        for name, x in result.items():
            yield from tensors_in(x, f"{path}.{name}")
    elif hasattr(result, "__dict__"):
        for name, x in vars(result).items():
            if not name.startswith("_") and name != "layout":
                yield from tensors_in(x, f"{path}.{name}")


def assert_same(on_cpu: Any, found: Any, device: torch.device, rel: float = 1e-12) -> None:
    """Equal up to rounding, relative to the largest element; and every tensor on the device."""
    one, two = list(tensors_in(on_cpu)), list(tensors_in(found))
    assert one
    assert [path for path, _ in one] == [path for path, _ in two]
    for (path, want), (_, got) in zip(one, two, strict=True):
        assert got.device.type == device.type, f"{path} lies on {got.device}"
        most = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got.cpu(), want, rtol=0.0, atol=rel * most, equal_nan=True)


def _ask(column: Column, truth: Truth, instance: Instance, device: Any) -> Any:
    """What the quantity gives; of an operator, its product with ones."""
    quantity_table._generator = lambda: torch.Generator(device).manual_seed(7)
    torch.manual_seed(3)
    for p in instance.params.values():
        p.grad = None
    if column.build is not None:
        ones = {name: torch.ones_like(p) for name, p in instance.params.items()}
        return column.build(instance.subject, instance.loss) @ ones
    with lw.observe(instance.subject, quantity := column.ask(truth), samples=truth.samples) as seen:
        instance.loss().backward()
    return seen[quantity]


def compare(
    one: Case, device: torch.device, dtype: torch.dtype = torch.float64, rel: float = 1e-12, drawn: bool = True,
    only: Collection[str] = tuple(COLUMNS),
) -> Compared:  # fmt: skip
    """Compare every quantity of a model with that on the CPU.

    drawn: whether the device draws the CPU's random numbers, so that estimates compare. only: which
    quantities. What the CPU refuses is not tried.
    """
    truth = Truth(one)
    here = moved(one.make(seed=0), torch.device("cpu"), dtype)
    there = moved(one.make(seed=0), device, dtype)
    same, refused, differ = [], [], {}
    for name in only:
        column = COLUMNS[name]
        if column.undefined(truth) or (column.sampled and not drawn):
            continue
        try:
            want = _ask(column, truth, here, "cpu")
        except errors.LayerwiseError:
            refused.append(name)
            continue
        try:
            assert_same(want, _ask(column, truth, there, device), device, rel)
            same.append(name)
        except Exception as error:  # whatever a device raises is the finding
            differ[name] = f"{type(error).__name__}: {error}"
    return Compared(tuple(same), tuple(refused), differ)
