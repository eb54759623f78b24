"""How layers are grouped linear maps, by loops and one-hot rows: inputs `[N,T,K,I]` and cotangents `[N,T,K,O]`.

A part of the oracle: plain torch, no import of the library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EVERY", "PRODUCTS", "bias_rows", "input_rows", "output_rows", "unfold"]

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
EVERY = (*PRODUCTS, nn.Embedding, nn.PReLU, *_NORMS)


def unfold(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution's input patches `[N, T, K, I]`, by loops over samples and positions.

    I runs over (channel of the group, kernel offsets), as in `weight.flatten(1)`; T row-major.
    """
    # The module's own list is (last axis before, after, second to last before, ...), as F.pad wants it.
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    counts = [(s - r) // st + 1 for s, r, st in zip(x.shape[2:], reach, conv.stride, strict=True)]
    patches = []
    for sample in x:
        for index in torch.cartesian_prod(*[torch.arange(c) for c in counts]).view(-1, len(counts)).tolist():
            corner = [i * st for i, st in zip(index, conv.stride, strict=True)]
            window = tuple(slice(c, c + r, d) for c, r, d in zip(corner, reach, conv.dilation, strict=True))
            patches.append(sample[(slice(None), *window)].reshape(conv.groups, -1))
    return torch.stack(patches).view(x.shape[0], -1, conv.groups, patches[0].shape[-1])


def _samples_first(x: Tensor, axis: int, features: int) -> Tensor:
    """`[N,T,*features]` from samples along an axis and the features in the last ones."""
    x = x.movedim(axis, 0)
    return x.reshape(len(x), -1, *x.shape[x.dim() - features :])


def _by_feature(layer: nn.Module, x: Tensor, axis: int) -> Tensor:
    """The output of a norm or a PReLU, or what has its shape, as `[N,T,K,1]`: K where the scale varies."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return _samples_first(x.flatten(-layer.weight.dim()), axis, 1).unsqueeze(-1)
    if layer.weight.numel() == 1:
        return _samples_first(x.unsqueeze(-1), axis, 1).unsqueeze(-1)
    return x.flatten(2).transpose(1, 2).unsqueeze(-1) if x.dim() > 2 else x[:, None, :, None]


def input_rows(layer: nn.Module, x: Tensor, z: Tensor, axis: int) -> Tensor:
    """What the weight meets, `[N,T,K,I]`, from the layer's input and output."""
    if isinstance(layer, nn.Linear):
        return _samples_first(x, axis, 1).unsqueeze(2)
    if isinstance(layer, nn.Embedding):
        hot = nn.functional.one_hot(x, layer.num_embeddings).to(layer.weight.dtype)
        return _samples_first(hot, axis, 1).unsqueeze(2)
    if isinstance(layer, nn.PReLU):
        return _by_feature(layer, x.clamp(max=0), axis)
    if isinstance(layer, _NORMS):  # a norm's output is its normalised input, scaled and shifted
        rows = _by_feature(layer, z, axis)
        shift = getattr(layer, "bias", None)
        return (rows - (0 if shift is None else shift.reshape(-1, 1))) / layer.weight.reshape(-1, 1)
    return unfold(x, layer)


def output_rows(layer: nn.Module, x: Tensor, g: Tensor, axis: int) -> Tensor:
    """A cotangent of the layer's output as the weight sees it, `[N,T,K,O]`."""
    if isinstance(layer, nn.Embedding):
        if layer.padding_idx is not None:  # the padding's row gets no gradient
            g = g * (x != layer.padding_idx).unsqueeze(-1)
        return _samples_first(g, axis, 1).unsqueeze(2)
    if isinstance(layer, (nn.PReLU, *_NORMS)):
        return _by_feature(layer, g, axis)
    if isinstance(layer, nn.Linear):
        return _samples_first(g, axis, 1).unsqueeze(2)
    return g.flatten(2).unflatten(1, (layer.groups, -1)).permute(0, 3, 1, 2)


def bias_rows(layer: nn.Module, x: Tensor, g: Tensor, axis: int) -> Tensor:
    """The same as the bias sees it: one group of a product's outputs, a group for every feature of a norm."""
    rows = output_rows(layer, x, g, axis)
    return rows if isinstance(layer, _NORMS) else rows.flatten(2).unsqueeze(2)
