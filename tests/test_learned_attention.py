"""Attention with a learned bias, query or memory, and dropout: every quantity is that of brute force at one mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from program_checks import check_curvature, check_first_order
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import layerwise as lw
from layerwise.ops.attention import dot_product_attention

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("error::layerwise.errors.SlowPath"),
]

Attend = Callable[["_Attention", Tensor, Tensor, Tensor, float], Tensor]


class _Attention(nn.Module):
    """Two heads of self-attention over three positions, with parameters for `attend`, a way to bias the scores."""

    def __init__(self, attend: Attend, **parts: Any) -> None:
        super().__init__()
        self.attend, self.p, self.last = attend, 0.5, nn.Linear(4, 2)
        self.qkv = nn.Linear(2, 12, bias=False)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        out = self.attend(self, q, k, v, self.p if self.training else 0.0)
        return self.last(out.transpose(1, 2).flatten(2).tanh())


def _biased(s: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=s.bias, dropout_p=p)


def _relative(s: Any) -> Tensor:
    """The bias of T5: a table looked up by the distance of positions, `[1,h,T,T]`."""
    places = torch.arange(3)
    return s.table(places[None] - places[:, None] + 2).permute(2, 0, 1).unsqueeze(0)


def _t5(s: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += _relative(s)
    return F.dropout(F.softmax(scores, -1).type_as(scores), p, training=s.training) @ v


def _swin(s: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    index = (torch.arange(3)[None] - torch.arange(3)[:, None] + 2).view(-1)
    bias = s.bias[index].view(3, 3, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, bias, p)


def _masked(s: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """A learned bias with keys hidden, all of them for one query."""
    hidden = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool()
    return F.scaled_dot_product_attention(q, k, v, s.bias.masked_fill(hidden, -torch.inf), p)


def _added_to_data(s: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """A learned bias added to a mask of the batch, so that the mask is data."""
    return F.scaled_dot_product_attention(q, k, v, s.bias + q[..., :1].detach().sign(), p)


ATTEND: dict[str, tuple[Attend, dict[str, Any]]] = {
    "biased": (_biased, {"bias": (1, 2, 3, 3)}),
    "one_bias": (_biased, {"bias": (3, 3)}),
    "t5": (_t5, {"table": "embedding"}),
    "t5_fused": (
        lambda s, q, k, v, p: F.scaled_dot_product_attention(q, k, v, _relative(s), p, scale=1.0),
        {"table": "embedding"},
    ),
    "swin": (_swin, {"bias": (5, 2)}),
    "masked": (_masked, {"bias": (2, 3, 3)}),
    "added_to_data": (_added_to_data, {"bias": (1, 2, 1, 3)}),
    "query": (
        lambda s, q, k, v, p: F.scaled_dot_product_attention(s.query.expand(len(k), -1, -1, -1), k, v, dropout_p=p),
        {"query": (1, 2, 3, 2)},
    ),
    "memory": (
        lambda s, q, k, v, p: F.scaled_dot_product_attention(q, s.memory, s.memory, is_causal=True, dropout_p=p),
        {"memory": (2, 3, 2)},
    ),
    "grouped": (
        lambda s, q, k, v, p: F.scaled_dot_product_attention(
            q, k[:, :1], v[:, :1] * s.gate, s.bias, p, scale=0.3, enable_gqa=True
        ),
        {"bias": (3, 3), "gate": (3, 2)},
    ),
    "checkpointed": (
        lambda s, q, k, v, p: checkpoint(_biased, s, q, k, v, p, use_reentrant=False),
        {"bias": (1, 2, 3, 3)},
    ),
}  # fmt: skip


CASES = [(name, True) for name in ATTEND] + [(name, False) for name in ("biased", "t5", "query")]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_attention_with_learned_parts(name: str, training: bool) -> None:
    attend, parts = ATTEND[name]
    made = {key: nn.Embedding(5, 2) if size == "embedding" else torch.randn(size) for key, size in parts.items()}
    model, x, y = _Attention(attend, **made).train(training), torch.randn(4, 3, 2), torch.randn(4, 3, 2)

    def logits() -> Tensor:
        torch.manual_seed(1)
        return model(x)

    terms = lambda: (logits() - y).square().flatten(1).mean(1) / len(y)  # noqa: E731
    check_first_order(model, lambda: F.mse_loss(logits(), y), terms)
    check_curvature(model, logits, lambda z: F.mse_loss(z, y))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("mask", ["none", "learned", "boolean", "causal"])
def test_the_parts_of_attention_equal_torchs(mask: str, p: float) -> None:
    q, k, v = (torch.randn(2, 7, 4, 8, requires_grad=True).transpose(1, 2) for _ in range(3))
    options: dict[str, Any] = {"dropout_p": p, "is_causal": mask == "causal"}
    options["attn_mask"] = {
        "learned": torch.randn(1, 4, 7, 7, requires_grad=True), "boolean": torch.randn(7, 7) > 0
    }.get(mask)  # fmt: skip
    found = []
    for attend in (F.scaled_dot_product_attention, dot_product_attention):
        torch.manual_seed(1)
        found.append(attend(q, k, v, **options))
    assert torch.allclose(*found, rtol=1e-12, atol=1e-13)
    assert found[0].stride() == found[1].stride()  # a dropout behind draws in memory's order


def test_a_mask_beside_causality_is_refused() -> None:
    bias, x = nn.Parameter(torch.randn(3, 3)), torch.randn(4, 3, 2)
    with pytest.raises(lw.errors.BadInput, match="is_causal"), lw.observe({"bias": bias}, lw.SquaredNorm()):
        F.scaled_dot_product_attention(x, x, x, bias, is_causal=True)
