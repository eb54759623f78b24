"""Torch's wrappers for training on several processes, DDP and FSDP2, kept from acting on vector-Jacobian products.

DDP averages `.grad` from hooks on the gradient accumulators, which the library's own vector-Jacobian products never
reach; DDP's output may pass an autograd node that starts an iteration's reduction. FSDP2 (`fully_shard`) keeps each
parameter as a DTensor, puts whole parameters into the modules while they run, and frees them by autograd nodes and
hooks. Both act on any backward pass through the graph, so they are paused while those products are computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "GraphTrainers",
    "Placements",
    "is_sharded",
    "placements_of",
    "several",
    "sharded_of",
    "started",
    "unreduced",
    "unwrapped",
    "whole_parameters",
]

Placements = Mapping[str, Tensor]  # parameters as DTensors


def several() -> bool:
    """Whether torch.distributed runs with more than one process."""
    return started() and dist.get_world_size() > 1


def started() -> bool:
    """Whether torch.distributed runs, so that trainers may act on backward passes."""
    return dist.is_available() and dist.is_initialized()


def unwrapped(model: Any) -> Any:
    """The module that `DistributedDataParallel` runs, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def unreduced(model: Any) -> AbstractContextManager[None]:
    """Keep a DDP module from reducing the gradients of backward passes inside the context."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # imported wherever a DTensor exists
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
    """The DTensor of each whole parameter that FSDP2 has made so far, by the id of the whole parameter."""
    return {
        id(p._unsharded_param): p.sharded_param
        for group in _groups(model)
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }


def placements_of(owners: Mapping[str, Tensor]) -> Placements:
    """The parameters that are DTensors, by name."""
    return {name: p for name, p in owners.items() if type(p) is not nn.Parameter and is_sharded(p)}


# -- one graph ----------------------------------------------------------------------------------------------


class GraphTrainers:
    """FSDP2's groups and DDP modules (of static graphs) that act on one autograd graph.

    nodes: of the graph; read only where several processes run.
    """

    def __init__(self, model: Any, nodes: Iterable[Node]) -> None:
        found: list[Any] = list(nodes) if started() else []
        own = {id(group): group for group in _groups(model)}
        for node in found:
            if node.name() == "RegisterPostBackwardFunctionBackward":
                own.setdefault(id(node.param_group), node.param_group)
        self.groups = list(own.values())
        sinks = [node.ddp_weakref() for node in found if node.name() == "_DDPSinkBackward"]
        self._sinks = [ddp for ddp in sinks if ddp is not None and ddp.static_graph]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes inside the context start no reduction and free no parameter."""
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
def whole_parameters(model: Any, nodes: Iterable[Node]) -> Iterator[GraphTrainers]:
    """Keep FSDP2's parameters whole inside the context, and reshard them at its end, as FSDP2 would have done.

    nodes: of the autograd graph of the backward pass that runs inside.
    """
    trainers = GraphTrainers(model, nodes)
    frees = [group for group in trainers.groups if group.reshard_after_backward]
    try:
        for group in frees:
            group.reshard_after_backward = False
        yield trainers
    finally:
        for group in frees:
            group.reshard_after_backward = True
            group.reshard()
