"""What came of a random program: exact, or a typed error where it may be; anything else is an AssertionError.

python -m tests.random_programs --seconds 600
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as `tests.random_programs`: the tests' own modules lie here
    sys.path.insert(0, str(Path(__file__).parent))

import oracle
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from kind_outcomes import WrongValue, verdict
from random_kinds import KINDS, Kind, kinds
from random_layouts import INGREDIENTS, Layout, layouts
from random_nets import FAMILIES, TORCHS_OWN, programs

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import KFAC, DiagGGN, PerSampleGrad, SecondMoment, SquaredNorm, Variance

__all__ = ["WORDS", "Outcomes", "main", "outcome", "outcomes"]

WORDS = ("exact", "in part", "refused", "no answer", "wrong", "untyped")
_EVERY = (*INGREDIENTS, *KINDS, *(f"net_{name}" for name in FAMILIES))
_EACH = 20  # programs of an ingredient with one seed


def outcome(program: Any, grad: str = "autograd") -> str:
    """Observe a program: "exact", "refused" (samples that nothing tells apart), or "empty" where there is no answer.

    Raises: AssertionError where a value is wrong, or an error is not one that the program may raise.
    """
    valid = program.n > 0 and program.runs()
    params = program.model.parameters()
    quantities = [PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), DiagGGN(), KFAC()]
    try:
        with observe(program.model, *quantities, samples=program.samples, grad=grad) as seen:
            loss = program.loss()
            if loss.requires_grad:
                loss.backward()
    except errors.LayerwiseError as error:
        assert all(p.grad is None for p in params)
        told = isinstance(program.samples, torch.Tensor)  # a count may not say which rows are a sample
        if isinstance(error, errors.AmbiguousSamples) and not told and "samples=" in str(error):
            return "refused"
        if program.samples is None and _asks(program, error):
            return "refused"
        assert not valid, f"refused, though plain torch runs it: {type(error).__name__}: {error}"
        return "empty"
    except TORCHS_OWN as error:
        # torch's own error of a call without parameters (a padding, a pooling)
        assert not program.runs(), f"plain torch runs it: {type(error).__name__}: {error}"
        return "empty"
    if valid:
        compare(program, seen)
    return "exact" if valid else "empty"


def _asks(program: Any, error: errors.LayerwiseError) -> bool:
    """Whether the error says that the user is to say what a sample is."""
    return isinstance(program, Layout) and "samples=" in str(error)


def compare(program: Any, seen: Any) -> None:
    """Errors are relative to the largest value of all parameters: a bias before a norm is 0 in truth, noise in fact.

    The truth is in float64: the Hessian of a softmax near 1 is a difference that float32 hardly holds.
    """
    rel = 2e-4 if program.single else 1e-10
    for name, p in oracle.parameters(program.model).items():
        assert p.grad is None or torch.equal(p.grad, seen.grad[name]), name
    program = program.in_double() if program.single else program
    params = oracle.parameters(program.model)
    grads = oracle.per_sample_grad(params, program.terms)
    used = set(seen.grad)
    want = {
        "grad": {name: g.sum(0) for name, g in grads.items()},
        "per_sample_grad": grads, "squared_norm": oracle.squared_norm(grads),
        "second_moment": oracle.second_moment(grads), "variance": oracle.variance(grads),
        "diag_ggn": oracle.diag_ggn(params, program.logits, program.loss_of),
    }  # fmt: skip
    for name, values in want.items():
        got = getattr(seen, name)
        assert set(got) == used
        of = want["second_moment"] if name == "variance" else values  # a difference of numbers of this size
        peak = max((float(of[k].abs().max()) for k in used), default=0.0) / (program.n if name == "variance" else 1)
        for k in used:
            assert got[k].shape == values[k].shape, (name, k, got[k].shape, values[k].shape)
            assert float((got[k] - values[k]).abs().max()) <= rel * max(peak, 1e-6), (name, k)
    for key, block in seen.kfac.blocks.items():
        assert bool(torch.isfinite(block.B).all() and torch.isfinite(block.input_factor).all()), key


# Many programs at once --------------------------------------------------------------------------


@dataclass
class Outcomes:
    """How often each outcome came; the wrong ones with why, and how often each quantity was refused with which text."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, other: Outcomes) -> None:
        """Those of more programs."""
        self.counts += other.counts
        self.wrong += other.wrong
        self.refusals += other.refusals


def outcomes(ingredient: str, count: int, seed: int, only: int | None = None) -> Outcomes:
    """Check so many programs with an ingredient, whatever comes of one; only: the number of the one to check."""
    found, number = Outcomes(), 0
    strategy = layouts(ingredient) if ingredient in INGREDIENTS else None
    if strategy is None:
        strategy = kinds(ingredient) if ingredient in KINDS else programs(ingredient.removeprefix("net_"))

    @seeded(seed)
    @settings(
        max_examples=count, phases=(Phase.generate,), database=None, deadline=None, derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def check(program: Any) -> None:
        nonlocal number
        number += 1
        if only is None or only == number - 1:
            repeat = f"--ingredients {ingredient} --count {count} --seed {seed} --only {number - 1}"
            _check(program, repeat, found, only is not None, "rows" if number % 2 else "autograd")

    check()
    return found


def _check(program: Any, repeat: str, found: Outcomes, aloud: bool, grad: str) -> None:
    try:
        if isinstance(program, Kind):
            seen = verdict(program)
            found.counts[seen.word] += 1
            found.refusals.update(f"{name}: {re.sub('[0-9]+', '#', text)}" for name, text in seen.refusals.items())
        else:
            word = outcome(program, grad)
            found.counts["no answer" if word == "empty" else word] += 1
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].name
        wrong = isinstance(error, WrongValue) or where == "compare"
        found.counts["wrong" if wrong else "untyped"] += 1
        trace, size = traceback.format_exception(error), 4000 if aloud else 400
        text = "".join(trace[-12 if aloud else -1 :]).strip()[-size:]
        found.wrong.append(f"{'wrong' if wrong else 'untyped'} in {where}: {text}\n    {repeat}\n    {program!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check programs of every ingredient, say what came of them; 1 where a value was wrong or an error not listed."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_programs", description=main.__doc__)
    parser.add_argument("--seconds", type=float, help="go on for so long, with one seed after another")
    parser.add_argument("--count", type=int, help=f"programs of each ingredient and seed (default {_EACH})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of the one program to check, with the whole error")
    parser.add_argument("--show", type=int, default=20, help="wrong programs to show, and refusals (default 20)")
    parser.add_argument(
        "--ingredients", nargs="*", default=_EVERY, choices=_EVERY, metavar="NAME", help=" ".join(_EVERY)
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start, seed = time.perf_counter(), asked.seed
    found = {ingredient: Outcomes() for ingredient in asked.ingredients}
    over = lambda: asked.seconds is not None and time.perf_counter() - start > asked.seconds  # noqa: E731
    while seed == asked.seed or (asked.seconds is not None and not over()):
        for ingredient in asked.ingredients:
            if not over():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fresh = outcomes(ingredient, asked.count or _EACH, seed, asked.only)
                found[ingredient].add(fresh)
                for text in fresh.wrong:
                    _say(text)
        seed += 1
    _say(_summary(found, time.perf_counter() - start, seed, asked.show))
    return 1 if any(one.wrong for one in found.values()) else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _summary(found: dict[str, Outcomes], seconds: float, seed: int, show: int) -> str:
    """A table of outcomes by ingredient, and the commonest refusals."""
    total = Outcomes()
    for one in found.values():
        total.add(one)
    lines = ["", f"{'':20}" + "".join(f"{word:>11}" for word in WORDS)]
    for name, one in [*found.items(), ("all", total)]:
        lines.append(f"{name:20}" + "".join(f"{one.counts[word]:>11}" for word in WORDS))
    count = sum(total.counts.values())
    lines += ["", f"{count} programs in {seconds:.0f} s, the next seed is {seed}", "", "Refused most often:"]
    lines += [f"{many:6} {text[:300]}" for text, many in total.refusals.most_common(show)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
