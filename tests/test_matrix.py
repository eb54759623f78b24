"""The table test: every quantity on every model of the zoo, each cell exact, sampled, refused or n/a."""

from __future__ import annotations

import pytest
from quantity_checks import FROM_GRADIENTS, SLICED
from quantity_table import COLUMNS, Column, outcome
from scattered_checks import scattered_outcome
from support_page import PAGE, loss_cases, model_cases, render
from zoo import PROBLEMS, Case, cases
from zoo.scattered import MIXED, SCATTERED, Scattered

MODELS, LOSSES = model_cases(), loss_cases()
REST = [case for case in cases() if case not in MODELS and case not in LOSSES]
BY_COLUMN = pytest.mark.parametrize("column", COLUMNS.values(), ids=lambda column: column.name.replace(" ", "_"))


def by_case(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@BY_COLUMN
@by_case(MODELS)
def test_cell(case: Case, column: Column) -> None:
    assert outcome(case, column).kind in ("exact", "part", "sampled", "refused", "n/a")


@BY_COLUMN
@by_case([case for case in LOSSES if case not in MODELS])
def test_cell_of_a_loss(case: Case, column: Column) -> None:
    assert outcome(case, column).kind in ("exact", "part", "sampled", "refused", "n/a")


@pytest.mark.slow
@BY_COLUMN
@by_case(REST)
def test_cell_of_the_rest(case: Case, column: Column) -> None:
    assert outcome(case, column).kind in ("exact", "part", "sampled", "refused", "n/a")


# Programs whose samples lie scattered -----------------------------------------------------------

UNCHAINED = pytest.mark.parametrize(
    "column",
    [column for column in COLUMNS.values() if not column.chain],
    ids=lambda column: column.name.replace(" ", "_"),
)


def by_program(programs: list[Scattered]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", programs, ids=lambda program: program.id)


@UNCHAINED
@by_program(SCATTERED)
def test_cell_of_scattered_samples(program: Scattered, column: Column) -> None:
    assert scattered_outcome(program, column).kind in ("exact", "sampled", "refused", "n/a")


@UNCHAINED
@by_program(MIXED)
def test_cell_where_samples_are_mixed(program: Scattered, column: Column) -> None:
    cell = scattered_outcome(program, column)
    assert cell.kind == "refused" or not column.per_sample


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
