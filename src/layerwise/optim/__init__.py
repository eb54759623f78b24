"""Optimizers: thin `torch.optim.Optimizer` classes over pure updates. Each takes `step(closure)`.

All names here are of optimizers and their settings: `lw.optim.KFAC` is the optimizer, `lw.KFAC` the quantity.
"""

from layerwise.optim.layer_local.altmin import AltMin
from layerwise.optim.layer_local.choices import LocalUpdate, Objective
from layerwise.optim.layer_local.locoprop import LocoProp
from layerwise.optim.layer_local.owners import Execution
from layerwise.optim.layer_local.trace import Trace
from layerwise.optim.layer_local.updates import CodeUpdate, Minibatch, WeightUpdate
from layerwise.optim.second_order.data_parallel import DataParallel
from layerwise.optim.second_order.diag_newton import DiagNewton
from layerwise.optim.second_order.kfac import KFAC
from layerwise.optim.second_order.preconditioner import Preconditioner
from layerwise.optim.second_order.settings import Curvature, Schedule

__all__ = [
    "KFAC", "AltMin", "CodeUpdate", "Curvature", "DataParallel", "DiagNewton", "Execution", "LocalUpdate", "LocoProp",
    "Minibatch", "Objective", "Preconditioner", "Schedule", "Trace", "WeightUpdate",
]  # fmt: skip
