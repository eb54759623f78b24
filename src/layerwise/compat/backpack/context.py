"""The `backpack` context, which computes extensions in backward passes through extended models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.fx import GraphModule

from layerwise.compat.backpack.custom_module.branching import Branch, Parallel
from layerwise.compat.backpack.custom_module.reduce_tuple import ReduceTuple
from layerwise.compat.backpack.extensions.backprop_extension import BackpropExtension
from layerwise.compat.backpack.read_losses import read_losses
from layerwise.compat.backpack.read_tape import Joined, Record, active_modes, records_of, silenced
from layerwise.errors import BadInput, UncoveredUse, Undefined
from layerwise.observation.engine import Observation
from layerwise.observation.seen import Seen
from layerwise.tape.calls import BACKWARD, OPTIONS
from layerwise.tape.modes import LeavableMode
from layerwise.tape.pull import backward_arguments

__all__ = ["backpack"]

_NO_OPERATION = (
    nn.Sequential,
    Parallel,
    Branch,
    ReduceTuple,
    GraphModule,
)  # containers, for which the extension hook is not called


class backpack(LeavableMode):
    """Compute extensions in the backward passes that run inside the context.

        with backpack(BatchGrad(), DiagGGNExact()):
            loss.backward()
        model[0].weight.grad_batch

    The forward may run before or inside. Each backward pass overwrites the fields. `.grad` is the same as without.

    extension_hook: called with every extended module that ran, the loss first, once all fields are written.
    debug: print what runs. retain_graph: accepted without effect; use `backward(retain_graph=...)`.
    Of nested `backpack` contexts, only the innermost is active.
    Raises BadInput for anything but instances of extensions. In a backward pass: UncoveredUse (no extended module
    in the graph, or its forward ran under `disable()`), UnknownLoss, SamplesMixed, Undefined, NonFinite, BadInput;
    then no field is written and `.grad` is as before.
    """

    def __init__(
        self,
        *exts: BackpropExtension,
        extension_hook: Callable[[nn.Module], Any] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
    ) -> None:
        super().__init__()
        for ext in exts:
            if not isinstance(ext, BackpropExtension):
                hint = " (a class; make an instance)" if isinstance(ext, type) else ""
                raise BadInput(f"backpack expects instances of extensions such as BatchGrad(), got {ext!r}{hint}")
        self.exts = exts
        self.extension_hook = extension_hook
        self.debug = debug
        self.retain_graph = retain_graph
        self._outer: list[list[backpack]] = []
        self._inside = 0  # number of contexts entered inside this one

    @property
    def second_order(self) -> bool:
        """Whether a forward in this context must be recorded for double differentiation."""
        return any(ext.second_order for ext in self.exts)

    def __enter__(self) -> Self:
        outer = [mode for mode in active_modes() if isinstance(mode, backpack)]
        for context in outer:
            context._inside += 1
        self._outer.append(outer)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        for context in self._outer.pop():
            context._inside -= 1
        if not self._outer:  # else it was entered twice
            super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARD and not (self.ended or self._inside) and (self.exts or self.extension_hook is not None):
            return self._backward(func, args, kwargs)
        return func(*args, **kwargs)

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the user's backward pass with the extensions."""
        total, weight = backward_arguments(func, args, kwargs)
        if total.grad_fn is None:
            return func(*args, **kwargs)
        records = self._records(total)
        options = dict(zip(OPTIONS[func], args, strict=False)) | kwargs
        retain = options["retain_graph"] if options.get("retain_graph") is not None else options.get("create_graph")
        if any(ext.keeps_graph for ext in self.exts):
            options["retain_graph"] = True
        tape = Joined(records)
        tape.partial = options.get("inputs") is not None
        with silenced(records):
            out = self._observe(tape, records, total, weight, lambda: func(**options))
        self._call_hook(records)
        for record in records if not retain else ():
            record.free()
        return out

    def _records(self, total: Tensor) -> list[Record]:
        records = records_of(total)
        if self.exts and not any(record.uses or record.freed for record in records):
            raise UncoveredUse(
                "asked for extensions in a backward pass whose graph holds no extended module: extend the model (a "
                "compiled one as a whole) before its forward runs, run it outside of disable() and no_grad, and let it "
                "return tensors, tuples or dicts"
            )
        if any(record.freed for record in records):
            raise Undefined(
                "this backward pass runs a second time through a graph that the first one has freed; call "
                "backward(retain_graph=True) the first time"
            )
        return records

    def _observe(
        self, tape: Joined, records: Sequence[Record], total: Tensor, weight: Tensor | None, run: Callable[[], Any]
    ) -> Any:
        """Run the backward pass, then write the fields."""
        if not self.exts:
            return run()
        tape.with_losses(read_losses(total, tape.losses))
        quantities = [ext.quantity() for ext in self.exts]
        observation = Observation(_model(records, tape), quantities)
        seen = Seen(observation.restart())
        out = observation.run(tape, total, weight, run)
        for ext, quantity in zip(self.exts, quantities, strict=True):
            if self.debug:
                print(f"[DEBUG] Running extension {ext!r}")  # noqa: T201
            for name, value in seen[quantity].items():
                setattr(tape.parameters[name], ext.savefield, value)
        return out

    def _call_hook(self, records: Sequence[Record]) -> None:
        if self.extension_hook is None:
            return
        for record in reversed(records):
            for ref in reversed(record.modules):
                module = ref()
                if module is not None and not isinstance(module, _NO_OPERATION):
                    if self.debug:
                        print(f"[DEBUG] Running extension hook on {type(module).__name__}")  # noqa: T201
                    self.extension_hook(module)


def _model(records: Sequence[Record], tape: Joined) -> nn.Module | Mapping[str, Tensor]:
    """The extended module, if there is only one, otherwise the parameters: the key of cached sample layouts."""
    roots = [record.root() for record in records if record.uses]
    return roots[0] if len(roots) == 1 and roots[0] is not None else tape.parameters
