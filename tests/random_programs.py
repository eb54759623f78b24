"""What came of a random program: exact, or a typed error where it may be; anything else is an AssertionError.

python -m tests.random_programs --count 2000 --seed 1
"""

from __future__ import annotations

import argparse
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
from random_layouts import INGREDIENTS, Layout, layouts
from random_nets import TORCHS_OWN

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import KFAC, DiagGGN, PerSampleGrad, SecondMoment, SquaredNorm, Variance

__all__ = ["Outcomes", "main", "outcome", "outcomes"]


def outcome(program: Any) -> str:
    """Observe a program: "exact", "refused" (samples that nothing tells apart), or "empty" where there is no answer.

    Raises: AssertionError where a value is wrong, or an error is not one that the program may raise.
    """
    valid = program.n > 0 and program.runs()
    params = program.model.parameters()
    quantities = [PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), DiagGGN(), KFAC()]
    try:
        with observe(program.model, *quantities, samples=program.samples) as seen:
            loss = program.loss()
            if loss.requires_grad:
                loss.backward()
    except errors.LayerwiseError as error:
        assert all(p.grad is None for p in params)
        if program.samples is None and (isinstance(error, errors.AmbiguousSamples) or _asks(program, error)):
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

    The truth of a layout is in float64: the Hessian of a softmax near 1 is a difference that float32 hardly holds.
    """
    rel = 2e-4 if program.single else 1e-10
    program = program.in_double() if program.single and isinstance(program, Layout) else program
    params = oracle.parameters(program.model)
    grads = oracle.per_sample_grad(params, program.terms)
    used = set(seen.grad)
    want = {
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
    """How often each outcome came, and the programs with a wrong value or an error that is not listed, with why."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def outcomes(ingredient: str, count: int, seed: int) -> Outcomes:
    """Check so many programs with an ingredient, all of them, whatever comes of one."""
    found = Outcomes()

    @seeded(seed)
    @settings(
        max_examples=count, phases=(Phase.generate,), database=None, deadline=None, derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(layouts(ingredient))
    def check(program: Layout) -> None:
        try:
            found.counts[outcome(program)] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].name
            kind = "wrong value" if where == "compare" else "error not listed"
            found.counts[kind] += 1
            found.wrong.append(f"{kind}: {type(error).__name__} in {where}: {str(error)[:400]}\n    {program!r}")

    check()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check programs of every ingredient, say what came of them; 1 where a value was wrong or an error not listed."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_programs", description=main.__doc__)
    parser.add_argument("--count", type=int, default=2000, help="programs in all (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="wrong programs to show of each ingredient (default 3)")
    parser.add_argument("--ingredients", nargs="*", default=INGREDIENTS, choices=INGREDIENTS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    say = sys.stdout.write
    start, total, wrong = time.perf_counter(), Counter[str](), 0
    for at, ingredient in enumerate(asked.ingredients):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outcomes(ingredient, -(-asked.count // len(asked.ingredients)), 1000 * asked.seed + at)
        total += found.counts
        wrong += len(found.wrong)
        say(f"{ingredient:15} {dict(found.counts)}\n")
        for text in found.wrong[: asked.show]:
            say(f"  {text}\n")
    seconds, count = time.perf_counter() - start, sum(total.values())
    say(f"{count} programs in {seconds:.0f} s, {count / seconds:.0f} a second: {dict(total)}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
