"""Quantities on two processes: those of one process on the whole batch, under DDP and FSDP2."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import layerwise as lw
from layerwise import errors

N, T, C = 8, 3, 3
SHARES = ((0, 5), (5, 8))  # rows of each rank
PIECES = (((0, 2), (2, 5)), ((5, 6), (6, 8)))  # the same in two backward passes


def _model() -> nn.Module:
    """Logits `[N, C, T]`; a weight that the convolutions share, a norm, biases."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 1), nn.Tanh())
    return model.append(nn.Conv1d(4, C, 1)).double()


def _data(start: int = 0, stop: int = N) -> tuple[Tensor, Tensor]:
    """Labels of which some are ignored: the ranks' means have different denominators."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, T + 1, generator=gen, dtype=torch.float64)
    y = torch.randint(C, (N, T), generator=gen)
    y[torch.rand(N, T, generator=gen) < 0.3] = -100
    y[:, 0] = torch.arange(N) % C
    return x[start:stop], y[start:stop]


def _mean(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def _even(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y.clamp(min=0))


def _sum(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def _two(z: Tensor, y: Tensor) -> Tensor:
    return _even(z, y) + 0.5 * F.mse_loss(z, torch.zeros_like(z))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "sum": _sum, "two": _two}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


REDUCED: dict[str, Callable[[], lw.Quantity]] = {
    "SecondMoment": lw.SecondMoment,
    "Variance": lw.Variance,
    "NoiseScale": lw.NoiseScale,
    "NoiseScale norms": lambda: lw.NoiseScale(snr=False),
    "DiagGGN": lw.DiagGGN,
    "DiagHessian": lw.DiagHessian,
    "DiagHessian sampled": lambda: lw.DiagHessian(draws=2, generator=_generator()),
    "FisherDiag data": lambda: lw.FisherDiag("data"),
    "KFLR": lw.KFLR,
    "KFLR reduce": lambda: lw.KFLR(sharing="reduce"),
    "KFLR joint": lambda: lw.KFLR(joint=True),
    "EKFAC": lambda: lw.EKFAC(draws=None),
}
LOCAL: dict[str, Callable[[], lw.Quantity]] = {  # rows of the union, in its scale
    "PerSampleGrad": lw.PerSampleGrad,
    "SquaredNorm": lw.SquaredNorm,
    "Sketch": lambda: lw.Sketch(3, _generator()),
    "SqrtGGN": lw.SqrtGGN,
    "DiagGGN samples": lambda: lw.DiagGGN(per_sample=True),
    "DiagHessian samples": lambda: lw.DiagHessian(per_sample=True),
}
REFUSED: dict[str, Callable[[], lw.Quantity]] = {"PairwiseDot": lw.PairwiseDot, "KFRA": lw.KFRA}
ELSEWHERE = {"KFAC", "ClippedGrad"}  # drawn labels differ; only some losses: their own tests
QUANTITIES = REDUCED | LOCAL


def test_the_table_names_every_quantity() -> None:
    exported = {n for n in lw.__all__ if isinstance(getattr(lw, n), type) and issubclass(getattr(lw, n), lw.Quantity)}
    named = {name.split()[0] for name in (QUANTITIES | REFUSED)} | ELSEWHERE
    assert named == exported - {"Quantity"}


def _numbers(result: Any) -> dict[str, Tensor]:
    """All tensors of a result, by name."""
    if hasattr(result, "factors"):
        return {f"{name} {i}": f for name, fs in result.factors.items() for i, f in enumerate(fs)}
    if hasattr(result, "eigenvalues"):  # eigenvectors have no sign of their own
        return {name: result.to_dense(name) for name in result.names()}
    found = {name: v.detach() for name, v in result.items()} | {"total": result.total}
    for what in ("noise", "signal", "snr"):
        part = getattr(result, what, None) if not (what == "snr" and getattr(result, "_snr", 0) is None) else None
        if isinstance(part, Mapping):
            found |= {f"{what} {name}": v for name, v in part.items()}
    return found


def _assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], rel: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    peak = max(_peak(w) for w in want.values())
    for name, w in want.items():
        assert got[name].shape == w.shape, name
        both = torch.isfinite(w)
        assert torch.equal(torch.isfinite(got[name]), both), name
        assert _peak((got[name] - w)[both]) <= rel * max(_peak(w), 1e-2 * peak), name


def _peak(t: Tensor) -> float:
    t = t[torch.isfinite(t)]
    return float(t.abs().max()) if t.numel() else 0.0


# -- the table ------------------------------------------------------------------------------------------------


def _whole(names: list[str], loss: str, scale: str) -> dict[str, dict[str, Tensor]]:
    """One process on the whole batch."""
    asked = {name: QUANTITIES[name]() for name in names}
    model, (x, y) = _model(), _data()
    with lw.observe(model, *asked.values(), scale=scale) as seen:
        LOSSES[loss](model(x), y).backward()
    return {name: _numbers(seen[q]) for name, q in asked.items()} | {"grad": dict(seen.grad)}


def _shared(rank: int, names: list[str], loss: str, scale: str, wrap: str, pieces: Any) -> dict[str, dict[str, Tensor]]:
    """The rows of one rank, in one backward pass or several, and the ranks joined."""
    asked = {name: QUANTITIES[name]() for name in names}
    model = _model()
    run = DistributedDataParallel(model) if wrap != "none" else model
    with lw.observe(run if wrap == "outside" else model, *asked.values(), scale=scale) as seen:
        for x, y, share in _parts(_data, pieces[rank], loss):
            (LOSSES[loss](run(x), y) * share).backward()
    assert seen.all_reduce() is seen
    found = {name: _numbers(seen[q]) for name, q in asked.items()} | {"grad": dict(seen.grad)}
    return {n: {key.replace("module.", ""): v for key, v in table.items()} for n, table in found.items()}


def _parts(data: Callable[..., tuple[Tensor, Tensor]], pieces: Any, loss: str = "two") -> list[Any]:
    """The parts of a rank's data, each with the weight at which their losses sum to that of the rank's whole share."""
    parts = [data(start, stop) for start, stop in pieces]
    counts = [int((y >= 0).sum()) if loss == "mean" else len(y) for _, y in parts]
    weights = [1.0 if loss == "sum" or len(parts) == 1 else count / sum(counts) for count in counts]
    return [(x, y, weight) for (x, y), weight in zip(parts, weights, strict=True)]


ONE = (((0, 5),), ((5, 8),))


@pytest.mark.parametrize("scale", ["loss", "sample"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_equal_the_whole(loss: str, scale: str) -> None:
    want = _whole(list(QUANTITIES), loss, scale)
    for wrap, pieces in (("outside", ONE), ("inside", PIECES)):
        # A sketch is drawn by the parameter's name, signs once a backward pass.
        names = [name for name in QUANTITIES if name != ("Sketch" if wrap == "outside" else "DiagHessian sampled")]
        for rank, got in enumerate(ranks(2)(_shared, names, loss, scale, wrap, pieces)):
            _check(got, {name: want[name] for name in (*names, "grad")}, rank)


QUARTERS = ((0, 1), (1, 4), (4, 6), (6, 8))  # rows of each of four ranks


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_four_ranks_equal_the_whole(loss: str) -> None:
    names = [name for name in QUANTITIES if name != "Sketch"]  # drawn by the parameter's name
    want = _whole(list(QUANTITIES), loss, "loss")
    for rank, got in enumerate(ranks(4)(_shared, names, loss, "loss", "outside", [(rows,) for rows in QUARTERS])):
        _check(got, {name: want[name] for name in (*names, "grad")}, rank, QUARTERS)


def _check(
    got: dict[str, dict[str, Tensor]], want: dict[str, dict[str, Tensor]], rank: int, shares: Any = SHARES
) -> None:
    start, stop = shares[rank]
    for name, table in want.items():
        rows = table
        if name in LOCAL and name != "SqrtGGN":
            rows = {k: v[start:stop] if k != "total" or v.dim() else v for k, v in table.items()}
        if name == "SqrtGGN":
            rows = {k: v[:, start:stop] for k, v in table.items() if v.dim()}
        if name in LOCAL:  # totals of single numbers would be those of this rank's samples
            rows = {k: v for k, v in rows.items() if k != "total" or v.dim()}
            _assert_same({k: got[name][k] for k in rows}, rows)
        else:
            _assert_same(got[name], rows)


def _mlp() -> nn.Module:
    torch.manual_seed(5)
    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    return nn.Sequential(block, nn.Tanh(), nn.Linear(5, C)).double()


def _points(start: int = 0, stop: int = N) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(2)
    return torch.randn(N, 4, generator=gen).double()[start:stop], torch.randint(C, (N,), generator=gen)[start:stop]


# -- FSDP2 ----------------------------------------------------------------------------------------------------


def _sharded(reshard: bool | None = None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = _mlp(), init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    return model


def _fsdp(rank: int, names: list[str], scale: str, reshard: bool | None, pieces: Any, eval_first: bool) -> Any:
    from torch.distributed.tensor import DTensor

    asked = {name: QUANTITIES[name]() for name in names}
    model = _sharded(reshard)
    if eval_first:  # leaves the root's parameters whole
        with torch.no_grad():
            model(_points()[0])
    alone = _mlp()
    with lw.observe(model, *asked.values(), scale=scale) as seen:
        for x, y, share in _parts(_points, pieces[rank]):
            (F.cross_entropy(model(x), y) * share).backward()
    for x, y, share in _parts(_points, pieces[rank]):
        (F.cross_entropy(alone(x), y) * share).backward()
    with lw.observe(fresh := _mlp(), *asked.values(), scale=scale) as own:
        for x, y, share in _parts(_points, pieces[rank]):
            (F.cross_entropy(fresh(x), y) * share).backward()
    _assert_same(dict(seen.grad), dict(own.grad))  # before all_reduce: this rank's own, plain tensors
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):  # FSDP2's own work is what it was
        torch.distributed.all_reduce(q.grad)
        torch.testing.assert_close(p.grad.full_tensor(), q.grad / 2, rtol=1e-12, atol=1e-14)
    seen.all_reduce()
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        for table in (seen.grad, *(seen[asked[n]] for n in names if n in ("Variance", "DiagGGN", "DiagHessian"))):
            assert isinstance(table[name], DTensor)
            assert (table[name].placements, table[name].shape) == (p.placements, p.shape)
            assert table[name].to_local().shape == p.to_local().shape

    def whole(table: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in table.items()}

    return {name: whole(_numbers(seen[q])) for name, q in asked.items()} | {"grad": whole(dict(seen.grad))}


@pytest.mark.parametrize(
    ("reshard", "scale", "pieces", "eval_first"),
    [(None, "loss", ONE, False), (True, "sample", ONE, True), (False, "sample", PIECES, False)],
    ids=["default", "freed", "kept"],
)
def test_fsdp_equals_the_whole(reshard: bool | None, scale: str, pieces: Any, eval_first: bool) -> None:
    names = [name for name in QUANTITIES if name != "DiagHessian sampled"]
    asked = {name: QUANTITIES[name]() for name in names}
    model, (x, y) = _mlp(), _points()
    with lw.observe(model, *asked.values(), scale=scale) as seen:
        F.cross_entropy(model(x), y).backward()
    want = {name: _numbers(seen[q]) for name, q in asked.items()} | {"grad": dict(seen.grad)}
    for rank, got in enumerate(ranks(2)(_fsdp, names, scale, reshard, pieces, eval_first)):
        _check(got, want, rank)


def _pulls_alone(rank: int) -> bool:
    """Gradients that wait for a later reduction stay where they are when an observation is refused after its pulls."""
    model, alone = _sharded(), _mlp()
    x, y = _points(*SHARES[rank])
    model.set_requires_gradient_sync(False)
    F.cross_entropy(model(x), y).backward()
    model.set_requires_gradient_sync(True)
    with pytest.raises(errors.Undefined, match="max_elements=1"), lw.observe(model, lw.SqrtGGN(max_elements=1)):
        F.cross_entropy(model(x), y).backward()
    waiting = all(p.grad is None for p in model.parameters())
    for net in (model, alone, alone):
        F.cross_entropy(net(x), y).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.distributed.all_reduce(q.grad)
        torch.testing.assert_close(p.grad.full_tensor(), q.grad / 2, rtol=1e-12, atol=1e-14)
    return waiting


def test_our_pulls_reduce_nothing_under_fsdp() -> None:
    assert all(ranks(2)(_pulls_alone))


class _Distances(nn.Module):
    """A call without row form, whose rule reads the parameter again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.weight)


class _Paired(nn.Module):
    """Distances, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = _Distances()
        self.last = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.pair(x).tanh())
        return self.last(z.tanh())


def _paired(rank: int, sharded: bool) -> dict[str, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(6)
    model = nn.Sequential(_Paired(), nn.Tanh(), nn.Linear(5, C)).double()
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for part in (model[0].pair, model[0], model[2], model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    x, y = _points(*(SHARES[rank] if sharded else (0, N)))
    asked = {"Variance": lw.Variance(), "DiagGGN": lw.DiagGGN(), "KFLR": lw.KFLR(), "ClippedGrad": lw.ClippedGrad(0.1)}
    with lw.observe(model, *asked.values(), scale="sample") as seen:
        F.cross_entropy(model(x), y).backward()
    seen.all_reduce()
    found = {name: _numbers(seen[q]) for name, q in asked.items()} | {"grad": dict(seen.grad)}
    return {
        n: {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in table.items()}
        for n, table in found.items()
    }


def test_fsdp_with_calls_that_read_parameters_again() -> None:
    with pytest.warns(errors.SlowPath):
        want = _paired(0, False)
    for rank, got in enumerate(ranks(2)(_paired, True)):
        _check(got, want, rank)


# -- one process: trainers replace parameters -----------------------------------------------------------------


def _replace(model: nn.Module, how: str) -> None:
    if how == "assign":
        model.load_state_dict({k: v.clone() * 2 for k, v in model.state_dict().items()}, assign=True)
    elif how == "setattr":
        model[2].weight = nn.Parameter(model[2].weight.detach() * 2)
    elif how == "to":
        model.to(torch.float32)
    elif how == "thawed":
        model[0][0].weight.requires_grad_(False)
        model[0][0].weight = nn.Parameter(model[0][0].weight.detach() * 2)


def _step(model: nn.Module, observation: Any = None) -> lw.Seen:
    x, y = _points()
    with observation or lw.observe(model, lw.Variance(), lw.KFLR()) as seen:
        F.cross_entropy(model(x.to(model[2].weight.dtype)), y).backward()
    return seen


def _replaceable(how: str) -> nn.Module:
    model = _mlp()
    model[0][0].weight.requires_grad_(how != "thawed")
    return model


@pytest.mark.parametrize("how", ["assign", "setattr", "to", "thawed"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_replaced_parameters_keep_their_names(how: str, when: str) -> None:
    model, (x, y) = _replaceable(how), _points()
    observation = lw.observe(model, lw.Variance(), lw.KFLR())
    if when == "before":
        _replace(model, how)
    with observation as seen:
        if when == "inside":
            _replace(model, how)
        F.cross_entropy(model(x.to(model[2].weight.dtype)), y).backward()
    want = _step(model)
    assert set(want.grad) == set(dict(model.named_parameters()))
    _assert_same(dict(seen.grad), dict(want.grad))
    _assert_same(_numbers(seen.variance), _numbers(want.variance))
    _assert_same(_numbers(seen.kflr), _numbers(want.kflr))


@pytest.mark.parametrize("how", ["assign", "setattr", "thawed"])
def test_parameters_replaced_between_two_backward_passes(how: str) -> None:
    model, (x, y) = _replaceable(how), _points()
    with lw.observe(model) as seen:
        F.cross_entropy(model(x), y).backward()
        _replace(model, how)
        F.cross_entropy(model(x), y).backward()
    first, last = _step(_replaceable(how)).grad, _step(model).grad
    want = {name: first[name] + g if name in first else g for name, g in last.items()}
    _assert_same(dict(seen.grad), want)


def test_a_parameter_replaced_between_forward_and_backward_is_refused() -> None:
    model, (x, y) = _mlp(), _points()
    with lw.observe(model, lw.Variance()):
        first = F.cross_entropy(model(x), y)
        _replace(model, "setattr")
        with pytest.raises(errors.BadInput, match=r"tensors of 2\.weight are no longer the model's"):
            (first + F.cross_entropy(model(x), y)).backward()


def test_a_parameter_used_before_it_is_the_models_is_refused() -> None:
    model, (x, y) = _mlp(), _points()
    w = nn.Parameter(torch.randn(C, 5).double())
    with lw.observe(model, lw.Variance()):
        z = F.linear(model[:2](x), w)
        model[2].weight = w
        with pytest.raises(errors.BadInput, match=r"'2.weight' was used before"):
            F.cross_entropy(z, y).backward()


def test_exchanged_parameters_are_refused() -> None:
    model, (x, y) = _mlp(), _points()
    model.append(nn.Linear(C, C).double()).append(nn.Linear(C, C).double())
    with lw.observe(model, lw.Variance()):
        model[3].weight, model[4].weight = model[4].weight, model[3].weight
        with pytest.raises(errors.BadInput, match=r"'3.weight' was '4.weight' when"):
            F.cross_entropy(model(x), y).backward()


# -- DDP: what trainers do, and what is this rank's own ---------------------------------------------------------


class _Two(nn.Module):
    """A head for each rank, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, C) for _ in range(3))
        self.double()

    def forward(self, x: Tensor, head: int) -> Tensor:
        z: Tensor = self.heads[head](self.body(x).tanh())
        return z


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "view": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static view": {"static_graph": True, "gradient_as_bucket_view": True},
}


def _ddp(rank: int, options: dict[str, Any], outside: bool) -> None:
    """Three steps, some without synchronisation, beside DDP that nobody observes."""
    model, plain = _mlp(), DistributedDataParallel(_mlp(), **options)
    run = DistributedDataParallel(model, **options)
    (start, stop) = SHARES[rank]
    x, y = _points(start, stop)
    quantities = [lw.Variance(), lw.DiagGGN(), lw.ClippedGrad(0.1), lw.DiagHessian(), lw.KFLR(), lw.PerSampleGrad()]
    for step in range(4):
        sync = step != 1 or options.get("static_graph")
        with lw.observe(run if outside else model, *quantities) as seen, nullcontext() if sync else run.no_sync():
            F.cross_entropy(run(x), y).backward()
        with nullcontext() if sync else plain.no_sync():
            F.cross_entropy(plain(x), y).backward()
        own = _mlp()
        with lw.observe(own, *quantities) as want:
            F.cross_entropy(own(x), y).backward()
        for name in want.grad:  # this rank's own, whatever DDP has put into `.grad`
            mine = f"module.{name}" if outside else name
            torch.testing.assert_close(seen.grad[mine], want.grad[name], rtol=1e-12, atol=1e-14)
            for q in (0, 1, 2, 3, 5):
                torch.testing.assert_close(seen[quantities[q]][mine], want[quantities[q]][name], rtol=1e-12, atol=1e-14)
        for p, q in zip(run.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        if step != 1:
            for net in (run, plain):
                net.zero_grad(set_to_none=step % 2 == 0)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_ddp_is_as_without_and_results_are_the_ranks_own(options: str, outside: bool) -> None:
    ranks(2)(_ddp, OPTIONS[options], outside)


def _own(rank: int, outside: bool) -> None:
    """A loss of one's own of what DDP returns, through the node that it puts behind the module's output."""
    model, own = _mlp(), _mlp()
    run = DistributedDataParallel(model, find_unused_parameters=True)
    x, y = _points(*SHARES[rank])
    asked = [lw.Variance(), lw.DiagGGN()]
    with lw.observe(run if outside else model, *asked) as seen:
        _own_loss(run(x), y).backward()
    with lw.observe(own, *asked) as want:
        _own_loss(own(x), y).backward()
    for q in asked:
        for (name, got), value in zip(seen[q].items(), want[q].values(), strict=True):
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("outside", [True, False])
def test_a_loss_of_ones_own_under_ddp(outside: bool) -> None:
    ranks(2)(_own, outside)


def _heads(rank: int, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Each rank uses a head of its own: DDP gives both a gradient on both ranks."""
    model = _Two()
    run = DistributedDataParallel(model, find_unused_parameters=True)
    x, y = _points(*SHARES[rank])
    asked = {name: QUANTITIES[name]() for name in names}
    with lw.observe(model, *asked.values()) as seen:
        F.cross_entropy(run(x, rank), y).backward()
    assert model.heads[1 - rank].weight.grad is not None
    assert f"heads.{1 - rank}.weight" not in seen.grad
    seen.all_reduce()
    return {name: _numbers(seen[q]) for name, q in asked.items()} | {"grad": dict(seen.grad)}


def test_a_parameter_that_one_rank_used() -> None:
    names = [name for name in QUANTITIES if name not in ("DiagHessian sampled", "DiagHessian samples")]
    asked = {name: QUANTITIES[name]() for name in names}
    model = _Two()
    with lw.observe(model, *asked.values()) as seen:
        for rank, (x, y, share) in enumerate(_parts(_points, SHARES)):
            (F.cross_entropy(model(x, rank), y) * share).backward()
    want = {name: _numbers(seen[q]) for name, q in asked.items()} | {"grad": dict(seen.grad)}
    for rank, got in enumerate(ranks(2)(_heads, names)):
        assert set(got["grad"]) == {n for n, _ in model.named_parameters() if not n.startswith("heads.2")}
        _check(got, want, rank)


class _Packed(nn.Module):
    """Two of three slices of one weight, on rank 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.body = nn.Linear(4, C)
        self.packed = nn.Parameter(torch.randn(3 * C, 4))
        self.double()

    def forward(self, x: Tensor, packed: bool) -> Tensor:
        z: Tensor = self.body(x)
        if packed:
            query, _, value = self.packed.chunk(3)
            z = z + F.linear(x, query) * F.linear(x, value).sigmoid()
        return z


def _slices(rank: int) -> Any:
    model = _Packed()
    x, y = _points(*SHARES[rank])
    with lw.observe(model, lw.KFLR()) as seen:
        F.cross_entropy(model(x, not rank), y).backward()
    return _products(seen.all_reduce(), model)


def _products(seen: lw.Seen, model: nn.Module) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(4)
    vector = {name: torch.randn(p.shape, generator=gen).double() for name, p in model.named_parameters()}
    return _numbers(seen.kflr) | {f"product {name}": v for name, v in (seen.kflr @ vector).items()}


def test_slices_that_one_rank_used() -> None:
    model = _Packed()
    with lw.observe(model, lw.KFLR()) as seen:
        for rank, (x, y, share) in enumerate(_parts(_points, SHARES)):
            (F.cross_entropy(model(x, not rank), y) * share).backward()
    want = _products(seen, model)
    assert {"packed[0] 0", "packed[1] 0", "packed[rest] 0"} <= want.keys()
    for got in ranks(2)(_slices):
        _assert_same(got, want)


# -- what does not join is refused on all ranks -----------------------------------------------------------------


def _own_loss(z: Tensor, y: Tensor) -> Tensor:
    return (z.square().sum(1) + y).sum()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _refused(rank: int, what: str) -> str:
    model, loss, quantities = _mlp(), _even, [lw.Variance()]
    x, y = _points(*SHARES[rank])
    scale = "loss"
    if what == "loss" and rank:
        loss = _sum
    if what == "own loss":
        loss = _own_loss
    if what == "quantities" and rank:
        quantities = [lw.SecondMoment()]
    if what == "options":
        quantities = [lw.ClippedGrad(1.0 + rank)]
    if what == "seed":
        quantities = [lw.Sketch(3, torch.Generator().manual_seed(rank))]
    if what == "basis":
        with lw.observe(model, lw.KFLR()) as before:
            loss(model(x), y).backward()
        quantities = [lw.EKFAC(basis=before.kflr)]
    if what == "parameters" and rank:
        model[2].bias.requires_grad_(False)
    if what == "shapes" and rank:
        model[0] = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    if what == "type" and rank:
        model.float()
    if what == "clipped":
        quantities = [lw.ClippedGrad(1.0)]
    if what in REFUSED:
        quantities = [REFUSED[what]()]
    if what == "scale" and rank:
        scale = "sample"
    with lw.observe(model, *quantities, scale=scale) as seen:
        if not (what == "idle" and rank):
            loss(model(x.to(model[2].weight.dtype)), y).backward()
        if what == "further":
            seen.all_reduce()
            with pytest.raises(errors.BadInput) as further:
                loss(model(x), y).backward()
            return _told(further.value)
    with pytest.raises(errors.LayerwiseError) as refused:
        seen.all_reduce()
        seen.all_reduce()
    return _told(refused.value)


UNJOINED = {
    "loss": "BadInput: asked to join the results of rank 1.*no loss in common",
    "own loss": "BadInput.*whether the loss.* is a mean or a sum is not said",
    "quantities": r"BadInput.*rank 0: \(?\[?Variance\(\).*rank 1: \(?\[?SecondMoment\(\)",
    "options": r"BadInput.*ClippedGrad\(1\).*ClippedGrad\(2\)",
    "seed": "BadInput: the ranks disagree on 'quantity 0'.*_seed",
    "basis": "BadInput: the ranks disagree on 'quantity 0'.*basis",
    "parameters": "BadInput: the ranks disagree on '2.bias'.*rank 1: nothing of that name",
    "shapes": r"BadInput: the ranks disagree on '0.0.weight': rank 0: \(\(6, 4\).*rank 1: \(\(7, 4\)",
    "type": "BadInput: the ranks disagree on '0.0.weight': .*float64.*float32",
    "clipped": "Undefined: asked to join the results of rank 1.*ClippedGrad of several",
    "scale": "BadInput: the ranks disagree on 'scale'",
    "idle": "NoBackward.*on rank 1",
    "PairwiseDot": "Undefined: asked to join the results of rank 1.*PairwiseDot of 5 samples and 3 more",
    "KFRA": "Undefined: asked to join the results of rank 1.*KFLR, whose factors join",
    "further": "BadInput: asked to observe a further backward pass after all_reduce",
    "twice": "BadInput: asked for a second all_reduce",
}


@pytest.mark.parametrize("what", UNJOINED)
def test_what_has_no_union_is_refused_on_all_ranks(what: str) -> None:
    for text in ranks(2)(_refused, what):
        assert re.search(UNJOINED[what], text), text


def _clipped(rank: int, reduction: str, scale: str) -> dict[str, Tensor]:
    model, (x, y) = _mlp(), _points(*SHARES[rank])
    with lw.observe(model, lw.ClippedGrad(0.5), scale=scale) as seen:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    seen.all_reduce()
    return dict(seen.clipped_grad) | {"norms": seen.clipped_grad.norms}


@pytest.mark.parametrize(("reduction", "scale"), [("sum", "loss"), ("sum", "sample"), ("mean", "sample")])
def test_clipped_gradients_over_ranks(reduction: str, scale: str) -> None:
    model, (x, y) = _mlp(), _points()
    with lw.observe(model, lw.ClippedGrad(0.5), scale=scale) as seen:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    for share, got in zip(SHARES, ranks(2)(_clipped, reduction, scale), strict=True):
        norms = seen.clipped_grad.norms[slice(*share)]
        _assert_same(got, dict(seen.clipped_grad) | {"norms": norms})


def _drawn(rank: int) -> tuple[dict[str, Tensor], ...]:
    """Sampled quantities, and the sum of what the ranks hold by themselves."""
    from layerwise.ranks.group import Ranks

    model, (x, y) = _mlp(), _points(*SHARES[rank])
    asked = [
        lw.KFAC(2, torch.Generator().manual_seed(rank)),
        lw.FisherDiag("model", 2, torch.Generator().manual_seed(rank)),
        lw.EKFAC(2, torch.Generator().manual_seed(rank)),
    ]
    with lw.observe(model, *asked) as seen:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    outputs = {name: factors[-1].clone() for name, factors in seen.kfac.factors.items()}
    inputs = {name: factors[0] * len(x) / N for name, factors in seen.kfac.factors.items() if len(factors) == 2}
    summed = [Ranks().sum(list(t.values())) for t in (outputs, inputs, dict(seen.fisher_diag))]
    traces = {name: seen.ekfac.to_dense(name).trace() for name in outputs}
    traces = dict(zip(traces, Ranks().sum(list(traces.values())), strict=True))
    seen.all_reduce()
    got = {f"B {n}": f[-1] for n, f in seen.kfac.factors.items()}
    got |= {f"A {n}": f[0] for n, f in seen.kfac.factors.items() if len(f) == 2} | dict(seen.fisher_diag)
    want = {f"B {n}": t for n, t in zip(outputs, summed[0], strict=True)}
    want |= {f"A {n}": t for n, t in zip(inputs, summed[1], strict=True)}
    want |= dict(zip(seen.fisher_diag, summed[2], strict=True))
    got |= {f"trace {n}": seen.ekfac.to_dense(n).trace() for n in traces}
    return got, want | {f"trace {n}": t for n, t in traces.items()}


def test_sampled_quantities_add_up() -> None:
    for got, want in ranks(2)(_drawn):
        _assert_same(got, want)


# -- accumulate -------------------------------------------------------------------------------------------------


def _streamed(rank: int, names: list[str], wrap: str, sizes: Any) -> dict[str, dict[str, Tensor]]:
    asked = {name: QUANTITIES[name]() for name in names}
    model: nn.Module = _sharded() if wrap == "fsdp" else _mlp()
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    x, y = _points(*SHARES[rank])
    batches = list(zip(x.split(sizes[rank]), y.split(sizes[rank]), strict=True))
    seen = lw.accumulate(model, F.cross_entropy, batches, *asked.values())
    assert all(p.grad is None for p in model.parameters())
    found = {name: _numbers(seen[q]) for name, q in asked.items()} | {"grad": dict(seen.grad)}
    return {
        n: {k.replace("module.", ""): v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in table.items()}
        for n, table in found.items()
    }


@pytest.mark.parametrize(("wrap", "sizes"), [("none", (2, 3)), ("ddp", (2, 3)), ("fsdp", (3, 2))])
def test_accumulate_over_ranks(wrap: str, sizes: Any) -> None:
    """Every rank streams its own share; EKFAC's two passes have the basis of all shares."""
    names = ["Variance", "KFLR", "EKFAC", "NoiseScale", "SquaredNorm", "DiagHessian"]
    asked = {name: QUANTITIES[name]() for name in names}
    want = lw.accumulate(_mlp(), F.cross_entropy, [_points()], *asked.values())
    tables = {name: _numbers(want[q]) for name, q in asked.items()} | {"grad": dict(want.grad)}
    for rank, got in enumerate(ranks(2)(_streamed, names, wrap, sizes)):
        _check(got, tables, rank)


def _failing(rank: int, what: str) -> str:
    model: nn.Module = _sharded() if what in ("steps", "nan in step") else _mlp()
    x, y = _points(*SHARES[rank])
    batches: Any = list(zip(x.split(2), y.split(2), strict=True))
    quantities: list[lw.Quantity] = [lw.Variance()]
    options: dict[str, Any] = {}
    if what.startswith("nan") and rank:
        batches[1] = (batches[1][0] * float("nan"), batches[1][1])
    if what == "empty" and rank:
        batches = []
    if what == "model" and rank:
        model[2] = nn.Linear(5, C + 1).double()
    if what == "frozen" and rank:
        model[2].bias.requires_grad_(False)
    if what == "iterator":
        quantities = [lw.EKFAC()]
        batches = iter(batches) if rank else batches
    if what == "group":
        options = {"distributed": False, "group": torch.distributed.group.WORLD}
    with pytest.raises(errors.LayerwiseError) as error:
        lw.accumulate(model, F.cross_entropy, batches, *quantities, **options)
    return _told(error.value)


FAILED = {  # on rank 0, on rank 1
    "nan": ("RankFailed: rank 1 failed with NonFinite: .*This rank, 0", "NonFinite: "),
    "nan in step": ("RankFailed: rank 1 failed with NonFinite: ", "NonFinite: "),
    "empty": ("RankFailed: rank 1 failed with BadInput: .*no batch", "BadInput: .*no batch"),
    "model": (r"BadInput: the ranks disagree on '2.weight': rank 0: \(\(3, 5\)", "BadInput: .*'2.weight'"),
    "frozen": ("BadInput: the ranks disagree on '2.bias': .*trained.*frozen", "BadInput: .*'2.bias'"),
    "iterator": ("RankFailed: rank 1 failed with BadInput: .*iterator", "BadInput: .*over an iterator"),
    "steps": ("BadInput: .*rank 1 ended after 2 batches", "BadInput: .*rank 1 ended after 2 batches"),
    "group": ("BadInput: .*distributed=False", "BadInput: .*distributed=False"),
}


@pytest.mark.parametrize("what", FAILED)
def test_an_error_on_one_rank_is_one_on_all(what: str) -> None:
    for text, pattern in zip(ranks(2)(_failing, what), FAILED[what], strict=True):
        assert re.match(pattern, text, re.DOTALL), text


def _by_itself(rank: int) -> dict[str, Tensor]:
    x, y = _points(*SHARES[rank])
    return dict(lw.accumulate(_mlp(), F.cross_entropy, [(x, y)], lw.Variance(), distributed=False).variance)


def test_accumulate_by_itself() -> None:
    for share, got in zip(SHARES, ranks(2)(_by_itself), strict=True):
        _assert_same(got, dict(lw.accumulate(_mlp(), F.cross_entropy, [_points(*share)], lw.Variance()).variance))


# -- the noise scale between ranks ------------------------------------------------------------------------------


def _noise(rank: int, wrap: str) -> list[Any]:
    """One step under DDP or FSDP2 with 5 and 3 samples, by the formulas of McCandlish et al. by hand."""
    model: nn.Module = _sharded() if wrap == "fsdp" else DistributedDataParallel(_mlp())
    x, y = _points(*SHARES[rank])
    with lw.observe(model) as seen:
        F.cross_entropy(model(x), y).backward()
    running = lw.distributed.RankNoise()
    found = running.update(seen.grad, (p.grad for p in model.parameters()), len(x))
    assert running.average == found
    return list(found)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_noise_between_ranks_is_the_formula(wrap: str) -> None:
    own = []
    for share in SHARES:
        x, y = _points(*share)
        model = _mlp()
        F.cross_entropy(model(x), y).backward()
        own.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    mean = (own[0] + own[1]) / 2
    small, big = float(own[0] @ own[0] + own[1] @ own[1]) / 2, float(mean @ mean)
    b_small = 2 / (1 / 5 + 1 / 3)
    b_big = 2 * b_small
    signal = (b_big * big - b_small * small) / (b_big - b_small)
    noise = (small - big) / (1 / b_small - 1 / b_big)
    for got in ranks(2)(_noise, wrap):
        assert got == pytest.approx([noise, signal], rel=1e-10)


def _simulated(rank: int) -> tuple[float, ...]:
    """Gradients G + noise / sqrt(n), tr(Sigma) = 3 and |G|² = 2; both ranks know the other's draws."""
    gen = torch.Generator().manual_seed(11)
    truth = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    numbers = (5, 3)
    plain, falling = lw.distributed.RankNoise(), lw.distributed.RankNoise(decay=0.5)
    sums, steps = torch.zeros(2, dtype=torch.float64), []
    for _ in range(200):
        own = [truth + torch.randn(3, generator=gen, dtype=torch.float64) / n**0.5 for n in numbers]
        mean = (own[0] + own[1]) / 2
        found = plain.update({"w": own[rank]}, {"w": mean}, numbers[rank])
        falling.update([own[rank], None], [mean, None], numbers[rank])
        sums += torch.tensor([*found])
        steps.append(found.noise)
    assert plain.average == pytest.approx((sums / 200).tolist())
    weights = [0.5 ** (200 - i) for i in range(200)]
    expected = sum(w * s for w, s in zip(weights, steps, strict=True)) / sum(weights)
    assert falling.average.noise == pytest.approx(expected)
    again = lw.distributed.RankNoise()
    again.load_state_dict(plain.state_dict())
    assert again.scale == plain.scale == plain.average.noise / plain.average.signal
    error = torch.tensor(steps).std() / 200**0.5
    return plain.average.noise, plain.average.signal, float(error)


def test_noise_between_ranks_is_unbiased() -> None:
    first, second = ranks(2)(_simulated)
    assert first == second
    noise, signal, error = first
    assert abs(noise - 3) < 4 * error
    assert abs(signal - 2) < 4 * 0.1  # its standard error: sqrt(4 |G|² Sigma / n / 200), about 0.08


def _no_samples(rank: int) -> str:
    with pytest.raises(errors.BadInput) as error:
        lw.distributed.noise_of_ranks([torch.ones(2)], [torch.ones(2)], rank)
    return str(error.value)


def test_noise_between_ranks_refuses() -> None:
    assert all(r"got [0, 1]" in text for text in ranks(2)(_no_samples))
    with pytest.raises(errors.Undefined, match="one process"):
        lw.distributed.noise_of_ranks([torch.ones(2)], [torch.ones(2)], 4)
    with pytest.raises(errors.BadInput, match="decay"):
        lw.distributed.RankNoise(decay=1.0)
    with pytest.raises(errors.NoBackward, match="no step"):
        _ = lw.distributed.RankNoise().average


# -- models that cannot be followed -----------------------------------------------------------------------------


def _operators(rank: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    said = []
    x, y = _points()
    model = _sharded()
    for make in (lw.GGN, lw.Hessian, lw.PCH):
        with pytest.raises(errors.UnsupportedCall) as error:
            operator = make(model, lambda: F.cross_entropy(model(x), y))
            operator @ {name: torch.ones(p.shape).double() for name, p in model.named_parameters()}
        said.append(str(error.value))
    for make in (lw.optim.KFAC, lw.optim.DiagNewton, lw.optim.Preconditioner):
        with pytest.raises(errors.BadInput, match=r"0\.0\.weight is a DTensor"):
            make(model)
    split = nn.Sequential(nn.Linear(4, 6)).double()
    parallelize_module(split, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    with pytest.raises(errors.UnsupportedCall) as error, lw.observe(split, lw.Variance()):
        split(x).sum().backward()
    return [*said, str(error.value)]


def test_other_sharded_models_are_refused_by_name() -> None:
    for said in ranks(2)(_operators):
        assert all("'0.0.weight' is sharded by fully_shard" in text for text in said[:3]), said
        assert "'0.weight' as a DTensor" in said[3], said


def _same(rank: int, what: str) -> str:
    model = _mlp()
    if what == "order" and rank:
        model[2] = nn.ParameterDict({"bias": model[2].bias, "weight": model[2].weight})
    if what == "dtype" and rank:
        model[2].half()
    if what == "same":
        lw.distributed.check_same_model(dict(model.named_parameters()))
        return ""
    with pytest.raises(errors.BadInput) as error:
        lw.distributed.check_same_model(model)
    return str(error.value)


def test_the_same_model_on_all_ranks() -> None:
    assert ranks(2)(_same, "same") == ["", ""]
    assert all("'the order of the parameters'" in text for text in ranks(2)(_same, "order"))
    assert all("'2.weight'" in text and "float16" in text for text in ranks(2)(_same, "dtype"))
    lw.distributed.check_same_model(_mlp())


def _page(rank: int, blocks: list[str]) -> float:
    scope: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"distributed.md, snippet {number}", "exec"), scope)
    return float(scope["seen"].variance.total)


def test_the_page_runs_on_two_ranks() -> None:
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    section = re.findall(r"^## Quantities\n(.*?)^## ", text, flags=re.DOTALL | re.MULTILINE)[0]
    blocks = re.findall(r"```py\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) >= 6
    first, second = ranks(2)(_page, blocks)
    assert first == second > 0
