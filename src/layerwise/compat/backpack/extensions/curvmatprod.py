"""Extensions whose field is a function: products with a parameter's block of a curvature matrix.

The field keeps the graph alive after the backward pass; `del` the field to free it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from layerwise.compat.backpack.extensions.backprop_extension import BackpropExtension
from layerwise.errors import BadInput
from layerwise.graph.cotangents import Second
from layerwise.graph.coverage import Graph
from layerwise.graph.loss_curvature import likelihoods, loss_hessian
from layerwise.graph.products import GaussNewtonProducts, HessianProducts, Products
from layerwise.graph.samples import SampleLayout
from layerwise.operators.curvature import PCH
from layerwise.quantities.base import Context, Quantity, Union
from layerwise.tape.pull import without_autocast
from layerwise.tape.tape import Tape

__all__ = ["GGNMP", "HMP", "PCHMP"]

Make = Callable[[Tape, Graph, Sequence[Tensor]], Products]


class BlockProduct:
    """A function from a stack `[V, *shape]` to its products with the diagonal block of one parameter, `[V, *shape]`."""

    def __init__(self, field: str, name: str, products: Products, parameters: Sequence[Tensor], place: int) -> None:
        self._field, self._name = field, name
        self._products, self._parameters, self._place = products, parameters, place
        self._versions = _versions(parameters)

    def __call__(self, mat: Tensor) -> Tensor:
        """The products. Raises BadInput for another shape, and where a parameter has changed since."""
        p = self._parameters[self._place]
        if not isinstance(mat, Tensor) or mat.shape[1:] != p.shape or mat.dim() != p.dim() + 1:
            seen = f"{tuple(mat.shape)}" if isinstance(mat, Tensor) else type(mat).__name__
            raise BadInput(f"{self._field} of {self._name!r} takes [V, {', '.join(map(str, p.shape))}], got {seen}")
        if self._versions != _versions(self._parameters):
            raise BadInput(
                f"{self._field} of {self._name!r}: the parameters have changed since the backward pass that made it"
            )
        directions: list[Tensor | None] = [None] * len(self._parameters)
        directions[self._place] = mat.detach().to(p)
        with torch._C.DisableTorchFunction(), without_autocast(p.device.type):
            return self._products.apply(directions, [self._place])[0]


def _versions(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(p.data_ptr(), p._version) for p in parameters]


class BlockProducts(Quantity):
    """A quantity whose results are `BlockProduct`s, from a function that makes a graph's products."""

    cotangent = Second()
    needs_samples = False
    powers = (0,)

    def __init__(self, field: str, make: Make) -> None:
        self._field, self._make = field, make
        self._made: dict[str, BlockProduct] = {}

    def compute_graph(self, tape: Tape, graph: Graph, layout: SampleLayout | None) -> dict[str, tuple[Tensor, ...]]:
        """Make the products, which are not tensors."""
        names = [name for name in tape.parameters if name in set(graph.parameters())]
        parameters = [tape.parameters[name] for name in names]
        made = self._make(tape, graph, parameters)
        self._made = {name: BlockProduct(self._field, name, made, parameters, i) for i, name in enumerate(names)}
        return {}

    def finish(
        self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context
    ) -> dict[str, BlockProduct]:
        """The `BlockProduct`s by parameter name."""
        return self._made


class _CurvatureProducts(BackpropExtension):
    keeps_graph = True
    second_order = True

    def quantity(self) -> Quantity:
        """The `BlockProducts` of this matrix."""
        return BlockProducts(self.savefield, self._make)

    def _make(self, tape: Tape, graph: Graph, parameters: Sequence[Tensor]) -> Products:
        raise NotImplementedError


class HMP(_CurvatureProducts):
    """Products with the Hessian's block, in `hmp`: `[V, *shape]` -> `[V, *shape]`; see `layerwise.Hessian`."""

    def __init__(self, savefield: str = "hmp") -> None:
        super().__init__(savefield)

    def _make(self, tape: Tape, graph: Graph, parameters: Sequence[Tensor]) -> Products:
        return HessianProducts.of(graph.total, graph.weight, parameters)


class GGNMP(_CurvatureProducts):
    """Products with the GGN's block, in `ggnmp`: `[V, *shape]` -> `[V, *shape]`; see `layerwise.GGN`."""

    def __init__(self, savefield: str = "ggnmp") -> None:
        super().__init__(savefield)

    def _make(self, tape: Tape, graph: Graph, parameters: Sequence[Tensor]) -> Products:
        return GaussNewtonProducts(graph.losses, loss_hessian(graph, likelihoods(graph)), parameters)


class PCHMP(_CurvatureProducts):
    """Products with the positive-curvature Hessian's block, in `pchmp`; see `layerwise.PCH`.

    modify: the treatment of negative residuals, "clip" (zero) or "abs"; BadInput for another. A backward pass raises
    Undefined for any other nonlinearity than elementwise functions.
    """

    def __init__(self, savefield: str = "pchmp", modify: Literal["abs", "clip"] = "clip") -> None:
        super().__init__(savefield)
        if modify not in ("abs", "clip"):
            raise BadInput(f'PCHMP: modify must be "abs" or "clip", got {modify!r}')
        self._modify: Literal["abs", "clip"] = modify

    def get_modification_mode(self) -> str:
        """The treatment of negative residuals."""
        return self._modify

    def _make(self, tape: Tape, graph: Graph, parameters: Sequence[Tensor]) -> Products:
        return PCH.products(tape, graph, likelihoods(graph), parameters, self._modify)
