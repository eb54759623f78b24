"""The drawings of the pages, as files in docs/images: `python -m book.drawings` writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from book.sketch import Sketch

__all__ = ["DRAWINGS", "FOLDER", "write"]

RULES = "Each stands for the derivative inside one block only; loss.backward() sees the true one, zero."
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"


def tape() -> Sketch:
    """A run of a model: uses of parameters, what each came with, and the tape that holds them."""
    d = Sketch(760, 372)
    d.text(20, 26, "the user's own run", "soft", 13, "start")
    d.box(14, 58, 64, 44, "x")
    stages = [("linear", "0.weight", 128), ("tanh", "", 268), ("linear", "2.weight", 370), ("cross\nentropy", "", 528)]
    for text, parameter, x in stages:
        d.box(x, 50, 92 if parameter else 82, 60, text)
        if parameter:
            d.text(x + 46, 40, parameter, "soft", 13)
    d.box(668, 58, 70, 44, "loss")
    for left, right in ((78, 128), (220, 268), (350, 370), (462, 528), (610, 668)):
        d.arrow([(left, 72), (right, 72)], "")
    for left, right in ((128, 78), (268, 220), (370, 350), (528, 462), (668, 610)):
        d.arrow([(left, 92), (right, 92)], "back")
    for x, a in ((103, "a"), (244, "z"), (360, "a"), (495, "z")):
        d.text(x, 64, a, "in" if a == "a" else "out", 15)
    d.text(244, 110, "g", "back", 15)
    d.text(495, 110, "g", "back", 15)
    for x in (174, 416):
        d.line([(x, 112), (x, 168)], "soft", dashed=True)
    d.text(20, 162, "the tape: one entry for each use", "soft", 13, "start")
    three = (("a", "in", "came in"), ("z", "out", "went out"), ("g", "back", "came back"))
    for x, name in ((62, "0.weight"), (304, "2.weight")):
        d.box(x, 170, 224, 74)
        d.text(x + 112, 190, f"use of {name}", "", 13)
        for n, (letter, kind, said) in enumerate(three):
            d.box(x + 10 + 70 * n, 202, 64, 34, "", kind)
            d.text(x + 42 + 70 * n, 217, letter, kind, 13)
            d.text(x + 42 + 70 * n, 231, said, kind, 10.5)
    for x in (174, 416):
        d.arrow([(x, 246), (x, 290)], "")
    d.box(62, 292, 466, 62, "quantity = function of (a, g)\none contraction, the same for every layer", "", 14)
    d.text(548, 208, "no wrapper and no copy", "soft", 13, "start")
    d.text(548, 228, "of the model; when the context", "soft", 13, "start")
    d.text(548, 248, "ends, nothing is left on it", "soft", 13, "start")
    d.arrow([(528, 323), (600, 323)])
    d.text(608, 328, "by parameter name", "", 14, "start")
    return d


def local_problem() -> Sketch:
    """LocoProp's local problem of one layer."""
    d = Sketch(760, 308)
    d.text(20, 26, "1  one run of the model", "soft", 13, "start")
    d.box(40, 44, 74, 48, "a", "in", 16)
    d.arrow([(114, 68), (170, 68)])
    d.box(170, 40, 92, 56, "W")
    d.arrow([(262, 68), (318, 68)])
    d.box(318, 44, 74, 48, "z", "out", 16)
    d.arrow([(392, 68), (448, 68)])
    d.box(448, 40, 92, 56, "f")
    d.arrow([(540, 60), (640, 60)])
    d.text(648, 65, "the loss", "", 14, "start")
    d.arrow([(640, 80), (540, 80)], "back")
    d.text(590, 100, "g = ∂L/∂z", "back", 14)
    d.text(20, 142, "2  a target for this layer alone", "soft", 13, "start")
    d.box(318, 152, 222, 46, "target  y = f(z) − γ g", "code", 15)
    d.arrow([(355, 92), (355, 152)], "out", dashed=True)
    d.arrow([(574, 108), (520, 150)], "back", dashed=True)
    d.text(20, 232, "3  T steps on W, with a and y fixed", "soft", 13, "start")
    d.box(40, 246, 74, 40, "a", "in", 16)
    d.arrow([(114, 266), (170, 266)])
    d.box(170, 242, 92, 48, "W′")
    d.arrow([(262, 266), (318, 266)])
    d.box(318, 243, 222, 46, "D(W′a, y) + R(W′)", "", 15)
    d.arrow([(430, 198), (430, 243)], "code", dashed=True)
    d.arrow([(318, 282), (290, 282), (290, 302), (216, 302), (216, 290)], "back")
    d.text(556, 262, "D: the loss that matches f;", "soft", 13, "start")
    d.text(556, 280, "no other layer takes part", "soft", 13, "start")
    return d


def code_step() -> Sketch:
    """AltMin's step: codes move, then each layer is fitted to its own."""
    d = Sketch(760, 346)

    def net(y: float, first: str) -> list[float]:
        xs = [90.0, 290.0, 490.0]
        d.box(14, y, 56, 44, "x", "in")
        for i, x in enumerate(xs):
            d.arrow([(70 if i == 0 else xs[i - 1] + 156, y + 22), (x, y + 22)])
            d.box(x, y - 4, 64, 52, f"W{'₁₂₃'[i]}")
            if i < 2:
                d.arrow([(x + 64, y + 22), (x + 100, y + 22)])
                d.box(x + 100, y, 56, 44, f"{first}{'₁₂'[i]}", "out" if first == "z" else "code", 15)
        d.arrow([(554, y + 22), (620, y + 22)])
        d.box(620, y, 70, 44, "loss")
        return xs

    d.text(20, 24, "1  run: every hidden layer has an output z", "soft", 13, "start")
    net(40, "z")
    d.text(20, 126, "2  codes move from z to where the loss would rather have them", "soft", 13, "start")
    for x in (218.0, 418.0):
        d.box(x - 28, 142, 56, 40, "z", "out", 15)
        d.box(x + 52, 142, 56, 40, "c", "code", 15)
        d.arrow([(x + 28, 162), (x + 52, 162)], "back")
        d.text(x + 40, 198, "−(B/μ) g", "back", 13)
    d.text(20, 230, "3  each layer is fitted to its code on its own; no layer waits for another", "soft", 13, "start")
    for x, a, c in ((60.0, "x", "c₁"), (290.0, "a₂", "c₂"), (520.0, "a₃", "loss")):
        d.box(x, 252, 46, 44, a, "in", 15)
        d.arrow([(x + 46, 274), (x + 70, 274)])
        d.box(x + 70, 248, 58, 52, f"W{'₁₂₃'[[60.0, 290.0, 520.0].index(x)]}")
        d.arrow([(x + 128, 274), (x + 152, 274)])
        d.box(x + 152, 252, 52, 44, c, "code" if c != "loss" else "", 15)
        if x < 500:
            d.line([(x + 218, 244), (x + 218, 304)], "soft", dashed=True)
    d.text(380, 320, "μ ½ ‖c − W a‖² at each hidden layer", "soft", 13)
    d.text(380, 338, "a: the inputs that it had; with a sweep, those that the moved codes give", "soft", 13)
    return d


def per_sample() -> Sketch:
    """The matrix of per-sample gradients and what is read off it."""
    d = Sketch(660, 312)
    x, y, cell, rows, columns = 110, 60, 26, 5, 9
    d.grid(x, y, rows, columns, cell, "back")
    d.text(x + columns * cell / 2, 24, "P parameters", "soft", 13)
    d.text(x - 14, y + rows * cell / 2 + 5, "N samples", "soft", 13, "end")
    d.text(x + columns * cell / 2, 46, "PerSampleGrad: rows gₙ, [N, P]", "back", 14)
    bottom = y + rows * cell
    for n, (text, formula) in enumerate(
        ((".grad", "Σₙ gₙ"), ("SecondMoment", "Σₙ gₙ²"), ("Variance", "Σ gₙ²/N − (Σ gₙ/N)²"))
    ):
        top = bottom + 22 + 28 * n
        d.grid(x, top, 1, columns, cell * 0.7, "out")
        d.text(x + columns * cell * 0.7 + 12, top + 14, f"{text} = {formula}", "out", 13, "start")
    d.arrow([(x + 82, bottom + 2), (x + 82, bottom + 20)])
    right = x + columns * cell
    d.arrow([(right + 3, y + 65), (right + 26, y + 65)])
    d.grid(right + 28, y, rows, 1, cell, "in")
    d.text(right + 62, y + 18, "SquaredNorm: ‖gₙ‖², [N]", "in", 13, "start")
    d.text(right + 62, y + 44, "PairwiseDot: ⟨gₙ, gₘ⟩, [N, N]", "in", 13, "start")
    d.text(right + 62, y + 70, "Sketch: ⟨Sⱼ, gₙ⟩, [N, dim]", "in", 13, "start")
    d.text(right + 62, y + 96, "NoiseScale: tr Σ / |G|²", "in", 13, "start")
    d.text(right + 62, y + 122, "ClippedGrad: Σ wₙ gₙ", "in", 13, "start")
    d.text(20, 304, "Only PerSampleGrad itself holds the matrix.", "soft", 13, "start")
    return d


def curvature() -> Sketch:
    """The generalized Gauss-Newton matrix of a sample as Jᵀ H J, and its columns."""
    d = Sketch(760, 250)
    y, cell = 70, 20
    d.grid(30, y, 7, 7, cell, "out")
    for i in range(7):
        d.parts.append(
            f'<rect class="box back" x="{30 + i * cell}" y="{y + i * cell}" width="{cell}" height="{cell}"/>'
        )
    d.text(100, y - 30, "GGN block, [P, P]", "", 14)
    d.text(100, y - 12, "its diagonal: DiagGGN", "back", 13)
    d.text(192, y + 76, "=", "", 20)
    d.text(212, y + 76, "Σₙ", "", 18)
    d.grid(246, y, 7, 3, cell, "back")
    d.text(276, y - 12, "Jₙᵀ", "back", 14)
    d.grid(320, y, 3, 3, cell, "code")
    d.text(350, y - 12, "Hₙ", "code", 14)
    d.grid(394, y, 3, 7, cell, "back")
    d.text(464, y - 12, "Jₙ", "back", 14)
    d.text(540, y + 10, "Hₙ = R Rᵀ: the Hessian of the", "soft", 13, "start")
    d.text(540, y + 28, "loss in the C outputs", "soft", 13, "start")
    d.text(540, y + 56, "exact: the C − 1 columns of R", "code", 13, "start")
    d.text(540, y + 74, "go back to every use", "code", 13, "start")
    d.text(540, y + 102, "sampled: one column per draw,", "back", 13, "start")
    d.text(540, y + 120, "gradients for drawn labels", "back", 13, "start")
    d.text(
        30, 240, "SqrtGGN keeps the columns Jₙᵀ R; GGN @ v multiplies without forming anything.", "soft", 13, "start"
    )
    return d


def kronecker() -> Sketch:
    """The block diagonal of the curvature, each block a Kronecker product."""
    d = Sketch(760, 250)
    x, y = 30, 50
    d.box(x, y, 180, 180)
    at = 0
    for size, name in ((70, "W₁"), (60, "W₂"), (50, "W₃")):
        d.box(x + at, y + at, size, size, name, "back")
        at += size
    d.text(x + 90, y - 14, "curvature of the whole model", "", 14)
    d.text(x + 140, y + 52, "left out", "soft", 12)
    d.arrow([(102, 70), (290, 70)], "", dashed=True)
    d.text(x + 40, y + 150, "left out", "soft", 12)
    d.text(312, 98, "≈", "", 22)
    d.grid(336, 58, 3, 3, 22, "back")
    d.text(369, 48, "B", "back", 15)
    d.text(422, 98, "⊗", "", 22)
    d.grid(446, 40, 5, 5, 22, "in")
    d.text(501, 30, "A", "in", 15)
    d.text(574, 70, "B: what came back,", "back", 13, "start")
    d.text(574, 88, "outputs × outputs", "back", 13, "start")
    d.text(574, 116, "A: what came in,", "in", 13, "start")
    d.text(574, 134, "inputs × inputs", "in", 13, "start")
    d.text(336, 190, "(B ⊗ A + λI)⁻¹ needs I³ + O³ operations, not (I O)³", "", 14, "start")
    d.text(336, 214, "KFAC, KFLR, KFRA: three ways to B.  EKFAC: other eigenvalues.", "soft", 13, "start")
    return d


def crossing() -> Sketch:
    """What the rules make of a sign's derivative."""
    d = Sketch(760, 220)
    panels: tuple[tuple[str, str, Callable[[float], float]], ...] = (
        ("the function: Sign", "out", lambda z: 1.0 if z > 0 else -1.0),
        ("StraightThrough(1)", "back", lambda z: 1.0 if abs(z) <= 1 else 0.0),
        ("Smooth(tanh)", "back", lambda z: 1 - math.tanh(z) ** 2),
        ("Hinge(1), asked to rise", "back", lambda z: 1.0 if z < 1 else 0.0),
    )
    for n, (title, kind, function) in enumerate(panels):
        x, y, w, h = 20 + 185 * n, 60, 160, 110
        d.text(x + w / 2, 36, title, kind, 13)
        low, high = (-1.3, 1.3) if n == 0 else (-0.3, 1.3)

        def at(z: float, v: float, x: float = x, low: float = low, high: float = high) -> tuple[float, float]:
            return x + (z + 3) / 6 * 160, 60 + (high - v) / (high - low) * 110

        d.line([at(-3, 0), at(3, 0)], "soft")
        d.line([at(0, low), at(0, high)], "soft")
        zs = [-3 + 6 * i / 240 for i in range(241)]
        d.line([at(z, function(z)) for z in zs], kind, width=2.2)
        d.text(x + w - 2, at(0, 0)[1] + 16, "z", "soft", 12, "end")
        d.text(x + w / 2, y + h + 22, "h(z)" if n == 0 else "dz per unit of g", "soft", 12)
    d.text(
        20,
        214,
        RULES,
        "soft",
        13,
        "start",
    )
    return d


DRAWINGS: dict[str, Callable[[], Sketch]] = {
    "tape": tape, "local-problem": local_problem, "code-step": code_step, "per-sample": per_sample,
    "curvature": curvature, "kronecker": kronecker, "crossing": crossing,
}  # fmt: skip


def write(folder: Path = FOLDER) -> None:
    """Write every drawing."""
    for name, draw in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    write()
