"""Keywords that stand for fields of values: `KFAC(joint=False)` is `KFAC(curvature=Curvature(joint=False))`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor

from layerwise.errors import BadInput

__all__ = ["Effects", "Keywords", "numbers_of", "of_numbers", "refuse_idle", "refuse_unknown"]

Init = TypeVar("Init", bound=Callable[..., None])

Effects = Mapping[str, tuple[bool, str]]
"""Of keywords that belong to one choice of several: whether a layer has that choice, and its name."""


@contextmanager
def numbers_of(owner: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Where settings are compared with numbers: raise BadInput, with those that are none, where that cannot be."""
    try:
        yield
    except TypeError as error:
        others = {k: v for k, v in settings.items() if k != "params" and not isinstance(v, int | float | Tensor)}
        raise BadInput(
            f"{owner} got a setting that is no number where it needs one ({error}), one of {others}; numbers that were "
            "read from YAML or a command line may be strings: float(...) makes them numbers"
        ) from error


def of_numbers(check: Callable[[Any, Mapping[str, Any]], None]) -> Callable[[Any, Mapping[str, Any]], None]:
    """Decorate an optimizer's check of the settings of a group, which compares them with numbers."""

    @wraps(check)
    def checked(optimizer: Any, group: Mapping[str, Any]) -> None:
        with numbers_of(type(optimizer).__name__, group):
            check(optimizer, group)

    return checked


class Keywords:
    """The values that a constructor takes, and the keywords for their fields.

    values: the class of each value, by the argument that takes it. renamed: fields whose keyword is not their name.
    """

    def __init__(self, values: Mapping[str, type], renamed: Mapping[str, str] | None = None) -> None:
        self._values = values
        self._fields = {  # keyword: the argument whose field it is, and the field
            (renamed or {}).get(field.name, field.name): (argument, field.name)
            for argument, made in values.items() for field in fields(made)
        }  # fmt: skip
        self.defaults = self.of({argument: made() for argument, made in values.items()})

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of values, by keyword."""
        return {word: getattr(values[argument], name) for word, (argument, name) in self._fields.items()}

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values by argument, given as such or by keywords, among other keywords; None where None is the default.

        Raises BadInput for a value beside a keyword for its field, and for a value of another class.
        """
        asked: dict[str, dict[str, Any]] = {argument: {} for argument in self._values}
        for word, (argument, name) in self._fields.items():
            if word in given and (given[word] is not None or self.defaults[word] is not None):
                asked[argument][name] = given[word]
                if given.get(argument) is not None:
                    raise BadInput(
                        f"{word}= is the field {name!r} of {argument}=, which is given too: give one of the two"
                    )
        found = {argument: given.get(argument) for argument in self._values}
        for argument, made in self._values.items():
            if found[argument] is None:
                words = {
                    word: given[word]
                    for word, (owner, _) in self._fields.items()
                    if owner == argument and word in given
                }
                with numbers_of(f"lw.optim.{made.__name__}", words):
                    found[argument] = made(**asked[argument])
        if not all(isinstance(found[argument], made) for argument, made in self._values.items()):
            takes = ", ".join(f"{word}= takes a lw.optim.{made.__name__}" for word, made in self._values.items())
            raise BadInput(f"{takes} (their fields are keywords, too); got {found}")
        return found

    def spelled_out(self, words: type, but: Iterable[str] = (), **defaults: Any) -> Callable[[Init], Init]:
        """Give a constructor with `**words` the signature of all its keywords, for `inspect.signature` and `help`.

        words: a TypedDict of them, some not to be shown. defaults: those that are not of fields.
        """
        known = dict.fromkeys(self._values) | self.defaults | defaults

        def spelled(init: Init) -> Init:
            signature = inspect.signature(init)
            own = [p.replace(default=self.defaults.get(p.name, p.default)) for p in signature.parameters.values()
                   if p.kind is not p.VAR_KEYWORD]  # fmt: skip
            more = [
                inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=known[n], annotation=hint.__forward_arg__)
                for n, hint in words.__annotations__.items() if n not in but
            ]  # fmt: skip
            init.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
            return init

        return spelled


def refuse_unknown(init: Callable[..., None], words: Iterable[str]) -> None:
    """Raise TypeError, as Python does, for keywords that a constructor does not show."""
    for word in words:
        if word not in inspect.signature(init).parameters:
            raise TypeError(f"{init.__qualname__}() got an unexpected keyword argument {word!r}")


def refuse_idle(given: Mapping[str, Any], effects: Effects, where: str = "") -> None:
    """Raise BadInput for a keyword that was given and changes nothing. where: in front of the keyword."""
    for word, (has_one, owner) in effects.items():
        if given.get(word) is not None and not has_one:
            raise BadInput(
                f"{where}{word}={given[word]!r} changes nothing here: it belongs to {owner}; leave it out, or ask for "
                "that"
            )
