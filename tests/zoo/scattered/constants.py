"""Kind 1: a tensor without samples meets the first parameter."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from ..parts import Apply, leaf
from .program import Batch, Scattered, draw, labels, register

__all__ = ["CONSTANTS"]

CONSTANTS: list[Scattered] = []
program = register(CONSTANTS, 1)

T, WORDS = 6, 7


def _tokens(n: int):
    """`[n, T]` tokens with a label for each."""

    def batch(gen: Generator) -> Batch:
        x = torch.randint(WORDS, (n, T), generator=gen)
        return Batch(x=x, y=labels(gen, n * T), number=torch.arange(n).repeat_interleave(T), n=n)

    return batch


def _sequences(gen: Generator) -> Batch:
    """Four sequences of five rows with a label each."""
    return Batch(x=draw(gen, 4, 5, 4), y=labels(gen, 4), number=torch.arange(4), n=4)


def _tables() -> dict[str, nn.Module]:
    return {"place": nn.Embedding(T, 4), "token": nn.Embedding(WORDS, 4), "head": nn.Linear(4, 3)}


def _flat(m: nn.Module, position: Tensor, x: Tensor) -> Tensor:
    return m.head((m.place(position) + m.token(x)).tanh()).flatten(0, 1)


def _buffered(shape: tuple[int, ...]):
    """The regular form: the positions are a buffer."""
    return lambda: Apply(lambda m, x: _flat(m, m.position, x), **_tables(), position=torch.arange(T).view(shape))


def _loss(m: nn.Module, b: Batch) -> Tensor:
    return torch.nn.functional.cross_entropy(m(b.x), b.y)


@program(_tokens(4), regular=_loss, regular_make=_buffered((1, T)))
def attribute_first():
    """Positions `[1,T]` are a plain attribute."""
    m = Apply(lambda m, x: _flat(m, m.position, x), **_tables())
    m.position = torch.arange(T)[None]
    return m


@program(_tokens(4), regular=_loss, regular_make=_buffered((T,)))
def flat_attribute_first():
    """Positions `[T]` are a plain attribute."""
    m = Apply(lambda m, x: _flat(m, m.position, x), **_tables())
    m.position = torch.arange(T)
    return m


@program(
    _tokens(4),
    lambda m, b: m(b.x, position_ids=torch.arange(T)[None]),
    regular=_loss, regular_make=_buffered((1, T)),
)  # fmt: skip
def position_ids():
    """Positions are an argument by keyword."""
    return Apply(lambda m, x, position_ids: _flat(m, position_ids, x), **_tables())


@program(_tokens(4), lambda m, b: m(torch.arange(T), b.x), regular=_loss, regular_make=_buffered((T,)))
def argument_first():
    """Positions are the first argument, the batch is the second."""
    return Apply(lambda m, position, x: _flat(m, position, x), **_tables())


@program(_tokens(4), regular=_loss, regular_make=_buffered((T,)))
def closure_first():
    """Positions are a closure's tensor."""
    position = torch.arange(T)
    return Apply(lambda m, x: _flat(m, position, x), **_tables())


@program(_tokens(T), regular=_loss, regular_make=_buffered((T,)))
def as_many_positions_as_samples():
    """A plain attribute of T positions, and T samples."""
    m = Apply(lambda m, x: _flat(m, m.position, x), **_tables())
    m.position = torch.arange(T)
    return m


@program(_sequences)
def soft_prompts():
    """Prompts from a table, looked up by a dictionary of indices, in front of every sequence."""

    def forward(m, x):
        prompt = m.prompt(m.tasks["first"])
        rows = torch.cat([prompt.expand(len(x), -1, -1), m.inner(x)], 1).tanh()
        return m.head(rows.mean(1))

    m = Apply(forward, prompt=nn.Embedding(4, 4), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))
    m.tasks = {"first": torch.tensor([0, 2]), "second": torch.tensor([1, 3])}
    return m


@program(_sequences)
def prompt_through_an_mlp():
    """A prompt made by two layers from a table, and multiplied into every row."""

    def forward(m, x):
        prompt = m.up(m.down(m.table(m.ids)).tanh())  # [2,4]
        rows = torch.cat([prompt.expand(len(x), -1, -1), m.inner(x)], 1).tanh()
        return m.head(rows.mean(1))

    m = Apply(
        forward, table=nn.Embedding(2, 3), down=nn.Linear(3, 3), up=nn.Linear(3, 4), inner=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )  # fmt: skip
    m.ids = torch.arange(2)
    return m


@program(_sequences)
def table_by_a_constant_index():
    """A bare learned table read at the rows that a plain attribute names."""
    m = Apply(
        lambda m, x: m.head((m.inner(x) + m.table[m.index]).tanh().mean(1)),
        table=leaf(7, 4), inner=nn.Linear(4, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    m.index = torch.tensor([3, 0, 6, 2, 0])
    return m


@program(_sequences)
def keys_of_constant_features():
    """Every row attends to constant features, which go through a layer of their own first."""

    def forward(m, x):
        key, value = m.key(m.features), m.value(m.features)
        return m.head(((m.query(x) @ key.T).softmax(-1) @ value).mean(1))

    m = Apply(forward, key=nn.Linear(2, 3), value=nn.Linear(2, 4), query=nn.Linear(4, 3), head=nn.Linear(4, 3))
    m.features = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    return m
