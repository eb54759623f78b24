"""The results as a Markdown table and as the bar chart of the BackPACK paper: one panel a net, one bar a library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks import probe

from . import bounds
from .contenders import CONTENDERS, OURS
from .nets import NETS
from .quantities import QUANTITIES

__all__ = ["chart", "table"]

Cells = Mapping[str, Mapping[str, Any]]
GOAL = 0.5  # of BackPACK's extra time and of its peak memory
NOISE = 1.1  # differences under 10 % mean nothing
DIFFER = 1e-3
COLOURS = {
    "ours": "#c23b22", "rows": "#e58f7d", "backpack": "#1f4e79", "vmap": "#7f7f7f", "opacus": "#6aa84f",
    "curvlinops": "#e69f00", "asdl": "#8e63a8",
}  # fmt: skip


def table(cells: Cells) -> str:
    """Markdown: time of every contender, peak memory, and what bounds ours where it is not the fastest."""
    present = _present(cells)
    head = ["net", "quantity", *(CONTENDERS[name].label for name in present), "extra / BackPACK's"]
    head += ["peak MB: ours / BackPACK / plain", "what bounds ours"]
    lines = []
    for net, quantity, cell in _ordered(cells):
        ratios = [_cell_text(cell["contenders"].get(name, {})) for name in present]
        lines.append([net, quantity, *ratios, _share(cell), _memory(cell), _bound(cell)])
    return "\n".join([probe.table(head, lines, numbers=False), "", *_notes(cells)]) + "\n"


def _present(cells: Cells) -> list[str]:
    """The contenders that ran at least once."""
    return [n for n in CONTENDERS if any("ratio" in cell["contenders"].get(n, {}) for cell in cells.values())]


def _ordered(cells: Cells) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for net in NETS:
        for quantity in QUANTITIES:
            cell = cells.get(f"{net}/{quantity}")
            if cell is not None:
                yield net, quantity, cell


def _cell_text(entry: Mapping[str, Any]) -> str:
    if "ratio" in entry:
        return f"{entry['ratio']:.2f}" + (" (part)" if "leaves out" in entry else "")
    return "missing" if "missing" in entry else "fails" if "fails" in entry else "-"


def best_peer(cell: Mapping[str, Any]) -> tuple[str, float] | None:
    """The fastest peer that gives the quantity of all parameters."""
    found = cell["contenders"]
    whole = {n: e["ratio"] for n, e in found.items() if n not in OURS and "ratio" in e and "leaves out" not in e}
    return min(whole.items(), key=lambda item: item[1]) if whole else None


def slower(cell: Mapping[str, Any]) -> bool:
    """Whether a peer is ahead of ours, by the faster of its ways to the gradient, by more than noise."""
    best, mine = best_peer(cell), [e["ratio"] for n in OURS if "ratio" in (e := cell["contenders"].get(n, {}))]
    return best is not None and bool(mine) and min(mine) > NOISE * best[1]


def share(cell: Mapping[str, Any]) -> float | None:
    """Our extra time over BackPACK's."""
    mine, theirs = (cell["contenders"].get(n, {}) for n in ("ours", "backpack"))
    if "ratio" not in mine or "ratio" not in theirs or "leaves out" in theirs or theirs["ratio"] <= 1:
        return None
    return float((mine["ratio"] - 1) / (theirs["ratio"] - 1))


def _share(cell: Mapping[str, Any]) -> str:
    value = share(cell)
    return "-" if value is None else f"{value:.2f}"


def _memory(cell: Mapping[str, Any]) -> str:
    found = cell.get("peak bytes", {})
    text = [f"{found[n] / 1e6:.0f}" if n in found else "-" for n in ("ours", "backpack", "plain")]
    return " / ".join(text) if found else "-"


def _bound(cell: Mapping[str, Any]) -> str:
    """What ours is made of, where it misses a goal."""
    if "ratio" not in cell["contenders"].get("ours", {}):
        return ""
    return bounds.text(cell) if slower(cell) or (share(cell) or 0) > GOAL else ""


def _notes(cells: Cells) -> Iterator[str]:
    kept = [(f"{net} {quantity}", cell) for net, quantity, cell in _ordered(cells)]
    judged = [(name, cell) for name, cell in kept if best_peer(cell) is not None]
    behind = [name for name, cell in judged if slower(cell)]
    yield f"- Slower than the best peer by more than 10 %: {len(behind)} of {len(judged)} cells ({_list(behind)})."
    yield (
        "  torch.func's gradient is the mean of its rows, so it does without the backward pass's own gradient of the "
        'weights, about a third of a plain gradient. So does grad="rows"; without it ours is the user\'s backward '
        "pass, to the bit."
    )
    halves = [value for _, cell in kept if (value := share(cell)) is not None]
    yield f"- At most half of BackPACK's extra time: {sum(v <= GOAL for v in halves)} of {len(halves)} cells."
    for name, cell in kept:
        if "parts" in cell:
            ratio = (cell["contenders"]["ours"]["ratio"] - 1) / sum(p - 1 for p in cell["parts"].values())
            yield f"- {name}: {ratio:.2f} of the sum of the parts' extra times."
    yield from _memory_notes(cells)
    wrong = [
        f"{name} {contender} {entry['values differ by']:.0e}"
        for name, cell in kept
        for contender, entry in cell["contenders"].items()
        if entry.get("values differ by", 0) > DIFFER
    ]
    yield f"- Values that differ by more than {DIFFER:.0e}: {_list(wrong)}."
    few = [f"{name} ({cell['repeats']})" for name, cell in kept if cell["repeats"] < 15]
    yield f"- Fewer than 15 repeats: {_list(few)}."
    stamps = Counter(cell["stamp"] for _, cell in kept if "stamp" in cell)
    for stamp, _ in stamps.most_common()[1:]:
        older = [name for name, cell in kept if cell.get("stamp") == stamp]
        yield f"- Measured with another state of the code ({stamp}) than the rest: {_list(older)}."
    for contender, known in CONTENDERS.items():
        for why in ("missing", "fails", "leaves out"):
            said: dict[str, list[str]] = {}
            for name, cell in kept:
                if why in (entry := cell["contenders"].get(contender, {})):
                    text = entry[why] if isinstance(entry[why], str) else f"{len(entry[why])} parameters"
                    said.setdefault(text, []).append(name)
            for text, where in said.items():
                yield f"- {known.label} {why}: {text}" + ("" if why == "missing" else f" ({_list(where)})")


def _memory_notes(cells: Cells) -> Iterator[str]:
    """The goal of half of BackPACK's peak, apart from cells where the plain gradient alone takes more."""
    heavy = {
        f"{net} {quantity}": found
        for net, quantity, cell in _ordered(cells)
        if QUANTITIES[quantity].reduced
        and {"ours", "backpack", "plain"} <= (found := cell.get("peak bytes", {})).keys()
    }
    over = {name: f["ours"] / f["backpack"] for name, f in heavy.items() if f["ours"] > GOAL * f["backpack"]}
    plain = [name for name in over if heavy[name]["plain"] > GOAL * heavy[name]["backpack"]]
    yield f"- Peak memory at most half of BackPACK's: {len(heavy) - len(over)} of {len(heavy)} reduced cells."
    yield f"  Above it because the plain gradient alone is: {_list(plain)}."
    yield f"  Above it besides: {_list(f'{name} {over[name]:.2f}' for name in over if name not in plain)}."


def _list(items: Iterable[str]) -> str:
    return ", ".join(items) or "none"


def chart(cells: Cells, path: Path) -> None:
    """Write the picture."""
    from matplotlib.patches import Patch

    nets = [net for net in NETS if any(key.startswith(f"{net}/") for key in cells) and net != "mlp-sigmoid"]
    figure = probe.figure(3.6 * len(nets), 7.5, dpi=150)
    axes = figure.subplots(1, len(nets), squeeze=False)
    for axis, net in zip(axes[0], nets, strict=True):
        rows = [(q, c) for n, q, c in _ordered(cells) if n == net and q != "empty observe"]
        place = 0.0
        ticks = []
        for quantity, cell in reversed(rows):
            shown = [(n, e) for n, e in cell["contenders"].items() if "ratio" in e]
            first = place
            for name, entry in reversed(shown):
                partial = "leaves out" in entry
                axis.barh(place, entry["ratio"], 0.9, left=0, color=COLOURS[name], alpha=0.4 if partial else 1)
                axis.text(entry["ratio"] * 1.06, place, f"{entry['ratio']:.2g}" if entry["ratio"] < 10 else
                          f"{entry['ratio']:.0f}", va="center", fontsize=6, color="#333333")  # fmt: skip
                place += 1
            ticks.append(((first + place - 1) / 2, quantity))
            place += 0.8
        axis.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=7)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(0.8, high * 1.6)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{fill(NETS[net].label, 36)}\nbatch {NETS[net].batch}", fontsize=7)
        axis.set_xlabel("time / gradient", fontsize=7)
        axis.tick_params(axis="x", labelsize=6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.01)
    present = _present(cells)
    handles, labels = [Patch(color=COLOURS[n]) for n in present], [CONTENDERS[n].label for n in present]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(handles), 2 * len(nets)), fontsize=8, frameon=False
    )
    probe.save(figure, path)
