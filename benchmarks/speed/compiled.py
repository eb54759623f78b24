"""What `observe(compile=True)` saves and costs: kernels beside operations, and CPU time of an observed pass.

    python -m benchmarks.speed.compiled [--threads 1] [--repeats 60] [--only small]

For each net and quantity: the graphs that were compiled (one for each parameter), and how long that took; the
operations of these graphs that are neither views nor copies on write, which is what runs uncompiled, one after another
(each a launch on an accelerator); the calls that inductor's code for the CPU makes in their place, of its own kernels
and of torch's products; and the CPU time of forward and backward pass, plain and observed both ways, interleaved in one
process, lower quartile. Inductor writes other kernels for other devices: the counts are of the CPU's. The first
compilation of a machine is longer by half a minute to a minute; a machine that compiled the same graphs before finds
them on its disk.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import layerwise as lw
from benchmarks import probe
from layerwise.gradient.compiled import inductor

_CALL = re.compile(r"^ {4,}(?:\w+ = )?(?:cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.MULTILINE)

QUANTITIES: dict[str, Callable[[], list[lw.Quantity]]] = {
    "SquaredNorm": lambda: [lw.SquaredNorm()],
    "SquaredNorm, Variance": lambda: [lw.SquaredNorm(), lw.Variance()],
    "DiagGGN": lambda: [lw.DiagGGN()],
}


class Counting:
    """Inductor, with the operations of its graphs, the calls of its code and the seconds that it took."""

    def __init__(self) -> None:
        self.graphs = self.operations = self.calls = 0
        self.seconds = 0.0

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        from torch._inductor.utils import run_and_get_code

        start = time.perf_counter()
        found, codes = run_and_get_code(inductor, graph, inputs)
        self.seconds += time.perf_counter() - start
        self.graphs += 1
        self.operations += operations(graph)
        self.calls += sum(len(_CALL.findall(code.partition("def call(")[2])) for code in codes)
        return found


def operations(graph: GraphModule) -> int:
    """The operations of a graph that run one after another uncompiled, without views and copies on write."""
    schemas = [getattr(node.target, "_schema", None) for node in graph.graph.nodes if "_lazy_clone" not in node.name]
    views = [any(r.alias_info and not r.alias_info.is_write for r in schema.returns) for schema in schemas if schema]
    return views.count(False)


def _small() -> tuple[nn.Module, Tensor, int]:
    layers = nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(*layers), torch.randn(64, 100), 10


def _wide() -> tuple[nn.Module, Tensor, int]:
    layers = nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 250), nn.ReLU(), nn.Linear(250, 10)
    return nn.Sequential(*layers), torch.randn(128, 784), 10


def _transformer() -> tuple[nn.Module, Tensor, int]:
    block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(16 * 64, 10)), torch.randn(16, 16, 64), 10


NETS = {"small": _small, "wide": _wide, "transformer": _transformer}


def rows(repeats: int, only: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """A row of the table for each net and quantity."""
    for name in only:
        for what, make in QUANTITIES.items():
            torch.manual_seed(0)
            model, x, classes = NETS[name]()
            y = torch.randint(classes, x.shape[:1])
            counting = Counting()

            def run(compile: Any = None, model: Any = model, x: Any = x, y: Any = y, make: Any = make) -> None:
                model.zero_grad()
                if compile is None:
                    F.cross_entropy(model(x), y).backward()
                    return
                with lw.observe(model, *make(), compile=compile):
                    F.cross_entropy(model(x), y).backward()

            run(counting)
            runs: dict[str, Callable[[], object]] = {
                "gradient": run,
                "plain": partial(run, False),
                "compiled": partial(run, counting),
            }
            seconds = probe.interleaved(runs, repeats, warm_up=3)
            ms = [f"{1e3 * seconds[key]:.2f}" for key in runs]
            ratio = f"{seconds['compiled'] / seconds['plain']:.2f}"
            counts = counting.graphs, counting.operations, counting.calls, f"{counting.seconds:.0f}"
            yield name, what, *counts, *ms, ratio


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = probe.parser("benchmarks.speed.compiled", __doc__ or "", repeats=60)
    parser.add_argument("--only", nargs="+", default=list(NETS), choices=list(NETS))
    options = probe.parsed(parser, argv)
    head = (
        "net",
        "quantities",
        "graphs",
        "operations",
        "calls",
        "compiling, s",
        "gradient, ms",
        "plain",
        "compiled",
        "ratio",
    )
    print(probe.table(head, rows(options.repeats, options.only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
