"""What ranks say to each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import ranks

from layerwise.errors import BadInput
from layerwise.ranks.group import Ranks


def talk(rank: int) -> dict[str, Any]:
    all_ = Ranks()
    mine = [torch.full((2, 3), float(rank + 1)), torch.tensor(rank + 1), torch.full((2,), 10.0 * (rank + 1))]
    sums = all_.sum(mine)
    theirs = [torch.full((3,), float(rank)), torch.tensor(rank)]
    all_.send_from(1, theirs)
    return {
        "who": (all_.rank, all_.size),
        "gathered": all_.gather({"rank": rank}),
        "sums": [t.tolist() for t in sums],
        "sent": [t.tolist() for t in theirs],
        "any": (all_.any(rank == 1), all_.any(False)),
        "alone": Ranks.alone().gather(rank),
    }


def test_ranks_talk() -> None:
    for rank, found in enumerate(ranks(2)(talk)):
        assert found == {
            "who": (rank, 2),
            "gathered": [{"rank": 0}, {"rank": 1}],
            "sums": [[[3.0] * 3] * 2, 3, [30.0, 30.0]],
            "sent": [[1.0] * 3, 1],
            "any": (True, False),
            "alone": [rank],
        }


def disagree(rank: int) -> str:
    Ranks().agree({"weight": (2, 3), "lr": 0.1})
    try:
        Ranks().agree({"weight": (2, 3 + rank), "lr": 0.1})
    except BadInput as error:
        return str(error)
    return ""


def test_ranks_that_disagree_are_refused_by_name() -> None:
    for said in ranks(2)(disagree):
        assert "'weight'" in said and "(2, 3)" in said and "rank 1: (2, 4)" in said


def test_one_process_needs_no_group() -> None:
    alone = Ranks()
    t = torch.ones(2)
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.gather(3) == [3]
    assert alone.sum([t])[0] is t
    assert alone.any(True) and not alone.any(False)
    alone.agree({"x": 1})
    assert (Ranks.alone().rank, Ranks.alone().size, Ranks.alone().gather(3)) == (0, 1, [3])
    with pytest.raises(BadInput, match="not initialized"):
        Ranks(group=object())
