"""`docs/support.md`: what the table test found, as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from quantity_table import COLUMNS, FIRST, Cell, Column
from torch import nn
from zoo import LOSSES, PROBLEMS, REFUSED, Case, Functional, Problem
from zoo.scattered import KINDS, MIXED, SCATTERED, Scattered

__all__ = ["PAGE", "loss_cases", "model_cases", "render", "table_cases"]

PAGE = Path(__file__).parents[1] / "docs" / "support.md"

_INTRO = """\
# Support

What every quantity gives on every model, as the tests found it: each cell is one run, compared with brute force (loops
over samples, outputs and parameter elements) in float64 at a relative error of at most 1e-10. This page is written by
the tests; `make support` writes it again, and `make test` fails where it no longer says what is so.

| mark | |
|---|---|
| ✓ | exact: equal to brute force |
| (✓) | a part was compared with brute force, as the note says |
| ~ | sampled: equal to brute force with the same draws; unbiased, which other tests show |
| ✗ | refused with a typed error, for the reason in the note |
| n/a | not defined there |

Several marks in one cell are the variants of a quantity, in the order of its heading. Kronecker factors of a parameter
that is used in slices or through a derived tensor have a form of their own ([conventions](conventions.md)), which the
tests hold to its own brute force.
"""

_MODELS = {
    "layers": "Layers",
    "convolutions": "Convolutions",
    "weights": "Weights: bare, tied, reused, derived",
    "programs": "Programs",
    "sequence": "Attention and recurrent layers",
}

_LOSSES = {
    "ce_mean": "`cross_entropy(z, y)`", "ce_module": "`nn.CrossEntropyLoss()(z, y)`",
    "ce_sum": 'with `reduction="sum"`',
    "ce_weighted": "with class weights", "ce_ignore": "with ignored targets",
    "ce_ignore_class": "with class weights, and an ignored class", "ce_ignore_sum": "summed, with ignored targets",
    "ce_smooth": "with label smoothing", "ce_everything": "with weights, smoothing and ignored targets",
    "ce_soft": "with class probabilities", "ce_scaled": "`10 * cross_entropy(z, y)`",
    "ce_user_mean": '`cross_entropy(z, y, reduction="none").mean()`',
    "ce_user_weighted": 'weights of the user\'s own on `reduction="none"`',
    "ce_stepwise": "a call for each position, averaged", "mse_mean": "`mse_loss(z, y)`",
    "mse_sum": 'with `reduction="sum"`', "mse_scaled": "`mse_loss(z, y) / 4`",
    "mse_user_mean": "the user's own mean over samples", "bce_mean": "`binary_cross_entropy_with_logits(z, y)`",
    "bce_pos_weight": "summed, with `pos_weight`", "nll_mean": "`nll_loss(log_softmax(z), y)`",
    "huber_mean": "`huber_loss(z, y)`", "gaussian_nll": "`gaussian_nll_loss(z, y, var)`",
    "poisson_nll": "`poisson_nll_loss(z, y)`, summed", "two_calls": "`cross_entropy(z, y) + 0.5 * mse_loss(z, t)`",
    "two_heads": "a loss for each of two outputs, a mean and a sum",
}  # fmt: skip

_REFUSED = {
    "batch_norm_train": "samples meet in the batch's statistics", "contrastive": "every sample is compared with all",
    "batch_centred": "the batch's mean is subtracted", "pairs_near": "samples are added in pairs",
    "pairs_far": "samples are added in pairs", "pairs_outer": "samples are added in pairs",
    "swapped_near": "samples in another order inside", "swapped_far": "samples in another order inside",
    "custom_function": "a custom `autograd.Function` on a parameter",
    "half_covered": "a parameter in a known layer, and in a custom `autograd.Function`",
    "half_covered_chain": "the same, one after the other", "scripted": "a scripted block",
    "reentrant_checkpoint": "`checkpoint(use_reentrant=True)`", "thread_inside": "a layer run in another thread",
    "vmap_inside": "a layer run inside `vmap`", "inner_step": "a step on a weight by its gradient, in the forward",
    "regulariser": "a penalty on the parameters belongs to no sample",
    "loss_half_by_hand": "curvature of a known call plus a piecewise linear term",
    "loss_squared": "a loss call squared", "loss_product": "a product of two loss calls",
    "packed_sequence": "`pack_padded_sequence`", "checkpointed_recurrent": "a recurrent layer under `checkpoint`",
}  # fmt: skip


def model_cases() -> list[Case]:
    """Every model with its first loss."""
    return [Case(problem, LOSSES[problem.losses[0]]) for problem in PROBLEMS.values()]


def loss_cases() -> list[Case]:
    """Every loss, on the first model that has it."""
    first = {name: next(p for p in PROBLEMS.values() if name in p.losses) for name in LOSSES}
    return [Case(problem, LOSSES[name]) for name, problem in first.items()]


def table_cases() -> list[Case]:
    """The cases that test_matrix.py compares with brute force in every run, a test for each cell."""
    return [*model_cases(), *loss_cases()]


def render(outcome: Callable[[Case, Column], Cell], scattered: Callable[[Scattered, Column], Cell]) -> str:
    """The page, from the cells of models and losses, and from those of programs whose samples lie scattered."""
    notes = _Notes()
    parts = [_INTRO, *_tables("Models", "model", _grouped_models(), outcome, notes), _LAYERS_INTRO, _layers()]
    parts += [_LOSSES_INTRO, *_tables("Losses", "loss", [("", _named_losses())], outcome, notes)]
    parts += [_SCATTERED_INTRO, *_tables("Where samples lie", "program", _scattered(), scattered, notes, chains=False)]
    parts += [_refused(), _descriptions()]
    parts.insert(1, notes.text())
    return "\n".join(part.rstrip() + "\n" for part in parts)


class _Notes:
    """Reasons, lettered in the order in which they are met."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def marks(self, cells: Sequence[Cell]) -> str:
        """The marks of a quantity's variants, each run of one reason with its letter."""
        marks = {"exact": "✓", "part": "(✓)", "sampled": "~", "refused": "✗", "n/a": "n/a"}
        text = ""
        for why, run in groupby(cells, lambda cell: cell.why):
            text += "".join(marks[cell.kind] for cell in run)
            if why:
                text += f"<sup>{self._letters.setdefault(why, chr(ord('a') + len(self._letters)))}</sup>"
        return text

    def text(self) -> str:
        """The notes."""
        return "\n".join(f"- <sup>{letter}</sup> {why}" for why, letter in self._letters.items())


# Tables of cells --------------------------------------------------------------------------------


def _grouped_models() -> list[tuple[str, list[tuple[str, Case]]]]:
    def module(case: Case) -> str:
        return case.problem.make.__module__.rpartition(".")[2]

    return [
        (_MODELS[name], [(f"`{case.problem.name}`" + _rounding(case.problem), case) for case in group])
        for name, group in groupby(model_cases(), module)
    ]


def _rounding(problem: Problem) -> str:
    return f" (to {problem.rel:g}, its own rounding)" if problem.rel > 1e-10 else ""


def _named_losses() -> list[tuple[str, Case]]:
    assert _LOSSES.keys() == LOSSES.keys()
    return [(_LOSSES[case.loss.name], case) for case in loss_cases()]


def _tables(
    title: str,
    corner: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, Any]]]],
    outcome: Callable[[Any, Column], Cell],
    notes: _Notes,
    chains: bool = True,
) -> Iterable[str]:
    """Two tables: first order, and curvature; chains: with the quantities of chains of layers alone."""
    asked = [column for column in COLUMNS.values() if chains or not column.chain]
    first = [column for column in asked if column.group == FIRST]
    rest = [column for column in asked if column.group != FIRST]
    for part, columns in (("first order", first), ("curvature", rest)):
        families = _families(columns)
        lines = [f"## {title}: {part}", "", f"| {corner} | " + " | ".join(map(_heading, families.items())) + " |"]
        lines.append("|---|" + ":-:|" * len(families))
        for name, rows in groups:
            if name:
                lines.append(f"| **{name}** |" + " |" * len(families))
            for label, case in rows:
                marks = [notes.marks([outcome(case, column) for column in f]) for f in families.values()]
                lines.append(f"| {label} | " + " | ".join(marks) + " |")
        yield "\n".join(lines)


def _families(columns: Sequence[Column]) -> Mapping[str, list[Column]]:
    found: dict[str, list[Column]] = {}
    for column in columns:
        found.setdefault(column.name.partition(" ")[0], []).append(column)
    return found


def _heading(family: tuple[str, list[Column]]) -> str:
    name, columns = family
    variants = ", ".join(column.name.partition(" ")[2] for column in columns)
    return f"`{name}`" + (f" {variants}" if variants else "")


# Lists ------------------------------------------------------------------------------------------

_LAYERS_INTRO = """\
## Layers

Modules of torch that the models above hold. Everything else that touches a parameter (`F.linear`, `@`, `einsum`, sums,
products, indexing, ...) is recorded by call, not by module; a call that no rule knows is exact too, only slower, as in
`unknown_call`.
"""

_SCATTERED_INTRO = """\
A sample is any set of rows. In these programs the rows of a sample do not lie along one axis of the batch; N comes from
the loss, or from what the user says: `samples=N`, or `samples=` with the number of the sample of each loss term.
Kronecker factors are those of the rows that some term of the loss sees.
"""

_LOSSES_INTRO = """\
Losses are recorded as the calls of `torch.nn.functional` that make them, under any scale and in any sum.
"""


def _layers() -> str:
    places: dict[str, list[str]] = {}
    skipped = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten)
    for problem in PROBLEMS.values():
        model = problem.build()
        if isinstance(model, Functional):
            continue
        kinds = {type(m) for m in model.modules() if hasattr(nn, type(m).__name__)}
        for kind in sorted(kinds - set(skipped), key=lambda kind: kind.__name__):
            places.setdefault(kind.__name__, []).append(problem.name)
    lines = ["| layer | models |", "|---|---|"]
    for kind, names in sorted(places.items()):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"| `{kind}` | " + ", ".join(f"`{name}`" for name in names[:4]) + more + " |")
    return "\n".join(lines)


def _descriptions() -> str:
    lines = ["## Models by name", "", "Those whose name does not say it all; the code is in `tests/zoo`.", ""]
    lines += ["| model | |", "|---|---|"]
    for problem in PROBLEMS.values():
        if problem.make.__doc__:
            lines.append(f"| `{problem.name}` | {problem.make.__doc__.splitlines()[0]} |")
    lines += [f"| `{program.name}` | {program.about} |" for program in SCATTERED + MIXED]
    return "\n".join(lines)


def _scattered() -> list[tuple[str, list[tuple[str, Scattered]]]]:
    """Programs by kind, each with what the user says."""

    def said(program: Scattered) -> str:
        samples = program.instance().samples
        return "" if samples is None else " (`samples=N`)" if isinstance(samples, int) else " (numbers said)"

    programs = SCATTERED + MIXED
    return [(why, [(f"`{p.name}`{said(p)}", p) for p in programs if p.kind == kind]) for kind, why in KINDS.items()]


def _refused() -> str:
    lines = [
        "## Programs that are refused",
        "",
        "Plain torch runs these; per-sample quantities have no",
        "exact answer there, or none is known.",
    ]
    lines += ["", "| program | error | |", "|---|---|---|"]
    for refused in REFUSED:
        lines.append(f"| `{refused.name}` | `{refused.error}` | {_REFUSED[refused.name]} |")
    return "\n".join(lines)
