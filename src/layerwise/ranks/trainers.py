"""What torch's trainers of several processes, DDP and FSDP2, do around a model, and how an observation lives with it.

DDP averages `.grad` from hooks on the gradient accumulators, which our own pulls never reach; its output may pass an
autograd node that starts an iteration's reduction. FSDP2 (`fully_shard`) keeps each parameter as a DTensor, puts whole
parameters into the modules while they run, and frees them by autograd nodes and hooks. Both act on any backward pass
through the graph, so they are held still while pulls run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "Placements",
    "Still",
    "is_sharded",
    "kept_still",
    "placements_of",
    "several",
    "sharded_of",
    "unreduced",
    "unwrapped",
]

Placements = Mapping[str, Tensor]  # parameters as DTensors


def several() -> bool:
    """Whether there are other processes that may take part in a backward pass."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unwrapped(model: Any) -> Any:
    """The module that `DistributedDataParallel` runs, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def unreduced(model: Any) -> AbstractContextManager[None]:
    """Let a DDP module's backward passes send nothing, for gradients that nobody will keep."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has made one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


# -- FSDP2 --------------------------------------------------------------------------------------------------


def _groups(model: Any) -> list[Any]:
    """FSDP2's groups of parameters in a module, in its order."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not isinstance(model, nn.Module) or not dist.is_initialized():
        return []
    found: dict[int, Any] = {}
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                found.setdefault(id(group), group)
    return list(found.values())


def sharded_of(model: Any) -> dict[int, Tensor]:
    """The DTensor that stands for each whole parameter that FSDP2 has made so far, by the id of the latter."""
    return {
        id(p._unsharded_param): p.sharded_param
        for group in _groups(model)
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }


def placements_of(owners: Mapping[str, Tensor]) -> Placements:
    """Those of the parameters that are DTensors."""
    return {name: p for name, p in owners.items() if is_sharded(p)}


# -- pulls --------------------------------------------------------------------------------------------------


class Still:
    """The parts of trainers that lie in one graph: FSDP2's groups and the DDP modules that a sink belongs to."""

    def __init__(self, model: Any, total: Tensor) -> None:
        nodes = list(_nodes(total)) if dist.is_available() and dist.is_initialized() else []
        own = {id(group): group for group in _groups(model)}
        for node in nodes:
            if node.name() == "RegisterPostBackwardFunctionBackward":
                own.setdefault(id(node.param_group), node.param_group)
        self.groups = list(own.values())
        sinks = [node.ddp_weakref() for node in nodes if node.name() == "_DDPSinkBackward"]
        self._sinks = [ddp for ddp in sinks if ddp is not None and ddp.static_graph]

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """Hold all of them still: nothing is reduced, freed or begun by what runs inside the context."""
        begun = [(ddp, ddp._static_graph_delay_allreduce_enqueued) for ddp in self._sinks]
        try:
            for group in self.groups:
                group.unshard()
                group.wait_for_unshard()
                group.post_backward = _nothing
            for ddp, _ in begun:
                ddp._static_graph_delay_allreduce_enqueued = True
            yield
        finally:
            for group in self.groups:
                vars(group).pop("post_backward", None)
            for ddp, value in begun:
                ddp._static_graph_delay_allreduce_enqueued = value


def _nothing(*args: Any) -> None:
    pass


@contextmanager
def kept_still(model: Any, total: Tensor) -> Iterator[Still]:
    """Keep FSDP2's parameters whole until all that was recorded with them has been read; then free them as it would."""
    still = Still(model, total)
    frees = [group for group in still.groups if group.reshard_after_backward]
    try:
        for group in frees:
            group.reshard_after_backward = False
        yield still
    finally:
        for group in frees:
            group.reshard_after_backward = True
            group.reshard()


def _nodes(total: Tensor) -> Iterable[Any]:
    """All nodes of a graph."""
    seen: set[Any] = set()
    stack: list[Any] = [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [child for child, _ in node.next_functions]
