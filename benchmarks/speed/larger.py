"""Observations of larger nets in plain steps, with the weights' gradients as sums of rows too.

    python -m benchmarks.speed.larger [--rows gpt t5-like resnet18 parameters sketch ekfac gpt2] [--repeats 15]

CPU time over that of the plain forward and backward pass (for EKFAC: over one pass of the data), one thread, lower
quartiles of interleaved repeats. "rows" is `observe(..., grad="rows")`. GPT-2 with 124 M parameters takes 256 tokens
and 3 repeats at most; "first" is the first call of a new model, in plain steps. Random data; nothing is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from benchmarks import probe
from benchmarks.device import GPT2
from benchmarks.speed.overhead.nets import NETS

QUANTITIES: dict[str, Callable[[], list[lw.Quantity]]] = {
    "nothing": list,
    "norms": lambda: [lw.SquaredNorm()],
    "per-sample gradients": lambda: [lw.PerSampleGrad()],
    "second moment": lambda: [lw.SecondMoment()],
}

Loss = Callable[[], Tensor]
Row = tuple[str, str, float]  # the net, what is computed, plain steps


def plain_step(model: nn.Module, loss: Loss) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        loss().backward()

    return step


def observed_step(
    model: nn.Module, loss: Loss, make: Callable[[], list[lw.Quantity]], grad: str
) -> Callable[[], object]:
    def step() -> object:
        model.zero_grad()
        with lw.observe(model, *make(), grad=grad) as seen:
            loss().backward()
        return seen

    return step


def _net(name: str) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model, (x, y) = NETS[name].make(), NETS[name].data(NETS[name].batch)
    return model, lambda: F.cross_entropy(model(x), y)


def _in_plain_steps(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    found = probe.interleaved(runs, repeats, warm_up=3)
    return {name: seconds / found["plain"] for name, seconds in found.items() if name != "plain"}


def net(name: str, repeats: int) -> Iterator[Row]:
    """The quantities of one of the nets, with autograd's gradients and with sums of rows."""
    model, loss = _net(name)
    runs = {"plain": plain_step(model, loss)}
    for what, make in QUANTITIES.items():
        runs[what] = observed_step(model, loss, make, "autograd")
        if make():
            runs[f"{what}, rows"] = observed_step(model, loss, make, "rows")
    for what, ratio in _in_plain_steps(runs, repeats).items():
        yield name, what, ratio


class Many(nn.Module):
    """Many small parameters, each used once."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.each = nn.ParameterList([torch.randn(16) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x * p).sum(1) for p in self.each], 1)


def parameters(repeats: int, count: int = 5000) -> Iterator[Row]:
    """Norms of a list of small parameters."""
    torch.manual_seed(0)
    model, x, y = Many(count), torch.randn(8, 16), torch.randn(8, count)

    def loss() -> Tensor:
        return F.mse_loss(model(x), y)

    runs = {"plain": plain_step(model, loss), "norms": observed_step(model, loss, QUANTITIES["norms"], "autograd")}
    for what, ratio in _in_plain_steps(runs, min(repeats, 5)).items():
        yield f"{count} parameters", what, ratio


def sketch(repeats: int) -> Iterator[Row]:
    """Projections of the per-sample gradients of the GPT."""
    model, loss = _net("gpt")
    made = lw.Sketch(4096)
    runs = {"plain": plain_step(model, loss), "Sketch(4096)": observed_step(model, loss, lambda: [made], "autograd")}
    for what, ratio in _in_plain_steps(runs, repeats).items():
        yield "gpt", what, ratio


def ekfac(repeats: int) -> Iterator[Row]:
    """EKFAC of the GPT's linear layers, fitted to 64 sequences, over one pass of them."""
    torch.manual_seed(0)
    model, batches = NETS["gpt"].make(), [NETS["gpt"].data(8) for _ in range(8)]
    layers = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)]

    def one_pass() -> None:
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()

    def fit() -> object:
        return lw.accumulate(model, F.cross_entropy, batches, lw.EKFAC(), parameters=layers)

    for what, ratio in _in_plain_steps({"plain": one_pass, "EKFAC": fit}, min(repeats, 5)).items():
        yield "gpt, 64 sequences", what, ratio


def gpt2(repeats: int) -> Iterator[Row]:
    """GPT-2 with 124 M parameters, two sequences of 128 tokens."""
    torch.manual_seed(0)
    model = GPT2()
    x, y = torch.randint(50257, (2, 128)), torch.randint(50257, (2, 128))

    def loss() -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    plain, runs = plain_step(model, loss), dict[str, Callable[[], object]]()
    plain()
    for what in ("norms", "second moment"):
        runs[what] = observed_step(model, loss, QUANTITIES[what], "autograd")
    start = time.process_time()
    plain()
    between = time.process_time()
    runs["norms"]()
    yield "gpt2", "norms, first", (time.process_time() - between) / (between - start)
    for what, ratio in _in_plain_steps({"plain": plain, **runs}, min(repeats, 3)).items():
        yield "gpt2", what, ratio


ROWS: dict[str, Callable[[int], Iterator[Row]]] = {
    **{name: lambda repeats, name=name: net(name, repeats) for name in ("gpt", "t5-like", "resnet18")},  # type: ignore[misc]
    "parameters": parameters,
    "sketch": sketch,
    "ekfac": ekfac,
    "gpt2": gpt2,
}


def main(argv: list[str] | None = None) -> None:
    """Print a table, a row as soon as it is measured."""
    options = probe.parser("benchmarks.speed.larger", __doc__ or "", rows=list(ROWS), repeats=15)
    asked = probe.parsed(options, argv)
    print(probe.table(["net", "quantity", "plain steps"], []), flush=True)
    for name in asked.rows:
        for found, what, ratio in ROWS[name](asked.repeats):
            print(f"| {found} | {what} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
