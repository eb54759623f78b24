"""Maps parameter names to the tensors now in the model.

They are looked up again during a run, because FSDP2 and other trainers replace the tensor objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.autograd.graph import Node

from layerwise.errors import BadInput, UnsupportedCall
from layerwise.ranks.trainers import is_sharded, sharded_of
from layerwise.tape.uses import Derived, named_parameters_of

__all__ = [
    "Binding", "Leaves", "check_matched", "check_sharded", "check_whole", "chosen_names", "matches", "refuse_replaced",
]  # fmt: skip


class Binding:
    """The parameters of a model by name, looked up again where a call uses an unknown `nn.Parameter`.

    parameters: the followed tensors, as calls use them. owners: the tensors that an optimizer has and whose `.grad` is
    set: under FSDP2 the DTensors, of which the modules have whole copies while they run. frozen: not followed.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        named = named_parameters_of(model)
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else None
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self.frozen = {name: p for name, p in named.items() if not p.requires_grad}
        sharded = sharded_of(model)
        self.owners = {name: sharded.get(id(p), p) for name, p in self.parameters.items()}
        self._derived: dict[int, Derived] = {}
        self._foreign: dict[int, Tensor] = {}  # not the model's; kept, so that no other tensor takes their ids

    def derived(self) -> dict[int, Derived]:
        """The followed parameters by id, as tensors that depend on themselves."""
        if not self._derived:
            self._derived = {id(p): Derived(p, frozenset((name,))) for name, p in self.parameters.items()}
        return self._derived

    def _named(self) -> dict[str, Tensor]:
        model = None if self._model is None else self._model()
        return {} if model is None else named_parameters_of(model)

    def again(self, unknown: Sequence[Tensor], remember: bool) -> dict[str, Tensor]:
        """The parameters that replaced others of the model, by name; empty where none of `unknown` is among them.

        unknown: parameters that a call uses. remember: whether to note those that are not the model's, because the call
        computes with them: they may not become the model's later.
        """
        unknown = [p for p in unknown if id(p) not in self._foreign]
        named = self._named() if unknown else {}
        ids = set(map(id, named.values()))
        if remember:
            self._foreign |= {id(p): p for p in unknown if id(p) not in ids}
        if not any(id(p) in ids for p in unknown):
            return {}
        known = {id(p) for p in (*self.parameters.values(), *self.frozen.values())}
        return {name: p for name, p in named.items() if id(p) not in known and not is_sharded(p)}

    def check_names(self) -> None:
        """Refuse a parameter that was used before it became the model's, or that has taken the name of another."""
        bound = {id(p): name for name, p in self.parameters.items()}
        for name, p in self._named().items():
            if id(p) in self._foreign:
                raise BadInput(
                    f"parameter {name!r} was used before it was made the model's, so that call was not recorded; give "
                    "it to the model before the forward pass"
                )
            if bound.get(id(p), name) != name:
                raise BadInput(
                    f"parameter {name!r} was {bound[id(p)]!r} when the observation began; exchange parameters outside "
                    "of it"
                )

    def hidden(self) -> dict[int, str]:
        """The names of the parameters that replaced others and that no recorded call used, by id."""
        model = None if self._model is None else self._model()
        at = {id(owner): name for name, owner in self.owners.items()}
        found = {id(p): name for name, p in self._named().items() if p.requires_grad}
        return found | {whole: at[id(owner)] for whole, owner in sharded_of(model).items() if id(owner) in at}

    def turned(self, p: Tensor) -> str | None:
        """Follow a parameter that was frozen so far, or no longer one that was trained; its name, or None."""
        before = self.frozen if p.requires_grad else self.parameters
        name = next((name for name, one in before.items() if one is p), None)
        if name is not None:
            self.bind(name, p)
        return name

    def bind(self, name: str, p: Tensor) -> Tensor | None:
        """Bind a name to another parameter; returns the parameter that had the name before."""
        self._derived = {}
        old = self.parameters.pop(name, None)
        self.frozen.pop(name, None)
        if not p.requires_grad:
            self.owners.pop(name, None)
            self.frozen[name] = p
            return old
        self.parameters[name] = p
        if not is_sharded(self.owners.get(name)):
            self.owners[name] = p
        return old


class Leaves:
    """The names of the parameters at the leaves of an autograd graph."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._shown = {id(p): name for name, p in binding.parameters.items()}
        self._hidden: dict[int, str] | None = None  # looked up at the first unknown leaf

    def name(self, node: Node) -> str | None:
        """The name of the followed parameter whose gradient a node accumulates."""
        variable = getattr(node, "variable", None)
        name = self._shown.get(id(variable))
        if name is not None or type(variable) is not nn.Parameter:
            return name
        if self._hidden is None:
            self._hidden = self._binding.hidden()
        return self._hidden.get(id(variable))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a parameter's name, or the name of a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def check_matched(argument: str, patterns: Iterable[Any], names: Sequence[str]) -> None:
    """Raise BadInput for a pattern that no parameter's name matches. argument: the keyword that took the patterns."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise BadInput(f"{argument}: patterns are texts, names of parameters or modules; got {pattern!r}")
        if not any(matches(pattern, name) for name in names):
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise BadInput(
                f"{argument}: the pattern {pattern!r} matches no parameter by the whole of its name, or of that of a "
                f"module that holds it; they are {shown}"
            )


def chosen_names(argument: str, patterns: str | Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches, or all of them for None; raises BadInput as `check_matched`."""
    if patterns is None:
        return list(names)
    each = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not each:
        raise BadInput(f"{argument}: no pattern was given, which leaves no parameter; leave it out for all of them")
    try:
        return list(_matched(argument, each, tuple(names)))
    except TypeError:  # a pattern that is no text
        check_matched(argument, each, names)
        raise


@lru_cache(maxsize=64)  # each batch asks for the same
def _matched(argument: str, patterns: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    check_matched(argument, patterns, names)
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def check_sharded(owners: Mapping[str, Tensor]) -> None:
    """Refuse parameters of FSDP2, for tapes whose handler does not keep them whole."""
    for name, owner in owners.items():
        if is_sharded(owner):
            raise UnsupportedCall(
                f"parameter {name!r} is sharded by fully_shard, and its whole copy is freed after the forward pass; "
                "`observe` and `accumulate` follow such models, this does not: use a model that is not sharded, such "
                "as the module under DistributedDataParallel"
            )


def refuse_replaced(names: Sequence[str], since: str) -> NoReturn:
    """Refuse parameters that were replaced. since: what was done with the old ones, and what to do now."""
    raise BadInput(
        f"the tensors of {', '.join(names[:5])} are no longer the model's (a layer was replaced or parametrized, or "
        f"weights were loaded with assign=True) {since}"
    )


def check_whole(used: Derived) -> None:
    """Refuse a call that computes with a DTensor itself."""
    tensor: Any = used.tensor
    if type(tensor) is not nn.Parameter and is_sharded(tensor):
        name = next(iter(used.names))
        raise UnsupportedCall(
            f"a call uses the parameter {name!r} as a DTensor, {tuple(tensor.placements)}, so that one sample's values "
            "lie on several ranks (tensor parallelism); models under DistributedDataParallel or fully_shard are "
            "followed, where every rank runs whole layers on samples of its own"
        )
