"""What a step costs on 1 to 1,024 ranks: `python -m benchmarks.distributed scaling`.

    python -m benchmarks.distributed scaling [--repeats 7] [--batch 1000] [--json FILE] [--only-report]

A model of three ways to share a step, fitted to messages and to one process, and compared with runs of 2 and 4
processes. Messages: `α + n/β` for n bytes between two processes (gloo on one machine, one thread each), from broadcasts
of 4 KB to 16 MB between 2 ranks by least squares of the relative error; a broadcast to P ranks takes ⌈log₂ P⌉ of
them, a sum over ranks twice (P − 1)/P of the bytes and 2 (P − 1) waits (Thakur, Rabenseifner and Gropp, 2005).
Computation: seconds of one process on MNIST's deep autoencoder, batch 1000; parts of a step are shared out by their
operations. Where there are more processes than cores, each computes that much slower.

    layers (LocoProp, parallel=): run + most solves of a rank + a broadcast from each owner
    data (KFAC, DataParallel("updates")): run/P + most products of a rank + sum of gradients + broadcasts of updates
    stages (Pipeline): run and codes, one stage after another + most weight steps of a stage + 2 (P − 1) messages
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import probe
from benchmarks.autoencoder import SIZES, reconstruction_loss
from benchmarks.distributed import kfac, layers
from benchmarks.distributed._cost_model import (  # fmt: skip
    CLUSTER,
    OPERATIONS,
    RANKS,
    WAYS,
    WIDE,
    Layers,
    Rates,
    fitted,
    operations,
    predicted,
    worth,
)
from benchmarks.distributed._processes import together
from benchmarks.probe import conditions, lower_quartile

__all__ = ["main"]

RESULT = probe.RESULTS / "distributed_scaling.json"
IN_A_ROW = 8  # broadcasts that are timed together
SIZES_SENT = [4**k for k in range(6, 13)]  # bytes: 4 KB to 16 MB


# -- measuring ------------------------------------------------------------------------------------------------


def messages(rank: int, size: int, repeats: int) -> dict[int, float]:
    """Seconds of a broadcast by its bytes."""
    found: dict[int, list[float]] = {n: [] for n in SIZES_SENT}
    for _ in range(repeats):
        for n, times in found.items():
            t = torch.ones(n // 4)
            dist.barrier()
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                dist.broadcast(t, 0)
            times.append((time.perf_counter() - start) / IN_A_ROW)
    return {n: lower_quartile(times) for n, times in found.items()}


def one_process(rank: int, size: int, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of each part of a step on one process."""
    local, codes = layers.Timed("LocoProp", False, batch), layers.Timed("AltMin, sweep", False, batch)
    second = kfac.arm_of(kfac.ALONE, 0, 1, batch)
    model, x = local.model, local.x
    plain: dict[str, list[float]] = {kind: [] for kind in ("gradient", *kfac.PERIODS)}
    for _ in range(repeats + 1):
        local.step()
        codes.step()
        for kind in kfac.PERIODS:
            start = time.perf_counter()
            second(kind)
            plain[kind].append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.autograd.grad(reconstruction_loss(model, x), list(model.parameters()))
        plain["gradient"].append(time.perf_counter() - start)
    found = {kind: lower_quartile(times[1:]) for kind, times in plain.items()}  # the first of each warms up
    m, a = layers.quartiles(local.seconds), layers.quartiles(codes.seconds)
    return {
        "run": found["gradient"],
        "solve": m["solve"],
        "rest": m["step"] - m["solve"],
        "weights": a["solve"],
        "codes": a["step"] - a["solve"],
        "products": found["plain"] - found["gradient"],
        "factors": found["factors"] - found["plain"],
        "inverses": found["factors and inverses"] - found["factors"],
    }


def checks(rank: int, size: int, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of a step of each way on these ranks; of the data-parallel one, between due factors."""
    local = layers.Timed("LocoProp", True, batch)
    second = kfac.arm_of("updates", rank, size, batch)
    plain = []
    for _ in range(repeats + 1):
        dist.barrier()
        local.step()
        dist.barrier()
        start = time.perf_counter()
        second("plain")
        plain.append(time.perf_counter() - start)
    staged = layers.staged(rank, size, batch, repeats)
    return {
        "layers": layers.quartiles(local.seconds)["step"],
        "data": lower_quartile(plain[1:]),
        "stages": staged["step"],
    }


def rates_of(seconds: Mapping[str, float], net: Layers, batch: int) -> dict[str, float]:
    """Seconds an operation."""
    return {part: seconds[part] / sum(operations(part, net, batch)) for part in OPERATIONS}


def measured(repeats: int, batch: int) -> dict[str, Any]:
    """Messages, one process, and steps of 2 and 4 processes beside what the model says of them."""
    under, net = conditions(repeats=repeats, batch=batch), list(pairwise(SIZES))
    sent = together(2, messages, repeats)[1]  # by the rank that receives
    seconds = together(1, one_process, batch, repeats)[0]
    network, rates = fitted(sent), rates_of(seconds, net, batch)
    rows = []
    for size in (1, 2, 4):
        each = together(size, checks, batch, repeats)
        for way in WAYS:
            rates_here = rates if way != "data" else {**rates, "factors": 0.0, "inverses": 0.0}
            said = predicted(way, size, net, batch, rates_here, network, max(1.0, size / under["cores"]))
            rows.append({"way": way, "ranks": size, "measured": max(one[way] for one in each), "predicted": said})
    return {
        **under, "messages": {str(n): s for n, s in sent.items()}, "network": network,
        "one process": seconds, "rates": rates, "checks": rows,
    }  # fmt: skip


# -- telling --------------------------------------------------------------------------------------------------


def settings(result: Mapping[str, Any]) -> dict[str, tuple[Layers, int, Rates]]:
    """What is drawn: a net, its batch and a network."""
    net = list(pairwise(SIZES))
    return {
        "autoencoder, batch 1000, this machine's messages": (net, result["batch"], result["network"]),
        "64 layers of 4096, batch 4096, 10 GB/s and 20 µs (assumed)": (*WIDE, CLUSTER),
    }


def curves(result: Mapping[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """Seconds of a step by setting, way and ranks, with a core for each rank."""
    return {
        title: {way: {p: predicted(way, p, net, n, result["rates"], network) for p in RANKS} for way in WAYS}
        for title, (net, n, network) in settings(result).items()
    }


def report(result: Mapping[str, Any]) -> str:
    """Markdown: the fit, its check, and where more ranks stop paying."""
    network = result["network"]
    lines = [
        f"Messages: {1e6 * network['wait']:.0f} µs and {network['bytes a second'] / 1e9:.2f} GB/s. Computation of one "
        f"process, ms: " + ", ".join(f"{part} {1e3 * s:.0f}" for part, s in result["one process"].items()) + ".",
        "",
        "| step on this machine, ms | ranks | measured | model |",
        "|---|---:|---:|---:|",
    ]
    for row in result["checks"]:
        lines.append(f"| {row['way']} | {row['ranks']} | {1e3 * row['measured']:.0f} | {1e3 * row['predicted']:.0f} |")
    lines += [
        "",
        "| model, a core for each rank | way | 1 rank, s | shortest step | worth it up to |",
        "|---|---|---:|---:|---:|",
    ]
    for title, ways in curves(result).items():
        for way, times in ways.items():
            best = min(times, key=lambda p: times[p])
            lines.append(
                f"| {title} | {way} | {times[1]:.3g} | {times[1] / times[best]:.3g} times faster, on {best} "
                f"| {worth(times)} |"
            )
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Time of a step over that of one rank, by ranks."""
    found, figure = curves(result), probe.figure(10, 4)
    axes = figure.subplots(1, len(found), sharey=True)
    for axis, (title, ways) in zip(axes, found.items(), strict=True):
        axis.plot(RANKS, [1 / p for p in RANKS], color="0.7", linestyle=":", label="ideal")
        for way, times in ways.items():
            axis.plot(RANKS, [times[p] / times[1] for p in RANKS], marker="o", markersize=3, label=way)
            axis.axvline(worth(times), color=axis.lines[-1].get_color(), alpha=0.3, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=title)
        axis.set_xticks(RANKS[::2], [str(p) for p in RANKS[::2]])
        axis.title.set_size(9)
    axes[0].set_ylabel("step / step of one rank")
    axes[0].legend()
    probe.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = probe.parser("benchmarks.distributed scaling", __doc__, repeats=7, batch=1000, json=RESULT)
    parser.add_argument("--only-report", action="store_true", help="from the file, without measuring")
    options = probe.parsed(parser, argv)
    if not options.only_report:
        probe.write(options.json, measured(options.repeats, options.batch))
    result = probe.read(options.json)
    draw(result, options.json.with_suffix(".png"))
    print(report(result))


if __name__ == "__main__":
    main()
