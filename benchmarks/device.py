"""Everything that a device has to show, in one command: correctness, costs, memory, compiled models, graphs.

    python -m benchmarks.device                    # torch's accelerator; without one, a pretend device
    python -m benchmarks.device --device cpu --seconds 60 --into runs/cpu

At most 8 minutes. Every finding is written as soon as it is there (`device.json`, `device.md`, `device.png`), so a run
that is cut gives what it had, and the same command goes on where it stopped. A finding is a number, or the error that
the device raised: nothing is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from benchmarks.speed.overhead.nets import NETS, Net

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0
BATCHES = (128, 256, 512, 1024)
QUANTITIES: dict[str, Callable[[], lw.Quantity]] = {
    "SquaredNorm": lw.SquaredNorm,
    "Variance": lw.Variance,
    "PerSampleGrad": lw.PerSampleGrad,
    "DiagGGN sampled": lambda: lw.DiagGGN(1),
    "KFAC": lambda: lw.KFAC(1),
}
STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD (torch)": lambda model: torch.optim.SGD(model.parameters(), 1e-3, 0.9),
    "SGD (torch, fused)": lambda model: torch.optim.SGD(model.parameters(), 1e-3, 0.9, fused=True),
    "AdamW (torch, fused)": lambda model: torch.optim.AdamW(model.parameters(), 1e-3, fused=True),
    "KFAC": lambda model: lw.optim.KFAC(model, lr=1e-3),
    "DiagNewton": lambda model: lw.optim.DiagNewton(model, lr=1e-3),
    "LocoProp": lw.LocoProp,
    "AltMin": lw.AltMin,
}

Task = tuple[str, Callable[[], Any]]


class GPT2(nn.Module):
    """GPT-2 with 124 M parameters: 12 pre-norm blocks of width 768, tied to the embedding of 50,257 tokens."""

    def __init__(self, width: int = 768, blocks: int = 12, heads: int = 12, tokens: int = 50257) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Parameter(0.02 * torch.randn(1024, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, T, tokens]` of tokens `[N, T]`."""
        t = x.shape[1]
        mask = torch.full((t, t), float("-inf"), device=x.device).triu(1)
        return F.linear(self.blocks(self.tokens(x) + self.places[:t], mask, is_causal=True), self.tokens.weight)


# -- the device ---------------------------------------------------------------------------------------------


def device_of(asked: str | None) -> torch.device:
    """The device asked for; else torch's accelerator, else a pretend one, registered for this process."""
    sys.path[:0] = [str(ROOT / "tests")]
    if asked not in (None, "pretend"):
        return torch.device(asked)
    found = torch.accelerator.current_accelerator(check_available=True)
    if asked is None and found is not None:
        return torch.device(found.type, 0)
    from pretend_device import DEVICE

    torch.__future__.set_swap_module_params_on_conversion(True)
    return DEVICE


def described(device: torch.device) -> str:
    """The device in words."""
    module = torch.get_device_module(device)
    named = getattr(module, "get_device_name", None)
    name = named(device) if named is not None and device.type != "cpu" else device.type
    return f"{name}, torch {torch.__version__}, layerwise {lw.__version__}"


def _is_real(device: torch.device) -> bool:
    return device.type not in ("cpu", "pretend")


def seconds(run: Callable[[], Any], device: torch.device, least: int = 3, most: float = 1.0) -> float:
    """The median time of a call, after one that is not timed; the device is waited for."""
    module = torch.get_device_module(device)
    run()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or (len(times) < 50 and time.perf_counter() - begun < most):
        module.synchronize()
        start = time.perf_counter()
        run()
        module.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes allocated during a call, where the device counts them."""
    module = torch.get_device_module(device)
    if not hasattr(module, "reset_peak_memory_stats"):
        return None
    module.reset_peak_memory_stats()
    run()
    return int(module.max_memory_allocated())


# -- what is asked ------------------------------------------------------------------------------------------


def tasks(device: torch.device) -> Iterator[Task]:
    """All findings by name, the most telling first."""
    yield from _correctness(device)
    batches = BATCHES if _is_real(device) else (8,)
    nets = NETS if _is_real(device) else {"mlp": NETS["mlp"]}
    for name, net in nets.items():
        for batch in batches:
            yield f"cost/{name}/{batch}", partial(_costs, device, net, batch)
    for name in nets:
        yield f"steps/{name}", partial(_steps, device, NETS[name], batches[0])
    if device.type != "pretend":
        yield "compiled", lambda: _compiled(device)
    yield "gpt2", lambda: _gpt2(device)
    yield "graph", lambda: _graph(device)


def _correctness(device: torch.device) -> Iterator[Task]:
    from device_compare import APART, compare
    from zoo import cases

    torch.backends.cudnn.allow_tf32 = False
    kinds = [(torch.float32, 1e-4)] if device.type == "mps" else [(torch.float64, 1e-10), (torch.float32, 1e-4)]
    chosen = cases(first_loss_only=True)
    if not _is_real(device):  # the tests cover the others
        kinds, chosen = kinds[:1], [one for one in chosen if one.problem.name in ("mlp_tanh", "residual")]
    for dtype, rel in kinds:
        for one in chosen:
            if one.problem.name not in APART:
                name = f"correct/{str(dtype).removeprefix('torch.')}/{one.id}"
                yield name, partial(_same, compare, one, device, dtype, rel)


def _same(compare: Any, one: Any, device: torch.device, dtype: torch.dtype, rel: float) -> Any:
    found = compare(one, device, dtype, rel, drawn=not _is_real(device))
    return {"same": len(found.same), "refused": len(found.refused), "differ": found.differ}


def _ratio(run: Callable[[], Any], device: torch.device, other: float) -> float:
    return seconds(run, device) / other


def _moved(net: Net, batch: int, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    problem = net.problem(False, batch)
    model, x, y = problem.model.to(device), problem.x.to(device), problem.y.to(device)
    return model, lambda: F.cross_entropy(model(x), y)


def _gradient(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        loss().backward()

    return run


def _observed(model: nn.Module, loss: Callable[[], Tensor], make: Callable[[], lw.Quantity]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        with lw.observe(model, make()):
            loss().backward()

    return run


def _costs(device: torch.device, net: Net, batch: int) -> Any:
    """Of each quantity: the time and the memory, as multiples of the gradient's."""
    model, loss = _moved(net, batch, device)
    plain = _gradient(model, loss)
    found: dict[str, Any] = {"gradient, s": seconds(plain, device), "gradient, bytes": peak(plain, device)}
    for name, make in QUANTITIES.items():
        run = _observed(model, loss, make)
        found[name] = attempt(partial(_ratio, run, device, found["gradient, s"]))
        found[f"{name}, bytes"] = attempt(partial(peak, run, device))
    return found


def _steps(device: torch.device, net: Net, batch: int) -> Any:
    """The seconds of a step of each optimizer, in its steady state."""
    found = {}
    for name, make in STEPS.items():
        model, loss = _moved(net, batch, device)
        found[name] = attempt(partial(_step, make, model, loss, device))
    return found


def _step(
    make: Callable[[nn.Module], Any], model: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> float:
    optimizer = make(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        return total

    return seconds(lambda: optimizer.step(closure), device)


def _compiled(device: torch.device) -> Any:
    """Whether a compiled model is observed with the values of the model itself, and its time beside it."""
    model, loss = _moved(NETS["mlp"], 128, device)
    with lw.observe(model, lw.SquaredNorm()) as want:
        loss().backward()
    model.compile()
    with lw.observe(model, lw.SquaredNorm()) as got:
        loss().backward()
    worst = max(float(((got.squared_norm[n] - x) / x.abs().max()).abs().max()) for n, x in want.squared_norm.items())
    return {"relative difference": worst, "s": seconds(_observed(model, loss, lw.SquaredNorm), device)}


def _graph(device: torch.device) -> Any:
    """Whether a step of K-FAC between its periods, whose verdict stays on the device, can be captured and replayed."""
    module = torch.get_device_module(device)
    if not hasattr(module, "graph"):
        return "the device has no graphs"
    model, loss = _moved(NETS["mlp"], 128, device)
    optimizer = lw.optim.KFAC(model, lr=1e-3, on_nonfinite="defer")
    for _ in range(3):
        optimizer.step(loss)
    captured = module.CUDAGraph()
    with module.graph(captured):
        optimizer.step(loss)
    captured.replay()
    module.synchronize()
    return "captured and replayed"


def _gpt2(device: torch.device) -> Any:
    small = not _is_real(device)
    torch.manual_seed(0)
    model = (GPT2(32, 2, 2, 64) if small else GPT2()).to(device)
    x = torch.randint(64, (2, 8) if small else (8, 1024), device=device)

    def loss() -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), x.flatten())

    plain = _gradient(model, loss)
    run = _observed(model, loss, lw.SquaredNorm)
    found = {"parameters": sum(p.numel() for p in model.parameters()), "gradient, s": seconds(plain, device)}
    return {
        **found, "SquaredNorm": attempt(partial(_ratio, run, device, found["gradient, s"])),
        "gradient, bytes": peak(plain, device), "SquaredNorm, bytes": attempt(partial(peak, run, device)),
    }  # fmt: skip


# -- what is written ----------------------------------------------------------------------------------------


def attempt(run: Callable[[], Any]) -> Any:
    """What a call gives, or the error that it raises, in words."""
    try:
        return run()
    except Exception as error:  # whatever a device raises is the finding
        return f"{type(error).__name__}: {error}"[:500]


def table(found: dict[str, Any]) -> str:
    """The findings as a page."""
    results = found["findings"]
    right = {name: cell for name, cell in results.items() if name.startswith("correct/")}
    same = sum(cell["same"] for cell in right.values() if isinstance(cell, dict))
    wrong = {name: cell if isinstance(cell, str) else cell["differ"] for name, cell in right.items()}
    lines = [f"# {found['device']}", "", found["state"], ""]
    lines += [f"Correctness: {len(right)} models, {same} quantities as on the CPU; that differ or stop:", ""]
    lines += [f"- {name}: {cell}" for name, cell in wrong.items() if cell] or ["- none"]
    lines += [
        "",
        "cost/net/batch and gpt2: multiples of the gradient's time; steps/net: median seconds of a step; bytes: peak",
    ]
    lines += ["memory, where the device counts it.", "", "| what | finding |", "|---|---|"]
    for name, cell in results.items():
        if name not in right:
            items = cell.items() if isinstance(cell, dict) else [("", cell)]
            lines += [f"| {name} {key} | {_short(value)} |" for key, value in items if value is not None]
    return "\n".join(lines) + "\n"


def _write_page(found: dict[str, Any], path: Path) -> None:
    path.with_suffix(".md").write_text(table(found), encoding="utf-8")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ")[:200]


def chart(found: dict[str, Any], path: Path) -> None:
    """The cost of each quantity in each net, and in GPT-2, as multiples of the gradient's time."""
    costs = {name: cell for name, cell in found["findings"].items() if name.startswith("cost/") or name == "gpt2"}
    cells = {name: cell for name, cell in costs.items() if isinstance(cell, dict)}
    if not cells:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{name.removeprefix('cost/')} {q}", c[q])
        for name, c in cells.items() for q in QUANTITIES if isinstance(c.get(q), float)
    ]  # fmt: skip
    figure, axes = plt.subplots(figsize=(9, 0.25 * len(bars) + 1), layout="constrained")
    drawn = axes.barh([name for name, _ in bars], [value for _, value in bars])
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linestyle="--")
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.set(xlabel="time, as a multiple of the gradient's", title=found["device"])
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask everything that is not yet answered, until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description="What a device has to show.")
    parser.add_argument("--device", help="such as cuda:0, mps, xpu, cpu, pretend; default: torch's accelerator")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing new is begun")
    parser.add_argument("--into", type=Path, default=ROOT / "runs" / "device", help="the folder of what is written")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    device = device_of(options.device)
    options.into.mkdir(parents=True, exist_ok=True)
    path = options.into / "device.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("device") != described(device):
        found = {"device": described(device), "state": "Nothing asked yet.", "findings": {}}
    left = [(name, run) for name, run in tasks(device) if name not in found["findings"]]
    while left:  # a run answers at least one
        name, run = left.pop(0)
        found["findings"][name] = attempt(run)
        found["state"] = f"Not asked yet: {len(left)} of {len(left) + len(found['findings'])}." if left else "Complete."
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        _write_page(found, path)
        if time.monotonic() > end:
            break
    _write_page(found, path)  # also of findings that were complete before
    chart(found, path.with_suffix(".png"))
    print(table(found))
    return int("differ or stop:\n\n- none" not in table(found))


if __name__ == "__main__":
    sys.exit(main())
