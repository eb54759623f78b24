"""Every function and module of torch by name: listed, measured against brute force, and on the page `docs/calls.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from calls_measured import EXACT, NO_GRADIENT, REFUSED, SLOWER, every, measure, namespaces, unlisted
from calls_page import PAGE, render
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]

SPACES: dict[str, ModuleType] = {**namespaces(), "torch.nn": nn, "torch.optim": torch.optim}
SAMPLE = {
    "torch": "add mul matmul cat gather index_put where bmm addmm layer_norm lstm cross sparse_coo_tensor".split(),
    "torch.nn.functional": "linear conv2d embedding cross_entropy kl_div scaled_dot_product_attention".split(),
    "torch.linalg": ["solve", "multi_dot"], "torch.nn": ["Linear", "LSTM", "Transformer", "CTCLoss", "NLLLoss"],
    "torch.optim": ["LBFGS", "SparseAdam"],
}  # fmt: skip


def test_every_name_of_torch_is_listed() -> None:
    """A new torch, with names that no list holds, fails here: give each a call, or the reason why it has none."""
    assert not unlisted()


@pytest.mark.parametrize("space", SAMPLE)
def test_a_sample_of_calls(space: str) -> None:
    kinds = {name: measure(space, name).kind for name in SAMPLE[space]}
    assert kinds.pop("sparse_coo_tensor", REFUSED) == REFUSED
    assert set(kinds.values()) <= {EXACT, SLOWER}, kinds


def test_a_wrong_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "oracle.per_sample_grad", lambda params, terms: {n: torch.ones(5, *p.shape) for n, p in params.items()}
    )
    for space, name in (("torch", "mul"), ("torch.nn", "Linear"), ("torch.nn.functional", "mse_loss")):
        with pytest.raises(AssertionError, match="relative error"):
            measure(space, name)


@pytest.mark.parametrize(
    "make",
    [
        lambda i, w: torch.sparse_coo_tensor(i, w, (4,)),
        lambda i, w: torch.sparse_csr_tensor(torch.tensor([0, 2, 4]), i[0], w, (2, 4)),
        lambda i, w: torch.sparse_coo_tensor(i.repeat(2, 1), w, (4, 4)),
    ],
)
def test_a_sparse_tensor_of_parameters_is_exact_or_refused(make: Callable[[Tensor, Tensor], Tensor]) -> None:
    w, i = nn.Parameter(torch.randn(4)), torch.arange(4)[None]
    x = torch.randn(5, 1)
    loss = lambda: torch.sum(make(i, w).to_dense() * x.expand(5, make(i, w).shape[-1]).unsqueeze(-2), 0).sum()  # noqa: E731
    (want,) = torch.autograd.grad(loss(), w)
    try:
        with lw.observe({"w": w}, samples=5) as seen:
            loss().backward()
    except errors.LayerwiseError as error:
        assert "dense tensor" in str(error) or "samples" in str(error)
        assert w.grad is None
    else:
        torch.testing.assert_close(seen.grad["w"], want)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_cell_whose_weights_are_cut_from_others(cell: type[nn.Module]) -> None:
    """Arguments that move rows may be parameters' own."""
    size = {nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}[cell]
    x, w = torch.randn(5, 4), nn.Parameter(torch.randn(4, 4))
    call = {nn.RNNCell: torch.rnn_tanh_cell, nn.GRUCell: torch.gru_cell, nn.LSTMCell: torch.lstm_cell}[cell]

    def terms() -> Tensor:
        state = [x, x] if cell is nn.LSTMCell else x
        out = call(x, state, w.repeat(size, 1), w.T.repeat(size, 1))
        return (out[0] if isinstance(out, tuple) else out).square().mean(1) / 5

    want = torch.stack([torch.autograd.grad(term, w, retain_graph=True)[0] for term in terms()])
    for _ in range(2):
        with lw.observe({"w": w}, lw.PerSampleGrad()) as seen:
            terms().sum().backward()
        assert torch.allclose(seen.per_sample_grad["w"], want, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_the_page_says_what_was_found(request: pytest.FixtureRequest) -> None:
    found = {space: {name: measure(space, name) for name in every(ns)} for space, ns in SPACES.items()}
    page = render(found)
    kinds = Counter(one.kind for names in found.values() for one in names.values())
    assert kinds[EXACT] > 600 and kinds[NO_GRADIENT] < 150, kinds
    if request.config.getoption("--write-support"):
        PAGE.write_text(page)
    assert page == PAGE.read_text(), "docs/calls.md no longer says what is so: run `make support`"
