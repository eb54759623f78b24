"""The settings of parameter groups, looked at again only where they have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["GroupSettings"]

Settings = Mapping[str, Any]
_NAMES = frozenset(("params", "param_names"))
_FIXED = frozenset((bool, int, float, str, type(None), tuple))  # types of values that do not change in place


class GroupSettings:
    """The settings of each group at the last step; the same object as long as they stay as they were."""

    def __init__(self) -> None:
        self._known: dict[int, Settings] = {}

    def changed(self, groups: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The groups with other settings than at the last step, with their numbers; noted once all are looked at.

        A value that may change in place (a tensor, say) counts as another one at every step.
        """
        found: dict[int, Settings] = {}
        for number, group in enumerate(groups):
            now, before = _settings(group), self._known.get(id(group))
            if before == now:
                now = before
            else:
                yield number, group
            found[id(group)] = now
        self._known = found

    def of(self, group: Mapping[str, Any]) -> Settings:
        """The settings of a group, as they were when the groups were looked at."""
        return self._known[id(group)]


def _settings(group: Mapping[str, Any]) -> Settings:
    return {
        key: value if type(value) in _FIXED else tuple(value) if type(value) is list else object()
        for key, value in group.items()
        if key not in _NAMES
    }
