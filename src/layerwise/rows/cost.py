"""Which form of a contraction is cheaper: counts of multiply-adds and of memory traffic, checked by measurements."""

from __future__ import annotations

import math

from layerwise.rows.base import Rows
from layerwise.rows.pieces import dims, product_of

__all__ = [
    "convolution_is_cheaper",
    "ghost_is_cheaper",
    "grouped_is_cheaper",
    "norms_form_rows",
    "pairs_are_cheaper",
    "squares_need_rows",
    "sums_are_cheaper",
]

REREAD_FROM = 16  # positions from which on D is cheaper to read than to compute again
TRAFFIC = 12  # writing and rereading one number costs as much as this many multiply-adds


def ghost_is_cheaper(v: int, t: int, o: int, i: int) -> bool:
    """Whether `sum D²` costs less from two Gram matrices over positions than from D itself.

    Multiply-adds per sample and group: `t²(i + v·o)` for the Gram matrices, `v·t·i·o` for D, plus
    the memory traffic of what each of them writes. Source of the ghost form: Goodfellow 2015
    (t = 1); Li, Tramèr, Liang and Hashimoto 2022 (t > 1).
    """
    ghost = t * t * (i + v * o + TRAFFIC * (1 + v))
    return ghost < v * o * i * (t + TRAFFIC)


def pairs_are_cheaper(v: int, t: int, o: int, i: int) -> bool:
    """Whether `sum_v D²` costs less as one matrix product over pairs of positions than by cotangent.

    There are `t(t+1)/2` pairs, whatever the number of cotangents; the product over them runs over
    all samples at once.
    """
    pairs = t * (t + 1) // 2
    if pairs >= v * t:
        return False
    return pairs * (o * i + TRAFFIC * (o + i)) + t * t * o * (v + TRAFFIC) < v * o * i * (t + TRAFFIC)


def grouped_is_cheaper(t: int, o: int, i: int) -> bool:
    """Whether all D of a convolution cost less as one convolution with a group for each sample than from windows.

    The windows are a copy of `t·i` numbers for `t·o·i` multiply-adds, and products with few rows are slow; torch's
    kernel is slow where there are many channels and few places. Float32 on a CPU, on the convolutions of All-CNN-C,
    3C3D and ResNet-8: 0.5 to 1.2 times the windows' time by this rule, 0.8 to 2 times against it
    (`python -m benchmarks.speed.convolutions`).
    """
    return t >= 256 and o * i <= 100_000


def convolution_is_cheaper(t: int, o: int, i: int, dim: int) -> bool:
    """Whether the tensor sketch of D costs less by Fourier transforms at each position than from D.

    Multiply-adds per sample and group: two transforms of `dim` numbers a position and one back, measured as `3 log dim`
    for each number, against D, which is written, read, and added up number by number (twice `TRAFFIC`).
    """
    transforms = (2 * t + 1) * dim * (3 * math.log2(max(2, dim)) + TRAFFIC)
    return transforms < o * i * (t + 3 * TRAFFIC)


def sums_are_cheaper(t: int) -> bool:
    """Whether adding up per-sample gradients that are in the cache costs less than a matrix product over all rows.

    The product takes `t` multiply-adds for each number that the sum reads. Float32 on a CPU, one thread, from 128x128
    to 3072x768: 0.2 to 0.6 times the product's time from 8 positions on, 1.4 times at 4.
    """
    return t >= 8


def norms_form_rows(rows: Rows) -> bool:
    """Whether `squared_norm` computes D, of positions whose sum it can give as well."""
    v, _, t, _, o, i = dims(rows)
    return rows.kind == "float" and t > 1 and (product_of(rows) is not None or not ghost_is_cheaper(v, t, o, i))


def squares_need_rows(rows: Rows) -> bool:
    """Whether norms and second moments take so many multiply-adds for each element of D that reading D is cheaper."""
    v, _, t, _, o, i = dims(rows)
    direct = not (ghost_is_cheaper(v, t, o, i) or pairs_are_cheaper(v, t, o, i))
    return rows.kind == "float" and t >= REREAD_FROM and direct
