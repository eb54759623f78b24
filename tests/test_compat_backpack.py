"""BackPACK's interface: records made by hooks and found from the loss, and what BackPACK gets wrong."""

from __future__ import annotations

import copy
import gc
import io
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import layerwise as lw
from layerwise import errors
from layerwise.compat.backpack import backpack, disable, extend, extensions
from layerwise.compat.backpack.custom_module.branching import ActiveIdentity, Parallel, SumModule
from layerwise.compat.backpack.custom_module.permute import Permute
from layerwise.compat.backpack.custom_module.scale_module import ScaleModule
from layerwise.compat.backpack.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from layerwise.compat.backpack.read_tape import records_of
from layerwise.compat.backpack.utils.subsampling import subsample

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0, 1, 2, 0, 1])


def batch() -> Tensor:
    return torch.randn(5, 4)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def fields(model: nn.Module, field: str) -> dict[str, Any]:
    return {name: getattr(p, field) for name, p in model.named_parameters() if hasattr(p, field)}


def terms(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), Y, reduction="none") / len(x)


def expected_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    plain = copy.deepcopy(model)
    with disable():
        return oracle.per_sample_grad(oracle.parameters(plain), terms(plain, x))


def expected_ggn(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    plain = copy.deepcopy(model)
    with disable():
        return oracle.diag_ggn(oracle.parameters(plain), lambda: plain(x), loss or (lambda z: F.cross_entropy(z, Y)))


# -- where the forward, the loss and the backward pass may be --------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["forward outside", "forward inside"])
@pytest.mark.parametrize("module", [False, True], ids=["functional loss", "extended loss"])
def test_forward_and_loss_anywhere(inside: bool, module: bool) -> None:
    model, x = net(), batch()
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), Y).backward()
    extend(model)
    criterion = extend(nn.CrossEntropyLoss()) if module else F.cross_entropy
    if inside:
        with backpack(BatchGrad(), DiagGGNExact()):
            criterion(model(x), Y).backward()
    else:
        loss = criterion(model(x), Y)
        with backpack(BatchGrad(), DiagGGNExact()):
            loss.backward()
    oracle.assert_close(fields(model, "grad_batch"), expected_gradients(model, x))
    oracle.assert_close(fields(model, "diag_ggn_exact"), expected_ggn(model, x))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda z: F.cross_entropy(z, Y, reduction="sum"),
    "weights and ignore_index": lambda z: F.cross_entropy(
        z, torch.tensor([0, -100, 2, 0, 1]), weight=torch.tensor([1.0, 2.0, 0.5])
    ),
    "by hand": lambda z: F.cross_entropy(z, Y, reduction="none").mean(),
    "nll of log_softmax": lambda z: F.nll_loss(F.log_softmax(z, -1), Y),
    "times ten": lambda z: 10 * F.cross_entropy(z, Y),
    "two losses": lambda z: F.cross_entropy(z, Y) + 0.3 * F.mse_loss(z, torch.ones_like(z)),
    "bce": lambda z: F.binary_cross_entropy_with_logits(
        z, (z.detach() > 0).to(z), weight=torch.tensor([1.0, 2.0, 3.0]), pos_weight=torch.tensor([2.0, 1.0, 0.5])
    ),
    "huber": lambda z: F.huber_loss(z, torch.zeros_like(z), delta=0.2),
    "smooth l1": lambda z: F.smooth_l1_loss(z, torch.zeros_like(z), beta=0.3),
    "exchanged mse": lambda z: F.mse_loss(torch.zeros_like(z), z, reduction="sum"),
    "positions": lambda z: F.cross_entropy(
        z.view(5, 3, 1).expand(5, 3, 2) * torch.tensor([1.0, 2.0]), torch.stack([Y, Y], 1)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_functional_losses_are_read_from_the_graph(name: str) -> None:
    model, x = net(), batch()
    plain = copy.deepcopy(model)
    with lw.observe(plain, lw.PerSampleGrad(), lw.DiagGGN()) as seen:
        LOSSES[name](plain(x)).backward()
    loss = LOSSES[name](extend(model)(x))
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    oracle.assert_close(fields(model, "grad_batch"), dict(seen.per_sample_grad))
    oracle.assert_close(fields(model, "diag_ggn_exact"), dict(seen.diag_ggn))
    oracle.assert_close(fields(model, "diag_ggn_exact"), expected_ggn(model, x, LOSSES[name]))


def test_a_loss_that_the_graph_does_not_tell_is_refused() -> None:
    model, x = extend(net()), batch()
    softmax_over_others = F.log_softmax(torch.stack(3 * [model(x)], 1)[:, :2], 1).view(10, 3)  # than the classes
    for loss in (
        F.cross_entropy(model(x), Y, label_smoothing=0.1),
        model(x).pow(4).sum(),
        F.nll_loss(softmax_over_others, torch.cat([Y, Y])),
    ):
        with backpack(BatchGrad()), pytest.raises(errors.UnknownLoss):
            loss.backward()
    assert not fields(model, "grad_batch")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("module", [False, True], ids=["functional loss", "extended loss"])
def test_losses_are_checked_wherever_they_are_found(module: bool) -> None:
    model = extend(net())
    criterion = extend(nn.CrossEntropyLoss(reduction="sum")) if module else partial(F.cross_entropy, reduction="sum")
    with pytest.raises(errors.BadInput, match="empty"), backpack(BatchGrad()):
        criterion(model(batch()[:0]), Y[:0]).backward()
    assert not fields(model, "grad_batch")


def test_an_extended_loss_is_known_with_all_its_arguments() -> None:
    model, x = extend(net()), batch()
    criterion = extend(nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5])))
    loss = criterion(model(x), Y)
    with backpack(DiagGGNExact()):
        loss.backward()
    oracle.assert_close(fields(model, "diag_ggn_exact"), expected_ggn(model, x, lambda z: criterion(z, Y)))


def test_layers_extended_one_by_one() -> None:
    first, last, x = extend(nn.Linear(4, 6)), extend(nn.Linear(6, 3)), batch()
    whole = nn.Sequential(copy.deepcopy(first), nn.Tanh(), copy.deepcopy(last))
    loss = F.cross_entropy(last(torch.tanh(first(x))), Y)
    with backpack(BatchGrad(), DiagGGNExact(), KFLR(), DiagHessian()):
        loss.backward()
    both = nn.Sequential(first, nn.Tanh(), last)
    oracle.assert_close(fields(both, "grad_batch"), expected_gradients(whole, x))
    oracle.assert_close(fields(both, "diag_ggn_exact"), expected_ggn(whole, x))
    with disable():
        oracle.assert_close(
            fields(both, "diag_h"),
            oracle.diag_hessian(oracle.parameters(whole), lambda: F.cross_entropy(whole(x), Y)),
        )


def test_one_layer_called_twice_through_several_records() -> None:
    layer, x = extend(nn.Linear(4, 4)), batch()
    head = nn.Linear(4, 3)

    def run(z: Tensor) -> Tensor:
        return head(torch.tanh(layer(torch.tanh(layer(z)))))

    loss = F.cross_entropy(run(x), Y)
    with backpack(BatchGrad(), BatchL2Grad()):
        loss.backward()
    with disable():
        expected = oracle.per_sample_grad(dict(layer.named_parameters()), terms(run, x))
    oracle.assert_close(fields(layer, "grad_batch"), expected)
    oracle.assert_close(fields(layer, "batch_l2"), {k: g.flatten(1).square().sum(1) for k, g in expected.items()})


def test_two_forwards_backward_in_the_other_order() -> None:
    model, criterion = extend(net()), extend(nn.CrossEntropyLoss())
    x, z = batch(), batch()
    losses = criterion(model(x), Y), criterion(model(z), Y)
    for given, loss in ((z, losses[1]), (x, losses[0])):
        with backpack(BatchGrad()):
            loss.backward()
        oracle.assert_close(fields(model, "grad_batch"), expected_gradients(model, given))


def test_the_sum_of_two_forwards() -> None:
    model, criterion, x, z = extend(net()), extend(nn.CrossEntropyLoss()), batch(), batch()
    loss = criterion(model(x), Y) + criterion(model(z), Y)
    with backpack(DiagGGNExact()):
        loss.backward()
    one, other = expected_ggn(model, x), expected_ggn(model, z)
    oracle.assert_close(fields(model, "diag_ggn_exact"), {k: one[k] + other[k] for k in one})


def test_loss_and_outputs_inside_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, y), "more": (logits, None)}

    model, x = extend(Model()), batch()
    out = model(x, Y)
    with backpack(BatchGrad()):
        out["loss"].backward()
    oracle.assert_close(fields(model.body, "grad_batch"), expected_gradients(model.body, x))


@pytest.mark.parametrize("kind", ["torch.autograd.backward", "gradient", "inputs"])
def test_ways_to_start_a_backward_pass(kind: str) -> None:
    model, x = extend(net()), batch()
    loss = F.cross_entropy(model(x), Y)
    expected = expected_gradients(model, x)
    with backpack(BatchGrad()):
        if kind == "gradient":
            loss.backward(torch.tensor(3.0))
        elif kind == "inputs":
            loss.backward(inputs=list(model[2].parameters()))
        else:
            torch.autograd.backward(loss)
    if kind == "inputs":
        expected = {name: g for name, g in expected.items() if name.startswith("2")}
    factor = 3 if kind == "gradient" else 1
    oracle.assert_close(fields(model, "grad_batch"), {name: factor * g for name, g in expected.items()})


def test_second_backward_writes_the_fields_anew() -> None:
    model, x = extend(net()), batch()
    loss = F.cross_entropy(model(x), Y)
    with backpack(DiagGGNExact(), BatchGrad()):
        loss.backward(retain_graph=True)
        first = fields(model, "diag_ggn_exact")
        (2 * loss).backward()
    oracle.assert_close(fields(model, "diag_ggn_exact"), {name: 2 * v for name, v in first.items()})


def test_second_backward_through_a_freed_graph_is_refused() -> None:
    model = extend(net())
    loss = F.cross_entropy(model(batch()), Y)
    with backpack(BatchGrad()):
        loss.backward()
        with pytest.raises(errors.Undefined, match="retain_graph"):
            loss.backward()


def test_fields_of_a_refused_backward_stay_away_and_gradients_as_they_were() -> None:
    model = extend(net())
    loss = F.cross_entropy(model(batch() * torch.inf), Y)
    with backpack(BatchGrad()), pytest.raises(errors.NonFinite):
        loss.backward()
    assert not fields(model, "grad_batch")
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_get_no_field() -> None:
    model = extend(net())
    model[0].weight.requires_grad_(False)
    loss = F.cross_entropy(model(batch()), Y)
    with backpack(BatchGrad(), KFAC()):
        loss.backward()
    assert set(fields(model, "grad_batch")) == set(fields(model, "kfac")) == {"0.bias", "2.weight", "2.bias"}


# -- disable, nesting, hooks -----------------------------------------------------------------------------------


def test_nothing_is_recorded_under_disable() -> None:
    model = extend(net())
    with disable():
        assert not disable.should_store_io()
        loss = F.cross_entropy(model(batch()), Y)
    assert disable.should_store_io()
    assert not records_of(loss)
    with backpack(BatchGrad()), pytest.raises(errors.UncoveredUse, match="disable"):
        loss.backward()
    loss.backward()


def test_a_model_that_is_not_extended_is_refused() -> None:
    loss = F.cross_entropy(net()(batch()), Y)
    with backpack(BatchGrad()), pytest.raises(errors.UncoveredUse, match="extend"):
        loss.backward()


def test_without_extensions_a_backward_is_plain() -> None:
    loss = F.cross_entropy(net()(batch()), Y)
    with backpack():
        loss.backward()


def test_no_record_without_gradients_and_none_left_behind() -> None:
    model = extend(net())
    with torch.no_grad():
        assert not model(batch()).requires_grad
    with pytest.raises(errors.BadInput, match="5x7"):
        model(torch.randn(5, 7))
    assert not torch.overrides._get_current_function_mode_stack()
    loss = F.cross_entropy(model(batch()), Y)
    with backpack(BatchGrad()):
        loss.backward()


def test_the_inner_context_alone_is_active() -> None:
    model = extend(net())
    with backpack(BatchGrad()):
        with backpack(BatchL2Grad()):
            F.cross_entropy(model(batch()), Y).backward()
        assert fields(model, "batch_l2")
        assert not fields(model, "grad_batch")
        F.cross_entropy(model(batch()), Y).backward()
    assert fields(model, "grad_batch")


@pytest.mark.parametrize("wrong", [BatchGrad, "BatchGrad", None])
def test_only_instances_of_extensions(wrong: Any) -> None:
    with pytest.raises(ValueError, match="instance"):
        backpack(wrong)


def test_arguments_are_checked() -> None:
    with pytest.raises(errors.BadInput, match=r"nn\.Module"):
        extend(torch.relu)  # type: ignore[arg-type]
    with pytest.raises(errors.BadInput, match="modify"):
        PCHMP(modify="square")
    with pytest.raises(errors.Undefined, match="leave the registration out"):
        BatchGrad().set_module_extension(nn.Linear, None)
    with pytest.raises(errors.BadInput, match="subsampling"), backpack(BatchGrad(subsampling=[0, 5])):
        F.cross_entropy(extend(net())(batch()), Y).backward()
    assert SqrtGGNMC(3, subsampling=[1]).get_num_mc_samples() == 3
    assert SqrtGGNMC(3, subsampling=[1]).get_subsampling() == [1]
    assert HMP(savefield="h").savefield == "h"


def test_extension_hook_sees_every_module_with_its_fields() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    model, criterion = (
        extend(nn.Sequential(Parallel(inner, nn.Linear(4, 4)), nn.Linear(4, 3))),
        extend(nn.CrossEntropyLoss()),
    )
    called: list[str] = []
    norms: dict[int, Tensor] = {}

    def hook(module: nn.Module) -> None:
        called.append(type(module).__name__)
        for p in module.parameters(recurse=False):
            norms[id(p)] = p.grad_batch.flatten(1).square().sum(1)
            del p.grad_batch

    loss = criterion(model(batch()), Y)
    with backpack(BatchGrad(), BatchL2Grad(), extension_hook=hook):
        loss.backward()
    assert called == ["CrossEntropyLoss", "Linear", "SumModule", "Linear", "Sigmoid", "Linear"]
    assert not fields(model, "grad_batch")
    for p in model.parameters():
        torch.testing.assert_close(norms[id(p)], p.batch_l2)


def test_extension_hook_without_extensions(capsys: pytest.CaptureFixture[str]) -> None:
    called: list[nn.Module] = []
    model = extend(net(), debug=True)
    with backpack(extension_hook=called.append, debug=True):
        F.cross_entropy(model(batch()), Y).backward()
    assert called == [model[2], model[1], model[0]]
    printed = capsys.readouterr().out
    assert "Extending Linear" in printed
    assert "extension hook on Tanh" in printed


def test_extended_models_can_be_extended_copied_and_stored() -> None:
    model = extend(extend(net()))
    assert len(model[0]._forward_pre_hooks) == 1
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = batch()
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        loss = F.cross_entropy(other(x), Y)
        with backpack(BatchGrad()):
            loss.backward()
        oracle.assert_close(fields(other, "grad_batch"), expected_gradients(model, x))
    assert not fields(model, "grad_batch")


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no backward", "plain backward", "observed", "retained"])
def test_records_die_with_their_graph(kind: str) -> None:
    def run() -> list[weakref.ref[Any]]:
        model, criterion = extend(net()), extend(nn.CrossEntropyLoss())
        loss = criterion(model(batch()), Y)
        refs = [weakref.ref(record) for record in records_of(loss)]
        refs += [weakref.ref(p) for p in model.parameters()]
        if kind == "plain backward":
            loss.backward()
        if kind in ("observed", "retained"):
            with backpack(BatchGrad(), DiagGGNExact(), KFAC()):
                loss.backward(retain_graph=kind == "retained")
        return refs

    gc.collect()
    gc.disable()
    try:
        refs = run()
        assert len(refs) == 6
        assert [ref() for ref in refs] == [None] * 6
    finally:
        gc.enable()


def test_a_freed_graph_holds_no_activations() -> None:
    model = extend(net())
    loss = F.cross_entropy(model(batch()), Y)
    (record,) = records_of(loss)
    assert len(record.uses) == 2
    with backpack(BatchGrad()):
        loss.backward()
    assert not record.uses
    assert record.freed


@pytest.mark.parametrize("ext", [BatchGrad, DiagGGNExact, DiagHessian, KFRA, HMP, GGNMP])
def test_training_loops_do_not_grow(ext: Any) -> None:
    model, criterion = extend(net()), extend(nn.CrossEntropyLoss())

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def step() -> None:
        loss = criterion(model(batch()), Y)
        with backpack(ext()):
            loss.backward()

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        before = tensors()
        for _ in range(3):
            step()
        assert tensors() == before
    finally:
        gc.enable()


def test_a_backward_pass_leaves_no_hook_behind() -> None:
    model, x = extend(net()), batch()
    out = model(x)
    out.register_hook(lambda g: None)
    loss = F.cross_entropy(out, Y)
    with backpack(BatchGrad(), HMP(), KFRA()):
        loss.backward(retain_graph=True)
        fields_before = fields(model, "grad_batch")
    loss.backward()  # outside: nothing is computed any more
    assert all(fields(model, "grad_batch")[name] is value for name, value in fields_before.items())
    assert len(out._backward_hooks) == 1
    assert all(len(m._forward_hooks) == len(m._forward_pre_hooks) == 1 for m in model.modules())
    assert not any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


# -- what else runs ------------------------------------------------------------------------------------------


def test_the_users_hooks_and_retained_gradients_see_one_backward_pass() -> None:
    model, x = extend(net()), batch()
    criterion = extend(nn.CrossEntropyLoss())
    calls: list[Tensor] = []
    out = model(x)
    out.retain_grad()
    out.register_hook(calls.append)
    loss = criterion(out, Y)
    loss.retain_grad()
    with backpack(BatchGrad(), DiagGGNExact(), KFAC(), HMP(), GGNMP()):
        loss.backward()
    expected = torch.softmax(out.detach(), 1)
    expected[range(5), Y] -= 1
    oracle.assert_close(out.grad, expected / 5)
    assert len(calls) == 1
    assert loss.grad == 1


def test_checkpointed_blocks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model, x = extend(Model()), batch()
    loss = F.cross_entropy(model(x), Y)
    with backpack(BatchGrad()):
        loss.backward()
    oracle.assert_close(fields(model, "grad_batch"), expected_gradients(model, x))


def test_attention_in_second_order() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))

    model, x = extend(Model()), torch.randn(5, 3, 4)
    with backpack(DiagHessian(), DiagGGNExact()):
        F.cross_entropy(model(x), Y).backward()
    oracle.assert_close(fields(model, "diag_ggn_exact"), expected_ggn(model, x), rel=1e-9)
    plain = copy.deepcopy(model)
    with disable(), oracle.plain_operations():
        expected = oracle.diag_hessian(oracle.parameters(plain), lambda: F.cross_entropy(plain(x), Y))
    oracle.assert_close(fields(model, "diag_h"), expected, rel=1e-9)


def test_torch_func_over_an_extended_model() -> None:
    model, x = extend(net()), batch()
    parameters = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None]) / 5

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, Y)
    oracle.assert_close(found, expected_gradients(model, x))


# -- where BackPACK is silently wrong --------------------------------------------------------------------------


def test_circular_padding_groups_and_group_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=2), nn.GroupNorm(2, 4), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    x = torch.randn(5, 2, 3, 3)
    loss = extend(nn.CrossEntropyLoss())(extend(model)(x), Y)
    with backpack(BatchGrad(), BatchL2Grad(), DiagGGNExact()):
        loss.backward()
    expected = expected_gradients(model, x)
    oracle.assert_close(fields(model, "grad_batch"), expected)
    oracle.assert_close(fields(model, "batch_l2"), {k: g.flatten(1).square().sum(1) for k, g in expected.items()})
    oracle.assert_close(fields(model, "diag_ggn_exact"), expected_ggn(model, x))


def test_tied_weights() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), batch()
    model[2].weight = model[0].weight
    loss = F.cross_entropy(extend(model)(x), Y)
    with backpack(SumGradSquared(), Variance()):
        loss.backward()
    expected = expected_gradients(model, x)
    oracle.assert_close(fields(model, "sum_grad_squared"), oracle.second_moment(expected))
    oracle.assert_close(fields(model, "variance"), oracle.variance(expected))


def test_train_mode_batch_norm_is_refused() -> None:
    model = extend(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    loss = F.cross_entropy(model(batch()), Y)
    with backpack(BatchGrad()), pytest.raises(errors.SamplesMixed, match=r"model\.eval"):
        loss.backward()


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].T @ x


def test_a_custom_function_on_a_parameter_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + Hidden.apply(x, self.layer.weight)

    loss = F.cross_entropy(extend(Model())(batch()), Y)
    with backpack(BatchGrad()), pytest.raises(errors.UncoveredUse, match=r"layer\.weight"):
        loss.backward()


def test_a_penalty_in_the_loss_is_refused() -> None:
    model = extend(net())
    loss = F.cross_entropy(model(batch()), Y) + model[0].weight.square().sum()
    with backpack(BatchGrad()), pytest.raises(errors.Undefined, match="enters the loss directly"):
        loss.backward()


def test_inside_and_around_observe() -> None:
    x = batch()
    for around in (False, True):
        model = extend(net())
        contexts = [backpack(DiagGGNExact()), lw.observe(model, lw.DiagGGN())]
        outer, inner = reversed(contexts) if around else contexts
        with outer as first, inner as second:
            F.cross_entropy(model(x), Y).backward()
        seen = first if around else second
        oracle.assert_close(fields(model, "diag_ggn_exact"), expected_ggn(model, x))
        oracle.assert_close(fields(model, "diag_ggn_exact"), dict(seen.diag_ggn))


# -- forms of results ------------------------------------------------------------------------------------------


def test_factors_of_a_convolution() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        torch.randn(5, 2, 4, 4),
    )
    loss = F.cross_entropy(extend(model)(x), Y)
    with backpack(KFLR()):
        loss.backward()
    a = F.unfold(x, 2, stride=2)
    oracle.assert_close(model[0].weight.kflr[1], torch.einsum("nit,njt->ij", a, a) / 5)
    plain = copy.deepcopy(model)
    with disable():  # the output factor is the bias's block
        block = oracle.ggn({"b": plain[0].bias}, lambda: plain(x), lambda z: F.cross_entropy(z, Y))
    oracle.assert_close(model[0].weight.kflr[0], block)
    oracle.assert_close(model[0].bias.kflr[0], block)


def test_recursive_factors_combine_two_forms() -> None:
    """B of "reduce", T times A of "expand", also where a max pool follows an activation."""
    model, x = (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        torch.randn(5, 2, 5, 5),
    )
    plain = copy.deepcopy(model)
    reduce, expand = lw.KFRA(sharing="reduce"), lw.KFRA(sharing="expand")
    with lw.observe(plain, reduce, expand) as seen:
        F.cross_entropy(plain(x), Y).backward()
    loss = F.cross_entropy(extend(model)(x), Y)
    with backpack(KFRA()):
        loss.backward()
    for name, positions in (("0.weight", 16), ("4.weight", 1)):
        b, a = model.get_parameter(name).kfra
        oracle.assert_close(b, seen[reduce].blocks[name].B[0])
        oracle.assert_close(a, positions * seen[expand].blocks[name].A[0])
    oracle.assert_close(model[0].bias.kfra[0], model[0].weight.kfra[0])
    assert len(model[0].bias.kfra) == 1


def test_recursive_factors_need_a_chain() -> None:
    model = extend(nn.Sequential(Parallel(nn.Linear(4, 3), nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)))
    loss = F.cross_entropy(model(batch()), Y)
    with backpack(KFRA()), pytest.raises(errors.Undefined):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_factors_of_groups_are_refused() -> None:
    model = extend(nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(12, 3)))
    loss = F.cross_entropy(model(torch.randn(5, 2, 4)), Y)
    with backpack(KFLR()), pytest.raises(errors.Undefined, match="2 groups"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_factors_of_an_embedding_act_on_its_transpose() -> None:
    model, x = nn.Sequential(nn.Embedding(4, 3), nn.Flatten()), torch.tensor([[0], [3], [1], [1], [0]])
    loss = F.cross_entropy(extend(model)(x), Y)
    with backpack(KFLR()):
        loss.backward()
    b, a = model[0].weight.kflr
    assert (tuple(b.shape), tuple(a.shape)) == ((3, 3), (4, 4))
    oracle.assert_close(a, torch.diag(torch.tensor([2.0, 2, 0, 1]) / 5))


def test_root_of_two_losses_and_its_gram() -> None:
    model, x = net(), batch()
    loss = LOSSES["two losses"](extend(model)(x))
    with backpack(SqrtGGNExact()):
        loss.backward()
    roots = fields(model, "sqrt_ggn_exact")
    assert roots["0.weight"].shape == (6, 5, 6, 4)
    flat = torch.cat([r.flatten(0, 1).flatten(1) for r in roots.values()], 1)
    plain = copy.deepcopy(model)
    with disable():
        expected = oracle.ggn(oracle.parameters(plain), lambda: plain(x), LOSSES["two losses"])
    oracle.assert_close(flat.T @ flat, expected)


@pytest.mark.parametrize(("ext", "field"), [(HMP, "hmp"), (GGNMP, "ggnmp")])
def test_block_products_outlive_the_backward_pass(ext: Any, field: str) -> None:
    model, x = extend(net()), batch()
    with backpack(ext()):
        F.cross_entropy(model(x), Y).backward()
    plain = copy.deepcopy(net())
    plain.load_state_dict(model.state_dict())
    for name, p in plain.named_parameters():
        if ext is HMP:
            block = oracle.hessian({name: p}, lambda: F.cross_entropy(plain(x), Y))
        else:
            block = oracle.ggn({name: p}, lambda: plain(x), lambda z: F.cross_entropy(z, Y))
        stack = torch.randn(3, *p.shape)
        product = getattr(model.get_parameter(name), field)
        oracle.assert_close(product(stack), (stack.flatten(1) @ block).view_as(stack))
        with pytest.raises(errors.BadInput, match="takes"):
            product(stack[0])
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(errors.BadInput, match="changed"):
        model[2].weight.__dict__[field](torch.randn(1, 3, 6))


def test_hessian_of_every_sample() -> None:
    model, x = extend(net()), batch()
    with backpack(BatchDiagHessian()):
        F.cross_entropy(model(x), Y).backward()
    plain = copy.deepcopy(model)
    with disable():
        each = [oracle.diag_hessian(oracle.parameters(plain), lambda n=n: terms(plain, x)()[n]) for n in range(5)]
    expected = {name: torch.stack([d[name] for d in each]) for name in each[0]}
    oracle.assert_close(fields(model, "diag_h_batch"), expected)


# -- modules and helpers ---------------------------------------------------------------------------------------


def test_custom_modules() -> None:
    x = batch()
    assert torch.equal(Parallel(nn.Identity(), ScaleModule(2.0))(x), 3 * x)
    assert torch.equal(Parallel(nn.Identity(), nn.Identity(), merge_module=Take())(x), x)
    assert torch.equal(ActiveIdentity()(x), x)
    z = torch.randn(2, 3, 4)
    assert torch.equal(Permute(0, 2, 1)(z), Permute(1, 2, init_transpose=True)(z))
    for build in (lambda: Permute(1, 0, 2), lambda: Permute(0, 1, init_transpose=True), lambda: ScaleModule(2)):
        with pytest.raises(errors.BadInput):
            build()
    with pytest.raises(errors.BadInput, match="one shape"):
        SumModule()(x, x[:, :1])
    assert torch.equal(subsample(z, 1, [2, 0]), z[:, [2, 0]])
    assert subsample(z) is z


class Take(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first


def test_the_core_does_not_import_it() -> None:
    code = "import sys, layerwise; sys.exit(any(name.startswith('layerwise.compat') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names() -> None:
    import layerwise.compat.backpack as package

    assert package.extensions is extensions
    assert {package.backpack, package.extend, package.disable} == {backpack, extend, disable}
    assert all(hasattr(extensions, name) for name in extensions.__all__)


PAGE = (Path(__file__).parent.parent / "docs" / "backpack.md").read_text(encoding="utf-8")


def test_the_page_names_everything_and_its_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(snippet, "docs/backpack.md", "exec"), {})
    for name in set(extensions.__all__) - {"BackpropExtension"}:
        assert f"`{name}(" in PAGE
        assert f"`{getattr(extensions, name)().savefield}`" in PAGE
    for line in re.findall(r"\| `(from layerwise[^`]*)` \|", PAGE):
        exec(line, {})
