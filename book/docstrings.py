"""The extension of Griffe that hands every docstring over as Markdown."""

from __future__ import annotations

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
        _rewrite(cls)


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
