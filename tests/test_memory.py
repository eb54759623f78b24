"""Memory in large pages: a hint that changes no value."""

from __future__ import annotations

import pytest
import torch

from layerwise import contract, memory
from layerwise.ops.base import Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [0, 3, 2**21 + 7])
def test_shape_type_and_use(dtype: torch.dtype, elements: int) -> None:
    tensor = memory.empty((elements,), torch.zeros((), dtype=dtype))
    tensor.fill_(2)
    assert tensor.dtype == dtype and tensor.shape == (elements,) and tensor.is_contiguous()
    assert float(tensor.sum()) == 2.0 * elements


def test_without_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.empty((2**22,), torch.zeros(())).fill_(1).sum() == 2**22


def test_large_per_sample_gradients_are_those_of_small_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 1, 1, 300, generator=generator)
    g = torch.randn(1, 40, 1, 1, 400, generator=generator)
    large = contract.per_sample(Rows(a, g, 300))
    assert large.numel() * 4 >= memory._LARGE
    for n in range(40):
        assert torch.equal(large[0, n], contract.per_sample(Rows(a[n : n + 1], g[:, n : n + 1], 300))[0, 0])
