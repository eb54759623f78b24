"""Kronecker factors over many batches: how they are laid out, averaged, inverted and saved. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.operators.kronecker import EigenBlock, KroneckerBlock

__all__ = ["FORMS", "Average", "Inverse", "Layout", "average", "invert", "layout_of", "load", "merge", "save"]

FORMS = ("pi", "factored", "eigen")
# A factor that its damping leaves unusable is tried with more; 10³ times is an almost plain gradient.
_RAISES = (1.0, 10.0, 100.0, 1000.0)
_SLACK = 2.0  # rounding may bring an inverse this far above 1 / damping


@dataclass(frozen=True)
class Layout:
    """How a parameter's elements stand in its matrix `[K,O,I]`, as numbers that can be saved.

    axes: the parameter, reshaped to the matrix's axes in this order; or index: the element at each place.
    """

    shape: tuple[int, ...]
    size: tuple[int, int, int]
    axes: tuple[int, ...] | None
    index: Tensor | None = None

    def matrix(self, p: Tensor) -> Tensor:
        """A tensor of the parameter's shape as `[K,O,I]`."""
        if self.axes is not None:
            return p.reshape([self.size[a] for a in self.axes]).permute(_inverse(self.axes))
        assert self.index is not None
        return p.reshape(-1)[self.index.to(p.device)]

    def fold(self, w: Tensor) -> Tensor:
        """`[..., K,O,I]` in the parameter's shape: the inverse of `matrix`."""
        lead = w.shape[:-3]
        if w.is_meta:
            return w.new_empty(*lead, *self.shape)
        if self.axes is not None:
            w = w.permute(*range(len(lead)), *(len(lead) + a for a in self.axes))
        else:
            assert self.index is not None
            w = w.flatten(-3)[..., self.index.flatten().argsort().to(w.device)]
        return w.reshape(*lead, *self.shape)

    def same(self, other: Layout) -> bool:
        """Whether both lay a parameter out alike."""
        plain = (self.shape, self.size, self.axes) == (other.shape, other.size, other.axes)
        return plain and (self.index is None or (other.index is not None and torch.equal(self.index, other.index)))


def layout_of(block: KroneckerBlock, shape: torch.Size) -> Layout:
    """The layout of a block's parameter, read off the numbers of its elements."""
    elements = torch.arange(shape.numel())
    found = block.matrix(elements.reshape(shape))
    size = (found.shape[0], found.shape[1], found.shape[2])
    for axes in permutations(range(3)):
        if torch.equal(elements.reshape([size[a] for a in axes]).permute(_inverse(axes)), found):
            return Layout(tuple(shape), size, axes)
    return Layout(tuple(shape), size, None, found.contiguous())


def _inverse(axes: tuple[int, ...]) -> list[int]:
    return [axes.index(i) for i in range(len(axes))]


class Average(NamedTuple):
    """The running average of a block's factors, over a number of batches."""

    block: KroneckerBlock
    layout: Layout
    batches: int = 1


def average(old: Average | None, block: KroneckerBlock, layout: Layout, decay: float) -> Average:
    """The exponential moving average with bias correction, one batch further.

    S_t = ρ S_{t-1} + (1-ρ) X_t from S_0 = 0, divided by 1 - ρ^t; kept in the equal form
    M_t = M_{t-1} + (1-ρ)/(1-ρ^t) (X_t - M_{t-1}). Begins anew where the block has changed its form.
    Source: Martens and Grosse (2015), section 5; the correction is Adam's (Kingma and Ba, 2015, section 3).
    """
    new = replace(block, A=_widened(block.A), B=_widened(block.B), fold=layout.fold, matrix=layout.matrix)
    if old is None or not _same_form(old, new, layout):
        return Average(new, layout)
    batches = old.batches + 1
    weight = (1 - decay) / (1 - decay**batches)
    a = None if old.block.A is None or new.A is None else old.block.A.lerp(new.A, weight)
    return Average(replace(old.block, A=a, B=old.block.B.lerp(new.B, weight)), layout, batches)


def merge(old: Mapping[str, Average], new: Mapping[str, Average]) -> dict[str, Average]:
    """New averages with those old ones whose parameters none of the new holds."""
    taken = {name for key, held in new.items() for name in _names(key, held)}
    kept = {key: held for key, held in old.items() if taken.isdisjoint(_names(key, held))}
    return {**kept, **new}


def _names(key: str, held: Average) -> tuple[str, ...]:
    return (key,) if held.block.bias is None else (key, held.block.bias)


def _widened(factor: Any) -> Any:
    """Factors of half precision are kept in float32, where they can be inverted."""
    return factor.float() if factor is not None and factor.dtype in (torch.float16, torch.bfloat16) else factor


def _same_form(old: Average, new: KroneckerBlock, layout: Layout) -> bool:
    one, two = (None if b.A is None else (b.A.shape, b.A.dtype) for b in (old.block, new))
    same = one == two and old.block.B.shape == new.B.shape and old.block.B.dtype == new.B.dtype
    return same and old.block.bias == new.bias and old.layout.same(layout)


# --- inverses -------------------------------------------------------------------------------------


class Inverse(NamedTuple):
    """A block's damped inverse, None for the identity; raised: the damping was, or the form changed."""

    block: KroneckerBlock | EigenBlock | None
    raised: bool = False


@torch.no_grad()
def invert(name: str, block: KroneckerBlock, damping: float, form: str) -> Inverse:
    """The damped inverse on a ladder that never raises and never gives NaN.

    form: "pi" `(B + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹` with `π² = (tr A / I) / (tr B / O)`; "factored" the same with π = 1;
    "eigen" `(B ⊗ A + λI)⁻¹`. Where that fails, or is larger than 1/λ (then a factor was not positive
    semidefinite), λ is raised tenfold, three times; then "eigen", which drops negative eigenvalues, and in the end
    the identity.
    Source: Martens and Grosse (2015), section 6.3 ("pi"); George et al. (2018) ("eigen").
    """
    attempts = [(form, damping * raise_) for raise_ in _RAISES]
    if form != "eigen":
        attempts += [("eigen", damping * raise_) for raise_ in _RAISES]
    for attempt, (kind, much) in enumerate(attempts):
        try:
            found = _inverted(name, block, much, kind)
        except (LayerwiseError, RuntimeError):  # torch's LinAlgError is a RuntimeError
            continue
        if found is not None:
            return Inverse(found, attempt > 0)
    return Inverse(None, True)


def _inverted(name: str, block: KroneckerBlock, damping: float, form: str) -> KroneckerBlock | EigenBlock | None:
    if form == "eigen":
        eigen = block.eigh(name)
        spectrum = 1 / (eigen.spectrum + damping)
        return replace(eigen, spectrum=spectrum) if bool(torch.isfinite(spectrum).all()) else None
    found = block.inverse(name, damping, balanced=form == "pi")
    largest = _largest(found.input_factor).double() * _largest(found.B).double()
    # NaN compares false
    return found if bool((largest * damping <= _SLACK).all()) and bool(torch.isfinite(largest).all()) else None


def _largest(x: Tensor) -> Tensor:
    """For each group the largest diagonal entry, which no entry of a positive semidefinite matrix exceeds."""
    diagonal = x if x.ndim == 2 else x.diagonal(dim1=-2, dim2=-1)
    low, high = x.flatten(1).aminmax(dim=1)
    spoiled = ~(torch.isfinite(low) & torch.isfinite(high)) | (diagonal.amin(-1) < 0)
    return diagonal.amax(-1).masked_fill(spoiled, float("nan"))


# --- state ----------------------------------------------------------------------------------------

_TENSORS = ("A", "B", "basis_in", "basis_out", "spectrum")


def save(held: Average, inverse: Inverse | None) -> dict[str, Any]:
    """A block's state as numbers, strings and tensors."""
    layout = held.layout
    state: dict[str, Any] = {
        "A": held.block.A, "B": held.block.B, "bias": held.block.bias, "batches": held.batches,
        "shape": list(layout.shape), "size": list(layout.size), "index": layout.index,
        "axes": None if layout.axes is None else list(layout.axes), "inverse": None,
    }  # fmt: skip
    if inverse is not None:
        state["inverse"] = {"raised": inverse.raised, "identity": inverse.block is None}
        state["inverse"] |= {key: getattr(inverse.block, key) for key in _TENSORS if hasattr(inverse.block, key)}
    return state


def load(state: Mapping[str, Any], device: torch.device) -> tuple[Average, Inverse | None]:
    """What `save` gave, on a device, in tensors of its own."""

    def tensors(source: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: source[key] for key in _TENSORS if key in source}
        return {key: None if t is None else t.to(device, copy=True) for key, t in found.items()}

    axes, size = state["axes"], state["size"]
    layout = Layout(
        tuple(state["shape"]), (size[0], size[1], size[2]), None if axes is None else tuple(axes), state["index"]
    )
    maps: dict[str, Any] = {"fold": layout.fold, "matrix": layout.matrix, "bias": state["bias"]}
    held = Average(KroneckerBlock(**tensors(state), **maps), layout, state["batches"])
    saved = state["inverse"]
    if saved is None:
        return held, None
    if saved["identity"]:
        return held, Inverse(None, saved["raised"])
    kind = EigenBlock if "spectrum" in saved else KroneckerBlock
    return held, Inverse(kind(**tensors(saved), **maps), saved["raised"])
