"""Which rank owns which piece of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["assigned"]

Key = TypeVar("Key")


def assigned(work: Mapping[Key, float], size: int, owners: Mapping[Key, int]) -> dict[Key, int]:
    """An owner among `size` ranks for each piece of work, by its cost: the longest first, to the least loaded rank.

    owners: of earlier pieces, who keep those that are still there.
    Source: Graham (1969), "Bounds on multiprocessing timing anomalies".
    """
    loads, found = [0.0] * size, {key: rank for key, rank in owners.items() if key in work}
    for key, rank in found.items():
        loads[rank] += work[key]
    for key in sorted((key for key in work if key not in found), key=lambda key: -work[key]):
        found[key] = rank = loads.index(min(loads))
        loads[rank] += work[key]
    return found
