"""Blocks of curvature: running averages, damped inverses and saved state, as pure functions.

A block is a Kronecker product B ⊗ A, or a spectrum in a Kronecker eigenbasis, or (without eigenvectors) a diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.operators.diagonal import reciprocal
from layerwise.operators.factor_pairs import bound_of_entries, inverted_inputs, inverted_pairs
from layerwise.operators.kronecker import EigenBlock, KroneckerBlock
from layerwise.operators.low_rank import LOW_RANK_FROM, ThinInverse
from layerwise.operators.ridge import inverse
from layerwise.operators.thin_block import has_factors, thin_block
from layerwise.rows.layout import MatrixLayout
from layerwise.tensors import Verdict, WrongAssumption, is_out_of_memory, without_grad

__all__ = [
    "FORMS",
    "Asked",
    "Average",
    "Block",
    "Inverse",
    "Measured",
    "average",
    "eigenbasis",
    "fields_of",
    "inversion_cost",
    "invert",
    "invert_together",
    "load",
    "merge",
    "names_of",
    "product_cost",
    "rebased",
    "save",
    "with_fields",
    "with_moments",
]

Block = KroneckerBlock | EigenBlock

FORMS = ("pi", "factored", "eigen")
# A factor that its damping leaves unusable is tried with more; 10³ times is an almost plain gradient.
_RAISES = (1.0, 10.0, 100.0, 1000.0)
_SLACK = 2.0  # factor above 1 / damping that rounding may give an inverse


class Measured(NamedTuple):
    """A block of one batch. moments: `[K,O,I]`, the batch's second moments in an eigenbasis of the block.

    rows: `[]`, what A is a mean over, where the host does not know whether that is anything.
    """

    block: Block
    moments: Callable[[EigenBlock], Tensor] | None = None
    rows: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The block's tensors."""
        return [t for t in fields_of(self.block).values() if t is not None]


class Average(NamedTuple):
    """The running average of a block over a number of batches.

    eigen: of EKFAC, the running second moments in an eigenbasis of the Kronecker factors.
    """

    block: Block
    batches: int = 1
    eigen: EigenBlock | None = None


def average(old: Average | None, block: Block, decay: float) -> Average:
    """The exponential moving average with bias correction, after one more batch.

    S_t = ρ S_{t-1} + (1-ρ) X_t from S_0 = 0, divided by 1 - ρ^t; kept in the equal form
    M_t = M_{t-1} + (1-ρ)/(1-ρ^t) (X_t - M_{t-1}). Restarts where the block has changed its form.
    Source: Martens and Grosse (2015), section 5; the correction is Adam's (Kingma and Ba, 2015, section 3).
    """
    if old is None or not _same_form(old.block, block):
        return Average(block)
    batches = old.batches + 1
    weight, its = _weight(decay, batches), fields_of(block)
    averaged = {key: None if t is None else t.lerp(its[key], weight) for key, t in fields_of(old.block).items()}
    return old._replace(block=with_fields(old.block, averaged), batches=batches)


def with_moments(held: Average, basis: EigenBlock, moments: Tensor, decay: float) -> Average:
    """The average, updated with a batch's second moments in the eigenbasis `basis`.

    Source: George et al. (2018), algorithm 1, with running averages as in their section 4.
    """
    if held.eigen is not None:
        moments = held.eigen.spectrum.lerp(moments, _weight(decay, held.batches))
    return held._replace(eigen=replace(basis, spectrum=moments))


def rebased(held: Average, new: EigenBlock) -> Average:
    """The average with its second moments in the present eigenbasis Q' of the factors: the diagonal of Q S Qᵀ there.

    S' = (Q'ᵀ Q)² S for the eigenvectors Q = Q_B ⊗ Q_A before, squared elementwise.
    """
    old = held.eigen
    assert old is not None
    left, right = _overlap(new.basis_out, old.basis_out), _overlap(new.basis_in, old.basis_in)
    spectrum = old.spectrum if left is None else left @ old.spectrum
    return held._replace(eigen=replace(new, spectrum=spectrum if right is None else spectrum @ right.mT))


def _overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """`[K,I,I]`: squared inner products of the eigenvectors; None where both are the identity."""
    return None if new is None or old is None else (new.mT @ old).square()


def eigenbasis(name: str, block: KroneckerBlock) -> EigenBlock | None:
    """The eigenvectors of a block's factors; None where there is no eigendecomposition."""
    try:
        return block.eigh(name)
    except (LayerwiseError, RuntimeError) as error:  # torch's LinAlgError is a RuntimeError
        if is_out_of_memory(error):
            raise
        return None


def _weight(decay: float, batches: int) -> float:
    return (1 - decay) / (1 - decay**batches)


def merge(old: Mapping[str, Average], new: Mapping[str, Average]) -> dict[str, Average]:
    """The new averages, and the old ones of parameters that none of the new covers."""
    taken = {name for key, held in new.items() for name in names_of(key, held)}
    kept = {key: held for key, held in old.items() if taken.isdisjoint(names_of(key, held))}
    return {**kept, **new}


def names_of(key: str, held: Average) -> tuple[str, ...]:
    """The parameters that a block acts on."""
    name = held.block.parameter or key
    return (name,) if held.block.bias is None else (name, held.block.bias)


_TENSORS = ("A", "B", "basis_in", "basis_out", "spectrum")


def fields_of(block: Block) -> dict[str, Any]:
    """The tensors of a block, by field; None among them."""
    return {key: getattr(block, key) for key in _TENSORS if hasattr(block, key)}


def with_fields(block: Block, tensors: Mapping[str, Any]) -> Block:
    """A block of the class that has these fields."""
    kind: Any = EigenBlock if "spectrum" in tensors else KroneckerBlock
    rest = {key: getattr(block, key) for key in ("layout", "bias", "form", "parameter")}
    made: Block = kind(**tensors, **rest)
    return made


def _same_form(old: Block, new: Block) -> bool:
    one, two = ({key: None if t is None else (t.shape, t.dtype) for key, t in fields_of(b).items()} for b in (old, new))
    return one == two and old.bias == new.bias and old.layout == new.layout


# --- inverses -------------------------------------------------------------------------------------


class Inverse(NamedTuple):
    """A block's damped inverse; None for the identity.

    raised: more damping, or another form, was needed. kept: the inverse is of an earlier average.
    """

    block: Block | None
    raised: bool = False
    kept: bool = False


@without_grad
def invert(name: str, block: Block, damping: float, form: str, last: Inverse | None = None) -> Inverse:
    """The damped inverse, with fallbacks that never give NaN, and raise where memory runs out alone.

    form: "pi" `(B + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹` with `π² = (tr A / I) / (tr B / O)`; "factored" the same with π = 1;
    "eigen" `(B ⊗ A + λI)⁻¹`; "input" `I ⊗ (A + λI)⁻¹`. A block with a spectrum S has `Q (|S| + λ)⁻¹ Qᵀ`, whatever the
    form. Each factor is inverted by Cholesky, then with jitter, then by its eigendecomposition in float64 (`ridge`).
    Where that fails, or is larger than 1/λ (then a factor was not positive semidefinite), λ is raised tenfold, three
    times; then "eigen", which drops negative eigenvalues; then the last good inverse; in the end the identity.
    Source: Martens and Grosse (2015), section 6.3 ("pi"); George et al. (2018) ("eigen"); Benzing (2022) ("input").
    """
    attempts = [(form, damping * raise_) for raise_ in _RAISES]
    if form != "eigen":
        attempts += [("eigen", damping * raise_) for raise_ in _RAISES]
    for attempt, (kind, much) in enumerate(attempts):
        try:
            found = _inverted(name, block, much, kind)
        except (LayerwiseError, RuntimeError) as error:  # torch's LinAlgError is a RuntimeError
            if is_out_of_memory(error):
                raise
            continue
        if found is not None:
            return Inverse(found, attempt > 0)
    return Inverse(None, True) if last is None or last.block is None else last._replace(kept=True)


class Asked(NamedTuple):
    """A block to be inverted, as by `invert`."""

    block: Block
    damping: float
    form: str


@without_grad
def invert_together(asked: Mapping[str, Asked], verdict: Verdict | None = None) -> dict[str, Inverse]:
    """What `invert` gives at its first attempt, by name: in few launches and one wait; without those where it fails.

    Factors of equal shape are inverted as one batch, by Cholesky. Blocks without factors, or to be inverted in their
    eigenbasis, and factors that are large enough to have a root of low rank, are left to `invert`, as are diagonals
    where that waits.
    verdict: takes the wait; it raises WrongAssumption where one fails, and none is without then.
    """
    alike: dict[Any, list[str]] = {}
    for name, each in asked.items():
        if _is_small_pair(*each):
            like = each.block.like
            alike.setdefault((like.dtype, like.device, each.damping, each.form), []).append(name)
    found: dict[str, Inverse] = {}
    sizes: list[Tensor] = []  # bounds of the entries, as multiples of 1/λ
    for (_, _, damping, form), some in alike.items():
        # the inverses of blocks of equal shape lie side by side, so that products take them as one
        names = sorted(some, key=lambda name: asked[name].block.size)
        blocks = [asked[name].block for name in names]
        pairs = [(block.input_factor, block.B) for block in blocks if isinstance(block, KroneckerBlock)]
        if form == "input":
            found_in, bounds = inverted_inputs([a for a, _ in pairs], damping)
            inverses = [(a, b) for a, (_, b) in zip(found_in, pairs, strict=True)]
        else:
            inverses, bounds = inverted_pairs(pairs, damping, balanced=form == "pi")
        sizes += [bound * damping for bound in bounds]
        for name, block, (a, b) in zip(names, blocks, inverses, strict=True):
            found[name] = Inverse(with_fields(block, {"A": a, "B": b}))
    if verdict is not None:
        for name, each in asked.items():
            if isinstance(each.block, EigenBlock) and 0 not in each.block.size:
                eigen, good = _inverted_spectrum(each.block, each.damping)
                found[name] = Inverse(eigen)
                sizes.append(torch.where(good, 0.0, math.nan)[None])
        if sizes:
            verdict.ask(sizes, _judge_sizes)
        return found
    numbers = iter(torch.cat([x.to(sizes[0].device) for x in sizes]).tolist() if sizes else ())
    largest = [list(islice(numbers, len(size))) for size in sizes]
    return {name: found[name] for name, its in zip(found, largest, strict=True) if _are_small(its)}


def _are_small(sizes: Sequence[float]) -> bool:
    return all(x <= _SLACK for x in sizes)  # NaN compares false


def _judge_sizes(found: list[float]) -> None:
    if not _are_small(found):
        raise WrongAssumption


def _is_small_pair(block: Block, damping: float, form: str) -> bool:
    factored = isinstance(block, KroneckerBlock) and form in ("pi", "factored", "input") and 0 not in block.size
    return factored and max(block.size[1 + (form == "input") :]) < LOW_RANK_FROM


def _inverted(name: str, block: Block, damping: float, form: str) -> Block | None:
    if 0 in block.size:  # of a parameter without elements
        return block
    if isinstance(block, EigenBlock) or form == "eigen":
        eigen = block if isinstance(block, EigenBlock) else block.eigh(name)
        made, good = _inverted_spectrum(eigen, damping)
        return made if bool(good) else None
    if form == "input":
        a = block.input_factor
        found = replace(block, A=inverse(a, damping) if a.ndim == 3 else reciprocal(name, a + damping))
        largest = _largest(found.input_factor).double()
    else:
        thin = thin_block(block, damping, form == "pi")
        terms = math.inf if has_factors(block) else 0.0  # their roots were looked for
        found = block.inverse(name, damping, form == "pi", terms) if thin is None else thin
        sides = (found.input_factor, found.B) if thin is None else (thin.right, thin.left)
        right, left = (_largest(x).double() for x in sides)
        largest = right * left
    # NaN compares false
    return found if bool((largest * damping <= _SLACK).all()) and bool(torch.isfinite(largest).all()) else None


def _inverted_spectrum(block: EigenBlock, damping: float) -> tuple[EigenBlock, Tensor]:
    """The block with 1/(|S| + λ), and whether that is an inverse, `[]`."""
    spectrum = 1 / (block.spectrum.abs() + damping)
    # 1 / infinity is 0: a spectrum beyond its type's range would stop the parameter
    good = torch.isfinite(spectrum).all() & torch.isfinite(block.spectrum).all()
    return replace(block, spectrum=spectrum), good


def _largest(x: Tensor | ThinInverse) -> Tensor:
    """For each group the largest diagonal entry, which no entry of a positive semidefinite matrix exceeds."""
    if isinstance(x, ThinInverse):
        return x.largest()[None]
    return bound_of_entries(x)


# --- costs -------------------------------------------------------------------------------------------


def inversion_cost(block: Block) -> int:
    """`K (I³ + O³)` for a pair of factors, counting a diagonal factor, and a diagonal block, by its elements."""
    groups, size_out, size_in = block.size
    if block.form == "diagonal":
        return groups * size_out * size_in
    return groups * (_cube(size_out, block, "B", "basis_out") + _cube(size_in, block, "A", "basis_in"))


def _cube(size: int, block: Block, *fields: str) -> int:
    factor = next((getattr(block, field) for field in fields if hasattr(block, field)), None)
    return size if factor is None or factor.ndim == 2 else size**3


def product_cost(block: Block) -> int:
    """`2 K O I (O + I)`: the block's product with a gradient; a diagonal's is its elements."""
    groups, size_out, size_in = block.size
    each = 1 if block.form == "diagonal" else 2 * (size_out + size_in)
    return groups * size_out * size_in * each


# --- state ----------------------------------------------------------------------------------------


def save(held: Average, inverse: Inverse | None) -> dict[str, Any]:
    """A block's state as numbers, strings and tensors."""
    block, layout = held.block, held.block.layout
    assert layout is not None
    index = layout.places().clone(memory_format=torch.contiguous_format) if layout.axes is None else None
    state: dict[str, Any] = {
        **fields_of(block), "bias": block.bias, "parameter": block.parameter, "form": block.form,
        "batches": held.batches, "shape": list(layout.shape), "size": list(layout.size), "index": index,
        "axes": None if layout.axes is None else list(layout.axes), "inverse": None,
        "eigen": None if held.eigen is None else fields_of(held.eigen),
    }  # fmt: skip
    if inverse is not None:
        tensors = {} if inverse.block is None else fields_of(inverse.block)
        state["inverse"] = {"raised": inverse.raised, "kept": inverse.kept, **tensors}
    return state


def load(state: Mapping[str, Any], device: torch.device) -> tuple[Average, Inverse | None]:
    """What `save` gave, on a device, in tensors of its own."""
    axes, size = state["axes"], state["size"]
    shape = state["shape"]
    layout = MatrixLayout.at(shape, state["index"]) if axes is None else MatrixLayout.whole(shape, size, axes)

    def block(source: Mapping[str, Any]) -> Any:
        tensors = {key: source[key] for key in _TENSORS if key in source}
        if not tensors:
            return None
        kind: Any = EigenBlock if "spectrum" in tensors else KroneckerBlock
        return kind(
            **{key: None if t is None else t.to(device, copy=True) for key, t in tensors.items()},
            **{key: state[key] for key in ("bias", "parameter", "form")}, layout=layout,
        )  # fmt: skip

    eigen, saved = state["eigen"], state["inverse"]
    held = Average(block(state), state["batches"], None if eigen is None else block(eigen))
    return held, None if saved is None else Inverse(block(saved), saved["raised"], saved["kept"])
