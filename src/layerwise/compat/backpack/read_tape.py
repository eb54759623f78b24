"""Recordings of extended models: made by module hooks in the forward, owned by the graph, found from the loss.

BackPACK's users may run the forward anywhere, and enter a context only for the backward pass. So `extend` hooks a
model, and a tape is active while the outermost extended module runs. The module's outputs then pass through an identity
node of the autograd graph, the only owner of the record. The record does not refer to this node, so both are freed with
the graph, whether or not a backward pass runs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only

from layerwise.errors import BadInput
from layerwise.graph.products import SecondOrder
from layerwise.graph.walk import nodes
from layerwise.tape.modes import LeavableMode
from layerwise.tape.origins import Origin
from layerwise.tape.pull import silent
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Derived, LossUse, Use

__all__ = ["Joined", "Record", "active_modes", "below_marks", "disable", "extend", "records_of", "silenced"]


def active_modes() -> list[Any]:
    """This thread's function modes that have not ended, the innermost last."""
    return [mode for mode in torch.overrides._get_current_function_mode_stack() if not getattr(mode, "ended", False)]


class disable(LeavableMode):
    """Context in which extended models record nothing, for plain gradients without overhead.

    A backward pass inside `backpack(...)` from a forward that ran here raises UncoveredUse.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    @staticmethod
    def should_store_io() -> bool:
        """Whether extended models record here."""
        return not any(isinstance(mode, disable) for mode in active_modes())


class Record(Tape):
    """What one call of an extended module recorded.

    root: that module. modules: weak references to all extended modules that ran, in call order.
    freed: whether a backward pass has freed the graph.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.root = weakref.ref(root)
        self.modules: list[weakref.ref[nn.Module]] = []
        self.freed = False
        self._open: list[nn.Module] = []
        self._outputs_given: list[weakref.ref[Tensor]] = []
        self._second: SecondOrder | None = None

    def enter(self, module: nn.Module) -> None:
        """A module's forward begins."""
        self._open.append(module)
        self.modules.append(weakref.ref(module))

    def leave(self, module: nn.Module) -> bool:
        """A module's forward ends; returns whether it was the outermost."""
        if self._open and self._open[-1] is module:
            self._open.pop()
        return not self._open

    def start(self, second_order: bool) -> None:
        """Start recording; second_order: record a graph that can be differentiated twice."""
        self.__enter__()
        if second_order:
            self._second = SecondOrder()
            self._second.__enter__()

    def stop(self) -> None:
        """Stop recording."""
        if self._second is not None:
            self._second.__exit__(None, None, None)
            self._second = None
        self.__exit__(None, None, None)

    def given(self, output: Any) -> Any:
        """The output through an identity node that owns this record from now on."""

        def mark(t: Tensor) -> Tensor:
            if not t.requires_grad:
                return t
            marked = _Mark.apply(t, self)
            self._outputs_given.append(weakref.ref(marked))
            return marked

        return tree_map_only(Tensor, mark, output) if self.uses or self.losses else output

    def retained(self) -> list[Tensor]:
        """The live activations with `retain_grad()`, outputs included."""
        return super().retained() + [t for t in self.outputs() if t.retains_grad]

    def outputs(self) -> list[Tensor]:
        """The module's outputs that are still alive."""
        return [t for t in (ref() for ref in self._outputs_given) if t is not None]

    def free(self) -> None:
        """Free everything recorded, since the graph has been freed."""
        self.clear()
        self.freed = True


class _Mark(torch.autograd.Function):
    """The identity; its node in the graph owns a record."""

    @staticmethod
    def forward(x: Tensor, record: Record) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layerwise_record = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


# -- hooks ----------------------------------------------------------------------------------------------------


def extend(module: nn.Module, debug: bool = False, use_converter: bool = False) -> nn.Module:
    """Hook a module and all its children, so that their forward is recorded; returns the module.

    use_converter: has no effect, since modules written in torch calls need no conversion.
    A module may be extended again, copied and pickled. Raises BadInput for anything but a module.
    """
    if not isinstance(module, nn.Module):
        raise BadInput(f"extend takes an nn.Module, got {type(module).__name__}")
    for part in module.modules():
        if _before not in part._forward_pre_hooks.values():
            if debug:
                print(f"[DEBUG] Extending {type(part).__name__}")  # noqa: T201
            part.register_forward_pre_hook(_before)
            part.register_forward_hook(_after, always_call=True)
    return module


def _before(module: nn.Module, args: Any) -> None:
    """Start a record, unless one is in progress or recording is disabled."""
    record = _recording()
    if record is None:
        if not _wanted():
            return
        record = Record(module)
        record.start(any(getattr(mode, "second_order", False) for mode in active_modes()))
    record.enter(module)


def _after(module: nn.Module, args: Any, output: Any) -> Any:
    """Stop the record when its outermost module ends, also by an exception (then there is no output)."""
    record = _recording()
    if record is None or not record.leave(module):
        return None
    record.stop()
    return None if output is None else record.given(output)


def _recording() -> Record | None:
    """The record in progress in this thread, or None."""
    if torch.compiler.is_compiling():
        return None
    return next((mode for mode in reversed(active_modes()) if isinstance(mode, Record)), None)


def _wanted() -> bool:
    """Whether a forward that starts here should be recorded."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and disable.should_store_io()
        and torch._C._current_graph_task_id() == -1  # not a checkpoint's recomputation inside a backward pass
        and torch._C._functorch.peek_interpreter_stack() is None
    )


# -- from the loss back to the records ------------------------------------------------------------------------


def record_at(node: Any) -> Record | None:
    """The record that a node of the graph owns, or None."""
    found = getattr(node, "layerwise_record", None)
    return found if isinstance(found, Record) else None


def records_of(total: Tensor) -> list[Record]:
    """The records that nodes of a tensor's graph own, in the order of creation."""
    found: dict[int, tuple[int, Record]] = {}
    for node in nodes([(total.grad_fn, 0)]):
        record = record_at(node)
        if record is not None:
            found.setdefault(id(record), (node._sequence_nr(), record))
    return [record for _, record in sorted(found.values(), key=lambda pair: pair[0])]


def below_marks(edge: GradientEdge) -> GradientEdge:
    """The edge below the identity nodes, from which a VJP runs no user hooks on a model's output."""
    while record_at(edge.node) is not None:
        child, number = edge.node.next_functions[0]
        assert child is not None
        edge = GradientEdge(child, number)
    return edge


@contextmanager
def silenced(records: Sequence[Record]) -> Iterator[None]:
    """Context in which vector-Jacobian products do not run user hooks on the models' outputs."""
    tables = [t._backward_hooks for record in records for t in record.outputs() if t._backward_hooks]
    before = [dict(table) for table in tables]
    for table in tables:
        table.update({key: silent(hook) for key, hook in table.items()})
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.update({key: hook for key, hook in hooks.items() if key in table})


class Joined(Tape):
    """Several records of one graph as a single tape, with unique parameter names and one order of uses."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        names: dict[int, str] = {}
        parameters: dict[str, Tensor] = {}
        for number, record in enumerate(records):
            for name, p in record.parameters.items():
                if id(p) not in names:
                    names[id(p)] = name if name not in parameters else f"{name} (of module {number + 1})"
                    parameters[names[id(p)]] = p
        super().__init__(parameters)
        self.uses = [_renamed(use, record, names) for record in records for use in record.uses]
        for index, use in enumerate(self.uses):
            use.index = index
        made = [loss for record in records for loss in record.losses]
        self.losses = [loss._replace(logits=below_marks(loss.logits)) for loss in made]
        self.calls = [call for record in records for call in record.calls]

    @property
    def met(self) -> list[tuple[Origin, ...]]:
        """What all layers read, as if one call had: in BackPACK a sample has the same place in each forward pass."""
        return [tuple(use.origin[0] for use in self.uses if use.origin is not None)]

    def retained(self) -> list[Tensor]:
        """The live activations with `retain_grad()`."""
        return [t for record in self._records for t in record.retained()]

    def with_losses(self, losses: Sequence[LossUse]) -> None:
        """Add losses that were recognized on the graph."""
        self.losses = [*self.losses, *(loss._replace(logits=below_marks(loss.logits)) for loss in losses)]


def _renamed(use: Use, record: Record, names: dict[int, str]) -> Use:
    """A copy of a use with the parameter names of the joined tape."""
    used = copy.copy(use)
    new = {name: names[id(p)] for name, p in record.parameters.items()}
    used.used = [Derived(d.tensor, frozenset(new[name] for name in d.names)) for d in use.used]
    return used
