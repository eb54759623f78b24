"""The kinds of torch calls between which the tape distinguishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ASSEMBLES",
    "BACKWARD",
    "CARRIES",
    "CASTS",
    "CHOICE",
    "CHOOSES",
    "CONVERTS",
    "DATA",
    "FACTORIES",
    "GATHER",
    "GRADIENTS",
    "LIKE",
    "LOG_SOFTMAX",
    "OPTIONS",
    "RANDOM",
    "REARRANGES",
    "SCATTER",
    "assembles",
    "functions_and_methods",
]


def functions_and_methods(names: str) -> set[Any]:
    """Calls by name: torch's functions and the methods of tensors, as far as there are."""
    return {getattr(owner, name) for owner in (torch, Tensor) for name in names.split() if hasattr(owner, name)}


# The calls that run a backward pass, with their argument names.
OPTIONS = {
    Tensor.backward: ("self", "gradient", "retain_graph", "create_graph", "inputs"),
    torch.autograd.backward: ("tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs"),
}
BACKWARD = set(OPTIONS)
GRADIENTS = {torch.autograd.grad, Tensor.retain_grad, Tensor.register_hook, Tensor.grad.__set__}  # type: ignore[union-attr]
FACTORIES = {
    getattr(owner, name)
    for owner, names in (
        (torch, "zeros ones full empty arange eye linspace logspace zeros_like ones_like full_like empty_like"),
        (torch, "tril_indices triu_indices"),
        (Tensor, "new_zeros new_ones new_full new_empty"),
    )
    for name in names.split()
}
_RANDOM_NAMES = """rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like
    randint_like dropout feature_dropout alpha_dropout feature_alpha_dropout"""
RANDOM = {getattr(torch, name) for name in _RANDOM_NAMES.split()} | {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
}  # fmt: skip
# Calls of whose tensors nothing but the shape, the type and the device is read.
LIKE = {torch.rand_like, torch.randn_like, torch.randint_like, Tensor.new_tensor}
# Calls whose results are data even where no argument is.
DATA = RANDOM | {torch.tensor, torch.as_tensor, torch.from_numpy}
_ASSEMBLE = {Tensor.__getitem__, torch.stack, torch.cat, torch.concat} | functions_and_methods(
    "index_select narrow gather take take_along_dim masked_select"
)
# Calls that split a tensor along an axis, with the position of that axis among their arguments.
_SPLIT = {
    getattr(owner, name): place
    for owner in (torch, Tensor)
    for name, place in (("split", 2), ("chunk", 2), ("tensor_split", 2), ("unbind", 1))
}
ASSEMBLES = _ASSEMBLE | _SPLIT.keys()  # of some of them the arguments decide


def _in_both_forms(names: str) -> set[Any]:
    """Calls by name, and those that write in place."""
    return functions_and_methods(" ".join(f"{name} {name}_" for name in names.split()))


# Calls that write rows onto a tensor where an index or a mask says.
SCATTER = _in_both_forms(
    "index_add index_copy index_put index_reduce scatter scatter_add scatter_reduce masked_scatter"
)
# Calls that move elements according to the values of an index or a mask.
GATHER = {Tensor.__getitem__, Tensor.__setitem__, *SCATTER} | _in_both_forms(
    "where gather take take_along_dim index_select masked_select repeat_interleave"
)
CHOICE = {torch.where, Tensor.where}  # of these the mask's values count where both sides are activations
CASTS = {Tensor.to, Tensor.type_as}  # of a second tensor these read the dtype and the device alone
CONVERTS = {getattr(Tensor, name) for name in "to type type_as float double half bfloat16".split()}
# Calls that give the elements of their first argument again, each once: in another order, shape or memory.
REARRANGES = functions_and_methods(
    """view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze permute transpose swapaxes movedim t
    contiguous clone"""
)
CHOOSES = {Tensor.__getitem__} | functions_and_methods("narrow select index_select masked_select")  # some of them
# Calls whose results hold elements of their first argument and nothing else, in its type or another.
CARRIES = CONVERTS | REARRANGES | CHOOSES | functions_and_methods("swapdims moveaxis") | {
    getattr(Tensor, name).__get__ for name in ("T", "mT")
}  # fmt: skip
LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}


def assembles(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call selects or collects samples, so that its result is a new batch.

    A split along an axis other than the first leaves the samples as they are.
    """
    place = _SPLIT.get(func)
    if place is None:
        return func in _ASSEMBLE
    dim = args[place] if len(args) > place else kwargs.get("dim", 0)
    return dim in (0, -args[0].dim()) if args else True
