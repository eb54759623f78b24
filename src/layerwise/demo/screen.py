"""Progress of the demo: live bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .train import Row

__all__ = ["show_table", "watched"]


def watched(rows: Iterable[Row], methods: Sequence[str], epochs: int, console: Console) -> Iterator[Row]:
    """Yield `rows` unchanged, and show the progress of each method."""
    return _bars(rows, methods, epochs, console) if console.is_terminal else _lines(rows, methods, epochs, console)


def _text(row: Row) -> str:
    if row.error or row.train_loss is None:
        return f"[red]failed[/]: {escape(row.error or '')}"
    return f"train {row.train_loss:7.3f}  test {row.test_loss:7.3f}  {row.seconds:5.1f} s"


def _bars(rows: Iterable[Row], methods: Sequence[str], epochs: int, console: Console) -> Iterator[Row]:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {method: progress.add_task(method, total=epochs, text="") for method in methods}
        for row in rows:
            progress.update(tasks[row.method], completed=row.epoch, text=_text(row))
            yield row


def _lines(rows: Iterable[Row], methods: Sequence[str], epochs: int, console: Console) -> Iterator[Row]:
    every = max(1, epochs // 5)
    for row in rows:
        if row.error or (row.epoch and row.epoch % every == 0):
            console.print(
                f"epoch {row.epoch:>4}/{epochs}  {row.method:<14}  {_text(row)}",
                soft_wrap=True,
                highlight=False,
            )
        yield row


def show_table(lines: Sequence[tuple[str, ...]], console: Console) -> None:
    """Print the final table, numbers right-aligned."""
    first, *others = lines
    table = Table()
    for column, name in enumerate(first):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for line in others:
        table.add_row(*line)
    console.print(table)
