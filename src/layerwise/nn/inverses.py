"""Target propagation: targets go down through inverses of the blocks, in the place of cotangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from layerwise.errors import BadInput

__all__ = ["TargetPropagation"]


class _Inverted(torch.autograd.Function):
    """The block's output; its backward sends the input what the inverse makes of the output's target."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, of: TargetPropagation) -> Tensor:
        ctx.save_for_backward(out, x)
        ctx.of = of
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (out, x), of = grads, ctx.saved_tensors, ctx.of
        if not ctx.needs_input_grad[1]:
            return g, None, None
        target = of.inverse(out - of.step * g)
        if not isinstance(target, Tensor) or target.shape != x.shape:
            seen = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise BadInput(
                f"TargetPropagation's inverse made {seen} of {tuple(out.shape)}; the input is {tuple(x.shape)}"
            )
        reached = of.inverse(out) if of.difference else x
        return g, (reached - target) / of.step, None


class TargetPropagation(nn.Module):
    """A block `h = f(x)` that sends its input a target through an inverse, not the derivative's cotangent.

        target of h:  ĥ = h − step·g,      target of x:  x̂ = inverse(ĥ) + x − inverse(h)        (difference)
                                                         x̂ = inverse(ĥ)                         (plain)

    with g the cotangent of h; x gets the cotangent `(x − x̂)/step`, so that any target made of cotangents with
    γ = step is x̂. Within the block, autograd's derivatives hold; the parameters of the inverse get none, and are
    trained by a loss of their own, as that of `inverse(f(x + noise))` against `x + noise`.

        block = lw.nn.TargetPropagation(nn.Sequential(nn.Linear(20, 30), nn.Tanh()), nn.Linear(30, 20), step=0.1)

    block, inverse: modules or functions of a tensor. step: γ; of a mean over N samples, γN. Raises BadInput for what
    is no function, for a step that is not positive, and in the backward pass where the inverse makes another shape.
    Source: Lee, Zhang, Fischer and Bengio, "Difference target propagation" (2015), sections 2 and 3.
    """

    def __init__(
        self, block: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], step: float = 1.0,
        difference: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if not (callable(block) and callable(inverse) and 0 < step < float("inf")):
            raise BadInput(
                f"TargetPropagation needs two functions and a step > 0; got {block!r}, {inverse!r}, {step!r}"
            )
        self.block, self.inverse, self.step, self.difference = block, inverse, step, difference

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        if not torch.is_grad_enabled():
            return self.block(x)
        out: Tensor = _Inverted.apply(self.block(x.detach()), x, self)
        return out

    def extra_repr(self) -> str:
        """For printing."""
        return f"step={self.step}, difference={self.difference}"
