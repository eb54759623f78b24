"""Cutting a chain of modules into pipeline stages, which keep the parameter names of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn

from layerwise.errors import BadInput

__all__ = ["Stage", "split"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Stage(nn.Module):
    """A sequence of modules that keep their (dotted) names in the whole model.

    parts: by name, in order: `{"features.0": nn.Conv2d(...), "features.1": nn.ReLU()}`.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._order = list(parts)
        for name, part in parts.items():
            *path, last = name.split(".")
            home: nn.Module = self
            for step in path:
                if step not in home._modules:
                    home.add_module(step, nn.Module())
                home = home.get_submodule(step)
            home.add_module(last, part)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last module."""
        for name in self._order:
            x = self.get_submodule(name)(x)
        return x


def split(model: nn.Sequential, stages: int, cuts: Sequence[str] | None = None) -> list[Stage]:
    """Cut a chain of modules into stages, which share the model's modules and names.

        stage = lw.distributed.split(model, world_size)[rank]
        del model  # frees the other stages' memory

    A stage ends right after a linear or convolution layer, whose output is sent to the next stage; the functions after
    that layer belong to the next stage. cuts: the names of the layers that end a stage, without the last stage; by
    default those for which the largest stage has the fewest parameters. Nested Sequential modules are flattened.
    Raises BadInput where the model is no chain, has too few layers, or has a parameter in two stages.
    """
    if not isinstance(model, nn.Sequential):
        raise BadInput(f"split cuts an nn.Sequential; got {type(model).__name__}: make Stages of its modules instead")
    parts = _flat(model, "")
    names = list(parts)
    allowed = [n for n, name in enumerate(names[:-1]) if isinstance(parts[name], _LAYERS)]
    if cuts is None:
        if not isinstance(stages, int) or not 1 <= stages <= len(allowed) + 1:
            raise BadInput(f"{len(allowed)} layers can end a stage: there are 1 to {len(allowed) + 1}; got {stages!r}")
        ends = _balanced([sum(p.numel() for p in parts[name].parameters()) for name in names], allowed, stages)
    else:
        wrong = [name for name in cuts if name not in [names[n] for n in allowed]]
        if wrong or len(cuts) != stages - 1 or len(set(cuts)) != len(cuts):
            raise BadInput(
                f"{stages} stages need {stages - 1} different cuts, after linear or convolution layers of the model "
                f"({', '.join(names[n] for n in allowed)}); got {list(cuts)}"
            )
        ends = sorted(names.index(name) for name in cuts)
    bounds = [0, *(n + 1 for n in ends), len(names)]
    made = [Stage({name: parts[name] for name in names[low:high]}) for low, high in pairwise(bounds)]
    homes: dict[int, int] = {}
    for number, stage in enumerate(made):
        for name, p in stage.named_parameters():
            if homes.setdefault(id(p), number) != number:
                raise BadInput(f"{name} is in stages {homes[id(p)]} and {number}: cut elsewhere, or untie it")
    return made


def _flat(model: nn.Sequential, before: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, part in model.named_children():
        found |= _flat(part, f"{before}{name}.") if type(part) is nn.Sequential else {before + name: part}
    if len(list(model.children())) != len(model):  # the same module twice
        raise BadInput("a module stands twice in the chain: split needs each at one place")
    return found


def _balanced(sizes: Sequence[int], allowed: Sequence[int], stages: int) -> list[int]:
    """The cuts that minimize the size of the largest stage, by dynamic programming over the allowed positions."""
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    best: dict[int, tuple[int, list[int]]] = {n: (total[n + 1], []) for n in (*allowed, len(sizes) - 1)}
    for _ in range(stages - 1):
        found: dict[int, tuple[int, list[int]]] = {}
        for end in best:
            ways = [(max(most, total[end + 1] - total[cut + 1]), [*ends, cut])
                    for cut, (most, ends) in best.items() if cut < end]  # fmt: skip
            if ways:
                found[end] = min(ways)
        best = found
    return best[len(sizes) - 1][1]
