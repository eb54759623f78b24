"""What a watched batch is asked for: quantities that leave out the parameters they do not suit, and give blocks.

Each result is a dict of `Measured` blocks by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwise.gradient.parameter import ParameterGradient
from layerwise.gradient.parts import RowsPart
from layerwise.graph.cotangents import Gradient, Sampled
from layerwise.operators.kronecker import EigenBlock
from layerwise.optim.second_order.averages import Measured
from layerwise.quantities import KFAC, KFLR, KFRA, DiagGGN, DiagHessian
from layerwise.quantities.base import Context, Quantity, Union
from layerwise.quantities.kronecker.ekfac import Kept, Spectra, held, second_moment, with_constant
from layerwise.quantities.kronecker.factor_sums import block_names, blocks_of
from layerwise.quantities.kronecker.factors import KroneckerFactors
from layerwise.rows import contract
from layerwise.rows.base import Rows
from layerwise.rows.layout import MatrixLayout

__all__ = ["Request", "ekfac", "foof", "ggn_diagonal", "hessian_diagonal", "kfac", "kflr", "kfra", "remaining"]


@dataclass(frozen=True)
class Request:
    """What to measure: of which parameters, with how many draws from which generator.

    samples: None for the exact kinds. sharing, joint: of Kronecker factors; largest: the size of factor to keep.
    bases: present eigenbases, by block. whole: the samples cannot be told apart, so a draw for all of them is squared
    as one. left: filled with the names of the parameters asked for that are no blocks of the Kronecker kinds.
    """

    names: Collection[str]
    generator: torch.Generator
    samples: int | None = 1
    sharing: str = "expand"
    joint: bool = True
    largest: int = 2**13
    bases: Mapping[str, EigenBlock] = field(default_factory=dict)
    whole: bool = False
    left: set[str] = field(default_factory=set)


def _has_factors(gradient: ParameterGradient, request: Request) -> bool:
    """Whether all uses of a parameter have rows, of disjoint slices or of one matrix, and its factors fit."""
    groups = gradient.groups
    if groups is None:
        return False
    for part in groups:
        diagonal = part.rows.kind != "float" and request.sharing == "expand"  # an index: the factor holds counts
        inputs = 1 if part.rows.a is None or diagonal else part.rows.size_in
        if max(inputs, part.rows.g.shape[-1]) > request.largest:
            return False
    return True


class _Factors(KroneckerFactors):
    """Kronecker factors of those parameters alone that have them, are asked for and are small enough."""

    rows_only = True
    request: Request

    def covers(self, gradient: ParameterGradient) -> bool:
        """Whether the parameter is asked for and its factors fit; those that do not are noted."""
        if gradient.name not in self.request.names:
            return False
        found = _has_factors(gradient, self.request)
        if not found:
            self.request.left.add(gradient.name)
        return found

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> dict[str, Measured]:
        """The blocks of the elements that are used."""
        blocks = blocks_of({name: value[0] for name, value in values.items()}, self.joint)
        return {key: Measured(block) for key, block in blocks.items() if not key.endswith("[rest]")}


class _KFAC(_Factors, KFAC):
    pass


class _KFLR(_Factors, KFLR):
    pass


class _KFRA(_Factors, KFRA):
    rows_only = False


class _FOOF(_Factors):
    """The input factor alone, read off the uses; the output factor is the identity, kept as its diagonal."""

    def __init__(self, sharing: str, joint: bool) -> None:
        super().__init__(Gradient(), sharing, joint)

    def output_factor(self, gradient: ParameterGradient, rows: Rows) -> Tensor:
        """1 `[K,O]`."""
        return rows.g.new_ones(rows.g.shape[3:])

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> dict[str, Measured]:
        """As always, but batches do not add up their identities."""
        found = super().finish(values, union, context)
        for measured in found.values():
            measured.block.like.fill_(1)
        return found


class _EKFAC(_Factors, KFAC):
    """K-FAC's factors, and the second moments in the present eigenbasis; without one, what they are made from."""

    powers = (1, 1)

    def compute(self, gradient: ParameterGradient) -> tuple[Any, ...]:
        """The factors' sums, and the moments of each block or the rows."""
        (factors,) = super().compute(gradient)
        inside = {block.bias for block in self.request.bases.values()}
        if gradient.name in inside:
            return factors, Spectra((), ())
        names, parts = block_names(gradient.name, gradient.laid(self.joint)), gradient.groups or ()
        bases = [self.request.bases.get(name) for name in names]
        moments = []
        for part, basis in zip(parts, bases, strict=True):
            rows = part.rows
            if basis is None or not _fits(rows, basis):
                break
            moments.append(self._moments(rows, basis))
        if len(moments) == len(names):
            return factors, Spectra(tuple(names), tuple(moments))
        if self.request.whole:
            return factors, _Totals(tuple(part.rows for part in parts))
        return factors, Kept(((held(gradient), 1.0),))

    def _moments(self, rows: Rows, basis: EigenBlock) -> Tensor:
        return _whole_moment(rows, basis) if self.request.whole else second_moment(rows, basis)

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> dict[str, Measured]:
        """Factors with functions that give the moments in a basis."""
        found = super().finish(values, union, context)
        for name, (factors, moments) in values.items():
            for i, key in enumerate(block_names(name, factors.laid)):
                if key not in found:  # inside another block
                    continue
                found[key] = found[key]._replace(moments=partial(_spectrum, moments, i))
        return found


def _spectrum(moments: Spectra | Kept | _Totals, i: int, basis: EigenBlock) -> Tensor:
    """The i-th matrix's second moments: known in the basis already, or made now that there is one."""
    return moments.values[i] if isinstance(moments, Spectra) else moments.spectrum(i, basis)


@dataclass(frozen=True)
class _Totals:
    """Rows whose gradients are summed over all samples before they are squared, times a weight."""

    rows: tuple[Rows, ...]
    weight: float = 1.0
    more: tuple[_Totals, ...] = ()

    def __add__(self, other: _Totals) -> _Totals:
        return _Totals(self.rows, self.weight, (*self.more, other))

    def __mul__(self, factor: float) -> _Totals:
        return _Totals(self.rows, self.weight * factor, tuple(t * factor for t in self.more))

    def __truediv__(self, divisor: float) -> _Totals:
        return self * (1 / divisor)

    def spectrum(self, i: int, block: EigenBlock) -> Tensor:
        """`[K,O,I]`, in the eigenbasis of a block."""
        total = _whole_moment(self.rows[i], block) * self.weight
        return sum((t.spectrum(i, block) for t in self.more), total)


def _fits(rows: Rows, basis: EigenBlock) -> bool:
    inputs = (1 if rows.a is None else rows.size_in) + (basis.bias is not None)
    return basis.size == (*rows.g.shape[3:], inputs) and (basis.basis_in is None) == (rows.kind != "float")


def _whole_moment(rows: Rows, basis: EigenBlock) -> Tensor:
    """`[K,O,I]`: sum over draws of the squared gradient of all samples together, in an eigenbasis."""
    total = contract.total(with_constant(rows, basis))
    return basis.rotate(total.to(basis.spectrum.dtype)).square_().sum(0)


class _Diagonal(Quantity):
    """A diagonal of those parameters alone that are asked for; unfit: of those without Kronecker factors."""

    request: Request
    unfit = False

    def covers(self, gradient: ParameterGradient) -> bool:
        """Whether the parameter is asked for, and can be."""
        if self.request.whole and not all(isinstance(part, RowsPart) for part in gradient.parts):
            return False
        unfit = self.unfit and _has_factors(gradient, self.request)
        return gradient.name in self.request.names and not unfit

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> dict[str, Measured]:
        """Each diagonal as a block."""
        return {name: Measured(diagonal(value[0])) for name, value in values.items() if name in self.request.names}


class _DiagGGN(_Diagonal, DiagGGN):
    pass


class _DiagHessian(_Diagonal, DiagHessian):
    pass


class _WholeDiagonal(_Diagonal):
    """The GGN's diagonal from draws that are squared for all samples at once; unbiased, since draws are independent."""

    rows_only = True
    needs_samples = False
    powers = (1,)

    def __init__(self, samples: int, generator: torch.Generator) -> None:
        self.cotangent = Sampled(samples, generator)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[*shape]`."""
        return (gradient.total().square_().sum(0),)


def diagonal(entries: Tensor) -> EigenBlock:
    """A diagonal `[*shape]` as a block without eigenvectors."""
    layout = MatrixLayout.whole(entries.shape, (1, 1, entries.numel()))
    return EigenBlock(None, None, layout.matrix(entries), layout, form="diagonal")


# -- one function for each kind of curvature ------------------------------------------------------------------


def kfac(request: Request) -> Quantity:
    """Factors from drawn labels."""
    return _with(_KFAC(request.samples or 1, request.generator, request.sharing, request.joint), request)


def kflr(request: Request) -> Quantity:
    """Factors from the exact root of the loss Hessian."""
    return _with(_KFLR(request.sharing, request.joint), request)


def kfra(request: Request) -> Quantity:
    """Factors from the recursion over the batch average."""
    return _with(_KFRA(request.sharing, request.joint), request)


def foof(request: Request) -> Quantity:
    """The input factor."""
    return _with(_FOOF(request.sharing, request.joint), request)


def ekfac(request: Request) -> Quantity:
    """K-FAC's factors and the second moments in their eigenbasis."""
    quantity = _EKFAC(request.samples or 1, request.generator, "expand", request.joint)
    quantity.needs_samples = not request.whole
    return _with(quantity, request)


def ggn_diagonal(request: Request) -> Quantity:
    """The GGN's diagonal: exact, or from drawn labels."""
    if request.whole and request.samples is not None:
        return _with(_WholeDiagonal(request.samples, request.generator), request)
    return _with(_DiagGGN(request.samples, request.generator), request)


def hessian_diagonal(request: Request) -> Quantity:
    """The Hessian's diagonal: exact, or from products with random signs."""
    return _with(_DiagHessian(request.samples, request.generator), request)


def remaining(quantity: Quantity) -> Quantity:
    """A diagonal of those parameters alone that have no Kronecker factors."""
    assert isinstance(quantity, _Diagonal)
    quantity.unfit = True
    return quantity


def _with(quantity: Any, request: Request) -> Quantity:
    quantity.request = request
    checked: Quantity = quantity
    return checked
