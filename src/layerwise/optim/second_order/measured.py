"""Quantities that measure blocks of curvature, for the parameters that have them: dicts of `Measured` by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
from layerwise.optim.second_order.settings import Curvature
from layerwise.quantities import KFAC, KFLR, KFRA, DiagGGN, DiagHessian
from layerwise.quantities.base import Context, Quantity, Union
from layerwise.quantities.kronecker.ekfac import HeldRows, Spectra, held_rows, second_moment, with_constant
from layerwise.quantities.kronecker.factor_sums import block_names, counted_blocks
from layerwise.quantities.kronecker.factors import KroneckerFactors
from layerwise.rows import contract
from layerwise.rows.base import Rows
from layerwise.rows.layout import MatrixLayout

__all__ = ["KINDS", "CurvatureKind", "Request"]


@dataclass(frozen=True)
class Request:
    """What to measure: of which parameters, drawn from which generator, and how.

    bases: present eigenbases, by block. whole: batch statistics mix the samples, so each draw is squared for the whole
    batch. left: filled with the names of the parameters without Kronecker factors. late: whether rows that only the
    device has counted are taken to be some, until a verdict is read.
    """

    names: Collection[str]
    generator: torch.Generator
    curvature: Curvature
    bases: Mapping[str, EigenBlock] = field(default_factory=dict)
    whole: bool = False
    left: set[str] = field(default_factory=set)
    late: bool = False


def _has_factors(gradient: ParameterGradient, request: Request) -> bool:
    """Whether all uses have rows, of disjoint slices or of one matrix, with factors of at most the largest size."""
    groups = gradient.groups
    if groups is None:
        return False
    for part in groups:
        # a look-up: its factor is diagonal
        diagonal = part.rows.kind != "float" and request.curvature.sharing == "expand"
        inputs = 1 if part.rows.a is None or diagonal else part.rows.size_in
        if max(inputs, part.rows.g.shape[-1]) > request.curvature.largest:
            return False
    return True


class _Factors(KroneckerFactors):
    """Kronecker factors of the requested parameters that have them, up to the largest size."""

    rows_only = True
    request: Request

    def covers(self, gradient: ParameterGradient) -> bool:
        """Whether the parameter is requested and has factors; if it has none, its name is added to `left`."""
        if gradient.name not in self.request.names:
            return False
        found = _has_factors(gradient, self.request)
        if not found:
            self.request.left.add(gradient.name)
        return found

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> dict[str, Measured]:
        """The blocks, restricted to the elements that are used, of what had rows: no mean over none is averaged."""
        found = counted_blocks({name: value[0] for name, value in values.items()}, self.joint, self.request.late)
        return {
            key: Measured(block, rows=rows if isinstance(rows, Tensor) else None)
            for key, (block, rows) in found.items()
            if not key.endswith("[rest]") and (isinstance(rows, Tensor) or rows)
        }


class _KFAC(_Factors, KFAC):
    pass


class _KFLR(_Factors, KFLR):
    pass


class _KFRA(_Factors, KFRA):
    rows_only = False


class _FOOF(_Factors):
    """FOOF: the input factor A; the output factor is the identity, kept as its diagonal."""

    def __init__(self, sharing: str, joint: bool, rows: str) -> None:
        super().__init__(Gradient(), sharing, joint, rows)

    def _outputs(self, rows: Rows) -> int:
        return rows.cotangents[0].shape[3:].numel()

    def output_factor(self, gradient: ParameterGradient, rows: Rows) -> Tensor:
        """1 `[K,O]`."""
        return rows.g.new_ones(rows.g.shape[3:])

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> dict[str, Measured]:
        """Like the base class, but B stays the identity instead of counting batches."""
        found = super().finish(values, union, context)
        for measured in found.values():
            measured.block.like.fill_(1)
        return found


class _EKFAC(_Factors, KFAC):
    """K-FAC's factors, and second moments in the present eigenbasis, or the rows until there is one."""

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
        return factors, HeldRows(((held_rows(gradient), 1.0),))

    def _moments(self, rows: Rows, basis: EigenBlock) -> Tensor:
        return _whole_moment(rows, basis) if self.request.whole else second_moment(rows, basis)

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> dict[str, Measured]:
        """The factors, with functions that give the second moments in an eigenbasis."""
        found = super().finish(values, union, context)
        for name, (factors, moments) in values.items():
            for i, key in enumerate(block_names(name, factors.laid)):
                if key not in found:  # a slice of a larger block
                    continue
                found[key] = found[key]._replace(moments=partial(_spectrum, moments, i))
        return found


def _spectrum(moments: Spectra | HeldRows | _Totals, i: int, basis: EigenBlock) -> Tensor:
    """The i-th matrix's second moments in the basis, from values in it already or from rows."""
    return moments.values[i] if isinstance(moments, Spectra) else moments.spectrum(i, basis)


@dataclass(frozen=True)
class _Totals:
    """Rows whose gradients are summed over all samples before squaring; the squares are weighted."""

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
    """A diagonal of the requested parameters; with unfit, of those without Kronecker factors."""

    request: Request
    unfit = False

    def covers(self, gradient: ParameterGradient) -> bool:
        """Whether the parameter is requested and has a diagonal."""
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
    """The GGN's diagonal from draws squared for the whole batch; unbiased, since draws are independent."""

    rows_only = True
    needs_samples = False
    powers = (1,)

    def __init__(self, draws: int, generator: torch.Generator) -> None:
        self.cotangent = Sampled(draws, generator)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[*shape]`."""
        return (gradient.total().square_().sum(0),)


def diagonal(entries: Tensor) -> EigenBlock:
    """A diagonal `[*shape]` as a block without eigenvectors."""
    layout = MatrixLayout.whole(entries.shape, (1, 1, entries.numel()))
    return EigenBlock(None, None, layout.matrix(entries), layout, form="diagonal")


# -- the kinds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvatureKind:
    """A kind of curvature: a row of `KINDS`. Averages, inverses, products, refusals and state are the same for all.

    make: the quantity that gives its blocks. form: of their inverses (`invert`); None: as the user chose.
    common: whether all ranks draw alike (signs of parameters), not each its own (labels of samples).
    instant: whether inverses are so cheap that they follow every new average, not the schedule.
    whole: whether draws may be squared for the whole batch, where its samples are mixed.
    rest: the kind for parameters without factors; None: no curvature.
    """

    make: Callable[[Request], Any]
    form: str | None = None
    common: bool = False
    instant: bool = False
    whole: bool = False
    rest: str | None = None

    def measure(self, request: Request, unfit: bool = False) -> Quantity:
        """The quantity of a request. unfit: a diagonal of only the parameters without factors."""
        quantity: Quantity = self.make(request)
        vars(quantity).update(request=request, **({"unfit": True} if unfit else {}))
        return quantity


def _labels(request: Request) -> tuple[int, torch.Generator]:
    return request.curvature.draws or 1, request.generator


def _shared(request: Request) -> dict[str, Any]:
    curvature = request.curvature
    return {"sharing": curvature.sharing, "joint": curvature.joint, "rows": curvature.rows}


def _ekfac(request: Request) -> Quantity:
    quantity = _EKFAC(*_labels(request), **_shared(request))
    quantity.needs_samples = not request.whole
    return quantity


def _ggn_diagonal(request: Request) -> Quantity:
    draws = request.curvature.draws
    if request.whole and draws is not None:
        return _WholeDiagonal(draws, request.generator)
    return _DiagGGN(draws, request.generator)


KINDS: dict[str, CurvatureKind] = {
    "kfac": CurvatureKind(lambda request: _KFAC(*_labels(request), **_shared(request)), rest="diag-ggn"),
    "kflr": CurvatureKind(lambda request: _KFLR(**_shared(request)), rest="diag-ggn"),
    "kfra": CurvatureKind(lambda request: _KFRA(request.curvature.sharing, request.curvature.joint), rest="diag-ggn"),
    "ekfac": CurvatureKind(_ekfac, instant=True, whole=True, rest="diag-ggn"),
    "foof": CurvatureKind(lambda request: _FOOF(**_shared(request)), form="input"),
    "diag-ggn": CurvatureKind(_ggn_diagonal, instant=True, whole=True),
    "diag-hessian": CurvatureKind(
        lambda request: _DiagHessian(request.curvature.draws, request.generator), common=True, instant=True
    ),
}
