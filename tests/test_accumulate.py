"""`accumulate`: a pass over a data set equals one `observe` over it as one batch, for every quantity."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors, quantities

pytestmark = pytest.mark.usefixtures("float64")
N, T, C = 11, 3, 3
SIZES = ([4, 4, 3], [1, 9, 1])


def _net() -> nn.Module:
    """Logits `[N, C, T]`, one loss term a position; a weight that the convolutions share, a norm, biases."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 1), nn.Tanh())
    model.append(nn.Conv1d(4, C, 1))
    return model


def _data() -> tuple[Tensor, Tensor]:
    """Labels of which some are ignored: batches have different denominators."""
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 2, T + 1, generator=gen), torch.randint(C, (N, T), generator=gen)
    y[torch.rand(N, T, generator=gen) < 0.3] = -100
    y[:, 0] = torch.arange(N) % C  # no sample without a label
    return x, y


WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda z, y: F.cross_entropy(z, y.clamp(min=0)),
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "ignored": F.cross_entropy,
    "weighted": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS.to(z.dtype)),
    "scaled": lambda z, y: 10 * F.cross_entropy(z, y, label_smoothing=0.2),
    "two": lambda z, y: F.cross_entropy(z, y.clamp(min=0)) + 0.5 * F.mse_loss(z, torch.zeros(()).expand_as(z)),
    "squared": lambda z, y: F.mse_loss(z, F.one_hot(y.clamp(min=0), C).transpose(1, 2).to(z.dtype)),
}

QUANTITIES: dict[str, Callable[[], lw.Quantity]] = {
    "PerSampleGrad": lw.PerSampleGrad,
    "SquaredNorm": lw.SquaredNorm,
    "SecondMoment": lw.SecondMoment,
    "Variance": lw.Variance,
    "NoiseScale": lw.NoiseScale,
    "DiagGGN": lw.DiagGGN,
    "DiagHessian": lw.DiagHessian,
    "FisherDiag": lambda: lw.FisherDiag("data"),
    "Sketch": lambda: lw.Sketch(3, torch.Generator().manual_seed(0)),
    "SqrtGGN": lw.SqrtGGN,
    "KFLR": quantities.KFLR,
    "KFLR reduce": lambda: quantities.KFLR(sharing="reduce"),
    "KFLR joint": lambda: quantities.KFLR(joint=True),
    "EKFAC": lambda: lw.EKFAC(draws=None),
}
REFUSED = {"PairwiseDot", "ClippedGrad", "KFRA"}  # of several batches, for some losses; see their own tests
SAMPLED = {"KFAC"}  # draws differ between one batch and several


def _observed(make: Callable[[], lw.Quantity], loss_fn: Callable, scale: str) -> tuple[lw.Seen, Any]:
    model, quantity = _net(), make()
    x, y = _data()
    with lw.observe(model, quantity, scale=scale) as seen:
        loss_fn(model(x), y).backward()
    return seen, seen[quantity]


def _numbers(result: Any) -> dict[str, Tensor]:
    """All tensors of a result, by name."""
    found: dict[str, Tensor] = {}
    if hasattr(result, "factors"):
        return {f"{name} {i}": f for name, fs in result.factors.items() for i, f in enumerate(fs)}
    if hasattr(result, "eigenvalues"):  # eigenvectors have no sign of their own
        return {name: result.to_dense(name) for name in result.names()}
    for what in ("noise", "signal", "snr"):
        if isinstance(getattr(result, what, None), Mapping):
            found |= {f"{what} {name}": v for name, v in getattr(result, what).items()}
    return found | dict(result)


def _assert_same(got: Any, want: Any, rel: float = 1e-12) -> None:
    """Of the largest of all parameters: a bias before a norm has a gradient of rounding noise."""
    got, want = _numbers(got), _numbers(want)
    assert got.keys() == want.keys()
    peak = max(_peak(w) for w in want.values())
    for name, w in want.items():
        assert got[name].shape == w.shape, name
        assert torch.equal(torch.isfinite(got[name]), torch.isfinite(w)), name
        both = torch.isfinite(w)
        assert _peak((got[name] - w)[both]) <= rel * max(_peak(w), 1e-2 * peak), name


def _peak(t: Tensor) -> float:
    t = t[torch.isfinite(t)]
    return float(t.abs().max()) if t.numel() else 0.0


@one_in(2, name=QUANTITIES, loss=LOSSES, scale=["loss", "sample"])
def test_batches_equal_the_whole(name: str, loss: str, scale: str) -> None:
    make, loss_fn = QUANTITIES[name], LOSSES[loss]
    seen, want = _observed(make, loss_fn, scale)
    for sizes in SIZES:
        model, (x, y) = _net(), _data()
        quantity = make()
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        got = lw.accumulate(model, loss_fn, batches, quantity, scale=scale)
        _assert_same(got[quantity], want)
        _assert_same(got.grad, seen.grad)
        assert all(p.grad is None for p in model.parameters())


def test_every_quantity_is_here() -> None:
    named = {type(make()).__name__ for make in QUANTITIES.values()} | REFUSED | SAMPLED
    known = {n for n in quantities.__all__ if issubclass(getattr(quantities, n), lw.Quantity)} - {"Quantity"}
    assert known <= named


# Batches, losses and models of other kinds -----------------------------------------------------------


def test_batches_of_any_kind() -> None:
    """A dict to a function of the batch, a tuple of three, a batch that is one tensor."""
    model, (x, y) = _net(), _data()
    _, want = _observed(lw.SecondMoment, F.cross_entropy, "loss")
    for loader, run in (
        ([{"x": a, "y": b} for a, b in zip(x.split(4), y.split(4), strict=True)],
         lambda b: F.cross_entropy(model(b["x"]), b["y"])),
        ([(a, b, 0) for a, b in zip(x.split(4), y.split(4), strict=True)],
         lambda b: F.cross_entropy(model(b[0]), b[1])),
        (torch.arange(N).split(4), lambda i: F.cross_entropy(model(x[i]), y[i])),
    ):  # fmt: skip
        _assert_same(lw.accumulate(model, run, loader, lw.SecondMoment()).second_moment, want)


def test_a_loader_that_raises() -> None:
    """Its own error comes through, and `.grad` is what it was; also where it raises at once."""
    model, (x, y) = _net(), _data()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    old = [p.grad for p in model.parameters()]

    def loader(batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from [(x, y)] * batches
        raise OSError("disk")

    for batches in (0, 2):
        with pytest.raises(OSError, match="disk"):
            lw.accumulate(model, F.cross_entropy, loader(batches), lw.Variance(), progress=True)
        for p, g in zip(model.parameters(), old, strict=True):
            assert p.grad is g and bool((g == 2).all())
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize(
    ("loss_fn", "seen"),
    [
        (lambda z, y: F.cross_entropy(z, y, reduction="none"), r"shape \(4, 3\)"),
        (lambda z, y: F.cross_entropy(z, y).item(), "float"),
        (lambda z, y: (F.cross_entropy(z, y), z), "tuple"),
        (lambda z, y: None, "NoneType"),
        (lambda z, y: F.cross_entropy(z, y).reshape(1), r"shape \(1,\)"),
    ],
)
def test_a_loss_that_is_not_one_number(loss_fn: Callable, seen: str) -> None:
    model, (x, y) = _net(), _data()
    with pytest.raises(errors.BadInput, match=seen):
        lw.accumulate(model, loss_fn, zip(x.split(4), y.split(4), strict=True), lw.Variance())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_and_buffers_are_left_to_the_model() -> None:
    """The draws are those of a loop by hand; a batch norm in training mixes samples and is refused as ever."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, C))
    x, y = torch.randn(N, 4), torch.randint(C, (N,))
    torch.manual_seed(5)
    seen = lw.accumulate(model, F.cross_entropy, zip(x.split(4), y.split(4), strict=True), lw.PerSampleGrad())
    assert all(m.training for m in model.modules())
    torch.manual_seed(5)
    with lw.observe(model, lw.PerSampleGrad()) as loop:
        for a, b in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(model(a), b) * (len(b) / N)).backward()
    _assert_same(seen.per_sample_grad, loop.per_sample_grad)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
    with pytest.raises(errors.SamplesMixed):
        lw.accumulate(mixed, F.cross_entropy, [(x, y)], lw.Variance())
    mixed.eval()
    lw.accumulate(mixed, F.cross_entropy, [(x, y)], lw.Variance())


def test_memory_does_not_grow_with_the_data() -> None:
    """Live tensors while the loader is asked for a batch, the collector off."""
    model, (x, y) = _net(), _data()
    counts = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(30):
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
            yield x.clone(), y.clone()

    makes = [make for make in QUANTITIES.values() if make().concatenate is False and make().first_pass() is None]
    gc.collect()
    gc.disable()
    try:
        lw.accumulate(model, F.cross_entropy, loader(), *(make() for make in makes))
    finally:
        gc.enable()
    assert len(makes) >= 8
    assert len(set(counts[3:])) == 1, counts


# Two passes ---------------------------------------------------------------------------------------


class _Loader:
    """A loader that can be asked again, and what it says of each time."""

    def __init__(self, batches: Callable[[int], list[Any]]) -> None:
        self.batches, self.asked, self.counts = batches, 0, []

    def __iter__(self) -> Iterator[Any]:
        self.asked += 1
        for batch in self.batches(self.asked):
            gc.collect()
            self.counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
            yield batch


def _batches(x: Tensor, y: Tensor) -> list[Any]:
    return list(zip(x.split(4), y.split(4), strict=True))


@pytest.mark.parametrize("derived", [False, True])
def test_ekfac_in_constant_memory(derived: bool) -> None:
    """No tensor of one batch is alive at the next; the result is that of one `observe`, beside other quantities."""
    model, (x, y) = _net(), _data()
    if derived:
        nn.utils.parametrizations.weight_norm(model[3])
    ekfac, other = lw.EKFAC(None), lw.SecondMoment()
    loader = _Loader(lambda _: _batches(x, y) * 2)
    seen = lw.accumulate(model, F.cross_entropy, loader, other, ekfac)
    half = len(loader.counts) // 2
    assert loader.asked == 2 and len(set(loader.counts[2:half])) == 1 == len(set(loader.counts[half + 2 :]))
    assert repr(seen.ekfac) == repr(seen[ekfac]) and set(seen.ekfac.names()) == set(seen[other])
    whole = lw.EKFAC(None)
    with lw.observe(model, whole) as once:
        for _ in range(2):
            (F.cross_entropy(model(x), y) / 2).backward()
    _assert_same(seen[ekfac], once[whole], rel=1e-11)


def test_both_passes_draw_alike() -> None:
    """Basis and second moments come from the same columns, dropout masks and order of samples."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, C))
    x, y = torch.randn(N, 4), torch.randint(C, (N,))
    data = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=4, shuffle=True)
    for make in (lambda: lw.EKFAC(2), lambda: lw.EKFAC(2, torch.Generator().manual_seed(3))):
        torch.manual_seed(5)
        two = lw.accumulate(model, F.cross_entropy, data, make()).ekfac
        torch.manual_seed(5)
        with lw.observe(model, make()) as one:
            for a, b in data:
                (F.cross_entropy(model(a), b) * (len(b) / N)).backward()
        _assert_same(two, one.ekfac, rel=1e-11)


def test_a_loader_that_gives_its_batches_once_is_refused() -> None:
    model, (x, y) = _net(), _data()
    with pytest.raises(errors.BadInput, match=r"EKFAC.*over an iterator \(generator\)"):
        lw.accumulate(model, F.cross_entropy, (b for b in _batches(x, y)), lw.EKFAC())
    fewer = _Loader(lambda time: _batches(x, y)[: 4 - time])
    with pytest.raises(errors.BadInput, match="3 batches of 11 samples, then 2 of 8"):
        lw.accumulate(model, F.cross_entropy, fewer, lw.EKFAC())
    assert all(p.grad is None for p in model.parameters())
    basis = lw.accumulate(model, F.cross_entropy, _batches(x, y), quantities.KFLR()).kflr
    got = lw.accumulate(model, F.cross_entropy, iter(_batches(x, y)), lw.EKFAC(None, basis=basis)).ekfac
    _assert_same(got, lw.accumulate(model, F.cross_entropy, _batches(x, y), lw.EKFAC(None)).ekfac)


@pytest.mark.parametrize("make", [lw.PerSampleGrad, lw.SecondMoment, lw.Variance, lw.DiagGGN, lw.KFLR], ids=str)
def test_samples_said_of_each_batch(make: Callable[[], lw.Quantity]) -> None:
    """Samples of uneven length in flat batches: a function of the batch gives the number of each loss term."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))
    sizes = ([2, 1, 3], [1, 4], [2, 2, 1, 2])
    gen = torch.Generator().manual_seed(4)
    batches = [(torch.randn(sum(s), 3, generator=gen), torch.randint(C, (sum(s),), generator=gen)) for s in sizes]
    numbers = {sum(s): torch.arange(len(s)).repeat_interleave(torch.tensor(s)) for s in sizes}
    said = lambda batch: numbers[len(batch[0])]  # noqa: E731
    got = lw.accumulate(net, F.cross_entropy, batches, quantity := make(), samples=said)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole = torch.arange(9).repeat_interleave(torch.tensor([n for s in sizes for n in s]))
    with lw.observe(net, other := make(), samples=whole) as once:
        F.cross_entropy(net(x), y).backward()
    _assert_same(got[quantity], once[other])
