"""What the benchmarks share: times side by side, peak memory, conditions, options, result files, tables, pictures."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "RESULTS", "Peak", "conditions", "figure", "interleaved", "lower_quartile", "parsed", "parser", "read", "save",
    "table", "write",
]  # fmt: skip

RESULTS = Path(__file__).with_name("results")

# -- time and memory ----------------------------------------------------------------------------------------------


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Lower quartile of each run's seconds of CPU time; every repeat takes all of them, in alternating order.

    These machines are shared and noisy. What a run returns is let go after the clock has stopped.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.process_time()
            kept = runs[name]()
            seconds[name].append(time.process_time() - start)
            del kept
    return {name: lower_quartile(times) for name, times in seconds.items()}


def lower_quartile(values: Sequence[float]) -> float:
    """The value below which a quarter lies: what a shared machine lengthens least, without being the luckiest."""
    return sorted(values)[len(values) // 4]


class Peak:
    """Resident memory above that at the time of construction: `mb()` is its peak since, NaN without Linux's /proc."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
            self._start = _kilobytes("VmRSS")
        except OSError:
            self._start = float("nan")

    def mb(self) -> float:
        """Megabytes (10⁶ bytes)."""
        return (_kilobytes("VmHWM") - self._start) * 1024 / 1e6 if self._start == self._start else float("nan")


def _kilobytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(name + ":")).split()[1])


def conditions(**options: Any) -> dict[str, Any]:
    """What figures are measured under; to be asked before the start, since measuring is a load itself."""
    return {
        "torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count() or 1,
        "load": os.getloadavg()[0], **options,
    }  # fmt: skip


# -- options and files --------------------------------------------------------------------------------------------


def parser(command: str, doc: str, **options: Any) -> argparse.ArgumentParser:
    """The parser of `python -m <command>`, with an option for each keyword, by its default.

    A list takes several values, None or a path a file; all else takes one value of its own type.
    """
    made = argparse.ArgumentParser(
        f"python -m {command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in options.items():
        several = isinstance(default, list)
        kind = Path if default is None or isinstance(default, Path) else type(default[0] if several else default)
        made.add_argument(
            f"--{name.replace('_', '-')}", type=kind, nargs="+" if several else None, default=default,
            help=f"default: {default}",
        )  # fmt: skip
    return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; torch has as many threads as they say, or one."""
    found = made.parse_args(argv)
    torch.set_num_threads(getattr(found, "threads", 1))
    return found


def write(path: Path, result: Any, **form: Any) -> None:
    """Keep a result as JSON; the file is whole or as it was before. form: of `json.dumps`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    text = json.dumps(result, **{"indent": 1, "ensure_ascii": False, **form})
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)


def read(path: Path) -> Any:
    """A kept result."""
    return json.loads(path.read_text(encoding="utf-8"))


# -- tables and pictures ------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: bool = True) -> str:
    """Markdown; numbers: all columns but the first are aligned to the right."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1), *lines[1:]])


def figure(width: float, height: float, dpi: int = 110, layout: str | None = "constrained") -> Any:
    """A picture to draw on, in inches, of no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout=layout)  # type: ignore[arg-type, unused-ignore]


def save(drawn: Any, path: Path, smooth: bool = False) -> None:
    """Write a picture as PNG of 256 colours, a quarter as large, for the repository holds it.

    smooth: for one whose colours run into each other, choose them better, in seconds.
    """
    from PIL import Image

    held = io.BytesIO()
    drawn.savefig(held, format="png")
    whole = Image.open(held).convert("RGB")
    few = whole.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=int(smooth), dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    few.save(path, "PNG", optimize=True)
