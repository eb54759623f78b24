"""Codes: free values in place of the layers' outputs, updated before the layers are fitted to them.

For a loss that is a mean over B samples, the relaxed objective of a minibatch is

    L(y, out(c)) + (1/B) Σ_l (μ_l ½ ‖c_l + u_l − W_l N_l(c)‖² + λ_l ‖c_l‖₁)

with the codes `c_l` in place of the layers' outputs, energies summed over features, `N_l` the pieces of the model
between the layers, and scaled multipliers `u_l` (0 but for the augmented Lagrangian). Sources: Choromanska et al.
(2019), section 3; Carreira-Perpiñán and Wang (2014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.operators.ridge import ridge
from layerwise.replay.coded import CodedModel
from layerwise.tensors import without_grad

__all__ = ["CodeStep", "Terms", "code_energy", "code_type", "sweep"]

NONE: Mapping[int, Tensor] = {}


def code_type(output: torch.dtype) -> torch.dtype:
    """The type of the codes of outputs of a type: at least float32, or small steps would be rounded away."""
    return torch.promote_types(output, torch.float32)


@dataclass(frozen=True)
class CodeStep:
    """How the codes of a sweep move, each to lower its own terms of the objective, through one block.

        downstream(c) + own·μ ½ ‖c + u − z‖² + prox ½ ‖c − z‖² + λ ‖c‖₁,     z the layer's output, held fixed

    by `steps` gradient steps of rate `lr` with momentum, Nesterov's or plain, and a soft threshold of lr·λ after each.
    solve: "closed" takes the exact minimum where only linear layers with codes read the code and λ is 0; other codes
    take gradient steps. own: the share of μ that holds a code at its own layer while it moves. In closed form a linear
    layer with singular value σ passes on `σ/(own + prox/μ + σ²)` of the displacement above it: at most half with
    own = 1, which vanishes with depth; take a smaller share, or `codes="jacobi"`, which passes on σ. Raises BadInput.
    """

    steps: int = 5
    lr: float = 0.3
    momentum: float = 0.9
    nesterov: bool = True
    prox: float = 0.0
    own: float = 1.0
    solve: Literal["gradient", "closed"] = "gradient"

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.lr >= 0 and 0 <= self.momentum < 1 and self.prox >= 0 and self.own >= 0):
            raise BadInput(f"codes move by steps ≥ 1, lr, prox, own ≥ 0 and momentum in [0, 1); got {self}")
        if self.solve not in ("gradient", "closed"):
            raise BadInput(f'codes are solved for by "gradient" or in "closed" form; got {self.solve!r}')


@dataclass(frozen=True)
class Terms:
    """The numbers of the relaxed objective, by use index: μ, λ of the codes, multipliers u; and B."""

    coupling: Mapping[int, float]
    batch: float
    l1: Mapping[int, float] | None = None
    multipliers: Mapping[int, Tensor] | None = None

    def aim(self, index: int, code: Tensor) -> Tensor:
        """What a layer is fitted to, `c + u`."""
        u = (self.multipliers or NONE).get(index)
        return code if u is None else code + u

    def sparsity(self, index: int) -> float:
        """λ of a code."""
        return (self.l1 or {}).get(index, 0.0)


def code_energy(
    coded: CodedModel, codes: Mapping[int, Tensor], index: int, readers: tuple[Sequence[int], bool], terms: Terms
) -> Tensor:
    """What one code adds to the objective downstream, times B: a scalar with a graph to `codes[index]`.

    B·L where the loss reads the code through no other code, and μ ½ ‖c_m + u_m − W_m N_m(c)‖² for every coded
    layer m that reads it, with μ its own coupling. readers: those uses, and whether the loss does.
    """
    uses, at_loss = readers
    wanted = [m for m in uses if m in codes and m != index]
    out = coded.piece(codes, wanted, at_loss)
    energy = codes[index].new_zeros(())
    if at_loss:
        assert out.loss is not None
        energy = energy + terms.batch * out.loss
    for m in wanted:
        energy = energy + terms.coupling[m] / 2 * (terms.aim(m, codes[m]) - out.predictions[m]).square().sum()
    return energy


def sweep(
    coded: CodedModel, start: Mapping[int, Tensor], terms: Terms, step: CodeStep, given: Mapping[int, Tensor] = NONE
) -> dict[int, Tensor]:
    """Move every code from its start, the last first, each with the codes above it already moved.

    start: the layers' outputs by use index, `[*out_shape]`. given: codes that were moved elsewhere. Returns all codes,
    in `code_type` of the outputs.
    """
    codes = {**{i: z.detach().to(code_type(z.dtype)) for i, z in start.items()}, **given}
    readers = coded.consumers(codes)
    for index in sorted(codes.keys() - given.keys(), reverse=True):
        moved = None
        if step.solve == "closed" and not terms.sparsity(index):
            moved = _closed(coded, codes, index, readers[index], terms, step)
        codes[index] = _descended(coded, codes, index, readers[index], terms, step) if moved is None else moved
    return codes


def _descended(
    coded: CodedModel, codes: Mapping[int, Tensor], index: int, readers: tuple[Sequence[int], bool], terms: Terms,
    step: CodeStep,
) -> Tensor:  # fmt: skip
    """A code after gradient steps on its terms of the objective."""
    anchor, own, sparse = codes[index], step.own * terms.coupling[index], terms.sparsity(index)
    u = (terms.multipliers or NONE).get(index)
    velocity, code = torch.zeros_like(anchor), anchor.clone()
    for _ in range(step.steps):
        ahead = code + step.momentum * velocity
        at = ahead if step.nesterov else code
        leaf = at.detach().requires_grad_()
        energy = code_energy(coded, {**codes, index: leaf}, index, readers, terms)
        g = torch.autograd.grad(energy, leaf, allow_unused=True)[0] if energy.requires_grad else None
        slope = (own + step.prox) * (at - anchor)
        slope = slope if g is None else slope + g
        slope = slope if u is None else slope + own * u
        new = ahead - step.lr * slope
        new = F.softshrink(new, step.lr * sparse) if sparse else new
        velocity, code = new - code, new
    return code


@without_grad
def _closed(
    coded: CodedModel, codes: Mapping[int, Tensor], index: int, readers: tuple[Sequence[int], bool], terms: Terms,
    step: CodeStep,
) -> Tensor | None:  # fmt: skip
    """The exact minimum over a code, where only linear layers with codes read it; None elsewhere."""
    uses, at_loss = readers
    if at_loss or not uses or not all(m in codes and coded.reads_directly(m, index, F.linear) for m in uses):
        return None
    z, own = codes[index], step.own * terms.coupling[index]
    u = (terms.multipliers or NONE).get(index)
    size = z.shape[-1]
    curvature, right = z.new_zeros(size, size), (own + step.prox) * z
    right = right if u is None else right - own * u
    for m in uses:
        call = coded.uses[m].call
        bound = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
        weight, bias, mu = bound["weight"].detach().to(z.dtype), bound.get("bias"), terms.coupling[m]
        aim = terms.aim(m, codes[m])
        aim = aim if bias is None else aim - bias.detach()
        curvature += mu * weight.T @ weight
        right = right + mu * aim @ weight
    return ridge(curvature, right.reshape(-1, size), own + step.prox).view(z.shape)
