"""Between one vector and a list of parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["vector_to_parameter_list"]


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Views of a vector, shaped like the parameters one after the other; the parameters stay as they are.

    Raises TypeError where `vec` is no tensor.
    """
    if not isinstance(vec, Tensor):
        raise TypeError(f"vector_to_parameter_list takes a tensor, got {type(vec).__name__}")
    shapes = [p.shape for p in parameters]
    vec = vec.detach()[: sum(shape.numel() for shape in shapes)]
    parts = vec.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
