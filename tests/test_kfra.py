"""KFRA against brute force, KFLR, and BackPACK; and where it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle_slices import gradient_factors
from torch import Tensor, nn
from zoo.parts import Apply, leaf

from layerwise import KFLR, KFRA, accumulate, errors, observe
from layerwise.operators.kronecker import Kronecker

pytestmark = pytest.mark.usefixtures("float64")

Loss = Callable[[Tensor], Tensor]


def mlp(*activations: nn.Module, bias: bool = True) -> nn.Sequential:
    """5-7-6-...-4 with the given activations between."""
    sizes = [5, 7, 6, 5, 7][: len(activations) + 1]
    layers: list[nn.Module] = []
    for i, o, f in zip(sizes, [*sizes[1:], 4], [*activations, None], strict=True):
        layers += [nn.Linear(i, o, bias=bias), *([] if f is None else [f])]
    return nn.Sequential(*layers)


def frozen(model: nn.Sequential, *indices: int) -> nn.Sequential:
    """Some layers made constant."""
    for i in indices:
        model[i].requires_grad_(False)
    return model


def normed() -> nn.Sequential:
    """A batch norm in evaluation mode, with parameters and running means of its own."""
    norm = nn.BatchNorm1d(7).eval()
    norm.load_state_dict({k: torch.rand(7) + 0.5 for k in ("weight", "bias", "running_mean", "running_var")}, False)
    return nn.Sequential(nn.Linear(5, 7), norm, nn.Tanh(), nn.Linear(7, 4))


def conv(*parts: nn.Module, features: int) -> nn.Sequential:
    """A convolution, given parts, and a linear layer of their `features`."""
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *parts, nn.Flatten(), nn.Linear(features, 4))


CHAINS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4)), (5,)),
    "only_linear": (lambda: mlp(nn.Identity(), nn.Identity()), (5,)),
    "sigmoid": (lambda: mlp(nn.Sigmoid(), nn.Sigmoid()), (5,)),
    "tanh": (lambda: mlp(nn.Tanh(), nn.Tanh(), nn.Tanh()), (5,)),
    "relu": (lambda: mlp(nn.ReLU(), nn.ReLU(inplace=True)), (5,)),
    "softplus": (lambda: mlp(nn.Softplus()), (5,)),
    "leaky_relu": (lambda: mlp(nn.LeakyReLU(0.1), nn.GELU()), (5,)),
    "dropout": (lambda: mlp(nn.Sequential(nn.Tanh(), nn.Dropout(0.4)), nn.ReLU()), (5,)),
    "without_bias": (lambda: mlp(nn.Sigmoid(), nn.Tanh(), bias=False), (5,)),
    "frozen_below": (lambda: frozen(mlp(nn.Tanh(), nn.Tanh()), 0), (5,)),
    "frozen_between": (lambda: frozen(mlp(nn.Tanh(), nn.Tanh()), 2), (5,)),
    "frozen_above": (lambda: frozen(mlp(nn.Tanh(), nn.Tanh()), 4), (5,)),
    "frozen_bias": (lambda: _frozen_bias(mlp(nn.Tanh())), (5,)),
    "softmax_between": (lambda: mlp(nn.Softmax(-1)), (5,)),
    "output_activation": (lambda: nn.Sequential(*mlp(nn.Tanh()), nn.Sigmoid()), (5,)),
    "output_mixed": (lambda: nn.Sequential(*mlp(nn.Tanh()), nn.Softmax(-1)), (5,)),
    "batch_norm": (normed, (5,)),
    "layer_norm": (lambda: mlp(nn.Sequential(nn.LayerNorm(7), nn.Tanh())), (5,)),
    "prelu": (lambda: mlp(nn.Sequential(nn.PReLU(7), nn.Dropout(0.3)), nn.Tanh()), (5,)),
    "branches_meet": (lambda: mlp(Apply(lambda _, z: z.tanh() * z.sigmoid() + z)), (5,)),
    "tokens": (lambda: nn.Sequential(*mlp(nn.Tanh()), Apply(lambda _, z: z.transpose(1, 2))), (3, 5)),
    "conv_relu_flatten": (lambda: conv(nn.ReLU(), features=48), (2, 4, 4)),
    "conv_max_pool": (lambda: conv(nn.ReLU(), nn.MaxPool2d(2), features=12), (2, 4, 4)),
    "conv_max_pool_overlap": (lambda: conv(nn.Tanh(), nn.MaxPool2d(3, 1), features=12), (2, 4, 4)),
    "conv_mean_pool": (lambda: conv(nn.Tanh(), nn.AvgPool2d(2), features=12), (2, 4, 4)),
    "conv_mean_pool_overlap": (lambda: conv(nn.AvgPool2d(3, 1), features=12), (2, 4, 4)),
    "conv_strided": (lambda: conv(nn.Tanh(), nn.Conv2d(3, 4, 2, stride=2), nn.Sigmoid(), features=16), (2, 4, 4)),
    "conv_grouped": (
        lambda: conv(nn.Tanh(), nn.Conv2d(3, 6, 2, groups=3, padding_mode="circular", padding=1), features=150),
        (2, 4, 4),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)), (2, 6)),
}


def _frozen_bias(model: nn.Sequential) -> nn.Sequential:
    model[0].bias.requires_grad_(False)
    return model


def losses(z: Tensor) -> dict[str, Loss]:
    """Each kind of loss with targets for outputs `z`, under both reductions."""
    n, c = z.shape[:2]
    label = torch.randint(c, (n, *z.shape[2:]))
    real, binary = torch.randn_like(z), torch.randint(2, z.shape).to(z)
    weight = torch.rand(c) + 0.5
    made: dict[str, Loss] = {}
    for r in ("mean", "sum"):
        made[f"ce_{r}"] = lambda z, r=r: F.cross_entropy(z, label, weight=weight, reduction=r)
        made[f"mse_{r}"] = lambda z, r=r: 3 * F.mse_loss(z, real, reduction=r)
        made[f"bce_{r}"] = lambda z, r=r: F.binary_cross_entropy_with_logits(z, binary, reduction=r)
    return made


LOSSES = [f"{kind}_{r}" for kind in ("ce", "mse", "bce") for r in ("mean", "sum")]


def run(model: nn.Module, x: Tensor, seed: int = 5) -> Tensor:
    """The outputs; the same dropout for the same seed."""
    torch.manual_seed(seed)
    return model(x)


def watch(model: nn.Module, x: Tensor, loss: Loss, *quantities: Any) -> Any:
    with observe(model, *quantities) as seen:
        loss(run(model, x)).backward()
    return seen


def factors(operator: Kronecker) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (block.input_factor, block.B) for name, block in operator.blocks.items()}


def same(got: dict[str, tuple[Tensor, Tensor]], want: dict[str, tuple[Tensor, Tensor]], rel: float = 1e-10) -> None:
    """Equal names and factors."""
    assert got.keys() == want.keys()
    for i in range(2):
        oracle.assert_close({n: f[i] for n, f in got.items()}, {n: f[i] for n, f in want.items()}, rel)


# Values -----------------------------------------------------------------------------------------


def each_once(chains: Iterable[str], names: Iterable[str]) -> list[Any]:
    """All pairs, of which `make test` takes every chain with one loss in turn, and every loss several times."""
    names = list(names)
    return [
        pytest.param(chain, name, marks=() if k % len(names) == j else pytest.mark.slow, id=f"{chain}-{name}")
        for k, chain in enumerate(chains)
        for j, name in enumerate(names)
    ]


@pytest.mark.parametrize(("chain", "name"), each_once(CHAINS, LOSSES))
def test_factors_equal_the_oracle(chain: str, name: str) -> None:
    make, shape = CHAINS[chain]
    model, x = make(), torch.randn(6, *shape)
    loss = losses(run(model, x).detach())[name]
    for q in (KFRA(), KFRA("reduce"), KFRA(joint=True), KFRA("reduce", joint=True)):
        want = oracle.kfra_factors(model, lambda: run(model, x), loss, sharing=q.sharing, joint=q.joint)
        got = factors(watch(model, x, loss, q).kfra)
        assert got.keys() >= want.keys()
        same({n: got[n] for n in want}, want)


@pytest.mark.parametrize("chain", CHAINS)
def test_one_sample_gives_kflr(chain: str) -> None:
    """There is no average over one sample: the recursion is exact."""
    make, shape = CHAINS[chain]
    model, x = make(), torch.randn(1, *shape)
    loss = losses(run(model, x).detach())["ce_sum"]
    for sharing in ("expand", "reduce"):
        seen = watch(model, x, loss, KFRA(sharing), KFLR(sharing))
        same(factors(seen.kfra), factors(seen.kflr))


@pytest.mark.parametrize("chain", ["linear", "only_linear"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_linear_chain_gives_kflr(chain: str, name: str) -> None:
    make, shape = CHAINS[chain]
    model, x = make(), torch.randn(6, *shape)
    seen = watch(model, x, losses(model(x).detach())[name], KFRA(), KFLR())
    same(factors(seen.kfra), factors(seen.kflr))


@pytest.mark.parametrize("chain", CHAINS)
def test_the_last_layer_is_that_of_kflr(chain: str) -> None:
    make, shape = CHAINS[chain]
    model, x = make(), torch.randn(6, *shape)
    seen = watch(model, x, losses(run(model, x).detach())["ce_mean"], KFRA(), KFLR())
    last = [name for name in seen.kflr.blocks if name.endswith("weight")][-1:]
    same({n: factors(seen.kfra)[n] for n in last}, {n: factors(seen.kflr)[n] for n in last})


def test_all_parameters_have_blocks_and_a_norms_are_those_of_its_outputs() -> None:
    model, x = normed(), torch.randn(6, 5)
    loss = losses(model(x).detach())["ce_mean"]
    seen = watch(model, x, loss, KFRA())
    assert seen.kfra.blocks.keys() == {name for name, _ in model.named_parameters()}
    # below the norm there is its own map alone, the same for all samples
    scale = model[1].weight.detach() / (model[1].running_var + model[1].eps).sqrt()
    b = {name: block.B for name, block in seen.kfra.blocks.items()}
    oracle.assert_close(b["0.bias"][0].diagonal(), scale**2 * b["1.bias"].flatten())
    oracle.assert_close(b["1.weight"], b["1.bias"])


def test_reductions_differ_by_the_number_of_samples() -> None:
    model, x, y = mlp(nn.Tanh(), nn.ReLU()), torch.randn(6, 5), torch.randint(4, (6,))
    mean = watch(model, x, lambda z: F.cross_entropy(z, y), KFRA()).kfra
    total = watch(model, x, lambda z: F.cross_entropy(z, y, reduction="sum"), KFRA()).kfra
    same({n: (a, 6 * b) for n, (a, b) in factors(mean).items()}, factors(total))
    # the mean's are the recursion for the average Hessian: repeating the batch changes nothing
    x, y = x.repeat(3, 1), y.repeat(3)
    same(factors(watch(model, x, lambda z: F.cross_entropy(z, y), KFRA()).kfra), factors(mean))


class _TimeFirst(nn.Module):
    """The tokens' layers on [T,N,i], or all but the first on [N·T,i]."""

    def __init__(self, inner: nn.Sequential, flat: bool) -> None:
        super().__init__()
        self.inner, self.flat = inner, flat

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return self.inner[1:](self.inner[0](x).flatten(0, 1))
        return self.inner(x.transpose(0, 1)).permute(1, 2, 0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("n", [4, 3])  # as many samples as positions, too
def test_the_samples_axis_may_lie_anywhere(flat: bool, n: int) -> None:
    inner, x, y = mlp(nn.Tanh(), nn.Softmax(-1)), torch.randn(n, 3, 5), torch.randint(4, (n, 3))
    plain = watch(inner, x, lambda z: F.cross_entropy(z.transpose(1, 2), y), KFRA()).kfra
    target = y.flatten() if flat else y
    found = watch(_TimeFirst(inner, flat), x, lambda z: F.cross_entropy(z, target), KFRA()).kfra
    same({f"inner.{name}": f for name, f in factors(plain).items()}, factors(found))


def test_functional_models_and_a_weight_and_bias_in_calls_of_their_own() -> None:
    model, x, y = mlp(nn.Tanh()), torch.randn(6, 5), torch.randint(4, (6,))
    p = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    want = watch(model, x, lambda z: F.cross_entropy(z, y), KFRA()).kfra
    with observe(p, KFRA()) as seen:
        h = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
        F.cross_entropy(torch.addmm(p["2.bias"], h, p["2.weight"].T), y).backward()
    oracle.assert_close({n: b for n, (_, b) in factors(seen.kfra).items() if n != "0.bias"},
                        {n: b for n, (_, b) in factors(want).items() if n != "0.bias"})  # fmt: skip


def test_float32_agrees() -> None:
    model, x, y = conv(nn.Tanh(), nn.MaxPool2d(2), features=12), torch.randn(6, 2, 4, 4), torch.randint(4, (6,))
    want = factors(watch(model, x, lambda z: F.cross_entropy(z, y), KFRA()).kfra)
    got = factors(watch(model.float(), x.float(), lambda z: F.cross_entropy(z, y), KFRA()).kfra)
    assert all(a.dtype == b.dtype == torch.float32 for a, b in got.values())
    same({n: (a.double(), b.double()) for n, (a, b) in got.items()}, want, rel=1e-4)


def test_half_precision_agrees_and_acts_on_the_gradient() -> None:
    model, x, y = mlp(nn.Tanh()).float(), torch.randn(6, 5).float(), torch.randint(4, (6,))
    want = factors(watch(model, x, lambda z: F.cross_entropy(z, y), KFRA()).kfra)
    seen = watch(model.bfloat16(), x.bfloat16(), lambda z: F.cross_entropy(z, y), KFRA())
    got = factors(seen.kfra)
    assert all(a.dtype == b.dtype == torch.float32 for a, b in got.values())
    assert all((got[n][1].float() - b).norm() <= 0.05 * b.norm() for n, (_, b) in want.items())
    assert all(step.dtype == torch.bfloat16 for step in (seen.kfra @ dict(seen.grad)).values())


def test_dead_units_and_zero_curvature() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(6, 5)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    seen = watch(model, x, lambda z: F.mse_loss(z, torch.zeros_like(z)), KFRA())
    assert not seen.kfra.blocks["0.weight"].B.any()
    assert seen.kfra.blocks["2.weight"].B.any()


def test_the_operator_inverts() -> None:
    model, x, y = mlp(nn.Tanh()), torch.randn(6, 5), torch.randint(4, (6,))
    seen = watch(model, x, lambda z: F.cross_entropy(z, y), KFRA(joint=True))
    step = seen.kfra.inverse(1e-2, exact=True) @ seen.grad
    back = seen.kfra @ step
    oracle.assert_close({n: back[n] + 1e-2 * step[n] for n in step}, dict(seen.grad))


def test_the_gradient_is_untouched_and_nothing_is_kept() -> None:
    model, x, y = mlp(nn.Tanh(), nn.ReLU()), torch.randn(6, 5), torch.randint(4, (6,))
    want = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    watch(model, x, lambda z: F.cross_entropy(z, y), KFRA(), KFLR())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))


# Parameters without rows ------------------------------------------------------------------------


class _Low(nn.Module):
    """A weight that is a product, over the last axis."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.up, self.down, self.bias = leaf(o, 2), leaf(2, i), leaf(o)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up @ self.down, self.bias)


class _Part(nn.Module):
    """A weight of which two elements of the first axis are not used."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.w = leaf(o + 2, i)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w[1:-1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_parameters_without_rows(sharing: str, positions: tuple[int, ...], reduction: str) -> None:
    """From gradients: those of every sample from a root of G/N, which is the same for all."""
    last = nn.Flatten() if positions else nn.Identity()
    model = nn.Sequential(_Low(4, 5), nn.Tanh(), _Part(5, 3), nn.Tanh(), _Low(3, 2), last)
    x, classes = torch.randn(4, *positions, 4), 2 * (positions or (1,))[0]
    y = torch.randint(classes, (4,))

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction=reduction)

    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    oracle.kfra_factors(model, lambda: model(x), loss, blocks=blocks)
    kfra = watch(model, x, loss, KFRA(sharing)).kfra
    forms = {"up": "gradients", "down": "gradients", "bias": "rows"}
    assert kfra.forms == {
        **{f"0.{n}": form for n, form in forms.items()}, "2.w": "slices", **{f"4.{n}": f for n, f in forms.items()}
    }  # fmt: skip
    params = dict(model.named_parameters())
    for name in ("0.up", "0.down", "4.up", "4.down"):
        out, g = blocks[name[0]]
        values, vectors = torch.linalg.eigh(g / len(x))
        root = (vectors * values.clamp(min=0).sqrt()).T.view(-1, *out.shape[1:])
        found = [
            torch.autograd.grad(out[n], params[name], column, retain_graph=True)[0]
            for n in range(len(x)) for column in root
        ]  # fmt: skip
        a, b = gradient_factors(torch.stack(found))
        oracle.assert_close(kfra.blocks[name].B, b)
        oracle.assert_close(kfra.blocks[name].input_factor, a)
    out, g = blocks["2"]
    t = out[0].numel() // 3
    g = g.view(t, 3, t, 3)
    b = g.diagonal(dim1=0, dim2=2).sum(-1) if sharing == "expand" else g.sum((0, 2))
    oracle.assert_close(kfra.factors["2.w[0]"][1][0], b)
    assert list(kfra.blocks)[3:5] == ["2.w[0]", "2.w[rest]"]


# Refusals ---------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.c(h + self.b(h))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.a(x).tanh()).tanh())


class _Attention(nn.Module):
    """Self-attention; the projections are one layer, or three."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)] if apart else [nn.Linear(6, 18)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.cat([layer(x) for layer in self.projections], -1).chunk(3, -1)
        return self.head((torch.softmax(q @ k.mT, -1) @ v).mean(1))


def refused(model: nn.Module, x: Tensor, loss: Loss, quantity: KFRA | None = None) -> str:
    """The message of the refusal, after which nothing was changed."""
    with pytest.raises(errors.Undefined) as caught:
        watch(model, x, loss, quantity or KFRA())
    assert all(p.grad is None for p in model.parameters())
    return str(caught.value)


def test_a_path_around_a_layer_is_refused_naming_both() -> None:
    y = torch.randint(4, (6,))
    text = refused(_Residual(), torch.randn(6, 5), lambda z: F.cross_entropy(z, y))
    assert all(name in text for name in ("a.weight", "b.weight", "c.weight"))


def test_a_weight_that_is_used_twice_is_refused_naming_both_uses() -> None:
    y = torch.randint(4, (6,))
    text = refused(_Tied(), torch.randn(6, 5), lambda z: F.cross_entropy(z, y))
    assert "Use 0" in text
    assert "Use 1" in text
    assert "'a.bias'" in text


def test_attention_is_a_chain_where_one_layer_makes_queries_keys_and_values() -> None:
    x, y = torch.randn(6, 3, 6), torch.randint(4, (6,))
    seen = watch(_Attention(apart=False), x[:1], lambda z: F.cross_entropy(z, y[:1]), KFRA(), KFLR())
    same(factors(seen.kfra), factors(seen.kflr))
    text = refused(_Attention(apart=True), x, lambda z: F.cross_entropy(z, y))
    assert "projections.2.weight" in text
    assert "projections.1.weight" in text


def test_recurrence_is_refused() -> None:
    y = torch.randint(4, (6,))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(5, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0][:, -1]

    refused(Recurrent(), torch.randn(6, 3, 5), lambda z: F.cross_entropy(z, y))


def test_two_losses_are_refused() -> None:
    y = torch.randint(4, (6,))
    text = refused(mlp(nn.Tanh()), torch.randn(6, 5), lambda z: F.cross_entropy(z, y) + F.mse_loss(z, z.detach()))
    assert "cross_entropy" in text
    assert "mse_loss" in text


def test_a_block_over_the_cap_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = conv(nn.ReLU(), features=48), torch.randn(6, 2, 4, 4), torch.randint(4, (6,))
    size = 48 * 48 * 8
    watch(model, x, lambda z: F.cross_entropy(z, y), KFRA(max_bytes=size))
    model.zero_grad()
    monkeypatch.setattr("layerwise.quantities.kfra.recursion.pull", None)  # a call would fail
    monkeypatch.setattr("layerwise.quantities.kfra.recursion.pull_stack", None)
    text = refused(model, x, lambda z: F.cross_entropy(z, y), KFRA(max_bytes=size - 1))
    assert "48 x 48" in text
    assert f"{size} bytes" in text
    assert f"max_bytes={size - 1}" in text
    assert "3.weight" in text  # whose input is as large as the convolution's output


def test_3c3d_is_refused_by_its_first_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.Flatten(), nn.Linear(50176, 2)).float()
    y = torch.randint(2, (2,))
    text = refused(model, torch.randn(2, 3, 32, 32).float(), lambda z: F.cross_entropy(z, y))
    assert "10070523904 bytes" in text


def test_a_large_vocabulary_is_refused_under_reduce() -> None:
    """Its input factor would be dense, and KFRA has no gradients of single samples there."""
    model = nn.Sequential(nn.Embedding(20_000, 2), nn.Flatten(), nn.Linear(6, 4))
    x, y = torch.randint(20_000, (6, 3)), torch.randint(4, (6,))
    text = refused(model, x, lambda z: F.cross_entropy(z, y), KFRA("reduce"))
    assert "'0.weight' (20000, 2)" in text
    assert watch(model, x, lambda z: F.cross_entropy(z, y), KFRA()).kfra.forms["0.weight"] == "rows"


def test_several_batches_are_refused() -> None:
    model, x, y = mlp(nn.Tanh()), torch.randn(6, 5), torch.randint(4, (6,))
    with pytest.raises(errors.Undefined, match="KFRA of 6 samples and 6 further"), observe(model, KFRA()):
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(errors.Undefined, match="KFLR, whose factors join"):
        accumulate(model, F.cross_entropy, [(x, y), (x, y)], KFRA())
    one = accumulate(model, F.cross_entropy, [(x, y)], KFRA())
    same(factors(one.kfra), factors(watch(model, x, lambda z: F.cross_entropy(z, y), KFRA()).kfra))


def test_training_mode_batch_norm_is_refused() -> None:
    model, y = normed(), torch.randint(4, (6,))
    model[1].train()
    with pytest.raises(errors.SamplesMixed):
        watch(model, torch.randn(6, 5), lambda z: F.cross_entropy(z, y), KFRA())


def test_infinite_derivatives_are_refused() -> None:
    share, x = [0.5], torch.randn(6, 5)
    model = mlp(Apply(lambda _, z: (z - share[0] * z.detach()).abs().sqrt()))
    watch(model, x, lambda z: F.mse_loss(z, torch.zeros_like(z)), KFRA())
    share[0] = 1.0
    with pytest.raises(errors.NonFinite, match="derivative between two layers"):
        watch(model, x, lambda z: F.mse_loss(z, torch.zeros_like(z)), KFRA())


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"max_bytes": 2.5}, {"sharing": "both"}])
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.BadInput, match="KFRA"):
        KFRA(**wrong)


def test_repr() -> None:
    assert [repr(q) for q in (KFRA(), KFRA("reduce", joint=True), KFRA(max_bytes=8))] == [
        "KFRA()",
        "KFRA(sharing='reduce', joint=True)",
        "KFRA(max_bytes=8)",
    ]


# The peer ---------------------------------------------------------------------------------------

PEER: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    **{f"mlp_{f.__name__}": (lambda f=f: mlp(f(), f()), (5,)) for f in (nn.Sigmoid, nn.ReLU, nn.Tanh)},
    "conv_mean_pool": (lambda: conv(nn.ReLU(), nn.AvgPool2d(2), features=12), (2, 4, 4)),
    "conv_conv": (lambda: conv(nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Sigmoid(), features=36), (2, 4, 4)),
    "conv_max_pool": (lambda: conv(nn.MaxPool2d(3, 1), features=12), (2, 4, 4)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chain", PEER)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss])
def test_values_are_backpacks(chain: str, reduction: str, kind: Callable[..., nn.Module]) -> None:
    """Its B is ours; of a convolution it is that of "reduce", with the A of "expand" times the positions."""
    backpack = pytest.importorskip("backpack", reason="BackPACK is not installed beside")
    from backpack import extensions

    make, shape = PEER[chain]
    model, x = make(), torch.randn(6, *shape)
    y = torch.randint(4, (6,)) if kind is nn.CrossEntropyLoss else torch.randn(6, 4)
    loss = kind(reduction=reduction)
    expand, reduce = KFRA(), KFRA("reduce")
    seen = watch(model, x, lambda z: loss(z, y), expand, reduce)
    theirs, criterion = backpack.extend(model), backpack.extend(loss)
    shapes: dict[str, int] = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda m, a, out, name=name: shapes.update({name: math.prod(out.shape[2:])}))
    with backpack.backpack(extensions.KFRA()):
        criterion(theirs(x), y).backward()
    for name, p in model.named_parameters():
        oracle.assert_close(seen[reduce].blocks[name].B[0], p.kfra[0])
        if len(p.kfra) > 1:
            oracle.assert_close(seen[expand].blocks[name].A[0] * shapes[name.partition(".")[0]], p.kfra[1])
