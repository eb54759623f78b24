"""The damped inverse of a curvature that is diagonal in a Kronecker basis, applied to stacks of gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.operators import EigenBlock, EigenKronecker
from layerwise.operators.diagonal import check_damping
from layerwise.rows.layout import MatrixLayout, dense_layout

__all__ = ["SHARE", "DampedInverse", "described", "diagonal_blocks", "rebuilt"]

SHARE = 0.1  # of a block's mean eigenvalue: the damping where none is given


class DampedInverse:
    """`(G + λ I)⁻¹` of each block of an `EigenKronecker`; None for the identity, which is not damped.

    damping: λ in the units of G; None: for each block a tenth of its mean eigenvalue (Grosse et al. 2023, appendix).
    """

    def __init__(self, curvature: EigenKronecker | None, damping: float | None) -> None:
        if damping is not None:
            check_damping("Influence", damping)
        self.curvature, self.damping = curvature, damping

    @cached_property
    def _blocks(self) -> dict[str, list[EigenBlock]]:
        assert self.curvature is not None
        found: dict[str, list[EigenBlock]] = {}
        for key, block in self.curvature.blocks.items():
            damping = SHARE * float(block.spectrum.mean()) if self.damping is None else self.damping
            inverse = EigenKronecker({key: block}).inverse(damping).blocks[key]
            found.setdefault(block.parameter or key, []).append(inverse)
        return found

    def solve(self, name: str, gradients: Tensor) -> Tensor:
        """The product with gradients `[M,*shape]` of one parameter, `[M,*shape]`; zero for one without curvature."""
        if self.curvature is None:
            return gradients
        total = torch.zeros_like(gradients)
        for block in self._blocks.get(name, ()):
            w = (
                torch.stack([block.matrix(g) for g in gradients])
                if len(gradients)
                else gradients.reshape(0, *block.size)
            )
            total = total + block.fold(block.apply(w.to(block.like.dtype)).to(gradients.dtype))
        return total


def diagonal_blocks(entries: Mapping[str, Tensor]) -> EigenKronecker:
    """A diagonal matrix over named parameters as blocks whose basis is the identity."""
    blocks = {}
    for name, entry in entries.items():
        laid = dense_layout(entry.shape)
        blocks[name] = EigenBlock(None, None, laid.matrix(entry), laid)
    return EigenKronecker(blocks)


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
