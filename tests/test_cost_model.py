"""The cost model of a step over ranks: its parts against brute force, its limits against what they must be."""

from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.distributed import _cost_model as cost

NET = [(784, 1000), (1000, 500), (500, 250), (250, 30), (30, 250)]
FREE = {"wait": 0.0, "bytes a second": math.inf}
RATES = dict.fromkeys(cost.OPERATIONS, 1e-9)


def seconds(*parts: str) -> float:
    return sum(RATES[part] * sum(cost.operations(part, NET, 100)) for part in parts)


def test_the_fit_finds_wait_and_bandwidth() -> None:
    sent = {n: 3e-4 + n / 2e9 for n in (4096, 65536, 2**20, 2**24)}
    assert cost.fitted(sent) == pytest.approx({"wait": 3e-4, "bytes a second": 2e9}, rel=1e-9)


def test_stages_are_cut_as_evenly_as_can_be() -> None:
    work = [5.0, 1.0, 4.0, 2.0, 2.0, 7.0, 1.0]
    for stages in range(1, 9):
        cuts = itertools.combinations(range(1, len(work)), min(stages, len(work)) - 1)
        best = min(
            max(sum(work[a:b]) for a, b in itertools.pairwise((0, *cut, len(work)))) for cut in cuts
        )  # fmt: skip
        assert cost.in_stages(work, stages) == pytest.approx(best, rel=1e-9)


def test_longest_first_shares_everything_out() -> None:
    owned = cost.owned([3.0, 1.0, 2.0, 2.0], 2)
    assert sorted(n for own in owned for n in own) == [0, 1, 2, 3]
    assert owned == [[0, 1], [2, 3]]


def test_one_rank_does_all_the_work() -> None:
    alone = {way: cost.predicted(way, 1, NET, 100, RATES, {"wait": 1.0, "bytes a second": 1.0}) for way in cost.WAYS}
    assert alone["layers"] == pytest.approx(seconds("rest", "solve"))
    assert alone["data"] == pytest.approx(
        seconds("run", "products") + seconds("factors") / 10 + seconds("inverses") / 100
    )
    assert alone["stages"] == pytest.approx(seconds("codes", "weights"))


def test_what_is_not_shared_is_the_floor() -> None:
    """With a free network: the forward and backward pass, the longest layer, the codes."""
    many = {way: cost.predicted(way, 1024, NET, 100, RATES, FREE) for way in cost.WAYS}
    longest = {part: RATES[part] * max(cost.operations(part, NET, 100)) for part in cost.OPERATIONS}
    assert many["layers"] == pytest.approx(seconds("rest") + longest["solve"])
    assert many["stages"] == pytest.approx(seconds("codes") + longest["weights"])
    shared = (seconds("run") + seconds("factors") / 10) / 1024
    assert many["data"] == pytest.approx(shared + longest["products"] + longest["inverses"] / 100)


def test_messages_cost_what_they_weigh() -> None:
    free = cost.predicted("data", 4, NET, 100, RATES, FREE)
    weights = sum(4.0 * (i * o + o) for i, o in NET)
    factors = sum(4.0 * (i * i + o * o) for i, o in NET)
    slow = cost.predicted("data", 4, NET, 100, RATES, {"wait": 0.0, "bytes a second": 1e6})
    # a sum takes 2·3/4 of the bytes, and the owners' updates go to four ranks in two rounds
    assert slow - free == pytest.approx((1.5 * weights + 2 * weights + 1.5 * factors / 10) / 1e6)


def test_worth_ends_where_doubling_gains_less_than_a_tenth() -> None:
    assert cost.worth({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.46, 16: 0.2}) == 4
    assert cost.worth({1: 1.0, 2: 0.5, 4: 0.25}) == 4
