"""The extension of Griffe that hands every docstring over as Markdown."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import griffe

from book.markup import as_markdown

__all__ = ["AsMarkdown"]


class AsMarkdown(griffe.Extension):
    """Rewrites every docstring once it is known; those of classes once their constructors are."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Called for each function."""
        _rewrite(func)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Called for each attribute."""
        _rewrite(attr)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called for each class when all of its members are there."""
        init = cls.members.get("__init__")
        if init is not None and init.is_function and any("Unpack[" in str(p.annotation) for p in init.parameters):
            _spell_out(cls, init)
        _rewrite(cls)


def _spell_out(cls: Any, init: Any) -> None:
    """Put the keywords that a constructor's signature shows at run time in the place of its `**words`."""
    shown = inspect.signature(getattr(import_module(cls.module.path), cls.name)).parameters
    own = [p for p in init.parameters if p.kind is not griffe.ParameterKind.var_keyword]
    more = [
        griffe.Parameter(
            name, annotation=str(p.annotation), kind=griffe.ParameterKind.keyword_only, default=repr(p.default)
        )
        for name, p in shown.items()
        if name not in {p.name for p in own}
    ]
    init.parameters = griffe.Parameters(*own, *more)


def _rewrite(obj: Any) -> None:
    if obj.docstring is not None:
        obj.docstring.value = as_markdown(obj.docstring.value, _parameters(obj))


def _parameters(obj: Any) -> tuple[str, ...]:
    """The parameters of a function, or of a class's constructor."""
    function = obj
    if obj.is_class:
        function = obj.members.get("__init__")
        fields = tuple(name for name, m in obj.members.items() if getattr(m, "is_attribute", False) and name[:1] != "_")
        if function is None or not getattr(function, "is_function", False):
            return fields
    if not getattr(function, "is_function", False):
        return ()
    return tuple(p.name for p in function.parameters if p.name not in ("self", "cls"))
