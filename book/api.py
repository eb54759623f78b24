"""The pages of the API: every public name, from `__all__` of the public modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import FunctionType, ModuleType

__all__ = ["PAGES", "STATIC", "names", "pages", "values"]

PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "layerwise": ("Quantities and operators", ("layerwise",)),
    "optim": ("Optimizers", ("layerwise.optim",)),
    "local": ("Local problems", ("layerwise.local",)),
    "attribution": ("Data attribution", ("layerwise.attribution",)),
    "monitor": ("Monitor", ("layerwise.monitor",)),
    "distributed": ("Several processes", ("layerwise.distributed",)),
    "nn": ("Activations without a derivative", ("layerwise.nn",)),
    "operators": ("Operators", ("layerwise.operators",)),
    "errors": ("Errors", ("layerwise.errors",)),
    "ops": ("Describing operations", ("layerwise.ops",)),
    "compat": (
        "Other libraries' names",
        (
            "layerwise.compat.backpack",
            "layerwise.compat.backpack.extensions",
            "layerwise.compat.laplace",
            "layerwise.compat.lightning",
            "layerwise.compat.transformers",
        ),
    ),
}
STATIC = {  # modules that need another library: their names are read, not imported
    "layerwise.compat.laplace": ("LayerwiseGGN", "LayerwiseEF", "LayerwiseHessian"),
    "layerwise.compat.lightning": ("MonitorCallback", "StepCallback"),
    "layerwise.compat.transformers": ("StepCallback",),
}

CHOSEN = {  # of a module of the library's own, what a user's code needs
    "layerwise.ops": ("register", "bind", "Call", "ElementwiseSlot", "Entry", "Form", "Rows", "Samples", "Slot"),
}


def names(module: str) -> dict[str, str]:
    """The public classes and functions of a module: name to the dotted path of where each is written."""
    if module in STATIC:
        return {name: f"{module}.{name}" for name in STATIC[module]}
    loaded = import_module(module)
    public = sorted(
        set(CHOSEN.get(module, loaded.__all__)) - set(values(module)), key=lambda n: (not n[:1].islower(), n.lower())
    )
    found = {name: getattr(loaded, name) for name in public if not isinstance(getattr(loaded, name), ModuleType)}
    return {name: f"{value.__module__}.{value.__qualname__}" for name, value in found.items()}


def values(module: str) -> list[str]:
    """The public names of a module that are values of one of its classes, such as transfer functions."""
    if module in STATIC:
        return []
    loaded = import_module(module)
    return [
        name
        for name in sorted(CHOSEN.get(module, loaded.__all__))
        if not isinstance(getattr(loaded, name), type | FunctionType | ModuleType)
    ]


def pages() -> Iterator[tuple[str, str]]:
    """`(path in docs/, Markdown)` of every page. What two modules have in common stands on one page."""
    at = {path: page for page in ("layerwise", "operators", "optim") for path in names(PAGES[page][1][0]).values()}
    at |= {path: "layerwise" for path in names("layerwise").values() if at[path] != "optim"}
    for page, (title, modules) in PAGES.items():
        parts = [f"# {title}"]
        for module in modules:
            if len(modules) > 1:
                parts.append(f"## `{module}`")
            else:
                parts += [f"`import {module}{' as lw' if module == 'layerwise' else ''}`"]
                parts += [inspect.getdoc(import_module(module)) or ""]
            own = names(module)
            if elsewhere := [f"[`{n}`]({at[p]}.md#{p})" for n, p in own.items() if at.get(p, page) != page]:
                parts.append(f"Also here: {', '.join(elsewhere)}.")
            parts += [f"::: {path}" for path in own.values() if at.get(path, page) == page]
            if found := values(module):
                parts += ["### Values", _kinds(module, found)]
        yield f"api/{page}.md", "\n\n".join(parts) + "\n"


def _kinds(module: str, found: list[str]) -> str:
    """The values by the class that they are of."""
    loaded = import_module(module)
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(type(getattr(loaded, name)).__name__, []).append(f"`{name}`")
    return "\n".join(f"- of `{kind}`: {', '.join(of)}" for kind, of in kinds.items())
