"""The measured layouts of a model, and the keys under which they are remembered."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from layerwise.errors import LayerwiseError
from layerwise.graph.coverage import Graph
from layerwise.graph.walk import Node, by_node, children, inputs, nodes
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use, named_modules_of

__all__ = ["Memo", "Refused", "key_below", "key_of", "memo_of", "recalled", "remember"]

Refused = tuple[type[LayerwiseError], str]
Memo = dict[Any, Any]  # layouts, refusals, and the answers of decisions

# A cache of measurements, one entry per live model: nothing in it changes a result. The entry of a functional model
# lives as long as the model's first tensor; the other tensors are in the key.
_MEASURED: weakref.WeakKeyDictionary[nn.Module, Memo] = weakref.WeakKeyDictionary()
_FUNCTIONAL: MutableMapping[Tensor, Memo] = WeakTensorKeyDictionary()
_MEMO_LIMIT = 64


def remember(memo: Memo, key: Any, found: Any) -> None:
    """Enter what was found, None for a key that was seen; what was not asked for longest makes room."""
    if len(memo) >= _MEMO_LIMIT:
        del memo[next(iter(memo))]
    memo[key] = found


def recalled(memo: Memo, key: Any) -> Any:
    """What was found before."""
    if key in memo:
        memo[key] = memo.pop(key)
    return memo.get(key)


def memo_of(model: Any) -> Memo:
    """The cached measurements of a model."""
    if isinstance(model, nn.Module):
        return _MEASURED.setdefault(model, {})
    first = next(iter(model.values()), None) if isinstance(model, Mapping) else None
    return {} if first is None else _FUNCTIONAL.setdefault(first, {})


def key_of(tape: Tape, graph: Graph, model: Any, samples: Any) -> Any:
    """The cache key: all that a measurement depends on, other than values, whose influence `structural` rules out."""
    logits = tuple((loss.call.name, loss.call.logits.shape) for loss in graph.losses)
    wiring = _wiring([loss.logits for loss in graph.losses], graph.uses, graph.passed)
    called = tuple(origin.shape for origin in graph.entered)  # a constant is one that the model was not called with
    return samples, _state(model), logits, called, _named(graph.uses), tuple(tape.calls), wiring


def key_below(tape: Tape, model: Any, samples: Any, uses: Sequence[Use], front: Iterable[Use]) -> Any:
    """The same for the uses before the first choice of rows, from those of them that are nearest to the losses."""
    assert tape.choice is not None
    calls = tuple(tape.calls[: tape.choice.calls])
    return samples, _state(model), _named(uses), calls, _wiring([use.edge for use in front], uses)


def _state(model: Any) -> tuple[Any, ...]:
    """What of a model decides how it runs, other than values."""
    if isinstance(model, nn.Module):
        return tuple([m.training for _, m in named_modules_of(model)])
    if isinstance(model, Mapping):
        return tuple((name, WeakIdRef(p), p.shape, p.requires_grad) for name, p in model.items())
    return ()


def _named(uses: Sequence[Use]) -> tuple[Any, ...]:
    """The shape of the batch, and the uses' numbers."""
    return (uses[0].batch.shape if uses else None), *(use.index for use in uses)


def _wiring(roots: Sequence[Any], uses: Sequence[Use], passed: Iterable[Node] | None = None) -> tuple[Any, ...]:
    """Which autograd node feeds which, from some edges down through the uses; the sequence of calls leaves it open.

    passed: the nodes on the way, in the order of a walk that is the same for the same wiring.
    """
    below = inputs(by_node(uses))
    number = {node: i for i, node in enumerate(nodes(roots, below) if passed is None else passed)}
    found: list[Any] = [(number.get(edge[0]), edge[1]) for edge in roots]
    for node in number:
        found.append(node.name())
        for edge in children(node, below):
            found += number.get(edge[0]), edge[1]
    return tuple(found)
