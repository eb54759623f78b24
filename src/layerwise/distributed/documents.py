"""Conversion of a run (model, optimizer, random states) to a flat dict for storage, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.replay.state import put_random_states, random_states
from layerwise.tape.uses import named_parameters_of

__all__ = ["document", "flat", "nested", "put_into_model", "put_into_optimizer", "restore_random", "template"]

Model = nn.Module | Mapping[str, Tensor]
Sizes = Mapping[str, tuple[tuple[int, ...], torch.dtype] | None]  # by key: shape and dtype of a tensor; None: an object
_NOT_SETTINGS = ("params", "param_names")


def document(model: Model, optimizer: torch.optim.Optimizer | None, step: int, extra: Any, rank: int) -> dict[str, Any]:
    """This rank's part of a run as a nested dict."""
    content = {"step": step, "extra": (extra,), "model": _tensors(model), "random": {str(rank): _random()}}
    return content if optimizer is None else {**content, "optimizer": _by_name(optimizer, model)}


# Keys -------------------------------------------------------------------------------------------------------------


def flat(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flatten nested dicts and lists to one dict; the key of a leaf is its path, with the type of each step."""
    if isinstance(value, dict) and value and all(isinstance(key, (str, int)) for key in value):
        steps = [("k" if isinstance(key, int) else "s") + str(key) for key in value]
        parts = zip(steps, value.values(), strict=True)
    elif isinstance(value, list) and value:
        parts = zip([f"i{n}" for n in range(len(value))], value, strict=True)
    elif type(value) is Tensor and path[:1] != ("smodel",) and not value.is_contiguous():
        # stored with its strides' order: another memory layout would change the rounding of its products
        order = sorted(range(value.dim()), key=lambda d: -value.stride()[d])
        return {json.dumps((*path, "t" + ",".join(map(str, order)))): value.permute(order)}
    else:
        return {json.dumps(path): value}
    return {key: leaf for step, part in parts for key, leaf in flat(part, (*path, step)).items()}


def nested(leaves: Mapping[str, Any]) -> Any:
    """The inverse of `flat`."""
    if list(leaves) == ["[]"]:
        return leaves["[]"]
    groups: dict[str, dict[str, Any]] = {}
    for key, leaf in leaves.items():
        if key == "[]":  # a container that is empty on one rank only
            continue
        step, *rest = json.loads(key)
        groups.setdefault(step, {})[json.dumps(rest)] = leaf
    if all(step[0] == "t" for step in groups):
        ((step, part),) = groups.items()
        order = [int(d) for d in step[1:].split(",")]
        return nested(part).permute([order.index(d) for d in range(len(order))])
    if all(step[0] == "i" for step in groups):
        return [nested(groups[step]) for step in sorted(groups, key=lambda step: int(step[1:]))]
    return {int(step[1:]) if step[0] == "k" else step[1:]: nested(part) for step, part in groups.items()}


def template(sizes: Sizes, model: Model, names: Iterable[str]) -> dict[str, Any]:
    """The keys to read from a checkpoint, with empty tensors for them; without parameters that `names` lacks.

    Raises BadInput, by name, where the checkpoint lacks a tensor of the model or has it in another shape.
    """
    tensors, params = _tensors(model), named_parameters_of(model)
    ways = {key: [step[1:] for step in json.loads(key)] for key in sizes}
    settings = {way[2] for way in ways.values() if way[:2] == ["optimizer", "settings"]}
    stored = {way[1]: sizes[key] for key, way in ways.items() if way[0] == "model"}
    strangers = (settings | stored.keys()) - set(names) - tensors.keys()
    for name, t in tensors.items():
        if name not in stored:
            raise BadInput(f"the checkpoint has no {name!r}; it holds {', '.join(sorted(stored)[:5])}, ...")
        size = stored[name]
        if isinstance(t, Tensor) and (size is None or size[0] != tuple(t.shape)):
            raise BadInput(f"{name!r} has the shape {size and size[0]} in the checkpoint, and {tuple(t.shape)} here")
    wanted: dict[str, Any] = {}
    for key, way in ways.items():
        if any(step in strangers for step in way):
            continue
        size = sizes[key]
        like = tensors.get(way[1]) if way[0] == "model" else params.get(way[2]) if len(way) > 2 else None
        if size is None:
            wanted[key] = None
        elif isinstance(like, Tensor) and tuple(like.shape) == size[0]:
            wanted[key] = torch.empty_like(like.detach(), dtype=size[1])  # a shard where the parameter is one
        else:
            wanted[key] = torch.empty(size[0], dtype=size[1])
    return wanted


# Model and optimizer ----------------------------------------------------------------------------------------------


def _tensors(model: Model) -> dict[str, Any]:
    return dict(model.state_dict()) if isinstance(model, nn.Module) else {n: t.detach() for n, t in model.items()}


@torch.no_grad()
def put_into_model(model: Model, content: Mapping[str, Any]) -> None:
    """Overwrite a model's tensors with saved ones."""
    if isinstance(model, nn.Module):
        model.load_state_dict({name: content[name] for name in model.state_dict()})
    else:
        for name, t in model.items():
            t.copy_(content[name])


def _by_name(optimizer: torch.optim.Optimizer, model: Model) -> dict[str, Any]:
    """An optimizer's state and settings by parameter name, and the other entries of its `state_dict` unchanged."""
    saved, name_of = _with_names(optimizer, model)
    settings: dict[str, Any] = {}
    for group in saved["param_groups"]:
        own = {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        settings |= {name_of[number]: (own,) for number in group["params"]}
    others = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    return {
        "state": {name_of[number]: own for number, own in saved["state"].items()},
        "settings": settings,
        "others": others,
    }


def put_into_optimizer(optimizer: torch.optim.Optimizer, model: Model, content: Mapping[str, Any] | None) -> None:
    """Load an optimizer's saved state. Raises BadInput, by name, for missing parameters or conflicting settings."""
    if content is None:
        raise BadInput("the checkpoint was saved without an optimizer")
    saved, name_of = _with_names(optimizer, model)
    state, settings = content["state"] or {}, content["settings"]
    groups = []
    for group in saved["param_groups"]:
        names = [name_of[number] for number in group["params"]]
        missing = [name for name in names if name not in settings]
        if missing:
            raise BadInput(
                f"the checkpoint's optimizer did not have {', '.join(missing[:5])}; make the optimizer with the "
                "parameters that it had, load, and then call add_param_group"
            )
        own = settings[names[0]][0]
        different = [name for name in names if repr(settings[name][0]) != repr(own)]
        if different:
            raise BadInput(
                f"{names[0]} and {different[0]} are in one parameter group here, and had different settings; give "
                "each its own group"
            )
        groups.append({**group, **own})
    numbers = {name: number for number, name in name_of.items()}
    optimizer.load_state_dict({
        **(content["others"] or {}),
        "state": {numbers[name]: own for name, own in state.items() if name in numbers},
        "param_groups": groups,
    })  # fmt: skip


def _with_names(optimizer: torch.optim.Optimizer, model: Model) -> tuple[dict[str, Any], dict[int, str]]:
    """An optimizer's `state_dict`, this rank's part of it, and the parameter names for its parameter numbers."""
    saved: dict[str, Any] = getattr(optimizer, "local_state_dict", optimizer.state_dict)()
    names = {id(p): name for name, p in named_parameters_of(model).items()}
    name_of = {}
    for group, group_here in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for number, p in zip(group["params"], group_here["params"], strict=True):
            if id(p) not in names:
                raise BadInput("the optimizer holds a parameter that the model does not have")
            name_of[number] = names[id(p)]
    return saved, name_of


# Random numbers ---------------------------------------------------------------------------------------------------


def _generators() -> tuple[str, ...]:
    return ("python", "numpy", "torch", *(["device"] if torch.accelerator.is_available() else []))


def _random() -> tuple[dict[str, Any]]:
    return (random_states(_generators()),)


def restore_random(saved: Mapping[str, tuple[dict[str, Any]]], rank: int) -> None:
    """Restore this rank's random states; an additional rank gets those that all ranks shared, or keeps its own."""
    states = [saved[key][0] for key in sorted(saved, key=int)]
    if str(rank) in saved:
        state = saved[str(rank)][0]
    elif all(repr(one) == repr(states[0]) and torch.equal(one["torch"], states[0]["torch"]) for one in states):
        state = states[0]
    else:
        return
    put_random_states({kind: state[kind] for kind in _generators() if kind in state})
