"""A diagonal matrix over named parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Real

import torch
from torch import Tensor

from layerwise.errors import BadInput, NonFinite

__all__ = ["Diagonal", "check_damping", "check_names", "precise", "reciprocal", "sum_parts"]


class Diagonal:
    """A diagonal matrix over named parameters, stored in their shapes.

    (D v)[p] = d[p] v[p] for each parameter element p.

    Shapes: `entries[name]` and the tensors that it multiplies have the parameter's shape.
    Raises: `BadInput` where names or shapes of a product do not fit.
    """

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self.entries = dict(entries)

    def __repr__(self) -> str:
        return f"Diagonal({', '.join(f'{n}: {tuple(d.shape)}' for n, d in self.entries.items())})"

    def __getitem__(self, name: str) -> Tensor:
        check_names("Diagonal[...]", self.entries, [name], whole=False)
        return self.entries[name]

    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_names("Diagonal @", self.entries, other)
        for name, entry in self.entries.items():
            if other[name].shape != entry.shape:
                raise BadInput(
                    f"Diagonal @: {name!r} is {tuple(other[name].shape)}, its diagonal {tuple(entry.shape)}."
                )
        return {name: entry * other[name] for name, entry in self.entries.items()}

    def inverse(self, damping: float = 0.0) -> Diagonal:
        """The inverse of the damped matrix, `1 / (d + damping)`; zero where `d + damping` is zero.

        Units: damping has the units of the diagonal. Raises: `BadInput` for a negative damping; `NonFinite`
        where the diagonal has NaN or infinity, or `1 / (d + damping)` is beyond the range of its type.
        """
        check_damping("Diagonal.inverse", damping)
        return Diagonal({name: reciprocal(name, entry + damping) for name, entry in self.entries.items()})

    def trace(self) -> Tensor:
        """Sum of the diagonal, over all parameters."""
        return sum_parts(entry.sum() for entry in self.entries.values())

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Logarithm of the determinant of the damped matrix; −inf where it is singular.

        sum_p log(d[p] + damping). Raises: `BadInput` where an entry is negative after damping.
        """
        check_damping("Diagonal.logdet", damping)
        for name, entry in self.entries.items():
            if (entry + damping < 0).any():
                raise BadInput(
                    f"Diagonal.logdet: {name!r} has an entry of {float(entry.min())}, which damping {damping} leaves "
                    "negative; raise the damping."
                )
        return sum_parts((entry + damping).log().sum() for entry in self.entries.values())

    def to_dense(self, name: str) -> Tensor:
        """The block of one parameter, `[p, p]` in the order of `parameter.flatten()`."""
        return torch.diag(self[name].flatten())

    def map(self, function: Callable[[Tensor], Tensor]) -> Diagonal:
        """The diagonal matrix with `function` applied to each entry tensor."""
        return Diagonal({name: function(entry) for name, entry in self.entries.items()})


def reciprocal(name: str, x: Tensor) -> Tensor:
    """Elementwise `1 / x`, zero where x is zero; raises NonFinite for a result that is not finite."""
    result = torch.where(x == 0, torch.zeros_like(x), 1 / x)
    if not (torch.isfinite(result).all() and torch.isfinite(x).all()):
        raise NonFinite(
            f"inverse of {name!r}: the matrix holds NaN or infinity, which no damping helps; skip this batch."
            if not torch.isfinite(x).all()
            else f"inverse of {name!r}: the matrix holds entries too small to invert; raise the damping."
        )
    return result


def precise(name: str, factor: Tensor) -> Tensor:
    """The factor; raises BadInput for one in float16 or bfloat16, which have no matrix decompositions in torch."""
    if factor.dtype in (torch.float16, torch.bfloat16):
        raise BadInput(
            f"asked for an inverse or eigenvectors of the factors of {name!r}, which are {factor.dtype}; measure them "
            "in float32: observe(..., dtype=torch.float32)"
        )
    return factor


def check_damping(asked: str, damping: float) -> None:
    """Raise BadInput for a damping that is negative or not finite."""
    if not isinstance(damping, (Real, Tensor)) or not 0 <= damping < float("inf"):
        raise BadInput(f"{asked}: damping is {damping!r}; it must be a finite number that is not negative.")


def check_names(asked: str, known: Iterable[str], seen: Iterable[str], whole: bool = True) -> None:
    """Raise BadInput for names that the operator lacks and, if `whole`, for names that the argument lacks."""
    known, seen = list(known), list(seen)
    extra = [name for name in seen if name not in known]
    missing = [name for name in known if name not in seen] if whole else []
    if extra or missing:
        text = [f"the operator has no block for {extra}"] * bool(extra)
        text += [f"the argument lacks {missing}"] * bool(missing)
        raise BadInput(f"{asked}: {' and '.join(text)}; the operator's parameters are {known}.")


def sum_parts(parts: Iterable[Tensor]) -> Tensor:
    """Sum of scalars that may be on different devices; zero for none."""
    total = list(parts)
    return torch.stack([part.to(total[0].device) for part in total]).sum() if total else torch.zeros(())
