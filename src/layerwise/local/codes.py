"""Codes: free values for the outputs of layers, moved a little before the layers are fitted to them.

For a loss that is a mean over B samples, the relaxed objective of a minibatch is

    L(y, out(c)) + (μ/B) Σ_l ½ ‖c_l − W_l N_l(c)‖²

with the codes `c_l` in place of the layers' outputs, energies summed over features, and `N_l` the pieces of
the model between the layers. Sources: Choromanska et al. (2019), section 3; Carreira-Perpiñán and Wang (2014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.replay import CodedModel

__all__ = ["CodeStep", "code_energy", "sweep"]


@dataclass(frozen=True)
class CodeStep:
    """How codes move: `steps` gradient steps of rate `lr` with momentum, Nesterov's or plain.

    prox: weight of `½ ‖c − c_start‖²`, with the start held fixed, besides the coupling to the layer itself.
    Raises BadInput for settings that cannot be.
    """

    steps: int = 5
    lr: float = 0.3
    momentum: float = 0.9
    nesterov: bool = True
    prox: float = 0.0

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.lr >= 0 and 0 <= self.momentum < 1 and self.prox >= 0):
            raise BadInput(f"codes move by steps ≥ 1 with lr ≥ 0, momentum in [0, 1) and prox ≥ 0; got {self}")


def code_energy(
    coded: CodedModel,
    codes: Mapping[int, Tensor],
    index: int,
    readers: tuple[Sequence[int], bool],
    coupling: Mapping[int, float],
    batch: float,
) -> Tensor:
    """What one code adds to the objective downstream, times B: a scalar with a graph to `codes[index]`.

    B·L where the loss reads the code through no other code, and μ ½ ‖c_m − W_m N_m(c)‖² for every coded
    layer m that reads it, with μ its own coupling. readers: those uses, and whether the loss does.
    """
    uses, at_loss = readers
    wanted = [m for m in uses if m in codes and m != index]
    out = coded.piece(codes, wanted, at_loss)
    energy = codes[index].new_zeros(())
    if at_loss:
        assert out.loss is not None
        energy = energy + batch * out.loss
    for m in wanted:
        energy = energy + coupling[m] / 2 * (codes[m] - out.predictions[m]).square().sum()
    return energy


def sweep(
    coded: CodedModel,
    start: Mapping[int, Tensor],
    coupling: Mapping[int, float],
    batch: float,
    step: CodeStep,
) -> dict[int, Tensor]:
    """Move every code from its start, the last first, on its own terms, the codes above already moved.

    c_l minimises `downstream(c_l) + μ ½ ‖c_l − z_l‖² + prox ½ ‖c_l − z_l‖²`, z_l the start (the layer's own output,
    detached), by a few gradient steps. start: codes by use index, `[*out_shape]`; coupling: μ of each. Returns the
    moved codes.
    """
    codes = {i: z.detach() for i, z in start.items()}
    readers = coded.consumers(codes)
    for index in sorted(codes, reverse=True):
        anchor = codes[index]
        pulled = coupling[index] + step.prox
        velocity = torch.zeros_like(anchor)
        code = anchor.clone()
        for _ in range(step.steps):
            ahead = code + step.momentum * velocity if step.nesterov else code
            leaf = ahead.detach().requires_grad_()
            energy = code_energy(coded, {**codes, index: leaf}, index, readers[index], coupling, batch)
            g = torch.autograd.grad(energy, leaf, allow_unused=True)[0] if energy.requires_grad else None
            g = torch.zeros_like(leaf) if g is None else g
            velocity = step.momentum * velocity - step.lr * (g + pulled * (ahead - anchor))
            code = code + velocity
        codes[index] = code
    return codes
