"""What runs on the pretend device: the same values as on the CPU, on the parameters' device, and what it costs.

Run by `test_devices.py` in a process of its own, since a registered device changes the whole process.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device_compare import APART, assert_same, compare, tensors_in
from pretend_device import DEVICE, Count, counted
from torch import Tensor, nn
from zoo import Case, case, cases

import layerwise as lw
from layerwise.errors import BadInput, NonFinite, Undefined
from layerwise.local.solvers.tf_rmsprop import tf_rmsprop_update
from layerwise.operators.kronecker import KroneckerBlock
from layerwise.operators.products_together import products_together, side_by_side
from layerwise.rows import contract
from layerwise.rows.base import Rows
from layerwise.rows.layout import MatrixLayout
from layerwise.rows.pieces import numbered

torch.__future__.set_swap_module_params_on_conversion(True)  # or tied parameters would come apart

FEW = ("mlp_tanh", "conv2d", "tied_embedding", "functional_conv", "residual")
# Of the other models; second derivatives in columns try what torch cannot batch, and an error there ends the process.
WIDE = ("PerSampleGrad", "SquaredNorm", "Variance", "DiagGGN sampled", "KFAC reduce", "KFLR expand", "GGN")
FUSED = ("checkpointed_lstm", "checkpointed_gru")  # call cells that torch has on accelerators alone
FIRST_ONLY = {"embedding_bag", "embedding_bag_padded"}  # torch has second derivatives of these on the CPU alone


# The device itself ------------------------------------------------------------------------------


def test_the_device_is_torchs_accelerator() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("pretend")
    assert torch.get_device_module(DEVICE).device_count() == 1


def test_it_raises_where_devices_meet() -> None:
    x, y = torch.randn(3, 3, device=DEVICE), torch.randn(3, 3)
    for mix in (lambda: x + y, lambda: x @ y, lambda: torch.cat([x, y]), lambda: y.add_(x), lambda: F.linear(x, y)):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert (x + torch.tensor(2.0)).device == DEVICE  # a number
    for draw in (lambda g: torch.randn(3, device=DEVICE, generator=g), lambda g: x.normal_(generator=g)):
        with pytest.raises(RuntimeError, match="for generator"):
            draw(torch.Generator())


def test_it_draws_from_a_generator_of_its_own() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    x = torch.randn(4, device=DEVICE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(x.cpu(), torch.randn(4))


def test_it_counts() -> None:
    x = torch.randn(3, 4, device=DEVICE)
    with counted() as count:
        y = (x.t() @ x).relu()
    assert (count.launches, count.synchronisations, count.uploads) == (2, 0, 0)
    for wait in (lambda: y.sum().item(), lambda: y.cpu(), lambda: y.tolist(), lambda: bool(y.any()), y.nonzero,
                 lambda: y[y > 0], lambda: torch.equal(y, y)):  # fmt: skip
        with counted() as count:
            wait()
        assert count.synchronisations == 1
    with counted() as count:
        torch.ones(3).to(DEVICE)
    assert count.uploads == 1
    for number, launches in ((2.0, 1), (x.sum(), 1), (x.sum(dtype=torch.float64), 3)):
        with counted() as count:
            torch._foreach_mul([x, x, x], number)
        assert count.launches == launches


# The same values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("mlp_tanh", "residual") else ()) for name in FEW]
)
def test_the_zoo(name: str) -> None:
    found = compare(case(name), DEVICE)
    assert not found.differ
    assert len(found.same) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("one", cases(first_loss_only=True), ids=lambda one: one.id)
def test_the_whole_zoo(one: Case) -> None:
    name = one.problem.name
    if name in APART or name in FUSED:
        pytest.skip(APART.get(name, "calls a fused cell, of which the pretend device's CPU has none"))
    assert not compare(one, DEVICE, only=WIDE[: -1 if name in FIRST_ONLY else None]).differ


X, Y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


class Run:
    """A net with its batch on a device, and a loss."""

    def __init__(self, device: Any) -> None:
        self.model, self.x, self.y = net().to(device), X.to(device), Y.to(device)
        torch.manual_seed(1)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "KFAC": lw.optim.KFAC,
    "DiagNewton": lw.optim.DiagNewton,
    "LocoProp": lw.LocoProp,
    "LocoProp memory": partial(lw.LocoProp, solver=lw.local.Memory()),
    "AltMin": lw.AltMin,
    "AltMin memory": partial(lw.AltMin, weights="memory"),
    "AltMin sweep": partial(lw.AltMin, codes="sweep"),
    "AltMin SGD": partial(lw.AltMin, weights="sgd"),
    "LocoProp SGD": partial(lw.LocoProp, solver=lw.local.LocalSteps(optimizer=torch.optim.SGD), lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_their_checkpoints(name: str) -> None:
    """Three steps, and a fourth after a save and a load, move the parameters as on the CPU."""
    states = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        optimizer = OPTIMIZERS[name](run.model)
        for _ in range(3):
            optimizer.step(run.loss)
        saved = io.BytesIO()
        torch.save({"model": run.model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        saved.seek(0)
        loaded = torch.load(saved)
        run = Run(device)
        run.model.load_state_dict(loaded["model"])
        optimizer = OPTIMIZERS[name](run.model)
        optimizer.load_state_dict(loaded["optimizer"])
        optimizer.step(run.loss)
        states.append(run.model.state_dict())
    assert_same(*states, DEVICE)


@pytest.mark.parametrize("name", ["KFAC", "LocoProp", "AltMin"])
def test_a_checkpoint_of_the_cpu_goes_on_on_the_device(name: str) -> None:
    here = Run("cpu")
    optimizer = OPTIMIZERS[name](here.model)
    for _ in range(2):
        optimizer.step(here.loss)
    there = Run(DEVICE)
    there.model.load_state_dict(here.model.state_dict())
    other = OPTIMIZERS[name](there.model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run, its in ((here, optimizer), (there, other)):
        its.step(run.loss)
    assert_same(here.model.state_dict(), there.model.state_dict(), DEVICE)


def test_a_preconditioner_in_front_of_an_optimizer_of_torch() -> None:
    states = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        preconditioner, sgd = lw.optim.Preconditioner(run.model), torch.optim.SGD(run.model.parameters(), 0.1)
        for _ in range(2):
            sgd.zero_grad()
            with preconditioner.watch():
                run.loss().backward()
            preconditioner.step()
            sgd.step()
        states.append(run.model.state_dict())
    assert_same(*states, DEVICE)


def test_inverses() -> None:
    found = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        with lw.observe(run.model, lw.KFLR(), lw.DiagGGN()) as seen:
            run.loss().backward()
        found.append([seen.kflr.inverse(damping=0.1) @ seen.grad, seen.diag_ggn])
    assert_same(*found, DEVICE)


def test_accumulate() -> None:
    found = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        batches = [(run.x[:5], run.y[:5]), (run.x[5:], run.y[5:])]
        seen = lw.accumulate(run.model, F.cross_entropy, batches, lw.Variance(), lw.EKFAC(1))
        found.append([seen.variance, seen.ekfac, seen.grad])
    assert_same(*found, DEVICE)


def test_the_monitor() -> None:
    histories = []
    for device in ("cpu", DEVICE):
        run, history = Run(device), []
        monitor = lw.monitor.Monitor(run.model, lambda step, record, into=history: into.append(record), every=1)
        sgd = torch.optim.SGD(run.model.parameters(), 0.1)
        for _ in range(2):
            sgd.zero_grad()
            with monitor.step():
                run.loss().backward()
            sgd.step()
        histories.append(history)
    assert histories[0]
    for one, two in zip(*histories, strict=True):
        assert two == pytest.approx(one, rel=1e-10, nan_ok=True)


# Costs: what is reached, which may fall and must not grow ---------------------------------------


def deep(layers: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A chain with so many layers, and its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(layers - 1) for part in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 3))
    model, x, y = model.to(DEVICE, dtype), X.to(DEVICE, dtype), Y.to(DEVICE)
    return model, lambda: F.cross_entropy(model(x), y)


def plain(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """The launches of the gradient alone."""
    model.zero_grad()
    with counted() as count:
        loss().backward()
    return count.launches


def observed(layers: int, quantity: Callable[[], lw.Quantity], on_nonfinite: Any = None) -> Count:
    """What the second observation of a layout costs; launches beyond those of the gradient."""
    model, loss = deep(layers)
    for _ in range(2):
        model.zero_grad()
        with counted() as count, lw.observe(model, quantity(), on_nonfinite=on_nonfinite):
            loss().backward()
    count.by_launch["the gradient's"] -= plain(model, loss)
    return count


def stepped(layers: int, make: Callable[[nn.Module], Any], steps: int = 4, dtype: torch.dtype = torch.float64) -> Count:
    """What the last of some steps costs; launches beyond those of the gradient."""
    model, loss = deep(layers, dtype)
    optimizer = make(model)
    for _ in range(steps):
        with counted() as count:
            optimizer.step(loss)
    count.by_launch["the gradient's"] -= plain(model, loss)
    return count


# The means of Kronecker factors run over rows that count, so the host must know whether a target is ignored. KFRA and
# the exact diagonal of the Hessian decide by what they measure: they assume what was so before, and compare once.
WAITS: dict[str, tuple[Callable[[], lw.Quantity], int]] = {
    "PerSampleGrad": (lw.PerSampleGrad, 0),
    "SquaredNorm": (lw.SquaredNorm, 0),
    "PairwiseDot": (lw.PairwiseDot, 0),
    "SecondMoment": (lw.SecondMoment, 0),
    "Variance": (lw.Variance, 0),
    "NoiseScale": (lw.NoiseScale, 0),
    "FisherDiag of the data": (lambda: lw.FisherDiag("data"), 0),
    "ClippedGrad": (lambda: lw.ClippedGrad(1.0), 0),
    "DiagGGN": (lw.DiagGGN, 0),
    "DiagGGN sampled": (lambda: lw.DiagGGN(1), 0),
    "DiagHessian sampled": (lambda: lw.DiagHessian(1), 0),
    "KFAC": (lambda: lw.KFAC(1), 1),
    "KFAC of all rows": (lambda: lw.KFAC(1, rows="all"), 0),
    "KFLR": (lw.KFLR, 1),
    "KFLR of all rows": (lambda: lw.KFLR(rows="all"), 0),
    "EKFAC": (lambda: lw.EKFAC(None), 1),
    "KFRA": (lw.KFRA, 1),
    "DiagHessian": (lw.DiagHessian, 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_how_often_an_observation_waits(name: str) -> None:
    quantity, most = WAITS[name]
    assert observed(3, quantity).synchronisations <= most
    assert observed(3, quantity, "defer").synchronisations == 0


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.poisson_nll_loss])
def test_labels_drawn_from_a_bad_batch(loss: Any, draws: int) -> None:
    """Nothing is looked at before it is drawn from, so that nothing is waited for; the result tells."""
    model, _ = deep(3)
    y = Y.to(DEVICE) if loss is F.cross_entropy else torch.ones(8, 3, dtype=torch.float64, device=DEVICE)
    for factor in (1.0, float("nan"), float("inf")):
        with counted() as count, lw.observe(model, lw.KFAC(draws, rows="all")) as seen:
            loss(model(factor * X.to(DEVICE)) + factor - 1, y).backward()
        assert not count.synchronisations
        if factor != 1:
            with pytest.raises(NonFinite):
                _ = seen.kfac
    assert not count.by_launch["multinomial"] or draws > 1


DRAW = torch.Generator().manual_seed(5)
SHARES, WEIGHTS = torch.rand(8, 3, generator=DRAW).double().softmax(1), torch.tensor([1.0, 2.0, 0.5]).double()
IGNORED = Y.masked_fill(torch.arange(8) % 3 == 0, -100)
TARGETS: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "ignored": lambda z, at: F.cross_entropy(z, at(IGNORED)),
    "weighted, ignored": lambda z, at: F.cross_entropy(z, at(IGNORED), weight=at(WEIGHTS)),
    "smoothed, ignored": lambda z, at: F.cross_entropy(z, at(IGNORED), label_smoothing=0.1),
    "weighted": lambda z, at: F.cross_entropy(z, at(Y), weight=at(WEIGHTS)),
    "probabilities": lambda z, at: F.cross_entropy(z, at(SHARES)),
    "probabilities, weighted, smoothed": lambda z, at: F.cross_entropy(
        z, at(SHARES), weight=at(WEIGHTS), label_smoothing=0.1
    ),
    "nll": lambda z, at: F.nll_loss(z.log_softmax(1), at(IGNORED)),
    "mse": lambda z, at: F.mse_loss(z, at(SHARES)),
    "mse, weighted": lambda z, at: F.mse_loss(z, at(SHARES), weight=at(SHARES)),
    "bce, weighted": lambda z, at: F.binary_cross_entropy_with_logits(
        z, at(SHARES), at(SHARES), pos_weight=at(WEIGHTS)
    ),
    "huber": lambda z, at: F.huber_loss(z, at(SHARES)),
    "by hand": lambda z, at: (F.cross_entropy(z, at(IGNORED), reduction="none") * at(SHARES)[:, 0]).sum() / 8,
}
SLOW_TARGETS = [name for name in TARGETS if name not in ("ignored", "probabilities, weighted, smoothed")]
FEW_QUANTITIES = ("SquaredNorm", "ClippedGrad", "DiagGGN", "KFLR", "KFRA", "DiagHessian")


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_TARGETS else ()) for name in TARGETS]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW_QUANTITIES else pytest.mark.slow) for name in WAITS]
)
def test_no_kind_of_target_is_waited_for_more(name: str, target: str) -> None:
    quantity, most = WAITS[name]
    on_device = {id(t): t.to(DEVICE) for t in (Y, IGNORED, SHARES, WEIGHTS)}
    for on_nonfinite, waits in ((None, most), ("defer", 0)):
        model, x = deep(3)[0], X.to(DEVICE)
        for _ in range(2):
            with counted() as count, lw.observe(model, quantity(), on_nonfinite=on_nonfinite):  # type: ignore[arg-type]
                TARGETS[target](model(x), lambda t: on_device[id(t)]).backward()
        assert count.synchronisations <= waits


class Tagger(nn.Module):
    """Classifies each token, some of which may be padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(tokens)).tanh())


TOKENS = torch.randint(1, 11, (4, 5), generator=torch.Generator().manual_seed(0))
PADDED = TOKENS.clone()
PADDED[:2, 3:] = 0


def tagged(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of a batch on the model's device, whose padding (0) is ignored."""
    tokens = tokens.to(model.mix.weight.device)
    targets = (tokens % 4).masked_fill(tokens == 0, -100)
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("tokens", [TOKENS, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("name", WAITS)
def test_how_often_an_observation_of_a_table_waits(name: str, tokens: Tensor) -> None:
    """Nor for how many different tokens a batch has, and what was looked up twice is added before it is squared."""
    quantity, most = WAITS[name]
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model, there = Tagger().double().to(device), tokens.to(device)
        for on_nonfinite, waits in ((None, most), ("defer", 0)):
            for _ in range(3):
                torch.manual_seed(1)
                asked = quantity()
                with counted() as count, lw.observe(model, asked, on_nonfinite=on_nonfinite) as seen:  # type: ignore[arg-type]
                    tagged(model, there).backward()
            assert device == "cpu" or count.synchronisations <= waits
        found.append(seen[asked])
    assert_same(*found, DEVICE)


def test_numbers_that_occur() -> None:
    """As many as there are elements on a device, in the order of `torch.unique`, behind which are zeros."""
    index = torch.tensor([[7, 2, 2, 9], [9, 9, 2, 5]])
    want, places = numbered(index)
    with counted() as count:
        found, where = numbered(index.to(DEVICE))
    assert count.synchronisations == 0
    assert found.cpu()[:4].equal(want) and not found.cpu()[4:].any() and where.cpu().equal(places)


def test_dots_of_many_tokens() -> None:
    """Where the gradients of a table do not fit one piece."""
    rows = [Rows(TOKENS.repeat(60, 2).to(d), torch.ones(2, 240, 10, 1, 3, dtype=torch.float64).to(d), 5000)
            for d in ("cpu", DEVICE)]  # fmt: skip
    assert_same(*({"dots": contract.pairwise_dot(each)} for each in rows), DEVICE)


FACTORS: dict[str, Callable[[], lw.Quantity]] = {
    "expand": lw.KFLR, "reduce": lambda: lw.KFLR(sharing="reduce"), "joint": lambda: lw.KFLR(joint=True),
    "EKFAC": lambda: lw.EKFAC(None),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_padded_batches(name: str) -> None:
    """As on the CPU, with the one wait of batches without padding, or none."""
    found, waits = [], []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model, values = Tagger().double().to(device), []
        for on_nonfinite in (None, None, "defer"):
            quantity = FACTORS[name]()
            with counted() as count, lw.observe(model, quantity, on_nonfinite=on_nonfinite) as seen:
                tagged(model, PADDED).backward()
            values.append(seen[quantity])
            waits.append(count.synchronisations)
        found.append(values)
    assert_same(*found, DEVICE)
    assert waits[4:] == [1, 0]


def test_a_batch_of_another_kind_that_was_not_waited_for_is_refused() -> None:
    """Not silently wrong: refused when a result is read, and from then on waited for."""
    torch.manual_seed(0)
    model, waits = Tagger().double(), []
    there = copy.deepcopy(model).to(DEVICE)
    for tokens, refused in ((TOKENS, False), (TOKENS, False), (PADDED, True), (PADDED, False), (TOKENS, False)):
        with counted() as count, lw.observe(there, lw.KFLR(), on_nonfinite="defer") as seen:
            tagged(there, tokens).backward()
        waits.append(count.synchronisations)
        if refused:
            with pytest.raises(BadInput, match="Observe it again"):
                _ = seen.kflr
            continue
        with lw.observe(model, lw.KFLR()) as exact:
            tagged(model, tokens).backward()
        assert_same(exact.kflr, seen.kflr, DEVICE)
    assert waits[1:3] == [0, 0] and all(waits[3:])


def test_what_was_not_waited_for_is_judged_before_a_result_is_read() -> None:
    """NaN in the batch, a weight without a root, a target out of range (which only some devices assert)."""
    for spoil, quantity, error in (
        (lambda run: run.x.fill_(float("nan")), lw.SquaredNorm(), NonFinite),
        (lambda run: run.x.fill_(1e200), lw.ClippedGrad(1.0), NonFinite),
        (lambda run: run.x.fill_(float("inf")), lw.DiagGGN(), NonFinite),
    ):
        run = Run(DEVICE)
        spoil(run)
        with lw.observe(run.model, quantity) as seen:
            run.loss().backward()
        for _ in range(2):
            with pytest.raises(error):
                seen[quantity]
    run = Run(DEVICE)
    with lw.observe(run.model, lw.DiagGGN()) as seen:
        (-run.loss()).backward()
    with pytest.raises(Undefined, match="negative"):
        _ = seen.diag_ggn
    low, judge = lw.losses.bind(F.cross_entropy, (run.x, run.y + 4), {}).unread_range()
    with pytest.raises(BadInput, match=r"targets lie in \[4, 6\], but the input has 6 classes"):
        judge(low.tolist())


@pytest.mark.parametrize("make", [lw.KFRA, lw.DiagHessian])
def test_what_was_assumed_of_a_batch_and_is_not_so(make: Callable[[], lw.Quantity]) -> None:
    """Rectifiers that are all open are an identity, and softplus beyond its threshold has no curvature."""
    found, waits = [], []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        layers = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Softplus(threshold=3.0), nn.Linear(4, 3)
        model = nn.Sequential(*layers).double().to(device)
        with torch.no_grad():
            model[0].bias.fill_(9.0)
            model[2].weight.abs_()
        values = []
        for factor in (1.0, 1.0, 30.0, 30.0, 1.0):
            with counted() as count, lw.observe(model, quantity := make()) as seen:
                F.cross_entropy(model(factor * X.to(device)), Y.to(device)).backward()
            values.append(seen[quantity])
            waits.append(count.synchronisations)
        found.append(values)
    assert_same(*found, DEVICE)
    assert [n == 1 for n in waits[5:]] == [False, True, False, True, False]
    for factor in (1.0, 30.0):
        with lw.observe(model, quantity := make(), on_nonfinite="defer") as seen:
            F.cross_entropy(model(factor * X.to(device)), Y.to(device)).backward()
    with pytest.raises(BadInput, match="Observe it again"):
        seen[quantity]


def test_second_derivatives_that_are_wrong_are_refused_when_a_result_is_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Tanh(), nn.Linear(4, 3)).to(DEVICE)
    x = torch.tensor([0, 0, 0, 1, 2], device=DEVICE)
    with lw.observe(model, lw.DiagHessian(1)) as seen:
        F.cross_entropy(model(x), Y[:5].to(DEVICE)).backward()
    with pytest.raises(Undefined, match="not symmetric"):
        _ = seen.diag_hessian


def test_a_pass_that_waits() -> None:
    """As on the CPU: one wait, an error in `backward` itself would end the process here."""
    model, loss = deep(3)
    for _ in range(2):
        with counted() as count, lw.observe(model, lw.SquaredNorm(), on_nonfinite="raise"):
            loss().backward()
    assert count.synchronisations == 1


@pytest.mark.parametrize(
    "name", ["KFAC", "DiagNewton", "LocoProp", "LocoProp SGD", "AltMin", "AltMin sweep", "AltMin SGD"]
)
def test_how_often_a_step_waits(name: str) -> None:
    """Also where steps of any size are judged by the norms of what they moved."""
    assert stepped(3, OPTIMIZERS[name]).synchronisations <= 1


VIEWS: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "transposed": lambda h, w: h @ w.view(3, 6).t(),
    "reshaped": lambda h, w: F.linear(h, w.view(3, 6)),
    "a slice of all": lambda h, w: F.linear(h, w[:18].view(3, 6)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_step_waits_once_where_the_loss_reads_a_view_of_a_weight(view: str) -> None:
    states = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(6, 6), "head": nn.ParameterList([torch.randn(18)])}).to(device, X.dtype)
        x, y = X.to(device), Y.to(device)

        def loss(model: nn.ModuleDict = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(VIEWS[view](torch.tanh(model["a"](x)), model["head"][0]), y)

        optimizer = lw.LocoProp(model)
        for _ in range(4):
            with counted() as count:
                optimizer.step(loss)
        states.append(model.state_dict())
    assert count.synchronisations == 1
    assert_same(*states, DEVICE)


@pytest.mark.parametrize("rows", ["real", "all"])
@pytest.mark.parametrize(("layers", "steps"), [(3, 5), (6, 6)], ids=["3 layers, inverts", "6 layers, measures"])
def test_how_often_a_step_in_the_periods_of_kfac_waits(layers: int, steps: int, rows: Any) -> None:
    """Once at its end; and before the backward pass, to know whether a target is ignored."""
    count = stepped(layers, partial(lw.optim.KFAC, rows=rows), steps)
    assert count.synchronisations <= (2 if rows == "real" else 1) and not count.uploads


@pytest.mark.parametrize("kind", ["kflr", "kfra", "ekfac", "foof"])
def test_how_often_a_step_in_the_periods_of_other_kinds_waits(kind: Any) -> None:
    for step in (6,) if kind == "ekfac" else (5, 6):  # eigenvectors are waited for, each
        assert stepped(3, partial(lw.optim.KFAC, kind=kind), step).synchronisations <= 2


def test_how_often_a_preconditioner_waits() -> None:
    for step, most in ((5, 2), (6, 2)):
        model, loss = deep(3)
        preconditioner = lw.optim.Preconditioner(model)
        for _ in range(step):
            model.zero_grad()
            with counted() as count:
                with preconditioner.watch():
                    loss().backward()
                preconditioner.step()
        assert count.synchronisations <= most


def periods(device: Any, make: Callable[[nn.Module], Any], closures: Sequence[Callable[[Run], Tensor]]) -> Any:
    """A model with its optimizer's state after a step along each closure; what was skipped, and the waits of each."""
    run, waits = Run(device), []
    optimizer = make(run.model)
    for closure in closures:
        with counted() as count:
            optimizer.step(partial(closure, run))
        waits.append(count.synchronisations)
    held = {"model": run.model.state_dict(), "blocks": optimizer.state_dict()["preconditioner"]["blocks"]}
    return dict(tensors_in(held)), optimizer, waits


BAD: dict[str, Callable[[Run], Tensor]] = {
    "an input": lambda run: F.cross_entropy(run.model(run.x * float("nan")), run.y),
    "an infinite input": lambda run: F.cross_entropy(run.model(run.x.index_fill(0, run.y[:1], float("inf"))), run.y),
    "the curvature": lambda run: F.cross_entropy(run.model(run.x * 1e200), run.y),
    "the loss": lambda run: run.loss() * float("nan"),
    "a huge loss": lambda run: run.loss() * 1e306,
    "a gradient": lambda run: F.cross_entropy((0 * run.model(run.x)).sqrt(), run.y),
}


@pytest.mark.parametrize("kind", ["kfac", "kfra", "ekfac", "foof"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_in_the_periods_of_kfac_is_skipped(bad: str, kind: Any) -> None:
    """As on the CPU, where all is read at once: it changes nothing, also where it comes first or inverses are due."""
    if bad == "a gradient" and kind == "kfra":
        pytest.skip("where samples lie is measured, and the measurement is spoiled, on the CPU as well")
    make = partial(lw.optim.KFAC, kind=kind, schedule=lw.optim.Schedule(factors=1, inverses=2))
    closures = [BAD[bad], Run.loss, Run.loss, BAD[bad], Run.loss, BAD[bad], Run.loss]
    here, cpu, _ = periods("cpu", make, closures)
    there, optimizer, _ = periods(DEVICE, make, closures)
    assert_same(here, there, DEVICE)
    assert cpu.skipped == optimizer.skipped == 3
    good, *_ = periods("cpu", make, [Run.loss] * 4)
    assert_same(good, there, DEVICE)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_of_a_preconditioner_is_skipped(bad: str) -> None:
    """As on the CPU: no gradient is left, and no factor changes."""
    states = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        schedule = lw.optim.Schedule(factors=1, inverses=2)
        preconditioner = lw.optim.Preconditioner(run.model, schedule=schedule)
        taken = []
        for closure in (BAD[bad], Run.loss, BAD[bad], Run.loss, BAD[bad]):
            run.model.zero_grad()
            with preconditioner.watch():
                closure(run).backward()
            taken.append(preconditioner.step())
            assert taken[-1] or all(p.grad is None for p in run.model.parameters())
        assert taken == [False, True, False, True, False] and preconditioner.skipped == 3
        states.append(preconditioner.state_dict()["blocks"])
    assert_same(*states, DEVICE)


@pytest.mark.parametrize("kind", ["kfac", "foof"])
def test_a_block_that_cholesky_does_not_invert_is_tried_by_itself(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is made again, as on the CPU, and waits for that block."""
    from layerwise.operators import factor_pairs

    by_cholesky, fails = factor_pairs.by_cholesky, []

    def failing(A: Tensor, B: Tensor | None, damping: Any) -> Any:
        found, good = by_cholesky(A, B, damping)
        return found, good & (torch.arange(len(good), device=good.device) > 0) if fails else good

    monkeypatch.setattr(factor_pairs, "by_cholesky", failing)
    make = partial(lw.optim.KFAC, kind=kind, schedule=lw.optim.Schedule(factors=1, inverses=1))

    def fail(run: Run) -> Tensor:
        fails[:] = [True]
        return run.loss()

    found = []
    for device in ("cpu", DEVICE):
        fails.clear()
        found.append(periods(device, make, [Run.loss, Run.loss, fail]))
    assert_same(found[0][0], found[1][0], DEVICE)
    assert found[1][2][1] <= 2 < found[1][2][2]


def test_a_batch_that_sends_a_parameter_no_row() -> None:
    """It leaves the averages of that parameter as they are, as on the CPU; that it has rows is assumed once."""
    states, waits = [], []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model, x, y = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double().to(device), X.to(device), Y.to(device)
        optimizer = lw.optim.KFAC(model, schedule=lw.optim.Schedule(factors=1, inverses=2))

        def loss(targets: Tensor, model: Any = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            one, two = model
            return F.cross_entropy(one(x), y) + F.cross_entropy(two(x), targets, reduction="sum")

        for count in (3, 5, 3, 0, 4, 0, 0):
            with counted() as found:
                optimizer.step(partial(loss, Y.masked_fill(torch.arange(8) >= count, -100).to(device)))
            waits.append(found.synchronisations)
        blocks = optimizer.state_dict()["preconditioner"]["blocks"]
        states.append({"model": model.state_dict(), "blocks": blocks})
        assert sorted(its["batches"] for its in blocks.values()) == [4, 7]
    assert_same(*states, DEVICE)
    assert waits[7 + 2] == 2 and waits[7 + 3] > 4 and waits[-1] <= 3


@pytest.mark.parametrize("name", ["LocoProp memory", "AltMin memory"])
@pytest.mark.parametrize(("layers", "steps"), [(3, 4), (6, 5), (3, 6)])
def test_how_often_a_memory_waits(layers: int, steps: int, name: str) -> None:
    """Once, whether a memory inverts or not: its codes' factorizations are assumed to be sound."""
    assert stepped(layers, OPTIMIZERS[name], steps).synchronisations <= 1


def test_codes_whose_factorization_was_assumed_to_be_sound_and_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is computed again, as on the CPU, and the loss is judged."""
    from layerwise.local.codes import gauss_newton

    by_cholesky, fails = gauss_newton.by_cholesky, []

    def failing(A: Tensor, B: Tensor, damping: float) -> Any:
        found, good = by_cholesky(A, B, damping)
        return (found * float("nan"), good & False) if fails else (found, good)

    monkeypatch.setattr(gauss_newton, "by_cholesky", failing)
    states = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        optimizer = lw.AltMin(run.model, weights="memory", code_l1=1e-3)
        for step in range(4):
            fails[:] = [True] * (step == 2)
            optimizer.step(run.loss)
        states.append(run.model.state_dict())
        before = [p.clone() for p in run.model.parameters()]
        with pytest.raises(Undefined, match="negative"):
            optimizer.step(lambda run=run: -run.loss())
        assert all(map(torch.equal, before, run.model.parameters())) and not optimizer.skipped
    assert_same(*states, DEVICE)


def _memory(name: str, model: nn.Module, ridge: float | None) -> Any:
    memory = lw.local.Memory(ridge=ridge)
    return lw.AltMin(model, weights=memory) if name == "AltMin" else lw.LocoProp(model, solver=memory)


@pytest.mark.parametrize("name", ["AltMin", "LocoProp"])
def test_a_step_of_a_memory_that_was_assumed_to_be_short_and_is_too_long(name: str) -> None:
    """An old inverse goes too far where the inputs grow, and Cholesky fails where they are one row, undamped."""
    cases = [(None, (1, 1, 1, 1, 1, 40, 1, 1)), (0.0, (1, 1, 1))]
    for ridge, factors in cases if name == "AltMin" else cases[:1]:  # LocoProp's pivots are rounding in the second
        states, waits = [], []
        for device in ("cpu", DEVICE):
            run = Run(device)
            optimizer = _memory(name, run.model, ridge)
            x = run.x if ridge is None else run.x[:1].expand(8, 6)
            for factor in factors:
                with counted() as count:
                    optimizer.step(lambda x=factor * x, run=run: F.cross_entropy(run.model(x), run.y))
                waits.append(count.synchronisations)
            states.append(run.model.state_dict())
        assert_same(*states, DEVICE)
        assert max(waits[1 - len(factors) :]) > 6  # a step after the first was computed again


@pytest.mark.parametrize("name", ["LocoProp memory", "AltMin memory"])
def test_a_bad_batch_of_a_memory_is_skipped(name: str) -> None:
    run = Run(DEVICE)
    optimizer = OPTIMIZERS[name](run.model)
    for skipped, factor in enumerate((1.0, float("nan"), 1e300)):
        before = [p.clone() for p in run.model.parameters()]
        optimizer.step(lambda factor=factor: F.cross_entropy(run.model(factor * run.x), run.y))
        same = [torch.equal(b, p) for b, p in zip(before, run.model.parameters(), strict=True)]
        assert optimizer.skipped == skipped and (all(same) if skipped else not any(same))
        assert not skipped or "the input of 0" in str(optimizer.why_skipped())


def test_a_weight_of_the_terms_that_was_assumed_and_is_another() -> None:
    """AltMin assumes that its output layer's loss is weighted as before; where it is not, the step is made again."""
    states = []
    for device in ("cpu", DEVICE):
        run = Run(device)
        optimizer, ignored = lw.AltMin(run.model), run.y.clone()
        ignored[0] = -100
        for factor, y in [(1.0, run.y)] * 4 + [(2.0, run.y), (2.0, ignored), (1.0, run.y)]:
            optimizer.step(lambda factor=factor, y=y, run=run: factor * F.cross_entropy(run.model(run.x), y))
        states.append(run.model.state_dict())
    assert_same(*states, DEVICE)


DEFERRED = ("KFAC", "DiagNewton", "LocoProp")


@pytest.mark.parametrize("name", DEFERRED)
def test_a_deferred_step_waits_for_nothing(name: str) -> None:
    """Also not where it is bad; then the device has taken it back, to the bit."""
    model, loss = deep(3)
    optimizer = OPTIMIZERS[name](model, on_nonfinite="defer")
    for _ in range(6):
        optimizer.step(loss)
    before = [p.clone() for p in model.parameters()]
    for factor in (float("nan"), 1.0):
        with counted() as count:
            optimizer.step(lambda factor=factor: factor * loss())
        assert (count.synchronisations, count.uploads) == (0, 0)
        same = [torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)]
        assert all(same) if factor != 1.0 else not any(same)
    assert optimizer.skipped == 1


def test_launches_of_norms() -> None:
    """At most 12 a use, with what an observation costs by itself."""
    three, six = (observed(layers, lw.SquaredNorm).launches for layers in (3, 6))
    assert (six - three) / 3 <= 7
    assert three <= 12 * 3
    assert observed(3, lw.PerSampleGrad).launches <= 14


def test_launches_of_norms_of_a_table() -> None:
    each = []
    for tables in (1, 3):
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Embedding(11, 6) for _ in range(tables)).double().to(DEVICE)
        tokens, y = PADDED.to(DEVICE), Y[:4].to(DEVICE)

        def loss(model: Any = model, tokens: Tensor = tokens, y: Tensor = y) -> Tensor:
            return F.cross_entropy(sum(table(tokens) for table in model).tanh().mean(1), y)

        for _ in range(2):
            model.zero_grad()
            with counted() as count, lw.observe(model, lw.SquaredNorm()):
                loss().backward()
        each.append(count.launches - plain(model, loss))
    assert (each[1] - each[0]) / 2 <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_launches_of_a_step_outside_the_periods_of_kfac(dtype: torch.dtype) -> None:
    """13, and 4 for each shape of blocks, whatever their number: at most 4 a block from 6 layers on."""
    four, six, twelve = (stepped(layers, lw.optim.KFAC, dtype=dtype).launches for layers in (4, 6, 12))
    assert four == six == twelve
    assert six <= 13 + 4 * 2 <= 4 * 6


class Block(nn.Module):
    """A pre-norm transformer block; sliced: torch's own attention, which uses one weight in three slices."""

    def __init__(self, width: int, sliced: bool) -> None:
        super().__init__()
        self.attend: Any = nn.MultiheadAttention(width, 2, batch_first=True) if sliced else None
        self.one, self.two, self.out = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, width)
        self.mix, self.up, self.down = (nn.Linear(i * width, o * width) for i, o in ((1, 3), (1, 2), (2, 1)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        if self.attend is not None:
            x = x + self.attend(h, h, h, need_weights=False)[0]
        q, k, v = self.mix(h).chunk(3, -1)
        x = x + self.out((q @ k.mT).softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(self.two(x))))


def transformer(blocks: int, sliced: bool, device: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Equal blocks with a linear map in front and one behind, and their loss."""
    torch.manual_seed(0)
    middle = [Block(4, sliced) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(6, 4), *middle, nn.Linear(4, 3)).double().to(device)
    x, y = X.view(4, 2, 6).to(device), Y[:4].to(device)
    return model, lambda: F.cross_entropy(model(x)[:, 0], y)


@pytest.mark.parametrize(("kind", "sliced"), [("kfac", False), ("kfac", True), ("ekfac", False), ("foof", False)])
def test_equal_transformer_blocks_are_multiplied_as_one(kind: Any, sliced: bool) -> None:
    """As on the CPU, where each is multiplied by itself; four blocks cost what two do, slices of a weight aside."""
    states, launches = [], []
    for device, blocks in (("cpu", 4), (DEVICE, 4), (DEVICE, 2)):
        model, loss = transformer(blocks, sliced, device)
        optimizer = lw.optim.KFAC(model, curvature=lw.optim.Curvature(kind))
        for _ in range(4):
            with counted() as count:
                optimizer.step(loss)
        states.append(model.state_dict())
        launches.append(count.launches - (plain(model, loss) if device == DEVICE else 0))
    assert_same(*states[:2], DEVICE)
    assert launches[1] == launches[2] or sliced
    assert launches[1] <= 48 or sliced or kind != "kfac"


def spd(size: int, groups: int, seed: int) -> Tensor:
    x = torch.randn(groups, size, size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


@pytest.mark.parametrize("together", [False, True], ids=["apart", "side by side"])
def test_products_of_equal_blocks(together: bool) -> None:
    """Groups, a bias or none, a diagonal factor, an eigenbasis: as each block by itself."""
    layout = MatrixLayout.whole((6, 4), (2, 3, 4))
    makes: list[Callable[[Tensor, Tensor, str], Any]] = [
        lambda a, b, name: KroneckerBlock(a, b, layout, f"{name} bias"),
        lambda a, b, name: KroneckerBlock(a[:, 1:, 1:], b, layout),
        lambda a, b, name: KroneckerBlock(a.diagonal(dim1=-2, dim2=-1), b, layout, f"{name} bias"),
        lambda a, b, name: KroneckerBlock(a, b, layout, f"{name} bias").eigh(name),
    ]
    draw = torch.Generator().manual_seed(3)
    for make in makes:
        a, b = torch.cat([spd(5, 2, n) for n in range(3)]), torch.cat([spd(3, 2, 9 + n) for n in range(3)])
        found: list[dict[str, Any]] = []
        values = {f"w{n}": torch.randn(6, 4, dtype=torch.float64, generator=draw) for n in range(3)}
        values |= {f"w{n} bias": torch.randn(6, dtype=torch.float64, generator=draw) for n in range(3)}
        for device in ("cpu", DEVICE):
            ones, twos = a.to(device).split(2), b.to(device).split(2)
            if not together:
                ones, twos = ([x.clone() for x in some] for some in (ones, twos))
            blocks = {f"w{n}": make(ones[n], twos[n], f"w{n}") for n in range(3)}
            there = {name: x.to(device) for name, x in values.items()}
            found.append(products_together(blocks, dict.fromkeys(blocks, there)))
        assert_same(*found, DEVICE)


@pytest.mark.parametrize("kind", ["kfac", "foof", "ekfac"])
def test_inverses_side_by_side_are_not_gathered(kind: Any) -> None:
    """With a slice of a parameter, which is copied; and not again, after a step that measures."""
    model, loss = transformer(3, True, DEVICE)
    optimizer = lw.optim.KFAC(model, kind=kind)
    for _ in range(7):
        optimizer.step(loss)
    blocks = {
        name: its.block for name, its in optimizer.preconditioner.blocks.inverses.items() if its.block is not None
    }
    with counted() as count:
        laid = side_by_side(blocks)
    assert not count.launches and laid.keys() == blocks.keys()
    apart = {name: b.eigh(name) if isinstance(b, KroneckerBlock) else replace(b, spectrum=b.spectrum + 0)
             for name, b in blocks.items()}  # fmt: skip
    found = side_by_side(apart)
    assert_same([b.spectrum.cpu() for b in apart.values()], [b.spectrum for b in found.values()], DEVICE)
    with counted() as count:
        side_by_side(found)
    assert not count.launches


def test_launches_of_a_local_step() -> None:
    """At most 6 for each local step and shape of layers, with 5 for all together: as many in 8 equal layers as in 3."""
    each = []
    for layers in (3, 8):
        ten, twenty = (stepped(layers, lambda model, n=n: lw.LocoProp(model, steps=n), 3).launches for n in (10, 20))
        each.append((twenty - ten) / 10)
    assert each[0] == each[1] <= 5 * 2 + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.0}, {"decay": 0.0}, {"decay": 0.3, "eps": 0.0}, {"lr": 0.0}, {"decay": 0.01}],
    ids=str,
)
def test_steps_of_rmsprop_side_by_side(settings: dict[str, float], dtype: torch.dtype) -> None:
    """As the pure function, in so many steps that the state is settled on the way; the second begins later."""
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw, dtype=dtype) for shape in ((3, 4), (5,))]
    numbers = {"lr": 1e-2, "decay": 0.9, "momentum": 0.99, "eps": 1e-5} | settings
    params = [nn.Parameter(x.to(DEVICE)) for x in values]
    optimizers = [lw.local.TFRMSProp([p], **numbers) for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    steps = [optimizer.ready() for optimizer in optimizers]
    want, launches = [(x, torch.ones_like(x), torch.zeros_like(x)) for x in values], []
    for n in range(120):
        rate = numbers["lr"] * (1 + n % 3)
        for i in range(1 + (n >= 10)):
            grad = torch.randn(values[i].shape, generator=draw, dtype=dtype) * 10 ** (n % 5 - 2)
            x, *kept = want[i]
            moved, *kept = tf_rmsprop_update(x, grad, *kept, **numbers | {"lr": rate})  # type: ignore[call-arg, misc]
            want[i] = (moved if rate else x, *kept)
            with torch.no_grad():
                params[i].grad.copy_(grad)  # type: ignore[union-attr]
            optimizers[i].param_groups[0]["lr"] = rate
        with torch.no_grad(), counted() as count:
            lw.local.TFRMSProp.together(steps[: 1 + (n >= 10)])
        launches.append(count.launches)
        if n % 60 == 59:
            lw.local.TFRMSProp.settle(steps)
            for p, optimizer, one in zip(params, optimizers, want, strict=True):
                for x, y in zip(one, (p.detach(), *optimizer.state[p].values()), strict=True):
                    torch.testing.assert_close(y.cpu(), x, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-6)
    scaled = numbers["momentum"] and numbers["decay"] > 0.1
    assert launches[0] == (5 if scaled else 7) - (numbers["lr"] == 0)


@pytest.mark.parametrize("settings", [{}, {"loss": "squared"}, {"rows": "all", "steps": 3}, {"write": "grad"}], ids=str)
def test_equal_layers_are_solved_as_one_with_the_same_values(settings: Any) -> None:
    found = []
    for place in (DEVICE, "cpu"):
        model, _ = deep(6)
        model = model.to(place)
        optimizer = lw.LocoProp(model, lr=1e-2, layers={"4.weight": {"lr": 2e-2}}, **settings)
        for _ in range(3):
            optimizer.step(lambda: F.cross_entropy(model(X.to(place)), Y.to(place)))  # noqa: B023
        kept = [optimizer.state[p][key] for p in model.parameters() for key in sorted(optimizer.state[p])]
        moved = [p.grad if "write" in settings else p for p in model.parameters()]
        found.append([t.detach().cpu() for t in (*moved, *kept)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


class Sliced(nn.Module):
    """Equal slices of one weight, each with a use of its own, and a layer behind."""

    def __init__(self, slices: int) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(4 * slices, 6) / 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(sum((F.linear(x, w).tanh() for w in self.weight.split(4)), torch.zeros_like(x[:, :4])))


def sliced(slices: int, device: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model, x, y = Sliced(slices).double().to(device), X.to(device), Y.to(device)
    return model, lambda: F.cross_entropy(model(x), y)


def test_launches_of_slices_of_one_weight() -> None:
    """Two for each slice in an observation; in a step of K-FAC one, as the slices' blocks are multiplied together."""
    observed_in, stepped_in = [], []
    for slices in (3, 6):
        model, loss = sliced(slices, DEVICE)
        for _ in range(2):
            model.zero_grad()
            with counted() as count, lw.observe(model, lw.PerSampleGrad()):
                loss().backward()
        observed_in.append(count.launches - plain(model, loss))
        optimizer = lw.optim.KFAC(model)
        for _ in range(4):
            with counted() as count:
                optimizer.step(loss)
        stepped_in.append(count.launches - plain(model, loss))
    assert observed_in[1] - observed_in[0] <= 3 * 2
    assert stepped_in[1] - stepped_in[0] <= 3


def test_steps_with_slices_of_one_weight() -> None:
    states = []
    for device in ("cpu", DEVICE):
        model, loss = sliced(3, device)
        optimizer = lw.optim.KFAC(model)
        for _ in range(4):
            optimizer.step(loss)
        states.append(model.state_dict())
    assert_same(*states, DEVICE)
