"""The tape: a record of every call of a parameter with data.

`Tape` is a `TorchFunctionMode` around the user's own forward. It changes no value (but for the rounding of composite
calls, attention and recurrent layers, which run as their parts) and writes nothing onto modules or parameters. With
`own_losses`, as under `observe`, torch's global module hooks record while the context is active what the model returns,
or those of its modules that the user calls one by one. No other hook is registered in the forward pass.

For each torch call that touches a parameter (or a tensor derived from parameters only) and some data, the tape keeps a
`Use`: the call with its data detached, and the gradient edge of its output, where cotangents can be read later.

Tensors are of four kinds. *Parameter*: the model's, requiring grad. *Derived*: computed from parameters and constants
only (`w.T`, a weight norm, LoRA's sum). *Constant*: buffers, frozen parameters, results of deterministic factories,
0-dim tensors that need no gradient. *Data*: everything else.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from layerwise import losses, ops
from layerwise.errors import UnsupportedCall
from layerwise.losses.gradient_scalers import SCALER_CALLS, ScalerCalls
from layerwise.nn.hard import crossed, hard
from layerwise.ops.base import Call
from layerwise.tape.activation_checkpoints import standing_in
from layerwise.tape.binding import Binding, Leaves, check_sharded, check_whole, refuse_replaced
from layerwise.tape.calls import BACKWARD, CASTS, CHOICE, DATA, FACTORIES, GATHER, GRADIENTS, LOG_SOFTMAX, OPTIONS
from layerwise.tape.gradient_calls import gradient_uses
from layerwise.tape.loss_calls import LossRecord
from layerwise.tape.origins import Origin, Origins
from layerwise.tape.pull import backward_arguments, silent
from layerwise.tape.recorded_call import (
    Known,
    Readable,
    classify,
    distinct,
    is_view,
    kept,
    note_readers,
    own_output,
    run,
    sort,
)
from layerwise.tape.uses import Derived, LossUse, Use, bad_call, describe_func, edge_of, named_buffers_of
from layerwise.tape.writes import Write, assembled, forget_written, preserve

__all__ = ["Tape"]

_SETS_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class FirstChoice(NamedTuple):
    """How many entries of the signature, and how many uses, were recorded before a choice."""

    calls: int
    uses: int


class Tape(LossRecord):
    """Record the parameter uses and the losses of everything that runs inside the context.

    model: its parameters that require grad are followed (frozen ones count as constants); names are looked up again
        during the run, see `Binding`. parameters: those, by name.
    on_backward: called as `on_backward(tape, total, weight, run)` instead of a backward pass that
        the user starts inside the context; it must call `run()`.
    keep_outputs: whether uses keep their outputs' values (local targets need them).
    own_losses: whether to record the tensors that the model returns, the boundary of losses without a known likelihood.
    crosses: whether functions without a derivative (`lw.nn.Hard`) pass on their surrogate gradients.
    whole: whether the handler keeps FSDP2's whole parameters in place while it reads the record.
    partial: whether the running backward pass was given `inputs`, and may leave out parts of the graph.
    ordinary: whether it is torch's own, into all leaves, without a graph of the gradients (`create_graph`) and outside
        of other modes, which would see another in its place. retain: its `retain_graph`.
    choice: where in the record an index or a mask first picked among activations; None where none did.
    spent: nodes of forgotten uses whose graph was retained, so that another backward pass may run through them.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        on_backward: Callable[[Tape, Tensor, Tensor | None, Callable[[], Any]], Any] | None = None,
        keep_outputs: bool = False,
        own_losses: bool = False,
        crosses: bool = False,
    ) -> None:
        super().__init__(model, own_losses)
        self._keep_outputs, self._crosses = keep_outputs, crosses
        self._binding = Binding(model)
        self.parameters = self._binding.parameters
        self._constants, self._on_backward = list(named_buffers_of(model).values()), on_backward
        self._stance: contextlib.AbstractContextManager[Any] | None = None
        self.whole, self.partial, self.ordinary = False, False, False
        self.retain: bool | None = None
        self.spent: set[Any] = set()
        self.clear()

    # -- life ---------------------------------------------------------------------------------------

    @property
    def owners(self) -> dict[str, Tensor]:
        """The tensors whose `.grad` receives the gradients: the parameters themselves, or FSDP2's DTensors."""
        return self._binding.owners

    def leaves(self) -> Leaves:
        """Looks up the names of the followed parameters at the leaves of a graph."""
        return Leaves(self._binding)

    def derives(self, name: str) -> bool:
        """Whether a call without data read a parameter."""
        return any(type(k) is Derived and name in k.names and not k.tensor.is_leaf for k in self._known.values())

    def close(self) -> None:
        """Forget the record and the handler of backward passes, whose owner may hold this tape: no cycle is left."""
        self._clear()
        self._on_backward = None

    def clear(self) -> None:
        """Forget everything recorded so far."""
        self._clear()
        self._known.update(self._binding.derived())
        self._known.update({id(c): c for c in (*self._binding.frozen.values(), *self._constants)})

    def _clear(self) -> None:
        self._recorded = 0
        self.uses: list[Use] = []
        self.clear_losses()
        self.calls: list[Any] = []
        self.scaler_calls = ScalerCalls()
        self.first: Tensor | None = None
        self._known: Known = {}
        self._outputs: dict[int, Readable] = {}
        self._origins = Origins()
        self._retained: list[weakref.ref[Tensor]] = []
        self.choice: FirstChoice | None = None

    def forget(self, uses: Iterable[Use], made: Iterable[LossUse]) -> None:
        """Forget the uses and losses of one backward pass; everything, where no other forward is left."""
        gone = set(map(id, uses))
        left = [use for use in self.uses if id(use) not in gone]
        if not left:
            self.clear()
            return
        self.uses = left
        self.forget_losses(made)
        self.first = left[0].batch
        self._outputs = {key: output for key, output in self._outputs.items() if id(output.use) not in gone}

    def __enter__(self) -> Tape:
        if not self.whole:
            check_sharded(self.owners)
        try:
            # A compiled model runs eagerly while it is recorded; nothing is compiled unless dynamo is loaded.
            if "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self.watch()
            super().__enter__()
            return self
        except BaseException as error:  # an interrupt, after which `with` does not call `__exit__`
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(self, *exc: Any) -> None:
        self.unwatch()
        if self._stance is not None:
            self._stance.__exit__(*exc)
            self._stance = None
        super().__exit__(*exc)  # at last: a mode that is active shows that its end was cut short

    # -- the mode -----------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # under torch.func tensors stand for others, and autograd is its own
        if self.ended or peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        if func is hard and self._crosses:
            func = crossed
        if func in BACKWARD and self._on_backward is not None:
            return self._backward(func, args, kwargs)
        if losses.is_loss(func):
            return self._loss(func, args, kwargs)
        if func in GRADIENTS:
            return self._gradients(func, args, kwargs)
        if func in losses.PROJECTED and torch.is_grad_enabled():
            return self._projected(func, args, kwargs)
        read = (args[:1], {}) if func in CASTS else (args, kwargs)
        used, data, tensors = sort(self._known, self.calls, *read)
        if data and torch.is_grad_enabled() and self._late(data):
            used, data, tensors = sort(self._known, self.calls, *read)
        asks = getattr(func, "__name__", "") == "__get__"  # for a property
        if used and data and torch.is_grad_enabled() and not asks:
            run = self._use if ops.decomposition(func) is None else self._decompose
            return run(func, args, kwargs, used, data)
        if func in LOG_SOFTMAX and data and data[0].requires_grad:
            return self._log_softmax_call(func, args, kwargs, data[0])
        writes = args and ops.writes_first(func)
        if writes and self._views and data and isinstance(args[0], Tensor):
            self.before_write(args[0])
        assembles = writes and used and torch.is_grad_enabled()
        if assembles:
            preserve(self.uses, args[0])
        out = func(*args, **kwargs)
        if assembles:
            assembled(self._known, args[0], frozenset().union(*(d.names for d in used)))
        if func in SCALER_CALLS:
            self.scaler_calls.note(func, args, out)
        if not isinstance(out, (Tensor, list, tuple)):
            if data and out is None and not asks:
                # a write reads, too
                note_readers(self._outputs, self.uses, func, args, kwargs, data, next(iter(args), None))
                self._note_data(func, args, kwargs, data, None)
                self._written(func, args)
            if tensors and func == _SETS_GRAD:
                self._frozen_or_trained(args[0])
            return out
        self.calls.append(func)
        if not data:
            if tensors or func not in DATA:
                classify(self._known, out, used)
            else:
                self._origins.made(func, out)
            if func is Tensor.requires_grad_:
                self._frozen_or_trained(args[0])
        elif func in FACTORIES:
            classify(self._known, out, [])
        else:
            self._note_data(func, args, kwargs, data, out)
            self._written(func, args)
        return out

    def _late(self, data: list[Tensor]) -> bool:
        """Bind the parameters among the data that replaced others of the model; whether there were any."""
        unknown = [t for t in data if type(t) is Parameter and t.requires_grad]
        new = self._binding.again(unknown, len(data) > 1) if unknown else {}
        for name, p in new.items():
            if any(name in d.names for use in self.uses for d in use.used):
                refuse_replaced([name], "since a call with the old one was recorded; run each forward and its backward "
                                "pass with the same parameters")  # fmt: skip
            old = self._binding.bind(name, p)
            self._known.pop(id(old), None)
            self._known[id(p)] = Derived(p, frozenset((name,))) if p.requires_grad else p
        return bool(new)

    def _written(self, func: Any, args: Any) -> None:
        """Where a call writes data onto a constant or a derived tensor, make it and all its views data."""
        # `nn.init` hands its tensor over by name, and calls again
        if args and ops.writes_first(func) and isinstance(args[0], Tensor):
            forget_written(self._known, args[0])

    def _note_data(self, func: Any, args: Any, kwargs: Any, data: list[Tensor], out: Any) -> None:
        """Note the calls that read a use's output, and the batch that each result was made from."""
        if self._outputs:
            note_readers(self._outputs, self.uses, func, args, kwargs, data, out)
        if func in GATHER and sum(d.requires_grad for d in data) > (func in CHOICE):
            self._note_places(args, kwargs)
        self._origins.note(func, args, kwargs, data, out)

    def _note_places(self, args: Any, kwargs: Any) -> None:
        """Enter the values of an index or a mask into the signature: they decide which elements are combined."""
        for arg in (*args, *kwargs.values()):
            for place in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(place, Tensor) and not place.is_floating_point():
                    place = place.detach().cpu().numpy()
                if hasattr(place, "tobytes"):  # an array of numpy's is an index, too
                    self.choice = self.choice or FirstChoice(len(self.calls), self._recorded)
                    self.calls.append(hash(place.tobytes()))

    @property
    def met(self) -> list[tuple[Origin, ...]]:
        """The tensors whose rows some call took together, one by one."""
        return list(self._origins.together.values())

    def _made_from(self, tensor: Tensor) -> tuple[Tensor, Origin]:
        return self._origins.of(tensor)

    def _use(self, func: Any, args: Any, kwargs: Any, used: list[Derived], data: list[Tensor]) -> Any:
        """Run and record a call of parameters with data."""
        self._refuse(ops.refused(func, args, kwargs), func, used)
        for d in used:
            check_whole(d)
        if used[0].tensor.is_meta != data[0].is_meta:  # torch runs some calls across these two
            raise bad_call(func, used, data)
        batch, origin = self._made_from(data[0])
        self.first = batch if self.first is None else self.first
        if not args or args[0] is not data[0] or func in GATHER:  # else all of it is noted
            self._note_data(func, args, kwargs, data, None)
        given = func, args, kwargs, data
        write = Write.of(self._known, func, args, used, data)
        func, args, used, data, target, _ = write
        if target is not None:
            preserve(self.uses, target)
        inputs = [edge_of(t) for t in data if t.requires_grad] or ()
        own_args, own_kwargs, used = distinct(self._known, args, kwargs, used)
        call_args, call_kwargs = kept(self._known, func, own_args, own_kwargs)
        out, result = run(func, args, kwargs, used, data)
        self.calls.append(func)
        if result is None:
            return out
        if out is result and is_view(result):
            out = result = own_output(func, result, (*data, *(d.tensor for d in used)))
        if ops.writes_first(func):
            forget_written(self._known, result if target is None else target)
        self._known.pop(id(result), None)
        if result.requires_grad:
            call = Call(func, call_args, call_kwargs, shape := result.shape)
            use = Use(self._recorded, call, used, inputs, result, batch, self._keep_outputs)
            use.made_from = origin
            rows = data[0].shape
            use.origin = None if data[0].requires_grad else (origin, origin.shape if origin.shape == rows else rows)
            self._origins.set(result, batch, origin)
            self._recorded += 1
            self.uses.append(use)
            if self._keep_outputs:
                note_readers(self._outputs, self.uses, *given, result)
                self._outputs[id(result)] = Readable(use)
            self.calls.append(shape)
        if target is not None:
            self._note_data(Tensor.copy_, (target, result), {}, [result], None)
            write.back(result)
            note_readers(self._outputs, self.uses, Tensor.copy_, (target, result), {}, [result], target)
            out = None if out is None else target
        return out

    def _decompose(self, func: Any, args: Any, kwargs: Any, used: list[Derived], data: list[Tensor]) -> Any:
        """Run a composite function as its parts under this mode, so that each part is recorded.

        Values and `.grad` are the composite's up to rounding.
        """
        self._refuse(ops.refused(func, args, kwargs), func, used)
        return standing_in(func, lambda *a, **kw: self._parts(ops.decomposition(func), a, kw), args, kwargs)

    def _projected(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a loss that holds the last layer in itself as the layer and the loss, under this mode."""
        return standing_in(func, lambda *a, **kw: self._parts(losses.PROJECTED[func], a, kw), args, kwargs)

    def _parts(self, parts: Any, args: Any, kwargs: Any) -> Any:
        TorchFunctionMode.__enter__(self)  # the mode alone: recording has begun already
        try:
            return parts(*args, **kwargs)
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def _refuse(self, reason: str | None, func: Any, used: list[Derived]) -> None:
        if reason is not None:
            names = sorted(set().union(*(d.names for d in used)))
            raise UnsupportedCall(f"{describe_func(func)} uses the parameters {', '.join(names)}: {reason}")

    def _gradients(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the user's own gradient calls, whose results are no data of the model."""
        if func is Tensor.retain_grad:
            self._retained.append(weakref.ref(args[0]))
        if func is Tensor.register_hook and len(args) > 1:
            args = (args[0], silent(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if func is torch.autograd.grad and torch.is_grad_enabled():
            self.uses += gradient_uses(out, self.uses, self._recorded, self.leaves())
            self._recorded += len(out)
            self.calls.append(func)
        return out

    def retained(self) -> list[Tensor]:
        """The live activations with `retain_grad`."""
        return [t for t in (ref() for ref in self._retained) if t is not None and not t.is_leaf]

    def _frozen_or_trained(self, p: Tensor) -> None:
        """Take a parameter that was just frozen for a constant, and one that is trained from now on for a parameter."""
        name = self._binding.turned(p)
        if name is not None:
            self._known[id(p)] = Derived(p, frozenset((name,))) if p.requires_grad else p

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Hand the user's backward pass to the handler."""
        total, weight = backward_arguments(func, args, kwargs)
        options = dict(zip(OPTIONS[func], args, strict=False)) | kwargs
        self.partial = options.get("inputs") is not None
        retain = self.retain = options.get("retain_graph")
        retain = options.get("create_graph") if retain is None else retain
        self.ordinary = not (self.partial or options.get("create_graph") or torch._C._len_torch_function_stack())
        nodes = [use.edge.node for use in self.uses] if retain else []
        assert self._on_backward is not None
        self._binding.check_names()
        out = self._on_backward(self, total, weight, lambda: func(*args, **kwargs))
        self.spent.update(nodes)
        self.spent.difference_update(use.edge.node for use in self.uses)
        return out
