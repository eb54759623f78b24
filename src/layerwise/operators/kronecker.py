"""Block-diagonal matrices whose blocks are Kronecker products, and their eigendecompositions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from layerwise.errors import BadInput, NonFinite
from layerwise.operators.diagonal import check_damping, check_names, precise, reciprocal, sum_parts
from layerwise.operators.factor_pairs import split_damping, trace
from layerwise.operators.ridge import inverse
from layerwise.rows.layout import MatrixLayout

__all__ = ["EigenBlock", "EigenKronecker", "Kronecker", "KroneckerBlock"]

DENSE_BYTES = 2**32  # the largest matrix that `to_dense` builds


class _Block:
    """One diagonal block, for a parameter (or a slice of it, or it and its bias) reshaped to `[K,O,I]`.

    layout: where `[K,O,I]` lies in the parameter; None where the parameter itself has this shape.
    bias: the name of a second parameter `[K·O]` that is the last of the I inputs, or None.
    form: the source of the factors: "rows" (inputs and cotangents), "slices" (the same, for one of several disjoint
    slices of the parameter) or "gradients" (per-sample gradients). parameter: the parameter's name where the block's
    name differs.
    """

    layout: MatrixLayout | None
    bias: str | None
    form: str
    parameter: str | None

    @property
    def size(self) -> torch.Size:
        """(K, O, I)."""
        raise NotImplementedError

    def apply(self, w: Tensor) -> Tensor:
        """The block's product with `[..., K,O,I]`."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter that the block belongs to."""
        k, o, i = self.size
        return torch.Size(self.layout.shape if self.layout else (k, o, i - (self.bias is not None)))

    def fold(self, w: Tensor) -> Tensor:
        """Reshape `[..., K,O,I]` to the parameter, `[..., *shape]`, with zeros outside the slice."""
        return self.layout.fold(w) if self.layout else w

    def matrix(self, p: Tensor) -> Tensor:
        """Reshape tensors `[..., *shape]` of the parameter to `[..., K,O,I]`; the left inverse of `fold`."""
        return self.layout.matrix(p) if self.layout else p

    def product(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's product with the tensors of the parameter and its bias."""
        w = self.gather(name, values)
        return self.scatter(name, self.apply(w.to(self.like.dtype)).to(w.dtype))

    def gather(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """The tensors of the parameter and its bias, concatenated to `[K,O,I]`."""
        w, b = self.apart(name, values)
        return w if b is None else torch.cat([w, b], -1)

    def apart(self, name: str, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The parameter's tensor as `[K,O,I]`, or `[K,O,I-1]` and the bias's tensor as `[K,O,1]`."""
        k, o, _ = self.size
        if values[name].shape != self.shape:
            raise BadInput(f"Kronecker @: {name!r} is {tuple(values[name].shape)}, its block {tuple(self.shape)}.")
        w = self.matrix(values[name])
        if self.bias is None:
            return w, None
        if values[self.bias].numel() != k * o:
            raise BadInput(f"Kronecker @: {self.bias!r} is {tuple(values[self.bias].shape)}, expected [{k * o}].")
        return w, values[self.bias].reshape(k, o, 1)

    def scatter(self, name: str, w: Tensor) -> dict[str, Tensor]:
        """Split `[..., K,O,I]` into tensors of the parameters' shapes; the inverse of `gather`."""
        if self.bias is None:
            return {name: self.fold(w)}
        return {name: self.fold(w[..., :-1]), self.bias: w[..., -1].flatten(-2)}

    def to_dense(self, name: str) -> Tensor:
        """The block as `[p, p]`, ordered as the flattened parameter, then its bias."""
        size = self.size.numel()
        p = size if self.bias is not None else self.shape.numel()
        like = self.apply(torch.zeros(self.size).to(self.like))
        if p * p * like.element_size() > DENSE_BYTES:
            raise BadInput(
                f"to_dense: {name!r} has {p} elements, its block would take "
                f"{p * p * like.element_size():.1e} bytes, more than {DENSE_BYTES:.1e}; use @ instead."
            )
        columns = self.apply(torch.eye(size).to(like).view(size, *self.size))

        def order(rows: Tensor) -> Tensor:
            parts = self.scatter(name, rows.reshape(-1, *self.size)).values()
            return torch.cat([part.reshape(len(part), -1) for part in parts], 1)

        return order(order(columns).T.contiguous())

    @property
    def like(self) -> Tensor:
        """A tensor of the block's type, on its device."""
        raise NotImplementedError


@dataclass(frozen=True)
class KroneckerBlock(_Block):
    """One parameter's block: for each group k, `B_k ⊗ A_k`, acting on `W[k,o,i]` as `B W A`.

    A: input factor `[K,I,I]`; `[K,I]` where it is diagonal; None where it is 1 (a bias, I = 1).
    B: output factor `[K,O,O]`; `[K,O]` where it is diagonal. Both positive semidefinite. Other fields: as in `_Block`.
    """

    A: Tensor | None
    B: Tensor
    layout: MatrixLayout | None = None
    bias: str | None = None
    form: str = "rows"
    parameter: str | None = None

    def __post_init__(self) -> None:
        fits = self.B.ndim in (2, 3) and self.B.shape[1] == self.B.shape[-1]
        if fits and self.A is not None:
            fits = self.A.ndim in (2, 3) and len(self.A) == len(self.B) and self.A.shape[1] == self.A.shape[-1]
        if not fits:
            seen = [None if x is None else tuple(x.shape) for x in (self.A, self.B)]
            raise BadInput(f"KroneckerBlock: A, B are {seen}; expected [K,I,I], [K,I] or None, and [K,O,O] or [K,O].")

    @property
    def size(self) -> torch.Size:
        """(K, O, I)."""
        return torch.Size((*self.B.shape[:2], 1 if self.A is None else self.A.shape[-1]))

    @property
    def like(self) -> Tensor:
        """A tensor of the block's type, on its device."""
        return self.B

    @property
    def input_factor(self) -> Tensor:
        """A, with the constant 1 written out as `[K,1,1]`."""
        return self.B.new_ones(len(self.B), 1, 1) if self.A is None else self.A

    def apply(self, w: Tensor) -> Tensor:
        """B W A."""
        w = self._left(w)
        if self.A is None:
            return w
        return w * self.A[:, None] if self.A.ndim == 2 else w @ self.A

    def _left(self, w: Tensor) -> Tensor:
        return self.B[:, :, None] * w if self.B.ndim == 2 else self.B @ w

    def product(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As for every block, with the bias apart: a product with 1001 columns takes a third longer than with 1000."""
        w, b = self.apart(name, values)
        few = self.B.device.type != "cpu"  # launches, which cost an accelerator more than a copy
        if few or b is None or self.bias is None or self.A is None or self.A.ndim == 2:
            return super().product(name, values)
        kind, w, b = w.dtype, w.to(self.B.dtype), b.to(self.B.dtype)
        out_w = self._left(torch.baddbmm(b @ self.A[:, -1:, :-1], w, self.A[:, :-1, :-1]))
        out_b = self._left(w @ self.A[:, :-1, -1:] + b * self.A[:, -1:, -1:])
        return {name: self.fold(out_w.to(kind)), self.bias: out_b.flatten(-3).to(kind)}

    def trace(self) -> Tensor:
        """sum_k tr(B_k) tr(A_k)."""
        return (trace(self.B) * trace(self.input_factor)).sum()

    def eigh(self, name: str) -> EigenBlock:
        """Eigenvectors of both factors, and the products of their eigenvalues, clamped at zero."""
        b, basis_out = _eigh(name, self.B)
        a, basis_in = _eigh(name, self.input_factor)
        spectrum = b.clamp(min=0)[:, :, None] * a.clamp(min=0)[:, None, :]
        return EigenBlock(basis_in, basis_out, spectrum, self.layout, self.bias, self.form, self.parameter)

    def inverse(self, name: str, damping: float, balanced: bool = True, terms: float = 0.0) -> KroneckerBlock:
        """The inverse of the block with both factors damped, as by `dampings`. terms: as for `ridge.inverse`."""
        extra_a, extra_b = self.dampings(damping, balanced)
        a, b = _damped(name, self.input_factor, extra_a, terms), _damped(name, self.B, extra_b, terms)
        return replace(self, A=a, B=b)

    def dampings(self, damping: float, balanced: bool = True) -> tuple[Tensor, Tensor]:
        """What is added to A and to B, `[K]`, split as by Martens and Grosse (π = 1 unless balanced)."""
        a, (_, size_out, size_in) = self.input_factor, self.size
        return split_damping(trace(a) / size_in, trace(self.B) / size_out, damping, balanced)


@dataclass(frozen=True)
class EigenBlock(_Block):
    """One parameter's block in a Kronecker eigenbasis: `Q_B ((Q_Bᵀ W Q_A) ∘ spectrum) Q_Aᵀ`.

    basis_in: Q_A `[K,I,I]`, basis_out: Q_B `[K,O,O]`; None for the identity. spectrum: `[K,O,I]`, not
    necessarily a product, such as EKFAC's second moments in the eigenbasis. Other fields: as in `KroneckerBlock`.
    """

    basis_in: Tensor | None
    basis_out: Tensor | None
    spectrum: Tensor
    layout: MatrixLayout | None = None
    bias: str | None = None
    form: str = "rows"
    parameter: str | None = None

    @property
    def size(self) -> torch.Size:
        """(K, O, I)."""
        return self.spectrum.shape

    @property
    def like(self) -> Tensor:
        """A tensor of the block's type, on its device."""
        return self.spectrum

    def rotate(self, w: Tensor) -> Tensor:
        """Rotate `[..., K,O,I]` into the eigenbasis: Q_Bᵀ W Q_A."""
        w = w if self.basis_out is None else self.basis_out.mT @ w
        return w if self.basis_in is None else w @ self.basis_in

    def rotate_back(self, w: Tensor) -> Tensor:
        """Rotate back from the eigenbasis: Q_B W Q_Aᵀ; the inverse of `rotate`."""
        w = w if self.basis_out is None else self.basis_out @ w
        return w if self.basis_in is None else w @ self.basis_in.mT

    def apply(self, w: Tensor) -> Tensor:
        """Q_B ((Q_Bᵀ W Q_A) ∘ spectrum) Q_Aᵀ."""
        return self.rotate_back(self.rotate(w) * self.spectrum)


AnyBlock = TypeVar("AnyBlock", KroneckerBlock, EigenBlock)


class _BlockDiagonal(Generic[AnyBlock]):
    """A block-diagonal matrix with a block for each parameter (and its bias), or for each of its slices."""

    def __init__(self, blocks: Mapping[str, AnyBlock]) -> None:
        self.blocks: dict[str, AnyBlock] = dict(blocks)
        owners = [name for key, block in self.blocks.items() if not block.parameter for name in _owners(key, block)]
        sliced = {block.parameter for block in self.blocks.values() if block.parameter} & set(owners)
        twice = sorted(sliced | {name for name in owners if owners.count(name) > 1})
        if twice:
            raise BadInput(f"{type(self).__name__}: {twice} stand in more than one block.")

    def __repr__(self) -> str:
        blocks = (
            f"{key}: [K,O,I] = {list(block.size)}" + (f" from {block.form}" if block.form != "rows" else "")
            for key, block in self.blocks.items()
        )
        return f"{type(self).__name__}({', '.join(blocks)})"

    @property
    def forms(self) -> dict[str, str]:
        """The form of each parameter's block or blocks: "rows", "slices" or "gradients"."""
        return {name: block.form for key, block in self.blocks.items() for name in _owners(key, block)}

    def names(self) -> Iterator[str]:
        """The names of all parameters, each once, including biases inside the blocks of their weights."""
        yield from self.forms

    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_names(f"{type(self).__name__} @", self.names(), other)
        result: dict[str, Tensor] = {}
        for key, block in self.blocks.items():
            for name, part in block.product(block.parameter or key, other).items():
                result[name] = part if name not in result else result[name] + part
        return {name: result[name] for name in other}

    def to_dense(self, name: str) -> Tensor:
        """The block of one parameter (followed by its bias where the block holds one) as a matrix.

        Shapes: `[p, p]` in the order of `parameter.flatten()`; for slices the sum of their blocks.
        Raises: `BadInput` for an unknown name or a block of more than 4 GiB.
        """
        owned = [(block.parameter or key, block) for key, block in self.blocks.items()]
        check_names(f"{type(self).__name__}.to_dense", [key for key, _ in owned], [name], whole=False)
        return reduce(torch.add, (block.to_dense(name) for key, block in owned if key == name))


class Kronecker(_BlockDiagonal[KroneckerBlock]):
    """A block-diagonal matrix of Kronecker products, the result of K-FAC, KFLR and KFRA.

    Block of a parameter: for each group k, `B_k ⊗ A_k` acts on `W[k,o,i]` as `B W A`.

    Shapes: products take and give tensors in the parameters' shapes, keyed by parameter name.
    Raises: `BadInput` where names or shapes of a product do not fit.
    Source: Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature".
    """

    @property
    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """The factors (A, B) of each block, or (B,) where A is the constant 1; `w[0]`, `w[1]` are slices of `w`."""
        return {n: (b.B,) if b.A is None else (b.A, b.B) for n, b in self.blocks.items()}

    def inverse(self, damping: float = 0.0, exact: bool = False) -> Kronecker | EigenKronecker:
        """The inverse of the damped matrix.

        By default each factor is damped: `(B + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹` with
        `π = √((tr A / I) / (tr B / O))` for each group. With `exact=True` it is `(B ⊗ A + λI)⁻¹` from the
        eigendecompositions of the factors.

        Units: λ, the damping, has the units of the matrix.
        Raises: `BadInput` for a negative damping; `NonFinite` where a factor has NaN or infinity.
        Source: Martens and Grosse 2015, section 6.3; George et al. 2018 for the eigenbasis.
        """
        check_damping("Kronecker.inverse", damping)
        if exact:
            return self.eigh().inverse(damping)
        return Kronecker({name: block.inverse(name, damping) for name, block in self.blocks.items()})

    def eigh(self) -> EigenKronecker:
        """The eigendecomposition of the same matrix; eigenvalues below zero (rounding) become zero."""
        return EigenKronecker({name: block.eigh(name) for name, block in self.blocks.items()})

    def trace(self) -> Tensor:
        """Trace of the whole matrix, sum of tr(B_k) tr(A_k)."""
        return sum_parts(block.trace() for block in self.blocks.values())

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Logarithm of the determinant of `matrix + damping I`; −inf where that is singular."""
        return self.eigh().logdet(damping)


class EigenKronecker(_BlockDiagonal[EigenBlock]):
    """A block-diagonal matrix with Kronecker-factored eigenvectors and arbitrary eigenvalues.

    Block of a parameter: `(Q_B ⊗ Q_A) diag(spectrum) (Q_B ⊗ Q_A)ᵀ` for each group.

    Raises: `BadInput` where names or shapes of a product do not fit.
    Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis".
    """

    @property
    def eigenvalues(self) -> dict[str, Tensor]:
        """The eigenvalues of each block, `[K,O,I]`, unsorted."""
        return {name: block.spectrum for name, block in self.blocks.items()}

    def inverse(self, damping: float = 0.0) -> EigenKronecker:
        """Exactly `(matrix + damping I)⁻¹`; zero along eigenvectors where the damped eigenvalue is zero.

        Raises: `BadInput` for a negative damping; `NonFinite` where an eigenvalue is too small to invert.
        """
        check_damping("EigenKronecker.inverse", damping)
        inverses = {n: reciprocal(n, block.spectrum + damping) for n, block in self.blocks.items()}
        return EigenKronecker({n: replace(block, spectrum=inverses[n]) for n, block in self.blocks.items()})

    def trace(self) -> Tensor:
        """Trace of the whole matrix, the sum of its eigenvalues."""
        return sum_parts(block.spectrum.sum() for block in self.blocks.values())

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Logarithm of the determinant of `matrix + damping I`; −inf where that is singular."""
        check_damping("logdet", damping)
        return sum_parts((block.spectrum + damping).log().sum() for block in self.blocks.values())


def _owners(key: str, block: _Block) -> tuple[str, ...]:
    """The names of the parameters that a block acts on."""
    name = block.parameter or key
    return (name,) if block.bias is None else (name, block.bias)


def _damped(name: str, x: Tensor, damping: Tensor, terms: float) -> Tensor:
    return inverse(precise(name, x), damping, terms) if x.ndim == 3 else reciprocal(name, x + damping[:, None])


def _eigh(name: str, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors (None: the identity) of a symmetric factor, in float64 where its own dtype fails."""
    if not torch.isfinite(factor).all():
        raise NonFinite(f"Kronecker: a factor of {name!r} {tuple(factor.shape)} holds NaN or infinity.")
    if factor.ndim == 2:
        return factor, None
    symmetric = precise(name, factor) / 2 + factor.mT / 2
    try:
        values, vectors = torch.linalg.eigh(symmetric)
        if torch.isfinite(values).all() and torch.isfinite(vectors).all():
            return values, vectors
    except LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(symmetric.double())
    except LinAlgError as error:
        raise NonFinite(f"Kronecker: the eigendecomposition of {name!r} failed: {error}; raise the damping.") from error
    return values.to(factor.dtype), vectors.to(factor.dtype)
