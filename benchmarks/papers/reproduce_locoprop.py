"""Train the LocoProp paper's autoencoder on MNIST with the published settings, beside the authors' own curve.

    python -m benchmarks.papers.reproduce_locoprop [--epochs 4] [--seeds 0 1 2]

Prints train and test loss after each epoch, the authors' values, and PASS or FAIL: the median train loss
over the seeds has to lie within 4 % of theirs at epoch 2 and within 2 % from epoch 3. Writes the rows as JSON
and a plot. An interrupted run goes on after its last finished epoch when it is started again.
"""

from __future__ import annotations

import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import layerwise as lw
from benchmarks import probe
from benchmarks.autoencoder import SIZES, deep_autoencoder, mean_loss, reconstruction_loss
from benchmarks.data import load
from layerwise.errors import LayerwiseError

from .locoprop_curve import Row, plot, summary

BATCH, WARM_UP, HORIZON = 1000, 5, 100


def outer_schedule(epoch: int) -> float:
    """Factor of the learning rate in epoch number 0, 1, ...: linear from 0 to 1 at 5, then to 0 at 100."""
    return epoch / WARM_UP if epoch < WARM_UP else (HORIZON - epoch) / (HORIZON - WARM_UP)


def train(seed: int, epochs: int, x_train: Tensor, x_test: Tensor, checkpoints: Path) -> Iterator[Row]:
    """Yield a row per epoch; those that a checkpoint holds are not computed again.

    Each epoch draws its order from (seed, epoch) alone, so a resumed run repeats an uninterrupted one.
    """
    model = deep_autoencoder(seed)
    optimizer = lw.LocoProp(model, preset="published-M")
    scheduler = LambdaLR(optimizer, outer_schedule)
    rows = _resume(checkpoints, seed, model=model, optimizer=optimizer, scheduler=scheduler)
    if not rows:
        rows = [Row(seed, 0, mean_loss(model, x_train), mean_loss(model, x_test), 0.0)]
    yield from rows[: epochs + 1]
    for epoch in range(len(rows), epochs + 1):
        torch.manual_seed(1000 * seed + epoch)
        start = time.perf_counter()
        for index in torch.randperm(len(x_train)).split(BATCH):
            optimizer.step(partial(reconstruction_loss, model, x_train[index]))
        scheduler.step()
        seconds = rows[-1].seconds + time.perf_counter() - start
        row = Row(seed, epoch, mean_loss(model, x_train), mean_loss(model, x_test), seconds)
        if not math.isfinite(row.train_loss or 0.0) or not math.isfinite(row.test_loss or 0.0):
            raise ArithmeticError(f"the loss is {row.train_loss} on train and {row.test_loss} on test")
        rows.append(row)
        _keep(checkpoints, rows, model=model, optimizer=optimizer, scheduler=scheduler)
        yield row


def _keep(folder: Path, rows: Sequence[Row], **parts: Any) -> None:
    """Write one file per epoch, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed{rows[-1].seed}-epoch{rows[-1].epoch}.pt"
    draft = path.with_suffix(".part")
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"rows": [asdict(row) for row in rows], "state": state}, draft)
    draft.replace(path)


def _resume(folder: Path, seed: int, **parts: Any) -> list[Row]:
    """Load the last checkpoint that can be read; an unreadable one gives way to the one before."""
    for epoch in range(HORIZON, 0, -1):
        path = folder / f"seed{seed}-epoch{epoch}.pt"
        if not path.is_file():
            continue
        try:
            held = torch.load(path, weights_only=True)
        except Exception as error:
            print(f"{path} cannot be read ({type(error).__name__}); trying an earlier epoch")
            continue
        for name, part in parts.items():
            part.load_state_dict(held["state"][name])
        return [Row(**row) for row in held["rows"]]
    return []


def header(seeds: Sequence[int], epochs: int, source: str) -> dict[str, Any]:
    """What the rows depend on."""
    here = probe.conditions()
    return {
        "versions": {"layerwise": lw.__version__, "torch": here["torch"], "python": platform.python_version()},
        "machine": {"cpus": here["cores"], "threads": torch.get_num_threads(), "processor": here["machine"]},
        "data": source,
        "model": "-".join(map(str, SIZES)),
        "optimizer": 'LocoProp(model, preset="published-M")',
        "schedule": f"times epoch/{WARM_UP} up to epoch {WARM_UP}, then linear to 0 at epoch {HORIZON}",
        "batch": BATCH,
        "seeds": list(seeds),
        "epochs": epochs,
    }


def write_json(path: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write header, summary and rows."""
    lines = [{k: v for k, v in asdict(row).items() if k != "error" or v} for row in rows]
    probe.write(path, {"header": head, "summary": summary(rows), "rows": lines}, allow_nan=False)


def report(rows: Sequence[Row]) -> bool:
    """Print the summary; True where every judged epoch is near enough."""
    print(f"{'epoch':>5} {'seeds':>5} {'train':>8} {'authors':>8} {'differ':>8} {'test':>8} {'authors':>8}")
    verdicts = []
    for line in summary(rows):
        theirs = [line["authors_train_loss"], line["authors_test_loss"]]
        train, test = (f"{value:8.2f}" if value is not None else "       -" for value in theirs)
        differ = "-" if line["relative_difference"] is None else f"{100 * line['relative_difference']:+.2f} %"
        verdict = ""
        if line["pass"] is not None:
            verdicts.append(line["pass"])
            verdict = f"{'PASS' if line['pass'] else 'FAIL'} (within {100 * line['tolerance']:g} %)"
        print(
            f"{line['epoch']:>5} {line['seeds']:>5} {line['median_train_loss']:8.2f} {train} {differ:>8} "
            f"{line['median_test_loss']:8.2f} {test}  {verdict}"
        )
    for row in rows:
        if row.error:
            print(f"seed {row.seed} failed in epoch {row.epoch}: {row.error}")
    if not verdicts:
        print("nothing to judge before epoch 2")
    return all(verdicts) and not any(row.error for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all seeds; 0 where the curve is followed, 1 where it is not, 2 where the run cannot start."""
    parser = probe.parser("benchmarks.papers.reproduce_locoprop", __doc__, epochs=4, seeds=[0, 1, 2],
                          out=probe.RESULTS / "reproduce_locoprop.json")  # fmt: skip
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"layerwise-{lw.__version__}-torch-{torch.__version__}-locoprop",
        help="folder of the unfinished run; removed at the end",
    )
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.epochs <= HORIZON:
        parser.error(f"--epochs must be from 1 to {HORIZON}, where the published schedule ends: got {arguments.epochs}")
    try:
        data = load("mnist", flat=True)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seeds = list(dict.fromkeys(arguments.seeds))
    head = header(seeds, arguments.epochs, data.source)
    rows: list[Row] = []
    for seed in seeds:
        own: list[Row] = []
        try:
            for row in train(seed, arguments.epochs, data.x_train, data.x_test, arguments.checkpoints):
                own.append(row)
                losses = f"train {row.train_loss:.2f}  test {row.test_loss:.2f}"
                print(f"seed {seed}  epoch {row.epoch}  {losses}  {row.seconds:.0f} s", flush=True)
        except Exception as error:  # a failed seed is a row, never a missing one
            seconds = own[-1].seconds if own else 0.0
            own.append(Row(seed, len(own), None, None, seconds, f"{type(error).__name__}: {error}"))
        rows += own
        write_json(arguments.out, head, rows)
    plot(arguments.out.with_suffix(".png"), rows)
    good = report(rows)
    print(f"{'PASS' if good else 'FAIL'}; wrote {arguments.out} and {arguments.out.with_suffix('.png')}")
    shutil.rmtree(arguments.checkpoints, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
