"""Attribution beside kronfluence and dattri: CPU time and peak memory of a fit, of scores, and of an index.

    python -m benchmarks.speed.attribution [--nets gpt gpt-10m] [--repeats 3] [--index 10000] [--threads 1]

EKFAC of the linear layers in the blocks of a GPT on 64 sequences of 64 random tokens, in batches of 8, one label drawn
for each token; scores of 16 queries by these factors, and the same by the gradients' inner products alone, which dattri
calls TracIn. Arms run interleaved in one process, and are given as ratios to a plain pass over the data; a figure is
the lower quartile of CPU time. dattri runs once, on the small net alone: torch batches no fused attention for it, and
one call takes hundreds of passes. Peaks are of resident memory above what the process held before, each arm in a
process of its own (Linux only). kronfluence keeps its factors on disk between calls, as it does for its users. The
layers have no biases, which it joins to their weights. What is not installed is left out.

The index: 10,000 sequences of 32 tokens, a GPT of 2 M parameters, rank 4, in passes over the data; and one query.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks import probe

WORDS, LENGTH, SEQUENCES, QUERIES, BATCH = 65, 64, 64, 16, 8
BLOCKS = [f"blocks.*.{layer}.weight" for layer in ("qkv", "out", "up", "down")]

Run = Callable[[], Any]


class Block(nn.Module):
    """Pre-norm causal attention and feed-forward, four linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[N,T,width]` to the same."""
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """Logits `[N,T,WORDS]` of tokens `[N,T]`."""

    def __init__(self, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(self.norm(self.blocks(self.token(x) + self.place.weight[: x.shape[1]])))
        return out


NETS = {"gpt": (128, 4, 4), "gpt-10m": (384, 6, 6), "gpt-2m": (200, 4, 4), "tiny": (16, 1, 2)}


def token_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The sum over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")


class Subject(NamedTuple):
    """A model, its training sequences and queries, `[N,T]` twice each."""

    model: GPT
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The training data."""
        return list(zip(*(t.split(BATCH) for t in self.train), strict=True))


def subject(net: str, sequences: int = SEQUENCES, length: int = LENGTH) -> Subject:
    """A net of random weights, and random tokens."""
    torch.manual_seed(0)
    tokens = [torch.randint(WORDS, (n, length)) for n in (sequences, sequences, QUERIES, QUERIES)]
    return Subject(GPT(*NETS[net]), (tokens[0], tokens[1]), (tokens[2], tokens[3]))


def plain(of: Subject) -> dict[str, Run]:
    """One pass over the data with its gradient."""

    def run() -> None:
        for x, y in of.batches():
            of.model.zero_grad()
            token_loss(of.model(x), y).backward()

    return {"plain": run}


def ours(of: Subject) -> dict[str, Run]:
    """Of this library."""
    influence = lw.attribution.Influence(of.model, token_loss, BLOCKS)
    products = lw.attribution.Influence(of.model, token_loss, BLOCKS, "identity")
    return {
        "fit": lambda: influence.fit(of.batches()),
        "scores": lambda: influence.scores([of.queries], of.batches()),
        "products": lambda: products.scores([of.queries], of.batches()),
    }


def kronfluence(of: Subject) -> dict[str, Run]:
    """Of kronfluence, with its defaults but for the damping, which is as here."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Language(Task):  # type: ignore[misc, unused-ignore]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, y = model(batch[0]), batch[1]
            if sample:
                y = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1).view(y.shape)
            return token_loss(logits, y)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return token_loss(model(batch[0]), batch[1])

        def get_influence_tracked_modules(self) -> list[str]:
            return [n for n, m in of.model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")]

    data, asked = (torch.utils.data.TensorDataset(*t) for t in (of.train, of.queries))
    task = Language()
    model = prepare_model(copy.deepcopy(of.model), task)
    options = {"cpu": True, "disable_tqdm": True, "log_level": logging.ERROR, "output_dir": tempfile.mkdtemp()}
    analyzer = Analyzer("beside", model, task, **options)

    def fit() -> None:
        analyzer.fit_all_factors("ekfac", data, per_device_batch_size=BATCH, overwrite_output_dir=True)

    def scores() -> Tensor:
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", asked, data, per_device_query_batch_size=QUERIES, per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True,
        )  # fmt: skip
        found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
        return found

    return {"fit": fit, "scores": scores}


def dattri(of: Subject) -> dict[str, Run]:
    """Of dattri: inner products of gradients."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(parameters: Any, data: Any) -> Tensor:
        x, y = (t.unsqueeze(0) for t in data)
        return token_loss(torch.func.functional_call(of.model, parameters, x), y)

    chosen = [n for n, _ in of.model.named_parameters() if n.startswith("blocks") and "norm" not in n]
    task = AttributionTask(loss, of.model, of.model.state_dict())
    attributor = TracInAttributor(task, torch.ones(1), False, layer_name=chosen)
    data, asked = (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*t), n)
        for t, n in ((of.train, SEQUENCES), (of.queries, QUERIES))
    )
    return {"products": lambda: attributor.attribute(data, asked).T}


PEERS = {"kronfluence": kronfluence, "dattri": dattri}
ARMS = {"plain": plain, "layerwise": ours} | PEERS


def arms(net: str) -> dict[str, Run]:
    """What runs, by library and task, of one net."""
    of = subject(net)
    found: dict[str, Run] = {}
    for name, make in ARMS.items():
        if name in PEERS and importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out", file=sys.stderr)
            continue
        if name == "dattri" and net != "gpt":
            continue
        found |= {f"{name}, {task}": run for task, run in make(of).items()}
    return found


def peak(net: str, arm: str, pipe: Any) -> None:
    """Send the megabytes of one arm."""
    quiet()
    name, task = arm.split(", ")
    for run in ARMS[name](subject("tiny")).values():  # loads the code
        run()
    runs = ARMS[name](subject(net))
    if task == "scores":
        runs["fit"]()
    before = probe.Peak()
    runs[task]()
    pipe.send(before.mb())


def peaks(net: str, names: Sequence[str]) -> dict[str, float]:
    """The megabytes of each arm, in a process of its own."""
    context, found = multiprocessing.get_context("spawn"), {}
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=peak, args=(net, name, there))
        process.start()
        found[name] = round(here.recv(), 1)
        process.join()
    return found


def beside(net: str, repeats: int) -> dict[str, Any]:
    """Times and peaks of one net."""
    runs = arms(net)
    slow = {name: run for name, run in runs.items() if name.startswith("dattri")}
    quick = {name: run for name, run in runs.items() if name not in slow}
    seconds = probe.interleaved(quick, repeats, int(repeats > 1)) | probe.interleaved(slow, 1, 0)
    one = seconds["plain, plain"]
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in GPT(*NETS[net]).parameters()),
        "plain, seconds": round(one, 4),
        "passes": {name: round(s / one, 3) for name, s in seconds.items() if name != "plain, plain"},
        "megabytes": peaks(net, list(runs)),
    }
    if "kronfluence, scores" in runs:
        both = torch.stack([runs[f"{name}, scores"]().flatten() for name in ("layerwise", "kronfluence")])
        result["correlation of the scores"] = round(float(torch.corrcoef(both)[0, 1]), 4)
    return result


def index(samples: int) -> dict[str, Any]:
    """An index of a net of 2 M parameters: passes over the data to build it, and milliseconds of a query."""
    of = subject("gpt-2m", samples, 32)
    batches = list(zip(*(t.split(50) for t in of.train), strict=True))
    influence = lw.attribution.Influence(of.model, token_loss, BLOCKS).fit(batches[:20])
    start = time.process_time()
    for x, y in batches:
        of.model.zero_grad()
        token_loss(of.model(x), y).backward()
    one = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        made = lw.attribution.GradientIndex(influence, folder, rank=4)
        start = time.process_time()
        made.append(batches)
        build = time.process_time() - start
        query = [tuple(t[:1] for t in of.queries)]
        seconds = probe.interleaved({"query": lambda: made.search(query, 10)}, 9)["query"]
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "samples": samples,
        "parameters": sum(p.numel() for p in of.model.parameters()),
        "numbers a row": made.row_size,
        "passes to build": round(build / one, 3),
        "query, ms": round(1e3 * seconds, 2),
        "megabytes": round(size / 1e6, 1),
    }


def quiet() -> None:
    """Without the peers' notes on what torch deprecates."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def ratios(body: dict[str, Any]) -> str:
    """The table of ratios to the peers."""
    rows = []
    for net, found in body["nets"].items():
        for peer in PEERS:
            for task in ("fit", "scores", "products"):
                mine, its = f"layerwise, {task}", f"{peer}, {task}"
                if its in found["passes"]:
                    passes, held = found["passes"], found.get("megabytes", {})
                    row = [f"{net}, {task}", f"{passes[mine]:.2f}", f"{passes[its]:.2f} ({peer})"]
                    row += [f"{passes[mine] / passes[its]:.2f}"]
                    row += (
                        [f"{held[mine]:.0f}", f"{held[its]:.0f}", f"{held[mine] / held[its]:.2f}"] if held else [""] * 3
                    )
                    rows.append(row)
    return probe.table(["", "passes", "peer's", "ratio", "peak MB", "peer's", "ratio"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    options = probe.parsed(
        probe.parser("benchmarks.speed.attribution", __doc__, nets=["gpt", "gpt-10m"], repeats=3, index=10000,
                     threads=1, out=probe.RESULTS / "attribution_speed.json"),
        argv,
    )  # fmt: skip
    quiet()
    body: dict[str, Any] = probe.read(options.out) if options.out.exists() else {"nets": {}}
    body["conditions"] = probe.conditions(repeats=options.repeats, threads=options.threads)
    for net in options.nets:
        body["nets"][net] = beside(net, options.repeats)
        probe.write(options.out, body)
    if options.index:
        body["index"] = index(options.index)
        probe.write(options.out, body)
    options.out.with_suffix(".md").write_text(ratios(body) + "\n", encoding="utf-8")
    print(ratios(body))
    print(probe.table(["index", ""], body.get("index", {}).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
