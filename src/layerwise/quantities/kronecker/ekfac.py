"""EKFAC: K-FAC's eigenbasis with the exact second moments of the gradients in that basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.cotangents import Cotangent, Exact, Sampled
from layerwise.operators.kronecker import EigenBlock, EigenKronecker, Kronecker
from layerwise.quantities.base import Context, Quantity, Union, positive, takes_draws
from layerwise.quantities.kronecker.factor_sums import Factors, block_names, blocks_of
from layerwise.quantities.kronecker.factors import KroneckerFactors, options
from layerwise.ranks.group import Ranks, digest_of, values_digest
from layerwise.ranks.sums import TensorSpec
from layerwise.rows import contract, gram
from layerwise.rows.base import Rows

__all__ = ["EKFAC", "Gradients", "HeldRows", "Spectra", "held_rows", "rotated_rows", "second_moment", "with_constant"]

Gradients = Rows | Tensor  # of one matrix: rows, or dense gradients `[M,O,I]`


@dataclass(frozen=True)
class HeldRows:
    """Gradients stored until the eigenbasis is known: terms of a weighted sum of second moments.

    `+` concatenates the terms and `*` scales their weights, so that it can replace a tensor wherever values of
    stacks and batches are summed. Memory is that of all rows, and grows with every batch.
    """

    terms: tuple[tuple[tuple[Gradients, ...], float], ...]

    def __add__(self, other: HeldRows) -> HeldRows:
        *before, (last, weight) = self.terms
        (first, its), *after = other.terms
        first = tuple(_sharing(mine, new) for mine, new in zip(last, first, strict=True))
        return HeldRows((*before, (last, weight), (first, its), *after))

    def __mul__(self, factor: float) -> HeldRows:
        return HeldRows(tuple((found, weight * factor) for found, weight in self.terms))

    def __truediv__(self, divisor: float) -> HeldRows:
        return self * (1 / divisor)

    def tensors(self) -> list[Tensor]:
        """No tensors to sum over ranks: each rank keeps its gradients until the basis is known."""
        return []

    def replaced(self, tensors: Sequence[Tensor]) -> HeldRows:
        """The same."""
        return self

    def described(self) -> HeldRows:
        """Placeholder for a rank whose batch did not use the parameter: contributes zero."""
        return HeldRows(())

    def spectrum(self, i: int, block: EigenBlock) -> Tensor:
        """`[K,O,I]`: sum of the squared gradients of the i-th matrix in the eigenbasis of `block`."""
        total = torch.zeros_like(block.spectrum)
        for found, weight in self.terms:
            total.add_(second_moment(found[i], block), alpha=weight)
        return total


def _sharing(stored: Gradients, new: Gradients) -> Gradients:
    """The new gradients, sharing the stored input tensor where both inputs are equal."""
    if isinstance(stored, Tensor) or isinstance(new, Tensor) or stored.a is None or new.a is None:
        return new
    return Rows(stored.a, new.g, new.size_in) if torch.equal(stored.a, new.a) else new


def second_moment(gradients: Gradients, block: EigenBlock) -> Tensor:
    """`[K,O,I]`: sum of the squared per-sample gradients in the eigenbasis of `block`, in its dtype."""
    dtype = block.spectrum.dtype
    if isinstance(gradients, Tensor):
        return block.rotate(gradients[:, None].to(dtype)).square_().sum(0)
    return contract.second_moment(rotated_rows(gradients, block))


def rotated_rows(rows: Rows, block: EigenBlock) -> Rows:
    """Rows whose per-sample gradients are Q_Bᵀ D Q_A, in the block's dtype."""
    dtype = block.spectrum.dtype
    rows, g = with_constant(rows, block), rows.g.to(dtype)
    if block.basis_out is not None:
        g = (g.transpose(2, 3) @ block.basis_out).transpose(2, 3)
    a = rows.a
    if a is not None and block.basis_in is not None:
        one = not a.is_floating_point()  # an index picks a row of the basis
        a = block.basis_in[0][a][:, :, None] if one else (a.to(dtype).transpose(1, 2) @ block.basis_in).transpose(1, 2)
    return Rows(a, g, rows.size_in)


def with_constant(rows: Rows, block: EigenBlock) -> Rows:
    """The rows, with a last input of 1 where the block includes a bias."""
    if block.bias is None:
        return rows
    assert rows.a is not None
    return Rows(torch.cat([rows.a, rows.a.new_ones(*rows.a.shape[:3], 1)], 3), rows.g, rows.size_in + 1)


class EKFAC(KroneckerFactors):
    """The GGN's diagonal in K-FAC's eigenbasis: a block approximation closer to the GGN than K-FAC's.

    With B = Q_B diag(b) Q_B^T and A = Q_A diag(a) Q_A^T the factors of `KFAC` ("expand"), the block of a parameter
    W[k,o,i] is (Q_B (x) Q_A) diag(S) (Q_B (x) Q_A)^T, with S[k,o,i] = sum over n, v of (Q_B^T D Q_A)^2, `[K,O,I]`,
    in place of K-FAC's b a^T, and D the gradient of sample n from the sampled root column v, summed over positions
    and uses. Basis and S come from the same columns. `draws=None` takes all columns of the exact root: the basis is
    KFLR's, and S the exact diagonal of the GGN in that basis. Forms are those of `KFAC`.
    The result is an `EigenKronecker` operator, in the units of the GGN.

    basis: a `Kronecker` or `EigenKronecker` whose eigenvectors are used instead of the batch's own (an eigenbasis
    kept over several steps); S is exact in that basis. rows: "real" or "all", those that the basis averages over, as in
    `KFAC`.
    Memory: the eigenbasis is known only after the last backward pass, so the rows of all parameters are stored until
    then, N·T·K·(I + V·O) numbers for each use (I counts a convolution's whole window), and more with every batch;
    for parameters of the form "gradients", the N·V·K·O·I gradients themselves. With a given basis nothing is stored;
    `accumulate` computes the basis in a first pass over the data.
    Raises UnknownLoss, SamplesMixed, or BadInput (also for a basis that lacks a parameter or has it in another layout).
    Source: George et al. (2018), algorithm 1.
    """

    @takes_draws
    def __init__(
        self,
        draws: int | None = 1,
        generator: torch.Generator | None = None,
        basis: Kronecker | EigenKronecker | None = None,
        rows: str = "real",
    ) -> None:
        self.draws = positive("EKFAC's draws", draws)
        self.generator = generator
        super().__init__(Exact() if draws is None else Sampled(draws, generator), "expand", False, rows)
        self.needs_samples = True
        if basis is not None and not isinstance(basis, Kronecker | EigenKronecker):
            raise BadInput(f"EKFAC: basis is a {type(basis).__name__}; give a Kronecker or EigenKronecker operator")
        self.basis = basis.eigh() if isinstance(basis, Kronecker) else basis
        self.powers = (1, 1) if basis is None else (1,)
        self.real_rows &= basis is None  # a given basis has its own

    def first_pass(self) -> Quantity | None:
        """The quantity of the Kronecker factors, whose eigenvectors are the basis."""
        return Basis(self.cotangent, self.rows) if self.basis is None else None

    def second_pass(self, result: Kronecker) -> EKFAC:
        """EKFAC in the eigenbasis of the given factors, each let go for its eigenvectors: `result` is left empty."""
        blocks: dict[str, EigenBlock] = {}
        for name in list(result.blocks):
            found = result.blocks.pop(name).eigh(name)
            unread = found.spectrum.new_zeros(()).expand(found.spectrum.shape)  # the pass has eigenvalues of its own
            blocks[name] = replace(found, spectrum=unread)
        return EKFAC(self.draws, self.generator, EigenKronecker(blocks), self.rows)

    def second_values(self, values: Mapping[str, tuple[Any, ...]], second: Quantity) -> dict[str, tuple[Any, ...]]:
        """The second moments of the stored rows in the eigenbasis of `second`."""
        assert isinstance(second, EKFAC) and second.basis is not None
        spectra: dict[str, tuple[Any, ...]] = {}
        for name, (its, kept) in values.items():
            keys = tuple(block_names(name, its.laid))
            moments = tuple(kept.spectrum(i, second.basis.blocks[key]) for i, key in enumerate(keys))
            spectra[name] = (Spectra(keys, moments),)
        return spectra

    def broadcast(self, ranks: Ranks) -> None:
        """Broadcast rank 0's eigenbasis: eigenvectors of (nearly) equal eigenvalues differ between machines."""
        assert self.basis is not None
        blocks = self.basis.blocks
        eigenvectors = [q for n in sorted(blocks) for q in (blocks[n].basis_in, blocks[n].basis_out) if q is not None]
        ranks.send_from(0, eigenvectors)

    def settings(self) -> dict[str, Any]:
        """What ranks must agree on, the basis included."""
        return super().settings() | ({} if self.basis is None else {"basis": _fingerprint(self.basis)})

    def compute(self, gradient: ParameterGradient) -> tuple[Any, ...]:
        """`KFAC`'s sums and the rows; with a given basis, the second moments in it."""
        if self.basis is None:
            return *super().compute(gradient), HeldRows(((held_rows(gradient), 1.0),))
        blocks = self._basis_of(gradient)
        if gradient.groups is not None:
            each = zip(gradient.groups, blocks.values(), strict=True)
            return (Spectra(tuple(blocks), tuple(second_moment(p.rows, b) for p, b in each)),)
        ((name, block),) = blocks.items()
        total = torch.zeros_like(block.spectrum)
        for chunk in gradient.chunks():
            total += second_moment(gram.as_matrices(chunk, gradient.shape), block)
        return (Spectra((name,), (total,)),)

    def _basis_of(self, gradient: ParameterGradient) -> dict[str, EigenBlock]:
        """The basis's blocks of a parameter by name, in the order of its matrices."""
        assert self.basis is not None
        laid = gradient.laid()
        names = block_names(gradient.name, laid)
        blocks = self.basis.blocks
        matching = {name: blocks[name] for name in names if name in blocks and blocks[name].bias is None}
        fits = len(matching) == len(names) and all(
            block.form == laid.form
            and (block.like.dtype, block.like.device) == (gradient.like.dtype, gradient.like.device)
            and block.shape == gradient.shape
            and block.layout == matrix
            for block, matrix in zip(matching.values(), laid.matrices, strict=True)
        )
        if not fits:
            raise BadInput(
                f"EKFAC: {gradient.name!r} {tuple(gradient.shape)}, {gradient.like.dtype}, has the form {laid.form!r} "
                f"and blocks {names}, which the basis lacks, or has of another type, as other matrices or with a bias: "
                f"{self.basis!r}"
            )
        return matching

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> EigenKronecker:
        """The operator: the eigenbasis of the summed factors, and the second moments in it."""
        if self.basis is not None:
            spectra = {key: s for value in values.values() for key, s in zip(*value[0], strict=True)}
            rest = {k: b for k, b in self.basis.blocks.items() if b.parameter in values and k not in spectra}
            known = {key: replace(self.basis.blocks[key], spectrum=s) for key, s in spectra.items()}
            return EigenKronecker(known | {k: replace(b, spectrum=b.spectrum * 0) for k, b in rest.items()})
        factors: dict[str, Factors] = {name: value[0] for name, value in values.items()}
        blocks = dict(Kronecker(blocks_of(factors, False)).eigh().blocks)
        for name, (its, kept) in values.items():
            for i, key in enumerate(block_names(name, its.laid)):
                blocks[key] = replace(blocks[key], spectrum=kept.spectrum(i, blocks[key]))
        return EigenKronecker(blocks)

    def __repr__(self) -> str:
        return f"EKFAC(draws={self.draws}{'' if self.basis is None else ', basis=...'}{options(self)})"


class Basis(KroneckerFactors):
    """The first pass of `EKFAC`: Kronecker factors, with parameters in the layout that `EKFAC` uses."""

    def __init__(self, cotangent: Cotangent, rows: str) -> None:
        super().__init__(cotangent, "expand", False, rows)
        self.needs_samples = True


def _fingerprint(basis: EigenKronecker) -> str:
    """A hash of the bits of a basis."""
    return digest_of({
        f"{name} {side}": values_digest(q)
        for name, block in basis.blocks.items()
        for side, q in (("in", block.basis_in), ("out", block.basis_out))
        if q is not None
    })  # fmt: skip


class Spectra(NamedTuple):
    """Second moments of a parameter's matrices, by block; supports `+`, `*` and `/` like a tensor."""

    names: tuple[str, ...]
    values: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        """The second moments."""
        return list(self.values)

    def replaced(self, tensors: Sequence[Any]) -> Spectra:
        """The same blocks with other tensors."""
        return Spectra(self.names, tuple(tensors))

    def described(self) -> Spectra:
        """The same blocks with `TensorSpec`s in place of tensors."""
        return self.replaced([TensorSpec.of(t) for t in self.values])

    def __add__(self, other: Spectra) -> Spectra:  # type: ignore[override]
        return Spectra(self.names, tuple(a + b for a, b in zip(self.values, other.values, strict=True)))

    def __mul__(self, factor: float) -> Spectra:  # type: ignore[override]
        return Spectra(self.names, tuple(value * factor for value in self.values))

    def __truediv__(self, divisor: float) -> Spectra:
        return self * (1 / divisor)


def held_rows(gradient: ParameterGradient) -> tuple[Gradients, ...]:
    """Copies of the gradients of each matrix, since the user may overwrite the batch's tensors before they are read."""
    if gradient.groups is None:
        return (gram.as_matrices(gradient.per_sample(), gradient.shape),)
    rows = [part.rows for part in gradient.groups]
    return tuple(Rows(None if r.a is None else r.a.clone(), r.g, r.size_in) for r in rows)
