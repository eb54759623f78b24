"""The tape: what it takes for parameters, data and constants; random small nets of each family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from layerwise import errors
from layerwise.observe import observe
from layerwise.quantities import KFAC, DiagGGN, PerSampleGrad, SecondMoment, SquaredNorm, Variance
from layerwise.tape import Tape

# What the tape sees ---------------------------------------------------------------------------------


def _record(model: nn.Module, run: Callable[[], object]) -> Tape:
    tape = Tape(model)
    with tape:
        run()
    return tape


def test_values_are_those_of_the_plain_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    with Tape(model):
        out = model(x)
    assert torch.equal(out, model(x))


def test_each_use_is_seen_once_with_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tape = _record(model, lambda: model(model(torch.randn(3, 4))))
    assert [use.names for use in tape.uses] == [["0.bias", "0.weight"], ["2.bias", "2.weight"]] * 2
    assert [use.index for use in tape.uses] == [0, 1, 2, 3]


def test_no_use_under_no_grad_nor_of_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)

    def run() -> None:
        with torch.no_grad():
            model(torch.randn(3, 4))
        model(torch.randn(3, 4))

    assert [use.names for use in _record(model, run).uses] == [["1.bias", "1.weight"]]


def test_fused_optimizers_leave_the_parameters_their_names() -> None:
    """Torch's foreach calls return lists of the parameters that they change."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt = torch.optim.Adam(model.parameters(), foreach=True)

    def run() -> None:
        opt.step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model(torch.randn(3, 4))

    assert [use.names for use in _record(model, run).uses] == [["0.bias", "0.weight"], ["1.bias", "1.weight"]]


@pytest.mark.parametrize(
    "make",
    [
        lambda X: X[torch.randperm(20)[:6]],
        lambda X: X[torch.randperm(20)[:6]].mul(2).sub(X.mean(0)).div(X.std(0)),
        lambda X: (X[:6] - X.mean(0)) / X.std(0),
        lambda X: X.mean(0) - X[:6],
        lambda X: X.mean(0, keepdim=True) - X[:6],
        lambda X: torch.stack([X[i] for i in range(6)]),
        lambda X: torch.stack(list(X[:6].unbind())).clone(),
        lambda X: next(iter(DataLoader(TensorDataset(X, X), batch_size=6, shuffle=True)))[0],
        lambda X: X.view(20, 2, 2)[:6].flatten(1),
        lambda X: X.float()[3:9].to(torch.float64).contiguous(),
        lambda X: torch.cat([X[:3], X[10:13]]),
        lambda X: F.dropout(X[:6], 0.5) + 0.1 * torch.randn(6, 4),
        lambda X: 0.1 * torch.randn(6, 4) + X[:6],
        lambda X: torch.where(X[:6] > 0, X[:6], torch.zeros(())),
        lambda X: torch.tensor(X[:6].tolist(), dtype=X.dtype),
        lambda X: torch.from_numpy(X[:6].numpy()),
        lambda X: X[:6].to(memory_format=torch.contiguous_format).requires_grad_(),
    ],
)
def test_loading_is_not_the_model(make: Callable[[Tensor], Tensor]) -> None:
    X = torch.randn(20, 4, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    y = torch.randint(3, (6,))
    with observe(model, PerSampleGrad()) as seen:
        x = make(X)
        F.cross_entropy(model(x), y).backward()
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / 6)
    oracle.assert_close(dict(seen.per_sample_grad), want)


def test_checkpointing_inside_a_compiled_and_frozen_net() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[2].weight.requires_grad_(False)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))

    def logits() -> Tensor:
        return model[3:](checkpoint(model[:3], x, use_reentrant=False))

    grads = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / 5)
    with observe(model, PerSampleGrad(), Variance(), DiagGGN(), KFAC(2)) as seen:
        F.cross_entropy(logits(), y).backward()
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    ggn = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, y))
    oracle.assert_close(dict(seen.diag_ggn), ggn)


def test_the_users_own_gradients_pass() -> None:
    """torch.autograd.grad inside the context neither counts nor fails."""
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    with observe(model, SecondMoment()) as seen:
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        with pytest.raises(errors.NoBackward):
            _ = seen.second_moment
        loss.backward()
    oracle.assert_close(dict(seen.grad), {"weight": grads[0], "bias": grads[1]})


def test_hooks_on_activations_see_the_users_backward_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    calls: list[Tensor] = []
    with observe(model, SecondMoment(), DiagGGN(), KFAC()):
        h = model[0](x)
        h.register_hook(calls.append)
        F.cross_entropy(model[2](h.tanh()), y).backward()
    assert [tuple(g.shape) for g in calls] == [(5, 4)]


# Random nets ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Net:
    """A drawn model with its batch; `valid` where plain torch can run it."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: str
    reduction: str

    def logits(self) -> Tensor:
        return self.model(self.x)

    def value(self) -> Tensor:
        call = F.cross_entropy if self.loss == "ce" else F.mse_loss
        if self.reduction == "none":
            return call(self.logits(), self.y, reduction="none").sum()
        return call(self.logits(), self.y, reduction=self.reduction)

    def terms(self) -> Tensor:
        """By formulas that share nothing with the calls."""
        z = self.logits()
        if self.loss == "ce":
            e = -z.log_softmax(1).gather(1, self.y.unsqueeze(1)).squeeze(1)
        else:
            e = (z - self.y) ** 2
        e = e / e.numel() if self.reduction == "mean" else e
        return e.reshape(len(z), -1).sum(1)


def _linear(draw: Callable, i: int, o: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    lead = draw(st.sampled_from([(), (2,), (3, 1)]))
    h = draw(st.integers(1, 4))
    layers = [nn.Linear(i, h, bias=draw(st.booleans())), nn.Tanh(), nn.Linear(h, o, bias=draw(st.booleans()))]
    return [*layers, _Flat(len(lead))], (*lead, i)


class _Flat(nn.Module):
    """The mean over the axes between samples and features, or after the channels."""

    def __init__(self, axes: int, last: bool = False):
        super().__init__()
        self.axes, self.last = axes, last

    def forward(self, x: Tensor) -> Tensor:
        if not self.axes:
            return x
        return x.mean(tuple(range(2, x.dim())) if self.last else tuple(range(1, 1 + self.axes)))


def _conv(draw: Callable, i: int, o: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    transposed = draw(st.integers(0, 3)) == 0
    groups = draw(st.integers(1, 2))
    size = [draw(st.integers(1, 5 if dims < 3 else 3)) for _ in range(dims)]
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    options = {
        "kernel_size": draw(st.integers(1, 3)), "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)), "dilation": draw(st.integers(1, 2)),
        "groups": groups, "bias": draw(st.booleans()),
    }  # fmt: skip
    if not transposed:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    first = kind(i * groups, 2 * groups, **options)
    second = getattr(nn, f"Conv{dims}d")(2 * groups, o, 1)
    return [first, nn.ReLU(inplace=True), second, _Flat(dims, last=True)], (i * groups, *size)


def _norm(draw: Callable, i: int, o: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    kind = draw(st.sampled_from(["layer", "group", "instance", "rms", "batch", "prelu"]))
    # a norm of one number is 0 in truth and rounding noise in fact
    size = [draw(st.integers(2, 3)) for _ in range(draw(st.integers(1, 2)))]
    c = 2 * i
    layer = {
        "layer": lambda: nn.LayerNorm(size, bias=draw(st.booleans())),
        "group": lambda: nn.GroupNorm(draw(st.sampled_from([1, 2, c])), c),
        "instance": lambda: (nn.InstanceNorm1d if len(size) == 1 else nn.InstanceNorm2d)(c, affine=True),
        "rms": lambda: nn.RMSNorm(size[-1]),
        "batch": lambda: (nn.BatchNorm1d if len(size) == 1 else nn.BatchNorm2d)(c),
        "prelu": lambda: nn.PReLU(draw(st.sampled_from([1, c]))),
    }[kind]()
    conv = nn.Conv1d if len(size) == 1 else nn.Conv2d
    return [conv(i, c, 1), layer, nn.Tanh(), conv(c, o, 1), _Flat(len(size), last=True)], (i, *size)


def _embedding(draw: Callable, i: int, o: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    padding = draw(st.sampled_from([None, 0, -1]))
    h = draw(st.integers(1, 4))
    return [nn.Embedding(4, h, padding_idx=padding), _Flat(len(lead)), nn.Tanh(), nn.Linear(h, o)], lead


TORCHS_OWN = (RuntimeError, ValueError, AssertionError, IndexError)  # of batches that plain torch refuses too
FAMILIES = {"linear": _linear, "conv": _conv, "norm": _norm, "embedding": _embedding}


@st.composite
def nets(draw: Callable, family: str) -> Net:
    """Small nets of one family, some of which plain torch cannot run."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    n, i, o = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layers, shape = FAMILIES[family](draw, i, o)
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    model = nn.Sequential(*layers).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    for p in model.parameters():
        p.requires_grad_(draw(st.integers(0, 4)) > 0)
    x = torch.randint(4, (n, *shape)) if family == "embedding" else torch.randn(n, *shape, dtype=dtype)
    loss = draw(st.sampled_from(["ce", "mse"]))
    y = torch.randint(o, (n,)) if loss == "ce" else torch.randn(n, o, dtype=dtype)
    return Net(model, x, y, loss, draw(st.sampled_from(["mean", "sum", "none"])))


def _runs(net: Net) -> bool:
    """Whether plain torch computes a loss that depends on some parameter."""
    try:
        loss = net.value()
    except TORCHS_OWN:
        return False
    return bool(torch.isfinite(loss)) and loss.requires_grad


def _check(net: Net) -> None:
    valid = len(net.x) > 0 and _runs(net)
    try:
        with observe(net.model, PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), DiagGGN(), KFAC()) as seen:
            loss = net.value()
            if loss.requires_grad:
                loss.backward()
    except errors.AmbiguousSamples:
        assert all(p.grad is None for p in net.model.parameters())
        return
    except errors.LayerwiseError:
        assert not valid, "refused, though plain torch runs it"
        assert all(p.grad is None for p in net.model.parameters())
        return
    except TORCHS_OWN:
        assert not valid  # torch's own error of a call without parameters (a padding, a pooling)
        assert not _runs(net)
        return
    if not valid:
        return
    rel = 1e-10 if net.x.dtype == torch.float64 or next(net.model.parameters()).dtype == torch.float64 else 2e-4
    params = oracle.parameters(net.model)
    grads = oracle.per_sample_grad(params, net.terms)
    used = set(seen.grad)
    want = {
        "per_sample_grad": grads,
        "squared_norm": oracle.squared_norm(grads),
        "second_moment": oracle.second_moment(grads),
        "diag_ggn": oracle.diag_ggn(params, net.logits, lambda z: _loss_of(net, z)),
    }
    for name, values in want.items():
        got = getattr(seen, name)
        assert set(got) == used
        # of the largest of all parameters: a bias before a norm has gradient 0 in truth, and noise in fact
        peak = max((float(values[k].abs().max()) for k in used), default=0.0)
        for k in used:
            assert got[k].shape == values[k].shape
            assert float((got[k] - values[k]).abs().max()) <= rel * max(peak, 1e-6), (name, k)
    peak = max((float(want["second_moment"][k].max()) for k in used), default=0.0) / len(net.x)
    for name, value in oracle.variance(grads).items():
        if name in used:  # a difference of numbers of this size
            assert float((seen.variance[name] - value).abs().max()) <= rel * max(peak, 1e-6)


def _loss_of(net: Net, z: Tensor) -> Tensor:
    reduction = "sum" if net.reduction == "none" else net.reduction
    return (F.cross_entropy if net.loss == "ce" else F.mse_loss)(z, net.y, reduction=reduction)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_nets(family: str) -> None:
    @settings(max_examples=60)
    @given(nets(family))
    def check(net: Net) -> None:
        _check(net)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_nets(family: str) -> None:
    @settings(max_examples=600)
    @given(nets(family))
    def check(net: Net) -> None:
        _check(net)

    check()
