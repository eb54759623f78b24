"""A layout that was measured for one batch is used for another only where it holds: masks, routes and sizes change.

Every program runs for several batches on one model, with other choices in each; the values are those of a loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import SamplesMixed
from layerwise.observation.observe import observe
from layerwise.quantities import KFAC, PerSampleGrad, SquaredNorm
from layerwise.rows.layout import MatrixLayout
from layerwise.rows.numbered import Order

N, T, D, C = 4, 3, 5, 3


class _Net(nn.Module):
    """A layer, two experts and a head; `mid`: what happens between them. It counts the passes through it."""

    def __init__(self, mid: Callable[[_Net, Tensor], Tensor] | None = None, turned: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, C)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.turned, self.mid, self.passes = turned(), mid, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.turned(self.first(x))
        if h.grad_fn is not None:
            h.grad_fn.register_prehook(self._count)
        return self.head(h if self.mid is None else self.mid(self, h))

    def _count(self, _: object) -> None:
        self.passes += 1


class _Routed:
    """Each row through one expert, or through none: by boolean masks that may change."""

    def __init__(self) -> None:
        self.route = torch.zeros(0)

    def __call__(self, net: _Net, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        for i, expert in enumerate(net.experts):
            out[self.route == i] = expert(h[self.route == i])
        return out.tanh() + h


def _per_sample(net: nn.Module, terms: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """The gradients `[N, *shape]` of loss terms `[M]` of the samples `[M]`, one sample after another."""
    params = dict(net.named_parameters())
    each = []
    for n in range(N):
        found = torch.autograd.grad(
            terms[owner == n].sum(), list(params.values()), retain_graph=True, allow_unused=True
        )
        each.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, params.values(), strict=True)])
    return {name: torch.stack(g) for name, g in zip(params, zip(*each, strict=True), strict=True)}


def _check(net: nn.Module, run: Callable[[str], Tensor], owner: Tensor) -> None:
    """A batch's per-sample gradients and norms, beside a loop over the terms of the same run."""
    with observe(net, PerSampleGrad(), SquaredNorm(), KFAC()) as seen:
        run("sum").backward()
    expected = _per_sample(net, run("none"), owner)
    for name, g in seen.per_sample_grad.items():
        assert torch.allclose(g, expected[name], rtol=1e-10, atol=1e-14), name
        norm = expected[name].flatten(1).square().sum(1)
        assert torch.allclose(seen.squared_norm[name], norm, rtol=1e-10, atol=1e-20), name
    assert len(seen.squared_norm["head.weight"]) == N
    net.zero_grad()


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, T, D), torch.randint(C, (N, T)), torch.arange(N)[:, None].expand(N, T)


def _masks() -> list[Tensor]:
    """Masks of rows: at random, all, none of the first sample, one row of each sample, and the first again."""
    some = torch.rand(N, T) < 0.7
    some[:, 0] = True
    without, one = some.clone(), torch.zeros(N, T, dtype=torch.bool)
    without[0] = False
    one[:, 1] = True
    return [some, torch.ones_like(some), torch.rand(N, T) < 0.5, without, one, some]


def test_rows_chosen_before_the_loss() -> None:
    """The mask changes: the layout of the layers is remembered, and no measurement passes through the first layer."""
    net = _Net()
    for i, keep in enumerate(_masks()):
        x, y, owner = _batch()
        before = net.passes

        def run(reduction: str, x: Tensor = x, y: Tensor = y, keep: Tensor = keep) -> Tensor:
            return F.cross_entropy(net(x)[keep], y[keep], reduction=reduction)

        with observe(net, PerSampleGrad()):
            run("sum").backward()
        assert i == 0 or net.passes == before + 1
        _check(net, run, owner[keep])


@pytest.mark.parametrize("turned", [nn.Tanh, nn.ReLU])
def test_rows_chosen_before_the_head(turned: type[nn.Module]) -> None:
    """The rows of the head are others in each batch, and so are their samples."""
    chosen: list[Tensor] = []
    net = _Net(lambda _, h: h[chosen[-1]], turned)
    for keep in _masks():
        x, y, owner = _batch()
        chosen.append(keep)
        _check(net, lambda r, x=x, y=y, keep=keep: F.cross_entropy(net(x), y[keep], reduction=r), owner[keep])


@pytest.mark.parametrize("turned", [nn.Tanh, nn.ReLU])
def test_routes_change(turned: type[nn.Module]) -> None:
    """Experts get other rows in each batch, and some rows go to none."""
    routed = _Routed()
    net = _Net(routed, turned)
    for _ in range(5):
        x, y, owner = _batch()
        routed.route = torch.randint(3, (N, T))
        _check(
            net, lambda r, x=x, y=y: F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction=r), owner.flatten()
        )


def test_routes_of_the_first_layer_change() -> None:
    """The first layers themselves get other rows in each batch, so that nothing ran before the choice."""
    routed = _Routed()
    net = _Net()
    for k in range(5):
        x, y, owner = _batch()
        routed.route = torch.randint(2, (N, T)) if k != 2 else torch.zeros(N, T, dtype=torch.long)

        def run(reduction: str, x: Tensor = x, y: Tensor = y) -> Tensor:
            h = routed(net, x)
            return F.cross_entropy(net(h).flatten(0, 1), y.flatten(), reduction=reduction)

        _check(net, run, owner.flatten())


def test_segments_change() -> None:
    """Samples of uneven length, of other lengths in each batch; rows of one batch fall to no sample."""
    net = _Net()
    for lengths in ([1, 4, 2, 3], [3, 3, 2, 2], [1, 4, 2, 3], [4, 1, 1, 4]):
        owner = torch.arange(N).repeat_interleave(torch.tensor(lengths))
        x, y = torch.randn(len(owner), D), torch.randint(C, (N,))

        def run(reduction: str, x: Tensor = x, y: Tensor = y, owner: Tensor = owner) -> Tensor:
            pooled = torch.zeros(N, D).index_add(0, owner, net.first(x).tanh())
            return F.cross_entropy(net.head(pooled), y, reduction=reduction)

        _check(net, run, torch.arange(N))


def test_pieces_change() -> None:
    """A batch taken apart before the first layer, in other pieces each time."""
    net = _Net()
    for sizes in ([2, 2], [1, 3], [1, 1, 2], [2, 2], [4]):
        x, y, owner = _batch()

        def run(reduction: str, x: Tensor = x, y: Tensor = y, sizes: list[int] = sizes) -> Tensor:
            out = torch.cat([net(piece) for piece in x.split(sizes)])
            return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction=reduction)

        _check(net, run, owner.flatten())


def test_rows_whose_units_were_off() -> None:
    """A row that answered for no sample since its units were off has one where they are on."""
    net = _Net(turned=nn.ReLU)
    for k in range(4):
        x, y, owner = _batch()
        keep = torch.rand(N, T) < 0.8
        if k < 2:
            x[1, 2] = 0
        with torch.no_grad():
            net.first.bias.fill_(-1.0 if k < 2 else 0.5)

        def run(reduction: str, x: Tensor = x, y: Tensor = y, keep: Tensor = keep) -> Tensor:
            return F.cross_entropy(net(x)[keep], y[keep], reduction=reduction)

        _check(net, run, owner[keep])


def test_targets_of_other_samples() -> None:
    """Logits and targets whose rows are of different samples: the samples are those of what the layers read."""
    net = _Net()
    for keep in _masks()[:3]:
        x, y, owner = _batch()
        _check(net, lambda r, x=x, y=y, k=keep: F.cross_entropy(net(x)[k], y[k], reduction=r), owner[keep])
    x, y, owner = _batch()
    rows = torch.randperm(N * T)
    others = y.flatten()[rows.flip(0)]
    _check(net, lambda r: F.cross_entropy(net(x).flatten(0, 1)[rows], others, reduction=r), owner.flatten()[rows])


def test_a_choice_that_mixes_samples() -> None:
    """After batches that hold, one in which a row of one sample is chosen for another one as well."""
    rows = torch.arange(N * T).reshape(N, T)
    net = _Net(lambda _, h: h.flatten(0, 1)[rows].sum(1))
    for _ in range(2):
        x, y = torch.randn(N, T, D), torch.randint(C, (N,))
        _check(net, lambda r, x=x, y=y: F.cross_entropy(net(x), y, reduction=r), torch.arange(N))
    rows = rows.clone()
    rows[0, 0] = T
    x, y = torch.randn(N, T, D), torch.randint(C, (N,))
    with pytest.raises(SamplesMixed), observe(net, PerSampleGrad()):
        F.cross_entropy(net(x), y, reduction="sum").backward()


class _Positions(nn.Module):
    """Positions that all samples share, added to the tokens of each, or one position for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.token = nn.Embedding(T, D), nn.Embedding(7, D)
        self.gate, self.head = nn.Linear(D, D), nn.Linear(D, C)
        self.positions = torch.arange(T)[None]

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        shared = self.place(self.positions if positions is None else positions)
        return self.head((shared * self.gate(shared).sigmoid() + self.token(x)).tanh())


def test_positions_that_all_samples_share() -> None:
    """Uses that all samples share are remembered with their layout, which holds for no other positions."""
    net = _Positions()
    with torch.no_grad():
        net.gate.weight.zero_()
    for k in range(6):
        x, y, owner = torch.randint(7, (N, T)), torch.randint(C, (N, T)), torch.arange(N).repeat_interleave(T)
        given = torch.randint(T, (N, T)) if k == 4 else None

        def run(reduction: str, x: Tensor = x, y: Tensor = y, given: Tensor | None = given) -> Tensor:
            return F.cross_entropy(net(x, given).flatten(0, 1), y.flatten(), reduction=reduction)

        _check(net, run, owner)
        with torch.no_grad():
            net.gate.weight.normal_()


def _written(z: Tensor, rows: Tensor) -> Tensor:
    out = torch.zeros(N, C)
    out[rows] = z
    return out


@pytest.mark.parametrize(
    "move",
    [
        _written,
        lambda z, rows: torch.zeros(N, C).index_copy_(0, rows, z),
        lambda z, rows: torch.zeros(N, C).index_put_((rows,), z),
        lambda z, rows: torch.zeros(N, C).scatter_add_(0, rows[:, None].expand(N, C), z),
        lambda z, rows: z[rows.numpy()],
        lambda z, rows: z[rows.tolist()],
    ],
    ids=["setitem", "index_copy_", "index_put_", "scatter_add_", "numpy", "list"],
)
def test_rows_moved_elsewhere(move: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Rows of the output that go to other places in each batch: the places are part of the layout."""
    net = nn.Linear(D, C)
    for _ in range(5):
        x, y, rows = torch.randn(N, D), torch.randint(C, (N,)), torch.randperm(N)
        with observe(net, PerSampleGrad()) as seen:
            F.cross_entropy(move(net(x), rows), y, reduction="sum").backward()
        expected = _per_sample(net, F.cross_entropy(move(net(x), rows), y, reduction="none"), torch.arange(N))
        for name, g in seen.per_sample_grad.items():
            assert torch.allclose(g, expected[name], rtol=1e-10, atol=1e-14), name


def test_numbers_that_the_user_gives_change() -> None:
    """A tensor of sample numbers is part of what a layout is remembered for."""
    net = _Net()
    for given in ([0, 0, 1, 2, 3], [3, 1, 1, 2, 0], [0, 0, 1, 2, 3], [0, 0, 1, 2, 3]):
        owner, x, y = torch.tensor(given), torch.randn(5, D), torch.randint(C, (5,))
        with observe(net, PerSampleGrad(), samples=owner) as seen:
            F.cross_entropy(net(x), y, reduction="sum").backward()
        expected = _per_sample(net, F.cross_entropy(net(x), y, reduction="none"), owner)
        for name, g in seen.per_sample_grad.items():
            assert torch.allclose(g, expected[name], rtol=1e-10, atol=1e-14), name


def test_an_order_keeps_one_other() -> None:
    """An order of a remembered layout that is joined with one of each batch does not grow."""
    kept, seen, rows = Order(2, torch.tensor([0, 1, 1])), [], torch.arange(5.0)
    for _ in range(3):
        other = Order(2, torch.tensor([1, 0]))
        whole = kept.joined([other])
        assert whole is kept.joined([other])
        assert whole.place([rows[:3], rows[3:]]).tolist() == [[0, 4, 0], [1, 2, 3]]
        assert whole.take(whole.place([rows]).flatten()).tolist() == rows.tolist()
        seen.append(weakref.ref(other))
        del other, whole
    assert [ref() is None for ref in seen] == [True, True, False]


@pytest.mark.parametrize("seed", range(8))
def test_a_layout_takes_stacks_and_any_strides(seed: int) -> None:
    torch.manual_seed(seed)
    whole = MatrixLayout.whole((4, 6), (1, 6, 4), (0, 2, 1))
    every_second = MatrixLayout.strided((4, 6), (1, 2, 3), (0, 12, 2), 1)
    scattered = MatrixLayout.at((4, 6), torch.randperm(24)[:6].reshape(1, 2, 3))
    for laid in (whole, every_second, scattered):
        stack = torch.randn(3, 4, 6, 2)[..., seed % 2]  # its last step is 2
        found = laid.matrix(stack)
        for one, matrix in zip(stack, found, strict=True):
            want = one.contiguous().flatten()[laid.places()]
            assert torch.equal(laid.matrix(one), want) and torch.equal(matrix, want)
        assert torch.equal(laid.matrix(laid.fold(found)), found)
