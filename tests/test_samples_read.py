"""What the tensors seen say on N: evidence where there is some, and both numbers in the error where two hold."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.parts import Apply

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import PerSampleGrad


def _each(model: nn.Module, loss: Callable[[], Tensor], samples: int | Tensor | None = None) -> dict[str, Tensor]:
    with observe(model, PerSampleGrad(), samples=samples) as seen:
        loss().backward()
    return dict(seen.per_sample_grad)


def _as_many_kept_as_rows() -> tuple[nn.Module, Callable[[], Tensor], Tensor, Callable[[], Tensor]]:
    """Three rows of two tokens, a layer on three of them, and a loss of four: a term with no row of the batch."""
    first, chosen = torch.tensor([[1, 0], [1, 0], [1, 0]]).bool(), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool()
    x, y = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        out = x.new_zeros(3, 2, 3)
        out[first] = m.first(x[first])
        return m.head(out.tanh())[chosen]

    model = Apply(forward, first=nn.Linear(2, 3), head=nn.Linear(3, 2)).double()

    def terms() -> Tensor:
        each = ((model(x) - y) ** 2).sum(1)
        return torch.stack([each[:2].sum(), each[2], each[3]])

    return model, lambda: F.mse_loss(model(x), y, reduction="sum"), chosen.nonzero()[:, 0], terms


def test_a_term_that_no_row_answers_for() -> None:
    """Three rows or four terms: the error names both and where they come from, and what is said decides."""
    model, loss, number, terms = _as_many_kept_as_rows()
    with pytest.raises(errors.AmbiguousSamples, match=r"3 \(rows that .* called with.*\) and 4 \(.*terms") as error:
        _each(model, loss)
    assert "samples=" in str(error.value)
    assert all(p.grad is None for p in model.parameters())
    oracle.assert_close(_each(model, loss, number), oracle.per_sample_grad(oracle.parameters(model), terms), 1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_a_term_of_no_row_where_as_many_are_kept_as_two_of_each(turned: bool) -> None:
    """Four terms of two rows, three of the second: two equal pieces would hold, where one term answers for no row.

    Its sample is seen where the last layer has the batch on its first axis.
    """
    chosen = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    inner = torch.tensor([[1, 0, 0], [0, 1, 1]]).bool()
    x, y = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def turn(t: Tensor) -> Tensor:
        return t.transpose(0, 1) if turned else t

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        z, out = turn(m.first(x).tanh()), x.new_zeros(*turn(x).shape[:2], 3)
        out[turn(inner)] = m.second(z[turn(inner)])
        return turn(m.head(out.tanh()))[chosen]

    model = Apply(forward, first=nn.Linear(2, 3), second=nn.Linear(3, 3), head=nn.Linear(3, 2)).double()

    def loss() -> Tensor:
        return F.mse_loss(model(x), y, reduction="sum")

    def terms() -> Tensor:
        each = ((model(x) - y) ** 2).sum(1)
        return torch.stack([each[0], each[1:].sum()])

    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    if turned:
        with pytest.raises(errors.AmbiguousSamples, match="samples="):
            _each(model, loss)
    for said in (chosen.nonzero()[:, 0], *([] if turned else [None])):
        oracle.assert_close(_each(model, loss, said), want, 1e-12)


def _with_positions(lead: bool, n: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A frozen layer on the batch, a table of as many positions, and only the position of each sample's end."""
    index, last = torch.arange(n)[None] if lead else torch.arange(n), torch.tensor([1] * (n - 1) + [0])
    x, y = torch.randn(n, n, 1, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        z = (m.first(x) + m.table(index)).tanh()
        return m.head(z[torch.arange(n), last])

    parts = {"first": nn.Linear(1, 4).requires_grad_(False), "table": nn.Embedding(n, 4), "head": nn.Linear(4, 2)}
    return Apply(forward, **parts).double(), x, y


@pytest.mark.parametrize("samples", [None, 3, torch.arange(3)], ids=["read", "count", "numbers"])
@pytest.mark.parametrize("lead", [False, True])
def test_positions_of_which_some_are_used(lead: bool, samples: int | Tensor | None) -> None:
    """What the model was called with carries the samples; a table that it was not called with has none."""
    model, x, y = _with_positions(lead)
    got = _each(model, lambda: F.mse_loss(model(x), y, reduction="sum"), samples)
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: ((model(x) - y) ** 2).sum(1))
    oracle.assert_close(got, want, 1e-12)


def test_a_batch_given_by_its_name() -> None:
    """A keyword argument carries samples as any other; positions in front of it do not."""
    t, n = 3, 2
    x, y = torch.randint(5, (n, t)), torch.randint(4, (n * t,))
    model = Apply(lambda m, at, ids: m.head((m.table(at) + m.tokens(ids)).tanh()).flatten(0, 1),
                  table=nn.Embedding(t, 3), tokens=nn.Embedding(5, 3), head=nn.Linear(3, 4)).double()  # fmt: skip
    got = _each(model, lambda: F.cross_entropy(model(torch.arange(t), ids=x), y, reduction="sum"))

    def terms() -> Tensor:
        each = F.cross_entropy(model(torch.arange(t), ids=x), y, reduction="none")
        return each.view(n, t).sum(1)

    oracle.assert_close(got, oracle.per_sample_grad(oracle.parameters(model), terms), 1e-12)


@pytest.mark.parametrize("write", ["mask", "index_put", "index_copy", "cat"])
def test_what_frozen_layers_put_together_is_made_of_the_batch(write: str) -> None:
    """Two samples, and two features of the loss: what was made of rows of the batch is no constant of all samples."""
    keep = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    x, y = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        rows, out = m.first(x[keep]), x.new_zeros(2, 4, 4)
        if write == "mask":
            out[keep] = rows
        elif write == "index_put":
            out = out.index_put(keep.nonzero(as_tuple=True), rows)
        elif write == "index_copy":
            out = out.flatten(0, 1).index_copy(0, keep.flatten().nonzero()[:, 0], rows).view(2, 4, 4)
        else:
            out = torch.cat([m.first(part) for part in x.unbind(1)], 1).view(2, 4, 4)
        h = out.new_zeros(2, 4, 4)
        h[keep] = m.second(out[keep]).tanh()
        return m.head(h)[keep]

    model = Apply(
        forward, first=nn.Linear(2, 4).requires_grad_(False), second=nn.Linear(4, 4), head=nn.Linear(4, 2)
    ).double()

    def loss() -> Tensor:
        return 10.0 * F.mse_loss(model(x), y, reduction="none").sum()

    number = keep.nonzero()[:, 0]
    want = oracle.per_sample_grad(
        oracle.parameters(model),
        lambda: torch.stack([10.0 * ((model(x) - y) ** 2)[number == n].sum() for n in range(2)]),
    )
    try:
        got = _each(model, loss)
    except errors.AmbiguousSamples as error:
        assert "samples=" in str(error)
    else:
        oracle.assert_close(got, want, 1e-10)


@pytest.mark.parametrize("samples", [None, 4], ids=["read", "count"])
@pytest.mark.parametrize("meet", ["mean", "sum", "max", "product"])
def test_a_batch_that_meets_before_a_loss_of_one_row_is_mixed(meet: str, samples: int | None) -> None:
    """The target is row 0 of four, so that all terms bear its number; but every row of the batch is in them."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    joined: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda z: z.mean(0), "sum": lambda z: z.sum(0), "max": lambda z: z.logsumexp(0),
        "product": lambda z: z[0] * z[1] * z[2],
    }  # fmt: skip
    with pytest.raises(errors.SamplesMixed, match="rows of the batch meet"):
        _each(model, lambda: F.mse_loss(joined[meet](model(x)), y[0]), samples)


def test_one_row_of_the_batch_alone() -> None:
    """A loss of one row of the batch is that sample's, and the others have none."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    got = _each(model, lambda: F.mse_loss(model(x)[1], y[1], reduction="sum"))

    def terms() -> Tensor:
        return ((model(x) - y) ** 2).sum(1) * torch.tensor([0.0, 1.0, 0.0, 0.0])

    oracle.assert_close(got, oracle.per_sample_grad(oracle.parameters(model), terms), 1e-12)


@pytest.mark.parametrize("pool", ["split", "index_add", "matrix", "pairs"])
def test_rows_pooled_below_a_frozen_trunk_ask_for_the_number(pool: str) -> None:
    """Nothing is differentiated between the batch and the head, so nothing shows whose rows a term of the loss has."""
    sizes = [2, 2, 2, 2, 2] if pool == "pairs" else [3, 1, 2, 1, 3]
    segment = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "split": lambda h: torch.stack([part.mean(0) for part in h.split(sizes)]),
        "index_add": lambda h: h.new_zeros(5, 4).index_add(0, segment, h),
        "matrix": lambda h: (segment == torch.arange(5)[:, None]).double() @ h,
        "pairs": lambda h: h.view(5, 2, 4).sum(1),
    }
    trunk, head = nn.Linear(3, 4), nn.Linear(4, 2)
    model = Apply(lambda m, x: m.head(pools[pool](m.trunk(x).tanh())), trunk=trunk.requires_grad_(False), head=head)
    model, x, y = model.double(), torch.randn(10, 3).double(), torch.randn(5, 2).double()
    with pytest.raises((errors.SamplesMixed, errors.BadInput), match="pass samples="):
        _each(model, lambda: F.mse_loss(model(x), y, reduction="sum"))
    got = _each(model, lambda: F.mse_loss(model(x), y, reduction="sum"), 5)
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: ((model(x) - y) ** 2).sum(1))
    oracle.assert_close(got, {k: v for k, v in want.items() if k in got}, 1e-12)
    assert set(got) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("ends", ["all", "chosen", "mean"])
@pytest.mark.parametrize("pieces", ["every other", "every third", "halves"])
@pytest.mark.parametrize("frozen", [True, False])
def test_pieces_of_the_batch_stacked_beside_each_other_are_rows_again(pieces: str, ends: str, frozen: bool) -> None:
    """A frozen layer in between gives its rows other features, and the batch that was stacked has fewer rows."""
    x, cls = torch.randn(6, 3, 1).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    keep = torch.eye(3).repeat(2, 1).bool()
    step = {"every other": 2, "every third": 3, "halves": 2}[pieces]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if pieces == "halves":  # the second half behind the first: rows of two halves in one row of the stack
            h = torch.stack([m.trunk(part) for part in x.chunk(2)]).flatten(0, 1)
        else:
            h = torch.stack([m.trunk(x[k::step]) for k in range(step)], 1).flatten(0, 1)
        z = m.head(h.tanh().cumsum(1))
        return z[keep] if ends == "chosen" else z.mean(1) if ends == "mean" else z.flatten(0, 1)

    model = Apply(forward, trunk=nn.Linear(1, 4).requires_grad_(not frozen), head=nn.Linear(4, 2)).double()
    y = cls.repeat_interleave(3) if ends == "all" else cls
    got = _each(model, lambda: F.cross_entropy(model(x), y))
    want = oracle.per_sample_grad(
        oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none").view(6, -1).sum(1) / len(y)
    )
    oracle.assert_close(got, {k: v for k, v in want.items() if k in got}, 1e-12)
    assert {"head.weight", "head.bias"} <= set(got)
