"""Saved states of optimizers: what fits is decided of the whole state, before anything of it is taken over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.tensors import is_finite, wide_type

__all__ = [
    "Fit", "averaged_name", "by_name", "copied", "cut", "in_order", "is_average", "is_count", "is_number", "lacking",
    "like", "misfits", "non_finite", "of_local_optimizer", "present", "refuse", "stamped", "unlike",
]  # fmt: skip

_VERSION = 2
_SINCE_2 = ("optimizer", "version", "entries")  # states of releases 0.1 and 0.2, version 1, have none of them
_SHOWN = 5

Fit = Callable[[Mapping[str, Any]], list[str]]
"""The differences of a parameter's saved entries from those that an optimizer would make; none where they fit."""


def present(state: Any, kind: str, required: Sequence[str], since: Sequence[str] = ()) -> dict[str, Any]:
    """A saved state in the present version's form. since: the keys that states without a version may lack.

    Raises BadInput for the state of another optimizer, for a newer version, and for missing keys.
    """
    if not isinstance(state, Mapping):
        raise BadInput(f"the saved state of {kind} is a dict; got {type(state).__name__}")
    first = not any(key in state for key in _SINCE_2)
    named, version = state.get("optimizer", kind), state.get("version", 1 if first else _VERSION)
    if named != kind:
        raise BadInput(f"the saved state is that of {named}, and cannot be loaded into {kind}")
    if not isinstance(version, int) or not 1 <= version <= _VERSION:
        raise BadInput(
            f"the saved state of {kind} has version {version!r}, and this release reads 1 to {_VERSION}: "
            "load it with the release that wrote it, or a newer one"
        )
    wanted = [key for key in required if key not in since] if first else [*_SINCE_2, *required]
    if missing := [key for key in wanted if key not in state]:
        raise BadInput(
            f"the saved state lacks {', '.join(missing)}: it was cut, or is that of another optimizer than {kind}"
        )
    refuse(_unreadable(state), kind)
    return {**state, "version": _VERSION, "optimizer": kind}


def _unreadable(value: Any, way: str = "") -> Iterator[str]:
    """The tensors of a saved state that hold no numbers, or not one for each element. way: the keys to the value."""
    if isinstance(value, Tensor):
        if value.is_meta:
            yield f"{way} is on the meta device, which holds no numbers: load it with another map_location"
        elif value.layout is not torch.strided:
            yield f"{way} is of layout {value.layout}, and states are dense"
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _unreadable(held, f"{way} {key}".strip())
    elif isinstance(value, list | tuple):
        for number, held in enumerate(value):
            yield from _unreadable(held, f"{way} {number}".strip())


def stamped(saved: Mapping[str, Any], kind: str, held: Mapping[str, Any]) -> dict[str, Any]:
    """A saved form with the optimizer's name, the version, and the names of its entries. held: what it has, by name."""
    return {"optimizer": kind, "version": _VERSION, **saved, "entries": _entries(held)}


def _entries(held: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """The names of all that a saved state holds, `entries` in it: what was cut is then missed by name.

    Nested, so that what ranks save of one parameter comes together as their states do.
    """
    keys = {name: values if isinstance(values, Mapping) else ("whole",) for name, values in held.items()}
    return {name: dict.fromkeys(map(str, own), True) for name, own in keys.items() if own}


def cut(what: str, saved: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """The names of which a saved state has other entries than it was saved with; version 1 does not say.

    held: what there is, by name.
    """
    if "entries" not in saved:
        return []
    said, has, found = saved["entries"], _entries(held), []
    if not isinstance(said, Mapping) or not all(isinstance(own, Mapping) for own in said.values()):
        return [f"the entries by name are {said!r}, not names"]
    for name in dict.fromkeys((*said, *has)):
        then, now = said.get(name, {}), has.get(name, {})
        gone, more = [key for key in then if key not in now], [key for key in now if key not in then]
        if gone:
            found.append(
                f"the {what} of {name} lacks the entries {', '.join(gone)}, with which it was saved: it was cut"
            )
        if more:
            found.append(f"the {what} of {name} has the entries {', '.join(more)}, without which it was saved")
    return found


def by_name(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a saved form by parameter name in place of number."""
    names = {n: name for group in saved["param_groups"]
             for n, name in zip(group["params"], group["param_names"], strict=True)}  # fmt: skip
    return {names[number]: own for number, own in saved["state"].items()}


def refuse(differences: Iterable[str], kind: str) -> None:
    """Raise BadInput with the first differences, where there are any."""
    if found := list(differences):
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise BadInput(
            f"the saved state does not fit this {kind}, which was left as it is: {'; '.join(found[:_SHOWN])}{more}"
        )


def lacking(what: str, values: Mapping[str, Any], required: Iterable[str]) -> list[str]:
    """The difference that required keys are missing."""
    missing = sorted(set(required) - set(values))
    return [f"{what} lacks {', '.join(missing)}"] if missing else []


def unlike(what: str, values: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], bool]]) -> list[str]:
    """The required keys that are missing, or else the values that cannot be. kinds: what must hold of each."""
    bad = [key for key, holds in kinds.items() if key in values and not holds(values[key])]
    said = [f"{key} of {what} is {_said(values[key])}" for key in bad]
    return lacking(what, values, kinds) or said


def is_count(value: Any) -> bool:
    """Whether a saved value is a whole number of at least 0."""
    return isinstance(value, int) and is_number(value)


def is_number(value: Any) -> bool:
    """Whether a saved value is a finite number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _said(value: Any) -> str:
    return _form(value) if isinstance(value, Tensor | Mapping) else repr(value)


def non_finite(what: str, values: Mapping[str, Any]) -> list[str]:
    """The first number or tensor among values that holds NaN or infinity."""
    for key, value in values.items():
        tensor = torch.tensor(value) if isinstance(value, float) else value
        if isinstance(tensor, Tensor) and not (tensor.is_floating_point() <= is_finite(tensor)):
            return [f"{key} of {what} holds NaN or infinity"]
    return []


def averaged_name(key: str) -> str:
    """The parameter that a running average belongs to: of itself, or of its layer's " inputs" or " outputs"."""
    return key.removesuffix(" age").removesuffix(" inputs").removesuffix(" outputs")


def is_average(key: str, t: Any, p: Tensor | None) -> bool:
    """Whether a tensor may be the running average of a key: a parameter's, or second moments `[K,I,I]` or `[1,I]`.

    In the parameter's type, or float32 for one of half precision. Of " inputs age" it is the number of batches since
    they were measured.
    """
    if p is None or not isinstance(t, Tensor):
        return False
    if key.endswith(" inputs age"):
        return t.dim() == 0 and t.dtype == torch.int64 and int(t) > 0
    if t.dtype not in (p.dtype, wide_type(p.dtype)):
        return False
    if key == averaged_name(key):
        return t.shape == p.shape
    if t.dim() == 2:
        return t.shape[0] == 1 and t.shape[1] > 0 and p.numel() % t.shape[1] == 0
    square = t.dim() == 3 and t.shape[1] == t.shape[2] and len(t) > 0
    return square and any(i > 0 and p.numel() % (len(t) * i) == 0 for i in (t.shape[2], t.shape[2] - 1))


def misfits(name: str, saved: Any, fits: Sequence[Fit]) -> list[str]:
    """The differences of a parameter's saved entries from the nearest of several forms; a form that fits is enough."""
    if not isinstance(saved, Mapping):
        return [f"the state of {name} is a {type(saved).__name__}, not a dict"]
    if not saved:
        return []
    found = [fit(saved) for fit in fits]
    nearest = min(found, key=len, default=[])
    return [f"the state of {name} {text}" for text in nearest] or non_finite(name, saved) or _out_of_range(name, saved)


# What torch's optimizers and ours take the root of, or count.
_SQUARES = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "mean_square", "exp_inf"))
_COUNTS = frozenset(("step",))


def _out_of_range(name: str, saved: Mapping[str, Any]) -> list[str]:
    """The first entry with a value that its kind cannot have."""
    for key in (_SQUARES | _COUNTS) & saved.keys():
        value = saved[key]
        t = value if isinstance(value, Tensor) else torch.tensor(value) if isinstance(value, int | float) else None
        if t is None or t.is_complex():
            continue
        if bool((t < 0).any()) or (key in _COUNTS and bool((t != t.round()).any())):
            what = "is no count" if key in _COUNTS else "holds a negative number, and is of squares"
            return [f"{key} of {name} {what}"]
    return []


def like(entries: Mapping[str, Any]) -> Fit:
    """Whether saved entries have the keys, shapes and types of given ones (which may be on the meta device)."""

    def differences(saved: Mapping[str, Any]) -> list[str]:
        missing, foreign = sorted(set(entries) - set(saved)), sorted(set(saved) - set(entries))
        found = [f"lacks {', '.join(missing)}"] if missing else []
        found += [f"has {', '.join(foreign)}, which belongs to another optimizer"] if foreign else []
        for key in entries.keys() & saved.keys():
            said, wanted = _form(saved[key]), _form(entries[key])
            if said != wanted and entries[key] is not None:
                found.append(f"has {key} of {said}, and here it is {wanted}")
        return found

    return differences


def _form(value: Any) -> str:
    """Shape and type in words; the types of counters differ between devices and forms of an optimizer."""
    if isinstance(value, Tensor) and value.dim():
        return f"shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, Tensor) and not value.is_complex() and value.dtype is not torch.bool:
        return "a tensor of one number"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "one number"
    return type(value).__name__


def copied(state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The state of parameters in tensors of its own: torch's `load_state_dict` takes over those that it is given."""
    return {
        number: {key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                 for key, value in own.items()} for number, own in state.items()
    }  # fmt: skip


def of_local_optimizer(kind: Any, settings: Mapping[str, Any], p: Tensor) -> Iterator[Fit]:
    """The form of the state that a torch optimizer makes for a parameter in its first step.

    It is found by a step on the meta device, which costs no memory; an optimizer that reads values is tried on zeros.
    None for an optimizer that makes no step alone, whose state is not looked into.
    """
    for device in ("meta", p.device):
        probe = torch.zeros_like(p.detach(), device=device).requires_grad_()
        probe.grad = torch.zeros_like(probe)
        try:
            optimizer = kind([{"params": [probe]}], lr=0.0)
            optimizer.param_groups[0].update(settings)
            optimizer.step()
        except Exception:  # of a class of the user's
            continue
        yield like(dict(optimizer.state.get(probe, {})))
        return


def in_order(groups: Any, own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups with their parameters in the order of an optimizer's own. Raises BadInput where they do not fit."""
    if not isinstance(groups, list | tuple) or not all(map(_is_group, groups)):
        raise BadInput("the saved parameter groups are no list of dicts with lists of params, and of their param_names")
    if len(groups) != len(own):
        raise BadInput(f"the saved state has {len(groups)} parameter groups, and ours {len(own)}")
    ordered = []
    for number, (theirs, ours) in enumerate(zip(groups, own, strict=True)):
        ids = dict(zip(theirs.get("param_names", ours["param_names"]), theirs["params"], strict=False))
        wrong = sorted(set(ids) ^ set(ours["param_names"]))
        if wrong or len(theirs["params"]) != len(ours["params"]):
            raise BadInput(
                f"group {number} of the saved state holds {len(theirs['params'])} parameters and ours "
                f"{len(ours['params'])}; in one of them only: {', '.join(wrong[:5]) or 'none'}"
            )
        names = ours["param_names"]
        ordered.append({**theirs, "params": [ids[n] for n in names], "param_names": list(names)})
    return ordered


def _is_group(saved: Any) -> bool:
    """Whether a saved parameter group has lists of numbers of parameters, and of names where it has any."""
    lists = list | tuple
    return isinstance(saved, Mapping) and all(
        isinstance(held, lists) and all(isinstance(one, kind) for one in held)
        for held, kind in ((saved.get("params"), int), (saved.get("param_names", ()), str))
    )
