"""Programs where parameters meet the batch through constants that all samples share, and through sparse tensors.

Each is a small neighbour of a program of another package: prompts before the keys of a frozen attention, a loss over
shifted tokens that were padded and flattened, weights whose values lie in a sparse tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

N, T, D, V = 3, 4, 6, 5
pytestmark = pytest.mark.usefixtures("float64")


class Prompted(nn.Module):
    """A frozen embedding and head; the trained keys are looked up once for each sample, by the same numbers."""

    def __init__(self, prompts: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.requires_grad_(False)
        self.prompt = nn.Embedding(prompts, D)
        self.register_buffer("numbers", torch.arange(prompts))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        keys = torch.cat([self.prompt(self.numbers.expand(len(x), -1)), h], dim=1)
        return self.head(torch.softmax(h @ keys.mT, -1) @ keys)


def shifted(z: Tensor, y: Tensor) -> Tensor:
    """The next token's cross entropy, with an ignored target for the last position."""
    return F.cross_entropy(z.view(-1, V), F.pad(y, (0, 1), value=-100)[..., 1:].contiguous().view(-1))


def in_turn(z: Tensor, y: Tensor) -> Tensor:
    """The same with positions before samples."""
    return F.cross_entropy(z.transpose(0, 1).reshape(-1, V), F.pad(y, (0, 1), value=-100)[:, 1:].T.reshape(-1))


@pytest.mark.parametrize("prompts", [1, 2, N, T])
@pytest.mark.parametrize("loss_of", [shifted, in_turn])
def test_prompts_that_all_samples_share(loss_of: Callable[[Tensor, Tensor], Tensor], prompts: int) -> None:
    model, x = Prompted(prompts), torch.randint(V, (N, T))
    params = oracle.parameters(model)
    grads = oracle.per_sample_grad(params, lambda: torch.stack([loss_of(model(s), s) for s in x.split(1)]) / N)
    with lw.observe(model, lw.PerSampleGrad(), lw.Variance(), lw.DiagGGN()) as seen:
        loss_of(model(x), x).backward()
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    oracle.assert_close(dict(seen.diag_ggn), oracle.diag_ggn(params, lambda: model(x), lambda z: loss_of(z, x)))


class Placed(nn.Module):
    """Positions looked up once and carried through layers of their own, added to every sample."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.places = nn.Embedding(T, D)
        self.above = nn.Sequential(*[m for _ in range(layers) for m in (nn.Tanh(), nn.Linear(D, D))])
        self.first, self.head = nn.Linear(2, D), nn.Linear(D, V)
        self.numbers = [torch.arange(T)[None]]  # in a list: no buffer, which would be a constant of the model's

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.first(x) + self.above(self.places(self.numbers[0]))).tanh())


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("told", [False, True])
def test_chosen_positions_above_layers_that_all_samples_share(layers: int, told: bool) -> None:
    """A position that one sample alone chose is still no row of that sample."""
    model, x = Placed(layers), torch.randn(5, T, 2)
    keep = torch.zeros(5, T, dtype=torch.bool)
    keep[torch.arange(5), [0, 1, 1, 3, 1]] = True
    keep[0, 1] = True
    number, y = keep.nonzero()[:, 0], torch.randint(V, (6,))
    each = lambda: F.cross_entropy(model(x)[keep], y, reduction="none")  # noqa: E731
    terms = lambda: torch.zeros(5).index_add(0, number, each())  # noqa: E731
    with lw.observe(model, lw.PerSampleGrad(), lw.Variance(), samples=number if told else None) as seen:
        F.cross_entropy(model(x)[keep], y, reduction="sum").backward()
    grads = oracle.per_sample_grad(oracle.parameters(model), terms)
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))


@pytest.mark.parametrize("by_position", [False, True])
def test_prompts_with_flat_targets_that_name_no_sample(by_position: bool) -> None:
    """Each sample has prompts of its own rows, and these say which terms are its own."""
    model, x, y = Prompted(2), torch.randint(V, (N, T)), torch.randint(V, (N, T))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = model(x)
        z, y = (z.transpose(0, 1), y.T) if by_position else (z, y)
        return F.cross_entropy(z.reshape(-1, V), torch.tensor(y.flatten().tolist()))

    terms = lambda: torch.stack([loss(*pair) / N for pair in zip(x.split(1), y.split(1), strict=True)])  # noqa: E731
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        loss(x, y).backward()
    oracle.assert_close(dict(seen.per_sample_grad), oracle.per_sample_grad(oracle.parameters(model), terms))


ROWS, COLUMNS = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2])


def coo(w: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([ROWS, COLUMNS]), w, (2, 3))


def csr(w: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(torch.tensor([0, 1, 3]), COLUMNS, w, (2, 3))


BASE = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
SPARSE = {
    "added to a dense one": lambda x, w: x @ (BASE + coo(w)).T,
    "made dense": lambda x, w: x @ coo(w).to_dense().T,
    "coalesced": lambda x, w: x @ coo(w).coalesce().to_dense().T,
    "sparse.mm": lambda x, w: torch.sparse.mm(coo(w), x.T).T,
    "a sparse matrix times a dense one": lambda x, w: (coo(w) @ x.T).T,
    "scaled": lambda x, w: x @ (coo(w) * 2.0).to_dense().T,
    "CSR": lambda x, w: (csr(w) @ x.T).T,
    "written into zeros": lambda x, w: x @ torch.zeros(2, 3).index_put((ROWS, COLUMNS), w).T,
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", SPARSE)
def test_values_of_a_sparse_weight(name: str) -> None:
    """Exact, or refused with the way around it; second derivatives, which torch takes for zero, never silently.

    What the functional model was called with is not known, and its layers read the indices alone: N is said.
    """
    x, y, params = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), {"w": torch.randn(3, requires_grad=True)}
    logits = lambda: SPARSE[name](x, params["w"])  # noqa: E731
    dense = lambda: SPARSE["written into zeros"](x, params["w"])  # noqa: E731
    if name in ("added to a dense one", "scaled"):
        factor, base = (2.0, 0.0) if name == "scaled" else (1.0, BASE)
        dense = lambda: x @ (base + factor * torch.zeros(2, 3).index_put((ROWS, COLUMNS), params["w"])).T  # noqa: E731
    loss, loss_of = (lambda: F.cross_entropy(logits(), y)), (lambda z: F.cross_entropy(z, y))
    grads = oracle.per_sample_grad(params, lambda: F.cross_entropy(dense(), y, reduction="none") / 4)
    ggn = oracle.ggn(params, dense, loss_of)
    wanted = {
        lw.PerSampleGrad(): grads["w"], lw.DiagGGN(): ggn.diagonal(), lw.DiagHessian(): ggn.diagonal(),
    }  # fmt: skip
    exact = 0
    for quantity, want in wanted.items():
        try:
            with lw.observe(params, quantity, samples=4) as seen:
                loss().backward()
        except (lw.errors.UnsupportedCall, lw.errors.Undefined) as error:
            assert "dense tensor" in str(error) or "second derivatives" in str(error)
            continue
        oracle.assert_close(seen[quantity]["w"], want)
        exact += 1
    for operator in (lw.GGN, lw.Hessian):  # the logits are linear in w
        try:
            found = operator(params, loss).to_dense()
        except lw.errors.Undefined as error:
            assert "second derivatives" in str(error)
            continue
        oracle.assert_close(found, ggn)
        exact += 1
    assert exact == 5 if name == "written into zeros" else exact < 5


def test_a_derivative_that_torch_cannot_batch() -> None:
    """Group norm of a channels-last input: the pulled roots come one by one."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(N, 3, 5, 5).to(memory_format=torch.channels_last)
    y = torch.randn(N, 2, 3, 3)
    with lw.observe(model, lw.DiagGGN()) as seen:
        F.mse_loss(model(x), y).backward()
    want = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), lambda z: F.mse_loss(z, y))
    oracle.assert_close(dict(seen.diag_ggn), want)


class Towers(nn.Module):
    """Two encoders and the inner products of their rows; the second reads an argument or what the model keeps."""

    def __init__(self, kept: Tensor | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, D), nn.Linear(5, D)
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return F.normalize(self.a(x), dim=1) @ F.normalize(self.b(self.kept if other is None else other), dim=1).T


CONTRASTS = {
    "info_nce": lambda z: F.cross_entropy(z, torch.arange(len(z))),
    "sigmoid": lambda z: -F.logsigmoid(z * (2 * torch.eye(*z.shape) - 1)).sum() / len(z),
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("loss", "candidates"), [("info_nce", N), ("info_nce", 2 * N), ("sigmoid", N)])
def test_rows_of_another_tower_that_all_samples_are_compared_with(loss: str, candidates: int, apart: bool) -> None:
    model, x, other = Towers(), torch.randn(N, 4), torch.randn(candidates, 5)
    with pytest.raises(lw.errors.SamplesMixed, match=f"of {N} samples"), lw.observe(model, lw.PerSampleGrad()):
        CONTRASTS[loss](model.a(x) @ model.b(other).T if apart else model(x, other)).backward()


def test_one_model_called_with_both_sides_of_a_contrast() -> None:
    model, x, other = nn.Linear(4, D), torch.randn(N, 4), torch.randn(N, 4)
    with pytest.raises(lw.errors.SamplesMixed, match="mm"), lw.observe(model, lw.PerSampleGrad()):
        CONTRASTS["info_nce"](model(x) @ model(other).T).backward()


@pytest.mark.parametrize("kept", [True, False])
def test_class_prompts(kept: bool) -> None:
    """As many as samples where the model keeps them; of another number as an argument."""
    prompts = torch.randn(N if kept else N + 1, 5)
    model, x, y = Towers(prompts if kept else None), torch.randn(N, 4), torch.randint(N, (N,))
    rest = () if kept else (prompts,)
    params = oracle.parameters(model)
    each = [F.cross_entropy(model(x[n : n + 1], *rest), y[n : n + 1]) / N for n in range(N)]
    grads = oracle.per_sample_grad(params, lambda: torch.stack(each))
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        F.cross_entropy(model(x, *rest), y).backward()
    oracle.assert_close(dict(seen.per_sample_grad), grads)


@pytest.mark.parametrize("lead", [(), (1,)])
def test_as_many_positions_as_samples_in_an_argument(lead: tuple[int, ...]) -> None:
    """A token has one position, so that positions are no samples that others are compared with."""
    tables = nn.ModuleDict({"token": nn.Embedding(V, D), "place": nn.Embedding(N, D), "head": nn.Linear(D, V)})

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = tables

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return self.of["head"]((self.of["token"](x) + self.of["place"](position)).tanh())

    model, x, position = Placed(), torch.randint(V, (N, N)), torch.arange(N).view(*lead, N)
    each = [F.cross_entropy(model(s[None], position)[0], s) / N for s in x]
    grads = oracle.per_sample_grad(oracle.parameters(model), lambda: torch.stack(each))
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        F.cross_entropy(model(x, position).flatten(0, 1), x.flatten()).backward()
    oracle.assert_close(dict(seen.per_sample_grad), grads)
