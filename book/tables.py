"""Tables from the result files: every number is read from a file of the repository when the site is built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import read
from benchmarks.read import LIBRARIES, NETS, STUDIES, best_peer

__all__ = [
    "altmin",
    "character_gpt",
    "charts",
    "classifiers",
    "combinations",
    "cost",
    "demo_tuning",
    "numbers",
    "overhead",
    "overhead_machine",
    "overhead_rows",
    "ranks",
    "reproduction",
    "slower",
    "step_times",
    "study",
]

CHARTS = ("mlp", "3c3d", "all-cnn-c", "resnet8", "transformer")
NAMES = {
    "mlp": "MLP", "mlp-sigmoid": "sigmoid MLP", "3c3d": "3C3D", "all-cnn-c": "All-CNN-C", "resnet8": "ResNet-8",
    "transformer": "transformer", "gpt": "GPT", "t5-like": "T5-like", "resnet18": "ResNet-18",
}  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return numbers("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def numbers(table: str) -> str:
    """A table of numbers, whose lines do not break: on a small screen it scrolls."""
    return f'<div class="numbers" markdown="1">\n\n{table}\n\n</div>'


def _ratio(cell: Mapping[str, Any], who: str) -> str:
    entry = cell["contenders"].get(who, {})
    if "ratio" not in entry:
        return "fails" if "fails" in entry else "-"
    return f"{entry['ratio']:.2f}" + (" (part)" if "leaves out" in entry else "")


def cost(quantity: str) -> str:
    """One line: (gradient + quantity) / gradient on every net where it was measured, beside the fastest peer."""
    said = []
    for net in NETS:
        cell = read.overhead().get(f"{net}/{quantity}")
        if cell is None or "ratio" not in cell["contenders"].get("ours", {}):
            continue
        peer = best_peer(cell)
        beside = f" ({LIBRARIES[peer[0]]} {peer[1]:.2f})" if peer else ""
        said.append(f"{NAMES[net]} {_ratio(cell, 'ours')}{beside}")
    if not said:
        raise KeyError(f"no cell of benchmarks/results/overhead.json measures {quantity!r}")
    return f"*Measured, {quantity} with the gradient over the gradient alone (fastest peer): {'; '.join(said)}.*"


def overhead(net: str) -> str:
    """All quantities on one net: a chart, and time of every library and peak memory."""
    shown = ("ours", "backpack", "vmap", "opacus", "curvlinops")
    head = ["quantity", *(LIBRARIES[name] for name in shown), "MB: ours", "BackPACK", "gradient"]
    rows = []
    for name, cell in read.overhead(net).items():
        peak = cell.get("peak bytes", {})
        memory = [f"{peak[who] / 1e6:.0f}" if who in peak else "-" for who in ("ours", "backpack", "plain")]
        rows.append([name.split("/", 1)[1], *(_ratio(cell, who) for who in shown), *memory])
    image = f"![Time of each library on {NAMES[net]}](files/overhead-{net}.png)"
    picture = f'??? quote "As a chart"\n\n    {image}\n\n' if net in CHARTS else ""
    return picture + _table(head, rows)


def charts(folder: Path) -> Iterator[tuple[str, Path]]:
    """`(path in docs/, picture)` of the chart of every net."""
    for net in CHARTS:
        picture = folder / f"overhead-{net}.png"
        read.chart(read.overhead(net), picture)
        yield f"results/files/{picture.name}", picture


def overhead_machine(_: str) -> str:
    """Where and how the costs were measured."""
    header, cells = read.result("overhead")["header"], read.overhead()
    batches = ", ".join(f"{NAMES[net]} {cells[f'{net}/empty observe']['batch']}" for net in NETS
                        if f"{net}/empty observe" in cells)  # fmt: skip
    versions = ", ".join(f"{LIBRARIES.get(k, k)} {v}" for k, v in header["versions"].items() if v)
    return (
        f"*Machine: {header['machine']}, {header['threads']} thread, no GPU. {header['statistic'].capitalize()}. "
        f"Batches: {batches}. Versions: {versions}. Command: `make overhead`.*"
    )


def overhead_rows(_: str) -> str:
    """Both ways to the weights' gradients beside torch.func's, on all nets where they were measured together."""
    held = read.result("overhead_rows")
    rows = [
        [NAMES[name.split("/")[0]], name.split("/")[1], *(_ratio(cell, who) for who in ("ours", "rows", "vmap"))]
        for name, cell in held["cells"].items()
    ]
    machine, how = held["header"]["machine"], held["header"]["statistic"]
    repeats = min(cell["repeats"] for cell in held["cells"].values())
    table = _table(["net", "quantity", "`observe`", '`grad="rows"`', "torch.func"], rows)
    return f"{table}\n\n*Machine: {machine}, one thread; {how}; at least {repeats} repeats.*"


def slower(_: str) -> str:
    """Every cell in which the fastest peer is ahead of ours by more than 10 %."""
    rows = []
    for name, cell in read.overhead().items():
        peer = best_peer(cell)
        if peer is not None and read.slower(cell):
            net, quantity = name.split("/", 1)
            rows.append([NAMES[net], quantity, _ratio(cell, "ours"), f"{peer[1]:.2f}", LIBRARIES[peer[0]]])
    judged = sum(
        best_peer(cell) is not None and "ratio" in cell["contenders"].get("ours", {})
        for cell in read.overhead().values()
    )
    table = _table(["net", "quantity", "ours", "fastest peer", "which"], rows)
    return f"{table}\n\n*{len(rows)} of {judged} cells that a peer has at all.*"


def ranks(name: str) -> str:
    """The report of a benchmark over ranks: layers, kfac, gpt_10M, gpt_small, or scaling."""
    found = read.result(f"distributed_{name}")
    head = f"{found['cores']} cores, load {found['load']:.1f} before the start, {found['repeats']} repeats.\n\n"
    return head + "\n\n".join(
        numbers(part) if part.startswith("|") else part for part in read.ranks(name).split("\n\n")
    )


def reproduction(_: str) -> str:
    """The authors' saved curve of LocoProp-M beside ours, by epoch."""
    found = read.result("reproduce_locoprop")
    rows = [
        [s["epoch"], f"{s['authors_train_loss']:.2f}", f"{s['median_train_loss']:.2f}",
         f"{100 * s['relative_difference']:+.1f} %", _or_dash(s["authors_test_loss"]), f"{s['median_test_loss']:.2f}"]
        for s in found["summary"] if s["authors_train_loss"] is not None
    ]  # fmt: skip
    head = found["header"]
    table = _table(["epoch", "train, authors", "train, ours", "difference", "test, authors", "test, ours"], rows)
    return (
        f"{table}\n\n*`make reproduce-locoprop`, run for {head['epochs']} epochs; ours: the median of seeds "
        f"{', '.join(map(str, head['seeds']))}. `{head['optimizer']}`, batch {head['batch']}, rate {head['schedule']}. "
        f"torch {head['versions']['torch']}, {head['machine']['threads']} thread of {head['machine']['cpus']}. Nothing "
        "was tuned: the settings are the published ones.*"
    )


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def demo_tuning(_: str) -> str:
    """The demo's tuning: losses of the chosen settings on the tuning seeds."""
    found = read.result("tune_demo")
    rows = []
    for method, settings in found["chosen"].items():
        trials = [t for t in found["trials"] if t["method"] == method]
        trial = next(t for t in trials if t["settings"] == settings)
        said = ", ".join(f"{k} {v:g}" for k, v in settings.items()) or "defaults"
        rows.append([method, len(trials), said, f"{trial['train_loss']:.2f}", f"{trial['test_loss']:.2f}"])
    seeds = ", ".join(map(str, found["seeds"]))
    table = _table(["method", "trials", "chosen", "train loss", "test loss"], rows)
    return (
        f"{table}\n\n*`python -m benchmarks.training.tune_demo`: {found['epochs']} epochs, mean of seeds {seeds}. "
        "The demo itself runs on other seeds.*"
    )


def combinations(problem: str) -> str:
    """A pilot's best run of each method on a problem, and the same rate on another seed."""
    command = "`python -m benchmarks.training.locoprop.combinations`"
    try:
        found = [row for row in read.result("combinations") if row["problem"] == problem]
    except FileNotFoundError:
        return f"*Not run yet: {command}.*"
    rows = []
    for method, runs in read.chosen(found, lambda row: float(row["train"])).items():
        best, again = (next((row for row in runs if row["seed"] == seed), None) for seed in (0, 1))
        assert best is not None
        losses = (f"{run[part]:.2f}" if run else "-" for part in ("train", "test") for run in (best, again))
        rows.append([method, f"{best['rate']:g}", best["steps"], f"{1000 * best['seconds a step']:.0f}", *losses])
    head = ["method", "rate", "steps", "ms a step", "train loss", "seed 1", "test loss", "seed 1"]
    return f"{_table(head, rows)}\n\n*{command}, {problem}: one thread of a shared CPU, seconds of processor time.*"


def classifiers(problem: str) -> str:
    """A net for images beside Muon and Adam at equal seconds of steps, each method at its best rate."""
    methods, prices, seconds = read.classifiers(problem)
    rows = []
    for method, runs in methods.items():
        parts = [sum(losses) / len(runs) for losses in zip(*(run["train"][:-1] for run in runs), strict=True)]
        ends = ([run["train"][-1] for run in runs], [run["test"] for run in runs], [run["error"] for run in runs])
        rows.append([method, f"{runs[0]['rate']:g}", len(runs), f"{1000 * prices[method]:.0f}", runs[0]["steps"],
                     *(f"{loss:.3f}" for loss in parts), *(_span(read.interval(end)) for end in ends[:2]),
                     _span(read.interval(ends[2]), 1)])  # fmt: skip
    count = len(next(iter(methods.values()))[0]["train"])
    head = ["method", "rate", "seeds", "ms a step", "steps",
            *(f"train, {seconds * part / count:g} s" for part in range(1, count)), f"{seconds:g} s [95 %]",
            "test loss", "test error, %"]  # fmt: skip
    command = "`python -m benchmarks.training.locoprop.classifiers`"
    how = "steps times the seconds of one, of processor time, in an interleaved run"
    return f"{_table(head, rows)}\n\n*{command}, {problem}: {how}.*"


def character_gpt(_: str) -> str:
    """The character GPT's runs: each method at its best rate, by seconds and at equal tokens."""
    tokens, lines, every, last = read.character_gpt()
    seconds = [f"{every * n:g} s" for n in range(1, len(lines[0]["losses"]))]
    head = ["method", "rate", "seeds", "steps", *seconds, f"{last:g} s [95 %]", f"{tokens:,} tokens [95 %]"]
    rows = [
        [line["method"], f"{line['rate']:g}", line["runs"], f"{line['steps']:.0f}",
         *(f"{loss:.2f}" for loss in line["losses"][:-1]), *(_span(line[part]) for part in ("end", "at tokens"))]
        for line in lines
    ]  # fmt: skip
    command = "`python -m benchmarks.training.locoprop.character_gpt`"
    return f"{_table(head, rows)}\n\n*{command}: one thread of a shared CPU, seconds of processor time of the steps.*"


def _span(found: Sequence[float], digits: int = 3) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]"


def step_times(problems: str) -> str:
    """Seconds a step over Adam's, by problem, each from an interleaved run with Adam."""
    timed = read.step_times()
    wanted = {problem: timed[problem] for problem in (problems.split() or timed) if problem in timed}
    methods = list(dict.fromkeys(method for over, _ in wanted.values() for method in over))
    rows = [[m, *(f"{over[m]:.2f}" if m in over else "-" for over, _ in wanted.values())] for m in methods]
    threads = {each for _, each in wanted.values()}
    return (
        f"{_table(['method', *wanted], rows)}\n\n*`python -m benchmarks.training step-time`; Adam is 1; -100, "
        f"-250: smaller batches. {'/'.join(map(str, sorted(threads)))} thread, a CPU.*"
    )


def study(name: str) -> str:
    """A sentence on how much of a study is in the repository."""
    held, page = sum(read.runs(name).values()), f"../results/study-{name}.md"
    title = STUDIES[name].title
    if not held:
        return f"[{title}]({page}): **not run yet**; no row of it is in the repository."
    count = len(STUDIES[name].methods)
    return f"[{title}]({page}): {held} runs so far; final runs exist for {read.finals(name)} of its {count} problems."


def altmin(name: str) -> str:
    """What a demonstration of `python -m benchmarks.papers.altmin` saw, with its picture; or that it was not run."""
    command = f"`python -m benchmarks.papers.altmin {name}`"
    try:
        said = read.result(f"altmin/{name}")["seen"]
    except FileNotFoundError:
        return f"*Not run yet: {command}.*"
    shown = f"\n\n![{name}](../../benchmarks/results/altmin/{name}.png)" if read.picture(f"altmin/{name}") else ""
    return f"{command}: {said}{shown}"
