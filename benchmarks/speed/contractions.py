"""Times every contraction on the shapes that matter and prints a table: the form chosen, and the others.

    python -m benchmarks.speed.contractions [--repeats 9] [--only conv]

One thread, CPU time in milliseconds, lower quartile of interleaved repeats. `chosen` is what the cost
rule takes; the columns after it force one form. `einsum` builds all of D in fresh memory: the naive way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks import probe
from layerwise.rows import contract
from layerwise.rows.base import Rows

SHAPES = {  # name: V, N, T, K, O, I, kind
    "mlp fc1": (1, 128, 1, 1, 1000, 784, "float"),
    "mlp fc2": (1, 128, 1, 1, 500, 1000, "float"),
    "mlp fc2 9 cotangents": (9, 128, 1, 1, 500, 1000, "float"),
    "mlp fc3": (1, 128, 1, 1, 250, 500, "float"),
    "mlp fc4": (1, 128, 1, 1, 10, 250, "float"),
    "3c3d conv1": (1, 128, 900, 1, 64, 75, "float"),
    "3c3d conv2": (1, 128, 169, 1, 96, 576, "float"),
    "3c3d conv3": (1, 128, 64, 1, 128, 864, "float"),
    "3c3d conv3 9 cotangents": (9, 32, 64, 1, 128, 864, "float"),
    "conv 99 cotangents": (99, 4, 36, 1, 96, 864, "float"),
    "grouped conv": (1, 32, 196, 8, 16, 144, "float"),
    "depthwise conv": (1, 128, 196, 64, 1, 9, "float"),
    "norm": (1, 128, 196, 64, 1, 1, "float"),
    "norm 9 cotangents": (9, 32, 196, 64, 1, 1, "float"),
    "scale without positions": (1, 128, 1, 1000, 1, 1, "float"),
    "transformer": (1, 32, 32, 1, 256, 64, "float"),
    "bias of a conv": (1, 128, 900, 1, 64, 1, "none"),
    "embedding": (1, 32, 128, 1, 128, 1000, "index"),
    "embedding, large": (1, 32, 128, 1, 128, 10000, "index"),
}
FUNCTIONS = [
    "per_sample",
    "total",
    "squared_norm",
    "second_moment",
    "pairwise_dot",
    "input_gram",
    "output_gram",
]
D_BYTES = 2**30  # the naive way is left out above this


def rows_of(v: int, n: int, t: int, k: int, o: int, i: int, kind: str, layout: str) -> Rows:
    """Random rows in a layer's own memory layout: positions innermost for convolutions and norms."""
    gen = torch.Generator().manual_seed(0)
    g = torch.randn(v, n, k, o, t, generator=gen).movedim(-1, 2)
    if kind == "none":
        return Rows(None, g, 1)
    if kind == "index":
        return Rows(torch.randint(i, (n, t), generator=gen), g, i)
    if layout == "nit":
        return Rows(torch.randn(n, k, i, t, generator=gen).movedim(-1, 1), g, i)
    return Rows(torch.randn(k, i, n, t, generator=gen).permute(2, 3, 0, 1), g, i)


def einsum(function: str, rows: Rows) -> Callable[[], Tensor] | None:
    """The naive form, or None where it does not exist or is too large."""
    v, n, t, k, o = rows.g.shape
    if rows.a is None or not rows.a.is_floating_point() or v * n * k * o * rows.size_in * 4 > D_BYTES:
        return None

    def d() -> Tensor:
        return torch.einsum("vntko,ntki->vnkoi", rows.g, rows.a)

    return {
        "per_sample": d,
        "total": lambda: torch.einsum("vntko,ntki->vkoi", rows.g, rows.a),
        "squared_norm": lambda: d().square().sum((2, 3, 4)),
        "second_moment": lambda: d().square().sum((0, 1)),
        "pairwise_dot": lambda: torch.einsum("vnkoi,vmkoi->vnm", *[d()] * 2),
        "input_gram": lambda: torch.einsum("ntki,ntkj->kij", rows.a, rows.a),
        "output_gram": lambda: torch.einsum("vntko,vntkp->kop", rows.g, rows.g),
    }[function]


@contextmanager
def forced(**rules: bool) -> Iterator[None]:
    """Replace cost rules of `contract` by fixed answers."""
    saved = {name: getattr(contract, name) for name in rules}
    for name, answer in rules.items():
        setattr(contract, name, lambda *_, answer=answer: answer)
    try:
        yield
    finally:
        for name, rule in saved.items():
            setattr(contract, name, rule)


def forms(function: str, rows: Rows) -> dict[str, Callable[[], object]]:
    """Every form of one function on these rows, by name."""
    argument = rows.g if function == "output_gram" else rows
    call = getattr(contract, function)

    def under(**rules: bool) -> Callable[[], object]:
        def run() -> object:
            with forced(**rules):
                return call(argument)

        return run

    result: dict[str, Callable[[], object]] = {"chosen": lambda: call(argument)}
    many = rows.a is not None and rows.a.is_floating_point() and rows.g.shape[2] > 1
    if many and rows.g.shape[-1] * rows.size_in > 1:
        if function == "squared_norm":
            result |= {"ghost": under(ghost_is_cheaper=True), "direct": under(ghost_is_cheaper=False)}
        if function == "second_moment":
            result["direct"] = under(pairs_are_cheaper=False)
            v, n, t, *_ = rows.g.shape
            if t * (t + 1) // 2 < 20 * v * t:
                result["pairs"] = under(pairs_are_cheaper=True)
    if function == "per_sample":
        v, n, _, k, o = rows.g.shape
        if v * n * k * o * rows.size_in * 4 <= D_BYTES:
            out = rows.g.new_empty(v, n, k, o, rows.size_in)
            result["into out"] = lambda: contract.per_sample(rows, out=out)
    naive = einsum(function, rows)
    if naive is not None:
        result["einsum"] = naive
    return result


def main() -> None:
    """Print the table."""
    parser = probe.parser("benchmarks.speed.contractions", __doc__, repeats=9)
    parser.add_argument("--only", default="", help="shapes whose name holds this text")
    parser.add_argument("--function", default="", help="functions whose name holds this text")
    parser.add_argument("--layout", choices=["nit", "int"], default="nit", help="memory order of the input")
    options = probe.parsed(parser)
    columns = ["chosen", "into out", "ghost", "direct", "pairs", "einsum"]
    print(f"{'shape':26} {'function':14}" + "".join(f"{name:>10}" for name in columns))
    for name, shape in SHAPES.items():
        if options.only not in name:
            continue
        rows = rows_of(*shape, options.layout)
        for function in FUNCTIONS:
            d_bytes = 4 * shape[0] * shape[1] * shape[3] * shape[4] * shape[5]
            if options.function not in function or (function == "per_sample" and d_bytes > D_BYTES):
                continue
            seen = probe.interleaved(forms(function, rows), options.repeats)
            cells = "".join(f"{1e3 * seen[c]:10.3f}" if c in seen else f"{'-':>10}" for c in columns)
            print(f"{name:26} {function:14}{cells}", flush=True)


if __name__ == "__main__":
    main()
