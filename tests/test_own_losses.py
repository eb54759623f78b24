"""Losses that no likelihood is known for: everything by the loss's own Hessian, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from torch import Tensor, nn
from zoo import PROBLEMS, Case
from zoo.losses import LOSSES

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64")
N, C = 5, 3


def _net(out: int = C) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out))


def _batch(seed: int = 1, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels, real targets."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=gen), torch.randint(C, (n,), generator=gen), torch.randn(n, C, generator=gen)


def _observe(model: Any, loss: Callable[[], Tensor], *quantities: lw.Quantity, **options: Any) -> lw.Seen:
    model.zero_grad()
    with lw.observe(model, *quantities, **options) as seen:
        loss().backward()
    return seen


# Losses, each as its samples' terms [N] before reduction ---------------------------------------------------


class _Loss(NamedTuple):
    """terms: (outputs, labels, real targets) -> [N]. curved: whether the outputs' Hessian is not zero; convex."""

    terms: Callable[[Tensor, Tensor, Tensor], Tensor]
    convex: bool = True
    curved: bool = True


def _focal(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    log_p = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p


def _cross_entropy(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return z.logsumexp(1) - z[torch.arange(len(z)), y]


def _dice(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    p, hot = z.sigmoid(), F.one_hot(y, C)
    return 1 - (2 * (p * hot).sum(1) + 1) / (p.sum(1) + hot.sum(1) + 1)


def _dirichlet(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    alpha, p = F.softplus(z) + 0.5, t.softmax(1)
    return -(alpha.sum(1).lgamma() - alpha.lgamma().sum(1) + ((alpha - 1) * p.log()).sum(1))


def _tweedie(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return (-t.exp() * (-0.5 * z).exp() / -0.5 + (0.5 * z).exp() / 0.5).sum(1)


def _cosine(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.cosine_embedding_loss(z, t, torch.ones(len(z)), reduction="none")


def _triplet(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.triplet_margin_loss(z, t, t.flip(1), margin=3.0, reduction="none")


def _divergence(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(1), t.softmax(1), reduction="none").sum(1)


TERMS = {
    "squares": _Loss(lambda z, y, t: (z - t).pow(2).sum(1)),
    "cross entropy": _Loss(_cross_entropy),
    "kl_div": _Loss(_divergence),
    "tweedie": _Loss(_tweedie),
    "log cosh": _Loss(lambda z, y, t: (z - t).cosh().log().sum(1)),
    "norm": _Loss(lambda z, y, t: (z - t).norm(dim=1)),
    "multi label": _Loss(lambda z, y, t: F.multilabel_soft_margin_loss(z, F.one_hot(y, C).double(), reduction="none")),
    "triplet": _Loss(_triplet, convex=False),
    "focal": _Loss(_focal),
    "focal of sure outputs": _Loss(lambda z, y, t: _focal(6 * z, y, t), convex=False),
    "dice": _Loss(_dice, convex=False),
    "dirichlet": _Loss(_dirichlet, convex=False),
    "cosine": _Loss(_cosine, convex=False),
    "pinball": _Loss(lambda z, y, t: torch.maximum(0.3 * (z - t), -0.7 * (z - t)).sum(1), curved=False),
}
every_loss = pytest.mark.parametrize("name", TERMS)
FORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "by hand": lambda f: f,
    "marked": lambda f: lw.as_loss(f, reduction="mean"),
    "module": lambda f: lw.as_loss(_Criterion(f)),
}
every_form = pytest.mark.parametrize("form", FORMS)


class _Criterion(nn.Module):
    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, z: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return self.f(z, y, t)


def _check(
    model: nn.Module, loss: Callable[[], Tensor], terms: Callable[[], Tensor], outputs: Any, terms_of: Any, convex: bool
) -> None:
    """All kinds of quantities of one total: of first order, of the Hessian, and of the GGN or its refusal."""
    params = oracle.parameters(model)
    grads = oracle.per_sample_grad(params, terms)
    first = (lw.PerSampleGrad(), lw.SecondMoment(), lw.SquaredNorm(), lw.DiagHessian(), lw.DiagHessian(per_sample=True))
    seen = _observe(model, loss, *first)
    plain = oracle.gradient(params, loss)
    hessian = oracle.diag_hessian(params, loss)
    for name in params:
        assert torch.equal(params[name].grad, plain[name])
        oracle.assert_close(seen.per_sample_grad[name], grads[name])
        oracle.assert_close(seen.second_moment[name], oracle.second_moment(grads)[name])
        oracle.assert_close(seen[first[3]][name], hessian[name])
        oracle.assert_close(seen[first[4]][name].sum(0), hessian[name])
    oracle.assert_close(seen.squared_norm.total, oracle.total(oracle.squared_norm(grads)))
    for n in range(2):
        one = oracle.diag_hessian(params, lambda n=n: terms()[n])
        for name in params:
            oracle.assert_close(seen[first[4]][name][n], one[name])
    want = oracle.diag_ggn(params, outputs, lambda z: terms_of(z).sum())
    whole = oracle.ggn(params, outputs, lambda z: terms_of(z).sum())
    oracle.assert_close(lw.GGN(model, loss).to_dense(), whole)
    if not convex:
        for quantity in (lw.DiagGGN(), lw.DiagGGN(draws=2), lw.KFLR(), lw.KFAC(), lw.SqrtGGN()):
            with pytest.raises(errors.Undefined, match=r"not convex|zero everywhere"):
                _observe(model, loss, quantity)
        return
    exact, each = lw.DiagGGN(), lw.DiagGGN(per_sample=True)
    seen = _observe(model, loss, exact, each, lw.SqrtGGN())
    per_sample = oracle.diag_ggn(params, outputs, terms_of, per_sample=True)
    root = torch.cat([seen.sqrt_ggn[name].flatten(2) for name in params], 2).flatten(0, 1)
    oracle.assert_close(root.T @ root, whole)
    for name in params:
        oracle.assert_close(seen[exact][name], want[name])
        oracle.assert_close(seen[each][name], per_sample[name])


@one_in(2, name=TERMS, form=FORMS)
def test_quantities_equal_the_oracle(name: str, form: str) -> None:
    made, model, (x, y, t) = TERMS[name], _net(), _batch()
    fn = FORMS[form](lambda z, y, t: made.terms(z, y, t).mean())

    def terms_of(z: Tensor) -> Tensor:
        return made.terms(z, y, t) / N

    _check(
        model,
        lambda: fn(model(x), y, t),
        lambda: terms_of(model(x)),
        lambda: model(x),
        terms_of,
        made.convex and made.curved,
    )


KNOWN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "cross entropy": (lambda z, y, t: F.cross_entropy(z, y), lambda z, y, t: _cross_entropy(z, y, t).mean()),
    "squares": (lambda z, y, t: F.mse_loss(z, t), lambda z, y, t: (z - t).square().mean()),
    "scaled": (lambda z, y, t: 10 * F.mse_loss(z, t), lambda z, y, t: 10 * ((z - t) * (z - t)).mean()),
    "two": (
        lambda z, y, t: F.cross_entropy(z, y) + 0.1 * F.mse_loss(z, t),
        lambda z, y, t: F.cross_entropy(z, y) + 0.1 * (z - t).square().mean(),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_loss_by_hand_is_the_recorded_one(name: str) -> None:
    """Also the Kronecker factors, and KFRA."""
    (known, own), model, batch = KNOWN[name], _net(), _batch()
    quantities = lambda: (lw.DiagGGN(), lw.DiagHessian(), lw.Variance(), lw.KFLR(), lw.KFLR(sharing="reduce"))  # noqa: E731
    ours, theirs = quantities(), quantities()
    got = _observe(model, lambda: own(model(batch[0]), *batch[1:]), *ours)
    want = _observe(model, lambda: known(model(batch[0]), *batch[1:]), *theirs)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        for key in want[b]:
            oracle.assert_close(got[a][key], want[b][key])
    for a, b in zip(ours[3:], theirs[3:], strict=True):
        for key, block in want[b].blocks.items():
            oracle.assert_close(got[a].blocks[key].B, block.B)
    if name != "two":
        a = _observe(model, lambda: own(model(batch[0]), *batch[1:]), lw.KFRA()).kfra
        b = _observe(model, lambda: known(model(batch[0]), *batch[1:]), lw.KFRA()).kfra
        for key in b.blocks:
            oracle.assert_close(a.blocks[key].B, b.blocks[key].B)


@pytest.mark.parametrize("name", ["squares", "cross entropy", "norm"])
def test_sampled_columns_are_unbiased(name: str) -> None:
    model, (x, y, t) = _net(), _batch()
    gen = torch.Generator().manual_seed(0)
    loss = lambda: TERMS[name].terms(model(x), y, t).mean()  # noqa: E731
    exact, sampled = lw.DiagGGN(), lw.DiagGGN(draws=4000, generator=gen)
    seen = _observe(model, loss, exact, sampled)
    for key in seen[exact]:
        error = (seen[sampled][key] - seen[exact][key]).abs().max() / seen[exact][key].abs().max()
        assert float(error) < 0.15
    with pytest.raises(errors.Undefined, match="not the negative log-likelihood"):
        _observe(model, loss, lw.FisherDiag())


# Samples that meet in the loss -----------------------------------------------------------------------------


def _hinge_of_pairs(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Without curvature, so that no Hessian tells that pairs are compared."""
    return F.relu(1 - (z[:, 0] - z.roll(1, 0)[:, 0])).mean()


MIXING: dict[str, Callable[..., Tensor]] = {
    "contrastive": lambda z, y, t: -(z @ z.T).log_softmax(1).diagonal().mean(),
    "hinge of pairs": _hinge_of_pairs,
    "differences": lambda z, y, t: (z - z.roll(1, 0)).abs().mean(),
    "dice of the batch": lambda z, y, t: 1 - 2 * (z.sigmoid() * t).sum() / (z.sigmoid() + t).sum(),
    "root of the mean": lambda z, y, t: (z - t).square().mean().sqrt(),
    "variance": lambda z, y, t: z.var(0).sum(),
    "squared loss": lambda z, y, t: F.mse_loss(z, t) ** 2,
    "weak": lambda z, y, t: (z - t).square().mean() + 1e-9 * z.mean(0).square().sum(),
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_a_loss_that_mixes_samples_is_refused(name: str, marked: bool) -> None:
    model, (x, y, t) = _net(), _batch(n=11)
    fn = lw.as_loss(MIXING[name]) if marked else MIXING[name]
    loss = lambda: fn(model(x), y, t)  # noqa: E731
    for quantity in (lw.SecondMoment(), lw.DiagGGN(), lw.KFAC(), lw.DiagHessian(per_sample=True)):
        with pytest.raises(errors.SamplesMixed, match="several of them"):
            _observe(model, loss, quantity)
        assert all(p.grad is None for p in model.parameters())
    params = oracle.parameters(model)
    seen = _observe(model, loss, lw.DiagHessian())
    for key, want in oracle.diag_hessian(params, loss).items():
        oracle.assert_close(seen.diag_hessian[key], want)
    oracle.assert_close(lw.GGN(model, loss).to_dense(), oracle.ggn(params, lambda: model(x), lambda z: fn(z, y, t)))


def test_masked_rows_and_hard_examples_are_no_mixing() -> None:
    model, (x, _, t) = _net(), _batch()
    keep = torch.tensor([True, False, True, True, False])
    masked = lambda z: (z[keep] - t[keep]).pow(4).mean()  # noqa: E731
    hard = lambda z: (z - t).pow(4).sum(1).topk(2).values.mean()  # noqa: E731
    for fn in (masked, hard):
        loss = lambda fn=fn: fn(model(x))  # noqa: E731
        seen = _observe(model, loss, lw.PerSampleGrad(), lw.DiagGGN())
        want = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), fn)
        for key, p in oracle.parameters(model).items():
            oracle.assert_close(seen.per_sample_grad[key].sum(0), p.grad)
            oracle.assert_close(seen.diag_ggn[key], want[key])
        dead = seen.per_sample_grad["2.bias"].abs().sum(1) == 0
        assert int(dead.sum()) == (2 if fn is masked else 3)


def test_a_loss_without_second_derivatives_has_first_order_quantities() -> None:
    model, n = _net(), 4
    x = torch.randn(n, 6, 4)
    labels, lengths = torch.randint(1, C, (n, 2)), torch.full((n,), 2)

    def terms(z: Tensor) -> Tensor:
        return F.ctc_loss(z.log_softmax(2).transpose(0, 1), labels, torch.full((n,), 6), lengths, reduction="none")

    loss = lambda: terms(model(x)).sum()  # noqa: E731
    seen = _observe(model, loss, lw.PerSampleGrad())
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: terms(model(x)))
    for key in want:
        oracle.assert_close(seen.per_sample_grad[key], want[key])
    for quantity in (lw.DiagGGN(), lw.DiagHessian()):
        with pytest.raises(errors.Undefined, match="second derivatives"):
            _observe(model, loss, quantity)


# Shapes of outputs and programs ----------------------------------------------------------------------------


class _Heads(nn.Module):
    """Several outputs, one made from another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.first, self.second, self.kind = nn.Linear(4, 5), nn.Linear(5, C), nn.Linear(C, C), kind

    def forward(self, x: Tensor) -> Any:
        a = self.first(self.inner(x).tanh())
        b = self.second(a.tanh())
        return {"a": a, "b": (b,)} if self.kind == "dict" else (a, b)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.parametrize("coupled", [False, True])
def test_several_outputs(kind: str, coupled: bool, marked: bool) -> None:
    torch.manual_seed(0)
    model, (x, _, t) = _Heads(kind), _batch()

    def pair(out: Any) -> tuple[Tensor, Tensor]:
        return (out["a"], out["b"][0]) if isinstance(out, dict) else out

    def terms_of(z: tuple[Tensor, Tensor]) -> Tensor:
        a, b = z
        if coupled:
            return torch.cat([a, b - t], 1).logsumexp(1) + 0.1 * (a - b).square().sum(1)
        return a.exp().sum(1) + (b - t).pow(4).sum(1)

    fn = lambda out: terms_of(pair(out)).sum()  # noqa: E731
    fn = lw.as_loss(fn, reduction="sum") if marked else fn
    outputs = lambda: pair(model(x))  # noqa: E731
    _check(model, lambda: fn(model(x)), lambda: terms_of(outputs()), outputs, terms_of, True)


def test_three_calls_of_one_model() -> None:
    """Anchor, positive and negative: one loss of three outputs."""
    model, x = _net(), torch.randn(3, N, 4)

    def terms_of(z: Any) -> Tensor:
        return F.triplet_margin_with_distance_loss(
            *z, margin=9.0, distance_function=lambda a, b: (a - b).square().sum(1), reduction="none"
        )

    outputs = lambda: tuple(model(x[i]) for i in range(3))  # noqa: E731
    _check(model, lambda: terms_of(outputs()).sum(), lambda: terms_of(outputs()), outputs, terms_of, False)


def test_a_learned_variance() -> None:
    model, (x, _, t) = _net(2 * C), _batch()
    part = lambda z: (z[:, :C], F.softplus(z[:, C:]) + 0.1)  # noqa: E731

    def terms_of(z: Tensor) -> Tensor:
        mean, var = part(z)
        return (0.5 * (var.log() + (mean - t) ** 2 / var)).sum(1)

    loss = lambda: F.gaussian_nll_loss(*(lambda m, v: (m, t, v))(*part(model(x))), reduction="sum")  # noqa: E731
    _check(model, loss, lambda: terms_of(model(x)), lambda: model(x), terms_of, False)


@pytest.mark.parametrize("name", ["squares", "cross entropy", "both"])
def test_sequences(name: str) -> None:
    """Outputs [N,T,C], whose Hessian is diagonal, has a block for each position, or one for each sample."""
    model, x, t = _net(), torch.randn(4, 3, 4), torch.randn(4, 3, C)

    def terms_of(z: Tensor) -> Tensor:
        if name == "squares":
            return (z - t).square().flatten(1).sum(1)
        if name == "cross entropy":
            return (z.logsumexp(2) - z[:, :, 0]).sum(1)
        return z.flatten(1).logsumexp(1)

    _check(model, lambda: terms_of(model(x)).sum(), lambda: terms_of(model(x)), lambda: model(x), terms_of, True)


class _WithLoss(nn.Module):
    """The loss inside `forward`, beside the outputs or alone."""

    def __init__(self, outputs: bool) -> None:
        super().__init__()
        self.net, self.outputs = _net(), outputs

    def forward(self, x: Tensor, t: Tensor) -> Any:
        z = self.net(x)
        loss = (z - t).pow(4).mean()
        return {"loss": loss, "logits": z} if self.outputs else loss


def test_a_loss_inside_forward() -> None:
    model, (x, _, t) = _WithLoss(True), _batch()
    terms_of = lambda z: (z - t).pow(4).sum(1) / z.numel()  # noqa: E731
    outputs = lambda: model(x, t)["logits"]  # noqa: E731
    _check(model, lambda: model(x, t)["loss"], lambda: terms_of(outputs()), outputs, terms_of, True)


def test_without_a_boundary_there_are_first_order_quantities_alone() -> None:
    model, (x, _, t) = _WithLoss(False), _batch()
    functional = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for subject, loss in (
        (model, lambda: model(x, t)),
        (functional, lambda: torch.func.functional_call(model, functional, (x, t))),
    ):
        params = oracle.parameters(subject)
        with lw.observe(subject, lw.PerSampleGrad()) as seen:
            loss().backward()
        for n in range(N):
            one = oracle.gradient(params, lambda n=n: (model.net(x)[n] - t[n]).pow(4).sum() / (N * C))
            if subject is model:
                for key in one:
                    oracle.assert_close(seen.per_sample_grad[key][n], one[key])
        for key, p in params.items():
            oracle.assert_close(seen.per_sample_grad[key].sum(0), p.grad)
        with pytest.raises(errors.UnknownLoss, match="as_loss"), lw.observe(subject, lw.DiagGGN()):
            loss().backward()


# Reductions and batches ------------------------------------------------------------------------------------


def test_what_depends_on_the_reduction_is_refused_where_it_is_not_told() -> None:
    model, (x, y, t) = _net(), _batch()
    loss = lambda: TERMS["focal"].terms(model(x), y, t).mean()  # noqa: E731
    with pytest.raises(errors.Undefined, match="as_loss"):
        _observe(model, loss, lw.Variance(), scale="sample")
    with pytest.raises(errors.Undefined, match="as_loss"):
        _observe(model, loss, lw.FisherDiag("data"))
    with pytest.raises(errors.BadInput, match="as_loss"):
        lw.accumulate(model, lambda _: loss(), [0, 1], lw.Variance())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scales_and_batches_of_a_marked_loss(reduction: str) -> None:
    model, (x, y, t) = _net(), _batch(n=7)
    fn = lw.as_loss(lambda z, b: getattr(_focal(z, b[0], b[1]), reduction)(), reduction=reduction)
    quantities = lambda: (lw.Variance(), lw.SecondMoment(), lw.DiagHessian(), lw.FisherDiag("data"))  # noqa: E731
    whole, streamed = quantities(), quantities()
    want = _observe(model, lambda: fn(model(x), (y, t)), *whole, scale="sample")
    batches = [(x[:4], (y[:4], t[:4])), (x[4:], (y[4:], t[4:]))]
    got = lw.accumulate(model, fn, batches, *streamed, scale="sample")
    for a, b in zip(streamed, whole, strict=True):
        for key in want[b]:
            oracle.assert_close(got[a][key], want[b][key], rel=1e-9)
    grads = oracle.per_sample_grad(oracle.parameters(model), lambda: _focal(model(x), y, t))
    for key, g in grads.items():
        factor = 1 / 7  # N g_n of a mean, and g_n of a sum, are the terms' own gradients
        oracle.assert_close(want.second_moment[key], g.square().sum(0) * factor)


def test_nan_is_refused_and_nothing_is_left_behind() -> None:
    model, (x, _, t) = _net(), _batch()
    with pytest.raises(errors.NonFinite):
        _observe(model, lambda: (model(x * float("nan")) - t).pow(4).mean(), lw.DiagGGN())
    nan_curvature = lambda: (model(x) - model(x).detach()).abs().pow(1.5).mean()  # noqa: E731
    with pytest.raises((errors.NonFinite, errors.Undefined)):
        _observe(model, nan_curvature, lw.DiagGGN())
    assert not model._forward_hooks and all(p.grad is None for p in model.parameters())


class _Interrupted(nn.Module):
    """A model whose forward raises where it is asked to, in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(4, 5), nn.Linear(5, C)
        self.raises = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x))
        if self.raises:
            raise ValueError("in the middle")
        return self.above(h)


def test_layers_called_one_by_one_are_seen_after_a_call_of_the_model_that_failed() -> None:
    model, (x, _, t) = _Interrupted(), _batch()

    def by_layers() -> Tensor:
        return (model.above(torch.tanh(model.below(x))) - t).pow(4).mean()

    def failing_first() -> Tensor:
        model.raises = True
        with pytest.raises(ValueError, match="in the middle"):
            model(x)
        model.raises = False
        return by_layers()

    wanted = _observe(model, lambda: (model(x) - t).pow(4).mean(), lw.DiagGGN())
    for loss in (by_layers, failing_first):
        found = _observe(model, loss, lw.DiagGGN())
        for name in dict(model.named_parameters()):
            oracle.assert_close(found.diag_ggn[name], wanted.diag_ggn[name], rel=1e-9)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not nn.modules.module._global_forward_hooks


def test_parameters_inside_the_loss_are_refused_by_name() -> None:
    model, (x, _, t) = _net(), _batch()
    decay = lambda: (model(x) - t).pow(4).mean() + 0.1 * model[0].weight.square().sum()  # noqa: E731
    hidden = lw.as_loss(lambda z: (z - t).pow(4).mean() + 0.1 * model[0].weight.square().sum())
    other = lw.as_loss(lambda z: (z - t).pow(4).mean() + model[0](x).mean())
    for quantity in (lw.SecondMoment(), lw.DiagGGN(), lw.KFAC()):
        with pytest.raises(errors.Undefined, match=r"0\.weight"):
            _observe(model, decay, quantity)
        with pytest.raises(errors.UnknownLoss, match=r"0\.weight.*first argument"):
            _observe(model, lambda: hidden(model(x)), quantity)
        with pytest.raises(errors.LayerwiseError):
            _observe(model, lambda: other(model(x)), quantity)


def test_the_mark_changes_nothing_outside() -> None:
    z, y = torch.randn(4, C, requires_grad=True), torch.randint(C, (4,))
    assert torch.equal(lw.as_loss(F.cross_entropy)(z, y), F.cross_entropy(z, y))
    for bad in (3, None):
        with pytest.raises(errors.BadInput, match="function"):
            lw.as_loss(bad)
    with pytest.raises(errors.BadInput, match="reduction"):
        lw.as_loss(F.cross_entropy, reduction="none")


# Every model of the zoo ------------------------------------------------------------------------------------


def _zoo() -> list[str]:
    plain = [p for p in PROBLEMS.values() if p.own_loss is None and p.own_output is None]
    return [p.name for p in plain if not isinstance(p.out[0], tuple) and "mse_sum" in p.losses]


@pytest.mark.parametrize("name", _zoo())
def test_every_model_with_a_loss_of_its_own(name: str) -> None:
    """log cosh, marked, over the zoo's layouts of outputs."""
    made = Case(PROBLEMS[name], LOSSES["mse_sum"]).make(0)
    fn = lw.as_loss(lambda z: (z - made.y).cosh().log().sum(), reduction="sum")
    each = lambda: made.problem.per_sample((made.logits() - made.y).cosh().log(), made.n)  # noqa: E731
    grads = oracle.per_sample_grad(made.params, each)
    with lw.observe(made.subject, lw.PerSampleGrad(), lw.DiagGGN()) as seen:
        fn(made.logits()).backward()
    want = oracle.diag_ggn(made.params, made.logits, fn)
    used = set(seen.per_sample_grad)
    assert used == oracle.used_names(made.params, lambda: fn(made.logits()))
    oracle.assert_close(seen.per_sample_grad, {name: g for name, g in grads.items() if name in used})
    oracle.assert_close(seen.diag_ggn, {name: g for name, g in want.items() if name in used})


def test_hessians_of_samples_under_two_losses_of_one_output() -> None:
    """A parameter that takes a product for every element: each loss counts once."""
    weights = {"w": torch.randn(4, C, requires_grad=True)}
    x, y, t = _batch()
    each = lambda z: F.cross_entropy(z, y, reduction="none") + (z - t).square().sum(1)  # noqa: E731
    quantity = lw.DiagHessian(per_sample=True)
    with lw.observe(weights, quantity) as seen:
        z = x @ weights["w"].tanh()
        (F.cross_entropy(z, y, reduction="sum") + F.mse_loss(z, t, reduction="sum")).backward()
    for n in range(N):
        want = oracle.diag_hessian(weights, lambda n=n: each(x @ weights["w"].tanh())[n])
        oracle.assert_close(seen[quantity]["w"][n], want["w"])
