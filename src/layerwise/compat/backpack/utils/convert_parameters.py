"""Conversion of one vector to a list of parameter shapes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["vector_to_parameter_list"]


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Split a vector into views shaped like the parameters; the parameters do not change.

    Raises TypeError if `vec` is not a tensor.
    """
    if not isinstance(vec, Tensor):
        raise TypeError(f"vector_to_parameter_list takes a tensor, got {type(vec).__name__}")
    shapes = [p.shape for p in parameters]
    vec = vec.detach()[: sum(shape.numel() for shape in shapes)]
    parts = vec.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
