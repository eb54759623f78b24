"""Optimizers: thin `torch.optim.Optimizer` classes over pure updates. Each takes `step(closure)`."""

from layerwise.optim.layer_local.altmin import AltMin
from layerwise.optim.layer_local.locoprop import LocoProp
from layerwise.optim.layer_local.trace import Trace
from layerwise.optim.second_order.data_parallel import DataParallel
from layerwise.optim.second_order.diag_newton import DiagNewton
from layerwise.optim.second_order.kfac import KFAC
from layerwise.optim.second_order.preconditioner import Preconditioner

__all__ = ["KFAC", "AltMin", "DataParallel", "DiagNewton", "LocoProp", "Preconditioner", "Trace"]
