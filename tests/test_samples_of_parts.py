"""What a sample is where several tensors meet in one loss: graphs, parts of a batch, rows compared with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

Loss = Callable[[], Tensor]
Step = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
N = 4


def _each(model: nn.Module, loss: Loss, samples: int | Tensor | None = None) -> dict[str, Tensor]:
    with lw.observe(model, lw.PerSampleGrad(), samples=samples) as seen:
        loss().backward()
    return dict(seen.per_sample_grad)


# -- graphs ----------------------------------------------------------------------------------------------------------

RING = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [1, 0, 3, 4, 2, 6, 7, 8, 5]])
GRAPH_OF = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])


class Sage(nn.Module):
    """Nodes beside the sum of their neighbours; the edges come as `[2, E]`, as many as nodes or not."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.neighbours, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        summed = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        return self.head((self.own(summed + x) + self.neighbours(summed)).tanh())


@pytest.mark.parametrize("edges", [RING, RING[:, :7], torch.cat([RING, RING.flip(0)], 1)], ids=["nodes", "7", "both"])
@pytest.mark.parametrize("of", ["graphs", "nodes"])
def test_rows_of_an_edge_index_are_no_samples(of: str, edges: Tensor) -> None:
    model, x = Sage().double(), torch.randn(9, 3).double()
    n = 3 if of == "graphs" else 9
    y = torch.randn(n, 2).double()

    def loss(reduction: str = "sum") -> Tensor:
        z = model(x, edges)
        z = z if of == "nodes" else z.new_zeros(3, 2).index_add(0, GRAPH_OF, z)
        return F.mse_loss(z, y, reduction=reduction)

    want = oracle.per_sample_grad(oracle.parameters(model), lambda: loss("none").sum(1))
    oracle.assert_close(_each(model, loss), want, 1e-12)


class OneWritten(nn.Module):
    """A row of the batch is written to zeros, by a frozen map, before the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tensor([1])
        written = torch.zeros_like(x[:, 0]).index_add(0, rows, x.flatten(0, 1).index_select(0, rows).tanh())
        return self.layer(written.view_as(x)).flatten(0, 1)


def test_a_batch_of_which_one_row_is_written() -> None:
    model, x, y = OneWritten().double(), torch.randn(2, 1, 3).double(), torch.tensor([0, 2])
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none"))
    oracle.assert_close(_each(model, lambda: F.cross_entropy(model(x), y, reduction="sum")), want, 1e-12)


# -- parts of a batch in tensors of their own -------------------------------------------------------------------------


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _parts(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3).double(), torch.randint(2, (size,))) for size in sizes]


def _known(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> Loss:
    return lambda: sum((F.cross_entropy(model(x), y, reduction="sum") for x, y in parts), torch.zeros(()).double())


def _own(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> Loss:
    return lambda: sum(((model(x) - y[:, None]).square().sum() for x, y in parts), torch.zeros(()).double())


MAKE = {"known": _known, "own": _own}
OF_A_ROW = {
    "known": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "own": lambda z, y: (z - y[:, None]).square().sum(1),
}


@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (4, 2), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("kind", MAKE)
def test_parts_of_a_batch_are_asked_about_and_exact_once_told(kind: str, sizes: tuple[int, ...]) -> None:
    model, parts, n = _net(), _parts(*sizes), sum(sizes)
    loss = MAKE[kind](model, parts)
    with pytest.raises(lw.errors.LayerwiseError, match="samples="):
        _each(model, loss)
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: OF_A_ROW[kind](model(x), y))
    for said in (n, torch.arange(n)):
        oracle.assert_close(_each(model, loss, said), want, 1e-12)
    for optimizer in (lw.AltMin(model), lw.LocoProp(model, target=lw.local.GradientStep(0.1, per="sample"))):
        with pytest.raises(lw.errors.AmbiguousSamples, match="samples="):
            optimizer.step(loss)


def test_the_error_names_every_tensor_that_samples_takes() -> None:
    model, parts = _net(), _parts(N, N)
    with pytest.raises(lw.errors.AmbiguousSamples, match=r"of shape \(4,\), .* or \(8,\): those of \(4,\), \(4,\)"):
        _each(model, _known(model, parts))
    for said in (torch.arange(N), torch.arange(2 * N)):
        assert _each(model, _known(model, parts), said)["0.weight"].shape[0] == len(said)


def test_labelled_and_unlabelled_rows_of_one_forward_pass() -> None:
    """A weighted sum of two means, of 4 and of 8 rows: what a sample is cannot be told."""
    model, ((x, y), (u, label)) = _net(), _parts(N, 2 * N)

    def terms() -> tuple[Tensor, Tensor]:
        z = model(torch.cat([x, u]))
        return F.cross_entropy(z[:N], y), 0.5 * F.cross_entropy(z[N:], label)

    with pytest.raises(lw.errors.AmbiguousSamples, match=r"4 .* and .*12"):
        _each(model, lambda: sum(terms(), torch.zeros(()).double()))
    weight = torch.cat([torch.full((N,), 1 / N), torch.full((2 * N,), 0.5 / (2 * N))]).double()
    both, labels = torch.cat([x, u]), torch.cat([y, label])
    want = oracle.per_sample_grad(
        oracle.parameters(model), lambda: F.cross_entropy(model(both), labels, reduction="none") * weight
    )
    oracle.assert_close(_each(model, lambda: sum(terms(), torch.zeros(()).double()), 3 * N), want, 1e-12)


@pytest.mark.parametrize("fixed", [7, 3])
def test_parts_that_read_the_derivative_by_the_batch(fixed: int) -> None:
    """A differential equation on points and values on others: output and derivative of a point are one sample's."""
    model, points, (x, _), y = _net(), torch.randn(3, 3).double(), *_parts(fixed), torch.randn(fixed, 2).double()

    def residual() -> Tensor:
        at = points.clone().requires_grad_()
        z = model(at)
        (slope,) = torch.autograd.grad(z.sum(), at, create_graph=True)
        return (slope[:, :2] - z).square().sum(1)

    def loss() -> Tensor:
        return residual().mean() + F.mse_loss(model(x), y, reduction="sum")

    with pytest.raises(lw.errors.AmbiguousSamples, match=f"{3 + fixed}"):
        _each(model, loss)
    want = oracle.per_sample_grad(
        oracle.parameters(model), lambda: torch.cat([residual() / 3, (model(x) - y).square().sum(1)])
    )
    for said in (3 + fixed, torch.arange(3 + fixed)):
        oracle.assert_close(_each(model, loss, said), want, 1e-12)


def test_a_penalty_on_the_derivative_by_the_same_rows_is_not_asked_about() -> None:
    model, ((x, y),) = _net(), _parts(N)

    def terms() -> Tensor:
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(at).square().sum(), at, create_graph=True)
        return F.cross_entropy(model(x), y, reduction="none") + slope.square().sum(1)

    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    oracle.assert_close(_each(model, lambda: terms().sum()), want, 1e-12)


def _slope(model: nn.Module, x: Tensor) -> Tensor:
    at = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(at).square().sum(), at, create_graph=True)
    return slope.square().sum(1)


def test_a_penalty_on_rows_made_of_both_parts_joins_them() -> None:
    """Real and generated rows: with a penalty on the real ones alone they are asked about, on their mixture not."""
    model, ((x, y), (z, _)) = _net(), _parts(N, N)

    def terms(penalty: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none") + model(z).square().sum(1) + penalty

    def mixture() -> Tensor:
        share = torch.linspace(0.1, 0.9, N).double()[:, None]
        return _slope(model, share * x + (1 - share) * z)

    def loss(penalty: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="sum") + model(z).square().sum() + penalty.sum()

    with pytest.raises(lw.errors.AmbiguousSamples, match=r"4 .* and 8"):
        _each(model, lambda: loss(_slope(model, x)))
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: terms(mixture()))
    oracle.assert_close(_each(model, lambda: loss(mixture())), want, 1e-12)


def _softplus(model: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    real = real.detach().requires_grad_()
    out = model(real)
    (slope,) = torch.autograd.grad(out.sum(), real, create_graph=True)
    return (F.softplus(-out) + slope.square().sum(1, keepdim=True)), F.softplus(model(fake))


def _fake_first(model: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """A hinge on the generated rows, then on the real ones, with a penalty on both."""
    real, fake = (x.detach().requires_grad_() for x in (real, fake))
    made, true = model(fake), model(real)
    (down,) = torch.autograd.grad(made.sum(), fake, create_graph=True)
    (up,) = torch.autograd.grad(true.sum(), real, create_graph=True)
    return F.relu(1 + made) + down.square().sum(1, keepdim=True), F.relu(1 - true) + up.square().sum(1, keepdim=True)


def _again(model: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The penalty of a forward pass of its own, and a target for each part."""
    terms = [
        F.binary_cross_entropy_with_logits(z, torch.full_like(z, y), reduction="none")
        for z, y in ((model(real), 1.0), (model(fake), 0.0))
    ]
    return terms[0] + _slope(model, real)[:, None], terms[1]


def _one_pass(model: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    real = real.detach().requires_grad_()
    true, made = model(torch.cat([real, fake])).split([len(real), len(fake)])
    (slope,) = torch.autograd.grad(true.sum(), real, create_graph=True)
    return F.softplus(-true) + slope.square().sum(1, keepdim=True), F.softplus(made)


@pytest.mark.parametrize("sizes", [(N, N), (N, 6)], ids=str)
@pytest.mark.parametrize("step", [_softplus, _fake_first, _again, _one_pass])
def test_a_penalty_on_the_derivative_by_one_part_of_the_batch(step: Step, sizes: tuple[int, int]) -> None:
    """A discriminator's step with an R1 penalty: the penalty of a row and its score are one sample's."""
    model, ((real, _), (fake, _)) = nn.Sequential(*_net(), nn.Linear(2, 1).double()), _parts(*sizes)
    loss = lambda: sum((part.mean() for part in step(model, real, fake)), torch.zeros(()).double())  # noqa: E731
    weights = [1 / len(real), 1 / len(fake)][:: -1 if step is _fake_first else 1]
    want = oracle.per_sample_grad(
        oracle.parameters(model),
        lambda: torch.cat([w * part[:, 0] for w, part in zip(weights, step(model, real, fake), strict=True)]),
    )
    n = sum(sizes)
    if step is not _one_pass:  # else the batch of all rows is seen
        with pytest.raises(lw.errors.LayerwiseError, match="samples="):
            _each(model, loss)
    for said in (n, torch.arange(n), *([None] if step is _one_pass else [])):
        oracle.assert_close(_each(model, loss, said), want, 1e-12)


@pytest.mark.parametrize(
    "noise",
    [
        torch.randn_like,
        lambda x: torch.rand_like(x) - 0.5,
        lambda x: torch.randn(x.shape).double(),
        lambda x: x.new_tensor(torch.randn(x.shape).tolist()),
        lambda x: torch.empty_like(x).normal_(),
    ],
    ids=["randn_like", "rand_like", "randn", "new_tensor", "empty_like"],
)
def test_noise_in_the_shape_of_a_batch_has_rows_of_its_own(noise: Callable[[Tensor], Tensor]) -> None:
    """Rows that a generator made of noise are no views of the real rows."""
    model, generator, ((real, _),) = _net(), nn.Linear(3, 3).double(), _parts(N)

    def parts() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            fake = generator(noise(real))
        return F.softplus(-model(real)), F.softplus(model(fake))

    loss = lambda: sum((part.mean() for part in parts()), torch.zeros(()).double())  # noqa: E731
    with pytest.raises(lw.errors.AmbiguousSamples, match=r"4 .* and 8"):
        _each(model, loss)
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: torch.cat([p.mean(1) / N for p in parts()]))
    oracle.assert_close(_each(model, loss, 2 * N), want, 1e-12)


class Noisy(nn.Module):
    """A layer on the batch with noise in front of it."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.apply_noise, self.layer = apply, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.layer(self.apply_noise(x))


@pytest.mark.parametrize(
    "apply",
    [
        lambda x: torch.randn_like(x) * 0.1 + x,
        lambda x: torch.where(torch.rand_like(x) < 0.5, x, 0.0),
        lambda x: torch.rand((*x.shape[:1], 1, 1)).double() * x,
        lambda x: torch.empty_like(x).uniform_() * x,
    ],
    ids=["added", "mask", "scaled rows", "written"],
)
def test_noise_that_meets_the_batch_has_the_rows_of_the_batch(apply: Callable[[Tensor], Tensor]) -> None:
    model, x, y = Noisy(apply).double(), torch.randn(N, 5, 3).double(), torch.randint(2, (N, 5))
    terms = lambda: F.cross_entropy(model(x).mT, y, reduction="none").sum(1)  # noqa: E731
    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    loss = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")  # noqa: E731
    oracle.assert_close(_each(model, loss), want, 1e-12)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "binary": F.binary_cross_entropy_with_logits,
    "squares": F.mse_loss,
    "classes": lambda z, y, reduction: F.cross_entropy(z, y[:, 0].long(), reduction=reduction),
}


@pytest.mark.parametrize("given", ["whole", "sliced"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_target_that_parts_share_links_no_rows(loss: str, given: str) -> None:
    """The label of all real rows, for two critics' inputs: no row of one is a view of the other's."""
    model, ((x, _), (u, _)) = _net(), _parts(N, N)
    label = torch.ones(N if given == "whole" else 2 * N, 2).double()[:N]

    def parts(reduction: str) -> list[Tensor]:
        return [LOSSES[loss](model(a), label, reduction=reduction) for a in (x, u)]

    with pytest.raises(lw.errors.AmbiguousSamples, match=r"4 .* and 8"):
        _each(model, lambda: sum(parts("sum"), torch.zeros(()).double()))
    want = oracle.per_sample_grad(
        oracle.parameters(model), lambda: torch.cat([p.reshape(N, -1).sum(1) for p in parts("none")])
    )
    for said in (2 * N, torch.arange(2 * N)):
        oracle.assert_close(_each(model, lambda: sum(parts("sum"), torch.zeros(()).double()), said), want, 1e-12)


def test_a_weight_that_parts_share_links_no_rows() -> None:
    """The weights of classes, where the targets are constants of the program."""
    model, ((x, _), (u, _)), weight = _net(), _parts(2, 2), torch.tensor([0.3, 0.7]).double()

    def parts(reduction: str) -> list[Tensor]:
        labels = torch.zeros(2).long(), torch.ones(2).long()
        return [F.cross_entropy(model(a), y, weight, reduction=reduction) for a, y in zip((x, u), labels, strict=True)]

    with pytest.raises(lw.errors.AmbiguousSamples, match=r"2 .* and 4"):
        _each(model, lambda: sum(parts("sum"), torch.zeros(()).double()))
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: torch.cat(parts("none")))
    oracle.assert_close(_each(model, lambda: sum(parts("sum"), torch.zeros(()).double()), 4), want, 1e-12)


@pytest.mark.parametrize("label", ["constant", "of the rows"])
def test_heads_on_the_same_rows_share_labels(label: str) -> None:
    model = nn.ModuleDict({"trunk": _net(), "one": nn.Linear(2, 2), "other": nn.Linear(2, 2)}).double()
    ((x, y),) = _parts(N)
    y = torch.ones_like(y) if label == "constant" else torch.arange(N) % 2

    def terms(reduction: str) -> Tensor:
        h = model["trunk"](x).tanh()
        return sum((F.cross_entropy(model[k](h), y, reduction=reduction) for k in ("one", "other")), torch.zeros(()))

    want = oracle.per_sample_grad(oracle.parameters(model), lambda: terms("none"))
    oracle.assert_close(_each(model, lambda: terms("sum")), want, 1e-12)


@pytest.mark.parametrize("teacher", ["given", "of the rows"])
def test_a_soft_target_that_views_share_is_one_of_each_row(teacher: str) -> None:
    """Consistency of two views with what a teacher says of each row."""
    model, mean, ((x, _), (weak, _), (strong, _)) = _net(), _net(), _parts(N, N, N)
    soft = torch.randn(N, 2).double().softmax(1)

    def terms(reduction: str) -> Tensor:
        with torch.no_grad():
            y = soft if teacher == "given" else mean(x).softmax(1)
        return F.cross_entropy(model(weak), y, reduction=reduction) + F.cross_entropy(
            model(strong), y, reduction=reduction
        )

    want = oracle.per_sample_grad(oracle.parameters(model), lambda: terms("none"))
    oracle.assert_close(_each(model, lambda: terms("sum")), want, 1e-12)


@pytest.mark.parametrize("link", ["target", "term", "detached", "call", "compared"])
def test_two_views_of_each_sample_are_one_batch(link: str) -> None:
    model, (x, y), (view, _) = _net(), *_parts(N, N)
    two = Two(model)

    def terms() -> Tensor:
        if link == "call":
            a, b = two(x, view)
            return F.cross_entropy(a, y, reduction="none") + (b - 1).square().sum(1)
        a, b = model(x), model(view)
        if link == "target":
            return F.cross_entropy(a, y, reduction="none") + F.cross_entropy(b, y, reduction="none")
        if link == "term":
            return (a * b).sum(1)
        if link == "compared":
            return F.cross_entropy(a, y, reduction="none") + (a - b).square().sum(1)
        return (a * b.detach()).sum(1) + (b * a.detach()).sum(1)

    def loss() -> Tensor:
        if link == "target":
            return F.cross_entropy(model(x), y, reduction="sum") + F.cross_entropy(model(view), y, reduction="sum")
        if link == "compared":
            a = model(x)
            return F.cross_entropy(a, y, reduction="sum") + F.mse_loss(a, model(view), reduction="sum")
        return terms().sum()

    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    got = _each(two if link == "call" else model, loss)
    oracle.assert_close({name.removeprefix("net."): g for name, g in got.items()}, want, 1e-12)


class Two(nn.Module):
    """One network on each of two tensors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(a), self.net(b)


# -- losses that compare rows ------------------------------------------------------------------------------------------


class Compared(nn.Module):
    """Two encoders, or one for both, and the inner products of their rows."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.image = nn.Linear(3, 5)
        self.text = self.image if shared else nn.Linear(3, 5)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return F.normalize(self.image(image), dim=1) @ F.normalize(self.text(text), dim=1).T


@pytest.mark.parametrize("texts", [3, 7, 2 * N, 3 * N])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_compared_with_rows_of_another_number(texts: int, shared: bool) -> None:
    """Either may be the samples, and the others what all share."""
    model, image, text = Compared(shared).double(), torch.randn(N, 3).double(), torch.randn(texts, 3).double()
    sign = 2 * torch.eye(N, texts).double() - 1
    loss = lambda: -F.logsigmoid(model(image, text) * sign).sum() / N  # noqa: E731
    low, high = sorted((N, texts))
    with pytest.raises(lw.errors.AmbiguousSamples, match=rf"{low} .* and .*{high}"):
        _each(model, loss)
    if texts % N:
        want = oracle.per_sample_grad(
            oracle.parameters(model), lambda: -F.logsigmoid(model(image, text) * sign).sum(1) / N
        )
        oracle.assert_close(_each(model, loss, N), want, 1e-12)


class Operator(nn.Module):
    """Values of N functions at points that all share, from two nets (a DeepONet); the points are its own, or given."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.branch, self.trunk = nn.Linear(5, 3), nn.Linear(1, 3)
        self.register_buffer("points", points)

    def forward(self, u: Tensor, points: Tensor | None = None) -> Tensor:
        return self.branch(u).tanh() @ self.trunk(self.points if points is None else points).tanh().T


@pytest.mark.parametrize("count", [N - 1, N, 2 * N])
def test_points_that_all_functions_share(count: int) -> None:
    points, u, y = (torch.randn(*shape).double() for shape in ((count, 1), (N, 5), (N, count)))
    model = Operator(points).double()
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: F.mse_loss(model(u), y, reduction="none").sum(1))
    mine = torch.arange(N)[:, None].expand(N, count)
    for samples in (None, N, mine):
        oracle.assert_close(_each(model, lambda: F.mse_loss(model(u), y, reduction="sum"), samples), want, 1e-12)


@pytest.mark.parametrize("count", [N, 2 * N])
def test_points_that_are_given_may_be_samples(count: int) -> None:
    points, u, y = (torch.randn(*shape).double() for shape in ((count, 1), (N, 5), (N, count)))
    model = Operator(torch.zeros(1, 1)).double()
    for samples in (N, torch.arange(N)[:, None].expand(N, count)):
        with pytest.raises(lw.errors.SamplesMixed, match=r"the model keeps them \(a buffer\)"):
            _each(model, lambda: F.mse_loss(model(u, points), y, reduction="sum"), samples)


@pytest.mark.parametrize("calls", [1, 2])
def test_trainers_do_not_take_contrasted_views_for_samples(calls: int) -> None:
    """NT-Xent: every row is set against all others, so that the loss is no sum over as many samples as rows."""
    model, ((a, _), (b, _)) = _net(), _parts(N, N)

    def loss() -> Tensor:
        z = F.normalize(model(torch.cat([a, b])) if calls == 1 else torch.cat([model(a), model(b)]), dim=1)
        return F.cross_entropy((z @ z.T).masked_fill(torch.eye(2 * N).bool(), -1e9), torch.arange(2 * N).roll(N))

    with pytest.raises(lw.errors.SamplesMixed):
        _each(model, loss)
    for optimizer in (lw.AltMin(model), lw.LocoProp(model, target=lw.local.GradientStep(0.1, per="sample"))):
        with pytest.raises(lw.errors.AmbiguousSamples, match="not seen to be a sum"):
            optimizer.step(loss)
    lw.AltMin(model).step(loss, samples=N)


def _both_ways(model: nn.Module, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    scores = F.normalize(model(a), dim=1) @ F.normalize(model(b), dim=1).T
    return F.cross_entropy(scores, labels[: len(a)]) + F.cross_entropy(scores.T, labels[: len(b)])


def _all_with_all(model: nn.Module, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(torch.cat([model(a), model(b)]), dim=1)
    return F.cross_entropy((z @ z.T).masked_fill(torch.eye(len(z)).bool(), -1e9), labels.roll(len(a)))


def _pairs(model: nn.Module, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    scores = model(a) @ model(b).T
    return F.binary_cross_entropy_with_logits(scores, (labels[: len(a), None] == labels[None, : len(b)]).double())


@pytest.mark.parametrize("labels", ["of the program", "given"])
@pytest.mark.parametrize("contrast", [_both_ways, _all_with_all, _pairs])
def test_contrasts_of_a_functional_model(contrast: Callable[..., Tensor], labels: str) -> None:
    """What such a model was called with is not known: its rows are not taken for what all samples share."""
    net, ((a, _), (b, _)) = _net(), _parts(N, N)
    params, given = dict(net.named_parameters()), torch.arange(2 * N)

    def loss() -> Tensor:
        model: Any = lambda x: torch.func.functional_call(net, params, (x,))  # noqa: E731
        return contrast(model, a, b, torch.arange(2 * N) if labels == "of the program" else given)

    with pytest.raises(lw.errors.SamplesMixed), lw.observe(params, lw.PerSampleGrad()):
        loss().backward()
    for optimizer in (lw.AltMin(params), lw.LocoProp(params, target=lw.local.GradientStep(0.1, per="sample"))):
        with pytest.raises(lw.errors.AmbiguousSamples, match="samples="):
            optimizer.step(loss)
    lw.AltMin(params).step(loss, samples=N)


def test_what_a_functional_model_reads_is_its_batch() -> None:
    net, ((x, y),) = _net(), _parts(N)
    params = dict(net.named_parameters())
    terms = lambda: F.cross_entropy(torch.func.functional_call(net, params, (x,)), y, reduction="none")  # noqa: E731
    want = oracle.per_sample_grad(params, terms)
    with lw.observe(params, lw.PerSampleGrad()) as seen:
        terms().sum().backward()
    oracle.assert_close(dict(seen.per_sample_grad), want, 1e-12)
    lw.LocoProp(params, target=lw.local.GradientStep(0.1, per="sample")).step(lambda: terms().mean())


# -- sequences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ragged_clips_are_the_samples_of_a_ctc_loss(reduction: str) -> None:
    """Time lies on the first axis; the loss is defined on a batch of sequences, whatever it is reduced to."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double(), torch.randn(7, 3, 3).double()
    target, frames, letters = torch.tensor([[1, 2, 3], [2, 3, 0], [4, 0, 0]]), [7, 5, 6], [3, 2, 1]

    def loss(reduction: str = reduction) -> Tensor:
        return F.ctc_loss(model(x).log_softmax(2), target, frames, letters, reduction=reduction).sum()

    weight = torch.tensor([1 / (3 * n) if reduction == "mean" else 1.0 for n in letters], dtype=torch.float64)
    terms = lambda: F.ctc_loss(model(x).log_softmax(2), target, frames, letters, reduction="none") * weight  # noqa: E731
    oracle.assert_close(_each(model, loss), oracle.per_sample_grad(oracle.parameters(model), terms), 1e-10)


def test_a_known_loss_beside_ones_own_of_other_rows() -> None:
    """The rows of both are numbered in the order of the model's calls."""
    model, ((x, _), (u, y)) = _net(), _parts(6, 3)
    loss = lambda: model(x).square().sum() + F.cross_entropy(model(u), y, reduction="sum")  # noqa: E731
    with pytest.raises(lw.errors.AmbiguousSamples, match="9"):
        _each(model, loss)
    terms = lambda: torch.cat([model(x).square().sum(1), F.cross_entropy(model(u), y, reduction="none")])  # noqa: E731
    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    oracle.assert_close(_each(model, loss, 9), want, 1e-12)


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", ["and put back", "in the loss", "never, but chosen", "drawn and chosen", "and said"])
def test_results_are_in_the_order_of_the_terms_numbers(turned: str) -> None:
    """As on the page of conventions: an axis of the terms numbers them; else the rows of the batch, or the user."""
    model, ((x, y),) = _net(), _parts(N)
    turn, keep = torch.tensor([2, 0, 3, 1]), torch.tensor([True, False, True, True])
    losses: dict[str, Loss] = {
        "and put back": lambda: F.cross_entropy(model(x[turn])[turn.argsort()], y, reduction="sum"),
        "in the loss": lambda: F.cross_entropy(model(x)[turn], y[turn], reduction="sum"),
        "never, but chosen": lambda: F.cross_entropy(model(x)[keep], y[keep], reduction="sum"),
        "drawn and chosen": lambda: F.cross_entropy(model(x)[turn][keep], y[turn][keep], reduction="sum"),
        "and said": lambda: F.cross_entropy(model(x)[turn], y[turn], reduction="sum"),
    }

    def terms() -> Tensor:
        each = F.cross_entropy(model(x), y, reduction="none")
        each = each[turn] if turned in ("in the loss", "drawn and chosen") else each
        return each * keep if "chosen" in turned else each

    numbers = turn if turned == "and said" else None
    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    oracle.assert_close(_each(model, losses[turned], numbers), want, 1e-12)
