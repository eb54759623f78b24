"""Train all methods side by side: same initial weights, same mini-batches, alternating epochs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .digits import Problem, autoencoder, reconstruction_loss
from .methods import METHODS, Settings

__all__ = ["BATCH", "Row", "Run", "minibatches", "relative_to", "schedule", "step_seconds", "train"]

BATCH = 120


@dataclass(frozen=True)
class Row:
    """One method after one epoch: losses in nats an image, total seconds in its own steps."""

    method: str
    epoch: int
    train_loss: float | None
    test_loss: float | None
    seconds: float
    error: str | None = None


def minibatches(x: Tensor, seed: int, epoch: int) -> list[Tensor]:
    """The mini-batches of an epoch, in an order that depends only on `seed` and `epoch`."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return [x[index] for index in torch.randperm(len(x), generator=generator).split(BATCH)]


def schedule(epoch: int, epochs: int) -> float:
    """The factor of the learning rate in epoch 1, 2, ..., `epochs`: 1 for the first half, then linear to 0."""
    return min(1.0, 2 * (epochs + 1 - epoch) / (epochs + 1))


class Run:
    """One method with its own model, optimizer, random numbers and clock."""

    def __init__(self, method: str, settings: Settings, seed: int) -> None:
        self.method, self.seed, self.seconds, self.error = method, seed, 0.0, ""
        self.random_state = torch.Generator().manual_seed(seed).get_state()
        self.model: nn.Module = autoencoder(seed)
        with self.own_random_numbers():
            self.optimizer = METHODS[method].make(self.model, **settings)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    @contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Context with the method's own random state, so that its draws do not depend on the other methods."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(outside)

    def step(self, x: Tensor) -> None:
        """One optimizer step on a mini-batch."""

        def closure() -> Tensor:
            loss = reconstruction_loss(self.model, x)
            if METHODS[self.method].backward:
                self.optimizer.zero_grad()
                loss.backward()
            return loss

        self.optimizer.step(closure)  # type: ignore[arg-type]  # torch says float

    def epoch(self, x: Tensor, epoch: int, factor: float = 1.0) -> None:
        """One pass over the rows of `x`, at `factor` times the chosen learning rate."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate
        batches = minibatches(x, self.seed, epoch)
        with self.own_random_numbers():
            start = time.perf_counter()
            for batch in batches:
                self.step(batch)
            self.seconds += time.perf_counter() - start

    def row(self, problem: Problem, epoch: int) -> Row:
        """The losses on the whole training and test sets; a loss that is not finite is an error."""
        with torch.no_grad():
            train = float(reconstruction_loss(self.model, problem.x_train))
            test = float(reconstruction_loss(self.model, problem.x_test))
        if not (math.isfinite(train) and math.isfinite(test)):
            return failed(self.method, epoch, f"loss is {train} on train, {test} on test", self.seconds)
        return Row(self.method, epoch, train, test, self.seconds)


def failed(method: str, epoch: int, error: Exception | str, seconds: float = 0.0) -> Row:
    """The row of a method that failed."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Row(method, epoch, None, None, seconds, text)


def train(
    problem: Problem,
    settings: Mapping[str, Settings],
    *,
    seed: int,
    epochs: int,
    seconds_limit: float = math.inf,
) -> Iterator[Row]:
    """Yield a row per method and epoch, beginning with epoch 0, the common start.

    Epochs alternate between methods, and each round begins with another method, so that timing noise of
    the machine affects all equally. A method that raises yields one row with `error` and takes no further part.
    All stop after the round in which `seconds_limit` (wall-clock) runs out.
    """
    start, runs = time.perf_counter(), []
    for method, chosen in settings.items():
        try:
            run = Run(method, chosen, seed)
            yield run.row(problem, 0)
            runs.append(run)
        except Exception as error:  # a method that fails is reported, never silently missing
            yield failed(method, 0, error)
    for epoch in range(1, epochs + 1):
        for run in _turned(runs, epoch):
            try:
                run.epoch(problem.x_train, epoch, schedule(epoch, epochs))
                row = run.row(problem, epoch)
            except Exception as error:
                row = failed(run.method, epoch, error, run.seconds)
            yield row
            if row.error:
                runs.remove(run)
        if time.perf_counter() - start > seconds_limit:
            return


def step_seconds(
    problem: Problem, settings: Mapping[str, Settings], *, seed: int, rounds: int = 40, warm_up: int = 5
) -> dict[str, list[float]]:
    """Seconds of single steps, with methods alternating on the same mini-batch.

    Every method starts from the initial weights; one that fails is left out.
    """
    runs: list[Run] = []
    times: dict[str, list[float]] = {}
    for method, chosen in settings.items():
        try:
            runs.append(Run(method, chosen, seed))
            times[method] = []
        except Exception:  # the error is in the rows of `train`
            continue
    batches = minibatches(problem.x_train, seed, 0)
    for turn in range(warm_up + rounds):
        batch = batches[turn % len(batches)]
        for run in _turned(runs, turn):
            start = time.perf_counter()
            try:
                run.step(batch)
            except Exception:
                runs.remove(run)
                del times[run.method]
                continue
            if turn >= warm_up:
                times[run.method].append(time.perf_counter() - start)
    return times


def relative_to(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Median over rounds of each method's step time over the reference's step time in the same round."""
    base = times.get(reference, ())
    return {
        method: statistics.median(a / b for a, b in zip(own, base, strict=True))
        for method, own in times.items()
        if base
    }


def _turned(runs: Sequence[Run], turn: int) -> list[Run]:
    """The runs, rotated by `turn`."""
    first = turn % len(runs) if runs else 0
    return [*runs[first:], *runs[:first]]
