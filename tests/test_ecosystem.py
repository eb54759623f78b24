"""Some hundred configurations of other packages, each against brute force; docs/ecosystem.md is written from it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ecosystem import prepare
from ecosystem.base import Configuration, double_throughout, installed

prepare()
if missing := installed("transformers", "peft"):
    pytest.skip(f"{missing} is not installed (requirements/ecosystem.txt)", allow_module_level=True)

from ecosystem.checks import COLUMNS, REL, Cell, Truth, outcome  # noqa: E402
from ecosystem.table import CONFIGURATIONS, PAGE, render  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@cache
def row(configuration: Configuration) -> dict[str, Cell]:
    """All cells of a configuration; the model has the same numbers whatever ran before."""
    torch.manual_seed(0)
    with double_throughout():
        truth = Truth(configuration.make())
        return {column: outcome(truth, column) for column in COLUMNS}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.id)
def test_exact_or_refused_with_a_type(configuration: Configuration) -> None:
    if absent := installed(*configuration.needs):
        pytest.skip(f"{absent} is not installed (requirements/ecosystem.txt)")
    assert all(cell.kind != "refused" or len(cell.why) > 60 for cell in row(configuration).values())


def test_the_page_says_what_was_found(request: pytest.FixtureRequest) -> None:
    if absent := installed(*(name for c in CONFIGURATIONS for name in c.needs)):
        pytest.skip(f"{absent} is not installed (requirements/ecosystem.txt)")
    page = render(_cell, REL)
    if request.config.getoption("--write-support"):
        PAGE.write_text(page, encoding="utf-8")
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert found == page, f"{PAGE.name} is not what the tests find: run with --write-support and look at the difference"


def _cell(configuration: Any, column: str) -> Cell:
    return row(configuration)[column]
