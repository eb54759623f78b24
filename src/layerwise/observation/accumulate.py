"""`accumulate`: quantities of a whole data set, streamed over its batches."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily

from layerwise.errors import BadInput
from layerwise.observation.backward_pass import PassSettings
from layerwise.observation.engine import Observation
from layerwise.observation.guards import check_finite
from layerwise.observation.results import Results
from layerwise.observation.seen import Seen
from layerwise.quantities.base import Quantity
from layerwise.ranks.group import Ranks, check_same_model
from layerwise.ranks.trainers import placements_of, unreduced, unwrapped
from layerwise.replay.state import RandomState
from layerwise.tape.binding import Binding, chosen_names

__all__ = ["accumulate", "batch_loss", "shown"]

SaidSamples = int | Callable[[Any], int | Tensor] | None  # of every batch, or of each; None: as a batch says

_END = object()


def accumulate(
    model: nn.Module | Mapping[str, Tensor],
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *quantities: Quantity,
    samples: SaidSamples = None,
    scale: str = "loss",
    dtype: torch.dtype | None = None,
    progress: bool = False,
    distributed: bool = True,
    group: Any = None,
    parameters: str | Sequence[str] | None = None,
) -> Seen:
    """Quantities of the loss of a whole data set, from one pass over its batches; from two for `EKFAC`.

        seen = accumulate(model, F.cross_entropy, loader, Variance(), KFAC())
        seen.variance["conv1.weight"], seen.grad["conv1.weight"]

    The result is that of one `observe` over the whole set as one batch, up to rounding: a mean runs over all
    samples, whatever the sizes of the batches, so loss_fn divides by no number of batches. `.grad` of all parameters
    is afterwards what it was before, also after an error; modes (`eval`, `train`) and buffers are left to
    the model. The memory is that of one batch, the results and a gradient; per-sample results grow with the data set.

    loss_fn: of a module and batches `(x, y)` (a tuple or list of two), called as `loss_fn(model(x), y)`. For any
    other batch, and for a functional model, called as `loss_fn(batch)`: it runs the model itself.
    samples, scale, dtype, parameters: as for `observe`; samples is the number in every batch, by default what the batch
    says, or a function of a batch that gives its number, or a tensor with the sample number of each loss term. The
    backward passes compute no gradient of parameters that are not asked for.
    distributed: where torch.distributed was started, every rank of `group` (None: all) calls this with a loader of its
    own share, and gets the results of all shares together, as `Seen.all_reduce` gives them. False: of its own alone.
    An error on one rank is one on all. DDP's hooks rest meanwhile; under FSDP2 all ranks need as many batches.
    progress: show a bar (with rich, where it is installed), or a line on standard error.
    A quantity that needs a result of the whole set first (`EKFAC`, its eigenbasis) takes two passes, which start from
    the same state of torch's random numbers; the loader must give the same batches twice, and the model runs twice.
    Raises BadInput (no batch, batches whose losses have no union, a loader that cannot give its batches twice, or ranks
    that disagree on the model or the quantities), RankFailed (an error on another rank), and what `observe` raises.
    """
    if group is not None and not distributed:
        raise BadInput("accumulate got distributed=False and a process group; leave one of them out")
    ranks = Ranks(group) if distributed else Ranks.alone()
    if ranks.size > 1:
        check_same_model(model, group)
    settings = PassSettings(None, scale, dtype, pooled=True, parameters=parameters, grad="rows")
    batches = lambda: iter(shown(loader) if progress else loader)  # noqa: E731
    one_pass = partial(_pass, model, loss_fn, batches, ranks, settings, samples)

    def run(asked: Sequence[Quantity], gradient: bool = True) -> Results:
        if ranks.size == 1:
            return one_pass(asked, gradient)
        waits = bool(placements_of(Binding(model).owners))  # the passes wait for other ranks themselves
        results = one_pass(asked, gradient) if waits else ranks.together(lambda: one_pass(asked, gradient))
        results.all_reduce(group)
        return results

    firsts = ranks.together(lambda: _firsts(quantities, loader))
    if all(first is None for first in firsts):
        return Seen(run(quantities))
    return Seen(_in_two_passes(run, quantities, firsts, ranks))


def _firsts(quantities: Sequence[Quantity], loader: Iterable[Any]) -> list[Quantity | None]:
    """What the quantities need in a pass before their own; raises BadInput for a loader that gives its batches once."""
    firsts = [q.first_pass() if isinstance(q, Quantity) else None for q in quantities]
    if isinstance(loader, Iterator) and any(first is not None for first in firsts):
        names = ", ".join(repr(q) for q, first in zip(quantities, firsts, strict=True) if first is not None)
        raise BadInput(
            f"asked to accumulate {names} over an iterator ({type(loader).__name__}), which gives its batches once; "
            "two passes need a list or a DataLoader (or ask for EKFAC(basis=...) with a basis of your own)"
        )
    return firsts


def _devices() -> list[torch.device]:
    """All devices of the accelerator, where torch has begun to use it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", lambda: True)():
        return []
    return [torch.device(accelerator.type, n) for n in range(torch.accelerator.device_count())]


def _in_two_passes(
    run: Callable[[Sequence[Quantity], bool], Results],
    quantities: Sequence[Quantity],
    firsts: Sequence[Quantity | None],
    ranks: Ranks,
) -> Results:
    """Two passes over the data: first what some quantities need of the whole set, then all quantities.

    firsts: what each quantity needs, or None.
    """
    before = [first for first in firsts if first is not None]
    own = [getattr(q.cotangent, "generator", None) for q in before]
    random = RandomState(_devices(), ("torch",), [g for g in own if g is not None])
    earlier = run(before, False)
    made = [earlier.result(i) for i in range(len(before))][::-1]
    count, old = earlier.count, earlier.batch.samples
    del earlier  # what the results were made from: factors are as large as their eigenvectors
    seconds = [q if first is None else q.second_pass(made.pop()) for q, first in zip(quantities, firsts, strict=True)]
    for second, first in zip(seconds, firsts, strict=True):
        if first is not None:
            second.broadcast(ranks)
    random.put_back()
    results = run(seconds, True)
    new = results.batch.samples
    if (results.count, new) != (count, old):
        raise BadInput(
            f"the loader gave {count} batches of {old} samples, then {results.count} of "
            f"{new}: the second pass must see the batches of the first"
        )
    results.asked = tuple(quantities)
    return results


def _pass(
    model: nn.Module | Mapping[str, Tensor],
    loss_fn: Callable[..., Tensor],
    start: Callable[[], Iterator[Any]],
    ranks: Ranks,
    settings: PassSettings,
    samples: SaidSamples,
    quantities: Sequence[Quantity],
    gradient: bool,
) -> Results:
    """One pass over the batches that `start` gives. gradient: whether somebody reads it, beside the quantities."""
    parameters = Binding(model).owners
    before = {name: p.grad for name, p in parameters.items()}
    count = 0
    try:
        observation = Observation(model, quantities, settings)
        with observation as results, unreduced(model):
            batches = start()
            in_step = ranks.size > 1 and bool(placements_of(parameters))
            if in_step:
                batches = _in_step(batches, ranks)
            while (batch := _next(batches)) is not _END:
                for p in parameters.values():
                    p.grad = None
                observation.say(_said(samples, batch))
                loss = batch_loss(unwrapped(model), loss_fn, batch)
                if in_step:
                    with _pop_mode_temporarily():
                        ranks.together(partial(check_finite, loss))
                if gradient or in_step or not loss.requires_grad:
                    _backward(loss, parameters, settings.parameters)
                else:
                    with _pop_mode_temporarily():
                        observation.send(loss)
                count += 1
    finally:
        for name, p in parameters.items():
            p.grad = before[name]
    if not count:
        raise BadInput(
            "asked to accumulate over a loader that gave no batch; an iterator can be used up: make a new one"
        )
    return results


def _in_step(batches: Iterator[Any], ranks: Ranks) -> Iterator[Any]:
    """The batches of ranks that must run together, since FSDP2 gathers parameters from all in every pass."""
    count = 0
    while True:
        batch = ranks.together(lambda: next(batches, _END))
        left = ranks.gather(batch is not _END)
        if not all(left):
            break
        yield batch
        count += 1
    if any(left):
        done = [str(rank) for rank, more in enumerate(left) if not more]
        raise BadInput(
            f"asked to accumulate over a model sharded by fully_shard, whose ranks run in step, but the loader of rank "
            f"{', '.join(done)} ended after {count} batches and others went on; give all ranks as many batches"
        )


def _next(batches: Iterator[Any]) -> Any:
    """The next batch, made outside the record: what a loader computes is data, however it comes about."""
    with _pop_mode_temporarily():
        return next(batches, _END)


def _said(samples: SaidSamples, batch: Any) -> int | Tensor | None:
    """What the user says of a batch's samples, made outside the record."""
    with _pop_mode_temporarily():
        return samples(batch) if callable(samples) else samples


def batch_loss(model: Any, loss_fn: Callable[..., Tensor], batch: Any) -> Tensor:
    """The loss of one batch, by the convention of `accumulate`; raises BadInput where it is not one number."""
    if isinstance(model, nn.Module) and isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        loss = loss_fn(model(x), y)
    else:
        loss = loss_fn(batch)
    if not isinstance(loss, Tensor) or loss.dim():
        seen = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BadInput(f"accumulate's loss_fn must return a loss of one number, got {seen}")
    return loss


def _backward(loss: Tensor, parameters: Mapping[str, Tensor], patterns: str | Sequence[str] | None) -> None:
    """The backward pass of a batch; where patterns choose parameters, no gradient of others is computed.

    parameters: the tensors whose `.grad` is set, by name. Sharded ones have gradients of whole copies, so all are sent.
    """
    if patterns is None or placements_of(parameters):
        loss.backward()
    else:
        loss.backward(inputs=[parameters[name] for name in chosen_names("parameters", patterns, list(parameters))])


def shown(loader: Iterable[Any], what: str = "accumulate") -> Iterator[Any]:
    """The batches, with a progress bar or line beside them that says what runs."""
    total = len(loader) if isinstance(loader, Sized) else None
    try:
        rich = importlib.import_module("rich.progress")
    except ImportError:
        yield from _lines(loader, what, total)
        return
    columns = rich.Progress.get_default_columns()
    with rich.Progress(*columns, rich.MofNCompleteColumn(), console=_console()) as bar:
        yield from bar.track(loader, total=total, description=what)


def _console() -> Any:
    return importlib.import_module("rich.console").Console(stderr=True)


def _lines(loader: Iterable[Any], what: str, total: int | None) -> Iterator[Any]:
    """One line on standard error, rewritten after every batch."""
    of = "" if total is None else f" of {total}"
    for done, batch in enumerate(loader, 1):
        yield batch
        sys.stderr.write(f"\r{what}: {done}{of} batches")
        sys.stderr.flush()
    sys.stderr.write("\n")
