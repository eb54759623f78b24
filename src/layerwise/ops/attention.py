"""Attention decomposed into plain calls, with samples first: of several heads with their projections, and the core.

For heads `h` of width d, queries at positions t and keys at positions s of one sample,

    out = concat_h( softmax_s( q_h k_hᵀ / √d + mask ) v_h ) W_oᵀ + b_o,    q = W_q x + b_q, k, v alike

Torch's own function flattens positions before samples and hides its projections; here they are calls of their
own with the samples along the first axis. Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from layerwise.errors import BadInput

__all__ = ["DECOMPOSITIONS", "dot_product_attention", "multi_head_attention", "refused"]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output `[T,N,E]` (or `[T,E]`) of `F.multi_head_attention_forward`, and its weights or None.

    Equal to torch's up to rounding, with the same draws where dropout is active. Raises BadInput where shapes
    do not fit each other. `refused` says what has no decomposition.
    """
    batched = query.dim() == 3
    _check(query, key, value, embed_dim_to_check, num_heads, key_padding_mask, attn_mask, is_causal)
    if batched:
        query, key, value = _samples_first(query, key, value)
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = _project(query, key, value, weights, in_proj_bias)
    k, v, extra = _extended(k, v, bias_k, bias_v, add_zero_attn)

    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(-3, -2) for x in (q, k, v))  # [N,h,T,d]
    scores = torch.matmul(q * (1 / math.sqrt(q.shape[-1])), k.transpose(-2, -1))
    if is_causal and key_padding_mask is None and not need_weights:
        # torch takes the hint at its word, and never looks at the mask
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril().logical_not()
    elif attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, extra)) if extra else attn_mask
        if attn_mask.dim() == 3 and batched:
            attn_mask = attn_mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        key_padding_mask = F.pad(key_padding_mask, (0, extra)) if extra else key_padding_mask
        key_padding_mask = key_padding_mask.unsqueeze(-2).unsqueeze(-2)  # [N,1,1,S]
    masks = [_additive(m, scores.dtype) for m in (attn_mask, key_padding_mask) if m is not None]
    p = _softmax(scores, masks, zero_if_all_masked=not need_weights)
    if training and dropout_p > 0:
        p = F.dropout(p, dropout_p)

    out = torch.matmul(p, v).transpose(-3, -2).flatten(-2)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    if batched:
        out = out.transpose(0, 1).contiguous()  # laid out as torch's: a dropout behind it draws in memory's order
    if not need_weights:
        return out, None
    return out, p.mean(-3) if average_attn_weights else p


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The output of `F.scaled_dot_product_attention`, where a query, a key, a value or the mask is a parameter.

    Equal to torch's up to rounding, with the draws of its plain kernel where dropout is active. Raises BadInput for a
    mask beside is_causal.
    """
    if is_causal and attn_mask is not None:
        raise BadInput("attention was given attn_mask and is_causal=True; give one of them")
    with torch._C.DisableTorchFunction():
        kernel = torch._fused_sdp_choice(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = torch.matmul(query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and not attn_mask.is_floating_point():
        attn_mask = attn_mask.logical_not()  # here True takes part
    masks = [] if attn_mask is None else [_additive(attn_mask, scores.dtype)]
    p = _softmax(scores, masks, zero_if_all_masked=True)
    out = torch.matmul(F.dropout(p, dropout_p) if dropout_p > 0 else p, value)
    if kernel == SDPBackend.MATH.value or out.dim() != 4:
        return out
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # laid out as by fused kernels, for dropout behind it


def _samples_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[T,N,E]` to `[N,T,E]`; arguments that are one tensor stay one."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, q if value is query else k if value is key else value.transpose(0, 1)


def _project(query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None) -> Any:
    """Queries, keys and values; by one call with the whole weight in self-attention, by its parts elsewhere."""
    if isinstance(weight, tuple):
        weights = weight
    elif query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    else:
        weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    inputs = (query, key, value)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _extended(
    k: Tensor, v: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, zero: bool
) -> tuple[Tensor, Tensor, int]:
    """Keys and values with the learned position and the position of zeros appended, and the number of both."""
    extra = []
    lead = k.shape[:-2]
    if bias_k is not None and bias_v is not None:
        extra.append([b.reshape(1, -1).expand(*lead, -1, -1) for b in (bias_k, bias_v)])
    elif bias_k is not None or bias_v is not None:
        raise BadInput("attention was given one of bias_k and bias_v; give both or none")
    if zero:
        extra.append([torch.zeros(*lead, 1, x.shape[-1], dtype=x.dtype, device=x.device) for x in (k, v)])
    if extra:
        k, v = (torch.cat([x, *more], -2) for x, more in zip((k, v), zip(*extra, strict=True), strict=True))
    return k, v, len(extra)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a term of the scores: -∞ where a Boolean one is True."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def _softmax(scores: Tensor, masks: list[Tensor], zero_if_all_masked: bool) -> Tensor:
    """Attention weights; a query without keys has weights 0 or NaN, as in torch's two kernels."""
    for mask in masks:
        scores = scores + mask
    if not masks or not zero_if_all_masked:
        return scores.softmax(-1)
    hidden = masks[0].detach() if len(masks) == 1 else masks[0].detach() + masks[1].detach()
    nothing = (hidden == -math.inf).all(-1, keepdim=True)
    # the fill comes first as well: the derivative of a softmax of -∞ alone is NaN
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Raise BadInput where the shapes do not fit each other; all but weights, which torch compares itself."""
    wrong = None
    if query.dim() not in (2, 3) or len({x.dim() for x in (query, key, value)}) > 1:
        wrong = "give all three as [T, N, E], or all as [T, E]"
    else:
        n, t, s = query.shape[1:-1], query.shape[0], key.shape[0]
        full = (math.prod(n) * heads, t, s)
        if key.shape[:-1] != value.shape[:-1] or key.shape[1:-1] != n:
            wrong = "keys and values must agree in positions, and all three in samples"
        elif query.shape[-1] != width or width % heads:
            wrong = f"queries must be {width} wide, a multiple of the {heads} heads"
        elif padding is not None and padding.shape != (*n, s):
            wrong = f"key_padding_mask has shape {tuple(padding.shape)}, not {(*n, s)}"
        elif mask is not None and mask.shape not in ((t, s), full):
            wrong = f"attn_mask has shape {tuple(mask.shape)}, neither {(t, s)} nor {full}"
        elif any(m is not None and m.dtype != torch.bool and not m.is_floating_point() for m in (padding, mask)):
            wrong = "masks must be Boolean or floating-point"
        elif is_causal and mask is None:
            wrong = "is_causal is a hint on attn_mask; give the mask too"
    if wrong is not None:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise BadInput(f"attention of query, key and value of shapes {shapes}: {wrong}")


def refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call of `F.multi_head_attention_forward` has no decomposition; None where it has one."""
    for place, name in enumerate(("static_k", "static_v"), start=21):
        if kwargs.get(name, args[place] if len(args) > place else None) is not None:
            return f"attention with {name}, keys or values made outside; project them by F.linear, or attend by hand"
    return None


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    F.scaled_dot_product_attention: dot_product_attention,
}
