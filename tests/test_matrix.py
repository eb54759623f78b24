"""The table test: every quantity on every model of the zoo, each cell exact, sampled, refused or n/a."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
from quantity_checks import FROM_GRADIENTS, SLICED
from quantity_table import COLUMNS, Cell, Column, outcome
from scattered_checks import scattered_outcome
from support_page import PAGE, loss_cases, model_cases, render
from zoo import PROBLEMS, Case, cases
from zoo.scattered import MIXED, SCATTERED, Scattered

MODELS, LOSSES = model_cases(), loss_cases()
REST = [case for case in cases() if case not in MODELS and case not in LOSSES]
UNCHAINED = [column for column in COLUMNS.values() if not column.chain]


def rows_of(table: Sequence[Any], name: str = "case") -> pytest.MarkDecorator:
    """One test for each row of the table: a test for each cell costs more time than the cell."""
    return pytest.mark.parametrize(name, table, ids=lambda row: row.id)


def check_row(cell: Callable[[Column], Cell], columns: Iterable[Column]) -> None:
    """Check all cells of a row, and say what is wrong with each."""
    wrong = {}
    for column in columns:
        try:
            found = cell(column)
            assert found.kind in ("exact", "part", "sampled", "refused", "n/a"), found
        except Exception as error:
            wrong[column.name] = f"{type(error).__name__}: {error}"
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


@rows_of(MODELS)
def test_cells(case: Case) -> None:
    check_row(partial(outcome, case), COLUMNS.values())


@rows_of([case for case in LOSSES if case not in MODELS])
def test_cells_of_a_loss(case: Case) -> None:
    check_row(partial(outcome, case), COLUMNS.values())


@pytest.mark.slow
@rows_of(REST)
def test_cells_of_the_rest(case: Case) -> None:
    check_row(partial(outcome, case), COLUMNS.values())


@rows_of(SCATTERED, "program")
def test_cells_of_scattered_samples(program: Scattered) -> None:
    check_row(partial(scattered_outcome, program), UNCHAINED)


@rows_of(MIXED, "program")
def test_cells_where_samples_are_mixed(program: Scattered) -> None:
    def cell(column: Column) -> Cell:
        found = scattered_outcome(program, column)
        assert found.kind == "refused" or not column.per_sample, found
        return found

    check_row(cell, UNCHAINED)


# The whole table --------------------------------------------------------------------------------


def test_the_table_is_wide_enough() -> None:
    assert len(MODELS) >= 24 and len({column.name.partition(" ")[0] for column in COLUMNS.values()}) >= 14
    assert PROBLEMS.keys() >= SLICED.keys() | FROM_GRADIENTS.keys()


def test_the_support_page_says_what_the_table_found(request: pytest.FixtureRequest) -> None:
    page = render(outcome, scattered_outcome)
    if request.config.getoption("--write-support"):
        PAGE.write_text(page, encoding="utf-8")
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert found == page, f"{PAGE.name} is not what the tests find: run `make support` and look at the difference"
