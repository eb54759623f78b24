"""Codes in place of outputs: substitution, replay and what they must not touch."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from grids import one_in
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise.errors import BadInput, Undefined
from layerwise.replay.coded import CodedModel

CASES = zoo.cases(first_loss_only=True)


def codes_of(coded: CodedModel, uses: list[int], seed: int = 0) -> dict[int, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {
        i: torch.randn(coded.uses[i].call.out_shape, generator=gen, dtype=torch.float64).requires_grad_() for i in uses
    }


def weights_in(coded: CodedModel) -> list[int]:
    """The uses whose output has more than one element: those that may carry codes."""
    return [u.index for u in coded.uses if u.call.out_shape.numel() > 1]


def agree(coded: CodedModel, codes: dict[int, Tensor], uses: list[int]) -> None:
    """Replay and substitution: equal outputs bitwise, equal gradients by the codes."""
    wanted, found = coded.substitute(codes, gradients=False), coded._replay(codes, uses, True)
    assert wanted.loss is not None and found.loss is not None
    assert torch.equal(wanted.loss, found.loss)
    for i in uses:
        assert torch.equal(wanted.predictions[i], found.predictions[i])
        for one, two in zip(tensors(wanted.calls[i]), tensors(found.calls[i]), strict=True):
            assert torch.equal(one, two)
    try:
        wanted = coded.substitute(codes)
    except Undefined:  # checkpointed: replay alone has gradients
        return
    leaves = list(codes.values())
    for out in (lambda o: o.loss, *(lambda o, i=i: o.predictions[i].square().sum() for i in uses)):
        one, two = (torch.autograd.grad(out(o), leaves, allow_unused=True, retain_graph=True) for o in (wanted, found))
        for g, h, leaf in zip(one, two, leaves, strict=True):  # no path is a gradient of 0
            g, h = (torch.zeros_like(leaf) if v is None else v for v in (g, h))
            torch.testing.assert_close(g, h, rtol=0, atol=1e-14 * max(1.0, float(g.abs().max())))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


@one_in(2, case=CASES)
def test_replay_equals_substitution_on_the_zoo(case: zoo.Case) -> None:
    made = case.make()
    coded = CodedModel(made.subject, made.loss)
    uses = weights_in(coded)
    codes = codes_of(coded, uses)
    if coded.replays(codes):
        agree(coded, codes, uses)
        whole = coded.substitute(codes, gradients=False)
        for i in uses:  # one at a time, and in pieces
            agree(coded, {i: codes[i]}, uses)
            assert torch.equal(coded.piece(codes, [i], False).predictions[i], whole.predictions[i])


def test_most_of_the_zoo_replays() -> None:
    """A proof that always failed would make the test above empty."""
    proved = []
    for case in CASES:
        made = case.make()
        coded = CodedModel(made.subject, made.loss)
        proved.append(coded.replays(weights_in(coded)))
    assert sum(proved) >= 0.9 * len(proved)


def test_without_codes_everything_is_as_in_the_first_run() -> None:
    made = zoo.case("residual").make()
    coded = CodedModel(made.subject, made.loss)
    for out in (coded.substitute({}), coded.piece({}, weights_in(coded), True)):
        assert torch.equal(out.loss, coded.loss)  # type: ignore[arg-type]
        for i in weights_in(coded):
            assert torch.equal(out.predictions[i], coded.uses[i].value)  # type: ignore[arg-type]


# Programs --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def coded_of(net: nn.Module, x: Tensor = X, head: Callable[[Any], Tensor] = lambda out: out) -> CodedModel:
    return CodedModel(net, lambda: F.cross_entropy(head(net(x)), Y[: len(x)]))


def lenet() -> Net:
    return Net(
        lambda m, x: m.c(F.max_pool2d(m.b(F.relu(m.a(x), inplace=True)), 2).relu_().flatten(1)),
        a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(3, 4, 3, padding=1), c=nn.Linear(36, 3),
    )  # fmt: skip


def two_into_one() -> Net:
    return Net(lambda m, x: m.c(m.a(x) + m.b(x.tanh())), a=nn.Linear(4, 5), b=nn.Linear(4, 5), c=nn.Linear(5, 3))


PROGRAMS: dict[str, Callable[[], CodedModel]] = {
    "chain": lambda: coded_of(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    ),
    "two codes into one use": lambda: coded_of(two_into_one()),
    "in-place relu and flatten": lambda: coded_of(lenet(), IMAGES),
    "in-place on the logits": lambda: coded_of(
        Net(lambda m, x: m.b(m.a(x).tanh_()).div_(2.0), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    ),
    "dict output": lambda: coded_of(
        Net(lambda m, x: {"h": (h := m.a(x)), "z": m.b(h.relu())}, a=nn.Linear(4, 5), b=nn.Linear(5, 3)),
        head=lambda out: out["z"],
    ),
    "reused": lambda: coded_of(Net(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 3))),
    "transposed and normed weights": lambda: coded_of(
        Net(
            lambda m, x: m.b(m.c(x @ m.a.weight.T).tanh()),
            a=nn.Linear(4, 4),
            b=nn.Linear(5, 3),
            c=nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
        )
    ),
    "chunks": lambda: coded_of(
        Net(lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, -1)).sigmoid()), a=nn.Linear(4, 10), b=nn.Linear(5, 3))
    ),
    "setitem": lambda: coded_of(Net(lambda m, x: _filled(m.a(x), m.b(x)), a=nn.Linear(4, 2), b=nn.Linear(4, 1))),
    "eval norms": lambda: coded_of(
        Net(lambda m, x: m.c(m.b(m.a(x)).relu()), a=nn.Linear(4, 5), b=nn.BatchNorm1d(5), c=nn.Linear(5, 3)).eval()
    ),
}


def _filled(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_zeros(len(a), 3)
    out[:, :2] = a
    out[:, 2:] = b
    return out.tanh()


@pytest.mark.parametrize("name", PROGRAMS)
def test_replay_is_proved_and_exact(name: str) -> None:
    coded = PROGRAMS[name]()
    uses = weights_in(coded)
    assert coded.replays(uses)
    agree(coded, codes_of(coded, uses), uses)
    for chosen in ([uses[0]], uses[:-1], uses[-1:]):
        assert coded.replays(chosen)
        agree(coded, codes_of(coded, chosen, seed=2), uses)


def test_predictions_are_not_overwritten_by_what_follows_in_place() -> None:
    net = Net(lambda m, x: m.b(m.a(x).tanh_()).div_(2.0), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    coded = coded_of(net)
    code = torch.randn(6, 5, dtype=torch.float64)
    for out in (coded.substitute({0: code}), coded.piece({0: code}, [0, 1], True)):
        assert torch.equal(out.predictions[0], net.a(X)) and torch.equal(out.predictions[1], net.b(code.tanh()))


def test_pieces_run_only_the_calls_between() -> None:
    """A deep chain: the output of a use given the code below costs one block, and gradients stay inside it."""
    ran: list[int] = []

    class Count(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    blocks = [m for k in range(6) for m in (nn.Linear(4, 4), Count(k))]
    net = nn.Sequential(*blocks, nn.Linear(4, 3)).double()
    coded = coded_of(net)
    codes = codes_of(coded, list(range(6)))
    assert coded.replays(codes)
    for step in coded._program:
        step.func = _counted(step.func, ran)
    out = coded.piece(codes, [4], False)
    assert [f.__name__ for f in ran] == ["tanh", "linear"]  # type: ignore[attr-defined]
    found = torch.autograd.grad(out.predictions[4].sum(), list(codes.values()), allow_unused=True)
    assert [g is not None for g in found] == [i == 3 for i in range(6)]
    ran.clear()
    coded.piece(codes, [], True)
    assert [f.__name__ for f in ran] == ["tanh", "linear", "__getitem__", "cross_entropy"]  # type: ignore[attr-defined]
    ran.clear()
    coded.piece(codes, [0, 6], False)
    assert [f.__name__ for f in ran] == ["linear", "tanh", "linear"]  # type: ignore[attr-defined]


def _counted(func: Any, ran: list[Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        ran.append(func)
        return func(*args, **kwargs)

    return call


def test_consumers_of_a_chain_and_of_a_residual_graph() -> None:
    chain = PROGRAMS["chain"]()
    assert chain.consumers([0, 1]) == {0: ([1], False), 1: ([2], True)}
    assert chain.consumers([0, 1, 2]) == {0: ([1], False), 1: ([2], False), 2: ([], True)}
    net = Net(
        lambda m, x: (h := m.a(x)) + m.c(m.b(h.relu()).relu()), a=nn.Linear(4, 3), b=nn.Linear(3, 5), c=nn.Linear(5, 3)
    )
    found = coded_of(net).consumers([0, 1, 2])
    assert found == {0: ([1], True), 1: ([2], False), 2: ([], True)}
    assert coded_of(net).consumers([0]) == {0: ([1, 2], True)}
    assert coded_of(two_into_one()).consumers([0, 1]) == {0: ([2], True), 1: ([2], True)}


# Where replay cannot serve ---------------------------------------------------------------------------------


def test_dropout_takes_substitution_with_the_same_mask() -> None:
    net = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    coded = coded_of(net)
    assert not coded.replays([0])
    state = torch.get_rng_state()
    code = torch.ones(6, 50, dtype=torch.float64)
    one, two = (coded.piece({0: code}, [1], True) for _ in range(2))
    assert torch.equal(one.predictions[1], two.predictions[1]) and torch.equal(one.loss, two.loss)  # type: ignore[arg-type]
    assert torch.equal(coded.piece({}, [], True).loss, coded.loss)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


def test_pythons_own_generator_is_put_back_too() -> None:
    net = Net(lambda m, x: m.b(m.a(x) * random.random()), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    coded = coded_of(net)
    state = random.getstate()
    assert torch.equal(coded.substitute({}).loss, coded.loss)  # type: ignore[arg-type]
    assert random.getstate() == state


def test_control_flow_on_values_takes_substitution_and_a_changed_path_is_an_error() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h.relu()) if h.sum() > 1000 else m.c(h).tanh() @ m.b.weight[:, :3].T

    net = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3), c=nn.Linear(5, 3))
    coded = coded_of(net)
    assert not coded.replays([0])
    small, large = torch.zeros(6, 5, dtype=torch.float64), torch.full((6, 5), 1e3, dtype=torch.float64)
    assert coded.piece({0: small}, [1], True).loss is not None
    with pytest.raises(Undefined, match="path depends on the codes"):
        coded.piece({0: large}, [1], True)


def test_a_view_written_later_is_caught_by_the_proof() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        out = z.new_zeros(len(z), 10)
        part = out[:, :5]
        part.copy_(z)  # changes `out` without naming it
        return m.b(out.tanh())

    net = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(10, 3))
    coded = coded_of(net)
    assert not coded.replays([0])
    code = torch.randn(6, 5, dtype=torch.float64)
    wanted = net.b(torch.cat([code, torch.zeros_like(code)], 1).tanh())
    assert torch.equal(coded.piece({0: code}, [1], False).predictions[1], wanted)


class _Sign(torch.autograd.Function):
    """Binary activations with the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * g


def test_a_custom_function_keeps_its_own_backward() -> None:
    """The calls inside it are seen, and replayed they would have torch's derivative: here 0."""
    net = Net(lambda m, x: m.b(_Sign.apply(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    coded = coded_of(net)
    assert not coded.replays([0])
    code = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    out = coded.piece({0: code}, [1], True)
    wanted = torch.autograd.grad(F.cross_entropy(net.b(h := code.sign().detach().requires_grad_()), Y), h)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, code)[0], 3 * wanted)  # type: ignore[arg-type]


def test_what_ran_without_gradients_replays_without() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        with torch.no_grad():
            scale = h.abs().amax(1, keepdim=True)
        return m.b(h / scale * h.detach().exp())

    net = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    coded = coded_of(net)
    assert coded.replays([0])
    agree(coded, codes_of(coded, [0]), [0, 1])


def test_a_use_that_writes_in_place_carries_a_code() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_ones(len(x), 5)
        h.addmm_(x, m.a.weight)  # the closure goes on with the tensor that it gave
        return m.b(h.tanh())

    net = Net(forward, a=nn.Linear(5, 4, bias=False), b=nn.Linear(5, 3))
    coded = coded_of(net)
    code = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    out = coded.substitute({0: code})
    assert torch.equal(out.predictions[0], 1 + X @ net.a.weight) or torch.allclose(
        out.predictions[0], 1 + X @ net.a.weight, rtol=1e-12
    )
    assert torch.equal(out.predictions[1], net.b(code.tanh()))
    assert torch.autograd.grad(out.loss, code)[0].any()  # type: ignore[arg-type]


def test_nan_in_random_proofs_does_not_matter() -> None:
    net = Net(lambda m, x: m.b(m.a(x).exp().log1p().sqrt().log().mul(1.0)), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    assert coded_of(net).replays([0])
    net = Net(lambda m, x: m.b((m.a(x) + 100).log()), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    coded = coded_of(net)  # log of a random code is NaN
    assert coded.replays([0]) and bool(torch.isnan(coded.substitute({0: torch.full((6, 5), -200.0).double()}).loss))


# What a run must leave as it was ---------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("drop", [0.0, 0.5], ids=["replay", "substitution"])
def test_batch_norm_statistics_are_frozen_and_advance_once(momentum: float | None, drop: float) -> None:
    def make() -> Net:
        net = Net(
            lambda m, x: m.c(F.dropout(m.b(m.a(x)), drop) if drop else m.b(m.a(x))),
            a=nn.Linear(4, 5), b=nn.BatchNorm1d(5, momentum=momentum), c=nn.Linear(5, 3),
        )  # fmt: skip
        return net.train()

    net, plain = make(), make()
    plain(X)
    wanted = {n: b.clone() for n, b in plain.named_buffers()}
    z = net.a(X)
    coded = coded_of(net)
    codes = {0: torch.randn(6, 5, dtype=torch.float64)}
    assert coded.replays(codes) == (not drop and momentum is not None)
    for _ in range(2):
        out = coded.piece(codes, [1], True)
    frozen = (codes[0] - z.mean(0)) / (z.var(0, unbiased=False) + net.b.eps).sqrt()
    torch.testing.assert_close(out.predictions[1], frozen * net.b.weight + net.b.bias, rtol=1e-12, atol=1e-12)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, wanted[name]), name


def test_instance_norm_and_buffers_of_ones_own_advance_once() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
            self.calls += 1
            return x - self.mean.view(-1, 1, 1)

    def make() -> Net:
        return Net(
            lambda m, x: m.d(m.r(m.n(m.a(x))).relu().flatten(1)), a=nn.Conv2d(2, 3, 3),
            n=nn.InstanceNorm2d(3, affine=True, track_running_stats=True), r=Running(), d=nn.Linear(48, 3),
        )  # fmt: skip

    net, plain = make(), make()
    plain(IMAGES)
    coded = coded_of(net, IMAGES)
    codes = codes_of(coded, [0])
    coded.replays(codes)
    for _ in range(2):
        out = coded.piece(codes, [], True)
    assert torch.equal(out.loss, coded.substitute(codes).loss)  # type: ignore[arg-type]
    assert torch.equal(coded.substitute({}).loss, coded.loss)  # type: ignore[arg-type]
    for (name, buffer), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, wanted), name


def test_a_backward_of_the_closure_is_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def closure() -> Tensor:
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss

    coded = CodedModel(net, closure)
    out = coded.piece(codes_of(coded, [0]), [1], True)
    assert out.loss is not None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("loss", [None, 1.0, X])
def test_a_closure_without_a_loss_is_refused(loss: Any) -> None:
    net = nn.Linear(4, 3).double()

    def closure() -> Any:
        net(X)
        return loss

    with pytest.raises(BadInput, match="must return the loss"):
        CodedModel(net, closure)


def test_checkpointed_blocks_give_the_codes_gradient() -> None:
    """Recomputed blocks would forget their codes: replay has none, and its gradient is exact."""
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
    net = Net(lambda m, x: m.b(checkpoint(m.inner, x, use_reentrant=False)), inner=inner, b=nn.Linear(4, 3))
    coded = coded_of(net)
    codes = codes_of(coded, [0, 1])
    assert coded.replays(codes)
    out = coded.piece(codes, [1], True)
    (g,) = torch.autograd.grad(out.loss, codes[1])  # type: ignore[arg-type]
    (wanted,) = torch.autograd.grad(F.cross_entropy(net.b(codes[1].tanh()), Y), codes[1])
    torch.testing.assert_close(g, wanted)
    (g,) = torch.autograd.grad(out.predictions[1].sum(), codes[0])
    (wanted,) = torch.autograd.grad(net.inner[2](codes[0].tanh()).sum(), codes[0])
    torch.testing.assert_close(g, wanted)


def test_a_checkpointed_block_that_cannot_be_replayed_is_refused() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 4), nn.Tanh())
    net = Net(lambda m, x: m.b(checkpoint(m.inner, x, use_reentrant=False)), inner=inner, b=nn.Linear(4, 3))
    coded = coded_of(net)
    with pytest.raises(Undefined, match="checkpoints a block"):
        coded.piece(codes_of(coded, [0, 1]), [1], True)


def test_a_custom_function_in_a_checkpointed_block_is_refused() -> None:
    """Its gradient cannot be compared with substitution's, so replay must not serve it on equal values alone."""
    net = Net(
        lambda m, x: m.b(checkpoint(lambda h: _Sign.apply(m.a(h)), x, use_reentrant=False)),
        a=nn.Linear(4, 5), b=nn.Linear(5, 3),
    )  # fmt: skip
    coded = coded_of(net)
    assert not coded.replays([0])
    with pytest.raises(Undefined, match="checkpoints a block"):
        coded.piece(codes_of(coded, [0]), [1], True)


def test_weights_that_changed_are_read_anew() -> None:
    """Derived weights are part of the program: a transposed, a weight-normed and a plain one."""
    coded = PROGRAMS["transposed and normed weights"]()
    uses = weights_in(coded)
    codes = codes_of(coded, uses)
    assert coded.replays(codes)
    before = coded.piece(codes, uses, True)
    with torch.no_grad():
        for p in coded.tape.parameters.values():
            p.mul_(1.5).add_(0.1)
    agree(coded, codes, uses)
    after = coded.piece(codes, uses, True)
    assert all(not torch.equal(before.predictions[i], after.predictions[i]) for i in uses)


def test_memory_is_released_with_the_coded_model() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    gc.collect()
    gc.disable()
    try:
        coded = coded_of(net)
        out = coded.piece(codes_of(coded, [0]), [1], True)
        held = weakref.ref(coded.uses[0].call.args[0]), weakref.ref(out.predictions[1]), weakref.ref(coded)
        del coded, out
        assert [ref() for ref in held] == [None, None, None]
    finally:
        gc.enable()


def test_the_memo_of_proofs_does_not_grow_without_end() -> None:
    net, proofs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), {}
    for n in range(1, 6):
        x, y = torch.randn(n, 4, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
        coded = CodedModel(net, lambda x=x, y=y: F.cross_entropy(net(x), y), proofs)
        assert coded.replays([0])
        assert len(proofs) == n
    from layerwise.replay import coded as replay

    proofs.update(dict.fromkeys(range(replay._MOST_PROOFS), True))
    assert CodedModel(net, lambda: F.cross_entropy(net(X), Y), proofs).replays([0])
    assert len(proofs) == 1


def test_the_proof_is_kept_from_step_to_step() -> None:
    net, proofs, ran = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), {}, []
    for n in range(3):
        coded = CodedModel(net, lambda: (ran.append(1), F.cross_entropy(net(X), Y))[1], proofs)
        coded.piece({0: torch.zeros(6, 5, dtype=torch.float64)}, [1], True)
        assert len(ran) == 2 + n  # the first step runs the closure once more, for the proof
