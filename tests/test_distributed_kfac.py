"""K-FAC and all preconditioners over ranks, against one process on the whole batch, in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import layerwise as lw
from layerwise.errors import BadInput, NonFinite
from layerwise.operators.kronecker import KroneckerBlock
from layerwise.optim import DataParallel
from layerwise.optim.second_order.averages import Inverse, invert
from layerwise.optim.second_order.exchange import block_owners
from layerwise.replay.state import seed_of

pytestmark = pytest.mark.usefixtures("float64")

Settings = dict[str, Any]
CUT = (4, 11)  # rows of rank 0 and rank 1
CUTS = {2: CUT, 4: (4, 3, 6, 2)}  # of so many ranks


class Net(nn.Module):
    """Grouped convolution, norm, packed attention, a layer used twice; one output where the draws must not matter."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).mT.tanh())
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.twice(self.twice(h).tanh()).mean(1))


def perceptron(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs))


MODELS: dict[str, Callable[[int], nn.Module]] = {"net": Net, "perceptron": perceptron}


def batch(step: int, rank: int | None, even: bool = False) -> tuple[Tensor, Tensor]:
    """The rows of a rank at a step, or all."""
    generator = torch.Generator().manual_seed(step)
    n = 8 if even else sum(CUT)
    x, y = torch.randn(n, 4, 5, generator=generator), torch.randint(3, (n,), generator=generator)
    if rank is None:
        return x, y
    cut = CUTS[dist.get_world_size() if dist.is_initialized() else 2]
    parts = [n // len(cut)] * len(cut) if even else cut
    return x.split(parts)[rank], y.split(parts)[rank]


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor], reduction: str) -> Tensor:
    z = model(data[0])
    if z.shape[1] == 1:  # curvature of one number a sample: the square of a drawn sign is 1
        return F.huber_loss(z[:, 0], data[1].to(z.dtype), reduction=reduction)
    return F.cross_entropy(z, data[1], reduction=reduction)


def optimizer(model: nn.Module, settings: Mapping[str, Any], parallel: DataParallel | None) -> Any:
    given = dict(settings)
    method = getattr(lw.optim, given.pop("method", "KFAC"))
    params = None
    if given.pop("groups", False):
        params = [
            {"params": [p], "damping": 0.02 * (i + 1), "weight_decay": 0.1} for i, p in enumerate(model.parameters())
        ]
    return method(model, params, parallel=parallel, **given)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def digest(model: nn.Module) -> str:
    held = b"".join(p.detach().contiguous().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(held).hexdigest()


def trained(
    rank: int | None, settings: Settings, model_name: str = "perceptron", outputs: int = 3, reduction: str = "mean",
    share: str = "inverses", steps: int = 4,
) -> Settings:  # fmt: skip
    """A few steps, on a rank's parts or on the whole batches."""
    torch.set_default_dtype(torch.float64)
    model = MODELS[model_name](outputs)
    opt = optimizer(model, settings, None if rank is None else DataParallel(share=share))  # type: ignore[arg-type]
    losses = []
    for step in range(steps):
        data = batch(step, rank)
        losses.append(float(opt.step(lambda: loss_of(model, data, reduction))))  # noqa: B023
    return {
        "values": values(model), "digest": digest(model), "losses": losses, "counters": opt.counters,
        "described": opt.describe(), "damping": [group["damping"] for group in opt.param_groups],
    }  # fmt: skip


def check(found: list[Settings], want: Settings) -> None:
    assert len({one["digest"] for one in found}) == 1, "the ranks' parameters differ"
    for one in found:
        oracle.assert_close(one["values"], want["values"], 1e-12)
        assert one["losses"] == pytest.approx(want["losses"], rel=1e-12)
        assert one["damping"] == pytest.approx(want["damping"], rel=1e-12)
        assert (one["counters"], one["described"]) == (want["counters"], want["described"])


# Parameters ------------------------------------------------------------------------------------------------------

EVERY: Settings = {"update_factors_every": 2, "update_inverses_every": 3}
SCALED: Settings = {"kind": "kflr", "kl_clip": None, **EVERY}  # a bound on the step would hide a wrong scale
CASES: dict[str, Settings] = {
    "kflr": {"settings": {**SCALED, "groups": True}, "reduction": "mean"},
    "kflr of sums": {"settings": {**SCALED, "damping_form": "factored"}, "reduction": "sum"},
    "reduced": {"settings": {"kind": "kflr", "sharing": "reduce", "damping_form": "eigen"}, "model_name": "net"},
    "apart": {"settings": {"kind": "kflr", "joint": False, "lr": 0.3}, "model_name": "net", "reduction": "sum"},
    "quadratic": {"settings": {"kind": "kflr", "step_size": "quadratic", "adapt_damping_every": 2, **EVERY}},
    "quadratic, sums": {"settings": {"kind": "foof", "step_size": "quadratic", "momentum": 0.5}, "reduction": "sum"},
    "adaptive": {"settings": {"kind": "kflr", "adapt_damping_every": 1, "lr": 0.05}, "reduction": "sum"},
    "foof": {"settings": {"kind": "foof", **EVERY}, "model_name": "net"},
    "kfac, drawn signs": {"settings": {"kind": "kfac", "draws": 2, **EVERY}, "model_name": "net", "outputs": 1},
    "diagonals": {"settings": {"kind": "kfac", "largest_factor": 5, **EVERY}, "outputs": 1},
    "ggn": {"settings": {"method": "DiagNewton", "draws": None, "update_every": 2}, "model_name": "net"},
    "hessian": {"settings": {"method": "DiagNewton", "kind": "diag-hessian", "draws": None}, "reduction": "sum"},
    "hessian, drawn": {"settings": {"method": "DiagNewton", "kind": "diag-hessian", "draws": 2}, "model_name": "net"},
}  # fmt: skip
# of factors of full rank: eigenvectors of a repeated eigenvalue are anybody's choice, and rounding's
EKFAC: dict[str, Settings] = {
    "ekfac": {"settings": {"kind": "ekfac", **EVERY}, "model_name": "net", "outputs": 1},
    "ekfac of sums": {"settings": {"kind": "ekfac", **EVERY}, "model_name": "net", "outputs": 1, "reduction": "sum"},
}


def on_every_rank(rank: int, cases: dict[str, Settings], share: str) -> dict[str, Settings]:
    return {name: trained(rank, **case, share=share) for name, case in cases.items()}


def check_parts(size: int, cases: dict[str, Settings], share: str) -> None:
    """Every case on so many ranks against one process with the whole batch."""
    found = ranks(size)(on_every_rank, cases, share)
    for name, case in cases.items():
        try:
            check([one[name] for one in found], trained(None, **case))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("share", ["inverses", "updates"])
def test_steps_on_uneven_parts_equal_steps_on_the_whole_batch(share: str) -> None:
    check_parts(2, CASES | EKFAC if share == "inverses" else CASES, share)


@pytest.mark.slow
@pytest.mark.parametrize("share", ["inverses", "updates"])
def test_four_ranks_equal_the_whole_batch(share: str) -> None:
    check_parts(4, CASES, share)


def adamw(rank: int | None, share: str) -> Settings:
    torch.set_default_dtype(torch.float64)
    model = Net()
    parallel = None if rank is None else DataParallel(share=share)  # type: ignore[arg-type]
    pre = lw.optim.Preconditioner(model, "kflr", parallel=parallel, **EVERY)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(4):
        opt.zero_grad()
        with pre.watch():
            loss_of(model, batch(step, rank), "mean").backward()
        assert pre.step()
        opt.step()
    return {"values": values(model), "digest": digest(model)}


@pytest.mark.parametrize("share", ["inverses", "updates"])
def test_in_front_of_adamw(share: str) -> None:
    found, want = ranks(2)(adamw, share), adamw(None, share)
    assert found[0]["digest"] == found[1]["digest"]
    for one in found:
        oracle.assert_close(one["values"], want["values"], 1e-12)


def drawn(rank: int) -> dict[str, list[Tensor]]:
    torch.set_default_dtype(torch.float64)
    model = perceptron()
    pre = lw.optim.Preconditioner(model, "kfac", joint=False, seed=3, parallel=DataParallel())
    with pre.watch():
        loss_of(model, batch(0, rank), "mean").backward()
    pre.step()
    return {name: [its["A"], its["B"]] for name, its in pre.state_dict()["blocks"].items()}


def test_labels_are_drawn_for_each_rank_and_their_factors_join() -> None:
    found = ranks(2)(drawn)
    model = perceptron()
    sums: dict[str, list[Tensor]] = {}
    for rank, rows in enumerate(CUT):
        seed = seed_of(3, 0)
        generator = torch.Generator().manual_seed(seed_of(seed, rank) if rank else seed)
        kfac = lw.KFAC(generator=generator)
        with lw.observe(model, kfac) as seen:
            loss_of(model, batch(0, rank), "mean").backward()
        for name, factors in seen[kfac].factors.items():
            a = factors[0] if len(factors) == 2 else torch.ones(1, 1, 1)
            weighed = [x * rows / sum(CUT) for x in (a, factors[-1])]
            sums[name] = [x + y for x, y in zip(sums[name], weighed, strict=True)] if name in sums else weighed
    for one in found:
        for name, (a, b) in sums.items():
            oracle.assert_close({"B": one[name][1]}, {"B": b}, 1e-12)
            if one[name][0] is not None:
                oracle.assert_close({"A": one[name][0]}, {"A": a}, 1e-12)


# The ladder of factorizations ------------------------------------------------------------------------------------


def failing_ladder(rank: int | None, share: str) -> Settings:
    """K-FAC whose first weight cannot be inverted at the first time, and whose last one cannot at the third."""
    import layerwise.optim.second_order.blocks as module

    count: dict[str, int] = {}

    def broken(name: str, block: Any, damping: float, form: str, last: Any = None) -> Inverse:
        count[name] = count.get(name, 0) + 1
        if name == "1.weight" and count[name] == 1:
            block = type(block)(block.A * float("nan"), block.B)
        if name == "5.weight" and count[name] == 3:
            block = type(block)(block.A, block.B * float("nan"))
        return invert(name, block, damping, form, last)

    module.invert = broken  # type: ignore[assignment]
    try:
        settings = {"kind": "kflr", "update_factors_every": 1, "update_inverses_every": 1}
        return {steps: trained(rank, settings, share=share, steps=steps) for steps in (1, 2, 3, 4)}  # type: ignore[misc]
    finally:
        module.invert = invert


@pytest.mark.parametrize("share", ["inverses", "updates"])
def test_blocks_that_cannot_be_inverted_are_treated_alike_on_all_ranks(share: str) -> None:
    found, want = ranks(2)(failing_ladder, share), failing_ladder(None, share)
    check([one[1] for one in found], want[1])
    assert want[1]["counters"]["identity"] == 1
    for steps in want:
        check([one[steps] for one in found], want[steps])


# DistributedDataParallel -------------------------------------------------------------------------------------------


def wrapped(rank: int | None, reduction: str, backward: bool, share: str, more: Settings) -> Settings:
    """K-FAC of a DDP model on even parts; the closure calls backward, or leaves it to us."""
    torch.set_default_dtype(torch.float64)
    model: nn.Module = Net()
    if rank is not None:
        model = DistributedDataParallel(model)
    opt = optimizer(model, SCALED | more, None if rank is None else DataParallel(share=share))  # type: ignore[arg-type]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, data, reduction)
        if backward:
            loss.backward()
        return loss

    losses = []
    for step in range(4):
        data = batch(step, rank, even=True)
        losses.append(float(opt.step(closure)))
    inner = model.module if rank is not None else model
    assert isinstance(inner, nn.Module)
    return {"values": values(inner), "digest": digest(inner), "losses": losses}


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(
    ("reduction", "share", "more"),
    [
        ("mean", "inverses", {}),
        ("sum", "updates", {}),
        ("sum", "inverses", {"step_size": "quadratic", "adapt_damping_every": 2, "kl_clip": "auto"}),
    ],
)
def test_gradients_averaged_by_ddp_are_told_apart(reduction: str, share: str, more: Settings, backward: bool) -> None:
    given = reduction, backward, share, more
    found, want = ranks(2)(wrapped, *given), wrapped(None, *given)
    assert found[0]["digest"] == found[1]["digest"]
    for one in found:
        oracle.assert_close(one["values"], want["values"], 1e-12)
        assert one["losses"] == pytest.approx(want["losses"], rel=1e-12)


def refused(rank: int, what: str) -> str:
    torch.set_default_dtype(torch.float64)
    model = perceptron()
    ddp = DistributedDataParallel(model)
    data, even = batch(0, rank), batch(0, rank, even=True)
    if what == "no settings":
        return said(lambda: lw.optim.KFAC(ddp))

    def step(owner: nn.Module, run: nn.Module, rows: Any, **more: Any) -> Callable[[], None]:
        pre = lw.optim.Preconditioner(owner, "foof", parallel=DataParallel(**more))

        def go() -> None:
            with pre.watch():
                loss_of(run, rows, "mean").backward()
            pre.step()

        return go

    steps = {
        "uneven": step(ddp, ddp, data),
        "the inner module": step(model, ddp, even),
        "past the wrapper": step(ddp, model, even),
        "the same batch": step(model, model, batch(0, None)),
        "the same batch, meant": step(model, model, batch(0, None), gradients="local"),
        "the inner module, said": step(model, ddp, even, gradients="averaged"),
    }
    before = digest(model)
    text = said(steps[what])
    assert digest(model) == before
    return text


def said(function: Callable[[], Any], kind: type[Exception] = BadInput) -> str:
    try:
        function()
    except kind as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("no settings", "pass parallel="), ("uneven", "0.2667, 0.7333"), ("the inner module", "are the same"),
        ("past the wrapper", "differ between ranks"), ("the same batch", "same batch"),
        ("the same batch, meant", "no error"), ("the inner module, said", "no error"),
    ],
)  # fmt: skip
def test_gradients_that_are_not_what_they_are_taken_for_are_refused(what: str, text: str) -> None:
    for error in ranks(2)(refused, what):
        assert text in error


# Losses that ranks have in common ------------------------------------------------------------------------------------


def by_hand(rank: int | None, reduction: str | None) -> Settings | str:
    torch.set_default_dtype(torch.float64)
    model = perceptron()
    parallel = None if rank is None else DataParallel(reduction=reduction or "auto")  # type: ignore[arg-type]
    opt = lw.optim.KFAC(model, kind="kflr", kl_clip=None, parallel=parallel)

    def closure() -> Tensor:
        loss = loss_of(model, data, "sum")
        return loss / (len(data[0]) if reduction != "sum" else 10)

    for step in range(3):
        data = batch(step, rank)
        if reduction is None and rank is not None:
            return said(lambda: opt.step(closure))
        opt.step(closure)
    return {"values": values(model)}


@pytest.mark.parametrize("reduction", ["mean", "sum", None])
def test_a_loss_that_is_reduced_by_hand_needs_a_word(reduction: str | None) -> None:
    found, want = ranks(2)(by_hand, reduction), by_hand(None, reduction)
    for one in found:
        if reduction is None:
            assert 'DataParallel(reduction="mean")' in one
        else:
            oracle.assert_close(one["values"], want["values"], 1e-12)  # type: ignore[index]


def odd_parts(rank: int, what: str) -> str:
    torch.set_default_dtype(torch.float64)
    model, (x, y) = perceptron(), batch(0, rank)
    opt = lw.optim.KFAC(model, kind="kflr", parallel=DataParallel())
    before = digest(model)
    model[1].weight.requires_grad_(what != "frozen" or not rank)

    def closure() -> Tensor:
        if what == "mixed":
            return F.cross_entropy(model(x), y, reduction="sum" if rank else "mean")
        if what == "failing" and rank:
            raise ValueError("no such file")
        return F.cross_entropy(model(x) if rank or what != "unused" else model[:-1](x), y)

    found = said(lambda: opt.step(closure), Exception)
    assert digest(model) == before
    assert opt.preconditioner.steps == 0 and not opt.preconditioner.state_dict()["blocks"]
    return found


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("mixed", "have no union"),
        ("unused", "but the kflr of 5.weight has no sum over them: the batch of rank 0 does not use 5.weight;"),
        ("frozen", "but the kflr of 1.weight has no sum over them: 1.weight is frozen on rank 1; freeze it on all"),
    ],
)
def test_parts_without_a_union_are_refused_on_all_ranks(what: str, text: str) -> None:
    for error in ranks(2)(odd_parts, what):
        assert text in error


def test_a_rank_that_fails_stops_the_others() -> None:
    first, second = ranks(2)(odd_parts, "failing")
    assert "rank 1 failed with ValueError: no such file" in first and second == "no such file"


# Faults ----------------------------------------------------------------------------------------------------------


class Normed(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.register_buffer("largest", torch.zeros(()))


def state(model: nn.Module, opt: Any) -> str:
    held = {"model": model.state_dict(), "opt": {k: v for k, v in opt.state_dict().items() if k != "skipped"}}
    held["opt"].get("preconditioner", {}).pop("skipped", None)
    return repr([torch.as_tensor(t).tolist() for t in leaves(held)])


def leaves(x: Any) -> list[Any]:
    if isinstance(x, Mapping):
        return [leaf for value in x.values() for leaf in leaves(value)]
    if isinstance(x, (list, tuple)):
        return [leaf for value in x for leaf in leaves(value)]
    return [x] if isinstance(x, (Tensor, float, int)) else []


def one_bad(rank: int, where: str, share: str, on_nonfinite: str, bad_step: int) -> Settings:
    torch.set_default_dtype(torch.float64)
    model = Normed()
    settings = {"kind": "kfac", "on_nonfinite": on_nonfinite, "step_size": "quadratic", **EVERY}
    opt = optimizer(model, settings, DataParallel(share=share))  # type: ignore[arg-type]
    raised = ""
    for step in range(4):
        x, y = batch(step, rank)
        before = state(model, opt)
        bad = step == bad_step and rank == 1

        def closure() -> Tensor:
            loss = F.cross_entropy(model(x), y)  # noqa: B023
            if where == "buffer" and bad:  # noqa: B023
                model.largest.fill_(float("inf"))
            if where == "gradient" and bad:  # noqa: B023
                loss.register_hook(lambda g: g * float("nan"))
            return loss

        if bad and where == "batch":
            x = x * float("inf")
        text = said(lambda: opt.step(closure), NonFinite)
        if step == bad_step:
            raised = text
            assert state(model, opt) == before
    return {"digest": digest(model), "skipped": opt.skipped, "steps": opt.preconditioner.steps, "raised": raised}


@pytest.mark.parametrize("share", ["inverses", "updates"])
@pytest.mark.parametrize(("where", "bad_step"), [("batch", 0), ("batch", 1), ("buffer", 2), ("gradient", 3)])
def test_one_bad_part_is_skipped_by_all_ranks(where: str, bad_step: int, share: str) -> None:
    found = ranks(2)(one_bad, where, share, "skip", bad_step)
    assert len({one["digest"] for one in found}) == 1
    assert all((one["skipped"], one["steps"], one["raised"]) == (1, 3, "no error") for one in found)


def test_one_bad_part_raises_on_all_ranks_and_names_its_rank() -> None:
    for one in ranks(2)(one_bad, "batch", "inverses", "raise", 1):
        assert "rank 1: " in one["raised"] and one["skipped"] == 0


def disagreeing(rank: int, what: str) -> str:
    torch.set_default_dtype(torch.float64)
    model = perceptron(3 + rank) if what == "5.weight" else perceptron()
    if what == "1.bias":
        with torch.no_grad():
            model[1].bias += 1e-9 * rank
    model[3].weight.requires_grad_(what != "3.weight" or rank == 0)
    parallel = DataParallel(share="updates" if what == "share" and rank else "inverses")
    more: Settings = {"lr": 0.1 * rank} if what == "lr" else {"damping": 0.1 + rank} if what == "damping" else {}
    if what == "pre":
        return said(lambda: lw.optim.Preconditioner(model, "kfac", seed=rank, parallel=parallel))
    if what == "diag":
        return said(lambda: lw.optim.DiagNewton(model, draws=1 + rank, parallel=parallel))
    return said(lambda: lw.optim.KFAC(model, parallel=parallel, **more))


@pytest.mark.parametrize("what", ["5.weight", "1.bias", "3.weight", "share", "lr", "damping", "pre", "diag", "nothing"])
def test_ranks_that_disagree_are_refused_at_the_start_by_name(what: str) -> None:
    named = {"pre": "seed", "diag": "draws", "lr": "group 0"}.get(what, what)
    for error in ranks(2)(disagreeing, what):
        assert error == "no error" if what == "nothing" else (named in error and "rank 1" in error)


def unsupported(rank: int) -> list[str]:
    model = perceptron()
    return [
        said(lambda: lw.optim.KFAC(model, kind="kfra", parallel=DataParallel())),
        said(lambda: lw.optim.KFAC(model, kind="ekfac", parallel=DataParallel(share="updates"))),
        said(lambda: lw.optim.KFAC(model, parallel="inverses")),  # type: ignore[arg-type]
        said(lambda: DataParallel(share="factors")),  # type: ignore[arg-type]
    ]


def test_what_ranks_cannot_do_together_is_refused() -> None:
    for texts in ranks(2)(unsupported):
        assert 'use kind="kfac" or "kflr"' in texts[0] and 'DataParallel(share="inverses")' in texts[1]
        assert "must be None or" in texts[2] and "inverses, updates" in texts[3]


# State -------------------------------------------------------------------------------------------------------------

STATE: Settings = {"kind": "kflr", "step_size": "quadratic", "adapt_damping_every": 2, **EVERY}


def resumed(rank: int | None, share: str, saved: Settings | None, first: int) -> Settings:
    """Steps from `first` to 7, from a saved state; what there is at step 4 is saved."""
    torch.set_default_dtype(torch.float64)
    model = Net()
    opt = optimizer(model, STATE, None if rank is None else DataParallel(share=share))  # type: ignore[arg-type]
    if saved is not None:
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
    held = {}
    for step in range(first, 8):
        if step == 4:
            held = copied({"model": model.state_dict(), "opt": opt.state_dict()})
        data = batch(step, rank)
        opt.step(lambda: loss_of(model, data, "mean"))  # noqa: B023
    return {"values": values(model), "digest": digest(model), "saved": held, "described": opt.describe()}


def copied(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    return [copied(value) for value in x] if isinstance(x, list) else x


@pytest.mark.parametrize("share", ["inverses", "updates"])
def test_a_state_goes_on_on_any_number_of_ranks(share: str) -> None:
    other = {"inverses": "updates", "updates": "inverses"}[share]
    whole, alone = ranks(2)(resumed, share, None, 0), resumed(None, share, None, 0)
    first, second = (one["saved"] for one in whole)
    assert repr(leaves(first)) == repr(leaves(second))
    again = ranks(2)(resumed, share, first, 4)
    assert {one["digest"] for one in (*again, *whole)} == {whole[0]["digest"]}  # bitwise
    for found in [resumed(None, share, first, 4), *ranks(2)(resumed, other, alone["saved"], 4)]:
        oracle.assert_close(found["values"], alone["values"], 1e-12)
        assert found["described"] == alone["described"]


# Cost --------------------------------------------------------------------------------------------------------------


def held(rank: int, share: str) -> Settings:
    model = perceptron()
    pre = lw.optim.Preconditioner(model, "kfac", parallel=DataParallel(share=share))  # type: ignore[arg-type]
    with pre.watch():
        loss_of(model, batch(0, rank), "mean").backward()
    pre.step()
    blocks = pre.blocks
    tensors = [t for its in blocks.averages.values() for t in (its.block.A, its.block.B)]  # type: ignore[union-attr]
    inverses = [t for its in blocks.inverses.values() for t in (its.block.A, its.block.B)]  # type: ignore[union-attr]
    here = [sum(t.numel() * t.element_size() for t in some if not t.is_meta) for some in (tensors, inverses)]
    return {"costs": pre.costs(), "here": here}


def test_each_rank_tells_what_it_holds() -> None:
    whole = 4 * (21**2 + 6**2 + 7**2 + 5**2 + 6**2 + 3**2)  # bytes of the factors
    for share in ("inverses", "updates"):
        found = ranks(2)(held, share)
        assert found[0]["costs"] == found[1]["costs"]
        first, second = found[0]["costs"]
        assert first.blocks == ("1.weight",) and second.blocks == ("3.weight", "5.weight")
        assert first.inversion_flops == 21**3 + 6**3 and second.inversion_flops == 7**3 + 5**3 + 6**3 + 3**3
        for its, one in zip((first, second), found, strict=True):
            assert [its.factor_bytes, its.inverse_bytes] == one["here"]
        total = first.factor_bytes + second.factor_bytes
        assert total == (whole if share == "updates" else 2 * whole)


def test_the_longest_inversion_goes_to_the_rank_with_the_least_work() -> None:
    def block(size: int, parameter: str | None = None) -> KroneckerBlock:
        return KroneckerBlock(torch.zeros(1, size, size), torch.zeros(1, size, size), parameter=parameter)

    blocks = {"a": block(4), "b": block(6), "c[0]": block(5, "c"), "c[1]": block(1, "c"), "d": block(5)}
    assert block_owners(blocks, 2, {}) == {"a": 0, "b": 0, "c[0]": 1, "c[1]": 1, "d": 1}
    assert block_owners(blocks, 1, {}) == dict.fromkeys(blocks, 0)
    assert block_owners(blocks, 2, {"b": 1, "gone": 0}) == {"a": 1, "b": 1, "c[0]": 0, "c[1]": 0, "d": 0}
