"""Attribution: scores against dense curvature matrices and per-sample gradients by loops, in float64."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_close, ggn
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import layerwise as lw
from layerwise.attribution.files import read, write
from layerwise.errors import BadInput, NonFinite, RandomPass, Undefined

Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """A GPT's embeddings, fused causal attention, norm and head: `[N, T]` to `[N, T, C]`."""

    def __init__(self, tokens: int = 5, length: int = 4, width: int = 6) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place(self.positions(x))
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.norm(h + self.out(mixed.transpose(1, 2).flatten(2))))

    def positions(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1])


def tokens_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def mlp() -> tuple[nn.Module, Any, list[Batch], list[Batch]]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(10, 3), torch.arange(10) % 3
    return model, F.cross_entropy, [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])], [(x[:2].flip(1), y[1:3])]


def regression() -> tuple[nn.Module, Any, list[Batch], list[Batch]]:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2))
    x, y = torch.randn(6, 2, 4), torch.randn(6, 2)
    return model, F.mse_loss, [(x[:4], y[:4]), (x[4:], y[4:])], [(x[:2] + 1, y[:2])]


def grouped() -> tuple[nn.Module, Any, list[Batch], list[Batch]]:
    model = nn.Sequential(nn.Conv1d(4, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(6, 4, 4), torch.arange(6) % 3
    return model, nn.CrossEntropyLoss(reduction="sum"), [(x[:4], y[:4]), (x[4:], y[4:])], [(x[:2] + 1, y[:2])]


def language() -> tuple[nn.Module, Any, list[Batch], list[Batch]]:
    x = torch.randint(5, (7, 4))
    y = torch.randint(5, (7, 4))
    y[0, 2:] = y[3, 3:] = y[5, :1] = -100
    return Attention(), tokens_loss, [(x[:3], y[:3]), (x[3:], y[3:])], [(x[:2].flip(1), y[1:3])]


class Tied(nn.Module):
    """One weight twice, and a derived one."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3, 3)), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(F.linear(x, self.w)), self.w.T)))


def tied() -> tuple[nn.Module, Any, list[Batch], list[Batch]]:
    model, loss, train, queries = mlp()
    return Tied(), loss, train, queries


SUBJECTS: list[Callable[[], tuple[nn.Module, Any, list[Batch], list[Batch]]]] = [
    mlp, regression, grouped, language, tied
]  # fmt: skip

Made = tuple[nn.Module, Any, list[Batch], list[Batch]]


class TiedLanguage(nn.Module):
    """A GPT block whose head is its embedding, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return F.linear(self.norm(self.block(self.token(x), src_mask=mask, is_causal=True)), self.token.weight)


class Recurrent(nn.Module):
    """An LSTM's last state, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Experts(nn.Module):
    """Two experts, each for the samples that the gate sends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 2), nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        chosen = shares.argmax(-1)
        out = x
        for e, expert in enumerate(self.experts):
            out = out + (chosen == e).to(x)[:, None] * shares[:, e : e + 1] * expert(x)
        return out


class Residual(nn.Module):
    """Layer norms, and one layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.head = nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + torch.tanh(self.layer(self.norm(x)))
        return self.head(x)


def tied_language() -> Made:
    _, loss, train, queries = language()
    return TiedLanguage(), loss, train, queries


def recurrent() -> Made:
    x, y = torch.randn(6, 3, 3), torch.arange(6) % 3
    return Recurrent(), F.cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])], [(x[:2] + 1, y[:2])]


def experts() -> Made:
    return Experts(), *mlp()[1:]


def residual() -> Made:
    return Residual(), *mlp()[1:]


def images() -> Made:
    layers = nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()
    x, y = torch.randn(6, 2, 6, 6), torch.arange(6) % 3
    model = nn.Sequential(*layers, nn.Linear(4, 3)).eval()
    return model, F.cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])], [(x[:2] + 1, y[:2])]


TEN = [*SUBJECTS, tied_language, recurrent, experts, residual, images]


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def own(model: nn.Module, measure: Any, batches: list[Batch], whole: bool) -> dict[str, Tensor]:
    """`[N, *shape]`, one sample after the other; whole: without the 1/terms of a mean."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in batches:
        for n in range(len(x)):
            loss = measure(model(x[n : n + 1]), y[n : n + 1])
            terms = int((y[n] != -100).sum()) if not y.is_floating_point() else y[n].numel()
            grads = torch.autograd.grad(loss * (terms if whole else 1), list(model.parameters()), allow_unused=True)
            for (name, p), g in zip(model.named_parameters(), grads, strict=True):
                found[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(g) for name, g in found.items()}


def dense_inverse(block: Tensor, damping: float | None) -> Tensor:
    damping = 0.1 * float(block.trace()) / len(block) if damping is None else damping
    return torch.linalg.inv(block + damping * torch.eye(len(block)))


def dense_scores(g: dict[str, Tensor], queries: dict[str, Tensor], inverse: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: queries[name].flatten(1) @ inverse[name] @ g[name].flatten(1).T for name in g}


def is_mean(loss: Any) -> bool:
    return loss in (F.cross_entropy, F.mse_loss, tokens_loss)


@pytest.mark.parametrize("subject", TEN)
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diag", "identity"])
def test_scores_are_those_of_all_gradients_and_the_dense_inverse(subject: Any, curvature: str) -> None:
    model, loss, train, queries = subject()
    damping = None if curvature in ("identity", "kfac") else 0.01
    influence = lw.attribution.Influence(model, loss, curvature=curvature, damping=damping, draws=None).fit(train)
    g, q = (own(model, loss, batches, is_mean(loss)) for batches in (train, queries))
    if curvature == "identity":
        inverse = {name: torch.eye(v[0].numel()) for name, v in g.items()}
    else:
        quantity = {"ekfac": lw.EKFAC(draws=None), "kfac": lw.KFLR(), "diag": lw.DiagGGN()}[curvature]
        found = lw.accumulate(model, loss, train, quantity)[quantity]
        blocks = {n: found[n].flatten().diag() if curvature == "diag" else found.to_dense(n) for n in g}
        inverse = {name: dense_inverse(block, damping) for name, block in blocks.items()}
    want = dense_scores(g, q, inverse)
    total = torch.stack(list(want.values())).sum(0)
    assert_close(influence.scores(queries, train), total)
    assert_close(influence.per_layer(queries, train), want)
    own_scores = torch.stack([((g[n].flatten(1) @ inverse[n]) * g[n].flatten(1)).sum(1) for n in g]).sum(0)
    assert_close(influence.self_influence(train), own_scores)
    values, numbers = influence.top(queries, train, 3)
    assert_close(values, total.topk(3, 1).values)
    assert_close(total.gather(1, numbers), values)


def test_diagonal_is_that_of_the_exact_matrix() -> None:
    model, loss, train, queries = mlp()
    influence = lw.attribution.Influence(model, loss, curvature="diag", damping=0.1, draws=None).fit(train)
    x, y = (torch.cat(parts) for parts in zip(*train, strict=True))
    named = dict(model.named_parameters())
    diagonal = ggn(named, lambda: model(x), lambda z: loss(z, y)).diagonal() + 0.1
    g, q = (torch.cat([v.flatten(1) for v in own(model, loss, b, True).values()], 1) for b in (train, queries))
    assert_close(influence.scores(queries, train), (q / diagonal) @ g.T)


def test_one_linear_layer_of_one_sample_has_its_exact_ggn() -> None:
    model = nn.Linear(3, 4, bias=False)
    x, y = torch.randn(1, 3), torch.tensor([2])
    for curvature in ("ekfac", "kfac"):
        influence = lw.attribution.Influence(model, F.cross_entropy, curvature=curvature, damping=0.1, draws=None)
        found = influence.fit([(x, y)]).scores([(x + 1, y)], [(x, y)])
        matrix = ggn(dict(model.named_parameters()), lambda: model(x), lambda z: F.cross_entropy(z, y))
        g, q = (own(model, F.cross_entropy, [(a, y)], True)["weight"].flatten(1) for a in (x, x + 1))
        assert_close(found, q @ torch.linalg.solve(matrix + 0.1 * torch.eye(12), g.T))


def test_tokens_add_up_and_are_the_positions_of_each_use() -> None:
    model, loss, train, queries = language()
    with pytest.raises(Undefined, match=r"place\.weight.*once for all samples.*0 \* tokens"):
        lw.attribution.Influence(model, loss, curvature="identity").per_token(queries, train)
    model.positions = lambda x: torch.arange(x.shape[1]) + 0 * x  # as the error says
    whole = lw.attribution.Influence(model, loss, curvature="identity")
    tokens = whole.per_token(queries, train)
    assert_close(torch.cat(tokens, 1).sum(2), whole.scores(queries, train))
    del model.positions
    rows = [n for n, _ in model.named_parameters() if n != "place.weight"]
    influence = lw.attribution.Influence(model, loss, rows, draws=None).fit(train)
    tokens = influence.per_token(queries, train)
    assert [t.shape for t in tokens] == [(2, 3, 4), (2, 4, 4)]
    assert_close(torch.cat(tokens, 1).sum(2), influence.scores(queries, train))
    only = lw.attribution.Influence(model, loss, "head.weight", "identity")
    v = own(model, loss, queries, True)["head.weight"]
    for (x, y), found in zip(train, only.per_token(queries, train), strict=True):
        kept: list[Tensor] = []
        handle = model.head.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))  # type: ignore
        logits = model(x)
        handle.remove()
        g = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"), logits)[0]
        for q in range(2):
            for n in range(len(x)):
                for t in range(4):
                    assert_close(found[q, n, t], g[n, t] @ v[q] @ kept[0][n, t])


def test_measures_are_any_sums_over_the_queries() -> None:
    model, loss, train, queries = mlp()

    def difference(out: Tensor, y: Tensor) -> Tensor:
        return (out[:, 0] - out[:, 2]).sum()

    influence = lw.attribution.Influence(model, loss, damping=0.1, draws=None).fit(train)
    g, q = own(model, loss, train, True), own(model, difference, queries, False)
    inverse = {n: dense_inverse(influence.curvature.to_dense(n), 0.1) for n in g}
    want = torch.stack(list(dense_scores(g, q, inverse).values())).sum(0)
    assert_close(influence.scores(queries, train, difference), want)


def test_batches_do_not_matter_and_the_model_is_left_as_it_was() -> None:
    model, loss, train, queries = language()
    model.head.weight.grad = torch.ones_like(model.head.weight)  # type: ignore[union-attr]
    once = [tuple(torch.cat(parts) for parts in zip(*train, strict=True))]
    apart = [(x[n : n + 1], y[n : n + 1]) for x, y in train for n in range(len(x))]
    results = []
    for batches in (train, once, apart):
        influence = lw.attribution.Influence(model, loss, ["*.weight"], draws=None).fit(batches)
        results.append(influence.scores(queries, batches))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])
    assert all(p.requires_grad for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert not any("bias" in name for name in influence.names)


def test_chosen_parameters_are_those_that_a_pattern_matches() -> None:
    model, loss, train, queries = mlp()
    whole = lw.attribution.Influence(model, loss, draws=None).fit(train).per_layer(queries, train)
    some = lw.attribution.Influence(model, loss, ["0", "2.b*"], draws=None).fit(train).per_layer(queries, train)
    assert_close(some, {name: whole[name] for name in ("0.weight", "0.bias", "2.bias")})
    for wrong in ("weight", r".*\.weight"):
        with pytest.raises(BadInput, match=r"2\.bias"):
            lw.attribution.Influence(model, loss, wrong)


def test_inputs_that_require_a_gradient_are_data_like_others() -> None:
    model, loss, train, queries = mlp()
    want = lw.attribution.Influence(model, loss, draws=None).fit(train).scores(queries, train)
    asked = [(x.clone().requires_grad_(), y) for x, y in train]
    grown = [(2 * (x / 2), y) for x, y in asked]
    for batches in (asked, grown):
        influence = lw.attribution.Influence(model, loss, draws=None).fit(batches)
        assert_close(influence.scores(queries, batches), want)
    assert all(x.grad is None for x, _ in asked)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model, loss, train, queries = mlp()
    influence = lw.attribution.Influence(model, loss, draws=None).fit(train)
    wrong = [(x * torch.inf, y) for x, y in train[:1]]
    for call in (lambda: influence.scores(queries, wrong), lambda: influence.fit(wrong)):
        with pytest.raises(NonFinite):
            call()


@pytest.mark.parametrize("subject", [language, images, recurrent])
def test_queries_of_a_rank_are_their_best_approximations(subject: Any) -> None:
    model, loss, train, queries = subject()
    influence = lw.attribution.Influence(model, loss, draws=None).fit(train)
    g = own(model, loss, train, True)
    want = torch.zeros(())
    for name, (v,) in influence.directions(queries).items():
        u, s, w = torch.linalg.svd(v.reshape(len(v), len(v[0]), -1) if v.dim() > 1 else v[:, None], full_matrices=False)
        nearest = (u[..., :2] * s[:, None, :2]) @ w[:, :2]
        want = want + nearest.flatten(1) @ g[name].flatten(1).T
    assert_close(influence.scores(queries, train, rank=2), want)
    apart = [(x[n : n + 1], y[n : n + 1]) for x, y in queries for n in range(len(x))]
    assert_close(influence.scores(apart, train, rank=2), want)
    assert_close(influence.scores(queries, train, rank=99), influence.scores(queries, train))
    with pytest.raises(BadInput, match="rank"):
        influence.scores(queries, train, rank=0)


def test_work_is_estimated_and_shown(tmp_path: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # then lines on standard error
    model, loss, train, queries = language()
    influence = lw.attribution.Influence(model, loss)
    seconds, size = influence.estimate(train)
    influence.fit(train, tmp_path, progress=True)
    influence.scores(queries, train, progress=True)
    influence.top(queries, train, 2, progress=True)
    lw.attribution.GradientIndex(influence, tmp_path / "index", 2).append(train, progress=True)
    said = capsys.readouterr().err
    for words in ("fit, pass 1: 2 of 2", "fit, pass 2: 2 of 2", "scores: 2 of 2", "index: 2 of 2"):
        assert words in said
    stored = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix in (".pt", ".safetensors"))
    held = sum(t.nbytes for n in range(2) for t in read(tmp_path, f"sums{n}")[0].values())  # type: ignore[index]
    assert seconds > 0 and size == held <= stored
    assert lw.attribution.Influence(model, loss, curvature="identity").estimate(train) == (0, 0)
    with pytest.raises(BadInput, match="how many batches"):
        influence.estimate(iter(train))


def test_wrong_use_is_said() -> None:
    model, loss, train, queries = mlp()
    with pytest.raises(BadInput, match="fit"):
        lw.attribution.Influence(model, loss).scores(queries, train)
    with pytest.raises(BadInput, match="curvature must be"):
        lw.attribution.Influence(model, loss, curvature="hessian")
    with pytest.raises(BadInput, match="no damping"):
        lw.attribution.Influence(model, loss, curvature="identity", damping=0.1)
    identity = lw.attribution.Influence(model, loss, curvature="identity")
    with pytest.raises(BadInput, match="gave no batch"):
        identity.scores(queries, [])
    with pytest.raises(BadInput, match="one batch"):
        identity.scores(queries[0], train)
    with pytest.raises(BadInput, match="of 10 samples"):
        identity.top(queries, train, 11)
    with pytest.raises(BadInput, match="as_loss"):
        lw.attribution.Influence(model, lambda out, y: out.square().mean(), curvature="identity").scores(queries, train)
    with pytest.raises(BadInput, match="its batches once"):
        lw.attribution.Influence(model, loss).fit(iter(train))
    for wrong, said in (
        (train[0], "one batch"),
        ({"x": train[0][0]}, "one batch"),
        (None, "NoneType"),
        ([], "no batch"),
    ):
        with pytest.raises(BadInput, match=said):
            lw.attribution.Influence(model, loss).fit(wrong)
    with pytest.raises(BadInput, match="damping is 'auto'"):
        lw.attribution.Influence(model, loss, damping="auto")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="k must be"):
        identity.top(queries, train, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diag", "identity"])
def test_the_inverse_takes_products(curvature: str) -> None:
    model, loss, train, queries = grouped()
    influence = lw.attribution.Influence(model, loss, curvature=curvature).fit(train)
    g = own(model, loss, queries, True)
    directions = influence.directions(queries)
    for q in range(len(queries[0][0])):
        product = influence.inverse @ {n: v[q].reshape(model.get_parameter(n).shape) for n, v in g.items()}
        for name, found in product.items():
            assert_close(found, directions[name][0][q])


def test_random_passes_are_warned_of_once(recwarn: Any) -> None:
    _, loss, train, queries = mlp()
    model = nn.Sequential(nn.Linear(train[0][0].shape[1], 6), nn.Dropout(0.5), nn.Linear(6, 3))
    influence = lw.attribution.Influence(model, loss)
    with pytest.warns(RandomPass, match="Sequential draws random numbers.*eval"):
        influence.fit(train)
    influence.scores(queries, train)
    lw.attribution.Influence(model.eval(), loss).fit(train).scores(queries, train)
    assert not recwarn.list


def test_models_in_half_precision_are_measured_in_float32(tmp_path: Any) -> None:
    model, loss, train, queries = language()
    model.bfloat16()
    products = lw.attribution.Influence(model, loss, curvature="identity").scores(queries, train)
    want: Any = 0
    for name in dict(model.named_parameters()):
        q, g = (torch.cat([sample_gradients(model, loss, b, name) for b in bs]) for bs in (queries, train))
        want = want + q @ g.T
    assert products.dtype == torch.float32
    torch.testing.assert_close(products, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    for curvature in ("ekfac", "kfac", "diag"):
        influence = lw.attribution.Influence(model, loss, curvature=curvature).fit(train, tmp_path / curvature)
        scores = influence.scores(queries, train)
        index = lw.attribution.GradientIndex(influence, tmp_path / f"{curvature} index", 99).append(train)
        torch.testing.assert_close(index.scores(queries), scores, rtol=1e-2, atol=2e-3 * float(scores.abs().max()))


def sample_gradients(model: nn.Module, loss: Any, batch: Batch, name: str) -> Tensor:
    """Of the sum of a sample's terms, in float32."""
    with lw.observe(model, lw.PerSampleGrad(), dtype=torch.float32) as seen:
        loss(model(batch[0]), batch[1]).backward()
    return seen.per_sample_grad[name].flatten(1) * (batch[1] != -100).sum()


def test_a_curvature_of_other_weights_is_refused(tmp_path: Any) -> None:
    model, loss, train, queries = mlp()
    influence = lw.attribution.Influence(model, loss).fit(train)
    want = influence.scores(queries, train)
    influence.save(tmp_path)
    index = lw.attribution.GradientIndex(influence, tmp_path / "index", 2).append(train)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for asked in (
        lambda: influence.scores(queries, train),
        lambda: influence.self_influence(train),
        lambda: influence.save(tmp_path / "new"),
        lambda: index.append(train),
        lambda: index.search(queries, 1),
    ):
        with pytest.raises(BadInput, match="weights were written or frozen"):
            asked()
    model.load_state_dict(before)  # written, with the values that there were
    assert torch.equal(influence.scores(queries, train), want)
    assert len(index.append(train)) == 2 * len(want[0])
    assert torch.equal(influence.load(tmp_path).scores(queries, train), want)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(BadInput, match="weights were written or frozen"):
        influence.scores(queries, train)


def test_a_fit_resumes_with_the_same_batches_alone(tmp_path: Any) -> None:
    model, loss, train, _ = mlp()
    make = lambda: lw.attribution.Influence(model, loss)  # noqa: E731
    with contextlib.suppress(Killed):
        make().fit(killed_after(train, 1), tmp_path)
    with pytest.raises(BadInput, match="not the first ones now"):
        make().fit(train[::-1], tmp_path)
    make().fit(train, tmp_path)
    with pytest.raises(BadInput, match=r"more batches \(3\) than the loader gave \(1\)"):
        make().fit(train[:1], tmp_path)


# -- on disk --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What ends a run at a chosen place."""


def killed_after(batches: list[Batch], count: int) -> Any:
    """A loader that gives some batches, and then ends the run."""

    class Loader:
        def __iter__(self) -> Any:
            nonlocal count
            for batch in batches:
                if not count:
                    raise Killed
                count -= 1
                yield batch

    return Loader()


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diag"])
@pytest.mark.parametrize("subject", [language, grouped, tied])
def test_a_killed_fit_goes_on_where_it_was_and_gives_the_same_bits(subject: Any, curvature: str, tmp_path: Any) -> None:
    model, loss, train, queries = subject()
    make = lambda: lw.attribution.Influence(model, loss, curvature=curvature, seed=3)  # noqa: E731
    want = make().fit(train).scores(queries, train)
    for count in (0, 1, 2, 3):  # each time further: from the folder that the last one left
        with contextlib.suppress(Killed):
            make().fit(killed_after(train, count), tmp_path)
    seen: list[int] = []

    def counted(out: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        return loss(out, y)

    influence = lw.attribution.Influence(model, counted, curvature=curvature, seed=3).fit(train, tmp_path)
    assert len(seen) <= (len(train) + 1 if curvature == "ekfac" else 1)  # one over again, which says what is where
    assert torch.equal(influence.scores(queries, train), want)


def test_a_kill_while_a_file_is_written_leaves_the_last_state(tmp_path: Any, monkeypatch: Any) -> None:
    model, loss, train, queries = mlp()
    want = lw.attribution.Influence(model, loss).fit(train).scores(queries, train)
    kept = os.replace
    for k in range(1, 14, 3):  # before each of the steps in which a state replaces another
        left = [k]

        def replace(a: Any, b: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed
            kept(a, b)

        monkeypatch.setattr(os, "replace", replace)
        with contextlib.suppress(Killed):
            lw.attribution.Influence(model, loss).fit(train, tmp_path / str(k))
        monkeypatch.setattr(os, "replace", kept)
        resumed = lw.attribution.Influence(model, loss).fit(train, tmp_path / str(k))
        assert torch.equal(resumed.scores(queries, train), want)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diag", "identity"])
def test_what_is_saved_is_loaded(subject: Any, curvature: str, tmp_path: Any) -> None:
    model, loss, train, queries = subject()
    influence = lw.attribution.Influence(model, loss, curvature=curvature).fit(train)
    influence.save(tmp_path)
    influence.save(tmp_path)  # over the first
    loaded = lw.attribution.Influence(model, loss, curvature=curvature).load(tmp_path)
    assert torch.equal(loaded.scores(queries, train), influence.scores(queries, train))
    assert len(list(tmp_path.iterdir())) == 2


def test_other_or_damaged_files_are_refused(tmp_path: Any) -> None:
    model, loss, train, _ = mlp()
    influence = lw.attribution.Influence(model, loss).fit(train, tmp_path / "fit")
    influence.save(tmp_path / "saved")
    with pytest.raises(BadInput, match="differs in curvature: 'ekfac', now 'kfac'"):
        lw.attribution.Influence(model, loss, curvature="kfac").load(tmp_path / "saved")
    with pytest.raises(BadInput, match="differs in seed: 0, now 1"):
        lw.attribution.Influence(model, loss, seed=1).fit(train, tmp_path / "fit")
    with pytest.raises(BadInput, match="no saved Influence"):
        influence.load(tmp_path)
    (file,) = (path for path in (tmp_path / "saved").iterdir() if path.suffix != ".json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BadInput, match="checksum"):
        influence.load(tmp_path / "saved")
    file.write_bytes(whole)
    with torch.no_grad():
        model[0].weight[0, 0] += 1  # type: ignore[index]
    with pytest.raises(BadInput, match="differs in weights"):
        influence.load(tmp_path / "saved")
    (tmp_path / "saved" / "influence.json").write_text("{")
    with pytest.raises(BadInput, match="no record"):
        influence.load(tmp_path / "saved")


def test_a_file_of_safetensors_needs_the_package(tmp_path: Any, monkeypatch: Any) -> None:
    write(tmp_path, "a", {"x": torch.ones(2)}, {})
    (file,) = (path for path in tmp_path.iterdir() if path.suffix != ".json")
    file.rename(file.with_suffix(".safetensors"))
    said = tmp_path / "a.json"
    said.write_text(said.read_text().replace(file.name, file.with_suffix(".safetensors").name))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"layerwise\[attribution\]"):
        read(tmp_path, "a")


# -- ranks ----------------------------------------------------------------------------------------------------------


def fitted_in_ranks(rank: int, curvature: str, trainer: str) -> list[Tensor]:
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model, loss, train, queries = language()
        if trainer == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        elif trainer == "fsdp2":
            for part in (model.qkv, model.out, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (2,)))  # type: ignore[arg-type]
        influence = lw.attribution.Influence(model, loss, curvature=curvature, draws=None).fit(train[rank : rank + 1])
        return [influence.scores(queries, train), influence.self_influence(train)]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diag"])
@pytest.mark.parametrize("trainer", ["none", "ddp", "fsdp2"])
def test_ranks_fit_their_shares_together(curvature: str, trainer: str) -> None:
    torch.manual_seed(0)
    model, loss, train, queries = language()
    whole = lw.attribution.Influence(model, loss, curvature=curvature, draws=None).fit(train)
    want = [whole.scores(queries, train), whole.self_influence(train)]
    for found in ranks(2)(fitted_in_ranks, curvature, trainer):
        for one, other in zip(found, want, strict=True):
            assert_close(one, other)
