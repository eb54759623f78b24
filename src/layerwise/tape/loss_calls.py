"""The tape's record of losses: known calls, marked calls, and the tensors that the model's forward returned."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import cached_property
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules import module as _modules

from layerwise import losses, ops
from layerwise.ranks.trainers import unwrapped
from layerwise.tape.modes import LeavableMode
from layerwise.tape.origins import Origin
from layerwise.tape.recorded_call import Known, sort
from layerwise.tape.uses import Derived, LossUse, OwnUse, boundary_of, called_at, edge_of, place

__all__ = ["LossRecord"]

# A compiled module warns of hooks on all modules, which its own call, made eagerly here, does not disturb.
_OF_HOOKS = ("ignore", re.compile(r"Using `torch\.compile\(module\)` when there are global hook"), UserWarning, None, 0)


class _LogSoftmax(NamedTuple):
    """A recorded log-softmax: its output and its input, the logits."""

    output: weakref.ref[Tensor]
    logits: Tensor
    edge: GradientEdge
    dim: int | None


class _OwnHook:
    """A hook of one record, for its thread. A copy of the model that is made meanwhile has one that does nothing.

    Another thread may call it with fewer arguments, too: where it comes between two entries of torch's tables.
    """

    def __init__(self, note: Callable[..., None] | None = None) -> None:
        self._note, self._thread = note, get_ident()

    def __call__(self, *args: Any) -> None:
        if self._note is not None and get_ident() == self._thread:
            self._note(*args)

    def __reduce__(self) -> Any:
        return _OwnHook, ()


# Hooks by their number, and what torch keeps of some numbers.
_Tables = tuple[dict[int, Any], ...]
_PRE_HOOKS_ON_ALL: _Tables = (_modules._global_forward_pre_hooks,)
_HOOKS_ON_ALL: _Tables = (_modules._global_forward_hooks, _modules._global_forward_hooks_always_called)


def _tables_of(model: nn.Module) -> tuple[_Tables, _Tables]:
    """Those of a module's own hooks before and after its forward."""
    after = model._forward_hooks, model._forward_hooks_with_kwargs, model._forward_hooks_always_called
    return (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs), after


def _remove(hooks: Iterable[tuple[_Tables, Any]]) -> None:
    """Remove hooks, by themselves: an interrupt may have lost their handles, or come half-way before."""
    for (table, *others), own in hooks:
        for number in [number for number, hook in list(table.items()) if hook is own]:
            for other in others:
                other.pop(number, None)
            table.pop(number, None)


class _Parts:
    """The ids of a model's modules, without its own; found when they are first asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._root = weakref.ref(model), id(model)

    @cached_property
    def _ids(self) -> set[int]:
        model = self._model()
        return set() if model is None else set(map(id, model.modules()))

    def __contains__(self, part: int) -> bool:
        return part != self._root and part in self._ids


class LossRecord(LeavableMode):
    """The part of a tape that records losses.

    losses: the known calls. own: the marked ones. returned: the boundary of all other losses, the tensors that the
    model's forward returned, or where the user called others of its modules, in methods such as `encode`, those that
    these returned; recorded by global module hooks while the context is active; None without `own_losses`.
    entered: where the tensors come from that the model's forward was called with, those of each call.
    """

    calls: list[Any]
    _known: Known

    def __init__(self, model: Any, own_losses: bool) -> None:
        super().__init__()
        self._model = weakref.ref(model) if own_losses and isinstance(model, nn.Module) else None
        self._hooks: list[tuple[_Tables, Any]] = []  # with where they are registered
        self._filters: list[Any] = []
        self.returned: list[LossUse] | None = [] if own_losses else None

    def clear_losses(self) -> None:
        """Forget all losses."""
        self.losses: list[LossUse] = []
        self.own: list[OwnUse] = []
        self.returned = None if self.returned is None else []
        self._views: list[tuple[GradientEdge, Tensor]] = []  # returned views: their edges, and what they are views of
        self.entered: list[tuple[Origin, ...]] = []
        self._log_softmax: dict[int, _LogSoftmax] = {}

    def forget_losses(self, made: Iterable[LossUse]) -> None:
        """Forget some losses, or tensors of a boundary."""
        gone = set(map(id, made))
        self.losses = [loss for loss in self.losses if id(loss) not in gone]
        self.own = [own for own in self.own if not any(id(part) in gone for part in own.boundary)]
        if self.returned is not None:
            self.returned = [part for part in self.returned if id(part) not in gone]
            left = {part.logits[:2] for part in self.returned}
            self._views = [view for view in self._views if view[0][:2] in left]

    def watch(self) -> None:
        """Record from now on what the model, and each of its modules that is not called by another, returns."""
        model = None if self._model is None else unwrapped(self._model())  # DDP's own output may be a view of it
        if model is None or isinstance(model, torch.jit.ScriptModule):  # whose calls cannot be seen anyway
            return
        parts = _Parts(model)
        depth = inside = 0  # calls of its modules, one in another, and of the model itself

        def enter(module: nn.Module, args: Any) -> None:
            nonlocal depth
            depth += id(module) in parts

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal depth
            if id(module) not in parts:
                return
            depth -= 1
            if depth or out is None:  # None: of a call that failed
                return
            if torch._C._current_graph_task_id() != -1:  # a checkpoint that runs again in a backward pass
                return
            if next(module.parameters(), None) is not None:  # the others may be the loss itself
                self._returned((), out, hold=False)  # layers called one by one: values that nothing reads

        def see_all() -> None:
            _modules.register_module_forward_pre_hook(entered)
            _modules.register_module_forward_hook(left, always_call=True)

        def model_called(*_: Any) -> None:
            nonlocal inside
            if not inside:  # what the model itself calls is no result of its own
                _remove(on_all)
            inside += 1

        def model_returned(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            nonlocal inside
            if inside:
                inside -= 1
                if not inside and self._hooks:
                    see_all()
            if out is not None:
                self._returned((args, kwargs), out)

        # hooks on all modules are not told keyword arguments
        called, returned = _OwnHook(model_called), _OwnHook(model_returned)
        entered, left = _OwnHook(enter), _OwnHook(leave)
        on_all = [(_PRE_HOOKS_ON_ALL, entered), (_HOOKS_ON_ALL, left)]
        before, after = _tables_of(model)
        self._hooks = [(before, called), (after, returned), *on_all]
        model.register_forward_pre_hook(called, with_kwargs=True)
        model.register_forward_hook(returned, with_kwargs=True, always_call=True)
        see_all()
        # inserted without `warnings.filterwarnings`, which would make torch and others warn anew of what they have said
        self._filters = warnings.filters  # type: ignore[assignment]
        self._filters.insert(0, _OF_HOOKS)

    def unwatch(self) -> None:
        """Remove the hooks."""
        _remove(self._hooks)
        self._hooks = []
        if _OF_HOOKS in self._filters:
            self._filters.remove(_OF_HOOKS)
        self._filters = []

    def _note_data(self, func: Any, args: Any, kwargs: Any, data: list[Tensor], out: Any) -> None:
        raise NotImplementedError

    def _use(self, func: Any, args: Any, kwargs: Any, used: list[Derived], data: list[Tensor]) -> Any:
        raise NotImplementedError

    def _made_from(self, tensor: Tensor) -> tuple[Tensor, Origin]:
        raise NotImplementedError

    def _log_softmax_call(self, func: Any, args: Any, kwargs: Any, logits: Tensor) -> Any:
        """Run a log-softmax and record its input, the logits of a loss of log-probabilities."""
        edge = edge_of(logits)
        out = func(*args, **kwargs)
        self.calls.append(func)
        self._note_data(func, args, kwargs, [logits], out)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        self._log_softmax[id(out)] = _LogSoftmax(weakref.ref(out), logits.detach(), edge, dim)
        return out

    def _loss(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record a call that makes a loss."""
        if type(func) is losses.OwnLoss:
            return self._own_loss(func, args, kwargs)
        logits, target = losses.sides_of(func, args, kwargs)
        if not (isinstance(logits, Tensor) and logits.requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        used, data, _ = sort(self._known, self.calls, args, kwargs)
        if data and used:
            args, kwargs = self._learned(args, kwargs, logits, used)
            used, data, _ = sort(self._known, self.calls, args, kwargs)
        source = self._log_softmax.get(id(logits))
        if source is not None and source.output() is logits:
            call = losses.bind(func, args, kwargs, source.logits, source.dim)
            edge = source.edge if call.log_softmax else edge_of(logits)
        else:
            call, edge = losses.bind(func, args, kwargs), edge_of(logits)
        call = call.recorded(place(called_at()))
        losses.check(call)
        out = func(*args, **kwargs)
        self.calls.append(func)
        if data:
            self._note_data(func, args, kwargs, data, out)
        if out.requires_grad:
            rows = next((x for x in data if x is target and not x.requires_grad), None)
            origin = None if rows is None else (self._made_from(rows)[1], rows.shape)
            self.losses.append(LossUse(call, edge, edge_of(out), origin))
        return out

    def _learned(self, args: Any, kwargs: Any, logits: Tensor, used: list[Derived]) -> tuple[Any, Any]:
        """The arguments with learned targets or variances broadcast to the logits, by a recorded call of its own."""
        learned = {id(d.tensor): d for d in used if d.tensor is not logits and d.tensor.dim() in (0, logits.dim())}
        if not learned:
            return args, kwargs
        like = logits.detach()
        self._note_data(Tensor.detach, (logits,), {}, [logits], like)

        def broadcast(t: Tensor) -> Tensor:
            d = learned.get(id(t))
            fits = d is not None and all(a in (1, b) for a, b in zip(t.shape, like.shape, strict=bool(t.dim())))
            return self._use(Tensor.expand_as, (t, like), {}, [d], [like]) if fits and d is not None else t

        return ops.replace(args, broadcast), ops.replace(kwargs, broadcast)

    def _own_loss(self, func: losses.OwnLoss, args: Any, kwargs: Any) -> Any:
        """Run and record a call that the user marked as a loss."""
        z = args[0] if args else next(iter(kwargs.values()), None)
        parts = boundary_of(func.__name__, z, func.reduction) if torch.is_grad_enabled() else []
        data = [x for x in losses.tensors_in((args, kwargs)) if x.requires_grad]
        out = func(*args, **kwargs)
        self.calls.append(func)
        if data:
            self._note_data(func, args, kwargs, data, out)
        if isinstance(out, Tensor) and out.requires_grad and parts:
            call = losses.OwnCall(func.__name__, parts[0].call.logits, func.reduction, place=place(called_at()))
            self.own.append(OwnUse(call, parts, edge_of(out)))
        return out

    def _is_input(self, x: Tensor) -> bool:
        """Whether a tensor that requires grad is differentiated by in the loss, and no parameter."""
        return x.is_leaf and id(x) not in self._known

    def _returned(self, given: Any, out: Any, hold: bool = True) -> None:
        """Record the tensors that the model's forward was called with, and those that a module returned."""
        with torch._C.DisableTorchFunction():  # else the tape would take what is asked here for readers of the output
            own = (x for x in losses.tensors_in(given) if not x.requires_grad or self._is_input(x))
            self.entered.append(tuple(self._made_from(x)[1] for x in own if x.dim()))
            if self.returned is None or not torch.is_grad_enabled():
                return
            self.returned += [part for part in boundary_of("the loss", out, hold=hold) if part.call.logits.dim()]
            views = [z for z in losses.tensors_in(out) if z.requires_grad and z._base is not None and z._base.grad_fn]
            self._views += [(edge_of(z), z._base) for z in views if z._base is not None]

    def before_write(self, target: Tensor) -> None:
        """Where a write ends the edge of a returned view, the boundary is the whole tensor that it is a view of."""
        base = target if target._base is None else target._base
        for edge, whole in [view for view in self._views if view[1] is base]:
            new = boundary_of("the loss", whole)
            assert self.returned is not None
            self.returned = [part for old in self.returned for part in (new if old.logits[:2] == edge[:2] else [old])]
        self._views = [view for view in self._views if view[1] is not base]
