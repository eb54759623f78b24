"""BackPACK's interface over layerwise's quantities: a script switches by changing its import.

    from layerwise.compat.backpack import backpack, extend
    from layerwise.compat.backpack.extensions import BatchGrad, DiagGGNExact

    model, lossfunc = extend(model), extend(nn.CrossEntropyLoss())
    loss = lossfunc(model(x), y)
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    model[0].weight.grad_batch

Names, fields, shapes, order and scaling are those of BackPACK 1.7. Where BackPACK is known to be silently wrong, the
result here is exact or a typed error:

- ignored targets are left out in second order too, and class weights count;
- circular and other padding modes, groups, group norms, any layer written in torch calls are exact, not skipped;
- a parameter used twice (tied weights, a module called twice) has its uses summed before anything is squared;
- `10 * loss` and sums of losses scale and add the curvature as well as the gradient;
- a loss of several forwards works, and a second backward pass overwrites the fields from its own graph;
- train-mode batch norm has no per-sample quantities: SamplesMixed. A NaN or infinite loss: NonFinite;
- a custom autograd Function on a parameter: UncoveredUse, in place of a missing field.

`extend` installs module hooks; what they record is owned by the autograd graph of a forward and freed with it.
"""

from layerwise.compat.backpack import extensions
from layerwise.compat.backpack.context import backpack
from layerwise.compat.backpack.read_tape import disable, extend

__all__ = ["backpack", "disable", "extend", "extensions"]
