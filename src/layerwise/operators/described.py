"""An `EigenKronecker` as named tensors and plain values, to be saved without code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.operators.kronecker import EigenBlock, EigenKronecker
from layerwise.rows.layout import MatrixLayout

__all__ = ["described", "rebuilt"]


def described(operator: EigenKronecker) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an operator by name, and what else it consists of, as plain values for JSON; see `rebuilt`."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for key, block in operator.blocks.items():
        laid = block.layout
        fact: dict[str, Any] = {"form": block.form, "parameter": block.parameter, "layout": None}
        if block.bias is not None:
            raise BadInput(f"the block of {key!r} holds the bias {block.bias!r}; blocks of one parameter can be saved")
        for what in ("basis_in", "basis_out", "spectrum"):
            if (value := getattr(block, what)) is not None:
                tensors[f"{key}/{what}"] = value.contiguous()
        if laid is not None:
            fact["layout"] = {"shape": laid.shape, "size": laid.size, "strides": laid.strides, "offset": laid.offset,
                              "bias": laid.bias}  # fmt: skip
            if laid.strides is None:
                tensors[f"{key}/places"] = laid.places()
        facts[key] = fact
    return tensors, json.loads(json.dumps(facts))


def rebuilt(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> EigenKronecker:
    """The operator from what `described` gave."""
    blocks = {}
    for key, fact in facts.items():
        laid, layout = fact["layout"], None
        if laid is not None and laid["strides"] is not None:
            layout = MatrixLayout.strided(laid["shape"], laid["size"], laid["strides"], laid["offset"], laid["bias"])
        elif laid is not None:
            layout = MatrixLayout.at(laid["shape"], tensors[f"{key}/places"], laid["bias"])
        block = EigenBlock(
            tensors.get(f"{key}/basis_in"), tensors.get(f"{key}/basis_out"), tensors[f"{key}/spectrum"], layout
        )
        blocks[key] = replace(block, form=fact["form"], parameter=fact["parameter"])
    return EigenKronecker(blocks)
